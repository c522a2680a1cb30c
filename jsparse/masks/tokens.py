"""Sink and global tokens: a few keys that everyone sees."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jsparse import checks
from jsparse.types import Frame, Mask, TileBounds, TileGrid, pytree_dataclass, static_field
from jsparse.types.mask import Index, Range, Runs


@pytree_dataclass
class FirstKeys(Mask):
    """Every query sees keys `j < count`."""

    count: int = static_field()

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        shape = jnp.broadcast_shapes(jnp.shape(q_index), jnp.shape(kv_index))
        return jnp.broadcast_to(kv_index < self.count, shape)

    def within(self, q_range: Range, kv_range: Range, frame: Frame) -> TileBounds:
        kv_first, kv_last = kv_range
        return TileBounds(kv_first < self.count, kv_last < self.count)

    def max_tiles(self, grid: TileGrid) -> int:
        return max(1, min(grid.kv_blocks, -(-self.count // grid.block_kv)))

    def candidates(self, q_block: Index, grid: TileGrid, frame: Frame) -> Int[Array, " count"]:
        return jnp.arange(self.max_tiles(grid))

    def rows(self, kv_block: Index, grid: TileGrid, frame: Frame) -> Runs:
        first, _ = grid.kv_range(kv_block)
        return Runs.one(0, jnp.where(first < self.count, grid.q_blocks, 0))


@pytree_dataclass
class FirstQueries(Mask):
    """Queries at key positions below `count` see every key."""

    count: int = static_field()

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        shape = jnp.broadcast_shapes(jnp.shape(q_index), jnp.shape(kv_index))
        return jnp.broadcast_to(q_index + frame.diagonal < self.count, shape)

    def within(self, q_range: Range, kv_range: Range, frame: Frame) -> TileBounds:
        q_first, q_last = q_range
        limit = self.count - frame.diagonal
        return TileBounds(q_first < limit, q_last < limit)


def sinks(num_sink: int) -> Mask:
    """Lets every query see the first `num_sink` keys; combine with a window by `|`.

    Raises:
      ValueError: if `num_sink` is negative.
    """
    checks.non_negative(num_sink=num_sink)
    return FirstKeys(num_sink)


def global_tokens(count: int) -> Mask:
    """Lets the first `count` tokens see all and be seen by all; combine with a window by `|`.

    Raises:
      ValueError: if `count` is negative.
    """
    checks.non_negative(count=count)
    return FirstKeys(count) | FirstQueries(count)
