"""Block-sparse attention by the Mosaic GPU kernel; what it cannot do, and why."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jsparse.attention import xla
from jsparse.attention.block_sparse import Lists, Passes, Sizes
from jsparse.attention.logits import LogitRule, Operands
from jsparse.attention.separation import Separated, separate
from jsparse.types import InverseList, Mask
from pallas_kernels import _compat as kernels
from pallas_kernels.block_sparse_attention import mosaic, mosaic_backward
from pallas_kernels.ring import LANES


def refusal(
    operands: Operands, mask: Mask | None, rule: LogitRule, block_q: int, block_kv: int
) -> str | None:
    """Why the kernel cannot do this here, or None if it can."""
    q, k, v = operands[:3]
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v must have one dtype for it, not {q.dtype}, {k.dtype} and {v.dtype}."
    reason = device_refusal() or mosaic.refusal(
        q.dtype, block_q, block_kv, _padded_width(q), _padded_width(v)
    )
    if reason:
        return reason
    ragged = bool(rule.kv_len % block_kv)
    tile_rule = _tile_rule(operands, mask, rule, rule.q_len, rule.kv_len, ragged)
    return tile_rule if isinstance(tile_rule, str) else None


def forward(
    operands: Operands, lists: Lists, rule: LogitRule, sizes: Sizes
) -> tuple[Float[Array, "batch q_len heads v_dim"], Float[Array, "batch heads q_len"]]:
    """Computes `(out, lse)` in f32 over the listed tiles; lengths are whole tiles."""
    q, k, v = operands[:3]
    tile_rule = _tile_rule(operands, lists.mask, rule, q.shape[1], k.shape[1], sizes.ragged)
    if isinstance(tile_rule, str):
        raise NotImplementedError(tile_rule)
    out, lse = mosaic.forward(
        _pad_width(q),
        _pad_width(k),
        _pad_width(v),
        lists.kv_indices,
        lists.kv_num_blocks,
        block_q=sizes.block_q,
        block_kv=sizes.block_kv,
        scale=rule.scale if tile_rule is None else None,
        rule=tile_rule and tile_rule.rule,
        row_values=tile_rule.row_values if tile_rule else (),
        column_values=tile_rule.column_values if tile_rule else (),
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
    tiles = sizes.block_q, sizes.block_kv
    if mosaic_backward.refusal(*tiles, _padded_width(q), _padded_width(v)):
        return xla.backward(operands, lists, inverse, out, lse, d_out, d_lse, rule, sizes)

    def split(operands: Operands) -> Separated | None:
        parts = _tile_rule(operands, lists.mask, rule, q.shape[1], k.shape[1], sizes.ragged)
        assert not isinstance(parts, str)  # the forward pass was refused then
        return parts

    def values(operands: Operands):
        parts = split(operands)
        return (parts.row_values, parts.column_values) if parts else ((), ())

    parts = split(operands)
    (row_values, column_values), pullback = jax.vjp(values, operands)
    empty = jnp.isneginf(lse)
    delta = jnp.swapaxes((out * d_out).sum(-1), 1, 2) - jnp.where(empty, 0.0, d_lse)
    problem = mosaic_backward.Problem(
        _pad_width(q),
        _pad_width(k),
        _pad_width(v),
        _pad_width(d_out.astype(q.dtype)),
        jnp.where(empty, jnp.inf, lse * mosaic.LOG2_E),
        delta,
        row_values,
        column_values,
    )
    found = mosaic_backward.gradients(
        problem,
        (lists.kv_indices, lists.kv_num_blocks),
        (inverse.offsets, inverse.q_indices),
        mosaic_backward.Tiles(
            *tiles,
            rule.scale if parts is None else None,
            parts and parts.rule,
            parts and parts.gradient,
        ),
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


def device_refusal() -> str | None:
    """Why kernels cannot run on this machine's default device, or None if they can."""
    if kernels.interpreting():
        return None
    platform = jax.default_backend()
    if platform != "gpu":
        return f"it needs a Hopper GPU (compute capability 9.0); the default backend is {platform}."
    capability = getattr(jax.devices()[0], "compute_capability", "unknown")
    if not str(capability).startswith("9."):
        return f"it needs a Hopper GPU (compute capability 9.0); this one has {capability}."
    return None


def _tile_rule(
    operands: Operands,
    mask: Mask | None,
    rule: LogitRule,
    q_len: int,
    kv_len: int,
    ragged: bool,
) -> Separated | str | None:
    """What happens to logits, as the kernel takes it; None where only a constant scales them."""
    bias = operands.bias
    if mask is None and bias is None and not ragged and not rule.changes_logits:
        return None

    def on_scalars(logit, q_index, kv_index, batch, head):
        extra = None
        if bias is not None:
            position = (batch, head, q_index, kv_index)
            at = tuple(i if n > 1 else 0 for i, n in zip(position, bias.shape, strict=True))
            extra = bias[at]
        logit = rule.modify(
            logit, extra, operands.scale, operands.captured, q_index, kv_index, batch, head
        )
        return rule.hide(logit, mask, q_index, kv_index, batch, head, ragged=ragged)

    batches, _, heads, _ = operands.q.shape
    return separate(on_scalars, batches=batches, heads=heads, q_len=q_len, kv_len=kv_len)


def _padded_width(x: Array) -> int:
    return -(-x.shape[-1] // LANES) * LANES


def _pad_width(x: Array) -> Array:
    missing = _padded_width(x) - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * 3 + [(0, missing)]) if missing else x
