"""Metrics against float64 loops over all pairs."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.core.blocks import candidates
from jsparse.core.reordering import Orders
from jsparse.estimators.minference import AShape, BlockSparse, VerticalSlash
from jsparse.evaluation import (
    output_error,
    pairs_attended,
    recalled_mass,
    tile_shares,
    visible_density,
)
from jsparse.evaluation.metrics import in_place, pairs_planned, pairs_visible
from jsparse.masks.reordered import follow
from tests.inputs import on_device, qkv

CAUSAL = js.masks.causal()
EPS = np.finfo(np.float32).eps


def dense_probs(q, k, q_len, kv_len):
    """Causal softmax in float64, [heads, q_len, kv_len]."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    logits = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(q.shape[-1])
    visible = np.arange(kv_len) <= np.arange(q_len)[:, None] + kv_len - q_len
    mass = np.where(visible, np.exp(logits - logits.max(-1, keepdims=True)), 0.0)
    total = mass.sum(-1, keepdims=True)
    return np.divide(mass, total, out=np.zeros_like(mass), where=total > 0), visible


def pairs_of(plan, heads, q_len, kv_len):
    """The pairs of tokens in a plan's tiles, in the plan's order."""
    tiles = np.asarray(plan.to_dense())
    tiles = np.repeat(tiles, heads // tiles.shape[0], axis=0)
    return tiles.repeat(plan.block_q, 1).repeat(plan.block_kv, 2)[:, :q_len, :kv_len]


def key_order(info, heads, kv_len):
    """Which key stands at each place, per head."""
    order = getattr(info, "kv_order", None)
    return np.tile(np.arange(kv_len), (heads, 1)) if order is None else np.asarray(order)


@pytest.mark.parametrize(
    ("q_len", "kv_len"),
    [(40, 75), *(pytest.param(n, m, marks=pytest.mark.slow) for n, m in [(70, 70), (75, 40)])],
)
@pytest.mark.parametrize(
    "method",
    [
        js.mean_pooled(block_size=16, density=0.4),
        js.xattention(block_size=16, stride=4, threshold=0.6),
        js.pbs_attn(block_size=8, threshold=0.3),
    ],
    ids=["mean_pooled", "xattention", "pbs_attn"],
)
def test_recall_and_counts_of_a_plan(method, q_len, kv_len):
    q, k, v = qkv(q_len, kv_len)

    @jax.jit
    def run(q, k, v):
        (_, sparse), _ = method.attend((), q, k, v, mask=CAUSAL, return_lse=True)
        _, dense = js.attend(q, k, v, mask=CAUSAL, return_lse=True)
        counted = pairs_attended(method, q, k, v, mask=CAUSAL)
        return *method.plan((), q, k, mask=CAUSAL), sparse, dense, counted

    plan, info, sparse, dense, counted = run(q, k, v)
    probs, visible = dense_probs(q, k, q_len, kv_len)
    order = key_order(info, 4, kv_len)
    placed = np.take_along_axis(pairs_of(plan, 4, q_len, kv_len), order.argsort(-1)[:, None], -1)
    kept = placed & visible

    rows = visible.any(-1)
    expected = np.where(kept, probs, 0.0).sum(-1)[:, rows].mean(-1)
    # an lse of n terms of unit-variance logits is good to a few eps times its size, about log n
    np.testing.assert_allclose(recalled_mass(sparse, dense), expected, rtol=16 * EPS * 8)
    assert expected.min() < 0.95

    np.testing.assert_allclose(counted, kept.sum((-1, -2)), rtol=16 * EPS)
    np.testing.assert_allclose(
        pairs_visible(CAUSAL, q_len, kv_len, 4), np.full(4, visible.sum()), rtol=16 * EPS
    )

    orders, grid = Orders.of(info), plan.grid
    tiles_seen = np.zeros((4, grid.q_blocks, grid.kv_blocks), bool)
    tiles_kept = np.zeros(tiles_seen.shape)
    for head, i, j in np.ndindex(tiles_seen.shape):
        rows, columns = (slice(n * grid.block_q, (n + 1) * grid.block_q) for n in (i, j))
        tiles_seen[head, i, j] = visible[rows, order[head, columns]].any()
        tiles_kept[head, i, j] = placed[head, rows, columns].mean()
    mask = follow(CAUSAL, orders, 4)
    np.testing.assert_array_equal(pairs_planned(plan, mask, 4), kept.sum((-1, -2)))
    np.testing.assert_array_equal(candidates(mask, grid, (), 4)[0], tiles_seen)
    tiles = np.asarray(plan.to_dense())
    expected = tiles.sum((-1, -2)) / tiles_seen.sum((-1, -2))
    np.testing.assert_allclose(visible_density(plan, mask, 4), expected, rtol=4 * EPS)
    shares = in_place(tiles.astype(np.float32), orders, grid)
    np.testing.assert_allclose(shares, tiles_kept, atol=4 * EPS)


def test_counts_see_the_mask_inside_a_methods_tiles():
    """A window of tokens attends to fewer pairs than its tiles hold."""
    q, k, v = qkv(300)
    counted = pairs_attended(js.streaming(num_sink=3, window=20), q, k, v, mask=CAUSAL)
    rows = np.arange(300)
    expected = sum(len({*range(min(3, i + 1)), *range(max(0, i - 19), i + 1)}) for i in rows)
    np.testing.assert_allclose(counted, np.full(4, expected), rtol=16 * EPS)


@pytest.mark.parametrize(
    "method",
    [
        *(row.factory() for row in js.registry.METHODS if row.name in ("moa", "powerattention")),
        js.streaming(num_sink=3, window=20),
        js.s2_attention(block_size=16, local_blocks=2, vert_stride=2),
        js.flashmoba(block_kv=16, top_k=3),
        js.minference(
            patterns=(AShape(20, 70), VerticalSlash(40, 60), BlockSparse(2), AShape(5, 9)),
            **{"block_size": 16, "last_q": 8, "forced_vertical": 2, "forced_slash": 3},
        ),
    ],
    ids=["moa", "powerattention", "streaming", "s2_attention", "flashmoba", "minference"],
)
def test_a_plan_and_what_it_says_it_masks_hold_the_pairs_attended_to(method, monkeypatch):
    # several programs' worth of tiles that are partly visible
    monkeypatch.setattr(sys.modules["jsparse.evaluation.metrics"], "_PAIRS_AT_ONCE", 2**16)
    q, k, v = qkv(300)
    plan, info = jax.jit(lambda q, k: method.plan((), q, k, mask=CAUSAL))(q, k)
    attended = jax.jit(lambda q, k, v: pairs_attended(method, q, k, v, mask=CAUSAL))(q, k, v)
    found = pairs_planned(plan, getattr(info, "mask", CAUSAL), 4)
    np.testing.assert_allclose(attended, found, rtol=16 * EPS)


def test_a_list_shared_by_heads_counts_for_each():
    plan = js.block_mask(CAUSAL, 300, 300)
    np.testing.assert_array_equal(visible_density(plan, CAUSAL, 4), np.ones(4))
    np.testing.assert_array_equal(visible_density(None, CAUSAL, 4), np.ones(4))


def test_parts_of_a_plan_count_by_their_area():
    """Tiles on the diagonal and two columns of the first block: 8 rows, those below by area."""
    sizes = {"q_len": 124, "kv_len": 124}
    tiles = jnp.broadcast_to(jnp.eye(8, dtype=bool), (2, 8, 8))
    tiles = js.BlockMask.from_dense(tiles, **sizes, block_q=16, block_kv=16)
    columns = jnp.zeros((2, 8, 124), bool).at[1, 1:, on_device([2, 9])].set(True)
    columns = js.BlockMask.from_dense(columns, **sizes, block_q=16, block_kv=1)
    found = visible_density((tiles, columns), CAUSAL, 4)
    np.testing.assert_allclose(found, np.repeat([8.0, 8 + 7 * 2 / 16], 2) / 36, rtol=4 * EPS)
    shares = tile_shares((tiles, columns), 4)
    expected = np.broadcast_to(np.eye(8), (4, 8, 8)).copy()
    expected[2:, 1:, 0] = 2 / 16
    np.testing.assert_array_equal(shares, expected)
    np.testing.assert_array_equal(tile_shares(tiles, 2), tiles.to_dense())


def test_output_error_against_numpy():
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(50, 3, 8))
    out = dense + 0.1 * rng.normal(size=dense.shape)
    error = output_error(on_device(out, jnp.float32), on_device(dense, jnp.float32))
    for head in range(3):
        a, b = out[:, head].ravel(), dense[:, head].ravel()
        gap = np.linalg.norm(a - b)
        # inputs are rounded to f32 before they are subtracted
        np.testing.assert_allclose(error.relative[head], gap / np.linalg.norm(b), rtol=200 * EPS)
        np.testing.assert_allclose(error.largest[head], np.abs(a - b).max(), rtol=200 * EPS)
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        np.testing.assert_allclose(error.cosine[head], cosine, rtol=16 * EPS)


