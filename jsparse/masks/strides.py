"""Dilated and strided: keys at regular distances from the query."""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from jsparse import checks
from jsparse.masks.window import sliding_window
from jsparse.types import Frame, Mask, TileBounds, pytree_dataclass, static_field
from jsparse.types.mask import Index, Range


@pytree_dataclass
class Stride(Mask):
    """Query at key position `p` sees keys whose distance `p - j` is a multiple of `stride`."""

    stride: int = static_field()

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        return (q_index + frame.diagonal - kv_index) % self.stride == 0

    def within(self, q_range: Range, kv_range: Range, frame: Frame) -> TileBounds:
        (q_first, q_last), (kv_first, kv_last) = q_range, kv_range
        nearest = q_first + frame.diagonal - kv_last
        farthest = q_last + frame.diagonal - kv_first
        # all distances of the range occur: is there a multiple of the stride among them?
        some = farthest // self.stride * self.stride >= nearest
        only = (nearest == farthest) | (self.stride == 1)
        return TileBounds(some, some & only)


@pytree_dataclass
class StridedKeys(Mask):
    """Every query sees keys `j` with `j % stride >= stride - count`."""

    stride: int = static_field()
    count: int = static_field()

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        shape = jnp.broadcast_shapes(jnp.shape(q_index), jnp.shape(kv_index))
        return jnp.broadcast_to(kv_index % self.stride >= self.stride - self.count, shape)

    def within(self, q_range: Range, kv_range: Range, frame: Frame) -> TileBounds:
        # shifted so that the visible keys are those with remainder below `count`
        first, last = (index + self.count for index in kv_range)
        seen = _multiples_with_remainder_below(last, self.stride, self.count)
        seen -= _multiples_with_remainder_below(first - 1, self.stride, self.count)
        return TileBounds(seen > 0, seen == last - first + 1)


def _multiples_with_remainder_below(limit: Index, stride: int, count: int) -> Index:
    """How many integers in [0, limit] have a remainder below `count`."""
    whole, rest = jnp.divmod(limit + 1, stride)
    return whole * count + jnp.minimum(rest, count)


def dilated(*, stride: int, window: int) -> Mask:
    """Lets each query see `window` keys up to its own, `stride` apart.

    The distances are 0, stride, ..., (window - 1) * stride.

    Args:
      stride: Distance between two visible keys, at least 1.
      window: How many keys are visible, the own one included, at least 1.

    Raises:
      ValueError: if a number is not positive.
    """
    checks.positive(stride=stride, window=window)
    return sliding_window(left=(window - 1) * stride) & Stride(stride)


def strided(*, stride: int, count: int = 1) -> Mask:
    """Lets every query see the last `count` keys of each run of `stride`.

    The fixed pattern of Sparse Transformers (Child et al. 2019, arXiv:1904.10509, section 4.3);
    combine with a window and `causal()`.

    Args:
      stride: Length of a run, at least 1.
      count: Keys visible in each run, between 1 and `stride`.

    Raises:
      ValueError: if a number is out of range.
    """
    checks.positive(stride=stride, count=count)
    checks.at_most(stride, count=count)
    return StridedKeys(stride, count)
