"""Lengths: true lengths of padded sequences, and the prefix of a prefix language model."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jsparse.masks.causal import causal
from jsparse.types import Frame, Mask, TileBounds, TileGrid, array_field, pytree_dataclass
from jsparse.types.mask import Index, TileClassifier


@pytree_dataclass
class Lengths(Mask):
    """Query `i` sees key `j` where both lie before the end of their sequence."""

    q_lengths: Int[Array, "*batch"] | None = array_field(core_ndim=0)
    kv_lengths: Int[Array, "*batch"] | None = array_field(core_ndim=0)

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        seen = jnp.ones(jnp.broadcast_shapes(jnp.shape(q_index), jnp.shape(kv_index)), bool)
        if self.q_lengths is not None:
            seen &= q_index < self.q_lengths[frame.batch]
        if self.kv_lengths is not None:
            seen &= kv_index < self.kv_lengths[frame.batch]
        return seen

    def classifier(self, grid: TileGrid) -> TileClassifier:
        def classify(q_block: Index, kv_block: Index, frame: Frame) -> TileBounds:
            (q_first, q_last), (kv_first, kv_last) = grid.q_range(q_block), grid.kv_range(kv_block)
            # the first pair is the likeliest to be visible, the last the least
            return TileBounds(
                self.visible(q_first, kv_first, frame), self.visible(q_last, kv_last, frame)
            )

        return classify


def lengths(
    q_lengths: Int[Array, "*batch"] | int | None = None,
    kv_lengths: Int[Array, "*batch"] | int | None = None,
) -> Mask:
    """Hides what lies past the true length of each padded sequence.

    Args:
      q_lengths: True queries per sequence; the rest see nothing. Default: all are true.
      kv_lengths: True keys per sequence; the rest are seen by none. Default: all are true.
    """

    def as_int(x):
        return None if x is None else jnp.asarray(x, jnp.int32)

    return Lengths(as_int(q_lengths), as_int(kv_lengths))


def prefix_lm(prefix_len: Int[Array, "*batch"] | int) -> Mask:
    """Lets every query see the whole prefix, and the keys up to its own position after it.

    Args:
      prefix_len: Length of the prefix, per sequence; may be traced.
    """
    return causal() | lengths(kv_lengths=jnp.asarray(prefix_len, jnp.int32))
