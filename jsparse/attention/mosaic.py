"""Block-sparse attention by the Mosaic GPU kernels; what they cannot do, and why."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jsparse.attention import kernels, kv_major, mosaic_kv_major, packing, triton, whole_tiles, xla
from jsparse.attention.block_sparse import Lists, Passes, Sizes, inverse_of
from jsparse.attention.logits import LogitRule, Operands
from jsparse.attention.mosaic_rule import Lengths, Parts, split
from jsparse.types import BlockMask, Mask
from pallas_kernels import _compat
from pallas_kernels.block_sparse_attention import (
    mosaic,
    mosaic_ampere,
    mosaic_ampere_backward,
    mosaic_backward,
    mosaic_blackwell,
    mosaic_blackwell_backward,
    mosaic_skipping,
    walk,
)
from pallas_kernels.block_sparse_attention.chip import Backward, Forward, Problem
from pallas_kernels.block_sparse_attention.logits import LOG2_E


def refusal(
    operands: Operands, mask: Mask | None, rule: LogitRule, block_q: int, block_kv: int
) -> str | None:
    """Why the kernel cannot do this here, or None if it can."""
    reason = device_refusal()
    if reason:
        return reason
    q, _, v = operands[:3]
    widths = kernels.lanes(q), kernels.lanes(v)
    filling = _filling(chip().forward, block_q)
    reason = chip().forward.refusal(q.dtype, filling.filled, block_kv, *widths)
    if reason:
        return reason
    ragged = bool(rule.kv_len % block_kv)
    parts = _split(operands, mask, rule, filling, rule.rows, rule.kv_len, ragged)
    return parts if isinstance(parts, str) else None


def waste(plan: BlockMask) -> str | None:
    """Why another implementation is the better choice for a list: its programs keep no parts."""
    return None


def skipping_refusal(
    operands: Operands, mask: Mask | None, rule: LogitRule, block_q: int, block_kv: int
) -> str | None:
    """Why the kernel cannot do this here while it skips tiles on the way, or None."""
    reason = device_refusal()
    if reason:
        return reason
    kernel, q, v = chip().skipping, operands.q, operands.v
    if kernel is None:
        return "its kernels for this chip compute every listed tile and skip none on the way."
    reason = kernel.refusal(q.dtype, block_q, block_kv, kernels.lanes(q), kernels.lanes(v))
    if reason:
        return "where tiles are skipped " + reason
    ragged, as_they_are = bool(rule.kv_len % block_kv), packing.Filling(block_q, block_q)
    parts = _split(operands, mask, rule, as_they_are, rule.rows, rule.kv_len, ragged)
    return parts if isinstance(parts, str) else None


def forward(
    kernel: Forward, operands: Operands, lists: Lists, rule: LogitRule, sizes: Sizes
) -> tuple[Float[Array, "batch q_len heads v_dim"], Float[Array, "batch heads q_len"]]:
    """Computes `(out, lse)` in f32 over the listed tiles; lengths are whole tiles."""
    if kernel.for_one_tile and mosaic_kv_major.pays(lists, sizes):
        if mosaic_kv_major.refusal(operands, lists.mask, rule, sizes) is None:
            return mosaic_kv_major.forward(kernel, operands, lists, rule, sizes)
    q, k, v = operands[:3]
    filling = _filling(kernel, sizes.block_q)
    parts = _split(operands, lists.mask, rule, filling, q.shape[1], k.shape[1], sizes.ragged)
    if isinstance(parts, str):
        raise NotImplementedError(parts)
    out, lse = kernel(
        kernels.pad_lanes(filling.fill(q)),
        kernels.pad_lanes(k),
        kernels.pad_lanes(v),
        whole_tiles.by_query(lists, rule, sizes),
        parts.tiles(rule, filling.filled, sizes.block_kv),
    )
    out = filling.cut(out[..., : v.shape[-1]])
    return out.astype(jnp.float32), filling.cut(lse, axis=2)


def skipping_forward(
    kernel: Forward,
    operands: Operands,
    lists: Lists,
    log_threshold: Float[Array, "batch heads"],
    rule: LogitRule,
    sizes: Sizes,
) -> tuple[
    Float[Array, "batch q_len heads v_dim"],
    Float[Array, "batch heads q_len"],
    Bool[Array, "batch heads q_blocks width"],
]:
    """Computes `(out, lse)` without the tiles that are far below, and which entries were not."""
    q, k, v = operands[:3]
    as_they_are = packing.Filling(sizes.block_q, sizes.block_q)
    parts = _split(operands, lists.mask, rule, as_they_are, q.shape[1], k.shape[1], sizes.ragged)
    if isinstance(parts, str):
        raise NotImplementedError(parts)
    # queries past the last one have no say
    limits = jnp.where(
        jnp.arange(q.shape[1]) < rule.q_len, log_threshold[..., None] * LOG2_E, jnp.inf
    )
    out, lse, kept = kernel(
        kernels.pad_lanes(q),
        kernels.pad_lanes(k),
        kernels.pad_lanes(v),
        whole_tiles.by_query_in_order(lists, rule, sizes),
        parts.tiles(rule, sizes.block_q, sizes.block_kv),
        limits,
    )
    kept = kept.reshape(*kept.shape[:2], *lists.kv_indices.shape[2:])
    out = out[..., : v.shape[-1]].astype(jnp.float32)
    return out, lse, kernels.kept_entries(kept, lists)


def backward(
    chip: "Chip",
    operands: Operands,
    lists: Lists,
    out: Float[Array, "batch q_len heads v_dim"],
    lse: Float[Array, "batch heads q_len"],
    d_out: Float[Array, "batch q_len heads v_dim"],
    d_lse: Float[Array, "batch heads q_len"],
    rule: LogitRule,
    sizes: Sizes,
) -> Operands:
    """Computes the gradient by every operand, in another way where the chip's kernels cannot."""
    if chip.forward.for_one_tile and mosaic_kv_major.pays(lists, sizes):
        # by rows, each would be filled up to a product's height, and its gradient kept so
        refused = triton.device_refusal() or _refused_by_triton(operands, lists, rule, sizes)
        passes = kv_major.PASSES if refused else triton.PASSES
        return passes.backward(operands, lists, out, lse, d_out, d_lse, rule, sizes)
    q, k, v = operands[:3]
    filling = _filling(chip.forward, sizes.block_q)
    block_sizes = filling.filled, sizes.block_kv
    if chip.backward.refusal(*block_sizes, kernels.lanes(q), kernels.lanes(v)):
        return chip.otherwise(operands, lists, out, lse, d_out, d_lse, rule, sizes)

    def split(operands: Operands) -> Parts | str:
        return _split(operands, lists.mask, rule, filling, q.shape[1], k.shape[1], sizes.ragged)

    def compute(parts: Parts):
        lse2, delta = kernels.row_terms(out, lse, d_out, d_lse)
        problem = Problem(
            kernels.pad_lanes(filling.fill(q)),
            kernels.pad_lanes(k),
            kernels.pad_lanes(v),
            kernels.pad_lanes(filling.fill(d_out.astype(q.dtype))),
            # where nothing is seen there is no probability
            filling.fill(lse2, axis=2, value=jnp.inf),
            filling.fill(delta, axis=2),
        )
        found = chip.backward.gradients(
            problem,
            whole_tiles.by_query(lists, rule, sizes),
            whole_tiles.by_key(inverse_of(lists, sizes), lists.mask, rule, sizes),
            parts.tiles(rule, filling.filled, sizes.block_kv),
        )
        d_values = (found.row_values, found.column_values, ()) if parts.modify else ()
        return filling.cut(found.q), found.k, found.v, d_values

    return kernels.gradients(operands, split, compute)


