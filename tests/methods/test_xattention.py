"""XAttention against its oracle, and the checks of its specification."""

import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.core.scores import antidiagonal_cells
from jsparse.estimators.xattention import antidiagonal_scores
from tests.inputs import on_device, qkv
from tests.oracles import xattention as oracle

CAUSAL = js.masks.causal()
WORKED_Q = on_device([1, 0, 2, 0, 1, 1, 0, 2, 3, 1, 0, 1], jnp.float32)[:, None, None]
WORKED_K = on_device([1, 2, 0, 1, 0, 2, 1, 0, 1, 1, 2, 0], jnp.float32)[:, None, None]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "stride", "block"),
    [(32, 32, 2, 8), (24, 40, 4, 8), (29, 43, 2, 8), (21, 40, 4, 8), (3, 5, 4, 8)],
)
def test_scores_and_tiles_equal_the_oracle(q_len, kv_len, stride, block, causal):
    q, k, _ = qkv(q_len, kv_len, dim=8)
    mask = CAUSAL if causal else None
    scores = antidiagonal_scores(q, k, stride=stride, block_size=block, norm=0.7, mask=mask)
    expected = oracle.block_scores(q, k, stride=stride, block=block, norm=0.7, causal=causal)
    np.testing.assert_allclose(scores, expected, rtol=2e-5, atol=2e-6)
    for threshold in (0.3, 0.6, 0.9, 1.0):
        method = js.xattention(stride=stride, block_size=block, threshold=threshold, norm=0.7)
        plan, _ = method.plan((), q, k, mask=mask)
        sizes = {"q_len": q_len, "kv_len": kv_len, "block": block}
        tiles = oracle.select(expected, threshold, causal=causal, **sizes)
        np.testing.assert_array_equal(plan.to_dense(), tiles)


def test_worked_logits():
    q_cells = antidiagonal_cells(WORKED_Q, 2, reverse=True)[:, 0]
    k_cells = antidiagonal_cells(WORKED_K, 2, reverse=False)[:, 0]
    logits = q_cells @ k_cells.T / 2  # sqrt(H) = 1, S = 2
    for row, expected in enumerate(([1.0], [2.0, 1.0], [1.5, 0.5, 1.0])):
        np.testing.assert_allclose(logits[row, : row + 1], expected)
    scores = oracle.block_scores(WORKED_Q, WORKED_K, stride=2, block=4)[0]
    expected = [[2, 0, 0], [1.192804, 0.807196, 0], [0.837571, 0.59982, 0.562609]]
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_worked_example():
    scores = antidiagonal_scores(WORKED_Q, WORKED_K, stride=2, block_size=4, mask=CAUSAL)
    expected = [[2, 0, 0], [1.192804, 0.807196, 0], [0.837571, 0.59982, 0.562609]]
    np.testing.assert_allclose(scores[0], expected, atol=1e-6)
    for threshold, last in ((0.5, [1, 0, 1]), (0.75, [1, 1, 1]), (0.9, [1, 1, 1])):
        method = js.xattention(stride=2, block_size=4, threshold=threshold)
        plan, _ = method.plan((), WORKED_Q, WORKED_K, mask=CAUSAL)
        np.testing.assert_array_equal(plan.to_dense()[0], [[1, 0, 0], [1, 1, 0], last])


def test_stride_one_is_the_exact_block_mass():
    q, k, _ = qkv(24, dim=8)
    scores = antidiagonal_scores(q, k, stride=1, block_size=8, mask=CAUSAL)
    logits = np.einsum("qhd,khd->hqk", q, np.repeat(k, 2, axis=1)) / np.sqrt(8)
    logits = np.where(np.tril(np.ones((24, 24), bool)), logits, -np.inf)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    mass = probs.reshape(4, 3, 8, 3, 8).sum((2, 4))
    np.testing.assert_allclose(scores, mass, atol=1e-5)


@pytest.mark.parametrize(("length", "last"), [(32, 4), (27, 2)])
def test_rows_sum_to_their_number_of_cells(length, last):
    q, k, _ = qkv(length)
    scores = antidiagonal_scores(q, k, stride=2, block_size=8, mask=CAUSAL)
    expected = np.broadcast_to([4.0, 4.0, 4.0, last], (4, 4))
    np.testing.assert_allclose(scores.sum(-1), expected, atol=1e-5)


def test_threshold_one_is_dense_and_a_small_one_keeps_only_forced_blocks():
    q, k, v = qkv(48)
    out = js.sparse_attention(
        q, k, v, js.xattention(stride=2, block_size=8, threshold=1.0), mask=CAUSAL
    )
    np.testing.assert_allclose(out, js.attend(q, k, v, mask=CAUSAL), atol=2e-6)
    plan, _ = js.xattention(stride=2, block_size=8, threshold=1e-6).plan((), q, k, mask=CAUSAL)
    forced = np.eye(6, dtype=bool) | (np.arange(6) == 0)
    np.testing.assert_array_equal(plan.to_dense(), np.broadcast_to(forced, (4, 6, 6)))


