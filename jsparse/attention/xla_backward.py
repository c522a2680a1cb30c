"""Block-sparse attention in XLA: the backward pass.

It walks the columns of the inverse list as the forward pass walks rows. It keeps d_k and d_v of its
columns at hand and adds to d_q, so five products per tile are all there are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jsparse.attention.block_sparse import Sizes
from jsparse.attention.lanes import (
    Bias,
    Lanes,
    Place,
    at,
    by_count,
    cut,
    from_rows,
    indices,
    lane_count,
    loop,
    on_columns,
    on_rows,
    parts_of,
    scores,
    sums_by_rows,
    weighted_columns,
    weighted_rows,
)
from jsparse.attention.logits import LogitRule, Operands
from jsparse.types import InverseList


class _Columns(NamedTuple):
    """The lists of the members of a column's group, put end to end."""

    starts: Int[Array, "*groups lanes group"]
    lengths: Int[Array, "*groups lanes group"]

    @classmethod
    def of(cls, inverse: InverseList, sizes: Sizes) -> "_Columns":
        """All columns of the problem."""
        s = sizes
        index = indices(s.batches * s.kv_heads * s.kv_blocks)[:, None]
        batch, kv_head, kv_block = Place.of(index, s.kv_heads, s.kv_blocks)
        members = Place(batch, kv_head * s.group + indices(s.group), kv_block)
        list_batch, list_head = members.list_of(inverse.offsets.shape, s)
        starts = inverse.offsets[list_batch, list_head, kv_block]
        return cls(starts, inverse.offsets[list_batch, list_head, kv_block + 1] - starts)

    def entry(self, position: Int[Array, " lanes"]):
        """Which member's list the position is in, and the entry there."""
        ends = jnp.cumsum(self.lengths, axis=1)
        # the last member takes what lies past the end
        member = (position[:, None] >= ends[:, :-1]).sum(1, dtype=jnp.int32)
        lane = indices(len(position))
        before = (ends - self.lengths)[lane, member]
        return member, self.starts[lane, member] + position - before


