"""`attend`: attention for a plan and a mask, by whichever implementation can do it here."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jsparse import _compat, checks
from jsparse.attention import (
    grouped,
    kv_major,
    mosaic,
    pyramid,
    reference,
    triton,
    xla,
)
from jsparse.attention.block_sparse import Passes, block_sparse_attention, skipping_attention
from jsparse.attention.logits import LogitRule, Operands, ScoreMod, hoist
from jsparse.attention.packing import Rows, pack, unpack
from jsparse.attention.problem import Lowered, Plan, Problem
from jsparse.core.merging import merge
from jsparse.core.tiling import block_mask, every_tile, with_inverse
from jsparse.types import BlockMask, BlockPyramid, Mask, TileGrid, TokenGroups
from jsparse.types.pytree import flatten_axes, flatten_batch

P = TypeVar("P", bound=Plan)
IMPLEMENTATIONS = ("reference", "xla", "mosaic", "triton")
DEFAULT_BLOCK = 128


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
        Finite and above 0; None for no cap.
      scale: Factor on the logits, default `dim ** -0.5`. An array has a gradient.
      return_lse: Also return the log-sum-exp of each row's logits, sink included. Differentiable.
      implementation: "reference", "xla", "mosaic" or "triton"; default the fastest that can do it.

    Returns:
      `out [*batch, q_len, heads, v_dim]` in v's dtype, or `(out, lse [*batch, heads, q_len])`.

    Raises:
      ValueError: if arguments do not fit each other; the sentence names the remedy.
      NotImplementedError: if the named implementation cannot do this job here.
    """
    options = {"mask": mask, "bias": bias, "score_mod": score_mod, "softcap": softcap}
    attend_to = partial(_attend, q, k, v, **options, scale=scale, implementation=implementation)
    if isinstance(plan, Sequence):
        checks.some_plans(plan)
        out, lse = merge([attend_to(part) for part in plan])
    else:
        out, lse = attend_to(plan)
    if sinks is not None:
        checks.sinks_shape(sinks, q.shape[-2])
        out, lse = add_sinks(out, lse, sinks)
    if out.dtype != v.dtype:
        out = out.astype(v.dtype)
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
        if isinstance(plan, BlockPyramid) and plan.pooled_k is not None:
            checks.pooled_operands(plan, kv_heads, dim, v.shape[-1])
        plan = _flatten_plan(plan, batch_shape, heads, kv_heads)
    if bias is not None:
        checks.bias_array(bias)
        full = (*batch_shape, heads, q_len, kv_len)
        bias = bias.reshape((1,) * (len(full) - bias.ndim) + bias.shape)
        checks.broadcasts("bias", bias.shape, full)
        bias = flatten_axes(_no_wider_than_logits(jnp.asarray(bias)), 3, batch_shape)
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
        checks.soft_cap(softcap)
        softcap = float(softcap)
    rule = LogitRule(q_len, kv_len, static_scale, softcap, score_mod)
    operands = Operands(*_one_batch((q, k, v)), bias=bias, scale=traced_scale, captured=captured)
    return Problem(operands, plan, mask, rule, batch_shape)


