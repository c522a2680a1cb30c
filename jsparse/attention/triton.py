"""Block-sparse attention by the Triton kernels; what they cannot do, and why."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jsparse.attention import kernels, kv_major, packing, triton_columns, triton_kv_major, xla
from jsparse.attention.block_sparse import Lists, Passes, Sizes, inverse_of, plan_of
from jsparse.attention.logits import LogitRule, Operands
from jsparse.attention.separation import ELEMENTWISE, Separated
from jsparse.types import BlockMask, Mask
from pallas_kernels import _compat
from pallas_kernels.block_sparse_attention import triton, triton_skipping
from pallas_kernels.block_sparse_attention import triton_columns as columns
from pallas_kernels.block_sparse_attention import triton_kv_major as gathered_queries

_MOST_ROWS = 128  # of a tile
OPERATIONS = ELEMENTWISE - {"erf", "round"} | frozenset("ceil expm1 floor log1p pow sqrt".split())


def refusal(
    operands: Operands, mask: Mask | None, rule: LogitRule, block_q: int, block_kv: int
) -> str | None:
    """Why the kernels cannot do this here, or None if they can."""
    return device_refusal() or problem_refusal(operands, mask, rule, block_q, block_kv)


def device_refusal() -> str | None:
    """Why kernels cannot run on this machine's default device, or None if they can."""
    if _compat.interpreting_triton():
        return None
    return kernels.device_refusal(
        "an NVIDIA GPU of compute capability 8.0 or newer",
        lambda capability: capability.partition(".")[0].isdecimal() and float(capability) >= 8.0,
    )


def least_side() -> int:
    """The side of the smallest square tiles worth laying out: what their products are made of."""
    return 64


def rows() -> packing.Rows:
    """How many rows tiles should have."""
    return packing.Rows(kernels.LEAST_QUERIES, _MOST_ROWS)


def waste(plan: BlockMask) -> str | None:
    """Why another implementation is the better choice for lists of these sizes, or None.

    Where queries are gathered each entry's part is kept, in chunks of many: where few queries list
    a tile of keys, as pages of a cache are listed by one sequence, most of a chunk is for nothing.
    """
    row_by_row = triton.tiles_refusal(plan.block_q, plan.block_kv) is None
    if not _few(plan.block_q) or row_by_row or kv_major.pays(plan):
        return None
    return (
        f"where so few queries list each tile of keys, tiles of {plan.block_q} queries take it "
        "more memory than the keys; it computes them where it is asked for by name."
    )


def skipping_refusal(
    operands: Operands, mask: Mask | None, rule: LogitRule, block_q: int, block_kv: int
) -> str | None:
    """Why the kernels cannot do this here while they skip tiles on the way, or None."""
    q, _, v = operands[:3]
    sizes = q.dtype, block_q, block_kv, _padded_width(q), _padded_width(v)
    problem = operands, mask, rule, block_q, block_kv
    if rule.scale is not None and rule.scale <= 0:
        return f"where tiles are skipped it takes scales above 0, not {rule.scale}."
    return device_refusal() or triton_skipping.refusal(*sizes) or problem_refusal(*problem)


def problem_refusal(
    operands: Operands, mask: Mask | None, rule: LogitRule, block_q: int, block_kv: int
) -> str | None:
    """Why the kernels cannot do this on any device, or None if they can."""
    q, _, v = operands[:3]
    filling = _filling(block_q)
    rows = filling.filled if filling.filled <= _MOST_ROWS else block_q
    sizes = q.dtype, rows, block_kv, _padded_width(q), _padded_width(v)
    reason = triton.refusal(*sizes)
    if reason and (not _few(block_q) or gathered_queries.refusal(*sizes)):
        return reason
    ragged = bool(rule.kv_len % block_kv)
    parts = _tile_rule(operands, mask, rule, filling, rule.rows, rule.kv_len, ragged)
    return parts if isinstance(parts, str) else None