def backward_by_triton(
    operands: Operands,
    lists: Lists,
    out: Float[Array, "batch q_len heads v_dim"],
    lse: Float[Array, "batch heads q_len"],
    d_out: Float[Array, "batch q_len heads v_dim"],
    d_lse: Float[Array, "batch heads q_len"],
    rule: LogitRule,
    sizes: Sizes,
) -> Operands:
    """Computes the gradient by every operand by the Triton kernels, or else by XLA's loops."""
    passes = xla.PASSES if _refused_by_triton(operands, lists, rule, sizes) else triton.PASSES
    return passes.backward(operands, lists, out, lse, d_out, d_lse, rule, sizes)


def _refused_by_triton(
    operands: Operands, lists: Lists, rule: LogitRule, sizes: Sizes
) -> str | None:
    return triton.problem_refusal(operands, lists.mask, rule, sizes.block_q, sizes.block_kv)


class Chip(NamedTuple):
    """What computes attention on a kind of chip, and the gradients that its kernels refuse.

    Tiles of `enough_queries` are not packed; see `packing`. `skipping` skips tiles on the way.
    """

    forward: Forward
    backward: Backward
    otherwise: Callable[..., Operands] = backward_by_triton
    enough_queries: int = kernels.LEAST_QUERIES
    skipping: Forward | None = None

    @property
    def passes(self) -> Passes:
        """The two passes, and what second derivatives go through."""
        return Passes(
            partial(forward, self.forward),
            partial(backward, self),
            xla.differentiable_forward,
            self.skipping and partial(skipping_forward, self.skipping),
        )


