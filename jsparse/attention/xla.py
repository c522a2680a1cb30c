"""The two passes of block-sparse attention in XLA: many rows of tiles at a time.

One tile is too little work for a processor with several cores. So rows are sorted by how many tiles
they have, and as many neighbours as keep the machine busy walk their lists together, one tile of
each per step, up to the longest list among them. Neighbours have nearly the same number of tiles:
with n rows at a time, the turns that rows sit out are fewer than n times the longest list in all.

The backward pass does the same with the columns of the inverse list: it keeps d_k and d_v of its
columns at hand and adds to d_q, so five products per tile are all there are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jsparse.attention.block_sparse import Lists, Passes, Sizes
from jsparse.attention.logits import LogitRule, Operands
from jsparse.types import InverseList


class _Tuning(NamedTuple):
    """How the work is cut; it changes time, not results.

    `logits` are at work in one step. `parts` is how often an axis is cut that products sum over,
    or that their columns lie on: in jax 0.10, XLA spreads a sum of products over the cores of a
    CPU, while a single product of a tile's size, or a batch of them, it computes on one. Later
    versions spread both; what the parts cost or save there is about a tenth.
    """

    logits: int
    parts: int


_TUNING = {"cpu": _Tuning(logits=2**19, parts=2)}
_TUNING_OF_ACCELERATORS = _Tuning(logits=2**23, parts=1)


def _tuning() -> _Tuning:
    return _TUNING.get(jax.default_backend(), _TUNING_OF_ACCELERATORS)


def _together(lists: int, sizes: Sizes) -> int:
    """How many rows, or columns, of tiles are computed together."""
    return max(1, min(lists, _tuning().logits // (sizes.block_q * sizes.block_kv)))


# JAX's own integers are 64 bits wide where that is switched on, and slices want one width
def _loop(count, body, carry):
    return jax.lax.fori_loop(jnp.int32(0), jnp.asarray(count, jnp.int32), body, carry)


def _range(count: int) -> Array:
    return jnp.arange(count, dtype=jnp.int32)


def _at(x: Array, *index: Any) -> Array:
    return x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


class _Lanes(NamedTuple):
    """Rows, or columns, of tiles that walk their lists together, the longest list first.

    A lane without tiles reads what the first one reads, since what is in no list may hold a NaN,
    and writes nothing.
    """

    index: Int[Array, "*groups lanes"]
    counts: Int[Array, "*groups lanes"]

    @property
    def longest(self) -> Int[Array, " *groups"]:
        """Steps until the last list is over."""
        return self.counts[..., 0]

    def entry(self, step) -> Int[Array, " lanes"]:
        """The list entry to read; a list that is over stays with its last."""
        last = jnp.where(self.counts > 0, self.counts, self.longest) - 1
        return jnp.clip(step, 0, jnp.maximum(last, 0))

    def only_listed(self, x: Array, nowhere: int) -> Array:
        """Indices to write to: `nowhere`, past an array's end, for lanes without tiles."""
        return jnp.where(self.counts > 0, x, nowhere)

    def over(self, step) -> Float[Array, "lanes 1 1 1"]:
        """What to add to logits: -inf where a list is over."""
        return jnp.where(step < self.counts, 0.0, -jnp.inf)[:, None, None, None]


def _by_count(counts: Int[Array, " lists"], together: int) -> _Lanes:
    """Groups of lists by falling count; the last group is filled up with empty ones."""
    falling, index = jax.lax.sort_key_val(-counts, _range(len(counts)))
    missing = (0, -len(counts) % together)
    counts = jnp.pad(-falling, missing).reshape(-1, together)
    index = jnp.pad(index, missing).reshape(-1, together)
    return _Lanes(jnp.where(counts > 0, index, index[:, :1]), counts)


