"""From a mask to the list of tiles that it touches."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jsparse import _compat, checks
from jsparse.types import BlockMask, Frame, InverseList, Mask, TileGrid
from jsparse.types.block_mask import dense_to_lists
from jsparse.types.inverse_list import from_runs
from jsparse.types.pytree import entry, flatten_batch

# rows of tiles classified at once: enough to fill vector units, little enough to stay in cache
_ROWS_AT_ONCE = 64


def block_mask(
    mask: Mask,
    q_len: int,
    kv_len: int,
    *,
    block_q: int = 128,
    block_kv: int = 128,
    width: int | None = None,
) -> BlockMask:
    """Lists the tiles in which `mask` lets some query see some key.

    Costs time proportional to the number of tiles, or to those that the mask names as candidates,
    and memory proportional to the lists, whatever the lengths; works under `jit`. The lists say
    which tiles to visit; pass the mask to `js.attend` as well, for the tiles that are only partly
    visible.

    Args:
      mask: Who may see whom. Its arrays' batch axes become the plan's.
      q_len: Number of queries.
      kv_len: Number of keys.
      block_q: Queries per tile.
      block_kv: Keys per tile.
      width: Entries a row can hold. Default: what the mask needs where its arrays are concrete;
        where they are traced, the bound that its static numbers give (all kv blocks at worst).

    Raises:
      ValueError: if a length or tile size is not positive, a mask's array has another length, or
        `mask` is none.
    """
    grid = TileGrid(q_len, kv_len, block_q, block_kv)
    checks.tile_grid(grid)
    checks.mask_type(mask)
    batch_shape = mask.batch_shape
    flat = mask.flatten_batch(batch_shape)
    if width is None:
        width = flat.max_tiles(grid)
        if not _compat.is_traced(flat):
            with _compat.at_once():
                width = max(1, int(_fullest_row(flat, grid)))
    checks.positive(width=width)
    width = min(width, grid.kv_blocks)
    return _plan(flat, grid, width, batch_shape)


def with_inverse(plan: BlockMask, mask: Mask) -> BlockMask:
    """Has a plan carry its inverse, where the mask that it was made from has closed forms for it.

    Rows of tiles that need a column are then named by `mask.rows`; nothing is sorted or counted.

    Args:
      plan: What `block_mask(mask, ...)` gave, of a width that was left to it.
      mask: Who may see whom.
    """
    flat = mask.flatten_batch(mask.batch_shape)
    inverse = _inverse(flat, plan.grid, plan.width, plan.batch_shape)
    return plan if inverse is None else plan.with_inverse(inverse)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _inverse(
    mask: Mask, grid: TileGrid, width: int, batch_shape: tuple[int, ...]
) -> InverseList | None:
    batches = math.prod(mask.batch_shape)

    def one_list(number):
        batch, head = jnp.divmod(number, mask.heads)
        frame = Frame(grid.q_len, grid.kv_len, batch, head)
        runs = jax.vmap(lambda column: mask.rows(column, grid, frame))(jnp.arange(grid.kv_blocks))
        return None if runs is None else from_runs(*runs, grid.q_blocks * width)

    turned = jax.lax.map(one_list, jnp.arange(batches * mask.heads))
    return jax.tree.map(lambda x: x.reshape(*batch_shape, mask.heads, -1), turned)


@functools.partial(jax.jit, static_argnums=0)
def every_tile(grid: TileGrid) -> BlockMask:
    """Lists all tiles of a grid, the same for all sequences and heads."""
    lists = jnp.broadcast_to(jnp.arange(grid.kv_blocks), (1, grid.q_blocks, grid.kv_blocks))
    counts = jnp.full((1, grid.q_blocks), grid.kv_blocks, jnp.int32)
    return BlockMask(lists.astype(jnp.int32), counts, jnp.zeros(1, bool), *grid)


def restrict(plan: BlockMask, mask: Mask) -> BlockMask:
    """Drops the tiles of a plan in which `mask` leaves nothing to see.

    Costs time proportional to the listed tiles; lists keep their width.

    Raises:
      ValueError: if the heads of one are no multiple of the other's, or a mask's array has another
        length.
    """
    mask.check_lengths(plan.q_len, plan.kv_len)
    heads = max(plan.list_heads, mask.heads)
    checks.multiple(of=plan.list_heads, heads=heads)
    batch_shape = jnp.broadcast_shapes(plan.batch_shape, mask.batch_shape)
    lists = _listed_and_visible(
        flatten_batch(plan, batch_shape), mask.flatten_batch(batch_shape), batch_shape, heads
    )
    counts = jnp.repeat(plan.kv_num_blocks, heads // plan.list_heads, axis=-2)
    lost = jnp.repeat(plan.overflowed, heads // plan.list_heads, axis=-1)
    return BlockMask.from_lists(
        lists,
        jnp.broadcast_to(counts, lists.shape[:-1]),
        **plan.grid._asdict(),
        overflowed=jnp.broadcast_to(lost, lists.shape[:-2]),
    )


@functools.partial(jax.jit, static_argnums=(2, 3))
def _listed_and_visible(
    plan: BlockMask, mask: Mask, batch_shape: tuple[int, ...], heads: int
) -> Int[Array, "*batch heads q_blocks width"]:
    """A flattened plan's entries, -1 where the flattened mask leaves nothing to see."""
    grid, classify = plan.grid, mask.classifier(plan.grid)
    rows = math.prod(batch_shape) * heads * grid.q_blocks

    def one_row(row):
        row, q_block = jnp.divmod(row, grid.q_blocks)
        batch, head = jnp.divmod(row, heads)
        list_head = head // (heads // plan.list_heads)
        listed = plan.kv_indices[entry(len(plan.kv_indices), batch), list_head, q_block]
        some = classify(q_block, listed, Frame(grid.q_len, grid.kv_len, batch, head)).some
        return jnp.where(some, listed, -1)

    lists = jax.lax.map(one_row, jnp.arange(rows), batch_size=min(rows, _ROWS_AT_ONCE))
    return lists.reshape(*batch_shape, heads, grid.q_blocks, -1)


