"""Block-sparse attention as a differentiable function, whatever computes its two passes.

Nothing is saved for the backward pass but the output and its log-sum-exp. Kernels sum d_k and d_v
over the inverse list; XLA's loops add them up. Memory is that of the inputs and of the lists.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jsparse import _compat
from jsparse.attention.logits import LogitRule, Operands
from jsparse.attention.mapped import as_one_batch
from jsparse.types import BlockMask, InverseList, Mask


class Lists(NamedTuple):
    """The integer side of the problem: flattened to one batch axis, 1 where it is shared."""

    kv_indices: Int[Array, "list_batch list_heads q_blocks width"]
    kv_num_blocks: Int[Array, "list_batch list_heads q_blocks"]
    mask: Mask | None
    turned: InverseList | None = None


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

    `forward(operands, lists, rule, sizes) -> (out, lse)` in f32. `backward(operands, lists, out,
    lse, d_out, d_lse, rule, sizes)` gives the gradient by the operands.
    `differentiable` is a `forward` that JAX can differentiate: second derivatives go through it.
    `skipping(operands, lists, log_threshold, rule, sizes) -> (out, lse, kept)` is a `forward` that
    leaves out listed tiles far below what their rows saw before, and says for each entry of each
    head's lists whether it was kept; None where there is none.
    """

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., Operands]
    differentiable: Callable[..., tuple[Array, Array]]
    skipping: Callable[..., tuple[Array, Array, Array]] | None = None


def block_sparse_attention(
    operands: Operands,
    plan: BlockMask,
    mask: Mask | None,
    rule: LogitRule,
    passes: Passes,
) -> tuple[Float[Array, "batch q_len heads v_dim"], Float[Array, "batch heads q_len"]]:
    """Computes `(out, lse)` in f32 over the tiles of `plan`, element-masked by `mask`.

    Batch axes are flattened to one. Differentiable twice and more: the backward rule is itself a
    function with a derivative. `passes` are kernels that take the place of the loops below; second
    derivatives stay theirs.
    """
    grid = plan.grid
    sizes, lists, padded = _whole_tiles(operands, plan, mask, rule)
    out, lse = _attention(rule, sizes, passes)(padded, lists)
    return out[:, : grid.q_len], lse[..., : grid.q_len]


def skipping_attention(
    operands: Operands,
    plan: BlockMask,
    mask: Mask | None,
    log_threshold: Float[Array, "batch heads"],
    rule: LogitRule,
    passes: Passes,
) -> tuple[Float[Array, "batch q_len heads v_dim"], Float[Array, "batch heads q_len"], BlockMask]:
    """Computes `(out, lse, kept)`: the same, less the tiles that are skipped on the way.

    `kept` lists the tiles that were not. The gradient is that of attention over these: they alone
    are visited, and where the choice would have fallen otherwise has no part in it.
    """
    grid = plan.grid
    sizes, lists, padded = _whole_tiles(operands, plan, mask, rule)
    assert passes.skipping is not None  # refused before
    skipping = passes.skipping
    loop = jax.custom_batching.sequential_vmap(
        lambda operands, lists, log_threshold: skipping(operands, lists, log_threshold, rule, sizes)
    )
    out, lse, entries = loop(*jax.lax.stop_gradient((padded, lists, log_threshold)))
    times = entries.shape[1] // plan.list_heads
    listed = jnp.repeat(plan.kv_indices, times, axis=1)
    overflowed = jnp.repeat(plan.overflowed, times, axis=1)
    kept = BlockMask.from_lists(
        jnp.where(entries, listed, -1),
        jnp.full(entries.shape[:-1], plan.width, jnp.int32),
        overflowed=jnp.broadcast_to(overflowed, entries.shape[:2]),
        **grid._asdict(),
    )
    left = Lists(kept.kv_indices, kept.kv_num_blocks, mask)
    out, lse = _computed(rule, sizes, passes)(padded, left, out, lse)
    return out[:, : grid.q_len], lse[..., : grid.q_len], kept


def _whole_tiles(
    operands: Operands, plan: BlockMask, mask: Mask | None, rule: LogitRule
) -> tuple[Sizes, Lists, Operands]:
    """The problem with its lengths padded to whole tiles."""
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
    padded = operands._replace(
        q=_pad_tokens(operands.q, grid.q_blocks * grid.block_q),
        k=_pad_tokens(operands.k, grid.kv_blocks * grid.block_kv),
        v=_pad_tokens(operands.v, grid.kv_blocks * grid.block_kv),
        bias=_pad_bias(operands.bias, grid, rule.group),
    )
    return sizes, Lists(plan.kv_indices, plan.kv_num_blocks, mask, plan.turned), padded


def _pad_tokens(x: Array, length: int) -> Array:
    missing = length - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x


def _pad_bias(bias: Array | None, grid, group: int) -> Array | None:
    if bias is None:
        return None
    q_missing = (grid.q_blocks * grid.block_q - grid.q_len) // group if bias.shape[2] > 1 else 0
    kv_missing = grid.kv_blocks * grid.block_kv - grid.kv_len if bias.shape[3] > 1 else 0
    return jnp.pad(bias, ((0, 0), (0, 0), (0, q_missing), (0, kv_missing)))