class _Place(NamedTuple):
    """Batch, head and block of lanes."""

    batch: Int[Array, "*groups lanes"]
    head: Int[Array, "*groups lanes"]
    block: Int[Array, "*groups lanes"]

    @classmethod
    def of(cls, index: Array, heads: int, blocks: int) -> "_Place":
        rest, block = jnp.divmod(index, blocks)
        return cls(*jnp.divmod(rest, heads), block)

    def tiles(self, x: Array, size: int) -> Float[Array, "lanes size dim"]:
        """The tiles of an array [batch, length, heads, dim]."""
        return _at(_blocks(x, size), self.batch, self.block, slice(None), self.head)

    def rows(self, x: Array, size: int) -> Float[Array, "lanes dim_parts size dim_part"]:
        """The tiles with their last axis cut, as the rows of `_scores`."""
        blocks = _blocks(x, size)
        cut = _parts(x.shape[-1])
        blocks = blocks.reshape(*blocks.shape[:-1], cut, -1)
        batch, block, head = (i[:, None] for i in (self.batch, self.block, self.head))
        return _at(blocks, batch, block, slice(None), head, _range(cut))

    def columns(self, x: Array, size: int) -> Float[Array, "lanes dim_parts parts tokens dim_part"]:
        """The tiles with both axes cut, as the columns of `_scores`."""
        blocks = _blocks(x, size)
        outer, inner = _parts(size), _parts(x.shape[-1])
        blocks = blocks.reshape(
            *blocks.shape[:2], outer, -1, blocks.shape[3], inner, x.shape[-1] // inner
        )
        batch, block, head = (i[:, None, None] for i in (self.batch, self.block, self.head))
        return _at(blocks, batch, block, _range(outer), slice(None), head, _range(inner)[:, None])

    def tokens(self, size: int) -> Int[Array, "lanes size"]:
        """The token indices of the tiles."""
        return self.block[:, None] * size + _range(size)

    def list_of(self, lists_shape: tuple[int, ...], sizes: Sizes):
        """Which list a query head reads: lists are shared over batch, heads or a group."""
        batch = self.batch if lists_shape[0] > 1 else jnp.zeros_like(self.batch)
        return batch, self.head // (sizes.heads // lists_shape[1])


def _blocks(x: Array, size: int) -> Float[Array, "batch blocks size heads dim"]:
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def _parts(length: int) -> int:
    parts = _tuning().parts
    return 1 if length % parts else parts


def _cut(x: Array, axis: int) -> Shaped[Array, "lanes parts ..."]:
    """Cuts an axis that is summed over into parts, which come second."""
    parts = _parts(x.shape[axis])
    return jnp.moveaxis(x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :]), axis, 1)


def _scores(
    rows: Float[Array, "lanes dim_parts rows dim_part"],
    columns: Float[Array, "lanes dim_parts parts column_part dim_part"],
) -> Float[Array, "lanes parts rows column_part"]:
    """Products of rows with columns; those come in parts."""
    rows = jnp.broadcast_to(rows[:, :, None], (*columns.shape[:3], *rows.shape[2:]))
    dims = (((4,), (4,)), ((0, 1, 2), (0, 1, 2)))
    return jax.lax.dot_general(rows, columns, dims, preferred_element_type=jnp.float32).sum(1)


def _weighted(
    weights: Float[Array, "lanes parts rows column_part"], values: Float[Array, "lanes columns dim"]
) -> Float[Array, "lanes rows dim"]:
    """Sums of values over the tiles' columns."""
    dims = (((3,), (2,)), ((0, 1), (0, 1)))
    values = _cut(values, 1)
    return jax.lax.dot_general(weights, values, dims, preferred_element_type=jnp.float32).sum(1)


def _on_rows(x: Array) -> Shaped[Array, "lanes 1 rows 1"]:
    return x[:, None, :, None]


def _on_columns(x: Array) -> Shaped[Array, "lanes parts 1 columns"]:
    return _cut(x, 1)[:, :, None]


