"""Lengths: true lengths of padded sequences, and the prefix of a prefix language model."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jsparse.masks.causal import as_int32, causal
from jsparse.types import Frame, Mask, TileBounds, TileGrid, array_field, entry, pytree_dataclass
from jsparse.types.mask import Index, Range, Runs, TileClassifier


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

    def visible_run(
        self, q_index: Index, kv_first: Index, count: int, frame: Frame
    ) -> Bool[Array, "..."]:
        return self.visible(q_index, kv_first + (count - 1), frame)

    def within(self, q_range: Range, kv_range: Range, frame: Frame) -> TileBounds:
        (q_first, q_last), (kv_first, kv_last) = q_range, kv_range
        # the first pair is the likeliest to be visible, the last the least
        some = self.visible(q_first, kv_first, frame)
        return TileBounds(some, self.visible(q_last, kv_last, frame))


@pytree_dataclass
class InRoom(Mask):
    """A mask on keys that have room for more behind them: queries end at the last true key."""

    mask: Mask
    kv_lengths: Int[Array, "*batch"] = array_field(core_ndim=0)

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        return self.mask.visible(q_index, kv_index, self._frame(frame))

    def visible_run(
        self, q_index: Index, kv_first: Index, count: int, frame: Frame
    ) -> Bool[Array, "..."]:
        return self.mask.visible_run(q_index, kv_first, count, self._frame(frame))

    def within(self, q_range: Range, kv_range: Range, frame: Frame) -> TileBounds:
        return self.mask.within(q_range, kv_range, self._frame(frame))

    def classifier(self, grid: TileGrid) -> TileClassifier:
        inner = self.mask.classifier(grid)

        def classify(q_block: Index, kv_block: Index, frame: Frame) -> TileBounds:
            return inner(q_block, kv_block, self._frame(frame))

        return classify

    def max_tiles(self, grid: TileGrid) -> int:
        return self.mask.max_tiles(grid)

    def candidates(
        self, q_block: Index, grid: TileGrid, frame: Frame
    ) -> Int[Array, " count"] | None:
        return self.mask.candidates(q_block, grid, self._frame(frame))

    def rows(self, kv_block: Index, grid: TileGrid, frame: Frame) -> Runs | None:
        return self.mask.rows(kv_block, grid, self._frame(frame))

    def _frame(self, frame: Frame) -> Frame:
        return frame._replace(kv_len=self.kv_lengths[entry(len(self.kv_lengths), frame.batch)])


def in_room(mask: Mask, kv_lengths: Int[Array, "*batch"]) -> Mask:
    """Places a mask in a cache: what it says of last keys, it says of the last that are there.

    What stands in the room behind them it does not hide by itself.

    Args:
      mask: As for keys that fill their array.
      kv_lengths: How many keys are there, the queries' own included.
    """
    return InRoom(mask, kv_lengths)


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
