"""A checked call of attention, and the tile lists that it comes down to."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float

from jsparse.attention.logits import LogitRule, Operands
from jsparse.types import BlockMask, BlockPyramid, Mask, TokenGroups

Plan = BlockMask | TokenGroups | BlockPyramid
Part = tuple[Array, Array]


class Problem(NamedTuple):
    """A checked call: batch axes flattened to one, modifications split into static and traced.

    With `log_threshold [batch, heads]` tiles far below what their rows saw before are skipped.
    """

    operands: Operands
    plan: Plan | None
    mask: Mask | None
    rule: LogitRule
    batch_shape: tuple[int, ...]
    log_threshold: Float[Array, "batch heads"] | None = None


class Lowered(NamedTuple):
    """What an executor of tile lists computes for a plan of any kind.

    Attributes:
      parts: Problems with a tile list or none; the first has the exact tiles.
      finish: Makes `(out, lse)` of the whole from that of each part.
    """

    parts: tuple[Problem, ...]
    finish: Callable[..., Part]
