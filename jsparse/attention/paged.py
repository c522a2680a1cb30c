"""`attend_paged`: attention of new tokens to what a paged cache holds, as lists of tiles.

The pool is one sequence of keys, and the queries of all sequences are one sequence of queries: the
list of a tile of queries names the physical pages of what its sequence selects. Inside a tile a
mask knows where tokens stand in their own sequences. Long lists are cut into parts, each with a
copy of its queries, whose results are merged by their log-sum-exps.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jsparse import checks
from jsparse.attention.attend import add_sinks, prepare, run
from jsparse.attention.logits import ScoreMod
from jsparse.attention.problem import Problem
from jsparse.core.merging import merge_splits
from jsparse.types import (
    BlockMask,
    Frame,
    Mask,
    PagedKV,
    TileBounds,
    TileGrid,
    pytree_dataclass,
    static_field,
)
from jsparse.types.mask import Index, TileClassifier
from jsparse.types.pytree import flatten_batch

# parts of lists, of all sequences and kv heads together: on a CPU as many as its loops sort into
# groups of some, elsewhere two for each of about 132 processors
_PARTS = {"cpu": 128}
_PARTS_OF_ACCELERATORS = 264
# a part has so many keys, or a multiple of that
_LEAST_KEYS = 128


def attend_paged(
    q: Float[Array, "batch q_len heads dim"],
    cache: PagedKV,
    plan: BlockMask | None = None,
    *,
    mask: Mask | None = None,
    score_mod: ScoreMod | None = None,
    sinks: Float[Array, " heads"] | None = None,
    softcap: float | None = None,
    scale: float | Float[Array, ""] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Attends from each sequence's last tokens to those of the pages that `plan` selects.

    Query `i` of sequence `b` is its token `lengths[b] - q_len + i`, and sees the tokens up to its
    own: what is new has been appended before. A query from before the first token, as of a sequence
    that is shorter than `q_len` or empty, sees nothing: `out = 0`, `lse = -inf`.

    Time and memory follow the selected pages, whatever the pool and the tables could hold.
    Gradients reach q, the pool, `sinks`, `scale` and what `score_mod` captures. Calls under `vmap`
    are made one after the other, so that what they share of a pool is not repeated.

    Args:
      q: Queries, one or a few for each sequence.
      cache: Where their keys and values are.
      plan: Which pages of its own sequence each query reads: a list of tiles over places in the
        tables, `q_len` queries by `cache.kv_len` keys, with `block_kv = cache.page_size` and a
        `block_q` that divides `q_len`. May be traced. Pages past the true length and table entries
        that are no page are left out. Default: every page in which a query sees anything.
      mask: Who may see whom, besides causality; sequence `b` has `lengths[b]` keys to it, so
        windows are aligned by the true lengths. Its arrays are for `cache.kv_len` keys.
      score_mod: As for `js.attend`; is told the sequence, the query's number in `q`, and the key's
        place in its own sequence.
      sinks: A learned logit per head that takes probability and gives no value.
      softcap: Caps logits, as for `js.attend`.
      scale: Factor on the logits, default `dim ** -0.5`. An array has a gradient.
      return_lse: Also return the log-sum-exp of each row's logits, sink included.
      implementation: "reference", "xla", "mosaic" or "triton"; default the fastest that can do it.

    Returns:
      `out [batch, q_len, heads, v_dim]` in the pool's dtype, or `(out, lse [batch, heads, q_len])`.

    Raises:
      ValueError: if arguments do not fit each other; the sentence names the remedy.
      NotImplementedError: if the named implementation cannot do this job here.
    """
    out, lse = _attend(
        q,
        cache,
        plan,
        mask=mask,
        score_mod=score_mod,
        softcap=softcap,
        scale=scale,
        implementation=implementation,
    )
    if sinks is not None:
        checks.sinks_shape(sinks, q.shape[-2])
        out, lse = add_sinks(out, lse, sinks)
    out = out.astype(cache.v.dtype)
    return (out, lse) if return_lse else out


