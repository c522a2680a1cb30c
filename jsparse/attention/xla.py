"""Block-sparse attention in XLA: the forward pass, and the executor that all devices have."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jsparse import _compat
from jsparse.attention.block_sparse import Lists, Passes, Sizes
from jsparse.attention.lanes import (
    Bias,
    Blocks,
    Lanes,
    Rows,
    at,
    by_count,
    in_products,
    indices,
    lane_count,
    lanes_that_go_on,
    loop,
    on_columns,
    on_rows,
    peaks_of_tiles,
    row_counts,
    scores,
    tiles_together,
    weighted,
)
from jsparse.attention.logits import LogitRule, Operands
from jsparse.attention.xla_backward import backward

# tiles of fewer queries leave the time to the reading of keys
LEAST_QUERIES = 64
_LOWEST = float(jnp.finfo(jnp.float32).min)


class _Softmax(NamedTuple):
    """What is known of rows so far: their largest logit, and sums of what is over its share."""

    peak: Float[Array, "lanes rows"]
    total: Float[Array, "lanes rows"]
    acc: Float[Array, "lanes rows v_dim"]

    @classmethod
    def of_nothing(cls, lanes: int, rows: int, v_dim: int) -> "_Softmax":
        """Before the first tile."""
        shape = lanes, rows
        # finite: in a row that saw nothing exp(-inf - peak) is 0, exp(-inf + inf) would be nan
        peak = jnp.full(shape, _LOWEST, jnp.float32)
        total, acc = jnp.zeros(shape, jnp.float32), jnp.zeros((*shape, v_dim), jnp.float32)
        return cls(peak, total, acc)

    def add(
        self,
        logits: Float[Array, "lanes parts rows column_part"],
        largest: Float[Array, "lanes rows"],
        values: Float[Array, "lanes columns v_dim"],
        over: Bool[Array, " lanes"] | bool = False,
    ) -> "_Softmax":
        """What is known after these tiles too, of whose logits `largest` are the largest.

        Of a list that is `over` they are the last ones again, and count nothing.
        """
        peak = jax.lax.stop_gradient(jnp.maximum(self.peak, largest))
        probs = jnp.exp(logits - on_rows(jnp.where(jnp.reshape(over, (-1, 1)), jnp.inf, peak)))
        decay = jnp.exp(self.peak - peak)
        new = weighted(probs.astype(values.dtype), values)
        total = self.total * decay + probs.sum((1, 3))
        return _Softmax(peak, total, self.acc * decay[..., None] + new)

    def end(self) -> tuple[Float[Array, "lanes rows v_dim"], Float[Array, "lanes rows"]]:
        """The rows' `(out, lse)`."""
        seen = self.total != 0
        safe = jnp.where(seen, self.total, 1.0)
        return self.acc / safe[..., None], jnp.where(seen, self.peak + jnp.log(safe), -jnp.inf)


