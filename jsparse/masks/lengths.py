"""Lengths: true lengths of padded sequences, and the prefix of a prefix language model."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jsparse.masks.causal import as_int32, causal
from jsparse.types import Frame, Mask, TileBounds, array_field, entry, pytree_dataclass
from jsparse.types.mask import Index, Range


@pytree_dataclass
class Lengths(Mask):
    """Query `i` sees key `j` where both lie before the end of their sequence."""

    q_lengths: Int[Array, "*batch"] | None = array_field(core_ndim=0)
    kv_lengths: Int[Array, "*batch"] | None = array_field(core_ndim=0)

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        seen = jnp.ones(jnp.broadcast_shapes(jnp.shape(q_index), jnp.shape(kv_index)), bool)
        if self.q_lengths is not None:
            seen &= q_index < self.q_lengths[entry(len(self.q_lengths), frame.batch)]
        if self.kv_lengths is not None:
            seen &= kv_index < self.kv_lengths[entry(len(self.kv_lengths), frame.batch)]
        return seen

    def within(self, q_range: Range, kv_range: Range, frame: Frame) -> TileBounds:
        (q_first, q_last), (kv_first, kv_last) = q_range, kv_range
        # the first pair is the likeliest to be visible, the last the least
        some = self.visible(q_first, kv_first, frame)
        return TileBounds(some, self.visible(q_last, kv_last, frame))


def lengths(
    q_lengths: Int[Array, "*batch"] | int | None = None,
    kv_lengths: Int[Array, "*batch"] | int | None = None,
) -> Mask:
    """Hides what lies past the true length of each padded sequence.

    Args:
      q_lengths: True queries per sequence; the rest see nothing. Default: all are true.
      kv_lengths: True keys per sequence; the rest are seen by none. Default: all are true.

    Raises:
      ValueError: if a length is not an integer.
    """
    return Lengths(as_int32(q_lengths=q_lengths), as_int32(kv_lengths=kv_lengths))


def prefix_lm(prefix_len: Int[Array, "*batch"] | int) -> Mask:
    """Lets every query see the whole prefix, and the keys up to its own position after it.

    Args:
      prefix_len: Length of the prefix, per sequence; may be traced.

    Raises:
      ValueError: if a length is not an integer.
    """
    return causal() | Lengths(None, as_int32(prefix_len=prefix_len))
