"""Block-sparse attention in XLA: the backward pass.

It walks the rows of tiles as the forward pass does. It keeps d_q of its rows at hand and adds to
d_k and d_v, so five products per tile are all there are.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.attention.block_sparse import Lists, Sizes
from jsparse.attention.lanes import (
    Bias,
    Columns,
    ColumnSums,
    Lanes,
    Rows,
    at,
    by_count,
    from_rows,
    lane_count,
    loop,
    on_columns,
    on_rows,
    row_counts,
    scores,
    tiles_together,
    weighted_columns,
    weighted_rows,
)
from jsparse.attention.logits import LogitRule, Operands


def backward(
    operands: Operands, lists: Lists, out, lse, d_out, d_lse, rule: LogitRule, sizes: Sizes
) -> Operands:
    """Computes the gradient by the operands."""
    s = sizes
    q, k, v = operands.q, operands.k, operands.v
    # softmax's own derivative: rowsum(out * d_out), less what flows in through the lse
    delta = jnp.swapaxes((out * d_out.astype(jnp.float32)).sum(-1), 1, 2)
    delta = delta - jnp.where(jnp.isneginf(lse), 0.0, d_lse)
    safe_lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
    row_blocks = (s.batches, s.heads, s.q_blocks, s.block_q)
    delta, safe_lse = delta.reshape(row_blocks), safe_lse.reshape(row_blocks)
    d_out = d_out.astype(v.dtype)
    bias = Bias.of(operands.bias, s, rule.group)
    inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in operands.captured]
    floats = tuple(x for x, is_float in zip(operands.captured, inexact, strict=True) if is_float)

    # the derivative would keep a constant as an array; d_q and d_k are multiplied by it at the end
    factor, unscaled = (1.0 if rule.scale is None else rule.scale), rule._replace(scale=None)

    def modify(logits, bias_tiles, scale, captured_floats, *where):
        of_floats = iter(captured_floats)
        captured = tuple(
            next(of_floats) if is_float else x
            for x, is_float in zip(operands.captured, inexact, strict=True)
        )
        return unscaled.modify(logits, bias.on_rows(bias_tiles), scale, captured, *where)

    groups = by_count(row_counts(lists, s), lane_count(lists, s))
    together = tiles_together(lists, s)

    def group(number, carry):
        lanes = Lanes(groups.index[number], groups.counts[number])
        here = Rows.of(lanes.index, s)
        list_batch, list_head = here.list_of(lists.kv_indices.shape, s)
        queries, d_outs = here.rows(q, s.block_q), here.rows(d_out, s.block_q)
        # the same with tokens last: what is summed over them needs no other order of the logits
        queries_across = jnp.swapaxes(here.tiles(q, s.block_q), 1, 2)
        d_outs_across = jnp.swapaxes(here.tiles(d_out, s.block_q), 1, 2)
        q_index = on_rows(here.tokens(s.block_q))
        row_lse, row_delta = on_rows(at(safe_lse, *here)), on_rows(at(delta, *here))
        owner = here.batch[:, None, None, None], here.head[:, None, None, None]

        def step(number, carry):
            d_queries, d_k, d_v, (d_bias, d_scale, d_captured) = carry
            first = number * together
            index = list_batch, list_head, here.block, lanes.entries(first, together).T
            there = Columns(here.batch, here.head // s.group, at(lists.kv_indices, *index).T)
            keys, values = there.columns(k, s.block_kv), there.columns(v, s.block_kv)
            where = q_index, on_columns(there.tokens(s.block_kv)), *owner
            logits, pullback = jax.vjp(
                lambda *parts: modify(*parts, *where),
                scores(queries, keys) * factor,
                bias.load(here, there),
                operands.scale,
                floats,
            )
            logits = rule.hide(logits, lists.mask, *where, ragged=s.ragged)
            probs = jnp.exp(logits + lanes.over(first, together, s.block_kv) - row_lse)
            d_logits = probs * (scores(d_outs, values) - row_delta)
            d_raw, d_bias_tiles, d_scale_step, d_captured_step = pullback(d_logits)
            d_raw = d_raw.astype(q.dtype)

            d_queries = d_queries + weighted_columns(d_raw, keys)
            d_k = d_k.add(there, weighted_rows(queries_across, d_raw))
            d_v = d_v.add(there, weighted_rows(d_outs_across, probs.astype(v.dtype)))
            if d_bias is not None:
                d_bias = bias.add(d_bias, here, there, d_bias_tiles)
            if d_scale is not None:
                d_scale = d_scale + d_scale_step
            d_captured = jax.tree.map(jnp.add, d_captured, d_captured_step)
            return d_queries, d_k, d_v, (d_bias, d_scale, d_captured)

        d_q, *rest = carry
        steps = -(-lanes.longest // together)
        d_queries, *rest = loop(steps, step, (zeros32(queries), *rest))
        target = (
            lanes.only_listed(here.batch, nowhere=s.batches),
            here.block,
            slice(None),
            here.head,
        )
        d_q = d_q.at[target].set(from_rows(d_queries), mode="drop", wrap_negative_indices=False)
        return d_q, *rest

    def zeros32(x):
        return None if x is None else jnp.zeros(x.shape, jnp.float32)

    d_modifiers = zeros32(bias.tiles), zeros32(operands.scale), tuple(map(zeros32, floats))
    d_q = jnp.zeros((s.batches, s.q_blocks, s.block_q, s.heads, q.shape[-1]), jnp.float32)
    d_k, d_v = (ColumnSums.zeros(x, s.block_kv, together) for x in (k, v))
    carry = loop((groups.longest > 0).sum(), group, (d_q, d_k, d_v, d_modifiers))
    d_q, d_k, d_v, (d_bias, d_scale, d_floats) = carry

    of_floats = iter(d_floats)
    d_captured: Any = tuple(
        next(of_floats).astype(x.dtype) if is_float else np.zeros(x.shape, jax.dtypes.float0)
        for x, is_float in zip(operands.captured, inexact, strict=True)
    )
    return Operands(
        (d_q * factor).reshape(q.shape).astype(q.dtype),
        ColumnSums(d_k.sums * factor).like(k),
        d_v.like(v),
        None if operands.bias is None else bias.like(d_bias, operands.bias),
        None if operands.scale is None else d_scale.astype(operands.scale.dtype),
        d_captured,
    )
