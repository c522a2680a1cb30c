"""Causal: each query sees the keys up to its own position."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jsparse.types import Frame, Mask, TileBounds, TileGrid, array_field, pytree_dataclass
from jsparse.types.mask import Index, TileClassifier


@pytree_dataclass
class Causal(Mask):
    """Query `i` sees keys `j <= i + offset`; without an offset, bottom-right aligned."""

    offset: Int[Array, "*batch"] | None = array_field(core_ndim=0, default=None)

    def _last_key(self, q_index: Index, frame: Frame) -> Index:
        offset = frame.diagonal if self.offset is None else self.offset[frame.batch]
        return q_index + offset

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        return kv_index <= self._last_key(q_index, frame)

    def classifier(self, grid: TileGrid) -> TileClassifier:
        def classify(q_block: Index, kv_block: Index, frame: Frame) -> TileBounds:
            q_first, q_last = grid.q_range(q_block)
            kv_first, kv_last = grid.kv_range(kv_block)
            some = kv_first <= self._last_key(q_last, frame)
            return TileBounds(some, kv_last <= self._last_key(q_first, frame))

        return classify


def causal(*, offset: Int[Array, "*batch"] | int | None = None) -> Mask:
    """Lets each query see the keys up to its own position.

    Args:
      offset: The key index that query 0 sits at, per sequence; may be traced (a decode step's
        position in its cache). Default `kv_len - q_len`: the last query sees the last key.
    """
    return Causal(None if offset is None else jnp.asarray(offset, jnp.int32))
