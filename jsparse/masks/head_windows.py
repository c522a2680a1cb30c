"""Head windows: each query head its own sinks and its own window."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jsparse import checks
from jsparse.masks.causal import as_int32, key_position
from jsparse.types import Frame, Mask, TileBounds, array_field, pytree_dataclass, static_field
from jsparse.types.mask import Index, Range

# a window that no distance between two tokens exceeds
_ENDLESS = 2**30


@pytree_dataclass
class HeadWindows(Mask):
    """Head `h` sees the first `num_sink[h]` keys, and all from `window[h] - 1` before it on.

    Of distances between blocks those between their first tokens count.
    """

    num_sink: tuple[int, ...] = static_field()
    window: tuple[int, ...] = static_field()
    block_size: int = static_field(default=1)
    offset: Int[Array, "*batch"] | None = array_field(core_ndim=0, default=None)

    @property
    def heads(self) -> int:
        return len(self.window)

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        num_sink, window = self._of_head(frame)
        distance = self._distance(q_index + key_position(self.offset, frame), kv_index)
        return (kv_index < num_sink) | (distance < window)

    def within(self, q_range: Range, kv_range: Range, frame: Frame) -> TileBounds:
        (q_first, q_last), (kv_first, kv_last) = q_range, kv_range
        num_sink, window = self._of_head(frame)
        offset = key_position(self.offset, frame)
        nearest = self._distance(q_first + offset, kv_last)
        farthest = self._distance(q_last + offset, kv_first)
        some = (kv_first < num_sink) | (nearest < window)
        return TileBounds(some, (kv_last < num_sink) | (farthest < window))

    def _distance(self, q_position: Index, kv_position: Index) -> Index:
        size = self.block_size
        if size == 1:
            return q_position - kv_position
        return (q_position // size - kv_position // size) * size

    def _of_head(self, frame: Frame) -> tuple[Array, Array]:
        return jnp.asarray(self.num_sink)[frame.head], jnp.asarray(self.window)[frame.head]


def head_windows(
    *,
    num_sink: Sequence[int],
    window: Sequence[int | None],
    block_size: int = 1,
    offset: Int[Array, "*batch"] | int | None = None,
) -> Mask:
    """Lets each query head see the first keys and a window, as many of either as it is given.

    Keys after the query are left visible; combine with `causal()`.

    Args:
      num_sink: Per query head, how many keys at the start every query sees, at least 0.
      window: Per query head, how many keys up to the own one are visible, that one included, at
        least 1; None is all.
      block_size: Tokens per block, counted from key 0, by which windows are cut: a query sees the
        blocks whose first key is less than `window` before the first one of its own.
      offset: The key index that query 0 sits at, per sequence; see `js.masks.causal`.

    Raises:
      ValueError: if the two differ in length, a number is out of range, or `offset` is not an
        integer.
    """
    checks.same_number_of_heads(num_sink=num_sink, window=window)
    checks.positive(block_size=block_size)
    for first, near in zip(num_sink, window, strict=True):
        checks.non_negative(num_sink=first)
        if near is not None:
            checks.positive(window=near)
    windows = tuple(_ENDLESS if near is None else near for near in window)
    return HeadWindows(tuple(num_sink), windows, block_size, as_int32(offset=offset))
