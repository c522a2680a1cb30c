"""Attention inside groups of tokens, as a list of tiles.

Tokens are put in the order of their groups, so a tile of queries sees one run of keys: its list
follows from the offsets, and inside a tile each query sees the keys of its own group.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jsparse import _compat
from jsparse.attention.logits import ScoreMod
from jsparse.attention.problem import Lowered, Part, Problem
from jsparse.core import reordering
from jsparse.core.reordering import Reordered
from jsparse.types import (
    BlockMask,
    Frame,
    Mask,
    TileBounds,
    TileGrid,
    TokenGroups,
    array_field,
    entry,
    pytree_dataclass,
)
from jsparse.types.mask import Index, Range

# that kernels take; below 32, steps of the loops are too short
_SIDES = (32, 64, 128)


@pytree_dataclass
class Runs(Mask):
    """Query `i` sees keys `first[i] <= j < end[i]`; neither falls from one query to the next."""

    first: Int[Array, "*batch run_heads q_len"] = array_field(core_ndim=2)
    end: Int[Array, "*end_batch run_heads q_len"] = array_field(core_ndim=2)

    @property
    def heads(self) -> int:
        return self.first.shape[-2]

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        first, end = self._at(q_index, frame)
        return (kv_index >= first) & (kv_index < end)

    def within(self, q_range: Range, kv_range: Range, frame: Frame) -> TileBounds:
        lowest_first, lowest_end = self._at(q_range[0], frame)
        highest_first, highest_end = self._at(q_range[1], frame)
        kv_first, kv_last = kv_range
        return TileBounds(
            (kv_last >= lowest_first) & (kv_first < highest_end),
            (kv_first >= highest_first) & (kv_last < lowest_end),
        )

    def _at(self, q_index: Index, frame: Frame) -> tuple[Array, Array]:
        head = entry(self.heads, frame.head)
        first, end = (x[entry(len(x), frame.batch), head, q_index] for x in (self.first, self.end))
        return first, end


def tile_list(groups: TokenGroups, side: int) -> BlockMask:
    """The tiles of grouped tokens from the first to the last key that a row of tiles sees.

    Between those lie tiles without a pair only where groups have keys and no queries. Costs what
    the lists have entries, which is one per tile of the map where offsets are traced: any group may
    then have all tokens.
    """
    return run_tiles(Runs(*groups.kv_runs()), TileGrid(groups.q_len, groups.kv_len, side, side))


def run_tiles(runs: Runs, grid: TileGrid, *, width: int | None = None) -> BlockMask:
    """The tiles from the first to the last key that a row of tiles sees.

    Args:
      runs: Which keys each query sees.
      grid: The tiles.
      width: The most tiles that a row needs. Default: what runs need where they are concrete, all
        where they are traced.
    """
    first, end = runs.first, runs.end
    q_first, q_last = grid.q_range(jnp.arange(grid.q_blocks))
    begin, stop = first[..., q_first] // grid.block_kv, -(-end[..., q_last] // grid.block_kv)
    counts = jnp.where(end[..., q_last] > first[..., q_first], stop - begin, 0)
    if width is None:
        width = grid.kv_blocks
        if not _compat.is_traced(counts):
            width = max(1, int(counts.max(initial=0)))
    entries = jnp.arange(width, dtype=jnp.int32)
    lists = jnp.where(entries < counts[..., None], begin[..., None] + entries, 0)
    overflowed = (counts > width).any(-1)
    return BlockMask(lists, counts, overflowed, *grid)


def tile_side(groups: TokenGroups, least_side: int) -> int:
    """Queries and keys per tile: about a group on average, and no lists longer than the tokens."""
    tokens = max(groups.q_len, groups.kv_len)
    wanted = max(least_side, tokens // groups.groups, tokens**0.5 / 4)
    return next((side for side in _SIDES if side >= wanted), _SIDES[-1])


def lower(problem: Problem, least_side: int) -> Lowered:
    """The problem with tokens in the order of their groups, and a tile list.

    Args:
      problem: Whose plan is `TokenGroups`.
      least_side: The smallest tiles that the executor takes.
    """
    operands, groups, mask, rule, batch_shape, *_ = problem
    assert isinstance(groups, TokenGroups)
    groups = groups.without_missing_tokens()
    heads = operands.q.shape[-2]

    def per_head(x: Array) -> Array:
        # one of the sides may be the same for all heads
        return jnp.repeat(x, heads // x.shape[-2], axis=-2) if x.shape[-2] > 1 else x

    q_order, kv_order = groups.q_order, groups.kv_order
    visible: Mask = Runs(*map(per_head, groups.kv_runs()))
    if mask is not None:
        visible = visible & Reordered(mask, per_head(q_order), per_head(kv_order))
    bias, captured = operands.bias, operands.captured
    if bias is not None:
        for axis, order in ((-2, q_order), (-1, kv_order)):
            bias = reordering.reorder_pairs(bias, order, axis, heads)
    if rule.score_mod is not None:
        rule = rule._replace(score_mod=_of_original_places(rule.score_mod))
        captured = (*captured, per_head(q_order), per_head(kv_order))
    moved = operands._replace(
        q=reordering.reorder(operands.q, q_order),
        k=reordering.reorder(operands.k, kv_order),
        v=reordering.reorder(operands.v, kv_order),
        bias=bias,
        captured=captured,
    )
    tiles = tile_list(groups, tile_side(groups, least_side))

    def put_back(part: Part) -> Part:
        out, lse = part
        places = jnp.broadcast_to(per_head(reordering.inverse(q_order)), lse.shape)
        lse = jnp.take_along_axis(lse, places, axis=-1, mode="promise_in_bounds")
        return reordering.restore(out, q_order), lse

    return Lowered((Problem(moved, tiles, visible, rule, batch_shape),), put_back)


def _of_original_places(score_mod: ScoreMod) -> ScoreMod:
    """A score_mod that is told where tokens stood; the orders come last of what it captures."""

    def told(captured, logits, batch, head, q_index, kv_index):
        *captured, q_order, kv_order = captured

        def original(order, index):
            return order[entry(len(order), batch), entry(order.shape[-2], head), index]

        places = original(q_order, q_index), original(kv_order, kv_index)
        return score_mod(tuple(captured), logits, batch, head, *places)

    return told
