"""Sliding window: each query sees keys near its own position."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jsparse import checks
from jsparse.masks.causal import as_int32, key_position
from jsparse.types import (
    Frame,
    Mask,
    TileBounds,
    TileGrid,
    array_field,
    pytree_dataclass,
    static_field,
)
from jsparse.types.mask import Index, Range, Runs


@pytree_dataclass
class SlidingWindow(Mask):
    """Query `i` at key position `p` sees keys `p - left <= j <= p + right`; None is no bound."""

    left: int | None = static_field()
    right: int | None = static_field()
    offset: Int[Array, "*batch"] | None = array_field(core_ndim=0, default=None)

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        distance = q_index + key_position(self.offset, frame) - kv_index
        return self._inside(distance, distance)

    def visible_run(
        self, q_index: Index, kv_first: Index, count: int, frame: Frame
    ) -> Bool[Array, "..."]:
        last = kv_first + (count - 1)
        return self.visible(q_index, kv_first, frame) & self.visible(q_index, last, frame)

    def within(self, q_range: Range, kv_range: Range, frame: Frame) -> TileBounds:
        (q_first, q_last), (kv_first, kv_last) = q_range, kv_range
        offset = key_position(self.offset, frame)
        nearest, farthest = q_first + offset - kv_last, q_last + offset - kv_first
        # every distance between the two occurs, so the tile is empty only if all are outside
        return TileBounds(self._inside(farthest, nearest), self._inside(nearest, farthest))

    def max_tiles(self, grid: TileGrid) -> int:
        if self.left is None or self.right is None:
            return grid.kv_blocks
        keys = grid.block_q + self.left + self.right
        # a span of n keys that starts anywhere touches at most this many tiles
        return min(grid.kv_blocks, (keys - 2) // grid.block_kv + 2)

    def candidates(
        self, q_block: Index, grid: TileGrid, frame: Frame
    ) -> Int[Array, " count"] | None:
        if self.left is None or self.right is None:
            return None
        first = grid.q_range(q_block)[0] + key_position(self.offset, frame) - self.left
        return first // grid.block_kv + jnp.arange(self.max_tiles(grid))

    def rows(self, kv_block: Index, grid: TileGrid, frame: Frame) -> Runs:
        first, last = (key - key_position(self.offset, frame) for key in grid.kv_range(kv_block))
        return Runs.one(
            0 if self.right is None else grid.first_row(first - self.right),
            grid.q_blocks if self.left is None else grid.end_row(last + self.left + 1),
        )

    def _inside(self, low: Index, high: Index) -> Bool[Array, "..."]:
        """True where `low >= -right` and `high <= left`."""
        inside = jnp.ones(jnp.broadcast_shapes(jnp.shape(low), jnp.shape(high)), bool)
        if self.left is not None:
            inside &= high <= self.left
        if self.right is not None:
            inside &= low >= -self.right
        return inside


def sliding_window(
    *,
    left: int | None,
    right: int | None = 0,
    offset: Int[Array, "*batch"] | int | None = None,
) -> Mask:
    """Lets each query see `left` keys before its own position and `right` after it.

    A "window of w tokens" that includes the query's own is `left=w - 1`.

    Args:
      left: How many keys before the own one are visible, at least 0; None is all.
      right: How many after it; None is all.
      offset: The key index that query 0 sits at, per sequence; may be traced. Default
        `kv_len - q_len`: the last query sits at the last key.

    Raises:
      ValueError: if a bound is negative, or `offset` is not an integer.
    """
    for name, bound in (("left", left), ("right", right)):
        if bound is not None:
            checks.non_negative(**{name: bound})
    return SlidingWindow(left, right, as_int32(offset=offset))
