"""Attention to tiles and to summaries, as lists of tiles.

Pooled columns are keys of their own, as many as there are blocks: a second list says which of them
the rows of a tile need, bits per row say which one stands in for what, and both parts have one
softmax by their log-sum-exps. Levels are keys of one longer array, the pooled ones after the exact
ones, of which an entry is a run.

One pass over keys and pooled columns, end to end in one array as levels are, gives every exact tile
a bias and bits to look at, and tiles of columns the width of those of keys. With XLA it took more
processor time forward, and as much with gradients. Two cores of an EPYC, jax 0.10.2, 2 heads of 64
features, the least of nine runs each: at 8192 tokens and a tenth of the tiles of 128, forward 62 ms
in one pass and 47 in two, with gradients 176 and 188; at a twentieth of those of 64, 44 and 39, 142
and 144. It reserved as much forward, and with gradients 28 MiB instead of 37, 30 instead of 32.

On GPUs the two parts cost q once more and two outputs written and read (`merging` in
`benchmarks.roofline`): at the best of an H200, in 16 bits and for widths of 128, a sixth of what a
tenth of the tiles takes at 32768 tokens, two thirds of it at 8192.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jsparse import _compat
from jsparse.attention.logits import Operands
from jsparse.attention.problem import Lowered, Problem
from jsparse.core.merging import merge
from jsparse.core.pooling import mean_blocks
from jsparse.types import (
    BlockMask,
    BlockPyramid,
    Frame,
    Mask,
    TileBounds,
    TileGrid,
    array_field,
    entry,
    pytree_dataclass,
    static_field,
)
from jsparse.types.block_mask import dense_to_lists
from jsparse.types.mask import Index, TileClassifier, pad_to_blocks

# columns per tile of summaries that kernels take; fewer than 128 where one tile has them all
_SIDES = (16, 32, 64, 128)
_BITS = 32
# up to so many numbers per row are compared one by one, which kernels can do; more are looked up
_COMPARED = 32
# pairs of a row and a block at work at once, in bytes
_AT_ONCE = 2**22


def lower(problem: Problem, least_side: int) -> Lowered:
    """The problem as tile lists over keys and summaries.

    Args:
      problem: Whose plan is a `BlockPyramid`.
      least_side: The smallest tiles that the executor takes.
    """
    plan = problem.plan
    assert isinstance(plan, BlockPyramid)
    if plan.levels is not None:
        return Lowered((_leveled(problem, plan),), lambda part: part)
    return Lowered(
        (problem._replace(plan=plan.block_mask), _pooled(problem, plan, least_side)),
        lambda *parts: merge(parts),
    )


def _pooled(problem: Problem, plan: BlockPyramid, least_side: int) -> Problem:
    """Attention to the columns that stand for what the list leaves out."""
    operands, _, mask, rule, batch_shape, *_ = problem
    k, v, log_count = plan.pooled_k, plan.pooled_v, plan.log_count
    assert k is not None
    assert v is not None
    assert log_count is not None
    q, heads = operands.q, operands.q.shape[-2]
    bias = jnp.repeat(log_count, heads // log_count.shape[-1], axis=-1).astype(jnp.float32)
    columns = Operands(
        q,
        *(jnp.broadcast_to(x, (len(q), *x.shape[1:])).astype(q.dtype) for x in (k, v)),
        bias=jnp.swapaxes(bias, -1, -2)[:, :, None],
        scale=operands.scale,
    )
    stand_ins = _stand_ins(plan.block_mask, mask, len(q), heads)
    tiles = _needed_tiles(stand_ins, plan.block_mask, column_tile(plan.block_mask, least_side))
    kv_len = plan.block_mask.grid.kv_blocks
    return Problem(columns, tiles, stand_ins, rule._replace(kv_len=kv_len), batch_shape)


def tile_lists(plan: BlockPyramid) -> tuple[BlockMask, ...]:
    """What is computed where nothing is masked: the exact tiles, and those of summaries."""
    if plan.levels is not None:
        return (level_tiles(plan),)
    lists = plan.block_mask
    stand_ins = StandIns(_packed(~lists.to_dense()), lists.block_q, 1)
    return lists, _needed_tiles(stand_ins, lists, column_tile(lists, 1))


def column_tile(lists: BlockMask, least_side: int) -> int:
    """How many summaries a tile has."""
    wanted = max(least_side, lists.grid.kv_blocks)
    return next((side for side in _SIDES if side >= wanted), _SIDES[-1])


@pytree_dataclass
class StandIns(Mask):
    """Row `i` sees column `j` where bit `j` of its words is set; `rows` rows share their words."""

    words: Int[Array, "*batch word_heads word_rows words"] = array_field(core_ndim=3)
    rows: int = static_field()
    heads_per_word: int = static_field()

    @property
    def heads(self) -> int:
        count = self.words.shape[-3]
        return count * self.heads_per_word if count > 1 else 1

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        count = self.words.shape[-1]
        columns = np.arange(count * _BITS)
        which = jnp.asarray(columns // _BITS, jnp.int32)[kv_index]
        bit = jnp.asarray((1 << columns % _BITS).astype(np.uint32).view(np.int32))[kv_index]
        head = entry(self.words.shape[-3], frame.head // self.heads_per_word)
        where = entry(len(self.words), frame.batch), head, q_index // self.rows
        if count > _COMPARED:
            return (self.words[*where, which] & bit) != 0
        word = self.words[*where, 0]
        for number in range(1, count):
            word = jnp.where(which == number, self.words[*where, number], word)
        return (word & bit) != 0


def _stand_ins(lists: BlockMask, mask: Mask | None, batches: int, heads: int) -> StandIns:
    """Which column stands in for which row: its block is left out and all its keys are visible."""
    listed = lists.to_dense()
    per_list = heads // lists.list_heads
    if mask is None:
        return StandIns(_packed(~listed), lists.block_q, per_list)
    if not mask.by_batch_index:
        shared = len(listed) == 1 and all(n == 1 for n in mask.batch_shape)
        batches = 1 if shared else batches
    words = _visible_and_left_out(listed, mask, lists.grid, batches, heads)
    return StandIns(words, 1, heads // words.shape[-3])


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _visible_and_left_out(
    listed: Bool[Array, "list_batch list_heads q_blocks kv_blocks"],
    mask: Mask,
    grid: TileGrid,
    batches: int,
    heads: int,
) -> Int[Array, "batch out_heads q_len words"]:
    """Bits of the blocks that a row sees whole and that its list leaves out.

    Tiles are mostly decided by the mask's bounds. Those that are neither listed nor decided are
    looked at key by key.
    """
    list_batches, list_heads = listed.shape[:2]
    out_heads = heads if mask.heads > 1 else list_heads
    classify = mask.classifier(grid)
    columns, inside = jnp.arange(grid.kv_blocks), jnp.arange(grid.block_kv)

    def one_row(row):
        row, q_block = jnp.divmod(row, grid.q_blocks)
        batch, out_head = jnp.divmod(row, out_heads)
        head = out_head * (heads // out_heads)
        frame = Frame(grid.q_len, grid.kv_len, batch, head)
        own = listed[entry(list_batches, batch), out_head // (out_heads // list_heads), q_block]
        some, every = (
            jnp.broadcast_to(x, columns.shape) for x in classify(q_block, columns, frame)
        )
        undecided = some & ~every & ~own
        numbers = dense_to_lists(undecided, grid.kv_blocks)
        rows = q_block * grid.block_q + jnp.arange(grid.block_q)[:, None]

        def look(number, whole):
            keys = numbers[number] * grid.block_kv + inside
            seen = mask.visible(rows, keys, frame) | (keys >= grid.kv_len)
            return whole.at[:, numbers[number]].set(seen.all(-1))

        whole = jnp.broadcast_to(every, (grid.block_q, grid.kv_blocks))
        return _packed(_compat.fori_loop(0, undecided.sum(), look, whole) & ~own)

    rows = batches * out_heads * grid.q_blocks
    at_once = max(1, min(rows, _AT_ONCE // (grid.block_q * grid.kv_blocks)))
    words = jax.lax.map(one_row, jnp.arange(rows), batch_size=at_once)
    words = words.reshape(batches, out_heads, -1, words.shape[-1])
    return words[:, :, : grid.q_len]


def _packed(bits: Bool[Array, "*rows columns"]) -> Int[Array, "*rows words"]:
    bits = jnp.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, -bits.shape[-1] % _BITS)])
    bits = bits.reshape(*bits.shape[:-1], -1, _BITS).astype(jnp.uint32)
    words = (bits << jnp.arange(_BITS, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def _needed_tiles(stand_ins: StandIns, lists: BlockMask, block_kv: int) -> BlockMask:
    """The tiles of columns in which some row needs one."""
    grid = lists.grid._replace(kv_len=lists.grid.kv_blocks, block_kv=block_kv)
    # a tile of columns has whole words, or all columns there are
    used = jnp.swapaxes(stand_ins.words != 0, -1, -2)
    if stand_ins.rows == 1:
        used = pad_to_blocks(used, grid.block_q, False)
        used = used.reshape(*used.shape[:-1], grid.q_blocks, grid.block_q).any(-1)
    columns = jnp.repeat(jnp.swapaxes(used, -1, -2), _BITS, axis=-1)[..., : grid.kv_len]
    columns = pad_to_blocks(columns, block_kv, False)
    tiles = columns.reshape(*columns.shape[:-1], grid.kv_blocks, block_kv).any(-1)
    return BlockMask.from_dense(tiles, **grid._asdict(), width=grid.kv_blocks)


class _Columns(NamedTuple):
    """What the columns of the exact and the pooled keys, level by level, stand for.

    A block has as many columns in a level as it has runs of `2**level` tokens; of those that lie
    past the end, `counts` is 0. `offsets` says where a level begins, in tiles of `side` columns.
    """

    first: np.ndarray
    counts: np.ndarray
    offsets: np.ndarray
    side: int

    @classmethod
    def of(cls, plan: BlockPyramid) -> "_Columns":
        grid, levels = plan.block_mask.grid, range(plan.top_level + 1)
        length = grid.kv_blocks * grid.block_kv
        first = np.concatenate([np.arange(0, length, 2**level) for level in levels])
        sizes = np.concatenate([np.full(length >> level, 2**level) for level in levels])
        counts = np.clip(grid.kv_len - first, 0, sizes)
        side = grid.block_kv >> plan.top_level
        tiles = [(length >> level) // side for level in levels]
        return cls(first, counts, np.cumsum([0, *tiles[:-1]]), side)


def _leveled(problem: Problem, plan: BlockPyramid) -> Problem:
    """Attention to keys and values of all levels, one after the other."""
    columns = _Columns.of(plan)
    operands, _, mask, rule, *_ = problem

    def pyramid(x: Array) -> Array:
        levels = [x, *(mean_blocks(x, 2**n).astype(x.dtype) for n in range(1, plan.top_level + 1))]
        length = plan.block_mask.grid.kv_blocks * plan.block_mask.block_kv
        return jnp.concatenate(
            [
                jnp.pad(part, ((0, 0), (0, (length >> n) - part.shape[1]), (0, 0), (0, 0)))
                for n, part in enumerate(levels)
            ],
            axis=1,
        )

    with np.errstate(divide="ignore"):
        log_counts = jnp.asarray(np.log(columns.counts), jnp.float32)
    if mask is not None:
        kv_len = plan.kv_len
        first = jnp.asarray(np.minimum(columns.first, kv_len - 1), jnp.int32)
        last = first + jnp.asarray(np.maximum(columns.counts, 1) - 1, jnp.int32)
        mask = Spans(mask, first, last, 2**plan.top_level, kv_len)
    return problem._replace(
        operands=operands._replace(
            k=pyramid(operands.k), v=pyramid(operands.v), bias=log_counts[None, None, None]
        ),
        plan=level_tiles(plan),
        mask=mask,
        rule=rule._replace(kv_len=len(columns.first)),
    )


def level_tiles(plan: BlockPyramid) -> BlockMask:
    """The runs of columns that entries mean, as tiles of the width of the highest level."""
    columns, lists, levels = _Columns.of(plan), plan.block_mask, plan.levels
    assert levels is not None
    grid, top = lists.grid, plan.top_level
    exists = (lists.kv_indices >= 0) & (lists.kv_indices < grid.kv_blocks)
    counted = lists.entries() & exists & (levels >= 0) & (levels <= top)
    shift = top - jnp.where(counted, levels, top)
    first = jnp.asarray(columns.offsets, jnp.int32)[top - shift] + (lists.kv_indices << shift)
    number = jnp.arange(2**top, dtype=jnp.int32)
    runs = jnp.where(
        counted[..., None] & (number < (1 << shift)[..., None]), first[..., None] + number, -1
    )
    runs = runs.reshape(*runs.shape[:-2], -1)
    sizes = {"kv_len": len(columns.first), "block_kv": columns.side}
    tiles = BlockMask.from_lists(
        runs,
        jnp.full(runs.shape[:-1], runs.shape[-1]),
        **grid._replace(**sizes)._asdict(),
        overflowed=lists.overflowed,
    )
    if _compat.is_traced(tiles.kv_num_blocks):
        return tiles
    width = max(1, int(tiles.kv_num_blocks.max(initial=0)))
    return dataclasses.replace(tiles, kv_indices=tiles.kv_indices[..., :width])


@pytree_dataclass
class Spans(Mask):
    """Query `i` sees column `c` where it may see every key from `first[c]` to `last[c]`."""

    mask: Mask
    first: Int[Array, " columns"]
    last: Int[Array, " columns"]
    longest: int = static_field()
    kv_len: int = static_field()

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        first, last = self.first[kv_index], self.last[kv_index]
        keys = (jnp.minimum(first + step, last) for step in range(self.longest))
        frame = self._original(frame)
        return functools.reduce(
            jnp.logical_and, (self.mask.visible(q_index, j, frame) for j in keys)
        )

    def classifier(self, grid: TileGrid) -> TileClassifier:
        # the columns of a tile are of one level, so their keys follow each other
        def classify(q_block: Index, kv_block: Index, frame: Frame) -> TileBounds:
            first, last = grid.kv_range(kv_block)
            keys = self.first[first], self.last[last]
            return self.mask.within(grid.q_range(q_block), keys, self._original(frame))

        return classify

    def _original(self, frame: Frame) -> Frame:
        return frame._replace(kv_len=self.kv_len)