def test_output_error_where_an_output_is_zero():
    zero, one = jnp.zeros((4, 1, 2)), jnp.ones((4, 1, 2))
    same, lost = output_error(zero, zero), output_error(zero, one)
    assert [float(x[0]) for x in same] == [0.0, 0.0, 1.0]
    assert [float(x[0]) for x in lost] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("order_heads", [1, 2, 4])
def test_tiles_of_tokens_in_another_order_in_their_own_places(order_heads):
    rng = np.random.default_rng(0)
    sizes = {"q_len": 21, "kv_len": 30, "block_q": 4, "block_kv": 8}
    plan = js.BlockMask.from_dense(on_device(rng.random((4, 6, 4)) < 0.5), **sizes)
    q_order = np.stack([rng.permutation(21) for _ in range(order_heads)])
    kv_order = np.stack([rng.permutation(30) for _ in range(order_heads)])
    shares = in_place(
        np.asarray(plan.to_dense(), np.float32),
        Orders(on_device(q_order), on_device(kv_order)),
        plan.grid,
    )
    pairs = pairs_of(plan, 4, 21, 30)
    for head in range(4):
        rows, columns = (x[head // (4 // order_heads)].argsort() for x in (q_order, kv_order))
        placed = pairs[head][rows][:, columns]
        for i, j in np.ndindex(6, 4):
            expected = placed[4 * i : 4 * i + 4, 8 * j : 8 * j + 8].mean()
            np.testing.assert_allclose(shares[head, i, j], expected, atol=8 * EPS)
