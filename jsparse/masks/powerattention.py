"""PowerAttention: blocks at distances 1, 2, 4, 8, ... Chen et al. 2025, arXiv:2503.03588."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jsparse import checks
from jsparse.attention.planned import Queries, masked
from jsparse.core.block_tiles import blocks_of, tiles_of_blocks, tiles_per_block
from jsparse.masks.causal import as_int32, causal, key_position
from jsparse.types import (
    Frame,
    Mask,
    Method,
    TileBounds,
    TileGrid,
    array_field,
    pytree_dataclass,
    static_field,
)
from jsparse.types.mask import Index, Range, Runs


@pytree_dataclass
class PowerBlocks(Mask):
    """Block `i` sees block `j` if `i - j` is a power of 2 or in the window, and the sink blocks."""

    block_size: int = static_field()
    window_size: int = static_field()
    num_sink_blocks: int = static_field()
    offset: Int[Array, "*batch"] | None = array_field(core_ndim=0, default=None)

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        q_block = (q_index + key_position(self.offset, frame)) // self.block_size
        kv_block = kv_index // self.block_size
        distance = q_block - kv_block
        near = (distance & (distance - 1) == 0) | (distance < self.window_size)
        return (distance >= 0) & near | (kv_block < self.num_sink_blocks)

    def within(self, q_range: Range, kv_range: Range, frame: Frame) -> TileBounds:
        offset = key_position(self.offset, frame)
        q_first, q_last = ((index + offset) // self.block_size for index in q_range)
        kv_first, kv_last = (index // self.block_size for index in kv_range)
        nearest, farthest = q_first - kv_last, q_last - kv_first
        # every distance between the two occurs
        power = _greatest_power(farthest)
        some = (farthest >= 0) & (
            (nearest < self.window_size) | (power >= jnp.maximum(nearest, 1))
        ) | (kv_first < self.num_sink_blocks)
        one = (nearest == farthest) & (nearest == _greatest_power(nearest))
        every = (nearest >= 0) & ((farthest < self.window_size) | one)
        return TileBounds(some, every | (kv_last < self.num_sink_blocks))

    def max_tiles(self, grid: TileGrid) -> int:
        blocks, rows = blocks_of(grid, self.block_size)
        # distances 1, 2, 4, ... past the window: of each row a block, of all rows one window
        far = (blocks - 1).bit_length() - (self.window_size - 1).bit_length()
        listed = rows * max(0, far) + self.window_size + rows - 1 + self.num_sink_blocks
        return min(grid.kv_blocks, listed * tiles_per_block(grid, self.block_size))

    def candidates(self, q_block: Index, grid: TileGrid, frame: Frame) -> Int[Array, " count"]:
        blocks, rows = blocks_of(grid, self.block_size)
        first, last = grid.q_range(q_block)
        first = (first + key_position(self.offset, frame)) // self.block_size
        last = (last + key_position(self.offset, frame)) // self.block_size
        # the greatest distances that occur, so many that the others reach past the keys
        powers = _greatest_power(last) >> jnp.arange((blocks + rows).bit_length())
        far = (first - powers)[:, None] + jnp.arange(rows)
        window = first - self.window_size + 1 + jnp.arange(self.window_size + rows - 1)
        listed = [jnp.arange(self.num_sink_blocks), far.reshape(-1), window]
        return tiles_of_blocks(jnp.sort(jnp.concatenate(listed)), grid, self.block_size)

    def rows(self, kv_block: Index, grid: TileGrid, frame: Frame) -> Runs:
        offset, size = key_position(self.offset, frame), self.block_size
        kv_first, kv_last = (index // size for index in grid.kv_range(kv_block))
        # where queries sit at the last keys no distance is greater than there are blocks
        most = 31 if self.offset is not None else (grid.kv_len // size).bit_length() + 1
        powers = 1 << jnp.arange(most)
        near = jnp.concatenate([jnp.zeros(1, jnp.int32), powers])
        far = jnp.concatenate([jnp.full(1, self.window_size - 1, jnp.int32), powers])
        # blocks behind the last query's are none of any row: not so far that numbers overflow
        behind = (grid.q_len - 1 + offset) // size + 1
        first = grid.first_row(jnp.minimum(kv_first + near, behind) * size - offset)
        end = grid.end_row((jnp.minimum(kv_last + far, behind) + 1) * size - offset)
        every = (kv_first < self.num_sink_blocks) & (near == 0)
        return Runs(jnp.where(every, 0, first), jnp.where(every, grid.q_blocks, end))


def _greatest_power(x: Index) -> Int[Array, "..."]:
    """The greatest power of 2 that is at most `x`; 0 where there is none."""
    x = jnp.asarray(x, jnp.int32)
    return jnp.where(x > 0, 1 << (31 - jax.lax.clz(jnp.maximum(x, 1))), 0)


def powers_of_two(
    *,
    block_size: int,
    window_size: int,
    num_sink_blocks: int = 1,
    offset: Int[Array, "*batch"] | int | None = None,
) -> Mask:
    """Lets each block see the first blocks, a window, and the blocks 1, 2, 4, ... before it.

    Section 3.2, algorithm 1, without its causality inside the diagonal blocks.

    Args:
      block_size: Tokens per block, counted from key 0.
      window_size: Blocks of the window, the query's own included, at least 1.
      num_sink_blocks: First blocks that every query sees, at least 0.
      offset: The key index that query 0 sits at, per sequence; see `js.masks.causal`.

    Raises:
      ValueError: if a number is out of range, or `offset` is not an integer.
    """
    checks.positive(block_size=block_size, window_size=window_size)
    checks.non_negative(num_sink_blocks=num_sink_blocks)
    return PowerBlocks(block_size, window_size, num_sink_blocks, as_int32(offset=offset))


def powerattention(
    *, block_size: int = 256, window_size: int = 5, num_sink_blocks: int = 1
) -> Method:
    """Keeps blocks at power-of-two distances, a window and the sink; always causal.

    About log2(q_blocks) blocks per row, and a layer stack of depth d passes information over any
    distance with at most d ones in binary; `js.receptive_field` shows it. The mask depends on
    positions alone, so a decode step keeps what the same row of a prefill does, and no key can be
    dropped from the cache. Models have to be trained with it.

    Args:
      block_size: Tokens per block; 256 in the paper.
      window_size: Blocks of the window, the query's own included; 5 in the paper.
      num_sink_blocks: First blocks that every query sees; 1 in the paper.

    Differs from the paper:
      Nothing in what is seen; its dense layers (2 of 7) are the model's to choose. Distances are
      all powers of two, without a cap.

    Raises:
      ValueError: if a number is out of range.
    """
    pattern = {
        "block_size": block_size,
        "window_size": window_size,
        "num_sink_blocks": num_sink_blocks,
    }
    powers_of_two(**pattern)  # says what is wrong before there are queries

    def own_mask(queries: Queries) -> Mask:
        offset = queries.offset
        return powers_of_two(**pattern, offset=offset) & causal(offset=offset)

    return masked(own_mask)