class _Bias(NamedTuple):
    """A bias, each axis 1 or full, tile by tile."""

    tiles: Float[Array, "bias_batch bias_heads rows q_size columns kv_size"] | None

    @classmethod
    def of(cls, bias: Array | None, sizes: Sizes) -> "_Bias":
        if bias is None:
            return cls(None)
        q_size = sizes.block_q if bias.shape[2] > 1 else 1
        kv_size = sizes.block_kv if bias.shape[3] > 1 else 1
        rows, columns = bias.shape[2] // q_size, bias.shape[3] // kv_size
        return cls(bias.reshape(*bias.shape[:2], rows, q_size, columns, kv_size))

    def position(self, queries: _Place, kv_block: Array):
        """Where the lanes' tiles are; an axis of 1 is the same for all."""
        assert self.tiles is not None
        shape = self.tiles.shape
        batch, head, q_block, kv_block = (
            index if shape[axis] > 1 else jnp.zeros_like(index)
            for axis, index in zip((0, 1, 2, 4), (*queries, kv_block), strict=True)
        )
        return batch, head, q_block, slice(None), kv_block

    def load(self, queries: _Place, kv_block) -> Float[Array, "lanes q_size kv_size"] | None:
        return None if self.tiles is None else _at(self.tiles, *self.position(queries, kv_block))


