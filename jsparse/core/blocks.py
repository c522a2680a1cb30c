"""What a mask leaves visible, block by block, for methods that plan within it."""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool

from jsparse.core.tiling import visible_tiles
from jsparse.types import Frame, Mask, TileGrid

CellRule = Callable[[Array, Array, Array], Bool[Array, " kv_cells"]]


def cell_visibility(mask: Mask | None, grid: TileGrid) -> CellRule:
    """A function of (batch, head, q_cell) that says which key cells a query cell may see.

    A cell is visible where the mask leaves any pair of it visible. The mask's batch axes are
    flattened.
    """
    columns = jnp.arange(grid.kv_blocks)
    if mask is None:
        return lambda batch, head, q_cell: jnp.ones(columns.shape, bool)
    classify = mask.classifier(grid)

    def visible(batch, head, q_cell):
        frame = Frame(grid.q_len, grid.kv_len, batch, head)
        return jnp.broadcast_to(classify(q_cell, columns, frame).some, columns.shape)

    return visible


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
    index = jnp.arange(grid.kv_blocks)
    last = jnp.where(visible, index, -1).max(-1, keepdims=True)
    return visible, visible & ((index == 0) | (index == last))