def test_without_a_mask_a_small_threshold_keeps_the_best_block_alone():
    q, k, _ = qkv(48)
    plan, info = js.xattention(stride=2, block_size=8, threshold=1e-6).plan((), q, k)
    best = np.asarray(info.block_scores).argmax(-1)
    np.testing.assert_array_equal(plan.to_dense(), best[..., None] == np.arange(6))


def test_tiles_grow_with_the_threshold():
    q, k, _ = qkv(64)
    tiles = [
        js.xattention(stride=2, block_size=8, threshold=t).plan((), q, k, mask=CAUSAL)[0].to_dense()
        for t in (0.2, 0.4, 0.6, 0.8, 1.0)
    ]
    for fewer, more in zip(tiles, tiles[1:], strict=False):
        assert not (fewer & ~more).any()
        assert int(more.sum()) > int(fewer.sum())


def test_the_product_of_cells_is_the_antidiagonal_mean():
    q, k, _ = qkv(8, heads=1, kv_heads=1, dim=4)
    q_cells = antidiagonal_cells(q, 4, reverse=True)[:, 0]
    k_cells = antidiagonal_cells(k, 4, reverse=False)[:, 0]
    logits = np.asarray(q[:, 0] @ k[:, 0].T) / 2.0
    for i, j in np.ndindex(2, 2):
        tile = logits[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
        mean = np.mean([tile[3 - s, s] for s in range(4)])
        np.testing.assert_allclose(q_cells[i] @ k_cells[j] / (2.0 * 4), mean, rtol=1e-5)


def test_a_needle_is_always_selected():
    q, k, _ = qkv(64, heads=1, kv_heads=1, dim=16, seed=3)
    k = k.at[26].set(8.0 * q[56:64, 0].mean(0, keepdims=True))
    scores = antidiagonal_scores(q, k, stride=2, block_size=8, mask=CAUSAL)
    share = float(scores[0, 7, 3] / scores[0, 7].sum())
    assert share > 0.2
    method = js.xattention(stride=2, block_size=8, threshold=1.0 - share + 1e-3)
    assert bool(method.plan((), q, k, mask=CAUSAL)[0].to_dense()[0, 7, 3])


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("mask", [CAUSAL, None], ids=["causal", "bidirectional"])
def test_no_block_with_more_than_the_rest_is_left_out(threshold, mask):
    q, k, _ = qkv(96, dim=8, seed=5)
    plan, info = js.xattention(stride=2, block_size=8, threshold=threshold).plan(
        (), 4 * q, k, mask=mask
    )
    shares = np.asarray(info.block_scores)
    shares = shares / shares.sum(-1, keepdims=True)
    heavy = shares > 1 - threshold + 1e-5
    assert heavy.any()
    assert np.asarray(plan.to_dense())[heavy].all()


def test_permuting_batch_and_heads_permutes_the_tiles():
    q, k, _ = qkv(32, heads=4, kv_heads=4, batch=(3,))
    method = js.xattention(stride=2, block_size=8, threshold=0.6)
    tiles = method.plan((), q, k, mask=CAUSAL)[0].to_dense()
    batch, heads = on_device([2, 0, 1]), on_device([3, 1, 0, 2])
    moved = method.plan((), q[batch][:, :, heads], k[batch][:, :, heads], mask=CAUSAL)[0]
    np.testing.assert_array_equal(moved.to_dense(), tiles[batch][:, heads])


def test_a_threshold_per_head():
    q, k, _ = qkv(64)
    thresholds = on_device([0.2, 0.5, 0.8, 1.0])
    method = js.xattention(stride=2, block_size=8, threshold=thresholds)
    tiles = method.plan((), q, k, mask=CAUSAL)[0].to_dense()
    for head, threshold in enumerate([0.2, 0.5, 0.8, 1.0]):
        alone = js.xattention(stride=2, block_size=8, threshold=threshold)
        expected = alone.plan((), q, k, mask=CAUSAL)[0].to_dense()[head]
        np.testing.assert_array_equal(tiles[head], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stride": 3}, "block_size=128 must be a multiple of 3"),
        ({"stride": 0}, "stride=0"),
        ({"threshold": 0.0}, r"threshold=0.0 must lie in \(0, 1\]"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"threshold": on_device([0.5, 0.0])}, "threshold="),
        ({"norm": -1.0}, "norm=-1.0"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        js.xattention(**arguments)
