"""Block-sparse attention in XLA: one pass over the listed tiles, forward and backward.

The loops run over rows of tiles and, inside, over as many tiles as the row has: time is
proportional to the tiles, memory to the inputs. Nothing is saved for the backward pass but the
output and its log-sum-exp; it walks the inverse list, keeping dk and dv of one kv block at hand
and adding to dq, so five matrix products per tile are all it does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jsparse.attention.logits import LogitRule, Operands
from jsparse.types import BlockMask, InverseList, Mask


class Lists(NamedTuple):
    """The integer side of the problem: flattened to one batch axis, 1 where it is shared."""

    kv_indices: Int[Array, "list_batch list_heads q_blocks width"]
    kv_num_blocks: Int[Array, "list_batch list_heads q_blocks"]
    mask: Mask | None


class Sizes(NamedTuple):
    """Static sizes. Lengths are padded to whole tiles; the rule knows the true ones."""

    batches: int
    heads: int
    kv_heads: int
    block_q: int
    block_kv: int
    q_blocks: int
    kv_blocks: int
    ragged: bool

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.heads // self.kv_heads


class Passes(NamedTuple):
    """What computes the two passes; all lengths are whole tiles.

    `forward(operands, lists, rule, sizes) -> (out, lse)` in f32. `backward(operands, lists,
    inverse, out, lse, d_out, d_lse, rule, sizes)` gives the gradient by the operands.
    """

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., Operands]


def block_sparse_attention(
    operands: Operands,
    plan: BlockMask,
    mask: Mask | None,
    rule: LogitRule,
    passes: Passes | None = None,
) -> tuple[Float[Array, "batch q_len heads v_dim"], Float[Array, "batch heads q_len"]]:
    """Computes `(out, lse)` over the tiles of `plan`, element-masked by `mask`.

    Batch axes are flattened to one. Differentiable twice and more: the backward rule is itself a
    function with a derivative. `passes` are kernels that take the place of the loops below; second
    derivatives stay theirs.
    """
    grid = plan.grid
    batches, _, heads, _ = operands.q.shape
    sizes = Sizes(
        batches,
        heads,
        operands.k.shape[-2],
        grid.block_q,
        grid.block_kv,
        grid.q_blocks,
        grid.kv_blocks,
        ragged=bool(grid.kv_len % grid.block_kv),
    )
    lists = Lists(plan.kv_indices, plan.kv_num_blocks, mask)
    padded = operands._replace(
        q=_pad_tokens(operands.q, grid.q_blocks * grid.block_q),
        k=_pad_tokens(operands.k, grid.kv_blocks * grid.block_kv),
        v=_pad_tokens(operands.v, grid.kv_blocks * grid.block_kv),
        bias=_pad_bias(operands.bias, grid),
    )
    out, lse = _attention(rule, sizes, passes or Passes(xla_forward, xla_backward))(padded, lists)
    return out[:, : grid.q_len].astype(operands.v.dtype), lse[..., : grid.q_len]


def _pad_tokens(x: Array, length: int) -> Array:
    missing = length - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x


def _pad_bias(bias: Array | None, grid) -> Array | None:
    if bias is None:
        return None
    q_missing = grid.q_blocks * grid.block_q - grid.q_len if bias.shape[2] > 1 else 0
    kv_missing = grid.kv_blocks * grid.block_kv - grid.kv_len if bias.shape[3] > 1 else 0
    return jnp.pad(bias, ((0, 0), (0, 0), (0, q_missing), (0, kv_missing)))


def _attention(rule: LogitRule, sizes: Sizes, passes: Passes):
    """Builds the differentiable function for one rule and one set of sizes."""
    # a vmapped call becomes a loop: batching the loops themselves would drag every carry along
    forward_loop = jax.custom_batching.sequential_vmap(
        lambda operands, lists: passes.forward(operands, lists, rule, sizes)
    )
    backward_loop = jax.custom_batching.sequential_vmap(
        lambda operands, lists, inverse, out, lse, d_out, d_lse: passes.backward(
            operands, lists, inverse, out, lse, d_out, d_lse, rule, sizes
        )
    )

    @jax.custom_vjp
    def attention(operands: Operands, lists: Lists):
        return forward_loop(operands, lists)

    # calling the function itself, not its loop, gives an outer derivative a rule to follow
    def attention_fwd(operands, lists):
        out, lse = attention(operands, lists)
        return (out, lse), (operands, lists, out, lse)

    def attention_bwd(residuals, cotangents):
        operands, lists, out, lse = residuals
        return gradient(operands, lists, out, lse, *cotangents), _no_tangents(lists)

    attention.defvjp(attention_fwd, attention_bwd)

    @jax.custom_vjp
    def gradient(operands, lists, out, lse, d_out, d_lse):
        inverse = _inverse(lists, sizes)
        return backward_loop(operands, lists, inverse, out, lse, d_out, d_lse)

    def gradient_fwd(operands, lists, out, lse, d_out, d_lse):
        result = gradient(operands, lists, out, lse, d_out, d_lse)
        return result, (operands, lists, out, lse, d_out, d_lse)

    def gradient_bwd(residuals, cotangents):
        operands, lists, out, lse, d_out, d_lse = residuals

        # out and lse are functions of the operands, so their share is inside this derivative
        def differentiable(operands, d_out, d_lse):
            _, pullback = jax.vjp(lambda o: row_parallel(o, lists, rule, sizes), operands)
            return pullback((d_out, d_lse))[0]

        _, pullback = jax.vjp(differentiable, operands, d_out, d_lse)
        d_operands, dd_out, dd_lse = pullback(cotangents)
        zeros = jnp.zeros_like(out), jnp.zeros_like(lse)
        return d_operands, _no_tangents(lists), *zeros, dd_out, dd_lse

    gradient.defvjp(gradient_fwd, gradient_bwd)
    return attention


def _no_tangents(tree):
    def zero(x):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.zeros_like(x)
        return np.zeros(x.shape, jax.dtypes.float0)

    return jax.tree.map(zero, tree)


def _inverse(lists: Lists, sizes: Sizes) -> InverseList:
    plan = BlockMask(
        lists.kv_indices,
        lists.kv_num_blocks,
        jnp.zeros(lists.kv_num_blocks.shape[:-1], bool),
        sizes.q_blocks * sizes.block_q,
        sizes.kv_blocks * sizes.block_kv,
        sizes.block_q,
        sizes.block_kv,
    )
    return plan.inverse()


class _Tiles(NamedTuple):
    """Reads and writes tiles of [batch, length, heads, dim] arrays in place."""

    sizes: Sizes

    def load(self, x: Array, batch, block, head, size: int) -> Float[Array, "size dim"]:
        tile = jax.lax.dynamic_slice(
            x,
            _at(batch, block * size, head, 0),
            (1, size, 1, x.shape[-1]),
            allow_negative_indices=False,
        )
        return tile[0, :, 0]

    def store(self, x: Array, tile: Array, batch, block, head, size: int) -> Array:
        tile = tile.astype(x.dtype)[None, :, None]
        return jax.lax.dynamic_update_slice(
            x, tile, _at(batch, block * size, head, 0), allow_negative_indices=False
        )

    def list_position(self, lists_shape, batch, head):
        """Which list a query head reads: lists are shared over batch, heads or a group."""
        list_batch = batch if lists_shape[0] > 1 else 0
        list_head = head // (self.sizes.heads // lists_shape[1])
        return list_batch, list_head

    def bias(self, bias: Array | None, batch, head, q_block, kv_block) -> Array | None:
        if bias is None:
            return None
        start, size = self.bias_window(bias, batch, head, q_block, kv_block)
        return jax.lax.dynamic_slice(bias, start, size)[0, 0]

    def bias_window(self, bias: Array, batch, head, q_block, kv_block):
        s = self.sizes
        start = _at(
            batch if bias.shape[0] > 1 else 0,
            head if bias.shape[1] > 1 else 0,
            q_block * s.block_q if bias.shape[2] > 1 else 0,
            kv_block * s.block_kv if bias.shape[3] > 1 else 0,
        )
        size = (
            1,
            1,
            s.block_q if bias.shape[2] > 1 else 1,
            s.block_kv if bias.shape[3] > 1 else 1,
        )
        return start, size


# JAX's own integers are 64 bits wide where that is switched on, and slices want one width
def _loop(first, last, body, carry):
    return jax.lax.fori_loop(jnp.int32(first), jnp.int32(last), body, carry)


def _range(count: int) -> Array:
    return jnp.arange(count, dtype=jnp.int32)


def _at(*position) -> tuple[Array, ...]:
    return tuple(jnp.asarray(index, jnp.int32) for index in position)


def _product(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    dims = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def xla_forward(operands: Operands, lists: Lists, rule: LogitRule, sizes: Sizes):
    """Computes `(out, lse)`, a row of tiles after the other."""
    s, tiles = sizes, _Tiles(sizes)
    q, k, v = operands.q, operands.k, operands.v

    def row(index, carry):
        out, lse = carry
        rest, q_block = jnp.divmod(index, s.q_blocks)
        batch, head = jnp.divmod(rest, s.heads)
        kv_head = head // s.group
        list_batch, list_head = tiles.list_position(lists.kv_indices.shape, batch, head)
        q_tile = tiles.load(q, batch, q_block, head, s.block_q)
        q_index = q_block * s.block_q + _range(s.block_q)[:, None]

        def tile(entry, state):
            peak, total, acc = state
            kv_block = lists.kv_indices[list_batch, list_head, q_block, entry]
            k_tile = tiles.load(k, batch, kv_block, kv_head, s.block_kv)
            v_tile = tiles.load(v, batch, kv_block, kv_head, s.block_kv)
            kv_index = kv_block * s.block_kv + _range(s.block_kv)
            bias = tiles.bias(operands.bias, batch, head, q_block, kv_block)
            logits = rule.modify(
                _product(q_tile, k_tile, 1, 1),
                bias,
                operands.scale,
                operands.captured,
                q_index,
                kv_index,
                batch,
                head,
            )
            logits = rule.hide(logits, lists.mask, q_index, kv_index, batch, head, ragged=s.ragged)
            new_peak = jnp.maximum(peak, logits.max(1))
            # a row that saw nothing yet: exp(-inf - 0) is 0, exp(-inf + inf) would be nan
            shift = jnp.where(jnp.isneginf(new_peak), 0.0, new_peak)
            probs = jnp.exp(logits - shift[:, None])
            decay = jnp.exp(peak - shift)
            acc = acc * decay[:, None] + _product(probs.astype(v.dtype), v_tile, 1, 0)
            return new_peak, total * decay + probs.sum(1), acc

        state = (
            jnp.full((s.block_q,), -jnp.inf, jnp.float32),
            jnp.zeros((s.block_q,), jnp.float32),
            jnp.zeros((s.block_q, v.shape[-1]), jnp.float32),
        )
        count = lists.kv_num_blocks[list_batch, list_head, q_block]
        peak, total, acc = _loop(0, count, tile, state)
        seen = total != 0
        safe = jnp.where(seen, total, 1.0)
        out = tiles.store(out, acc / safe[:, None], batch, q_block, head, s.block_q)
        row_lse = jnp.where(seen, peak + jnp.log(safe), -jnp.inf)
        lse = jax.lax.dynamic_update_slice(
            lse, row_lse[None, None], _at(batch, head, q_block * s.block_q)
        )
        return out, lse

    # the backward pass needs rowsum(out * d_out) in f32, so the output stays f32 until the end
    out = jnp.zeros((*q.shape[:-1], v.shape[-1]), jnp.float32)
    lse = jnp.zeros((s.batches, s.heads, q.shape[1]), jnp.float32)
    return _loop(0, s.batches * s.heads * s.q_blocks, row, (out, lse))


def xla_backward(operands, lists, inverse, out, lse, d_out, d_lse, rule: LogitRule, sizes: Sizes):
    """Computes the gradient by the operands, a column of tiles after the other."""
    s, tiles = sizes, _Tiles(sizes)
    q, k, v = operands.q, operands.k, operands.v
    d_out = d_out.astype(jnp.float32)
    # softmax's own derivative: rowsum(out * d_out), less what flows in through the lse
    delta = jnp.swapaxes((out * d_out).sum(-1), 1, 2) - jnp.where(jnp.isneginf(lse), 0.0, d_lse)
    safe_lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
    inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in operands.captured]

    def modify(logits, bias, scale, captured_inexact, q_index, kv_index, batch, head):
        floats = iter(captured_inexact)
        captured = tuple(
            next(floats) if is_float else x
            for x, is_float in zip(operands.captured, inexact, strict=True)
        )
        return rule.modify(logits, bias, scale, captured, q_index, kv_index, batch, head)

    floats = tuple(x for x, is_float in zip(operands.captured, inexact, strict=True) if is_float)

    def column(index, carry):
        d_q, d_k, d_v, d_modifiers = carry
        rest, kv_block = jnp.divmod(index, s.kv_blocks)
        batch, kv_head = jnp.divmod(rest, s.kv_heads)
        k_tile = tiles.load(k, batch, kv_block, kv_head, s.block_kv)
        v_tile = tiles.load(v, batch, kv_block, kv_head, s.block_kv)
        kv_index = kv_block * s.block_kv + _range(s.block_kv)

        def one_head(member, carry):
            head = kv_head * s.group + member
            list_batch, list_head = tiles.list_position(inverse.offsets.shape, batch, head)
            bounds = inverse.offsets[list_batch, list_head]

            def tile(entry, carry):
                d_q, d_k_tile, d_v_tile, (d_bias, d_scale, d_captured) = carry
                q_block = inverse.q_indices[list_batch, list_head, entry]
                q_index = q_block * s.block_q + _range(s.block_q)[:, None]
                rows = _at(batch, head, q_block * s.block_q)
                q_tile = tiles.load(q, batch, q_block, head, s.block_q)
                d_out_tile = tiles.load(d_out, batch, q_block, head, s.block_q).astype(v.dtype)
                lse_row = jax.lax.dynamic_slice(safe_lse, rows, (1, 1, s.block_q))[0, 0]
                delta_row = jax.lax.dynamic_slice(delta, rows, (1, 1, s.block_q))[0, 0]
                bias = tiles.bias(operands.bias, batch, head, q_block, kv_block)

                raw = _product(q_tile, k_tile, 1, 1)
                logits, pullback = jax.vjp(
                    lambda raw, bias, scale, captured: modify(
                        raw, bias, scale, captured, q_index, kv_index, batch, head
                    ),
                    raw,
                    bias,
                    operands.scale,
                    floats,
                )
                logits = rule.hide(
                    logits, lists.mask, q_index, kv_index, batch, head, ragged=s.ragged
                )
                probs = jnp.exp(logits - lse_row[:, None])
                d_probs = _product(d_out_tile, v_tile, 1, 1)
                d_logits = probs * (d_probs - delta_row[:, None])
                d_raw, d_bias_tile, d_scale_tile, d_captured_tile = pullback(d_logits)
                d_raw = d_raw.astype(q.dtype)

                d_v_tile = d_v_tile + _product(probs.astype(v.dtype), d_out_tile, 0, 0)
                d_k_tile = d_k_tile + _product(d_raw, q_tile, 0, 0)
                d_q_tile = tiles.load(d_q, batch, q_block, head, s.block_q)
                d_q_tile = d_q_tile + _product(d_raw, k_tile, 1, 0)
                d_q = tiles.store(d_q, d_q_tile, batch, q_block, head, s.block_q)
                if d_bias is not None:
                    start, size = tiles.bias_window(d_bias, batch, head, q_block, kv_block)
                    window = jax.lax.dynamic_slice(d_bias, start, size) + d_bias_tile
                    d_bias = jax.lax.dynamic_update_slice(d_bias, window, start)
                if d_scale is not None:
                    d_scale = d_scale + d_scale_tile
                d_captured = jax.tree.map(jnp.add, d_captured, d_captured_tile)
                return d_q, d_k_tile, d_v_tile, (d_bias, d_scale, d_captured)

            return _loop(bounds[kv_block], bounds[kv_block + 1], tile, carry)

        start = d_q, zeros32(k_tile), zeros32(v_tile), d_modifiers
        d_q, d_k_tile, d_v_tile, d_modifiers = _loop(0, s.group, one_head, start)
        d_k = tiles.store(d_k, d_k_tile, batch, kv_block, kv_head, s.block_kv)
        d_v = tiles.store(d_v, d_v_tile, batch, kv_block, kv_head, s.block_kv)
        return d_q, d_k, d_v, d_modifiers

    def zeros32(x):
        return None if x is None else jnp.zeros(x.shape, jnp.float32)

    d_modifiers = zeros32(operands.bias), zeros32(operands.scale), tuple(map(zeros32, floats))
    carry = zeros32(q), jnp.zeros_like(k), jnp.zeros_like(v), d_modifiers
    columns = s.batches * s.kv_heads * s.kv_blocks
    d_q, d_k, d_v, (d_bias, d_scale, d_floats) = _loop(0, columns, column, carry)

    d_floats = iter(d_floats)
    d_captured: Any = tuple(
        next(d_floats).astype(x.dtype) if is_float else np.zeros(x.shape, jax.dtypes.float0)
        for x, is_float in zip(operands.captured, inexact, strict=True)
    )
    return Operands(
        d_q.astype(q.dtype),
        d_k,
        d_v,
        None if d_bias is None else d_bias.astype(operands.bias.dtype),
        None if d_scale is None else d_scale.astype(operands.scale.dtype),
        d_captured,
    )


def row_parallel(operands: Operands, lists: Lists, rule: LogitRule, sizes: Sizes):
    """The same attention, all rows of tiles at once, one list entry after the other.

    Differentiable by JAX itself, which is what second derivatives need. Costs what the fullest row
    costs, for every row.
    """
    s = sizes
    q, k, v = operands.q, operands.k, operands.v
    batch = _range(s.batches)[:, None, None]
    head = _range(s.heads)[:, None]
    row = _range(s.q_blocks)
    list_batch = batch if lists.kv_indices.shape[0] > 1 else jnp.zeros_like(batch)
    list_head = head // (s.heads // lists.kv_indices.shape[1])
    counts = lists.kv_num_blocks[list_batch, list_head, row]

    def blocks(x, size):
        """[batch, heads, blocks, size, dim]."""
        x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
        return jnp.transpose(x, (0, 3, 1, 2, 4))

    q_tiles, k_tiles, v_tiles = blocks(q, s.block_q), blocks(k, s.block_kv), blocks(v, s.block_kv)
    shaped = batch[..., None, None], head[..., None, None]
    q_index = (row[:, None] * s.block_q + _range(s.block_q))[..., None]

    def entry(state, position):
        peak, total, acc = state
        kv_block = lists.kv_indices[list_batch, list_head, row, position]
        k_tile = k_tiles[batch, head // s.group, kv_block]
        v_tile = v_tiles[batch, head // s.group, kv_block]
        kv_index = (kv_block[..., None] * s.block_kv + _range(s.block_kv))[..., None, :]
        logits = jnp.einsum(
            "bhrqd,bhrkd->bhrqk", q_tiles, k_tile, preferred_element_type=jnp.float32
        )
        bias = _gather_bias(operands.bias, batch, head, row, kv_block, sizes)
        logits = rule.modify(
            logits, bias, operands.scale, operands.captured, q_index, kv_index, *shaped
        )
        logits = rule.hide(logits, lists.mask, q_index, kv_index, *shaped, ragged=s.ragged)
        logits = jnp.where((position < counts)[..., None, None], logits, -jnp.inf)
        new_peak = jax.lax.stop_gradient(jnp.maximum(peak, logits.max(-1)))
        shift = jnp.where(jnp.isneginf(new_peak), 0.0, new_peak)
        probs = jnp.exp(logits - shift[..., None])
        decay = jnp.exp(peak - shift)
        acc = acc * decay[..., None] + jnp.einsum(
            "bhrqk,bhrkd->bhrqd", probs.astype(v.dtype), v_tile, preferred_element_type=jnp.float32
        )
        return (new_peak, total * decay + probs.sum(-1), acc), None

    shape = (s.batches, s.heads, s.q_blocks, s.block_q)
    state = (
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, v.shape[-1]), jnp.float32),
    )
    width = lists.kv_indices.shape[-1]
    (peak, total, acc), _ = jax.lax.scan(jax.checkpoint(entry), state, _range(width))
    seen = total != 0
    safe = jnp.where(seen, total, 1.0)
    out = jnp.moveaxis(acc / safe[..., None], 1, 3).reshape(*q.shape[:-1], v.shape[-1])
    lse = jnp.where(seen, peak + jnp.log(safe), -jnp.inf)
    return out, lse.reshape(s.batches, s.heads, -1)


def _gather_bias(bias, batch, head, row, kv_block, sizes: Sizes):
    """The bias of each row's current tile, [batch, heads, q_blocks, block_q | 1, block_kv | 1]."""
    if bias is None:
        return None
    s = sizes
    q_size = s.block_q if bias.shape[2] > 1 else 1
    kv_size = s.block_kv if bias.shape[3] > 1 else 1
    tiles = bias.reshape(
        *bias.shape[:2], bias.shape[2] // q_size, q_size, bias.shape[3] // kv_size, kv_size
    )
    tiles = jnp.moveaxis(tiles, 3, 4)
    return tiles[
        batch if bias.shape[0] > 1 else 0 * batch,
        head if bias.shape[1] > 1 else 0 * head,
        row if bias.shape[2] > 1 else 0 * row,
        kv_block if bias.shape[3] > 1 else 0 * kv_block,
    ]
