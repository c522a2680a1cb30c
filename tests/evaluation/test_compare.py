"""Known figures are found, and a stopped run goes on where it was."""

import functools
import json
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.evaluation import Captured, compare
from jsparse.evaluation.compare import Setting, settings
from jsparse.evaluation.store import Store, fingerprint
from tests.inputs import leveled, on_device, qkv
from tests.oracles import blasst as oracle

LENGTH = 300
KEY = jax.random.key(0)
ROWS = {row.name: row for row in js.registry.METHODS}
WHICH = [
    Setting(ROWS["flashmask"], None),
    Setting(ROWS["streaming"], 64),
    Setting(ROWS["mean_pooled"], 0.3),
    Setting(ROWS["mean_pooled"], 1.0),
]


def captured(layers=2, **sizes):
    return [Captured(*qkv(LENGTH, seed=seed, **sizes)) for seed in range(layers)]


@pytest.fixture(scope="module")
def comparison():
    def score(attention):
        return 1.0 if attention is None else 1.25

    return compare(captured(), which=WHICH, score=score, repeats=1)


def test_figures_of_exact_and_sparse_settings(comparison):
    exact, window, some, everything = comparison.results
    for result in (exact, everything):
        np.testing.assert_allclose(result.density, 1.0)
        np.testing.assert_allclose(result.recall, 1.0, atol=2e-6)
        np.testing.assert_allclose(result.token_density, 1.0, atol=2e-6)
        assert np.max(result.error) < 2e-6
    assert exact.flops >= exact.dense_flops
    assert exact.backward_flops == exact.dense_backward_flops
    # 3 rows of tiles, of 1, 2 and 3 visible; a window of 64 leaves out the last row's first tile
    # but for the sinks in it, so all six are computed, for few of their tokens
    np.testing.assert_allclose(window.density, 1.0)
    pairs = sum(len({*range(min(4, i + 1)), *range(max(0, i - 63), i + 1)}) for i in range(LENGTH))
    np.testing.assert_allclose(window.token_density, pairs / (LENGTH * (LENGTH + 1) / 2), rtol=1e-5)
    # forced first and diagonal tiles: 1 + 2 + 2 of 6
    np.testing.assert_allclose(some.density, 5 / 6, rtol=1e-6)
    assert some.backward_flops == pytest.approx(some.dense_backward_flops * 5 / 6)
    for result in (window, some):
        assert 0 < np.max(result.recall) < 1
        assert np.min(result.error) > 1e-3
        assert np.max(result.cosine) < 1
    for result in comparison.results:
        assert np.shape(result.error) == (2, 4)
        assert result.seconds > 0
        assert result.plan_seconds > 0
        assert not result.overflowed
        assert result.score == 1.25
    assert comparison.dense_score == 1.0
    assert comparison.tiles["mean_pooled 0.3"][0].shape == (4, 3, 3)


def test_a_model_is_scored_under_its_own_mask():
    (layer,) = captured(1)
    narrow = js.masks.causal() & js.masks.sliding_window(left=5)
    found = []

    def score(attention):
        if attention is not None:
            found.append(attention(*layer, mask=narrow, x=None, positions=None))
        return 0.0

    which = [Setting(ROWS["mean_pooled"], 1.0)]
    compare([layer], which=which, score=score, repeats=1)
    expected = js.attend(*layer, mask=narrow, implementation="reference")
    np.testing.assert_allclose(found[0], expected, atol=3e-6)


@pytest.mark.parametrize(
    ("mask", "jitted", "known"),
    [
        (js.masks.causal(), False, True),
        (js.masks.causal() & js.masks.sliding_window(left=5), False, False),
        (js.masks.causal(), True, False),
    ],
    ids=["as timed", "another mask", "part of a program"],
)
def test_what_the_model_ran_need_not_run_once_more(mask, jitted, known):
    (layer,) = captured(1)
    runs = []

    def under(mask, q, k, v):
        runs.append(isinstance(q, jax.core.Tracer))
        return js.attend(q, k, v, mask=mask, return_lse=True)

    module = sys.modules["jsparse.evaluation.compare"]
    inside = module._Inside(under, js.masks.causal(), layer)

    def model(q, k, v):
        return inside(q, k, v, mask=mask, x=None, positions=None)

    (jax.jit(model) if jitted else model)(*layer)
    assert inside.compiled == known
    assert runs == [jitted]
    module._timed(functools.partial(under, mask), [layer], 2, compiled=inside.compiled)
    assert len(runs) == (3 if known else 4)