def _row_counts(lists: Lists, sizes: Sizes) -> Int[Array, " rows"]:
    counts = lists.kv_num_blocks
    counts = jnp.repeat(counts, sizes.heads // counts.shape[1], axis=1)
    return jnp.broadcast_to(counts, (sizes.batches, sizes.heads, sizes.q_blocks)).reshape(-1)


def _walk_rows(
    operands: Operands,
    lists: Lists,
    rule: LogitRule,
    sizes: Sizes,
    together: int,
    repeat: Callable[..., Any],
) -> tuple[Float[Array, "batch q_len heads v_dim"], Float[Array, "batch heads q_len"]]:
    """Attention by running softmax; `repeat(longest, step, state)` makes the steps of a group."""
    s = sizes
    q, k, v = operands.q, operands.k, operands.v
    bias = _Bias.of(operands.bias, s)
    groups = _by_count(_row_counts(lists, s), together)

    def group(carry, rows: tuple[_Lanes, _Place]):
        out, lse = carry
        lanes, here = rows
        list_batch, list_head = here.list_of(lists.kv_indices.shape, s)
        queries = here.rows(q, s.block_q)
        q_index = _on_rows(here.tokens(s.block_q))
        owner = here.batch[:, None, None, None], here.head[:, None, None, None]

        def step(number, state):
            peak, total, acc = state
            entry = lanes.entry(number)
            kv_block = _at(lists.kv_indices, list_batch, list_head, here.block, entry)
            there = _Place(here.batch, here.head // s.group, kv_block)
            where = q_index, _on_columns(there.tokens(s.block_kv)), *owner
            bias_tiles = bias.load(here, kv_block)
            logits = rule.modify(
                _scores(queries, there.columns(k, s.block_kv)),
                None if bias_tiles is None else _cut(bias_tiles, 2),
                operands.scale,
                operands.captured,
                *where,
            )
            logits = rule.hide(logits, lists.mask, *where, ragged=s.ragged) + lanes.over(number)
            new_peak = jax.lax.stop_gradient(jnp.maximum(peak, logits.max((1, 3))))
            probs = jnp.exp(logits - _on_rows(new_peak))
            decay = jnp.exp(peak - new_peak)
            new = _weighted(probs.astype(v.dtype), there.tiles(v, s.block_kv))
            return new_peak, total * decay + probs.sum((1, 3)), acc * decay[..., None] + new

        shape = (together, s.block_q)
        state = (
            # finite: in a row that saw nothing exp(-inf - peak) is 0, exp(-inf + inf) would be nan
            jnp.full(shape, jnp.finfo(jnp.float32).min, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((*shape, v.shape[-1]), jnp.float32),
        )
        peak, total, acc = repeat(lanes.longest, step, state)
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
    where = _Place.of(groups.index, s.heads, s.q_blocks)
    (out, lse), _ = jax.lax.scan(group, (out, lse), (groups, where))
    return out.reshape(*q.shape[:-1], v.shape[-1]), lse.reshape(s.batches, s.heads, -1)


def forward(operands: Operands, lists: Lists, rule: LogitRule, sizes: Sizes):
    """Computes `(out, lse)`, both f32."""
    rows = sizes.batches * sizes.heads * sizes.q_blocks
    return _walk_rows(operands, lists, rule, sizes, _together(rows, sizes), _loop)


def differentiable_forward(operands: Operands, lists: Lists, rule: LogitRule, sizes: Sizes):
    """The same attention in a form that JAX differentiates, for second derivatives.

    All rows walk their lists together: it costs what the fullest row costs, for every row.
    """
    width = lists.kv_indices.shape[-1]

    def repeat(_, step, state):
        def scanned(state, number):
            return step(number, state), None

        return jax.lax.scan(jax.checkpoint(scanned), state, _range(width))[0]

    rows = sizes.batches * sizes.heads * sizes.q_blocks
    return _walk_rows(operands, lists, rule, sizes, rows, repeat)


class _Columns(NamedTuple):
    """The lists of the members of a column's group, put end to end."""

    starts: Int[Array, "*groups lanes group"]
    lengths: Int[Array, "*groups lanes group"]

    @classmethod
    def of(cls, inverse: InverseList, sizes: Sizes) -> "_Columns":
        """All columns of the problem."""
        s = sizes
        index = _range(s.batches * s.kv_heads * s.kv_blocks)[:, None]
        batch, kv_head, kv_block = _Place.of(index, s.kv_heads, s.kv_blocks)
        members = _Place(batch, kv_head * s.group + _range(s.group), kv_block)
        list_batch, list_head = members.list_of(inverse.offsets.shape, s)
        starts = inverse.offsets[list_batch, list_head, kv_block]
        return cls(starts, inverse.offsets[list_batch, list_head, kv_block + 1] - starts)

    def entry(self, position: Int[Array, " lanes"]):
        """Which member's list the position is in, and the entry there."""
        ends = jnp.cumsum(self.lengths, axis=1)
        # the last member takes what lies past the end
        member = (position[:, None] >= ends[:, :-1]).sum(1, dtype=jnp.int32)
        lane = _range(len(position))
        before = (ends - self.lengths)[lane, member]
        return member, self.starts[lane, member] + position - before


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
    bias = _Bias.of(operands.bias, s)
    inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in operands.captured]
    floats = tuple(x for x, is_float in zip(operands.captured, inexact, strict=True) if is_float)

    def modify(logits, bias_tiles, scale, captured_floats, *where):
        of_floats = iter(captured_floats)
        captured = tuple(
            next(of_floats) if is_float else x
            for x, is_float in zip(operands.captured, inexact, strict=True)
        )
        if bias_tiles is not None:
            bias_tiles = _cut(jnp.swapaxes(bias_tiles, 1, 2), 2)
        return rule.modify(logits, bias_tiles, scale, captured, *where)

    columns = _Columns.of(inverse, s)
    together = _together(len(columns.starts), s)
    groups = _by_count(columns.lengths.sum(1), together)

    def group(carry, xs: tuple[_Lanes, _Place, _Columns]):
        lanes, here, members = xs
        keys, values = here.tiles(k, s.block_kv), here.tiles(v, s.block_kv)
        key_rows, value_rows = here.rows(k, s.block_kv), here.rows(v, s.block_kv)
        kv_index = _on_rows(here.tokens(s.block_kv))

        # tiles have the keys first: all products but that of d_q sum over their last axis then
        def step(number, carry):
            d_q, d_keys, d_values, (d_bias, d_scale, d_captured) = carry
            member, entry = members.entry(lanes.entry(number))
            head = here.head * s.group + member
            list_place = _Place(here.batch, head, here.block).list_of(inverse.offsets.shape, s)
            q_block = _at(inverse.q_indices, *list_place, entry)
            there = _Place(here.batch, head, q_block)
            queries, d_outs = there.tiles(q, s.block_q), there.tiles(d_out, s.block_q)
            owner = there.batch[:, None, None, None], head[:, None, None, None]
            where = _on_columns(there.tokens(s.block_q)), kv_index, *owner
            logits, pullback = jax.vjp(
                lambda *parts: modify(*parts, *where),
                _scores(key_rows, there.columns(q, s.block_q)),
                bias.load(there, here.block),
                operands.scale,
                floats,
            )
            logits = rule.hide(logits, lists.mask, *where, ragged=s.ragged) + lanes.over(number)
            probs = jnp.exp(logits - _on_columns(_at(safe_lse, *there)))
            d_probs = _scores(value_rows, there.columns(d_out, s.block_q))
            d_logits = probs * (d_probs - _on_columns(_at(delta, *there)))
            d_raw, d_bias_tiles, d_scale_step, d_captured_step = pullback(d_logits)
            d_raw = d_raw.astype(q.dtype)

            d_values = d_values + _weighted(probs.astype(v.dtype), d_outs)
            d_keys = d_keys + _weighted(d_raw, queries)
            rows_first = jnp.moveaxis(d_raw, 2, 3).reshape(together, s.block_q, s.block_kv)
            # rows, and parts of a bias, may meet here from several columns
            d_q_tiles = _weighted(_cut(rows_first, 2), keys)
            d_q = d_q.at[there.batch, there.block, :, there.head].add(
                d_q_tiles, mode="promise_in_bounds", wrap_negative_indices=False
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
        state = d_q, zeros32(keys), zeros32(values), d_modifiers
        d_q, d_keys, d_values, d_modifiers = _loop(lanes.longest, step, state)
        target = (
            lanes.only_listed(here.batch, nowhere=s.batches),
            here.block,
            slice(None),
            here.head,
        )
        d_k = d_k.at[target].set(d_keys.astype(k.dtype), mode="drop", wrap_negative_indices=False)
        d_v = d_v.at[target].set(d_values.astype(v.dtype), mode="drop", wrap_negative_indices=False)
        return (d_q, d_k, d_v, d_modifiers), None

    def zeros32(x):
        return None if x is None else jnp.zeros(x.shape, jnp.float32)

    d_modifiers = zeros32(bias.tiles), zeros32(operands.scale), tuple(map(zeros32, floats))
    where = _Place.of(groups.index, s.kv_heads, s.kv_blocks)
    members = _Columns(*(x[groups.index] for x in columns))
    d_q = zeros32(_blocks(q, s.block_q))
    d_k, d_v = (jnp.zeros_like(_blocks(x, s.block_kv)) for x in (k, v))
    carry, _ = jax.lax.scan(group, (d_q, d_k, d_v, d_modifiers), (groups, where, members))
    d_q, d_k, d_v, (d_bias, d_scale, d_floats) = carry

    def like(d: Any, x: Any) -> Any:
        return None if x is None else d.astype(x.dtype).reshape(x.shape)

    of_floats = iter(d_floats)
    d_captured: Any = tuple(
        like(next(of_floats), x) if is_float else np.zeros(x.shape, jax.dtypes.float0)
        for x, is_float in zip(operands.captured, inexact, strict=True)
    )
    return Operands(
        like(d_q, q),
        like(d_k, k),
        like(d_v, v),
        like(d_bias, operands.bias),
        like(d_scale, operands.scale),
        d_captured,
    )


PASSES = Passes(forward, backward, differentiable_forward)
