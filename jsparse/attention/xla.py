"""Block-sparse attention in XLA: the forward pass, and the executor that all devices have."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jsparse.attention.block_sparse import Lists, Passes, Sizes
from jsparse.attention.lanes import (
    Bias,
    Blocks,
    Lanes,
    Rows,
    at,
    by_count,
    indices,
    lane_count,
    loop,
    on_columns,
    on_rows,
    row_counts,
    scores,
    tiles_together,
    weighted,
)
from jsparse.attention.logits import LogitRule, Operands
from jsparse.attention.xla_backward import backward

# tiles of fewer queries leave the time to the reading of keys
LEAST_QUERIES = 64


def _walk_rows(
    operands: Operands,
    lists: Lists,
    rule: LogitRule,
    sizes: Sizes,
    at_once: int,
    repeat: Callable[..., Any],
) -> tuple[Float[Array, "batch q_len heads v_dim"], Float[Array, "batch heads q_len"]]:
    """Attention by running softmax; `repeat(longest, step, state)` makes the steps of a group."""
    s = sizes
    q, k, v = operands.q, operands.k, operands.v
    bias = Bias.of(operands.bias, s, rule.group)
    groups = by_count(row_counts(lists, s), at_once)
    together = tiles_together(lists, s)

    def group(carry, rows: tuple[Lanes, Rows]):
        out, lse = carry
        lanes, here = rows
        list_batch, list_head = here.list_of(lists.kv_indices.shape, s)
        queries = here.rows(q, s.block_q)
        q_index = on_rows(here.tokens(s.block_q))
        owner = here.batch[:, None, None, None], here.head[:, None, None, None]

        def step(number, state):
            peak, total, acc = state
            first = number * together
            index = list_batch, list_head, here.block, lanes.entries(first, together).T
            kv_blocks = at(lists.kv_indices, *index).T
            there = Blocks(here.batch, here.head // s.group, kv_blocks)
            where = q_index, on_columns(there.tokens(s.block_kv)), *owner
            logits = rule.modify(
                scores(queries, there.columns(k, s.block_kv)),
                bias.on_rows(bias.load(here.alone, there)),
                operands.scale,
                operands.captured,
                *where,
            )
            logits = rule.hide(logits, lists.mask, *where, ragged=s.ragged)
            logits = logits + lanes.over(first, together, s.block_kv)
            new_peak = jax.lax.stop_gradient(jnp.maximum(peak, logits.max((1, 3))))
            probs = jnp.exp(logits - on_rows(new_peak))
            decay = jnp.exp(peak - new_peak)
            new = weighted(probs.astype(v.dtype), there.tiles(v, s.block_kv))
            return new_peak, total * decay + probs.sum((1, 3)), acc * decay[..., None] + new

        shape = (at_once, s.block_q)
        state = (
            # finite: in a row that saw nothing exp(-inf - peak) is 0, exp(-inf + inf) would be nan
            jnp.full(shape, jnp.finfo(jnp.float32).min, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((*shape, v.shape[-1]), jnp.float32),
        )
        peak, total, acc = repeat(-(-lanes.longest // together), step, state)
        seen = total != 0
        safe = jnp.where(seen, total, 1.0)
        target = lanes.only_listed(here.batch, nowhere=s.batches)
        out = out.at[target, here.block, :, here.head].set(
            acc / safe[..., None], mode="drop", wrap_negative_indices=False
        )
        row_lse = jnp.where(seen, peak + jnp.log(safe), -jnp.inf)
        return (
            out,
            lse.at[target, here.head, here.block].set(
                row_lse, mode="drop", wrap_negative_indices=False
            ),
        ), None

    # the backward pass needs rowsum(out * d_out) in f32, so the output stays f32 until the end
    out = jnp.zeros((s.batches, s.q_blocks, s.block_q, s.heads, v.shape[-1]), jnp.float32)
    lse = jnp.full((s.batches, s.heads, s.q_blocks, s.block_q), -jnp.inf, jnp.float32)
    where = Rows.of(groups.index, s)
    (out, lse), _ = jax.lax.scan(group, (out, lse), (groups, where))
    return out.reshape(*q.shape[:-1], v.shape[-1]), lse.reshape(s.batches, s.heads, -1)


def forward(operands: Operands, lists: Lists, rule: LogitRule, sizes: Sizes):
    """Computes `(out, lse)`, both f32."""
    return _walk_rows(operands, lists, rule, sizes, lane_count(lists, sizes), loop)


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

        return jax.lax.scan(jax.checkpoint(scanned), state, indices(steps))[0]

    rows = sizes.batches * sizes.heads * sizes.q_blocks
    return _walk_rows(operands, lists, rule, sizes, rows, repeat)


PASSES = Passes(forward, backward, differentiable_forward)