def test_what_is_decided_on_the_way_is_no_plan_and_saves_half_of_what_it_skips():
    layer = Captured(*leveled(LENGTH, block=128))
    (result,) = compare([layer], which=[Setting(ROWS["blasst"], 0.2)], repeats=1).results
    _, _, kept = oracle.attend(*layer, 0.2, block_q=128, block_kv=128)
    tiles = kept.sum((1, 2))
    assert 12 <= tiles.sum() < 24
    np.testing.assert_allclose(result.density, [tiles / 6], rtol=1e-6)
    pairs = np.repeat(np.repeat(kept, 128, -1), 128, -2)[:, :LENGTH, :LENGTH] & np.tri(
        LENGTH, dtype=bool
    )
    total = LENGTH * (LENGTH + 1) / 2
    np.testing.assert_allclose(result.token_density, [pairs.sum((1, 2)) / total], rtol=1e-5)
    assert result.plan_seconds == result.plan_flops == 0
    assert result.flops == pytest.approx(result.dense_flops * (1 + tiles.sum() / 24) / 2)
    assert result.backward_flops == pytest.approx(result.dense_backward_flops * tiles.sum() / 24)


def test_a_traced_control_gives_what_a_static_one_gives(comparison):
    layer = captured()[0]
    plan, _ = js.mean_pooled(density=0.3).plan((), layer.q, layer.k, mask=js.masks.causal())
    np.testing.assert_array_equal(comparison.tiles["mean_pooled 0.3"][0], plan.to_dense())


@pytest.mark.parametrize("row", [r for r in js.registry.METHODS if r.control], ids=lambda r: r.name)
def test_only_controls_that_can_be_traced_are(row, without_shape_checks):
    """The registry's column is what lets settings share a program."""
    layer = captured(1)[0]

    def density(value):
        method = row.factory(**{row.control: value})
        sizes = {"num_heads": layer.q.shape[-2], "num_kv_heads": layer.k.shape[-2]}
        params = method.init(jax.random.key(0), dim=layer.q.shape[-1], features=1, **sizes)
        return method.plan(params, layer.q, layer.k, mask=js.masks.causal())[0].kv_num_blocks

    if row.control_traced:
        value = on_device(row.settings[0], jnp.float32)
        np.testing.assert_array_equal(jax.jit(density)(value), density(row.settings[0]))
    else:
        with pytest.raises(ValueError, match=row.control):
            jax.jit(density)(on_device(row.settings[0]))


