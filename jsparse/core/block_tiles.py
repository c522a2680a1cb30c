"""Blocks of tokens on a grid of tiles, which may be of another size and lie across them."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from jsparse.types import TileGrid


def blocks_of(grid: TileGrid, block_size: int) -> tuple[int, int]:
    """How many blocks the keys are, and how many a row of tiles may have queries of.

    Queries may start anywhere among the keys.
    """
    return -(-grid.kv_len // block_size), (grid.block_q - 2) // block_size + 2


def tiles_per_block(grid: TileGrid, block_size: int) -> int:
    """How many tiles of keys a block may lie in."""
    if block_size % grid.block_kv == 0:
        return block_size // grid.block_kv
    return (block_size - 2) // grid.block_kv + 2


def tiles_of_blocks(
    blocks: Int[Array, " blocks"], grid: TileGrid, block_size: int
) -> Int[Array, " tiles"]:
    """The tiles of keys in which ascending blocks lie, ascending.

    Of a block that is named again, or lies in fewer than another, the last is named again; where
    several blocks lie in one tile, so is that.
    """
    again = jnp.concatenate([jnp.zeros(1, bool), blocks[1:] == blocks[:-1]])
    last = (blocks * block_size + block_size - 1) // grid.block_kv
    first = jnp.where(again, last, blocks * block_size // grid.block_kv)
    tiles = first[:, None] + jnp.arange(tiles_per_block(grid, block_size))
    return jnp.minimum(tiles, last[:, None]).reshape(-1)
