"""Block-sparse attention by the Mosaic GPU kernel; what it cannot do, and why."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jsparse.attention import kernels, xla
from jsparse.attention.block_sparse import Lists, Passes, Sizes
from jsparse.attention.logits import LogitRule, Operands
from jsparse.attention.separation import Separated
from jsparse.types import InverseList, Mask
from pallas_kernels import _compat
from pallas_kernels.block_sparse_attention import mosaic, mosaic_backward
from pallas_kernels.ring import LANES


def refusal(
    operands: Operands, mask: Mask | None, rule: LogitRule, block_q: int, block_kv: int
) -> str | None:
    """Why the kernel cannot do this here, or None if it can."""
    q, _, v = operands[:3]
    reason = device_refusal() or mosaic.refusal(
        q.dtype, block_q, block_kv, _padded_width(q), _padded_width(v)
    )
    if reason:
        return reason
    ragged = bool(rule.kv_len % block_kv)
    tile_rule = kernels.tile_rule(operands, mask, rule, rule.q_len, rule.kv_len, ragged)
    return tile_rule if isinstance(tile_rule, str) else None


def forward(
    operands: Operands, lists: Lists, rule: LogitRule, sizes: Sizes
) -> tuple[Float[Array, "batch q_len heads v_dim"], Float[Array, "batch heads q_len"]]:
    """Computes `(out, lse)` in f32 over the listed tiles; lengths are whole tiles."""
    q, k, v = operands[:3]
    tile_rule = kernels.tile_rule(operands, lists.mask, rule, q.shape[1], k.shape[1], sizes.ragged)
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

    def split(operands: Operands) -> Separated | str | None:
        lengths = q.shape[1], k.shape[1]
        return kernels.tile_rule(operands, lists.mask, rule, *lengths, sizes.ragged)

    def compute(parts: Separated | None):
        lse2, delta = kernels.row_terms(out, lse, d_out, d_lse)
        problem = mosaic_backward.Problem(
            _pad_width(q),
            _pad_width(k),
            _pad_width(v),
            _pad_width(d_out.astype(q.dtype)),
            lse2,
            delta,
            parts.row_values if parts else (),
            parts.column_values if parts else (),
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
        d_values = (found.row_values, found.column_values, ()) if parts else ()
        return *found[:3], d_values

    return kernels.gradients(operands, split, compute)


PASSES = Passes(forward, backward, xla.differentiable_forward)


def device_refusal() -> str | None:
    """Why kernels cannot run on this machine's default device, or None if they can."""
    if _compat.interpreting():
        return None
    wanted = "a Hopper GPU (compute capability 9.0)"
    return kernels.device_refusal(wanted, lambda capability: capability.startswith("9."))


def _padded_width(x: Array) -> int:
    return -(-x.shape[-1] // LANES) * LANES


def _pad_width(x: Array) -> Array:
    return kernels.pad_width(x, _padded_width(x))