class _Group(NamedTuple):
    """Rows of tiles that are computed together, and how their tiles are read.

    `look(first)` gives the logits of their entries from `first` on, and which tiles these are; of
    lists that are over by then these are the last ones again.
    """

    lanes: Lanes
    here: Rows
    together: int
    look: Callable[[Array], tuple[Array, Blocks]]

    @property
    def steps(self) -> Array:
        """How many steps the longest list takes."""
        return -(-self.lanes.longest // self.together)


def _walk_rows(
    operands: Operands,
    lists: Lists,
    rule: LogitRule,
    sizes: Sizes,
    at_once: int,
    walk: Callable[[_Group], tuple[_Softmax, Any]],
    kept: Any = None,
) -> tuple[Array, Array, Any]:
    """Attention by running softmax, as many rows of tiles together as `at_once` says.

    `walk(group)` gives the softmax of a group's rows after all their tiles; what it says besides is
    written into `kept [batch, heads, q_blocks, ...]`.
    """
    s = sizes
    q, k, v = operands.q, operands.k, operands.v
    bias = Bias.of(operands.bias, s, rule.group)
    groups = by_count(row_counts(lists, s), at_once)
    together = tiles_together(lists, s)

    def group(carry, rows: tuple[Lanes, Rows]):
        out, lse, kept = carry
        lanes, here = rows
        list_batch, list_head = here.list_of(lists.kv_indices.shape, s)
        queries = here.rows(q, s.block_q)
        queries, unscaled = rule.scale_in(queries)
        q_index = on_rows(here.tokens(s.block_q))
        owner = here.batch[:, None, None, None], here.head[:, None, None, None]

        def look(first):
            index = list_batch, list_head, here.block, lanes.entries(first, together).T
            kv_blocks = at(lists.kv_indices, *index).T
            there = Blocks(here.batch, here.head // s.group, kv_blocks)
            where = q_index, on_columns(there.tokens(s.block_kv)), *owner
            logits = unscaled.modify(
                scores(queries, there.columns(k, s.block_kv)),
                bias.on_rows(bias.load(here.alone, there), s.block_q),
                operands.scale,
                operands.captured,
                *where,
            )
            logits = rule.hide(logits, lists.mask, *where, ragged=s.ragged)
            return logits + lanes.ends(first, together, s.block_kv), there

        softmax, kept_here = walk(_Group(lanes, here, together, look))
        row_out, row_lse = softmax.end()
        options: Any = {"mode": "drop", "wrap_negative_indices": False}
        target = lanes.only_listed(here.batch, nowhere=s.batches)
        out = out.at[target, here.block, :, here.head].set(row_out, **options)
        lse = lse.at[target, here.head, here.block].set(row_lse, **options)
        if kept is not None:
            kept = kept.at[target, here.head, here.block].set(kept_here, **options)
        return (out, lse, kept), None

    # the backward pass needs rowsum(out * d_out) in f32, so the output stays f32 until the end
    out = jnp.zeros((s.batches, s.q_blocks, s.block_q, s.heads, v.shape[-1]), jnp.float32)
    lse = jnp.full((s.batches, s.heads, s.q_blocks, s.block_q), -jnp.inf, jnp.float32)
    where = Rows.of(groups.index, s)
    (out, lse, kept), _ = _compat.scan(group, (out, lse, kept), (groups, where))
    return out.reshape(*q.shape[:-1], v.shape[-1]), lse.reshape(s.batches, s.heads, -1), kept


def _adding_all(
    operands: Operands, sizes: Sizes, repeat: Callable[..., Any]
) -> Callable[[_Group], tuple[_Softmax, None]]:
    """Walks every tile; `repeat(longest, step, state)` makes the steps of a group."""
    v = operands.v

    def walk(group: _Group):
        def step(number, softmax: _Softmax):
            first = number * group.together
            logits, there = group.look(first)
            largest, tiles = logits.max((1, 3)), there.tiles(v, sizes.block_kv)
            return softmax.add(logits, largest, tiles, group.lanes.over(first))

        start = _Softmax.of_nothing(len(group.here.block), sizes.block_q, v.shape[-1])
        return repeat(group.steps, step, start), None

    return walk


def forward(operands: Operands, lists: Lists, rule: LogitRule, sizes: Sizes):
    """Computes `(out, lse)`, both f32."""
    lists, sizes = in_products(lists, sizes, rule.group, per_row=operands.v.shape[-1])
    walk = _adding_all(operands, sizes, loop)
    return _walk_rows(operands, lists, rule, sizes, lane_count(lists, sizes), walk)[:2]


def differentiable_forward(operands: Operands, lists: Lists, rule: LogitRule, sizes: Sizes):
    """The same attention in a form that JAX differentiates, for second derivatives.

    All rows walk their lists together: it costs what the fullest row costs, for every row. It is
    computed in f32, because `at` has no derivative in less.
    """
    captured = operands.captured
    operands = jax.tree.map(lambda x: x.astype(jnp.float32), operands._replace(captured=()))
    operands = operands._replace(captured=captured)
    steps = -(-lists.kv_indices.shape[-1] // tiles_together(lists, sizes))

    def repeat(_, step, state):
        def scanned(state, number):
            return step(number, state), None

        return _compat.scan(jax.checkpoint(scanned), state, indices(steps))[0]

    rows = sizes.batches * sizes.heads * sizes.q_blocks
    walk = _adding_all(operands, sizes, repeat)
    return _walk_rows(operands, lists, rule, sizes, rows, walk)[:2]


def skipping_forward(
    operands: Operands,
    lists: Lists,
    log_threshold: Float[Array, "batch heads"],
    rule: LogitRule,
    sizes: Sizes,
) -> tuple[Array, Array, Bool[Array, "batch heads q_blocks width"]]:
    """Computes `(out, lse)` without the tiles that are far below, and which entries were not.

    Logits are computed of every listed tile. A step's rows that do not skip it are brought
    together, a few at a time, for exponentials and values; the others are left as they are.
    """
    v, width = operands.v, lists.kv_indices.shape[-1]
    at_once = lane_count(lists, sizes)
    few = lanes_that_go_on(at_once)

    def walk(group: _Group):
        here, together = group.here, group.together
        lanes = len(here.block)
        limit = at(log_threshold, here.batch, here.head)[:, None, None]
        # rows past the last query have no say
        true_rows = (here.tokens(sizes.block_q) < rule.q_len)[..., None]

        def step(number, state: tuple[_Softmax, Array]):
            softmax, kept = state
            first = number * together
            logits, there = group.look(first)
            peaks = peaks_of_tiles(logits, together)
            before = jnp.maximum(softmax.peak[..., None], jax.lax.cummax(peaks, axis=2))
            # a row that sees nothing of a tile has no say either; one with a nan keeps it
            far = peaks < jnp.maximum(before + limit, _LOWEST)
            keep = ~(far | ~true_rows).all(1) & group.lanes.listed(first, together)
            largest = peaks.max(-1, where=keep[:, None], initial=-jnp.inf)
            columns = jnp.repeat(keep, sizes.block_kv, axis=1)
            if together > 1:
                logits = jnp.where(on_columns(columns), logits, -jnp.inf)
            goes_on = keep.any(1)
            # those that go on first
            order = jnp.argsort(~goes_on).astype(jnp.int32)
            count = goes_on.sum(dtype=jnp.int32)

            def add(number, softmax: _Softmax):
                place = number * few + indices(few)
                mine = at(order, jnp.minimum(place, lanes - 1))
                tiles = Blocks(*(at(x, mine) for x in there)).tiles(v, sizes.block_kv)
                if together > 1:
                    # of several tiles in a step some may be skipped: zero times nan is nan
                    tiles = jnp.where(at(columns, mine)[..., None], tiles, 0)
                found = _Softmax(*(at(x, mine) for x in softmax))
                found = found.add(at(logits, mine), at(largest, mine), tiles)
                target = jnp.where(place < count, mine, lanes)
                return jax.tree.map(
                    lambda x, new: x.at[target].set(new, mode="drop"), softmax, found
                )

            softmax = loop(-(-count // few), add, softmax)
            return softmax, jax.lax.dynamic_update_slice(kept, keep, (jnp.int32(0), first))

        start = _Softmax.of_nothing(lanes, sizes.block_q, v.shape[-1])
        none = jnp.zeros((lanes, -(-width // together) * together), bool)
        softmax, kept = loop(group.steps, step, (start, none))
        return softmax, kept[:, :width]

    kept = jnp.zeros((sizes.batches, sizes.heads, sizes.q_blocks, width), bool)
    return _walk_rows(operands, lists, rule, sizes, at_once, walk, kept)


PASSES = Passes(forward, backward, differentiable_forward, skipping_forward)
