"""Block-sparse attention in XLA: the backward pass.

It walks the rows of tiles as the forward pass does. It keeps d_q of its rows at hand and adds to
d_k and d_v, so five products per tile are all there are.
"""

import jax.numpy as jnp

from jsparse.attention.block_sparse import Lists, Sizes
from jsparse.attention.lanes import (
    Bias,
    Blocks,
    ColumnSums,
    Lanes,
    Rows,
    are_few,
    at,
    bits,
    by_count,
    from_bits,
    from_rows,
    in_blocks,
    in_products,
    lane_count,
    loop,
    on_columns,
    on_rows,
    row_counts,
    tiles_together,
)
from jsparse.attention.logits import LogitRule, Operands
from jsparse.attention.tile_gradient import Differentiated, OwnRows, Terms


def backward(
    operands: Operands, lists: Lists, out, lse, d_out, d_lse, rule: LogitRule, sizes: Sizes
) -> Operands:
    """Computes the gradient by the operands."""
    q, k, v = operands.q, operands.k, operands.v
    widest = max(q.shape[-1], v.shape[-1])
    lists, s = in_products(lists, sizes, rule.group, per_row=widest, per_column=widest)
    terms = Terms.of(out, lse, d_out, d_lse, s)
    d_out = d_out.astype(v.dtype)
    bias = Bias.of(operands.bias, s, rule.group)
    differentiated = Differentiated(operands, rule, lists.mask, s.ragged)

    groups = by_count(row_counts(lists, s), lane_count(lists, s))
    together, few = tiles_together(lists, s), are_few(s.block_q)

    def group(number, carry):
        lanes = Lanes(groups.index[number], groups.counts[number])
        here = Rows.of(lanes.index, s)
        list_batch, list_head = here.list_of(lists.kv_indices.shape, s)
        own = OwnRows.of(
            differentiated.queries(here.rows(q, s.block_q)),
            here.rows(d_out, s.block_q),
            at(terms.lse, *here),
            at(terms.delta, *here),
            few=few,
        )
        q_index = on_rows(here.tokens(s.block_q))
        owner = here.batch[:, None, None, None], here.head[:, None, None, None]

        def step(number, carry):
            d_queries, d_k, d_v, d_modifiers = carry
            first = number * together
            index = list_batch, list_head, here.block, lanes.entries(first, together).T
            there = Blocks(here.batch, here.head // s.group, at(lists.kv_indices, *index).T)
            lse = jnp.where(lanes.over(first)[:, None], jnp.inf, own.lse)
            found = differentiated.step(
                own._replace(lse=lse),
                there.columns(k, s.block_kv),
                there.columns(v, s.block_kv),
                bias,
                bias.load(here.alone, there),
                lanes.ends(first, together, s.block_kv),
                (q_index, on_columns(there.tokens(s.block_kv)), *owner),
            )
            return (
                d_queries + found.queries,
                d_k.add(there, found.keys),
                d_v.add(there, found.values),
                d_modifiers.add(found.modifiers, bias, here.alone, there),
            )

        d_q, *rest = carry
        steps = -(-lanes.longest // together)
        d_queries, *rest = loop(steps, step, (jnp.zeros(own.queries.shape, jnp.float32), *rest))
        target = (
            lanes.only_listed(here.batch, nowhere=s.batches),
            here.block,
            slice(None),
            here.head,
        )
        rows = bits(differentiated.of_queries(from_rows(d_queries)))
        return d_q.at[target].set(rows, mode="drop", wrap_negative_indices=False), *rest

    d_q = in_blocks(bits(jnp.zeros_like(q)), s.block_q)
    d_k, d_v = (ColumnSums.zeros(x, s.block_kv, together, few=few) for x in (k, v))
    sums = differentiated.zeros(bias)
    carry = loop((groups.longest > 0).sum(), group, (d_q, d_k, d_v, sums))
    d_q, d_k, d_v, sums = carry
    return differentiated.of_operands(from_bits(d_q, q.dtype), d_k, d_v, sums, bias)
