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
    """Head `h` sees the first `num_sink[h]` keys, and all from `window[h] - 1` before it on."""

    num_sink: tuple[int, ...] = static_field()
    window: tuple[int, ...] = static_field()
    offset: Int[Array, "*batch"] | None = array_field(core_ndim=0, default=None)

    @property
    def heads(self) -> int:
        return len(self.window)

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        num_sink, window = self._of_head(frame)
        distance = q_index + key_position(self.offset, frame) - kv_index
        return (kv_index < num_sink) | (distance < window)

    def within(self, q_range: Range, kv_range: Range, frame: Frame) -> TileBounds:
        (q_first, q_last), (kv_first, kv_last) = q_range, kv_range
        num_sink, window = self._of_head(frame)
        offset = key_position(self.offset, frame)
        some = (kv_first < num_sink) | (q_first + offset - kv_last < window)
        return TileBounds(some, (kv_last < num_sink) | (q_last + offset - kv_first < window))

    def _of_head(self, frame: Frame) -> tuple[Array, Array]:
        return jnp.asarray(self.num_sink)[frame.head], jnp.asarray(self.window)[frame.head]


def head_windows(
    *,
    num_sink: Sequence[int],
    window: Sequence[int | None],
    offset: Int[Array, "*batch"] | int | None = None,
) -> Mask:
    """Lets each query head see the first keys and a window, as many of either as it is given.

    Keys after the query are left visible; combine with `causal()`.

    Args:
      num_sink: Per query head, how many keys at the start every query sees, at least 0.
      window: Per query head, how many keys up to the own one are visible, that one included, at
        least 1; None is all.
      offset: The key index that query 0 sits at, per sequence; see `js.masks.causal`.

    Raises:
      ValueError: if the two differ in length, a number is out of range, or `offset` is not an
        integer.
    """
    checks.same_number_of_heads(num_sink=num_sink, window=window)
    for first, near in zip(num_sink, window, strict=True):
        checks.non_negative(num_sink=first)
        if near is not None:
            checks.positive(window=near)
    windows = tuple(_ENDLESS if near is None else near for near in window)
    return HeadWindows(tuple(num_sink), windows, as_int32(offset=offset))
