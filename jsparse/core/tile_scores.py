"""Scores of single queries for keys or blocks of keys, a tile at a time, for `running_top_k`."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jsparse import checks
from jsparse.core.blocks import Cells, cells_of
from jsparse.core.running_top_k import ScoreOfTile, TileScores
from jsparse.core.windows import Windows
from jsparse.types import Frame, Mask, TileGrid


def relu_weighted(
    q: Float[Array, "rows heads dim"],
    weights: Float[Array, "rows heads"],
    k: Float[Array, "columns dim"],
) -> Float[Array, "rows columns"]:
    """Sums `weight * relu(q k)` over the heads of an indexer with one key per token, in f32.

    The indexer of DeepSeek-V3.2; scales of quantised queries and keys belong to the weights and to
    what is made of the result.
    """
    rows, heads, dim = q.shape
    # one product of all heads' rows: a product for each head takes XLA for CPUs longer
    flat = jnp.swapaxes(q, 0, 1).reshape(-1, dim)
    logits = jnp.dot(flat, k.T, preferred_element_type=jnp.float32).reshape(heads, rows, -1)
    of_heads = weights.astype(jnp.float32).T[:, :, None]
    # one by one: see `window_scores`
    return functools.reduce(jnp.add, jax.nn.relu(logits) * of_heads)


def block_importance(
    importance: Float[Array, "rows windows"], windows: Windows, block: int
) -> Float[Array, "rows blocks"]:
    """Adds to each block what windows weigh, once for each stride that lies in both.

    Args:
      importance: Of the windows from `size / stride - 1` before the first that begins in the first
        block, to the last that begins in the last.
      windows: Their sizes.
      block: Keys per block, a multiple of the windows' stride.
    """
    overlap, per_block = windows.size // windows.stride, block // windows.stride
    strides = importance.shape[1] - overlap + 1
    # every stride of tokens has the windows that begin in it or up to `overlap - 1` before
    of_stride = sum(importance[:, n : n + strides] for n in range(overlap))
    # one by one: see `window_scores`
    return sum(of_stride[:, n::per_block] for n in range(per_block))  # pyright: ignore


def mean_key_scores(
    q: Float[Array, "batch q_len heads dim"],
    k_means: Float[Array, "batch kv_blocks kv_heads dim"],
    *,
    block: int,
    kv_len: int,
    mask: Mask | None,
    grid: TileGrid,
    offset: Int[Array, " batch"] | int = 0,
) -> ScoreOfTile:
    """Scores blocks of keys by the products of queries with their means.

    The routing of mixture of block attention (Lu et al. 2025, arXiv:2502.13189): no scale, in f32,
    for each query head by itself. Under a mask a query's own block is forced.

    Args:
      q: Queries.
      k_means: Mean key of each block.
      block: Keys per block.
      kv_len: Keys.
      mask: Who sees which key, with batch axes flattened; blocks of which a query sees none do not
        count. None shows all, and forces nothing.
      grid: Rows are queries, columns are blocks.
      offset: The key position of the first query, per sequence.
    """
    batches, q_len, heads, _ = q.shape
    kv_blocks, kv_heads = k_means.shape[1:3]
    rows, blocks = grid.block_q, grid.block_kv
    q = jnp.pad(q, ((0, 0), (0, grid.q_blocks * rows - q_len), (0, 0), (0, 0)))
    missing = grid.kv_blocks * blocks - kv_blocks
    k_means = jnp.pad(k_means.astype(jnp.float32), ((0, 0), (0, missing), (0, 0), (0, 0)))
    offsets = jnp.broadcast_to(jnp.asarray(offset, jnp.int32), (batches,))
    cells = cells_of(mask, TileGrid(q_len, kv_len, 1, block))

    def score(batch, head, q_tile, kv_tile):
        queries = jax.lax.dynamic_slice_in_dim(q[batch, :, head], q_tile * rows, rows)
        of_k = k_means[batch, :, head // (heads // kv_heads)]
        means = jax.lax.dynamic_slice_in_dim(of_k, kv_tile * blocks, blocks)
        scores = queries.astype(jnp.float32) @ means.T
        if mask is None:
            return TileScores(scores, jnp.ones(scores.shape, bool))
        row = q_tile * rows + jnp.arange(rows)[:, None]
        index = kv_tile * blocks + jnp.arange(blocks)
        known = jnp.minimum(row, q_len - 1), jnp.minimum(index, kv_blocks - 1)
        own = (offsets[batch] + row) // block
        return TileScores(scores, cells.visible(batch, head, *known), index == own)

    return score


def window_scores(
    q: Float[Array, "batch q_len heads dim"],
    k_windows: Float[Array, "batch windows kv_heads dim"],
    lse: Float[Array, "batch heads q_len"],
    *,
    windows: Windows,
    block: int,
    mask: Mask,
    grid: TileGrid,
    scale: float | Float[Array, ""],
    softcap: float | None = None,
    offset: Int[Array, " batch"] | int = 0,
    num_init: int = 0,
    num_local: int = 1,
    tokens: Cells | None = None,
) -> ScoreOfTile:
    """Scores blocks by the attention that a group of heads pays to compressed keys.

    The selection of native sparse attention (Yuan et al. 2025, arXiv:2502.11089, equations 9 and
    10): probabilities of windows, summed over the query heads of a group, then over the blocks that
    windows share strides with. Heads of the scores are those of k.

    Args:
      q: Queries.
      k_windows: One key per window; windows are complete, so there may be none for the last keys.
      lse: Of each query over the windows that it sees, as attention to them returns it.
      windows: Their sizes.
      block: Keys per block, a multiple of the windows' stride.
      mask: Who sees which window, with batch axes flattened; the lse is under it too.
      grid: Rows are queries, columns are blocks.
      scale: Factor on the logits.
      softcap: Caps the logits, as it did those of the lse.
      offset: The key position of the first query, per sequence.
      num_init: Blocks at the start that are forced.
      num_local: Blocks up to the query's own that are forced, that one included.
      tokens: Which blocks hold a key that a query sees; what no head of a group sees does not
        count, forced or not. None shows all up to the query's own.

    Raises:
      ValueError: if `stride` does not divide the sizes.
    """
    sizes = {"size": windows.size, "block": block}
    checks.positive(stride=windows.stride, **sizes)
    checks.multiple(of=windows.stride, **sizes)
    batches, q_len, heads, dim = q.shape
    count, kv_heads = k_windows.shape[1:3]
    overlap, per_block = windows.size // windows.stride, block // windows.stride
    rows, blocks, before = grid.block_q, grid.block_kv, overlap - 1
    missing = grid.q_blocks * rows - q_len
    q = jnp.pad(q, ((0, 0), (0, missing), (0, 0), (0, 0)))
    group = heads // kv_heads
    q = q.reshape(batches, -1, kv_heads, group, dim)
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, missing)))
    lse = lse.reshape(batches, kv_heads, group, -1)
    last = grid.kv_blocks * blocks * per_block
    k_windows = jnp.pad(k_windows, ((0, 0), (before, max(0, last - count)), (0, 0), (0, 0)))
    offsets = jnp.broadcast_to(jnp.asarray(offset, jnp.int32), (batches,))

    def score(batch, head, q_tile, kv_tile):
        queries = jax.lax.dynamic_slice_in_dim(q[batch, :, head], q_tile * rows, rows)
        row_lse = jax.lax.dynamic_slice_in_dim(lse[batch, head], q_tile * rows, rows, axis=1)
        first = kv_tile * blocks * per_block
        strides = blocks * per_block
        keys = jax.lax.dynamic_slice_in_dim(k_windows[batch, :, head], first, strides + before)
        window = first - before + jnp.arange(strides + before)
        row = q_tile * rows + jnp.arange(rows)[:, None]
        position = offsets[batch] + row
        members = head * group + jnp.arange(group)[:, None, None]
        frame = Frame(q_len, count, batch, members)
        exists = (window >= 0) & (window < count) & (row < q_len)
        known = jnp.clip(row, 0, q_len - 1), jnp.clip(window, 0, count - 1)
        seen = exists & mask.visible(*known, frame)
        logits = jnp.einsum("rgd,wd->grw", queries, keys, preferred_element_type=jnp.float32)
        logits = logits * scale
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        # a query that sees no window has no log-sum-exp to subtract, and nothing to weigh
        probs = jnp.exp(jnp.where(seen, logits - row_lse[..., None], -jnp.inf))
        # one by one: many sums of a few numbers each take XLA for CPUs half of the time otherwise
        of_group = functools.reduce(jnp.add, probs)
        importance = block_importance(of_group, windows, block)
        index, own = kv_tile * blocks + jnp.arange(blocks), position // block
        visible = index <= own
        if tokens is not None:
            at = known[0], jnp.minimum(index, grid.kv_len - 1)
            seen = tokens.visible(batch, members, *at)
            visible &= jnp.broadcast_to(seen, (group, *visible.shape)).any(0)
        forced = (index < num_init) | (index > own - num_local)
        return TileScores(importance, visible, forced)

    return score