def _attend(
    q: Array,
    cache: PagedKV,
    plan: BlockMask | None,
    *,
    mask: Mask | None,
    implementation: str | None,
    splits: int | None = None,
    **options: Any,
) -> tuple[Array, Array]:
    """The output without sinks, in f32, and its log-sum-exp."""
    checks.paged_operands(q, cache)
    batch, q_len, heads, _ = q.shape
    kv_heads = cache.k.shape[2]
    checks.multiple(of=kv_heads, heads=heads)
    if mask is not None:
        checks.mask_type(mask)
        checks.batch_fits("mask", mask.batch_shape, (batch,))
        checks.mask_heads(mask.heads, heads)
        mask = mask.flatten_batch((batch,))
        mask.check_lengths(q_len, cache.kv_len)
    if plan is None:
        lists: BlockMask = _pages_in_sight(cache, mask, q_len, kv_heads)
    else:
        checks.page_plan(plan, cache, q_len)
        checks.list_heads(plan.list_heads, heads, kv_heads)
        checks.batch_fits("plan", plan.batch_shape, (batch,))
        checks.listed_entries(plan)
        lists = plan
    lists = flatten_batch(lists, (batch,))
    checks.listed_pages(cache, lists)
    if splits is None:
        splits = _default_splits(lists, batch * max(lists.list_heads, kv_heads))
    problem = _lowered(q, cache, lists, mask, splits, **options)
    out, lse = run(problem, implementation)
    out = jnp.moveaxis(out.reshape(batch, splits, q_len, heads, -1), 1, 0)
    lse = jnp.moveaxis(lse.reshape(heads, batch, splits, q_len), (2, 0), (0, 2))
    return (out[0], lse[0]) if splits == 1 else merge_splits(out, lse)


