"""What happens to logits as the Mosaic kernels take it: in every tile, and where much is hidden."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array

from jsparse.attention import kernels
from jsparse.attention.logits import LogitRule, Operands
from jsparse.attention.separation import Separated, separate
from jsparse.types import Mask
from pallas_kernels.block_sparse_attention.logits import Rule, Tiles

# from a kernel's (q_index, kv_index, batch, head) to an executor's
Place = Callable[[Array, Array, Array, Array], tuple[Array, Array, Array, Array]]


class Lengths(NamedTuple):
    """What a kernel counts by its indices."""

    batches: int
    heads: int
    q_len: int
    kv_len: int


class Parts(NamedTuple):
    """What happens to logits: in every tile, and in those where something is hidden.

    None where nothing happens; a constant positive scale is no part of either.
    """

    modify: Separated | None
    hide: Separated | None

    @property
    def values(self) -> tuple[tuple[Array, ...], ...]:
        """What is computed before and has gradients; what hides has none."""
        return self.modify.values if self.modify else ()

    def tiles(self, rule: LogitRule, block_q: int, block_kv: int) -> Tiles:
        """As a kernel takes it, with its sizes of tiles."""
        modify, hide = self
        return Tiles(
            block_q,
            block_kv,
            None if modify else rule.scale,
            modify and Rule(modify.rule, modify.row_values, modify.column_values, modify.gradient),
            hide and Rule(hide.rule, hide.row_values, hide.column_values),
        )


def split(
    operands: Operands,
    mask: Mask | None,
    rule: LogitRule,
    lengths: Lengths,
    place: Place,
    *,
    ragged: bool,
) -> Parts | str:
    """The parts as kernels take them, or a sentence that says what they cannot take."""
    modifier, sizes = kernels.modifier(operands, rule), lengths._asdict()

    def modify(logit, *indices):
        return modifier(logit, *place(*indices))

    def hide(logit, *indices):
        return rule.hide(logit, mask, *place(*indices), ragged=ragged)

    modified = None
    if not _only_scales(operands, rule):
        modified = separate(modify, **sizes)
    if isinstance(modified, str):
        return modified
    hidden = separate(hide, **sizes) if mask is not None or ragged else None
    return hidden if isinstance(hidden, str) else Parts(modified, hidden)


def _only_scales(operands: Operands, rule: LogitRule) -> bool:
    # a factor that is not positive would turn the maximum of a row, and what is hidden, round
    return (
        operands.bias is None
        and not rule.changes_logits
        and rule.scale is not None
        and rule.scale > 0
    )
