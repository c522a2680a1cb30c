"""What a mask leaves visible, block by block, for methods that plan within it."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jsparse.core.tiling import block_mask, visible_tiles
from jsparse.types import BlockMask, Frame, Mask, TileGrid

# (batch, head, q_cell, kv_cell) -> bools; cells broadcast against each other
CellRule = Callable[[Array, Array, Array, Array], Bool[Array, "..."]]


class Cells(NamedTuple):
    """Which key cells a query cell may see, one by one and in large tiles.

    Attributes:
      visible: `visible(batch, head, q_cell, kv_cell)`. True where some pair of the cell is visible.
      tiles: `tiles(rows, keys)` lists the tiles of so many cells in which any is; None lists all.
    """

    visible: CellRule
    tiles: Callable[[int, int], BlockMask | None] = lambda rows, keys: None


def cells_of(mask: Mask | None, grid: TileGrid) -> Cells:
    """What a mask leaves visible of the cells of a grid; the mask's batch axes are flattened."""
    if mask is None:
        return Cells(lambda batch, head, q_cell, kv_cell: jnp.ones((), bool))
    classify = mask.classifier(grid)
    pairs = grid.block_q == grid.block_kv == 1

    def visible(batch, head, q_cell, kv_cell):
        frame = Frame(grid.q_len, grid.kv_len, batch, head)
        # a mask may say `some` of a tile in which nothing is visible
        if pairs:
            return mask.visible(q_cell, kv_cell, frame)
        return classify(q_cell, kv_cell, frame).some

    def tiles(rows, keys):
        coarse = grid._replace(block_q=rows * grid.block_q, block_kv=keys * grid.block_kv)
        # a bound will do: to find the fullest row of a known mask would be compiled by itself
        return block_mask(mask, **coarse._asdict(), width=mask.max_tiles(coarse))

    return Cells(visible, tiles)


@functools.partial(jax.jit, static_argnames=("grid", "batch_shape", "heads"))
def candidates(
    mask: Mask | None, grid: TileGrid, batch_shape: tuple[int, ...], heads: int
) -> tuple[
    Bool[Array, "*batch heads q_blocks kv_blocks"], Bool[Array, "*batch heads q_blocks kv_blocks"]
]:
    """Which blocks a mask leaves to choose from, and which of those methods commonly force.

    Forced are the first block and the last visible one of each row: the attention sink and, under
    a causal mask, the diagonal. Without a mask nothing is forced.
    """
    shape = (*batch_shape, heads, grid.q_blocks, grid.kv_blocks)
    if mask is None:
        return jnp.ones(shape, bool), jnp.zeros(shape, bool)
    tiles = visible_tiles(mask.flatten_batch(batch_shape), grid)
    tiles = jnp.repeat(tiles, heads // tiles.shape[1], axis=1)
    visible = jnp.broadcast_to(tiles, (math.prod(batch_shape), *tiles.shape[1:])).reshape(shape)
    return visible, (visible & (jnp.arange(grid.kv_blocks) == 0)) | last_visible(visible)


def last_visible(visible: Bool[Array, "*rows kv_blocks"]) -> Bool[Array, "*rows kv_blocks"]:
    """The last visible block of each row, if it has any."""
    index = jnp.arange(visible.shape[-1])
    return visible & (index == jnp.where(visible, index, -1).max(-1, keepdims=True))
