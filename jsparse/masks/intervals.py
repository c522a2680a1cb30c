"""Column intervals: per key at most two intervals of queries that do not see it.

FlashMask, Wang et al. 2024, arXiv:2410.01359, section 4.1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jsparse import checks
from jsparse.masks.causal import as_int32
from jsparse.masks.causal import causal as causal_mask
from jsparse.types import (
    Frame,
    Mask,
    TileBounds,
    TileGrid,
    array_field,
    entry,
    pytree_dataclass,
    static_field,
)
from jsparse.types.mask import Index, TileClassifier, block_extrema


@pytree_dataclass
class Intervals(Mask):
    """Key `j` is hidden from queries in [lower_start, lower_end) and [upper_start, upper_end)."""

    lower_start: Int[Array, "*batch heads kv_len"] = array_field(core_ndim=2)
    lower_end: Int[Array, "*batch heads kv_len"] | None = array_field(core_ndim=2)
    upper_start: Int[Array, "*batch heads kv_len"] | None = array_field(core_ndim=2)
    upper_end: Int[Array, "*batch heads kv_len"] | None = array_field(core_ndim=2)
    q_len: int = static_field()

    @property
    def heads(self) -> int:
        return self.lower_start.shape[-2]

    def _column(self, frame: Frame, index: Index) -> tuple[Index, Index, Index]:
        batch = entry(len(self.lower_start), frame.batch)
        return batch, entry(self.heads, frame.head), index

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        at = self._column(frame, kv_index)
        hidden = q_index >= self.lower_start[at]
        if self.lower_end is not None:
            hidden &= q_index < self.lower_end[at]
        if self.upper_end is not None:
            upper = q_index < self.upper_end[at]
            if self.upper_start is not None:
                upper &= q_index >= self.upper_start[at]
            hidden |= upper
        return ~hidden

    def classifier(self, grid: TileGrid) -> TileClassifier:
        zeros = jnp.zeros_like(self.lower_start)
        ends = zeros + self.q_len
        vectors = (
            self.lower_start,
            ends if self.lower_end is None else self.lower_end,
            zeros if self.upper_start is None else self.upper_start,
            zeros if self.upper_end is None else self.upper_end,
        )
        extrema = [block_extrema(x, grid.block_kv) for x in vectors]

        def classify(q_block: Index, kv_block: Index, frame: Frame) -> TileBounds:
            first, last = grid.q_range(q_block)
            stop = last + 1
            at = self._column(frame, kv_block)
            (ls_low, ls_high), (le_low, le_high), (us_low, us_high), (ue_low, ue_high) = (
                (low[at], high[at]) for low, high in extrema
            )
            empty = (first >= ls_high) & (stop <= le_low)
            empty |= (first >= us_high) & (stop <= ue_low)
            partial = (first < le_high) & (stop > ls_low)
            partial |= (first < ue_high) & (stop > us_low)
            return TileBounds(~empty, ~partial)

        return classify

    def check_lengths(self, q_len: int, kv_len: int) -> None:
        checks.mask_length("intervals", self.lower_start.shape[-1], kv_len)
        checks.mask_length("implied interval ends", self.q_len, q_len)


def intervals(
    startend_row_indices: Int[Array, "*batch heads kv_len bounds"],
    *,
    causal: bool,
    q_len: int,
    offset: Int[Array, "*sequences"] | int | None = None,
) -> Mask:
    """Hides each key from at most two intervals of queries.

    Args:
      startend_row_indices: Interval bounds per key, in rows (queries); an interval whose start is
        at or past its end is empty. The heads axis is 1 or the number of query heads. Causal: the
        last axis is (lower start) or (lower start, lower end). Not causal: (lower start, upper
        end) or (lower start, lower end, upper start, upper end). A lower end left out is `q_len`,
        an upper start 0.
      causal: Whether keys after the query's own position are hidden as well, bottom-right aligned.
      q_len: Number of queries.
      offset: The key index that query 0 sits at, per sequence, for queries that are part of what
        the bounds were made for: rows then count from the query at key 0. Default: from query 0.

    Raises:
      ValueError: if the bounds, or `offset`, are not integers, known ones are too large for int32,
        or there are not 1, 2 or 4 bounds as `causal` asks.
    """
    checks.integers(startend_row_indices=startend_row_indices)
    checks.within_int32(
        "a bound that hides all later queries is q_len.", startend_row_indices=startend_row_indices
    )
    checks.positive(q_len=q_len)
    bounds = startend_row_indices.shape[-1]
    checks.interval_bounds(bounds, causal)
    columns = [jnp.asarray(startend_row_indices[..., n], jnp.int32) for n in range(bounds)]
    start = as_int32(offset=offset)
    if start is not None:
        columns = [column - start[..., None, None] for column in columns]
    if causal:
        lower_end = columns[1] if bounds == 2 else None
        return Intervals(columns[0], lower_end, None, None, q_len) & causal_mask(offset=start)
    if bounds == 2:
        return Intervals(columns[0], None, None, columns[1], q_len)
    lower_start, lower_end, upper_start, upper_end = columns
    return Intervals(lower_start, lower_end, upper_start, upper_end, q_len)
