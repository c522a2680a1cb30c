"""`attend`: attention for a plan and a mask, by whichever implementation can do it here."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jsparse import checks
from jsparse.attention import mosaic, reference, triton, xla
from jsparse.attention.block_sparse import Passes, block_sparse_attention, skipping_attention
from jsparse.attention.logits import LogitRule, Operands, ScoreMod, hoist
from jsparse.core.merging import merge
from jsparse.core.tiling import block_mask
from jsparse.types import BlockMask, BlockPyramid, Mask, TileGrid, TokenGroups
from jsparse.types.pytree import flatten_axes, flatten_batch

Plan = BlockMask | TokenGroups | BlockPyramid
P = TypeVar("P", bound=Plan)
IMPLEMENTATIONS = ("reference", "xla", "mosaic", "triton")
DEFAULT_BLOCK = 128


class Problem(NamedTuple):
    """A checked call: batch axes flattened to one, modifications split into static and traced.

    With `log_threshold [batch, heads]` tiles far below what their rows saw before are skipped.
    """

    operands: Operands
    plan: Plan | None
    mask: Mask | None
    rule: LogitRule
    batch_shape: tuple[int, ...]
    log_threshold: Float[Array, "batch heads"] | None = None


def attend(
    q: Float[Array, "*batch q_len heads dim"],
    k: Float[Array, "*batch kv_len kv_heads dim"],
    v: Float[Array, "*batch kv_len kv_heads v_dim"],
    plan: Plan | Sequence[Plan] | None = None,
    *,
    mask: Mask | None = None,
    bias: Float[Array, "*bias"] | None = None,
    score_mod: ScoreMod | None = None,
    sinks: Float[Array, " heads"] | None = None,
    softcap: float | None = None,
    scale: float | Float[Array, ""] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Attends to the keys that both `plan` and `mask` let through.

    Logits are `q k^T`, then in this order: times `scale`, capped, `score_mod`, plus `bias`, masked.
    A row with no key gives `out = 0`, `lse = -inf` and finite gradients.

    Args:
      q: Queries.
      k: Keys; `heads` is a multiple of `kv_heads`.
      v: Values.
      plan: Which tiles are computed. A tuple of disjoint plans is executed in parts and merged.
        Default: the tiles that `mask` touches, or all.
      mask: Who may see whom, element by element.
      bias: Added to the logits; broadcastable to [*batch, heads, q_len, kv_len]. Has a gradient.
      score_mod: `score_mod(logit, batch, head, q_index, kv_index) -> logit` on f32 and int32
        scalars; `batch` counts the flattened batch axes. Arrays it closes over have gradients.
      sinks: A learned logit per head that takes probability and gives no value.
      softcap: Caps logits smoothly to (-softcap, softcap) by `softcap * tanh(logits / softcap)`.
      scale: Factor on the logits, default `dim ** -0.5`. An array has a gradient.
      return_lse: Also return the log-sum-exp of each row's logits, sink included. Differentiable.
      implementation: "reference", "xla", "mosaic" or "triton"; default the fastest that can do it.

    Returns:
      `out [*batch, q_len, heads, v_dim]` in v's dtype, or `(out, lse [*batch, heads, q_len])`.

    Raises:
      ValueError: if arguments do not fit each other; the sentence names the remedy.
      NotImplementedError: if the named implementation cannot do this job here.
    """
    if isinstance(plan, Sequence):
        out, lse = _attend_parts(
            q, k, v, plan, mask, bias, score_mod, softcap, scale, implementation
        )
    else:
        problem = prepare(
            q, k, v, plan, mask=mask, bias=bias, score_mod=score_mod, softcap=softcap, scale=scale
        )
        out, lse = run(problem, implementation)
        out = out.reshape(*q.shape[:-1], v.shape[-1])
        lse = lse.reshape(*problem.batch_shape, *lse.shape[1:])
    if sinks is not None:
        checks.sinks_shape(sinks, q.shape[-2])
        out, lse = add_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out


