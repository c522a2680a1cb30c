"""Sliding window: each query sees keys near its own position."""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from jsparse import checks
from jsparse.types import Frame, Mask, TileBounds, TileGrid, pytree_dataclass, static_field
from jsparse.types.mask import Index, TileClassifier


@pytree_dataclass
class SlidingWindow(Mask):
    """Query `i` at key position `p` sees keys `p - left <= j <= p + right`; None is no bound."""

    left: int | None = static_field()
    right: int | None = static_field()
    offset: int | None = static_field(default=None)

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        distance = q_index + self._offset(frame) - kv_index
        return self._within(distance, distance)

    def classifier(self, grid: TileGrid) -> TileClassifier:
        def classify(q_block: Index, kv_block: Index, frame: Frame) -> TileBounds:
            q_first, q_last = grid.q_range(q_block)
            kv_first, kv_last = grid.kv_range(kv_block)
            nearest = q_first + self._offset(frame) - kv_last
            farthest = q_last + self._offset(frame) - kv_first
            # every distance between the two occurs, so the tile is empty only if all are outside
            return TileBounds(self._within(farthest, nearest), self._within(nearest, farthest))

        return classify

    def max_tiles(self, grid: TileGrid) -> int:
        if self.left is None or self.right is None:
            return grid.kv_blocks
        keys = grid.block_q + self.left + self.right
        # a span of n keys that starts anywhere touches at most this many tiles
        return min(grid.kv_blocks, (keys - 2) // grid.block_kv + 2)

    def _offset(self, frame: Frame) -> int:
        return frame.diagonal if self.offset is None else self.offset

    def _within(self, low: Index, high: Index) -> Bool[Array, "..."]:
        """True where `low >= -right` and `high <= left`."""
        inside = jnp.ones(jnp.broadcast_shapes(jnp.shape(low), jnp.shape(high)), bool)
        if self.left is not None:
            inside &= high <= self.left
        if self.right is not None:
            inside &= low >= -self.right
        return inside


def sliding_window(*, left: int | None, right: int | None = 0, offset: int | None = None) -> Mask:
    """Lets each query see `left` keys before its own position and `right` after it.

    A "window of w tokens" that includes the query's own is `left=w - 1`.

    Args:
      left: How many keys before the own one are visible, at least 0; None is all.
      right: How many after it; None is all.
      offset: The key index that query 0 sits at. Default `kv_len - q_len`: the last query sits at
        the last key.

    Raises:
      ValueError: if a bound is negative.
    """
    for name, bound in (("left", left), ("right", right)):
        if bound is not None:
            checks.non_negative(**{name: bound})
    return SlidingWindow(left, right, offset)
