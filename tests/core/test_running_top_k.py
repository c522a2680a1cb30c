"""A running top-k against the same rules on all scores at once; worked scores of two methods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.core import selection
from jsparse.core.running_top_k import TileScores, running_top_k
from jsparse.core.tile_scores import block_importance, relu_weighted, window_scores
from jsparse.core.windows import Windows
from jsparse.types import TileGrid
from tests.inputs import on_device, qkv

BATCHES, HEADS = 2, 2
GRID = TileGrid(13, 38, 4, 8)
SHAPE = BATCHES, HEADS, GRID.q_len, GRID.kv_len


def tile_of(x, fill):
    """A function that reads tiles of an array; what lies past its end is `fill`."""
    shape = GRID.q_blocks * GRID.block_q, GRID.kv_blocks * GRID.block_kv
    missing = [(0, a - b) for a, b in zip(shape, x.shape[2:], strict=True)]
    padded = jnp.pad(x, [(0, 0), (0, 0), *missing], constant_values=fill)

    def read(batch, head, q_tile, kv_tile):
        start = q_tile * GRID.block_q, kv_tile * GRID.block_kv
        return jax.lax.dynamic_slice(padded[batch, head], start, (GRID.block_q, GRID.block_kv))

    return read


def score_of(scores, visible, forced):
    # past the end everything is said to be the best there is, visible and forced
    tiles = tile_of(scores, jnp.inf), tile_of(visible, True)
    if forced is None:
        return lambda *at: TileScores(*(read(*at) for read in tiles))
    return lambda *at: TileScores(*(read(*at) for read in (*tiles, tile_of(forced, True))))


def scores_with_ties():
    """Few different numbers, both zeros, infinities, NaNs of both signs."""
    rng = np.random.default_rng(0)
    values = [-np.inf, -2.0, -0.0, 0.0, 0.0, 1.0, 1.0, 3.0, np.inf, np.nan, -np.nan]
    return on_device(rng.choice(values, SHAPE), jnp.float32)


def in_order(scores, visible, forced, k):
    """What a row chooses, the best first: by rank, NaNs, falling score, then the lower column."""

    def place(j):
        return ~forced[j], ~np.isnan(scores[j]), -np.nan_to_num(scores[j], posinf=np.inf), j

    return sorted(np.flatnonzero(visible), key=place)[:k]


@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.slow), 6, 100])
@pytest.mark.parametrize("forcing", [False, True], ids=["free", "forced"])
def test_it_chooses_what_dense_scores_and_top_k_choose(k, forcing):
    rng = np.random.default_rng(1)
    scores = scores_with_ties()
    visible = on_device(rng.random(SHAPE) < 0.7).at[0, 0, 3].set(False)
    forced = on_device(rng.random(SHAPE) < 0.1) if forcing else None
    best = jax.jit(lambda *x: running_top_k(score_of(*x), k, GRID, batches=BATCHES, heads=HEADS))(
        scores, visible, forced
    )
    expected = np.asarray(selection.top_k(scores, k, visible=visible, forced=forced))
    got = np.zeros(SHAPE, bool)
    for at in np.ndindex(SHAPE[:-1]):
        count = int(best.counts[at])
        chosen = np.asarray(best.indices[at])
        assert len(set(chosen[:count])) == count
        assert (chosen[count:] == -1).all()
        got[(*at, chosen[:count])] = True
        row = (np.asarray(x)[at] for x in (scores, visible, forced if forcing else ~visible))
        assert chosen[:count].tolist() == sorted(in_order(*row, k))
        np.testing.assert_array_equal(best.scores[at][:count], scores[at][chosen[:count]])
        assert np.isneginf(best.scores[at][count:]).all()
    np.testing.assert_array_equal(got, expected)
    assert int(best.counts[0, 0, 3]) == 0


def test_only_listed_tiles_are_asked_about():
    """Lists per sequence; the scores of other tiles are broken, which would come first."""
    tiles = on_device(np.random.default_rng(2).random((BATCHES, 1, 4, 5)) < 0.5)
    plan = js.BlockMask.from_dense(tiles, **GRID._asdict())
    listed = jnp.repeat(jnp.repeat(tiles, GRID.block_q, 2), GRID.block_kv, 3)
    listed = jnp.broadcast_to(listed[:, :, : GRID.q_len, : GRID.kv_len], SHAPE)
    scores = jnp.where(listed, jnp.nan_to_num(scores_with_ties()), jnp.nan)
    score = score_of(scores, jnp.ones(SHAPE, bool), None)
    best = running_top_k(score, 5, GRID, batches=BATCHES, heads=HEADS, tiles=plan)
    expected = selection.top_k(scores, 5, visible=listed)
    at = jnp.where(best.indices < 0, GRID.kv_len, best.indices)
    got = jnp.zeros((*SHAPE[:-1], GRID.kv_len + 1), bool)
    got = jnp.put_along_axis(got, at, True, axis=-1, inplace=False)[..., :-1]
    np.testing.assert_array_equal(got, expected)


def test_sixty_four_bit_numbers_elsewhere_change_nothing():
    given = scores_with_ties(), jnp.ones(SHAPE, bool), None
    options = {"batches": BATCHES, "heads": HEADS}
    expected = running_top_k(score_of(*given), 3, GRID, **options)
    with jax.enable_x64(True):
        found = running_top_k(score_of(*given), 3, GRID, **options)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_bad_input_is_named():
    score = score_of(scores_with_ties(), jnp.ones(SHAPE, bool), None)
    with pytest.raises(ValueError, match="k=0 must be a positive int"):
        running_top_k(score, 0, GRID)
    plan = js.block_mask(js.masks.causal(), 13, 38, block_q=2, block_kv=8)
    with pytest.raises(ValueError, match="differ in lengths or tiles"):
        running_top_k(score, 1, GRID, tiles=plan)


def test_memory_is_that_of_the_result_and_of_a_tile():
    def temporary(length):
        q, k = (jax.ShapeDtypeStruct((length, 4), jnp.float32) for _ in range(2))
        grid = TileGrid(length, length, 128, 512)

        def call(q, k):
            def score(batch, head, q_tile, kv_tile):
                rows = jax.lax.dynamic_slice_in_dim(q, q_tile * 128, 128)
                columns = jax.lax.dynamic_slice_in_dim(k, kv_tile * 512, 512)
                return TileScores(rows @ columns.T, jnp.ones((128, 512), bool))

            return running_top_k(score, 8, grid).indices

        return jax.jit(call).lower(q, k).compile().memory_analysis().temp_size_in_bytes

    # a row of all scores would be 4 * 2**16 bytes for each of 2**16 queries
    assert temporary(2**16) < 2**24
    assert temporary(2**16) < 5 * temporary(2**14)


def test_worked_scores_of_an_indexer():
    """The example of the specification of HISA: what DSA takes, and what blocks score."""
    q, weights = jnp.eye(2)[None], on_device([[1.0, 0.5]])
    k = on_device(
        [[1, 0], [0, 1], [3, -1], [-2, 1], [0, 2], [1, 1], [0.5, 0], [0, 0.5]], jnp.float32
    )
    scores = relu_weighted(q, weights, k)
    np.testing.assert_allclose(scores[0], [1, 0.5, 3, 0.5, 1, 1.5, 0.5, 0.25])
    coarse = relu_weighted(q, weights, k.reshape(4, 2, 2).mean(1))
    np.testing.assert_allclose(coarse[0], [0.75, 0.5, 1.25, 0.375])

    def chosen(scores, k, forced):
        width = scores.shape[1]

        def tile(batch, head, q_tile, kv_tile):
            part = jax.lax.dynamic_slice_in_dim(scores, kv_tile * 2, 2, axis=1)
            column = kv_tile * 2 + jnp.arange(2)[None]
            return TileScores(part, column >= 0, (column % (width - 1) == 0) & forced)

        return running_top_k(tile, k, TileGrid(1, width, 1, 2)).indices[0, 0, 0].tolist()

    assert chosen(scores, 3, False) == [0, 2, 5]  # tokens 0 and 4 are equal
    assert chosen(coarse, 3, True) == [0, 2, 3]  # the first and the last block are forced


def test_worked_weights_of_windows():
    """The example of the specification of NSA, and which blocks a window counts for."""
    windows = Windows(size=32, stride=16)
    # one window before the first, and one that is not complete
    importance = on_device([[0, 1, 2, 3, 4, 5, 6, 7, 0]], jnp.float32)
    np.testing.assert_allclose(block_importance(importance, windows, 64), [[16, 40]])
    per_window = jax.vmap(lambda x: block_importance(x[None], windows, 64)[0])(jnp.eye(9)[1:8])
    np.testing.assert_allclose(per_window.T, [[2, 2, 2, 1, 0, 0, 0], [0, 0, 0, 1, 2, 2, 2]])


def by_loops(q, k_windows, *, windows, block, scale, num_init, num_local, top_k):
    """Blocks of each query and kv head by native sparse attention's equations, in float64."""
    q, k_windows = np.asarray(q, np.float64), np.asarray(k_windows, np.float64)
    batches, q_len, heads, _ = q.shape
    count, kv_heads = k_windows.shape[1:3]
    lse, chosen = np.full((batches, heads, q_len), -np.inf), {}
    for b, t, g in np.ndindex(batches, q_len, kv_heads):
        blocks = t // block + 1
        scores = np.zeros(blocks)
        for h in range(g * (heads // kv_heads), (g + 1) * (heads // kv_heads)):
            seen = [i for i in range(count) if i * windows.stride + windows.size - 1 <= t]
            if not seen:
                continue
            logits = np.array([scale * q[b, t, h] @ k_windows[b, i, g] for i in seen])
            lse[b, h, t] = np.log(np.exp(logits).sum())
            for i, p in zip(seen, np.exp(logits - lse[b, h, t]), strict=True):
                for first in range(i * windows.stride, i * windows.stride + windows.size, 16):
                    if first // block < blocks:
                        scores[first // block] += p
        free = [j for j in range(blocks) if num_init <= j <= blocks - 1 - num_local]
        taken = [j for j in range(blocks) if j not in free]
        ranked = sorted(free, key=lambda j, scores=scores: -scores[j])
        best = sorted([*taken, *ranked[: top_k - len(taken)]])
        chosen[b, g, t] = best, scores[best]
    return lse, chosen


def test_blocks_of_windows_equal_loops():
    windows = Windows(size=32, stride=16)
    q_len, top_k, forced = 400, 4, {"num_init": 1, "num_local": 2}
    q, _, _ = qkv(q_len, heads=4, kv_heads=2, dim=8, batch=(2,))
    _, k_windows, _ = qkv((q_len - 32) // 16 + 1, heads=4, kv_heads=2, dim=8, batch=(2,), seed=1)
    lse, chosen = by_loops(
        q, k_windows, windows=windows, block=64, scale=0.5, top_k=top_k, **forced
    )
    grid = TileGrid(q_len, -(-q_len // 64), 64, 2)
    seen = js.masks.whole_windows(js.masks.causal(), size=32, stride=16, kv_len=q_len)
    options = {"windows": windows, "block": 64, "mask": seen, "grid": grid, "scale": 0.5, **forced}

    def call(q, k_windows, lse):
        score = window_scores(q, k_windows, lse, **options)
        return running_top_k(score, top_k, grid, batches=2, heads=2)

    lse = on_device(lse, jnp.float32)
    best = jax.jit(call)(q, k_windows, lse)
    indices, counts, scores = (np.asarray(x) for x in best)
    for at, (blocks, expected) in chosen.items():
        assert counts[at] == len(blocks)
        assert indices[at][: len(blocks)].tolist() == blocks
        np.testing.assert_allclose(scores[at][: len(blocks)], expected, rtol=1e-5, atol=1e-6)
    assert {len(blocks) for blocks, _ in chosen.values()} == {1, 2, 3, 4}
    with pytest.raises(ValueError, match="size=24 must be a multiple of 16"):
        window_scores(q, k_windows, lse, **{**options, "windows": Windows(24, 16)})