def _default_splits(plan: BlockMask, lists: int) -> int:
    """How many parts of each list keep a machine busy without being too short."""
    wanted = _PARTS.get(jax.default_backend(), _PARTS_OF_ACCELERATORS)
    keys = plan.width * plan.block_kv
    return max(1, min(-(-wanted // (lists * plan.grid.q_blocks)), keys // _LEAST_KEYS))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _pages_in_sight(cache: PagedKV, mask: Mask | None, q_len: int, kv_heads: int) -> BlockMask:
    """Every page; with a mask, those in which it leaves something to see."""
    grid = TileGrid(q_len, cache.kv_len, q_len, cache.page_size)
    width = cache.table_width
    if mask is None:
        lists = jnp.arange(width, dtype=jnp.int32)[None, None, None]
        counts = jnp.full((1, 1, 1), width, jnp.int32)
        return BlockMask(lists, counts, jnp.zeros((1, 1), bool), *grid)
    batch, heads = jnp.arange(len(cache.lengths))[:, None, None], jnp.arange(mask.heads)[:, None]
    frame = Frame(q_len, cache.lengths[:, None, None], batch, heads)
    some = mask.classifier(grid)(jnp.int32(0), jnp.arange(width), frame).some
    some = jnp.broadcast_to(some, (len(cache.lengths), mask.heads, width))
    # one list for the heads of a group: they read the same pages
    some = some.reshape(len(some), min(mask.heads, kv_heads), -1, width).any(2)
    return BlockMask.from_dense(some[:, :, None], **grid._asdict(), width=width)


def _lowered(
    q: Array,
    cache: PagedKV,
    plan: BlockMask,
    mask: Mask | None,
    splits: int,
    *,
    score_mod: ScoreMod | None,
    **options: Any,
) -> Problem:
    """The problem over the pool, each sequence's queries `splits` times one after the other."""
    batch, q_len, heads, dim = q.shape
    lists, places = _physical(cache, plan, splits)
    sizes = {"kv_len": cache.kv_len, "page_size": cache.page_size}
    inside = InPages(mask, cache.lengths, places, **sizes, q_len=q_len, splits=splits)

    def told(logit, batch, head, q_index, kv_index):
        assert score_mod is not None
        sequence, query = inside.query(q_index)
        return score_mod(logit, sequence, head, query, inside.position(kv_index))

    rows = jnp.broadcast_to(q[:, None], (batch, splits, q_len, heads, dim))
    k, v = (x.reshape(1, -1, *x.shape[2:]) for x in (cache.k, cache.v))
    problem = prepare(
        rows.reshape(1, -1, heads, dim),
        k,
        v,
        score_mod=None if score_mod is None else told,
        **options,
    )
    return problem._replace(plan=lists, mask=inside)


# as one program also where the caller is none
@functools.partial(jax.jit, static_argnums=2)
def _physical(
    cache: PagedKV, plan: BlockMask, splits: int
) -> tuple[BlockMask, Int[Array, " pages"]]:
    """Lists over the pool, cut into parts of equal length, and the place of each page in tables.

    Entries that are no page stay in the lists, as -1.
    """
    under = plan.entries() & (plan.kv_indices < cache.page_counts()[:, None, None, None])
    selected = jnp.where(under, plan.kv_indices, -1)
    # up to the last entry that counts: entries ascend, so this leaves out what is past the length
    counts = jnp.where(under, _numbers(plan.width) + 1, 0).max(-1, keepdims=True)
    least = -(-_LEAST_KEYS // plan.block_kv)
    share = -(-counts // (splits * least)) * least
    first = share * _numbers(splits)
    counts = jnp.clip(counts - first, 0, share)[..., None]
    # of [batch, list_heads, q_blocks, splits, width]
    in_part = _numbers(min(plan.width, -(-plan.width // (splits * least)) * least))
    number = jnp.minimum(first[..., None] + in_part, plan.width - 1)
    place = jnp.take_along_axis(selected[..., None, :], number, axis=-1)
    sequence = _numbers(len(cache.lengths))[:, None, None, None, None]
    page = cache.page_table[sequence, jnp.maximum(place, 0)]
    listed = in_part < counts
    named = listed & (place >= 0) & cache.exists(page)
    places = jnp.zeros(cache.pages, jnp.int32)
    places = places.at[jnp.where(named, page, cache.pages)].max(place, mode="drop")
    page = jnp.where(named, page, jnp.where(listed, -1, 0))

    # the parts of a sequence, and in each its tiles of queries, one after the other
    page, counts = (jnp.transpose(x, (1, 0, 3, 2, 4)) for x in (page, counts))
    page, counts = (x.reshape(1, plan.list_heads, -1, x.shape[-1]) for x in (page, counts))
    rows = page.shape[2] * plan.block_q
    sizes = rows, cache.pages * cache.page_size, plan.block_q, cache.page_size
    lost = jnp.zeros((1, plan.list_heads), bool)
    return BlockMask(page, counts[..., 0], lost, *sizes), places


def _divided(index: Index, by: int) -> tuple[Index, Index]:
    """Quotient and rest of what is not negative; `//` would look at signs."""
    index = jnp.asarray(index, jnp.int32)
    whole = jax.lax.div(index, jnp.int32(by))
    return whole, index - whole * by


def _numbers(count: int) -> Int[Array, " count"]:
    return jnp.arange(count, dtype=jnp.int32)


@pytree_dataclass
class InPages(Mask):
    """A causal mask, and one more, on the rows and columns of `_lowered`.

    `places` are where the pages of the pool stand in their tables.
    """

    mask: Mask | None
    lengths: Int[Array, " batch"]
    places: Int[Array, " pages"]
    kv_len: int = static_field()
    page_size: int = static_field()
    q_len: int = static_field()
    splits: int = static_field()

    def query(self, row: Index) -> tuple[Index, Index]:
        """The sequence, and which of its queries a row is."""
        part, query = _divided(row, self.q_len)
        return _divided(part, self.splits)[0], query

    def position(self, column: Index) -> Index:
        """Where a column stands in the sequences that have it."""
        page, token = _divided(column, self.page_size)
        return self.places[page] * self.page_size + token

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        (sequence, query), position = self.query(q_index), self.position(kv_index)
        frame = self._frame(sequence, frame)
        seen = position <= query + frame.diagonal
        return seen if self.mask is None else seen & self.mask.visible(query, position, frame)

    def classifier(self, grid: TileGrid) -> TileClassifier:
        own = TileGrid(self.q_len, self.kv_len, grid.block_q, grid.block_kv)
        inner = None if self.mask is None else self.mask.classifier(own)

        def classify(q_block: Index, kv_block: Index, frame: Frame) -> TileBounds:
            part, q_block = jnp.divmod(q_block, own.q_blocks)
            frame = self._frame(part // self.splits, frame)
            place = self.places[kv_block]
            (q_first, q_last), (kv_first, kv_last) = own.q_range(q_block), own.kv_range(place)
            some = kv_first <= q_last + frame.diagonal
            every = kv_last <= q_first + frame.diagonal
            if inner is None:
                return TileBounds(some, every)
            of_mask = inner(q_block, place, frame)
            return TileBounds(some & of_mask.some, every & of_mask.every)

        return classify

    @property
    def batch_shape(self) -> tuple[int, ...]:
        # of the inner mask's arrays it picks the entry itself
        return ()

    @property
    def by_batch_index(self) -> bool:
        return True

    def _frame(self, sequence: Index, frame: Frame) -> Frame:
        return frame._replace(q_len=self.q_len, kv_len=self.lengths[sequence], batch=sequence)
