"""The blocks whose means queries point at, by whichever implementation can do it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jsparse import checks
from jsparse.attention import kernels, whole_tiles
from jsparse.attention.separation import Separated
from jsparse.core.blocks import Cells, cells_of
from jsparse.core.running_top_k import Best, running_top_k
from jsparse.core.tile_scores import mean_key_scores
from jsparse.core.tiling import every_tile
from jsparse.types import BlockMask, Mask, TileGrid
from jsparse.types.pytree import entry, flatten_batch
from pallas_kernels.block_sparse_attention.logits import Rule, Tiles
from pallas_kernels.block_sparse_attention.walk import ROWS
from pallas_kernels.ring import LANES
from pallas_kernels.top_k import mosaic

IMPLEMENTATIONS = ("xla", "mosaic")
# queries, and blocks of keys, that XLA scores at once
_SCORED_ROWS, _SCORED_BLOCKS = 256, 64


def best_blocks(
    q: Float[Array, "batch q_len heads dim"],
    k_means: Float[Array, "batch kv_blocks kv_heads dim"],
    *,
    block: int,
    kv_len: int,
    top_k: int,
    mask: Mask | None,
    offset: Int[Array, " batch"],
    implementation: str | None = None,
) -> Best:
    """Chooses for each query and head the blocks whose mean keys have the largest products with it.

    Products are f32, as are the means, and are never all there. Under a mask a query's own block is
    among those chosen, where the mask shows any of it. Ties go to the lower block, a NaN outranks
    every number. Nothing of it has a gradient.

    Args:
      q: Queries.
      k_means: Mean key of each block.
      block: Keys per block.
      kv_len: Keys.
      top_k: Blocks per query, its own included.
      mask: Who may see whom, with batch axes flattened. None shows all, and forces nothing.
      offset: The key position of the first query, per sequence.
      implementation: "xla" or "mosaic"; default the fastest that can do it.

    Raises:
      ValueError: if there is no such implementation, or `top_k` is not positive.
      NotImplementedError: if the named implementation cannot do this job here.
    """
    checks.positive(top_k=top_k)
    if implementation is not None:
        checks.one_of(IMPLEMENTATIONS, implementation=implementation)
    top_k = min(top_k, k_means.shape[1])
    cells = cells_of(mask, TileGrid(q.shape[1], kv_len, 1, block))
    own = None
    if mask is not None:
        own = (offset[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)) // block
    reason = None if implementation == "xla" else _refusal(q, k_means, cells, own, top_k)
    if implementation == "mosaic" and reason:
        raise NotImplementedError(f"implementation='mosaic': {reason}")
    if implementation != "xla" and reason is None:
        return by_kernel(q, k_means, cells, own, top_k)
    q_len, heads, blocks = *q.shape[1:3], k_means.shape[1]
    grid = TileGrid(q_len, blocks, min(_SCORED_ROWS, q_len), min(_SCORED_BLOCKS, blocks))
    sizes = {"block": block, "kv_len": kv_len}
    score = mean_key_scores(q, k_means, **sizes, mask=mask, grid=grid, offset=offset)
    tiles = _tiles(cells, grid)
    return running_top_k(score, top_k, grid, batches=len(q), heads=heads, tiles=tiles)


def _tiles(cells: Cells, grid: TileGrid) -> BlockMask | None:
    """The tiles of blocks in which a query sees any; None for all."""
    found = cells.tiles(grid.block_q, grid.block_kv)
    if found is None:
        return None
    return BlockMask(found.kv_indices, found.kv_num_blocks, found.overflowed, *grid)


def grid_of(q: Array, k_means: Array) -> TileGrid:
    """That of the kernel."""
    wide = q.shape[3] > 2 * LANES
    rows = ROWS if wide or q.shape[1] <= ROWS else 2 * ROWS
    return TileGrid(q.shape[1], k_means.shape[1], rows, mosaic.KEYS)


def _seen(q: Array, grid: TileGrid, cells: Cells, own: Array | None) -> Separated | str:
    """Which blocks are seen, and which are forced, as the kernel takes it, or why it cannot."""

    def forced(batch, head, q_cell, kv_cell):
        assert own is not None
        return own[entry(len(own), batch), q_cell] == kv_cell

    return kernels.seen_cells(
        cells,
        grid.kv_len,
        batches=len(q),
        heads=q.shape[2],
        q_cells=grid.q_blocks * grid.block_q,
        kv_cells=grid.kv_blocks * grid.block_kv,
        forced=None if own is None else forced,
    )


def _refusal(q: Array, k_means: Array, cells: Cells, own: Array | None, top_k: int) -> str | None:
    """Why the kernel cannot do this here, or None if it can."""
    reason = kernels.hopper_refusal()
    if reason:
        return reason
    grid = grid_of(q, k_means)
    dim = -(-q.shape[3] // LANES) * LANES
    seen = _seen(q, grid, cells, own)
    reason = mosaic.refusal(q.dtype, grid.block_q, _parts(k_means), dim, top_k)
    return reason or (seen if isinstance(seen, str) else None)


def _parts(k_means: Array) -> int:
    """How many arrays of 8 bits keep all bits of the means."""
    return 1 if k_means.dtype == jnp.bfloat16 else 3


def by_kernel(q: Array, k_means: Array, cells: Cells, own: Array | None, top_k: int) -> Best:
    """What the kernel finds, in the order of columns."""
    grid = grid_of(q, k_means)
    hides = None
    if own is not None or grid.kv_len % grid.block_kv:
        seen = _seen(q, grid, cells, own)
        assert not isinstance(seen, str)  # it was refused then
        hides = Rule(seen.rule, seen.row_values, seen.column_values)
    tiles = _tiles(cells, grid)
    lists = flatten_batch(every_tile(grid) if tiles is None else tiles, (len(q),))

    columns, keys, of_forced = mosaic.top_k(
        kernels.padded(q, grid.q_blocks * grid.block_q),
        _split(kernels.padded(k_means, grid.kv_blocks * grid.block_kv), _parts(k_means)),
        whole_tiles.in_order(lists.kv_indices, lists.kv_num_blocks),
        Tiles(grid.block_q, grid.block_kv, mask=hides),
        top_k,
    )
    columns, keys, of_forced = (x[:, :, : grid.q_len] for x in (columns, keys, of_forced))
    return Best.unordered(columns, jnp.where(keys == mosaic.FIRST, of_forced[..., None], keys))


def _split(x: Array, parts: int) -> tuple[Array, ...]:
    """Arrays of bfloat16 whose sum is the array, but for what more than 24 bits would hold."""
    found = []
    for _ in range(parts):
        # not a conversion there and back, which a compiler may leave out
        part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        found.append(part.astype(jnp.bfloat16))
        # of what is not finite the first part says all
        x = jnp.where(jnp.isfinite(part), x - part, 0.0)
    return tuple(found)
