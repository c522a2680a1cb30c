"""Metrics against float64 loops over all pairs."""

import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.core.blocks import candidates
from jsparse.evaluation import (
    output_error,
    pairs_attended,
    recalled_mass,
    tile_shares,
    visible_density,
)
from jsparse.evaluation.metrics import pairs_visible
from tests.inputs import qkv

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
    tiles = np.asarray(plan.to_dense())
    tiles = np.repeat(tiles, heads // tiles.shape[0], axis=0)
    return tiles.repeat(plan.block_q, 1).repeat(plan.block_kv, 2)[:, :q_len, :kv_len]


@pytest.mark.parametrize(("q_len", "kv_len"), [(70, 70), (40, 75), (75, 40)])
@pytest.mark.parametrize(
    "method",
    [
        js.mean_pooled(block_size=16, density=0.4),
        js.xattention(block_size=16, stride=4, threshold=0.6),
    ],
    ids=["mean_pooled", "xattention"],
)
def test_recall_and_counts_of_a_plan(method, q_len, kv_len):
    q, k, v = qkv(q_len, kv_len)
    plan, _ = method.plan((), q, k, mask=CAUSAL)
    probs, visible = dense_probs(q, k, q_len, kv_len)
    kept = pairs_of(plan, 4, q_len, kv_len) & visible

    (_, sparse), _ = method.attend((), q, k, v, mask=CAUSAL, return_lse=True)
    _, dense = js.attend(q, k, v, mask=CAUSAL, return_lse=True)
    rows = visible.any(-1)
    expected = np.where(kept, probs, 0.0).sum(-1)[:, rows].mean(-1)
    # an lse of n terms of unit-variance logits is good to a few eps times its size, about log n
    np.testing.assert_allclose(recalled_mass(sparse, dense), expected, rtol=16 * EPS * 8)
    assert expected.min() < 0.95

    counted = pairs_attended(method, q, k, v, mask=CAUSAL)
    np.testing.assert_allclose(counted, kept.sum((-1, -2)), rtol=16 * EPS)
    np.testing.assert_allclose(
        pairs_visible(CAUSAL, q_len, kv_len, 4), np.full(4, visible.sum()), rtol=16 * EPS
    )

    seen, _ = candidates(CAUSAL, plan.grid, (), 4)
    grid = plan.grid
    tiles_seen = np.array(
        [
            [
                visible[16 * i : 16 * i + 16, 16 * j : 16 * j + 16].any()
                for j in range(grid.kv_blocks)
            ]
            for i in range(grid.q_blocks)
        ]
    )
    np.testing.assert_array_equal(seen[0], tiles_seen)
    computed = np.asarray(plan.to_dense()).sum((-1, -2))
    np.testing.assert_allclose(
        visible_density(plan, CAUSAL, 4), computed / tiles_seen.sum(), rtol=4 * EPS
    )


def test_counts_see_the_mask_inside_a_methods_tiles():
    """A window of tokens attends to fewer pairs than its tiles hold."""
    q, k, v = qkv(300)
    counted = pairs_attended(js.streaming(num_sink=3, window=20), q, k, v, mask=CAUSAL)
    rows = np.arange(300)
    expected = sum(len({*range(min(3, i + 1)), *range(max(0, i - 19), i + 1)}) for i in rows)
    np.testing.assert_allclose(counted, np.full(4, expected), rtol=16 * EPS)


def test_a_list_shared_by_heads_counts_for_each():
    plan = js.block_mask(CAUSAL, 300, 300)
    np.testing.assert_array_equal(visible_density(plan, CAUSAL, 4), np.ones(4))
    np.testing.assert_array_equal(visible_density(None, CAUSAL, 4), np.ones(4))


def test_parts_of_a_plan_count_by_their_area():
    """Tiles on the diagonal and two columns of the first block: 8 rows, those below by area."""
    sizes = {"q_len": 124, "kv_len": 124}
    tiles = jnp.broadcast_to(jnp.eye(8, dtype=bool), (2, 8, 8))
    tiles = js.BlockMask.from_dense(tiles, **sizes, block_q=16, block_kv=16)
    columns = jnp.zeros((2, 8, 124), bool).at[1, 1:, jnp.asarray([2, 9])].set(True)
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
    error = output_error(jnp.asarray(out, jnp.float32), jnp.asarray(dense, jnp.float32))
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
