"""Causal: each query sees the keys up to its own position."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jsparse import checks
from jsparse.types import (
    Frame,
    Mask,
    TileBounds,
    TileGrid,
    array_field,
    entry,
    pytree_dataclass,
)
from jsparse.types.mask import Index, Range, Runs


@pytree_dataclass
class Causal(Mask):
    """Query `i` sees keys `j <= i + offset`; without an offset, bottom-right aligned."""

    offset: Int[Array, "*batch"] | None = array_field(core_ndim=0, default=None)

    def _last_key(self, q_index: Index, frame: Frame) -> Index:
        return q_index + key_position(self.offset, frame)

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        return kv_index <= self._last_key(q_index, frame)

    def visible_run(
        self, q_index: Index, kv_first: Index, count: int, frame: Frame
    ) -> Bool[Array, "..."]:
        return self.visible(q_index, kv_first + (count - 1), frame)

    def within(self, q_range: Range, kv_range: Range, frame: Frame) -> TileBounds:
        (q_first, q_last), (kv_first, kv_last) = q_range, kv_range
        some = kv_first <= self._last_key(q_last, frame)
        return TileBounds(some, kv_last <= self._last_key(q_first, frame))

    def rows(self, kv_block: Index, grid: TileGrid, frame: Frame) -> Runs:
        first, _ = grid.kv_range(kv_block)
        return Runs.one(grid.first_row(first - key_position(self.offset, frame)), grid.q_blocks)


def key_position(offset: Int[Array, " batch"] | None, frame: Frame) -> Index:
    """The key index that query 0 sits at: as given, else such that the last query sits last."""
    return frame.diagonal if offset is None else offset[entry(len(offset), frame.batch)]


def causal(*, offset: Int[Array, "*batch"] | int | None = None) -> Mask:
    """Lets each query see the keys up to its own position.

    Args:
      offset: The key index that query 0 sits at, per sequence; may be traced (a decode step's
        position in its cache). Default `kv_len - q_len`: the last query sees the last key.

    Raises:
      ValueError: if `offset` is not an integer, or a concrete one is too large for int32.
    """
    return Causal(as_int32(offset=offset))


def as_int32(**values: Any) -> Int[Array, "*batch"] | None:
    """One number or array of numbers per sequence, None left as it is."""
    ((name, value),) = values.items()
    if value is None:
        return None
    value = np.asarray(value) if isinstance(value, (int, float)) else value
    checks.integers(**{name: value})
    checks.within_int32("it counts tokens, of which there may be 2**31 - 1.", **{name: value})
    return jnp.asarray(value, jnp.int32)