def _attention(rule: LogitRule, sizes: Sizes, passes: Passes):
    """Builds the differentiable function for one rule and one set of sizes."""
    gradient = _gradient(rule, sizes, passes)
    forward_pass = as_one_batch(passes.forward, rule, sizes)

    @jax.custom_vjp
    def attention(operands: Operands, lists: Lists):
        return forward_pass(operands, lists)

    # calling the function itself, not its pass, gives an outer derivative a rule to follow
    def attention_fwd(operands, lists):
        out, lse = attention(operands, lists)
        return (out, lse), (operands, lists, out, lse)

    def attention_bwd(residuals, cotangents):
        operands, lists, out, lse = residuals
        d_operands = gradient(operands, lists, out, lse, *cotangents)
        return _compat.summed_like(d_operands, operands), _no_tangents(lists)

    attention.defvjp(attention_fwd, attention_bwd)
    return attention


def _computed(rule: LogitRule, sizes: Sizes, passes: Passes):
    """Builds the function that gives what was computed over some lists its gradient."""
    gradient = _gradient(rule, sizes, passes)

    @jax.custom_vjp
    def computed(operands: Operands, lists: Lists, out: Array, lse: Array):
        return out, lse

    # as above: an outer derivative needs to see what out and lse depend on
    def computed_fwd(operands, lists, out, lse):
        out, lse = computed(operands, lists, out, lse)
        return (out, lse), (operands, lists, out, lse)

    def computed_bwd(residuals, cotangents):
        operands, lists, out, lse = residuals
        d_operands = gradient(operands, lists, out, lse, *cotangents)
        zeros = jnp.zeros_like(out), jnp.zeros_like(lse)
        return _compat.summed_like(d_operands, operands), _no_tangents(lists), *zeros

    computed.defvjp(computed_fwd, computed_bwd)
    return computed


def _gradient(rule: LogitRule, sizes: Sizes, passes: Passes):
    """Builds the gradient by the operands, which is itself a function with a derivative."""
    backward_pass = as_one_batch(passes.backward, rule, sizes, gradient=True)

    @jax.custom_vjp
    def gradient(operands, lists, out, lse, d_out, d_lse):
        return backward_pass(operands, lists, out, lse, d_out, d_lse)

    def gradient_fwd(operands, lists, out, lse, d_out, d_lse):
        result = gradient(operands, lists, out, lse, d_out, d_lse)
        return result, (operands, lists, out, lse, d_out, d_lse)

    def gradient_bwd(residuals, cotangents):
        operands, lists, out, lse, d_out, d_lse = residuals

        # out and lse are functions of the operands, so their share is inside this derivative
        def differentiable(operands, d_out, d_lse):
            _, pullback = jax.vjp(lambda o: passes.differentiable(o, lists, rule, sizes), operands)
            return pullback((d_out, d_lse))[0]

        _, pullback = jax.vjp(differentiable, operands, d_out, d_lse)
        d_operands, dd_out, dd_lse = pullback(cotangents)
        d_operands = _compat.summed_like(d_operands, operands)
        zeros = jnp.zeros_like(out), jnp.zeros_like(lse)
        return d_operands, _no_tangents(lists), *zeros, dd_out, dd_lse

    gradient.defvjp(gradient_fwd, gradient_bwd)
    return gradient


def _no_tangents(tree):
    def zero(x):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.zeros_like(x)
        return np.zeros(x.shape, jax.dtypes.float0)

    return jax.tree.map(zero, tree)


def by_spans(
    compute: Callable[[Any, Array, Array], tuple[Any, Any]], carry: Any, lists: Lists, span: int
) -> tuple[Any, Any]:
    """Computes one span of rows of tiles after the other.

    `compute(carry, start, entries) -> (carry, result)` gets the span's first row and its lists,
    with -1 in the place of padding. Results are stacked.
    """
    batches, heads, rows, width = lists.kv_indices.shape
    counted = jnp.arange(width) < lists.kv_num_blocks[..., None]
    entries = jnp.where(counted, lists.kv_indices, -1)
    spans = -(-rows // span)
    missing = ((0, 0), (0, 0), (0, spans * span - rows), (0, 0))
    entries = jnp.pad(entries, missing, constant_values=-1)
    entries = jnp.moveaxis(entries.reshape(batches, heads, spans, span, width), 2, 0)

    def step(carry, start_and_entries):
        return compute(carry, *start_and_entries)

    starts = jnp.arange(spans, dtype=jnp.int32) * span
    return _compat.scan(step, carry, (starts, entries))


def plan_of(lists: Lists, sizes: Sizes) -> BlockMask:
    """The lists as a plan."""
    return BlockMask(
        lists.kv_indices,
        lists.kv_num_blocks,
        jnp.zeros(lists.kv_num_blocks.shape[:-1], bool),
        sizes.q_blocks * sizes.block_q,
        sizes.kv_blocks * sizes.block_kv,
        sizes.block_q,
        sizes.block_kv,
    )


def inverse_of(lists: Lists, sizes: Sizes) -> InverseList:
    """For each tile of keys the tiles of queries that list it."""
    return plan_of(lists, sizes).inverse() if lists.turned is None else lists.turned