def prepare(
    q: Array,
    k: Array,
    v: Array,
    plan: Plan | None = None,
    *,
    mask: Mask | None = None,
    bias: Array | None = None,
    score_mod: ScoreMod | None = None,
    softcap: float | None = None,
    scale: float | Array | None = None,
) -> Problem:
    """Checks a call and brings it to the form that every implementation takes."""
    checks.attention_inputs(q, k, v)
    batch_shape, (q_len, heads, dim) = q.shape[:-3], q.shape[-3:]
    kv_len, kv_heads = k.shape[-3:-1]
    if mask is not None:
        checks.mask_type(mask)
        checks.batch_fits("mask", mask.batch_shape, batch_shape)
        checks.mask_heads(mask.heads, heads)
        mask = mask.flatten_batch(batch_shape)
        mask.check_lengths(q_len, kv_len)
    if plan is not None:
        checks.plan_type(plan, (BlockMask, TokenGroups, BlockPyramid))
        checks.plan_lengths(plan, q_len, kv_len)
        plan = _flatten_plan(plan, batch_shape, heads, kv_heads)
    if bias is not None:
        checks.bias_array(bias)
        full = (*batch_shape, heads, q_len, kv_len)
        bias = bias.reshape((1,) * (len(full) - bias.ndim) + bias.shape)
        checks.broadcasts("bias", bias.shape, full)
        bias = flatten_axes(jnp.asarray(bias), 3, batch_shape)
    captured: tuple[Array, ...] = ()
    if score_mod is not None:
        score_mod, captured = hoist(score_mod)
    static_scale: float | None = None
    traced_scale: Array | None = None
    if isinstance(scale, jax.Array):
        checks.scalar("scale", scale)
        traced_scale = scale.astype(jnp.float32)
    elif scale is None:
        static_scale = dim**-0.5
    else:
        checks.number(scale=scale)
        static_scale = float(scale)
    if softcap is not None:
        checks.positive_number(softcap=softcap)
        softcap = float(softcap)
    rule = LogitRule(q_len, kv_len, static_scale, softcap, score_mod)
    flat = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    operands = Operands(*flat, bias=bias, scale=traced_scale, captured=captured)
    return Problem(operands, plan, mask, rule, batch_shape)


def _flatten_plan(plan: P, batch_shape: tuple[int, ...], heads: int, kv_heads: int) -> P:
    """Brings a plan's batch axes to one, of length 1 where all sequences share the lists."""
    lists = plan.block_mask if isinstance(plan, BlockPyramid) else plan
    checks.list_heads(lists.list_heads, heads, kv_heads)
    checks.batch_fits("plan", lists.batch_shape, batch_shape)
    return flatten_batch(plan, batch_shape)


def run(problem: Problem, implementation: str | None) -> Any:
    """Computes `(out, lse)`, where tiles may be skipped `(out, lse, kept)`."""
    if implementation is not None:
        checks.one_of(IMPLEMENTATIONS, implementation=implementation)
        reason = _REFUSES[implementation](problem)
        if reason:
            raise NotImplementedError(f"implementation={implementation!r}: {reason}")
        return _call(implementation, problem)
    chosen, refused = refusals(problem)
    if chosen is None:
        reasons = " ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise NotImplementedError(
            "No implementation can do this here; implementation='reference' can, with memory for "
            f"every pair of tokens. {reasons}"
        )
    return _call(chosen, problem)


def _call(name: str, problem: Problem) -> Any:
    return (_CALLS if problem.log_threshold is None else _SKIPPING_CALLS)[name](problem)


def refusals(problem: Problem) -> tuple[str | None, dict[str, str]]:
    """The implementation that would run, and why each faster one would not."""
    refused = {}
    for name in ("mosaic", "triton", "xla"):
        reason = _REFUSES[name](problem)
        if reason is None:
            return name, refused
        refused[name] = reason
    return None, refused


def _xla_refuses(problem: Problem) -> str | None:
    if problem.plan is None or isinstance(problem.plan, BlockMask):
        return None
    return f"the tile executor does not take {type(problem.plan).__name__}."


def _reference(problem: Problem) -> tuple[Array, Array]:
    return reference.forward(problem.operands, problem.plan, problem.mask, problem.rule)


def _reference_skipping(problem: Problem) -> tuple[Array, Array, BlockMask]:
    return reference.skipping_forward(*_along(problem))


def _along(problem: Problem) -> tuple[Operands, BlockMask, Mask | None, Array, LogitRule]:
    """What goes along which tiles, and what it skips."""
    operands, _, mask, rule, _, log_threshold = problem
    assert log_threshold is not None
    return operands, with_plan(problem), mask, log_threshold, rule


# compiled once per shape also where the caller is not: the loops would be compiled at every call
_compiled = jax.jit(block_sparse_attention, static_argnames=("rule", "passes"))
_compiled_skipping = jax.jit(skipping_attention, static_argnames=("rule", "passes"))