# by what their compute capabilities begin with
CHIPS = {
    "8": Chip(mosaic_ampere.FORWARD, mosaic_ampere_backward.BACKWARD),
    "9": Chip(
        mosaic.FORWARD,
        mosaic_backward.BACKWARD,
        xla.backward,
        walk.ROWS,
        mosaic_skipping.SKIPPING,
    ),
    "10": Chip(mosaic_blackwell.FORWARD, mosaic_blackwell_backward.BACKWARD),
}


def chip() -> Chip:
    """That of this machine's default device; Hopper where there is none for it."""
    interpreting = _compat.interpreting()
    found = _compat.interpreted_capability() if interpreting else kernels.capability()
    return CHIPS.get((found or "").split(".")[0], CHIPS["9"])


def device_refusal() -> str | None:
    """Why kernels cannot run on this machine's default device, or None if they can."""
    if _compat.interpreting():
        return None
    wanted = (
        "a Hopper or Blackwell GPU (compute capability 9.0 or 10.0) or, with jax 0.11 or newer, "
        "one of 8.0 to 8.9"
    )
    majors = ("8.", "9.", "10.") if _compat.HAS_MMA else ("9.", "10.")
    return kernels.device_refusal(wanted, lambda found: found.startswith(majors))


def least_side() -> int:
    """The side of the smallest square tiles whose products waste no rows on the chip."""
    return min(h for h in chip().forward.heights if h >= walk.ROWS)


def rows() -> packing.Rows:
    """How many rows tiles should have."""
    return packing.Rows(chip().enough_queries, max(chip().forward.heights))


def _filling(kernel: Forward, block_q: int) -> packing.Filling:
    return packing.Filling(block_q, kernel.height(block_q))


def _split(
    operands: Operands,
    mask: Mask | None,
    rule: LogitRule,
    filling: packing.Filling,
    q_len: int,
    kv_len: int,
    ragged: bool,
) -> Parts | str:
    """The parts as kernels take them, or a sentence that says what they cannot take."""

    def place(q_index, *where):
        return filling.row(q_index), *where

    batches, _, heads, _ = operands.q.shape
    lengths = Lengths(batches, heads, filling.length(q_len), kv_len)
    return split(operands, mask, rule, lengths, place, ragged=ragged)
