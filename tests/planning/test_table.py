"""Tables of what each head is given: round trips, and what is wrong with a file in one sentence."""

import json

import numpy as np
import pytest
from flax import nnx

import jsparse as js
import jsparse.nn
from jsparse.planning import Choice, Provenance, Table, load_table, methods_of, save_table
from tests.inputs import qkv

CAUSAL = js.masks.causal()
PROVENANCE = Provenance("a model", 300, 300, "kept_mass", {"budget": 0.5})
LAYERS = (
    (Choice(js.AShape(4, 60), 0.9, 0.3), Choice(js.VerticalSlash(30, 50), 0.8, 0.2)),
    (Choice(js.BlockSparse(2), None, 0.4), Choice(js.AShape(4, 60))),
)
PATTERNS = Table("minference", {"block_size": 32}, LAYERS, PROVENANCE)
NUMBERS = (Choice(0.5), Choice(0.9)), (Choice(0.7), Choice(1.0))
THRESHOLDS = Table("xattention", {"stride": 8}, NUMBERS, PROVENANCE)


@pytest.mark.parametrize("table", [PATTERNS, THRESHOLDS], ids=lambda t: t.method)
def test_what_is_saved_is_loaded(table, tmp_path):
    path = tmp_path / "new" / "plan.json"
    save_table(table, path)
    assert load_table(path) == table
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]
    content = json.loads(path.read_text())
    assert np.shape(content["layers"]) == (2, 2)
    assert (content["schema"], content["version"]) == ("jsparse heads", 1)


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path):
    path = tmp_path / "plan.json"
    save_table(PATTERNS._replace(arguments={"block_size": np.int64(32)}), path)
    assert load_table(path) == PATTERNS


def test_methods_are_those_of_each_layer():
    q, k, _ = qkv(300, heads=2, kv_heads=1)
    for method, layer in zip(methods_of(THRESHOLDS), THRESHOLDS.layers, strict=True):
        tiles = method.plan((), q, k, mask=CAUSAL)[0].to_dense()
        for head, choice in enumerate(layer):
            alone = js.xattention(stride=8, threshold=choice.value).plan((), q, k, mask=CAUSAL)[0]
            np.testing.assert_array_equal(tiles[head], alone.to_dense()[head])
    first, _ = methods_of(PATTERNS)
    given = js.minference(block_size=32, patterns=[choice.value for choice in LAYERS[0]])
    for ours, theirs in zip(*(m.plan((), q, k)[0] for m in (first, given)), strict=True):
        np.testing.assert_array_equal(ours.to_dense(), theirs.to_dense())


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        sizes = {"num_heads": 2, "num_kv_heads": 1, "rngs": rngs}
        self.layers = nnx.List([js.nn.SparseAttention(16, **sizes) for _ in range(2)])

    def __call__(self, x):
        return sum(layer(x, mask=CAUSAL) for layer in self.layers)


def test_a_model_takes_the_methods_of_a_table():
    model, x = Model(), qkv(300, heads=1, dim=16)[0][:, 0]
    dense, planned = model(x), js.nn.with_methods(model, methods_of(PATTERNS))
    expected = 0
    for layer, method in zip(model.layers, methods_of(PATTERNS), strict=True):
        layer.method = method
        expected = expected + layer(x, mask=CAUSAL)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(planned, x), expected, atol=2e-6)
    assert np.abs(np.asarray(expected - dense)).max() > 1e-3
    with pytest.raises(ValueError, match="1 methods for 2 attention layers"):
        js.nn.with_methods(model, methods_of(PATTERNS)[:1])


def change(content, *path, to):
    for name in path[:-1]:
        content = content[name]
    content[path[-1]] = to


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        (["schema"], "other", "no table of heads"),
        (["version"], 2, "version 2 of the schema, this jsparse reads 1"),
        (["method"], "streaming", "'streaming', which has nothing to set per head"),
        (["per_head"], "threshold", "sets 'threshold' per head; minference takes 'patterns'"),
        (["arguments"], 3, "arguments is 3"),
        (["provenance"], {}, "provenance must have source"),
        (["layers"], [], "has no layers"),
        (["layers", 1], [{}], "layer 1 has 1 heads and layer 0 2"),
        (["layers", 1, 0], {"value": 1}, "layer 1, head 0 is {'value': 1}; it must have value"),
        (["layers", 0, 1, "value"], 0.5, "layer 0, head 1 has 0.5; its kind must be one of AShape"),
        (["layers", 0, 1, "value"], {"kind": "AShape", "n": 1}, "AShape takes n_init, n_local"),
        (["layers", 1, 0, "value", "top_k"], 0, "layer 1: top_k=0"),
        (["arguments"], {"nothing": 3}, "layer 0: .*nothing"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(tmp_path, path, to, message, without_shape_checks):
    file = tmp_path / "plan.json"
    save_table(PATTERNS, file)
    content = json.loads(file.read_text())
    change(content, *path, to=to)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        load_table(file)
    assert str(error.value).startswith(str(file))


def test_a_threshold_is_a_number_in_range(tmp_path):
    file = tmp_path / "plan.json"
    save_table(THRESHOLDS, file)
    text = file.read_text()
    for wrong, message in (("1.5", "layer 1: threshold="), ('"x"', "head 1 has 'x'; it must be a")):
        file.write_text(text.replace("1.0", wrong))
        with pytest.raises(ValueError, match=message):
            load_table(file)


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}"])
def test_other_files_are_refused(tmp_path, content):
    file = tmp_path / "plan.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="make one with jsparse plan"):
        load_table(file)
    with pytest.raises(ValueError, match="not a readable table"):
        load_table(tmp_path / "nothing.json")