@functools.partial(jax.jit, static_argnums=1)
def visible_tiles(mask: Mask, grid: TileGrid) -> Bool[Array, "batch heads q_blocks kv_blocks"]:
    """One bool per tile: does the flattened `mask` leave anything to see in it."""
    columns = jnp.arange(grid.kv_blocks)
    return _map_rows(mask, grid, lambda *_: columns, lambda columns, some: some)


def _named(mask: Mask, grid: TileGrid):
    """The columns to classify in a row: the mask's candidates where they are fewer than all."""

    def columns(q_block, frame):
        named = mask.candidates(q_block, grid, frame)
        if named is None or len(named) >= grid.kv_blocks:
            return jnp.arange(grid.kv_blocks)
        again = jnp.concatenate([jnp.zeros(1, bool), named[1:] == named[:-1]])
        return jnp.where(again | (named < 0), grid.kv_blocks, named)

    return columns


@functools.partial(jax.jit, static_argnums=1)
def _fullest_row(mask: Mask, grid: TileGrid) -> Int[Array, ""]:
    def count(columns, some):
        return some.sum(-1, dtype=jnp.int32)

    return _map_rows(mask, grid, _named(mask, grid), count).max()


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _plan(mask: Mask, grid: TileGrid, width: int, batch_shape: tuple[int, ...]) -> BlockMask:
    def compact(columns, some):
        count = some.sum(-1, dtype=jnp.int32)
        listed = columns[dense_to_lists(some, width)]
        return jnp.where(jnp.arange(width) < count, listed, 0), count

    lists, counts = _map_rows(mask, grid, _named(mask, grid), compact)
    overflowed = (counts > width).any(-1)
    plan = BlockMask(lists, jnp.minimum(counts, width), overflowed, *grid)
    return jax.tree.map(lambda x: x.reshape(*batch_shape, *x.shape[1:]), plan)


def _map_rows(mask: Mask, grid: TileGrid, columns_of, summarise):
    """Applies `summarise` to some columns of each row of tiles and their visibility.

    Columns outside of the grid are not visible.
    """
    classify = mask.classifier(grid)
    batches = 1
    for leaf_batch in mask.batch_shape:
        batches *= leaf_batch
    rows = batches * mask.heads * grid.q_blocks

    def one_row(row):
        row, q_block = jnp.divmod(row, grid.q_blocks)
        batch, head = jnp.divmod(row, mask.heads)
        frame = Frame(grid.q_len, grid.kv_len, batch, head)
        columns = columns_of(q_block, frame)
        some = classify(q_block, columns, frame).some & (columns < grid.kv_blocks)
        return summarise(columns, some)

    out = jax.lax.map(one_row, jnp.arange(rows), batch_size=min(rows, _ROWS_AT_ONCE))
    shape = (batches, mask.heads, grid.q_blocks)
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), out)
