"""Block-sparse attention in XLA by tiles of keys: for lists that differ from query to query.

Where a tile holds few queries, each of them reads a tile of keys for a product of one row. Here
the queries that list a tile of keys are gathered, in chunks, so that products are dense. What a
query gets from each tile of its list is kept, and summed in the order of the list: partial results
never meet, and no order depends on chance. Queries come in spans, as many as give the tiles of
keys a few chunks each, so that what is kept is a few times as large as q, whatever the lists hold.
Lists are taken to be about as full as they are wide: chunks of emptier ones have few rows.

FlashMoBA's kernel (arXiv:2511.11571) has spans, its logical tiles, too: of 128, 256, 512, 768 or
1024 queries by the density of lists. Here they follow from lists and chunks, so that products are
as full at any density.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jsparse import _compat
from jsparse.attention import xla
from jsparse.attention.block_sparse import Lists, Passes, Sizes, by_spans
from jsparse.attention.lanes import (
    Bias,
    Blocks,
    ColumnSums,
    at,
    from_rows,
    in_products,
    indices,
    loop,
    on_columns,
    on_rows,
    scores,
    weighted,
)
from jsparse.attention.logits import LogitRule, Operands
from jsparse.attention.tile_gradient import Differentiated, OwnRows, Terms
from jsparse.attention.xla_backward import backward as rows_backward
from jsparse.types import BlockMask, TileGrid
from jsparse.types.inverse_list import column_ranks

# rows of a product
_ROWS = 64
# tiles of keys must have that many keys, and that many times the queries of a tile ...
_LEAST_KEYS = 16
_LEAST_RATIO = 8
# ... and be listed by so many queries, on average, where lists are full
_LEAST_LISTED = 32
# lists must hold that share of what they could, if they could hold every block
_LEAST_FULL = 1 / 8
# chunks of rows that a span of queries gives a tile of keys, on average
_CHUNKS = 2
# logits at work in one step
_LOGITS = {"cpu": 2**19}
_LOGITS_OF_ACCELERATORS = 2**23


def pays(plan: BlockMask) -> bool:
    """Whether this is the faster way for lists of these sizes, whatever they hold.

    The walk by rows reads a tile of keys for each tile that a row of tiles lists, this one a tile
    of queries; what it keeps and sums costs about a tile of a few keys more.
    """
    grid = plan.grid
    return pays_for(grid.q_blocks, plan.width, grid)


def pays_for(q_blocks: int, width: int, sizes: Sizes | TileGrid) -> bool:
    """The same for so many lists of that width."""
    listed = q_blocks * sizes.block_q * width / sizes.kv_blocks
    wide = sizes.block_kv >= max(_LEAST_KEYS, _LEAST_RATIO * sizes.block_q)
    return sizes.block_q < _ROWS and wide and listed >= _LEAST_LISTED


class Cut(NamedTuple):
    """How the rows of tiles are cut: into spans one after the other, their tiles into chunks."""

    chunk: int
    span: int
    lanes: int
    steps: int

    @classmethod
    def of(cls, lists: Lists, sizes: Sizes) -> "Cut":
        """For lists of a width, whatever they hold."""
        s, width = sizes, lists.kv_indices.shape[-1]
        chunk = max(1, min(_ROWS // s.block_q, s.q_blocks))
        wanted = -(-_CHUNKS * chunk * s.kv_blocks // width)
        spans = -(-s.q_blocks // max(1, min(wanted, s.q_blocks)))
        span = -(-s.q_blocks // spans)
        # full chunks and, for each tile of keys, one that is not
        most = s.batches * s.heads * (span * width // chunk + min(s.kv_blocks, span * width))
        logits = _LOGITS.get(jax.default_backend(), _LOGITS_OF_ACCELERATORS)
        lanes = max(1, min(most, logits // (chunk * s.block_q * s.block_kv)))
        return cls(chunk, span, lanes, -(-most // lanes))


class Chunks(NamedTuple):
    """The rows of one span, by the tile of keys that they list.

    `members` are rows of tiles in the span, -1 past the last of a tile of keys; `place` says where
    each entry of the lists went. Only the first `total` chunks are any.
    """

    batch: Int[Array, "steps lanes"]
    head: Int[Array, "steps lanes"]
    kv_block: Int[Array, "steps lanes"]
    members: Int[Array, "steps lanes chunk"]
    total: Int[Array, ""]
    place: Int[Array, "batch heads span width"]
    listed: Bool[Array, "batch heads span width"]

    @classmethod
    def of(
        cls, entries: Int[Array, "list_batch list_heads span width"], sizes: Sizes, cut: Cut
    ) -> "Chunks":
        """From lists whose padding is -1."""
        s = sizes
        list_batch, list_heads, span, width = entries.shape
        ranks, counts = column_ranks(entries.reshape(-1, span, width), s.kv_blocks)

        def for_all(x):
            x = x.reshape(list_batch, list_heads, *x.shape[1:])
            x = jnp.repeat(x, s.heads // list_heads, axis=1)
            return jnp.broadcast_to(x, (s.batches, *x.shape[1:]))

        entries, ranks, counts = map(for_all, (entries.reshape(ranks.shape), ranks, counts))
        chunks = -(-counts // cut.chunk)
        ends = jnp.cumsum(chunks.reshape(-1), dtype=jnp.int32)
        first = (ends - chunks.reshape(-1)).reshape(chunks.shape)
        listed = entries >= 0
        owner = jnp.arange(s.batches)[:, None, None, None], jnp.arange(s.heads)[:, None, None]
        place = at(first, *owner, jnp.maximum(entries, 0)) * cut.chunk + ranks
        slots = cut.steps * cut.lanes * cut.chunk
        members = jnp.full(slots, -1, jnp.int32)
        rows = jnp.broadcast_to(indices(span)[:, None], place.shape)
        members = members.at[jnp.where(listed, place, slots)].set(rows, mode="drop")
        tile = jnp.searchsorted(ends, indices(cut.steps * cut.lanes), side="right")
        tile = jnp.minimum(tile, len(ends) - 1).astype(jnp.int32).reshape(cut.steps, cut.lanes)
        rest, kv_block = jnp.divmod(tile, s.kv_blocks)
        batch, head = jnp.divmod(rest, s.heads)
        members = members.reshape(cut.steps, cut.lanes, cut.chunk)
        place = jnp.where(listed, place, 0)
        return cls(batch, head, kv_block, members, ends[-1], place, listed)

    @property
    def steps(self) -> Int[Array, ""]:
        """Steps that have a chunk."""
        return -(-self.total // self.members.shape[1])

    def step(self, number: Array, span: Array, sizes: Sizes) -> tuple[Blocks, Blocks, Array]:
        """Queries and keys of a step, and which rows of tiles are any.

        What is none repeats the chunk's first, or the step's first chunk: what is in no list may
        hold a NaN.
        """
        alone = [jax.lax.dynamic_index_in_dim(x, number, keepdims=False) for x in self[:4]]
        some = alone[3][:, :1] >= 0
        batch, head, kv_block, members = (
            jnp.where(some if x.ndim == 2 else some[:, 0], x, x[:1]) for x in alone
        )
        listed = alone[3] >= 0
        members = jnp.where(members >= 0, members, members[:, :1])
        keys = Blocks(batch, head // sizes.group, kv_block[:, None])
        return Blocks(batch, head, span + members), keys, listed


# made once for all spans: what a span leaves there is in no place of the next
def _kept(shape: tuple[int, ...], cut: Cut) -> Float[Array, "_ ..."]:
    return jnp.zeros((cut.steps * cut.lanes * cut.chunk, *shape), jnp.float32)


def _keep(kept: Array, number: Array, step: Array) -> Array:
    """Puts what a step has computed after that of the steps before."""
    step = step.reshape(-1, *kept.shape[1:])
    return jax.lax.dynamic_update_slice_in_dim(kept, step, number * len(step), 0)


def sum_of_lists(
    kept: Float[Array, "slots block_q dim"], chunks: Chunks, weights: Array | None
) -> Float[Array, "batch heads span block_q dim"]:
    """For each row what its entries have given, in the order of its list."""

    def entry(number, total):
        place, listed = (
            jax.lax.dynamic_index_in_dim(x, number, axis=3, keepdims=False)
            for x in (chunks.place, chunks.listed)
        )
        part = at(kept, place)
        if weights is not None:
            part = part * jax.lax.dynamic_index_in_dim(weights, number, 3, False)[..., None]
        return total + jnp.where(listed[..., None, None], part, 0.0)

    shape = (*chunks.place.shape[:3], *kept.shape[1:])
    longest = chunks.listed.sum(3, dtype=jnp.int32).max()
    return loop(longest, entry, jnp.zeros(shape, jnp.float32))


def merged(
    peaks: Float[Array, "slots block_q"],
    totals: Float[Array, "slots block_q"],
    sums: Float[Array, "slots block_q v_dim"],
    chunks: Chunks,
) -> tuple[
    Float[Array, "batch heads span block_q v_dim"], Float[Array, "batch heads span block_q"]
]:
    """A span's `(out, lse)` from what its rows got from each tile of their lists.

    Peaks are finite; totals and sums of numerators are over their exponentials.
    """
    listed = chunks.listed[..., None]
    peaks = jnp.where(listed, at(peaks, chunks.place), jnp.finfo(jnp.float32).min)
    peak = peaks.max(3)
    weights = jnp.exp(peaks - peak[..., None, :])
    total = jnp.where(listed, weights * at(totals, chunks.place), 0.0).sum(3)
    seen = total != 0
    safe = jnp.where(seen, total, 1.0)
    out = sum_of_lists(sums, chunks, weights) / safe[..., None]
    return out, jnp.where(seen, peak + jnp.log(safe), -jnp.inf)


def by_chunks(
    compute: Callable[[Any, Array, Chunks], tuple[Any, Any]],
    carry: Any,
    lists: Lists,
    sizes: Sizes,
    cut: Cut,
) -> tuple[Any, Any]:
    """Computes the chunks of one span after the other.

    `compute(carry, start, chunks)` gives, besides the next carry, arrays [batch, heads, span,
    block_q, ...] for the span whose first row of tiles is `start`; all spans' are given together,
    [batch, heads, rows, ...].
    """

    def of_span(carry, start, entries):
        return compute(carry, start, Chunks.of(entries, sizes, cut))

    def by_row(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 2)
        x = x.reshape(*x.shape[:2], -1, *x.shape[5:])
        return x[:, :, : sizes.q_blocks * sizes.block_q]

    carry, rows = by_spans(of_span, carry, lists, cut.span)
    return carry, jax.tree.map(by_row, rows)


def forward(
    operands: Operands, lists: Lists, rule: LogitRule, sizes: Sizes
) -> tuple[Float[Array, "batch q_len heads v_dim"], Float[Array, "batch heads q_len"]]:
    """Computes `(out, lse)`, both f32."""
    q, k, v = operands.q, operands.k, operands.v
    lists, s = in_products(
        lists, sizes, rule.group, per_row=v.shape[-1], per_column=_ROWS, columns=sizes.block_kv
    )
    cut = Cut.of(lists, s)
    bias = Bias.of(operands.bias, s, rule.group)

    def span(kept, start, chunks):
        def step(number, kept):
            here, there, _ = chunks.step(number, start, s)
            owner = here.batch[:, None, None, None], here.head[:, None, None, None]
            where = on_rows(here.tokens(s.block_q)), on_columns(there.tokens(s.block_kv)), *owner
            queries, unscaled = rule.scale_in(here.rows(q, s.block_q))
            logits = unscaled.modify(
                scores(queries, there.columns(k, s.block_kv)),
                bias.on_rows(bias.load(here, there), cut.chunk * s.block_q),
                operands.scale,
                operands.captured,
                *where,
            )
            logits = rule.hide(logits, lists.mask, *where, ragged=s.ragged)
            # finite: see the walk by rows
            peak = jnp.maximum(logits.max((1, 3)), jnp.finfo(jnp.float32).min)
            probs = jnp.exp(logits - on_rows(peak))
            new = weighted(probs.astype(v.dtype), there.tiles(v, s.block_kv))
            parts = peak, probs.sum((1, 3)), new
            return tuple(_keep(x, number, part) for x, part in zip(kept, parts, strict=True))

        kept = loop(chunks.steps, step, kept)
        peaks, totals, sums = kept
        return kept, merged(peaks, totals, sums, chunks)

    shapes = (s.block_q,), (s.block_q,), (s.block_q, v.shape[-1])
    kept = tuple(_kept(shape, cut) for shape in shapes)
    _, (out, lse) = by_chunks(span, kept, lists, s, cut)
    return jnp.swapaxes(out, 1, 2), lse


def backward(
    operands: Operands, lists: Lists, out, lse, d_out, d_lse, rule: LogitRule, sizes: Sizes
) -> Operands:
    """Computes the gradient by the operands."""
    q, k, v = operands.q, operands.k, operands.v
    widest = max(q.shape[-1], v.shape[-1])
    lists, s = in_products(
        lists,
        sizes,
        rule.group,
        per_row=widest,
        per_column=max(widest, _ROWS),
        columns=sizes.block_kv,
    )
    cut = Cut.of(lists, s)
    terms = Terms.of(out, lse, d_out, d_lse, s)
    d_out = d_out.astype(v.dtype)
    bias = Bias.of(operands.bias, s, rule.group)
    differentiated = Differentiated(operands, rule, lists.mask, s.ragged)

    def span(carry, start, chunks):
        def step(number, carry):
            d_queries, d_k, d_v, sums = carry
            here, there, listed = chunks.step(number, start, s)
            index = here.batch[:, None], here.head[:, None], here.blocks
            lse = jnp.where(listed[..., None], at(terms.lse, *index), jnp.inf)
            own = OwnRows.of(
                differentiated.queries(here.rows(q, s.block_q)),
                here.rows(d_out, s.block_q),
                lse.reshape(len(lse), -1),
                at(terms.delta, *index).reshape(len(lse), -1),
            )
            owner = here.batch[:, None, None, None], here.head[:, None, None, None]
            found = differentiated.step(
                own,
                there.columns(k, s.block_kv),
                there.columns(v, s.block_kv),
                bias,
                bias.load(here, there),
                0.0,
                (on_rows(here.tokens(s.block_q)), on_columns(there.tokens(s.block_kv)), *owner),
            )
            return (
                _keep(d_queries, number, from_rows(found.queries)),
                d_k.add(there, found.keys),
                d_v.add(there, found.values),
                sums.add(found.modifiers, bias, here, there),
            )

        carry = loop(chunks.steps, step, carry)
        return carry, sum_of_lists(carry[0], chunks, None)

    d_k, d_v = (ColumnSums.zeros(x, s.block_kv) for x in (k, v))
    kept = _kept((s.block_q, q.shape[-1]), cut)
    carry: Any = kept, d_k, d_v, differentiated.zeros(bias)
    (_, d_k, d_v, sums), d_q = by_chunks(span, carry, lists, s, cut)
    d_q = differentiated.of_queries(jnp.swapaxes(d_q, 1, 2))
    return differentiated.of_operands(d_q, d_k, d_v, sums, bias)


def _where_full(here: Callable[..., Any], by_rows: Callable[..., Any]) -> Callable[..., Any]:
    """One way or the other by what lists hold, for lists whose width is no more than a bound."""

    def compute(operands: Operands, lists: Lists, *rest: Any) -> Any:
        width = lists.kv_indices.shape[-1]
        held = jnp.minimum(lists.kv_num_blocks, width).mean(dtype=jnp.float32)

        def branch(compute):
            # integers have gradients of no dtype, which no branch can give
            result = compute(operands, lists, *rest)
            return jax.tree.map(lambda x: None if x.dtype == jax.dtypes.float0 else x, result)

        full = held >= _LEAST_FULL * width
        result = _compat.cond(full, lambda: branch(here), lambda: branch(by_rows))
        if isinstance(result, Operands):
            captured: Any = tuple(
                np.zeros(of.shape, jax.dtypes.float0) if x is None else x
                for x, of in zip(result.captured, operands.captured, strict=True)
            )
            result = result._replace(captured=captured)
        return result

    return compute


PASSES = Passes(forward, backward, xla.differentiable_forward)
_PASSES_OF_ANY = Passes(
    _where_full(forward, xla.forward),
    _where_full(backward, rows_backward),
    xla.differentiable_forward,
)


def passes(plan: BlockMask) -> Passes:
    """The faster walk for a plan in XLA: by tiles of keys, or by rows of tiles.

    Lists as wide as there are blocks may hold few of them, which shows when they are there.
    """
    if not pays(plan):
        return xla.PASSES
    return PASSES if plan.width < plan.grid.kv_blocks else _PASSES_OF_ANY
