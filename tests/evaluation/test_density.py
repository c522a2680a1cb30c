"""What a method computes of what is visible: of one call, of a model's layers, and in print."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jsparse as js
import jsparse.nn
from jsparse.evaluation import DensityReport, density_of_layers
from tests.inputs import on_device, qkv

CAUSAL = js.masks.causal()
# every pair by itself, where what is asked is not how tiles are computed
PLAIN = {"implementation": "reference"}


def test_a_window_hides_pairs_inside_its_tiles():
    q, k, v = qkv(300, batch=(2,))
    lengths = on_device([300, 140])
    mask = CAUSAL & js.masks.lengths(lengths, lengths)
    method = js.streaming(num_sink=3, window=20)
    found = jax.jit(lambda *x: js.density_report(method, *x, mask=mask))(q, k, v)
    for n, length in enumerate([300, 140]):
        rows = np.arange(length)
        kept = sum(len({*range(min(3, i + 1)), *range(max(0, i - 19), i + 1)}) for i in rows)
        share = kept / (length * (length + 1) / 2)
        np.testing.assert_allclose(found.pairs[n], np.full(4, share), rtol=1e-5)
    # a row of tiles has its diagonal, the one before for the window and the first for the sinks
    np.testing.assert_allclose(found.tiles, np.ones((2, 4)))
    assert not found.overflowed


def test_of_nothing_visible_nothing_is_computed():
    nothing = js.masks.dense(jnp.zeros((1, 16, 16), bool))
    found = js.density_report(None, *qkv(16), mask=nothing)
    assert not found.tiles.any()
    assert not found.pairs.any()


@pytest.mark.parametrize(
    "method",
    [
        js.xattention(block_size=8, stride=4, threshold=0.4),
        js.pbs_attn(block_size=8, threshold=0.3),
        js.from_length(js.xattention(), min_length=100),
        None,
    ],
    ids=["tiles", "reordered", "short", "none"],
)
def test_heads_are_told_apart_whatever_the_method(method):
    q, k, v = qkv(60)

    @jax.jit
    def run(q, k, v):
        plan, info = (None, ()) if method is None else method.plan((), q, k, mask=CAUSAL)
        return js.density_report(method, q, k, v, mask=CAUSAL), plan, info

    found, plan, info = run(q, k, v)
    if plan is None or plan.block_q == 128:
        np.testing.assert_allclose(found.tiles, np.ones(4))
        np.testing.assert_allclose(found.pairs, np.ones(4), rtol=1e-5)
        return
    tiles = np.asarray(plan.to_dense())
    order = getattr(info, "kv_order", None)
    order = np.tile(np.arange(60), (4, 1)) if order is None else np.asarray(order)
    for head in range(4):
        seen = np.arange(60)[:, None] >= order[head]
        pairs = tiles[head].repeat(8, 0).repeat(8, 1)[:60, :60] & seen
        np.testing.assert_allclose(found.pairs[head], pairs.sum() / seen.sum(), rtol=1e-5)
        blocks = np.add.reduceat(np.add.reduceat(seen, range(0, 60, 8), 0), range(0, 60, 8), 1) > 0
        np.testing.assert_allclose(found.tiles[head], tiles[head].sum() / blocks.sum(), rtol=1e-6)
    assert 0.1 < found.pairs.min() < found.pairs.max() < 0.95


class Model(nnx.Module):
    def __init__(self):
        sizes = {"num_heads": 4, "num_kv_heads": 2, "rngs": nnx.Rngs(0)}
        method = js.xattention(block_size=8, stride=4, threshold=0.4)
        self.sparse = js.nn.SparseAttention(32, method=method, **sizes)
        self.dense = js.nn.SparseAttention(32, **sizes)

    def __call__(self, x, *, mask):
        return self.dense(x + self.sparse(x, mask=mask), mask=mask)


def test_layers_of_a_model_report_and_the_model_stays_as_it_was():
    model, x = Model(), jax.random.normal(jax.random.key(1), (2, 60, 32))
    before = jax.tree.structure(nnx.state(model))
    # in the order of their names, though the sparse one runs first
    dense, sparse = nnx.jit(lambda m, x: density_of_layers(m, x, mask=CAUSAL))(model, x)
    assert jax.tree.structure(nnx.state(model)) == before
    assert model.sparse.attention is None
    assert 0.1 < sparse.tiles.min() < sparse.tiles.max() < 0.95
    np.testing.assert_allclose(dense.tiles, np.ones((2, 4)))

    @nnx.jit
    def report(model, x):
        tensors = []
        probe = js.nn.with_attention(model, js.nn.recording(model.sparse._method, tensors))
        probe(x, mask=CAUSAL)
        return js.density_report(model.sparse.method, *tensors[0], mask=CAUSAL)

    expected = report(model, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), sparse, expected)


def test_a_layer_whose_method_has_parameters_reports():
    method = js.hisa(top_k=4, block_kv=8, index_heads=2, index_dim=8, rotary_dim=4)
    layer = js.nn.SparseAttention(32, num_heads=4, num_kv_heads=2, method=method, rngs=nnx.Rngs(0))
    run = nnx.jit(lambda layer, x: density_of_layers(layer, x, mask=CAUSAL))
    (found,) = run(layer, jnp.ones((2, 20, 32)))
    # 1, 2, 3 tokens for the first queries, 4 for the others, of those that a query sees
    np.testing.assert_allclose(found.pairs, (6 + 17 * 4) / (20 * 21 / 2), rtol=1e-5)


def wrapped(name, method, features=32):
    """What attends in a wrapper of this name to hidden states [2, length, features]."""
    if name == "SparseAttention":
        sizes = {"num_heads": 4, "num_kv_heads": 2, "rngs": nnx.Rngs(0)}
        layer = js.nn.SparseAttention(features, method=method, **sizes, **PLAIN)
        return lambda x: layer(x, mask=CAUSAL)
    attention_fn = js.nn.attention_fn(method, mask=CAUSAL, **PLAIN)
    if name == "nnx":
        sizes = {"decode": False, "rngs": nnx.Rngs(0)}
        return nnx.MultiHeadAttention(4, features, attention_fn=attention_fn, **sizes)
    if name == "linen":
        module = linen.MultiHeadDotProductAttention(4, attention_fn=attention_fn)
        params = jax.jit(module.init)(jax.random.key(0), jnp.ones((2, 8, features)))
        return lambda x: module.apply(params, x)

    def heads(x):
        return x.reshape(*x.shape[:-1], 4, -1)

    options = {"method": method, "is_causal": True, **PLAIN}
    return lambda x: js.dot_product_attention(*[heads(x)] * 3, **options)


WRAPPERS = "SparseAttention nnx linen dot_product_attention".split()


@pytest.mark.parametrize(
    "name", [*WRAPPERS[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in WRAPPERS[2:])]
)
def test_every_wrapper_switches_by_length_and_reports(name):
    """One method goes into each of them: dense below so many keys, and asked what it computes."""
    sparse = js.streaming(num_sink=2, window=5)
    reports = []
    asked = wrapped(name, js.reporting(js.from_length(sparse, min_length=24), reports.append))
    # each query's window, and the sinks before it
    kept = sum(min(i + 1, 5) + min(max(i - 4, 0), 2) for i in range(24))
    never = js.from_length(sparse, min_length=10**6)
    for length, like, share in ((23, never, 1.0), (24, sparse, kept / (24 * 25 / 2))):
        plain = wrapped(name, like)

        @jax.jit
        def both(x, plain=plain):
            reports.clear()
            return asked(x), plain(x), tuple(reports)

        out, expected, (report,) = both(jax.random.normal(jax.random.key(1), (2, length, 32)))
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_allclose(report.pairs, np.full((2, 4), share), rtol=1e-5)


def test_a_factory_is_no_method_to_report_on(without_shape_checks):
    with pytest.raises(ValueError, match="js.xattention()"):
        js.reporting(js.xattention, print)


def test_attentions_that_are_mixed_are_added_up():
    method = js.nsa(
        **{"compression_size": 8, "stride": 4, "block_kv": 8, "top_k": 3},
        **{"num_init": 1, "num_local": 1, "window": 6},
    )
    params = method.init(jax.random.key(0), num_heads=4, num_kv_heads=2, dim=16, features=8)

    @jax.jit
    def report(x, *tensors):
        return js.density_report(method, *tensors, params=params, x=x, mask=CAUSAL)

    found = report(jnp.ones((45, 8)), *qkv(45))
    rows = np.arange(45)
    windows = [sum(4 * i + 7 <= row for i in range(10)) for row in rows]
    # own block up to the query, the others whole
    selected = [min(2, row // 8) * 8 + row % 8 + 1 for row in rows]
    local = np.minimum(rows + 1, 6)
    share = (np.sum(windows) + np.sum(selected) + local.sum()) / (45 * 46 / 2)
    np.testing.assert_allclose(found.pairs, np.full(4, share), rtol=1e-5)
    # fewer keys than a window has
    short = report(jnp.ones((5, 8)), *qkv(5))
    np.testing.assert_allclose(short.pairs, 2 * np.ones(4), rtol=1e-5)


def test_a_report_prints_a_line_per_head():
    tiles = on_device([[0.25, 0.5], [0.75, 0.5]])
    text = str(DensityReport(tiles, tiles / 2, on_device(False)))
    assert text.splitlines() == [
        "head 0   tiles  50.0 %   pairs  25.0 %",
        "head 1   tiles  50.0 %   pairs  25.0 %",
        "mean     tiles  50.0 %   pairs  25.0 %",
    ]
    q, k, v = qkv(60)
    method = js.mean_pooled(block_size=8, density=1.0, width=2)
    assert "a list was too short" in str(js.density_report(method, q, k, v, mask=CAUSAL))