def test_what_kv_heads_share_out_is_no_more_than_they_are():
    layer = captured(1)[0]
    setting = Setting(ROWS["s2_attention"], 1)
    kv_heads = layer.k.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (result,) = compare([layer], which=[setting], repeats=1).results
    fitting = js.s2_attention(local_blocks=1, vert_stride=kv_heads)
    plan, _ = fitting.plan((), layer.q, layer.k, mask=js.masks.causal())
    tiles = np.repeat(plan.kv_num_blocks.sum(-1), 4 // plan.list_heads)
    # of 5 rows of tiles with a causal mask
    np.testing.assert_allclose(result.density, [tiles / 15], rtol=1e-6)


def test_settings_cover_every_causal_method_that_has_nothing_to_learn():
    names = [setting.row.name for setting in settings()]
    rows = [row for row in js.registry.METHODS if row.causal]
    sizes = {"num_heads": 2, "num_kv_heads": 2, "dim": 8, "features": 8}
    parameters = {
        r.name: jax.tree.leaves(jax.eval_shape(lambda r=r: r.factory().init(KEY, **sizes)))
        for r in rows
    }
    assert set(names) == {name for name, found in parameters.items() if not found}
    assert len({setting.label for setting in settings()}) == len(names)
    # what models are trained with is shown once, all of it to who asks for it
    assert names.count("powerattention") == 1
    assert [s.value for s in settings(["powerattention"])] == [1, 2, 5]
    assert names.count("streaming") == 3


def test_tiles_of_single_queries_are_shown_together():
    layer, method = captured(1)[0], js.flashmoba(block_kv=128, top_k=1)
    setting = Setting(ROWS["flashmoba"], 1)
    (tiles,) = compare([layer], which=[setting], repeats=1).tiles[setting.label]
    plan, _ = method.plan((), layer.q, layer.k, mask=js.masks.causal())
    each = np.asarray(plan.to_dense())
    rows = [each[:, first : first + 128].mean(1) for first in (0, 128, 256)]
    np.testing.assert_allclose(tiles, np.stack(rows, 1), rtol=1e-6)


def test_block_reaches_methods_that_have_one():
    layer = captured(1)[0]
    chosen = {s.row.name: s for s in settings(block=64)}
    for name, size in (("mean_pooled", 64), ("xattention", 64), ("streaming", 128)):
        plan, _ = chosen[name].method().plan((), layer.q, layer.k, mask=js.masks.causal())
        assert plan.block_q == size


def test_settings_refuse_a_block_before_anything_runs():
    with pytest.raises(ValueError, match="block_size=100 must be a multiple of 16"):
        settings(["xattention"], block=100)


def test_settings_refuse_names_that_do_not_apply(monkeypatch):
    with pytest.raises(ValueError, match="no method 'nothing'"):
        settings(["nothing"])
    trained = ROWS["streaming"]._replace(learns=True)
    # the function hides the module of its name
    module = sys.modules["jsparse.evaluation.compare"]
    monkeypatch.setattr(module, "METHODS", (trained, ROWS["flashmask"]))
    with pytest.raises(ValueError, match="is not causal, or has parameters"):
        settings(["streaming"])


def test_layers_of_different_shapes_are_refused():
    other = Captured(*qkv(LENGTH, heads=2, kv_heads=1))
    with pytest.raises(ValueError, match="Layer 1 has q"):
        compare([captured(1)[0], other], which=WHICH)
    with pytest.raises(ValueError, match="capture at least one"):
        compare([], which=WHICH)


def test_a_text_within_a_tile_is_refused():
    with pytest.raises(ValueError, match="100 tokens, a tile 128"):
        compare([Captured(*qkv(100))], which=WHICH)


class Stopped(Exception):
    """What interrupts a run in these tests."""


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    partial = tmp_path / "run.partial.json"
    scored = []

    def score(attention):
        if len(scored) == 3:
            raise Stopped
        scored.append(attention)
        return float(len(scored))

    def run(layers=None):
        return compare(
            layers or captured(1), which=WHICH[:3], score=score, repeats=1, partial=partial
        )

    with pytest.raises(Stopped):
        run()
    assert set(json.loads(partial.read_text())["figures"]) == {
        "dense score", "flashmask", "streaming 64",
    }  # fmt: skip
    scored.clear()
    second = run()
    # dense and two settings were kept: one is computed
    assert [r.score for r in second.results] == [2.0, 3.0, 1.0]
    assert second.dense_score == 1.0
    assert not partial.exists()


def test_figures_of_other_tensors_are_not_taken_up(tmp_path):
    path = tmp_path / "partial.json"
    first, second = captured(1)[0], captured(2)[1]
    Store(path, fingerprint(first)).get("a", lambda: 1)
    assert Store(path, fingerprint(first)).get("a", lambda: 2) == 1
    assert Store(path, fingerprint(first, "more repeats")).get("a", lambda: 3) == 3
    assert Store(path, fingerprint(second)).get("a", lambda: 4) == 4
    changed = first._replace(v=first.v.at[5, 1, 3].add(1e-3))
    assert Store(path, fingerprint(changed)).get("a", lambda: 5) == 5


def test_fingerprints_know_nan():
    x = on_device([1.0, jnp.nan])
    assert fingerprint([x]) == fingerprint([x])


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"tensors": []}'])
def test_a_damaged_partial_file_is_started_afresh(tmp_path, content):
    path = tmp_path / "partial.json"
    path.write_text(content)
    assert Store(path, "x").get("a", lambda: 7) == 7
    assert Store(path, "x").get("a", lambda: 8) == 7
    assert [p.name for p in tmp_path.iterdir()] == ["partial.json"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        Store(tmp_path / "file" / "partial.json", "x").get("a", lambda: 1)