class _Pieces(NamedTuple):
    """Columns cut to at most their mean length, so that lanes side by side end together.

    Methods give all rows about as many tiles, but not all columns: uncut, those side by side would
    sit out many turns.
    """

    column: Int[Array, " pieces"]
    begin: Int[Array, " pieces"]
    length: Int[Array, " pieces"]

    @classmethod
    def of(cls, columns: _Columns) -> "_Pieces":
        """All pieces: at most two per column on average, so the last of them may be empty."""
        lengths = columns.lengths.sum(1, dtype=jnp.int32)
        size = jnp.maximum(-(-lengths.sum(dtype=jnp.int32) // len(lengths)), 1)
        ends = jnp.cumsum(-(-lengths // size), dtype=jnp.int32)
        number = indices(2 * len(lengths))
        column = jnp.searchsorted(ends, number, side="right").astype(jnp.int32)
        column = jnp.minimum(column, len(lengths) - 1)
        before = jnp.where(column > 0, ends[column - 1], 0)
        begin = (number - before) * size
        return cls(column, begin, jnp.clip(lengths[column] - begin, 0, size))


def backward(operands, lists, inverse, out, lse, d_out, d_lse, rule: LogitRule, sizes: Sizes):
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
    bias = Bias.of(operands.bias, s)
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
        if bias_tiles is not None:
            bias_tiles = cut(jnp.swapaxes(bias_tiles, 1, 2), 2)
        return unscaled.modify(logits, bias_tiles, scale, captured, *where)

    columns = _Columns.of(inverse, s)
    pieces = _Pieces.of(columns)
    together = lane_count(len(columns.starts), s)
    groups = by_count(pieces.length, together)

    def group(number, carry):
        lanes = Lanes(groups.index[number], groups.counts[number])
        column, begin = pieces.column[lanes.index], pieces.begin[lanes.index]
        here = Place.of(column, s.kv_heads, s.kv_blocks)
        members = _Columns(*(x[column] for x in columns))
        key_rows, value_rows = here.rows(k, s.block_kv), here.rows(v, s.block_kv)
        keys = jnp.swapaxes(here.tiles(k, s.block_kv), 1, 2)
        kv_index = on_rows(here.tokens(s.block_kv))

        # tiles have the keys first: all products but that of d_q sum over their last axis then
        def step(number, carry):
            d_q, d_keys, d_values, (d_bias, d_scale, d_captured) = carry
            member, entry = members.entry(begin + lanes.entry(number))
            head = here.head * s.group + member
            list_place = Place(here.batch, head, here.block).list_of(inverse.offsets.shape, s)
            q_block = at(inverse.q_indices, *list_place, entry)
            there = Place(here.batch, head, q_block)
            queries, d_outs = there.columns(q, s.block_q), there.columns(d_out, s.block_q)
            owner = there.batch[:, None, None, None], head[:, None, None, None]
            where = on_columns(there.tokens(s.block_q)), kv_index, *owner
            logits, pullback = jax.vjp(
                lambda *parts: modify(*parts, *where),
                scores(key_rows, queries) * factor,
                bias.load(there, here.block),
                operands.scale,
                floats,
            )
            logits = rule.hide(logits, lists.mask, *where, ragged=s.ragged) + lanes.over(number)
            probs = jnp.exp(logits - on_columns(at(safe_lse, *there)))
            d_probs = scores(value_rows, d_outs)
            d_logits = probs * (d_probs - on_columns(at(delta, *there)))
            d_raw, d_bias_tiles, d_scale_step, d_captured_step = pullback(d_logits)
            d_raw = d_raw.astype(q.dtype)

            d_values = d_values + weighted_columns(probs.astype(v.dtype), d_outs)
            d_keys = d_keys + weighted_columns(d_raw, queries)
            # rows, and parts of a bias, may meet here from several columns
            d_q = d_q.at[there.batch, there.block, there.head].add(
                weighted_rows(keys, d_raw), mode="promise_in_bounds", wrap_negative_indices=False
            )
            if d_bias is not None:
                d_bias = d_bias.at[bias.position(there, here.block)].add(
                    d_bias_tiles, mode="promise_in_bounds", wrap_negative_indices=False
                )
            if d_scale is not None:
                d_scale = d_scale + d_scale_step
            d_captured = jax.tree.map(jnp.add, d_captured, d_captured_step)
            return d_q, d_keys, d_values, (d_bias, d_scale, d_captured)

        d_q, d_k, d_v, d_modifiers = carry
        state = d_q, zeros32(key_rows), zeros32(value_rows), d_modifiers
        d_q, d_keys, d_values, d_modifiers = loop(lanes.longest, step, state)
        target = lanes.only_listed(here.batch, nowhere=s.batches), here.block, here.head
        # pieces of one column may meet here
        d_k = d_k.at[target].add(d_keys, mode="drop", wrap_negative_indices=False)
        d_v = d_v.at[target].add(d_values, mode="drop", wrap_negative_indices=False)
        return d_q, d_k, d_v, d_modifiers

    def zeros32(x):
        return None if x is None else jnp.zeros(x.shape, jnp.float32)

    d_modifiers = zeros32(bias.tiles), zeros32(operands.scale), tuple(map(zeros32, floats))

    parts = parts_of(s.block_q)
    d_q = jnp.zeros(
        (s.batches, s.q_blocks, s.heads, parts, q.shape[-1], s.block_q // parts), jnp.float32
    )
    d_k, d_v = (sums_by_rows(x, s.block_kv) for x in (k, v))
    carry = loop((groups.longest > 0).sum(), group, (d_q, d_k, d_v, d_modifiers))
    d_q, d_k, d_v, (d_bias, d_scale, d_floats) = carry

    def like(d: Any, x: Any) -> Any:
        return None if x is None else d.astype(x.dtype).reshape(x.shape)

    of_floats = iter(d_floats)
    d_captured: Any = tuple(
        like(next(of_floats), x) if is_float else np.zeros(x.shape, jax.dtypes.float0)
        for x, is_float in zip(operands.captured, inexact, strict=True)
    )
    return Operands(
        jnp.transpose(d_q * factor, (0, 1, 3, 5, 2, 4)).reshape(q.shape).astype(q.dtype),
        from_rows(d_k * factor, k),
        from_rows(d_v, v),
        like(d_bias, operands.bias),
        like(d_scale, operands.scale),
        d_captured,
    )