@jax.jit
def _one_batch(tensors: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(x.reshape(-1, *x.shape[-3:]) for x in tensors)


def _no_wider_than_logits(bias: Array) -> Array:
    return bias.astype(jnp.float32) if bias.dtype.itemsize > 4 else bias


def _flatten_plan(plan: P, batch_shape: tuple[int, ...], heads: int, kv_heads: int) -> P:
    """Brings a plan's batch axes to one, of length 1 where all sequences share the lists."""
    lists = plan.block_mask if isinstance(plan, BlockPyramid) else plan
    checks.list_heads(lists.list_heads, heads, kv_heads)
    checks.batch_fits("plan", lists.batch_shape, batch_shape)
    if isinstance(lists, BlockMask):
        checks.listed_entries(lists)
    if isinstance(plan, TokenGroups):
        checks.grouped_tokens(plan)
    if isinstance(plan, BlockPyramid) and plan.levels is not None:
        checks.listed_levels(plan)
    return flatten_batch(plan, batch_shape)


def run(problem: Problem, implementation: str | None) -> Any:
    """Computes `(out, lse)` in f32, where tiles may be skipped `(out, lse, kept)`."""
    if implementation is not None:
        checks.one_of(IMPLEMENTATIONS, implementation=implementation)
        lowered = _lowered(problem, implementation)
        if isinstance(lowered, str):
            raise NotImplementedError(f"implementation={implementation!r}: {lowered}")
    else:
        implementation, lowered, refused = choose(problem)
        if implementation is None or lowered is None:
            reasons = " ".join(f"{name}: {reason}" for name, reason in refused.items())
            raise NotImplementedError(f"No implementation can do this here. {reasons}")
    calls = _CALLS if problem.log_threshold is None else _SKIPPING_CALLS
    return lowered.finish(*map(calls[implementation], lowered.parts))


class Choice(NamedTuple):
    """What would run.

    Attributes:
      implementation: The one that would, None if none can.
      lowered: What it would compute.
      refused: Why each faster one would not.
    """

    implementation: str | None
    lowered: Lowered | None
    refused: dict[str, str]


def choose(problem: Problem) -> Choice:
    """The fastest implementation that can compute a problem here."""
    refused = {}
    for name in ("mosaic", "triton", "xla"):
        lowered = _lowered(problem, name)
        adapter = _ADAPTERS.get(name)
        if adapter and not isinstance(lowered, str):
            lowered = next(filter(None, (_waste(adapter, x) for x in lowered.parts)), lowered)
        if not isinstance(lowered, str):
            return Choice(name, lowered, refused)
        refused[name] = lowered
    return Choice(None, None, refused)


def _lowered(problem: Problem, implementation: str) -> Lowered | str:
    """What an implementation would compute, or why it cannot."""
    plan, own = problem.plan, Lowered((problem,), lambda part: part)
    if isinstance(plan, BlockPyramid):
        if problem.operands.bias is not None or problem.rule.score_mod is not None:
            return "bias and score_mod act on pairs; a pooled column stands for many and has none."
    if problem.log_threshold is not None and not isinstance(plan, BlockMask | None):
        return f"tiles are skipped along a list of them; {type(plan).__name__} is none."
    if implementation == "reference":
        return own
    adapter = _ADAPTERS.get(implementation)
    reason = adapter and adapter.device_refusal()
    if reason:
        return reason
    least_side = adapter.least_side() if adapter else 1
    if isinstance(plan, TokenGroups):
        own = grouped.lower(problem, least_side)
    elif isinstance(plan, BlockPyramid):
        own = pyramid.lower(problem, least_side)
    reasons = (adapter and _part_refusal(adapter, part) for part in own.parts)
    return next(filter(None, reasons), own)


def _part_refusal(adapter: Any, part: Problem) -> str | None:
    operands, plan, mask, rule, *_ = part
    refusal = adapter.refusal
    block_q = block_kv = DEFAULT_BLOCK
    if isinstance(plan, BlockMask):
        if part.log_threshold is None:
            operands, plan, rule = pack(operands, plan, rule, adapter.rows())
        block_q, block_kv = plan.block_q, plan.block_kv
    if part.log_threshold is not None:
        refusal = adapter.skipping_refusal
    return refusal(operands, mask, rule, block_q, block_kv)


def _waste(adapter: Any, part: Problem) -> str | None:
    """Why another implementation is the better choice for a lowered problem's lists, or None."""
    plan = part.plan
    if not isinstance(plan, BlockMask) or part.log_threshold is not None:
        return None
    return adapter.waste(pack(part.operands, plan, part.rule, adapter.rows())[1])


def _executed(
    operands: Operands,
    plan: BlockMask,
    mask: Mask | None,
    rule: LogitRule,
    passes: Callable[[BlockMask], Passes],
    rows: Rows,
) -> tuple[Array, Array]:
    plan = plan.without_missing_blocks()
    operands, plan, rule = pack(operands, plan, rule, rows)
    out, lse = block_sparse_attention(operands, plan, mask, rule, passes(plan))
    return unpack(out, lse, rule.group)


# compiled once per shape also where the caller is not: the loops would be compiled at every call
_compiled = jax.jit(_executed, static_argnames=("rule", "passes", "rows"))
_compiled_reference = jax.jit(reference.forward, static_argnames="rule")
_compiled_skipping = jax.jit(skipping_attention, static_argnames=("rule", "passes"))


def _reference(problem: Problem) -> tuple[Array, Array]:
    operands, plan, mask, rule, *_ = problem
    call = _compiled_reference if rule.score_mod is None else reference.forward
    return call(operands, plan, mask, rule)


def _along(problem: Problem) -> tuple[Operands, BlockMask, Mask | None, Array, LogitRule]:
    """What goes along which tiles, and what it skips."""
    operands, _, mask, rule, _, log_threshold = problem
    assert log_threshold is not None
    plan = with_plan(problem).without_missing_blocks()
    return operands, plan, mask, log_threshold, rule


def _reference_skipping(problem: Problem) -> tuple[Array, Array, BlockMask]:
    return reference.skipping_forward(*_along(problem))


def _xla(problem: Problem) -> tuple[Array, Array]:
    # a score_mod is a new function at every call, and a cache would only keep it alive
    keeps = problem.rule.score_mod is None
    call = _compiled if keeps else _executed
    return call(
        problem.operands,
        # a few queries, as in a step of decoding, are no whole tile
        with_plan(problem, min(DEFAULT_BLOCK, problem.rule.q_len)),
        problem.mask,
        rule=problem.rule,
        passes=kv_major.passes,
        rows=Rows(xla.LEAST_QUERIES),
    )


def _xla_skipping(problem: Problem) -> tuple[Array, Array, BlockMask]:
    call = _compiled_skipping if problem.rule.score_mod is None else skipping_attention
    return call(*_along(problem), xla.PASSES)


def _by_kernels(
    adapter: Any, passes: Callable[[], Passes], problem: Problem
) -> tuple[Array, Array]:
    of_any, plan = passes(), with_plan(problem)
    # as in `planned`: what no gradient needs is left out of a program
    if problem.plan is None and problem.mask is not None and _compat.is_traced(problem.operands):
        plan = with_inverse(plan, problem.mask)
    return _executed(
        problem.operands,
        plan,
        problem.mask,
        problem.rule,
        lambda plan: of_any,
        adapter.rows(),
    )


def _skipping_by_kernels(
    passes: Callable[[], Passes], problem: Problem
) -> tuple[Array, Array, BlockMask]:
    return skipping_attention(*_along(problem), passes())


_CALLS = {
    "reference": _reference,
    "xla": _xla,
    "mosaic": partial(_by_kernels, mosaic, lambda: mosaic.chip().passes),
    "triton": partial(_by_kernels, triton, lambda: triton.PASSES),
}
# with tiles skipped on the way
_SKIPPING_CALLS: dict[str, Callable[[Problem], tuple[Array, Array, BlockMask]]] = {
    "reference": _reference_skipping,
    "xla": _xla_skipping,
    "mosaic": partial(_skipping_by_kernels, lambda: mosaic.chip().passes),
    "triton": partial(_skipping_by_kernels, lambda: triton.PASSES),
}
_ADAPTERS: dict[str, Any] = {"mosaic": mosaic, "triton": triton}


def with_plan(problem: Problem, block_q: int = DEFAULT_BLOCK) -> BlockMask:
    """A lowered problem's tile list; where there is none, the tiles its mask touches, or all."""
    plan, mask, rule = problem.plan, problem.mask, problem.rule
    if plan is not None:
        assert isinstance(plan, BlockMask)
        return plan
    sizes = {"block_q": block_q, "block_kv": DEFAULT_BLOCK}
    if mask is not None:
        plan = block_mask(mask, rule.q_len, rule.kv_len, **sizes)
        return flatten_batch(plan, problem.operands.q.shape[:1])
    return flatten_batch(every_tile(TileGrid(rule.q_len, rule.kv_len, **sizes)), (1,))


def _attend(q, k, v, plan, *, implementation, **options) -> tuple[Array, Array]:
    """What `attend` computes for one plan without sinks, in f32."""
    checks.no_explicit_axes(q=q, k=k, v=v)
    problem = prepare(q, k, v, plan, **options)
    return _in_batches(*run(problem, implementation), problem.batch_shape)


@partial(jax.jit, static_argnums=2)
def _in_batches(out: Array, lse: Array, batch_shape: tuple[int, ...]) -> tuple[Array, Array]:
    return (out.reshape(*batch_shape, *out.shape[1:]), lse.reshape(*batch_shape, *lse.shape[1:]))


@jax.jit
def add_sinks(out: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    """Merges the sinks, which give no value, with what was computed over keys."""
    sink = jnp.broadcast_to(sinks.astype(jnp.float32)[:, None], lse.shape)
    # neither keys nor a sink: the difference of two infinities is no number, nor is its gradient
    nothing = jnp.isneginf(lse) & jnp.isneginf(sink)
    seen, sink = jnp.where(nothing, 0.0, lse), jnp.where(nothing, 0.0, sink)
    with_sink = jnp.logaddexp(seen, sink)
    share = jnp.swapaxes(jnp.exp(seen - with_sink), -1, -2)[..., None]
    return (out * share).astype(out.dtype), jnp.where(nothing, -jnp.inf, with_sink)
