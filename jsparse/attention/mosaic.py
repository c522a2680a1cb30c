"""Block-sparse attention by the Mosaic GPU kernel; what it cannot do, and why."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jsparse.attention import whole_tiles, xla
from jsparse.attention.block_sparse import Lists, Passes, Sizes
from jsparse.attention.logits import LogitRule, Operands
from jsparse.attention.separation import Separated, separate
from jsparse.types import InverseList, Mask
from pallas_kernels import _compat as kernels
from pallas_kernels.block_sparse_attention import mosaic, mosaic_backward
from pallas_kernels.block_sparse_attention.logits import LOG2_E, Rule, Tiles
from pallas_kernels.ring import LANES


def refusal(
    operands: Operands, mask: Mask | None, rule: LogitRule, block_q: int, block_kv: int
) -> str | None:
    """Why the kernel cannot do this here, or None if it can."""
    q, k, v = operands[:3]
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v must have one dtype for it, not {q.dtype}, {k.dtype} and {v.dtype}."
    reason = _device_refuses() or mosaic.refusal(
        q.dtype, block_q, block_kv, _padded_width(q), _padded_width(v)
    )
    if reason:
        return reason
    ragged = bool(rule.kv_len % block_kv)
    parts = _split(operands, mask, rule, rule.q_len, rule.kv_len, ragged)
    return parts if isinstance(parts, str) else None


def forward(
    operands: Operands, lists: Lists, rule: LogitRule, sizes: Sizes
) -> tuple[Float[Array, "batch q_len heads v_dim"], Float[Array, "batch heads q_len"]]:
    """Computes `(out, lse)` in f32 over the listed tiles; lengths are whole tiles."""
    q, k, v = operands[:3]
    parts = _split(operands, lists.mask, rule, q.shape[1], k.shape[1], sizes.ragged)
    if isinstance(parts, str):
        raise NotImplementedError(parts)
    out, lse = mosaic.forward(
        _pad_width(q),
        _pad_width(k),
        _pad_width(v),
        whole_tiles.by_query(lists, rule, sizes),
        _tiles(parts, rule, sizes),
    )
    return out[..., : v.shape[-1]].astype(jnp.float32), lse


def backward(
    operands: Operands,
    lists: Lists,
    inverse: InverseList,
    out: Float[Array, "batch q_len heads v_dim"],
    lse: Float[Array, "batch heads q_len"],
    d_out: Float[Array, "batch q_len heads v_dim"],
    d_lse: Float[Array, "batch heads q_len"],
    rule: LogitRule,
    sizes: Sizes,
) -> Operands:
    """Computes the gradient by every operand; by the loops of XLA where kernels have no room."""
    q, k, v = operands[:3]
    block_sizes = sizes.block_q, sizes.block_kv
    if mosaic_backward.refusal(*block_sizes, _padded_width(q), _padded_width(v)):
        return xla.backward(operands, lists, inverse, out, lse, d_out, d_lse, rule, sizes)

    def split(operands: Operands) -> _Parts:
        parts = _split(operands, lists.mask, rule, q.shape[1], k.shape[1], sizes.ragged)
        assert not isinstance(parts, str)  # the forward pass was refused then
        return parts

    def values(operands: Operands):
        modify = split(operands).modify
        return (modify.row_values, modify.column_values) if modify else ((), ())

    (row_values, column_values), pullback = jax.vjp(values, operands)
    empty = jnp.isneginf(lse)
    delta = jnp.swapaxes((out * d_out).sum(-1), 1, 2) - jnp.where(empty, 0.0, d_lse)
    problem = mosaic_backward.Problem(
        _pad_width(q),
        _pad_width(k),
        _pad_width(v),
        _pad_width(d_out.astype(q.dtype)),
        jnp.where(empty, jnp.inf, lse * LOG2_E),
        delta,
    )
    found = mosaic_backward.gradients(
        problem,
        whole_tiles.by_query(lists, rule, sizes),
        whole_tiles.by_key(inverse, lists.mask, rule, sizes),
        _tiles(split(operands), rule, sizes),
    )
    d_values = (
        tuple(map(_cotangent, found.row_values, row_values)),
        tuple(map(_cotangent, found.column_values, column_values)),
    )
    (d_modifiers,) = pullback(d_values)
    return d_modifiers._replace(
        q=found.q[..., : q.shape[-1]],
        k=found.k[..., : k.shape[-1]],
        v=found.v[..., : v.shape[-1]],
    )


def _cotangent(gradient: Array | None, value: Array) -> Any:
    """A gradient per sequence, head and token, summed where the value is shared."""
    if gradient is None:
        return np.zeros(value.shape, jax.dtypes.float0)
    shared = tuple(n for n in range(3) if value.shape[n] == 1)
    return gradient.sum(shared, keepdims=True)


PASSES = Passes(forward, backward, xla.differentiable_forward)


def _device_refuses() -> str | None:
    if kernels.interpreting():
        return None
    platform = jax.default_backend()
    if platform != "gpu":
        return f"it needs a Hopper GPU (compute capability 9.0); the default backend is {platform}."
    capability = getattr(jax.devices()[0], "compute_capability", "unknown")
    if not str(capability).startswith("9."):
        return f"it needs a Hopper GPU (compute capability 9.0); this one has {capability}."
    return None


class _Parts(NamedTuple):
    """What happens to logits: in every tile, and in those where something is hidden.

    None where nothing happens; a constant positive scale is no part of either.
    """

    modify: Separated | None
    hide: Separated | None


def _split(
    operands: Operands,
    mask: Mask | None,
    rule: LogitRule,
    q_len: int,
    kv_len: int,
    ragged: bool,
) -> _Parts | str:
    """The parts as kernels take them, or a sentence that says what they cannot take."""
    bias = operands.bias

    def modify(logit, q_index, kv_index, batch, head):
        extra = None
        if bias is not None:
            position = (batch, head, q_index, kv_index)
            at = tuple(i if n > 1 else 0 for i, n in zip(position, bias.shape, strict=True))
            extra = bias[at]
        return rule.modify(
            logit, extra, operands.scale, operands.captured, q_index, kv_index, batch, head
        )

    def hide(logit, q_index, kv_index, batch, head):
        return rule.hide(logit, mask, q_index, kv_index, batch, head, ragged=ragged)

    batches, _, heads, _ = operands.q.shape
    sizes = {"batches": batches, "heads": heads, "q_len": q_len, "kv_len": kv_len}
    modified = None if _only_scales(operands, rule) else separate(modify, **sizes)
    if isinstance(modified, str):
        return modified
    hidden = separate(hide, **sizes) if mask is not None or ragged else None
    return hidden if isinstance(hidden, str) else _Parts(modified, hidden)


def _only_scales(operands: Operands, rule: LogitRule) -> bool:
    # a factor that is not positive would turn the maximum of a row, and what is hidden, round
    return (
        operands.bias is None
        and not rule.changes_logits
        and rule.scale is not None
        and rule.scale > 0
    )


def _tiles(parts: _Parts, rule: LogitRule, sizes: Sizes) -> Tiles:
    modify, hide = parts
    return Tiles(
        sizes.block_q,
        sizes.block_kv,
        None if modify else rule.scale,
        modify and Rule(modify.rule, modify.row_values, modify.column_values, modify.gradient),
        hide and Rule(hide.rule, hide.row_values, hide.column_values),
    )


def _padded_width(x: Array) -> int:
    return -(-x.shape[-1] // LANES) * LANES


def _pad_width(x: Array) -> Array:
    missing = _padded_width(x) - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * 3 + [(0, missing)]) if missing else x