def _xla(problem: Problem) -> tuple[Array, Array]:
    plan = with_plan(problem)
    # a score_mod is a new function at every call, and a cache would only keep it alive
    keeps = problem.rule.score_mod is None
    call = _compiled if keeps else block_sparse_attention
    return call(problem.operands, plan, problem.mask, rule=problem.rule, passes=xla.PASSES)


def _xla_skipping(problem: Problem) -> tuple[Array, Array, BlockMask]:
    call = _compiled_skipping if problem.rule.score_mod is None else skipping_attention
    return call(*_along(problem), xla.PASSES)


def _by_kernels(passes: Callable[[], Passes], problem: Problem) -> tuple[Array, Array]:
    return block_sparse_attention(
        problem.operands, with_plan(problem), problem.mask, problem.rule, passes()
    )


def _triton_skipping(problem: Problem) -> tuple[Array, Array, BlockMask]:
    return skipping_attention(*_along(problem), triton.PASSES)


def _kernels_refuse(adapter: Any, problem: Problem) -> str | None:
    reason = _xla_refuses(problem)
    if reason:
        return reason
    block_q = block_kv = DEFAULT_BLOCK
    if isinstance(problem.plan, BlockMask):
        block_q, block_kv = problem.plan.block_q, problem.plan.block_kv
    refusal = adapter.refusal if problem.log_threshold is None else adapter.skipping_refusal
    return refusal(problem.operands, problem.mask, problem.rule, block_q, block_kv)


_CALLS = {
    "reference": _reference,
    "xla": _xla,
    "mosaic": partial(_by_kernels, lambda: mosaic.chip().passes),
    "triton": partial(_by_kernels, lambda: triton.PASSES),
}
# with tiles skipped on the way
_SKIPPING_CALLS: dict[str, Callable[[Problem], tuple[Array, Array, BlockMask]]] = {
    "reference": _reference_skipping,
    "xla": _xla_skipping,
    "triton": _triton_skipping,
}
_REFUSES: dict[str, Callable[[Problem], str | None]] = {
    "reference": lambda problem: None,
    "xla": _xla_refuses,
    "mosaic": partial(_kernels_refuse, mosaic),
    "triton": partial(_kernels_refuse, triton),
}


def with_plan(problem: Problem) -> BlockMask:
    """The problem's tile list; where there is none, the tiles its mask touches, or all."""
    plan, mask, rule = problem.plan, problem.mask, problem.rule
    if isinstance(plan, BlockMask):
        return plan
    reason = _xla_refuses(problem)
    if reason:
        raise NotImplementedError(reason)
    sizes = {"block_q": DEFAULT_BLOCK, "block_kv": DEFAULT_BLOCK}
    if mask is not None:
        plan = block_mask(mask, rule.q_len, rule.kv_len, **sizes)
        return flatten_batch(plan, problem.operands.q.shape[:1])
    grid = TileGrid(rule.q_len, rule.kv_len, **sizes)
    everything = jnp.ones((1, 1, grid.q_blocks, grid.kv_blocks), bool)
    return BlockMask.from_dense(everything, **grid._asdict(), width=grid.kv_blocks)


def _attend_parts(q, k, v, plans, mask, bias, score_mod, softcap, scale, implementation):
    checks.some_plans(plans)
    parts = [
        attend(
            q,
            k,
            v,
            plan,
            mask=mask,
            bias=bias,
            score_mod=score_mod,
            softcap=softcap,
            scale=scale,
            return_lse=True,
            implementation=implementation,
        )
        for plan in plans
    ]
    return merge(parts)


def add_sinks(out: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    """Merges the sinks, which give no value, with what was computed over keys."""
    sink = jnp.broadcast_to(sinks.astype(jnp.float32)[:, None], lse.shape)
    # neither keys nor a sink: the difference of two infinities is no number, nor is its gradient
    nothing = jnp.isneginf(lse) & jnp.isneginf(sink)
    seen, sink = jnp.where(nothing, 0.0, lse), jnp.where(nothing, 0.0, sink)
    with_sink = jnp.logaddexp(seen, sink)
    share = jnp.swapaxes(jnp.exp(seen - with_sink), -1, -2)[..., None]
    return (out * share).astype(out.dtype), jnp.where(nothing, -jnp.inf, with_sink)