def forward(
    operands: Operands, lists: Lists, rule: LogitRule, sizes: Sizes
) -> tuple[Float[Array, "batch q_len heads v_dim"], Float[Array, "batch heads q_len"]]:
    """Computes `(out, lse)` in f32 over the listed tiles; lengths are whole tiles."""
    q, k, v = operands[:3]
    filling = _filling(sizes.block_q)
    lengths = q.shape[1], k.shape[1]
    parts = _tile_rule(operands, lists.mask, rule, filling, *lengths, sizes.ragged)
    if isinstance(parts, str):
        raise NotImplementedError(parts)
    problem, tiles = _problem(operands, parts, filling), _tiles(rule, sizes, parts, filling)
    if _gathers_queries(problem, lists, sizes):
        out, lse = triton_kv_major.forward(problem, lists, tiles, sizes)
    else:
        out, lse = triton.forward(problem, lists.kv_indices, lists.kv_num_blocks, tiles)
    return filling.cut(out[..., : v.shape[-1]]), filling.cut(lse, axis=2)


def skipping_forward(
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
    filling = _filling(sizes.block_q)  # of no rows: other tiles are refused
    lengths = q.shape[1], k.shape[1]
    parts = _tile_rule(operands, lists.mask, rule, filling, *lengths, sizes.ragged)
    if isinstance(parts, str):
        raise NotImplementedError(parts)
    problem, tiles = _problem(operands, parts, filling), _tiles(rule, sizes, parts, filling)
    skipping = triton_skipping.Skipping(log_threshold / np.log(2.0), rule.q_len)
    found = lists.kv_indices, lists.kv_num_blocks
    out, lse, kept = triton_skipping.forward(problem, *found, skipping, tiles)
    return out[..., : v.shape[-1]], lse, kernels.kept_entries(kept, lists)


def backward(
    operands: Operands,
    lists: Lists,
    out: Float[Array, "batch q_len heads v_dim"],
    lse: Float[Array, "batch heads q_len"],
    d_out: Float[Array, "batch q_len heads v_dim"],
    d_lse: Float[Array, "batch heads q_len"],
    rule: LogitRule,
    sizes: Sizes,
) -> Operands:
    """Computes the gradient by every operand."""
    q, k, v = operands[:3]
    widths = _padded_width(q), _padded_width(v)
    refused = max(widths) > triton.WIDEST_OF_GRADIENTS
    if _few(sizes.block_kv):
        refused |= columns.spills(q.dtype, sizes.block_q, *widths)
    if refused:
        return xla.backward(operands, lists, out, lse, d_out, d_lse, rule, sizes)
    filling = _filling(sizes.block_q)
    filled_sizes = sizes._replace(block_q=filling.filled)
    looped = False

    def split(operands: Operands) -> Separated | str | None:
        lengths = q.shape[1], k.shape[1]
        return _tile_rule(operands, lists.mask, rule, filling, *lengths, sizes.ragged)

    def compute(parts: Separated | None):
        nonlocal looped
        problem, tiles = _problem(operands, parts, filling), _tiles(rule, sizes, parts, filling)
        lse2, delta = kernels.row_terms(out, lse, d_out, d_lse)
        cotangents = triton.Cotangents(
            _pad_width(filling.fill(d_out.astype(q.dtype))),
            # where nothing is seen there is no probability
            filling.fill(lse2, axis=2, value=jnp.inf),
            filling.fill(delta, axis=2),
        )
        if _gathers_queries(problem, lists, sizes):
            d_q, per_query = triton_kv_major.d_queries(problem, cotangents, lists, tiles, sizes)
        else:
            found = lists.kv_indices, lists.kv_num_blocks
            d_q, per_query = triton.d_queries(problem, cotangents, *found, tiles)
        if _few(sizes.block_kv):
            d_k, d_v = triton_columns.d_keys(problem, cotangents, lists, tiles, filled_sizes)
            per_key = (None,) * len(problem.values)
            looped = bool(triton.per_key(problem))
        else:
            inverse = inverse_of(lists, sizes)
            turned = inverse.offsets, inverse.q_indices
            d_k, d_v, per_key = triton.d_keys(problem, cotangents, *turned, tiles)
        d_q = filling.cut(d_q)
        if parts is None:
            return d_q, d_k, d_v, ()
        looped |= any(jnp.issubdtype(x.dtype, jnp.inexact) for x in parts.pair_values)
        rows, columns = len(parts.row_values), len(parts.column_values)
        d_values = (
            tuple(d if d is None else d[..., 0] for d in per_query[:rows]),
            tuple(d if d is None else d[..., 0, :] for d in per_key[rows : rows + columns]),
            (None,) * len(parts.pair_values),
        )
        return d_q, d_k, d_v, d_values

    result = kernels.gradients(operands, split, compute)
    if not looped:
        return result
    # values per pair, and per key where columns are gathered, have theirs from the loops of XLA,
    # which drops these where nobody asks
    by_loops = xla.backward(operands, lists, out, lse, d_out, d_lse, rule, sizes)
    return by_loops._replace(q=result.q, k=result.k, v=result.v)


PASSES = Passes(forward, backward, xla.differentiable_forward, skipping_forward)


def _tile_rule(
    operands: Operands,
    mask: Mask | None,
    rule: LogitRule,
    filling: packing.Filling,
    q_len: int,
    kv_len: int,
    ragged: bool,
) -> Separated | str | None:
    options: dict[str, Any] = {"operations": OPERATIONS, "pairs": rule.rows * rule.kv_len}
    return kernels.tile_rule(operands, mask, rule, filling, q_len, kv_len, ragged, **options)


def _problem(
    operands: Operands, parts: Separated | None, filling: packing.Filling
) -> triton.Problem:
    values: tuple[Array, ...] = ()
    if parts is not None:
        values = (
            *(x[..., None] for x in parts.row_values),
            *(x[..., None, :] for x in parts.column_values),
            *parts.pair_values,
        )
    q, k, v = operands[:3]
    return triton.Problem(_pad_width(filling.fill(q)), _pad_width(k), _pad_width(v), values)


def _tiles(
    rule: LogitRule, sizes: Sizes, parts: Separated | None, filling: packing.Filling
) -> triton.Tiles:
    """What the kernels do with logits; their values stand in one row, here they are in three."""
    if parts is None:
        return triton.Tiles(filling.filled, sizes.block_kv, rule.scale)
    rows, columns = len(parts.row_values), len(parts.column_values)

    def by_kind(values):
        return values[:rows], values[rows : rows + columns], values[rows + columns :]

    def changed(logits, q_index, kv_index, values):
        return parts.rule(logits, q_index, kv_index, *by_kind(values))

    def gradient(logits, q_index, kv_index, values, d_logits):
        per_query, per_key, per_pair = by_kind(values)
        d_changed, *d_floats = parts.gradient(
            logits, q_index, kv_index, per_query, per_key, d_logits, per_pair
        )
        floats = iter(d_floats)
        all_values = (x for kind in parts.values for x in kind)
        return d_changed, *(next(floats) if x.dtype == jnp.float32 else None for x in all_values)

    return triton.Tiles(filling.filled, sizes.block_kv, None, changed, gradient)


def _few(tokens: int) -> bool:
    """Whether tiles have so few tokens on a side that those of several are gathered."""
    return tokens < triton.LEAST_SIDE


def _gathers_queries(problem: triton.Problem, lists: Lists, sizes: Sizes) -> bool:
    """Whether the queries of several tiles are gathered that list the same keys.

    That reads a tile of keys once for them; row by row it is read for each tile of queries.
    """
    if not _few(sizes.block_q):
        return False
    widths = problem.q.shape[-1], problem.v.shape[-1]
    arguments = problem.q.dtype, sizes.block_q, sizes.block_kv, *widths
    if gathered_queries.refusal(*arguments):
        return False
    return bool(triton.refusal(*arguments)) or kv_major.pays(plan_of(lists, sizes))


def _filling(block_q: int) -> packing.Filling:
    """Tiles that fill products have as many rows as a power of two."""
    return packing.Filling(block_q, block_q if _few(block_q) else 1 << (block_q - 1).bit_length())


def _padded_width(x: Array) -> int:
    """A power of two, or what few of them make: kernels read pieces of wide rows."""
    width = x.shape[-1]
    return -(-width // 64) * 64 if width > 256 else max(16, 1 << (width - 1).bit_length())


def _pad_width(x: Array) -> Array:
    return kernels.pad_width(x, _padded_width(x))
