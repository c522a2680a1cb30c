"""What a softmax leaves in blocks, against float64 loops, over more than is computed at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.core import softmax_blocks as module
from jsparse.core.blocks import Cells
from jsparse.core.softmax_blocks import _Piece, map_blocks, softmax_blocks
from jsparse.types import Mask, pytree_dataclass
from tests.inputs import on_device, qkv

EPS = np.finfo(np.float32).eps


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces of few rows and keys, so that there are several."""
    monkeypatch.setattr(module, "_PIECES", {"cpu": _Piece(rows=32, keys=16)})


def by_loops(q, k, *, scale, per_q, per_kv, visible):
    batches, q_count, heads, _ = q.shape
    kv_count, group = k.shape[1], heads // k.shape[2]
    sums = np.zeros((batches, heads, -(-q_count // per_q), -(-kv_count // per_kv)))
    maxima, lse = np.zeros_like(sums), np.full((batches, heads, q_count), -np.inf)
    for b, h, i in np.ndindex(batches, heads, q_count):
        seen = visible(b, h, i)
        if not seen.any():
            continue
        logits = np.where(seen, k[b, :, h // group] @ q[b, i, h] * scale, -np.inf)
        lse[b, h, i] = np.log(np.exp(logits - logits.max()).sum()) + logits.max()
        for j, probability in enumerate(np.exp(logits - lse[b, h, i])):
            tile = b, h, i // per_q, j // per_kv
            sums[tile] += probability
            maxima[tile] = max(maxima[tile], probability)
    return sums, maxima, lse


def close(got, expected, per_q):
    # some f32 roundings of each probability, of which a tile sums as many as it has rows, at most
    for x, y, rows in zip(got, expected, (per_q, 1, 1), strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=32 * EPS, atol=32 * EPS * rows)


# fewer rows than a piece has, exactly as many, several with a ragged last, blocks of more
@pytest.mark.parametrize(
    ("q_count", "per_q", "per_kv"), [(9, 2, 3), (32, 4, 5), (75, 8, 4), (75, 40, 7)]
)
def test_cells_equal_loops(q_count, per_q, per_kv):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, q_count, 4, 5)), rng.normal(size=(2, 23, 2, 5))
    limit = rng.integers(0, 24, (2, 4, q_count))  # 0 sees nothing
    table = on_device(limit)

    def rule(batch, head, q_cell, kv_cell):
        # cells past the last one are asked about too; what is said of them may not count
        last = table.at[batch, head, q_cell].get(mode="fill", fill_value=99)
        return (kv_cell < last) | (kv_cell >= 23)

    got = jax.jit(
        lambda q, k: softmax_blocks(
            q, k, scale=0.5, cells_per_block=(per_q, per_kv), cells=Cells(rule)
        )
    )(on_device(q, jnp.float32), on_device(k, jnp.float32))
    sizes = {"per_q": per_q, "per_kv": per_kv}
    expected = by_loops(
        q, k, scale=0.5, visible=lambda b, h, i: np.arange(23) < limit[b, h, i], **sizes
    )
    close(got, expected, per_q)


@pytree_dataclass
class Thirds(Mask):
    """Hides every third pair, and knows nothing of whole tiles."""

    def visible(self, q_index, kv_index, frame):
        return (q_index + kv_index) % 3 > 0


def test_the_map_under_masks_that_leave_pieces_out():
    """Grouped heads, odd lengths; windows that differ between heads, segments between sequences."""
    q_len, kv_len, block_q, block_kv = 101, 131, 8, 4
    q, k, _ = qkv(q_len, kv_len, dim=8, batch=(2,))
    ids = (np.arange(kv_len) >= np.array([[40], [100]])).astype(np.int32)
    sinks, windows = (3, 0, 1, 40), (21, 1, 60, 9)
    segments = js.masks.segments(on_device(ids[:, kv_len - q_len :]), on_device(ids))
    windowed = js.masks.head_windows(num_sink=sinks, window=windows) & Thirds()
    mask = js.masks.causal() & windowed & segments

    def visible(b, h, i):
        own, key = kv_len - q_len + i, np.arange(kv_len)
        near = (own - key < windows[h]) | (key < sinks[h])
        return (key <= own) & near & (ids[b] == ids[b, own]) & ((i + key) % 3 > 0)

    got = map_blocks(q, k, block_q=block_q, block_kv=block_kv, scale=0.7, mask=mask)
    plan = js.block_mask(mask, q_len, kv_len, block_q=32, block_kv=16)
    assert not bool(plan.to_dense().all())
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    sizes = {"per_q": block_q, "per_kv": block_kv}
    close(got, by_loops(q, k, scale=0.7, visible=visible, **sizes), block_q)
    # every row's probabilities are somewhere, once; some rows see nothing
    rows = np.isfinite(np.pad(got.lse, ((0, 0), (0, 0), (0, 3)), constant_values=-np.inf))
    rows = rows.reshape(2, 4, 13, 8).sum(-1)
    assert rows.min() < 5
    np.testing.assert_allclose(got.sums.sum(-1), rows, rtol=1e-5)


def test_numbers_without_pairs():
    """Rows that see nothing, no mask, a NaN in one row, logits too large for an exponential."""
    q, k, _ = qkv(20, 24, heads=2, kv_heads=1, dim=4)
    lengths = js.masks.lengths(on_device(20), on_device(0))
    nothing = map_blocks(q, k, block_q=8, block_kv=8, mask=lengths)
    assert not np.asarray(nothing.sums).any()
    assert not np.asarray(nothing.maxima).any()
    assert np.isneginf(nothing.lse).all()
    broken = map_blocks(q.at[9, 1].set(jnp.nan), 1e4 * k, block_q=8, block_kv=8)
    bad = np.isnan(np.asarray(broken.sums)).any(-1)
    np.testing.assert_array_equal(bad, [[False] * 3, [False, True, False]])
    assert np.isnan(np.asarray(broken.lse)).sum() == 1
    np.testing.assert_allclose(np.asarray(broken.sums)[0].sum(-1), [8, 8, 4], rtol=1e-6)


def test_nothing_has_a_gradient_and_vmap_is_a_batch_axis():
    q, k, _ = qkv(40, dim=4, batch=(2,))
    options = {"block_q": 8, "block_kv": 8, "mask": js.masks.causal()}
    whole = map_blocks(q, k, **options)
    for x, y in zip(jax.vmap(lambda q, k: map_blocks(q, k, **options))(q, k), whole, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda q: map_blocks(q, k, **options).maxima.sum())(q)
    assert not np.asarray(gradient).any()


def test_memory_is_that_of_the_results_and_of_some_rows(monkeypatch):
    monkeypatch.undo()  # the pieces that are shipped

    def temporary(length):
        q, k = (jax.ShapeDtypeStruct((length, 2, 32), jnp.float32) for _ in range(2))
        call = jax.jit(lambda q, k: map_blocks(q, k, mask=js.masks.causal()).sums)
        memory = call.lower(q, k).compile().memory_analysis()
        return memory.temp_size_in_bytes

    short, long = temporary(2048), temporary(8192)
    # a [q_len, kv_len] array would grow sixteenfold, to 256 MiB; so does only the small result
    assert long < 6 * short
    assert long < 2**24
