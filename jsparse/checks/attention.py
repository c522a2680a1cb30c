"""Checks of what attention is called with: operands, plans, masks, layers."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jsparse import _compat
from jsparse.checks.values import (
    at_most,
    integers,
    non_negative,
    positive,
    positive_number,
    unit_interval,
)


def tile_grid(grid: Any) -> None:
    """The lengths and tile sizes are positive."""
    positive(**grid._asdict())


def dense_tiles(tiles: Any, grid: Any) -> None:
    """One bool per tile of the grid."""
    shape = getattr(tiles, "shape", None)
    if shape is None or len(shape) < 3:
        raise ValueError(f"tiles has shape {shape}; expected [*batch, heads, q_blocks, kv_blocks].")
    if not jnp.issubdtype(tiles.dtype, jnp.bool_):
        raise ValueError(f"tiles holds {tiles.dtype}; it must hold bools, True means attend.")
    if tuple(shape[-2:]) != (grid.q_blocks, grid.kv_blocks):
        raise ValueError(
            f"tiles has {shape[-2]} x {shape[-1]} tiles; q_len={grid.q_len}, kv_len={grid.kv_len} "
            f"in tiles of {grid.block_q} x {grid.block_kv} make {grid.q_blocks} x "
            f"{grid.kv_blocks}."
        )


def block_lists(kv_indices: Any, kv_num_blocks: Any, grid: Any) -> None:
    """Lists and counts fit each other and the grid."""
    integers(kv_indices=kv_indices, kv_num_blocks=kv_num_blocks)
    if kv_indices.ndim < 3:
        raise ValueError(
            f"kv_indices has shape {kv_indices.shape}; expected [*batch, heads, q_blocks, width]."
        )
    if kv_indices.shape[:-1] != kv_num_blocks.shape:
        raise ValueError(
            f"kv_num_blocks has shape {kv_num_blocks.shape}; kv_indices of shape "
            f"{kv_indices.shape} needs {kv_indices.shape[:-1]}."
        )
    if kv_indices.shape[-2] != grid.q_blocks:
        raise ValueError(
            f"kv_indices has {kv_indices.shape[-2]} rows; q_len={grid.q_len} in tiles of "
            f"{grid.block_q} makes {grid.q_blocks}."
        )


def same_grid(left: Any, right: Any) -> None:
    """Two plans have the same lengths and tiles."""
    if left != right:
        raise ValueError(f"The plans differ in lengths or tiles: {left} and {right}.")


def levels(values: Any, block_mask: Any) -> None:
    """A level per entry."""
    integers(levels=values)
    if values.shape != block_mask.kv_indices.shape:
        raise ValueError(
            f"levels has shape {values.shape}; the list has {block_mask.kv_indices.shape}."
        )


def concrete_levels(values: Any) -> None:
    """The highest of some levels can be read."""
    if _compat.is_traced(values):
        raise ValueError("levels is traced; say the highest there may be by top_level=.")


def level_range(values: Any, top_level: int, block_mask: Any) -> None:
    """Levels cut blocks into whole parts, and concrete ones are none but those."""
    non_negative(top_level=top_level)
    if block_mask.block_kv % 2**top_level:
        raise ValueError(
            f"top_level={top_level} averages {2**top_level} tokens; block_kv={block_mask.block_kv} "
            "must be a multiple of that."
        )
    if not _compat.is_traced((values, block_mask)):
        counted = np.asarray(values)[np.asarray(block_mask.entries())]
        outside = counted[(counted < 0) | (counted > top_level)]
        if outside.size:
            raise ValueError(
                f"levels holds {outside[0]}; they run from 0 to top_level={top_level}. Leave an "
                "entry that is not wanted out of the list."
            )


def pooled_operands(plan: Any, kv_heads: int, dim: int, v_dim: int) -> None:
    """A plan's summaries are of the heads and widths of the keys and values."""
    for name, value, width in (
        ("pooled_k", plan.pooled_k, dim),
        ("pooled_v", plan.pooled_v, v_dim),
    ):
        if value.shape[-2:] != (kv_heads, width):
            raise ValueError(
                f"The plan's {name} has {value.shape[-2]} heads of width {value.shape[-1]}; k and "
                f"v ask for {kv_heads} of {width}."
            )


def pooled_columns(pooled_k: Any, pooled_v: Any, log_count: Any, block_mask: Any) -> None:
    """A pooled key, value and log count per kv block."""
    blocks = block_mask.grid.kv_blocks
    if pooled_k.shape[-3] != blocks:
        raise ValueError(f"pooled_k has {pooled_k.shape[-3]} columns; there are {blocks} blocks.")
    if pooled_v.shape[:-1] != pooled_k.shape[:-1] or log_count.shape != pooled_k.shape[:-1]:
        raise ValueError(
            f"pooled_k {pooled_k.shape}, pooled_v {pooled_v.shape} and log_count "
            f"{log_count.shape} must agree in [*batch, kv_blocks, kv_heads]."
        )


def attention_inputs(q: Any, k: Any, v: Any, names: tuple[str, str, str] = ("q", "k", "v")) -> None:
    """Query, key and value fit each other; `names` are what the caller calls them."""
    of_q, of_k, of_v = names
    for name, x in zip(names, (q, k, v), strict=True):
        if not hasattr(x, "ndim") or x.ndim < 3:
            raise ValueError(
                f"{name} has shape {getattr(x, 'shape', None)}; expected [*batch, length, heads, "
                "dim]: add a heads axis of 1 if there is one head."
            )
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise ValueError(
                f"{name} holds {x.dtype}; it must be float32, bfloat16 or float16: cast it first."
            )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"{of_q}, {of_k}, {of_v} hold {q.dtype}, {k.dtype}, {v.dtype}; cast them to one dtype "
            "first."
        )
    if not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
        raise ValueError(
            f"{of_q}, {of_k}, {of_v} have batch axes {q.shape[:-3]}, {k.shape[:-3]}, "
            f"{v.shape[:-3]}; they must be the same."
        )
    if k.shape[-3] != v.shape[-3]:
        raise ValueError(
            f"{of_k} has {k.shape[-3]} tokens and {of_v} {v.shape[-3]}; they must agree."
        )
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(
            f"{of_k} has {k.shape[-2]} heads and {of_v} {v.shape[-2]}; they must agree."
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{of_q} has dim {q.shape[-1]} and {of_k} {k.shape[-1]}; they must agree.")
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"{of_q} has {q.shape[-2]} heads and {of_k} {k.shape[-2]}; the first must be a "
            "multiple of the second."
        )
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        raise ValueError(
            f"{of_q} {q.shape}, {of_k} {k.shape}, {of_v} {v.shape}: no axis may be empty."
        )


def list_heads(count: int, heads: int, kv_heads: int) -> None:
    """The heads axis of a plan is 1, kv_heads or heads."""
    if count not in (1, kv_heads, heads):
        raise ValueError(
            f"The plan has {count} lists per sequence; expected 1, kv_heads={kv_heads} or "
            f"heads={heads}."
        )


def groups_of_both_sides(of_q: tuple[int, ...], of_kv: tuple[int, ...]) -> None:
    """Queries and keys are grouped for the same heads and sequences, or one side for all."""
    try:
        np.broadcast_shapes(of_q[:-1], of_kv[:-1])
    except ValueError:
        raise ValueError(
            f"q_ids has shape {of_q} and kv_ids {of_kv}; axes but the last must be the same, or 1 "
            "on one side."
        ) from None


def plan_lengths(plan: Any, q_len: int, kv_len: int) -> None:
    """The plan was made for these lengths."""
    if (plan.q_len, plan.kv_len) != (q_len, kv_len):
        raise ValueError(
            f"The plan was made for q_len={plan.q_len}, kv_len={plan.kv_len}; q and k have "
            f"{q_len} and {kv_len}. Make a plan for these lengths."
        )


def countable(traced: bool) -> None:
    """The tiles to explain are known."""
    if traced:
        raise ValueError(
            "explain counts tiles, and these are traced with the plan or the mask; call it outside "
            "of jit."
        )


def batch_fits(name: str, batch_shape: tuple[int, ...], to: tuple[int, ...]) -> None:
    """Batch axes broadcast to those of q."""
    try:
        fits = np.broadcast_shapes(batch_shape, to) == tuple(to)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{name} has batch axes {batch_shape}, which do not broadcast to {to}.")


def mask_length(name: str, length: int, expected: int) -> None:
    """A mask's array was made for this length."""
    if length != expected:
        raise ValueError(
            f"The mask's {name} covers {length} tokens; the input has {expected}. Make the mask "
            "for these lengths."
        )


def mask_heads(count: int, heads: int) -> None:
    """A mask tells apart 1 or all query heads."""
    if count not in (1, heads):
        raise ValueError(f"The mask has {count} heads; expected 1 or heads={heads}.")


def bias_array(bias: Any) -> None:
    """A bias is an array of numbers to add, not a mask."""
    dtype = getattr(bias, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"bias holds {dtype or type(bias).__name__}; it must be an array of floats, which are "
            "added to the logits. For bools that say who sees whom use mask=js.masks.dense(array)."
        )


def merge_parts(parts: Any) -> None:
    """Parts are pairs of outputs and log-sum-exps of the same rows."""
    if not len(parts):
        raise ValueError("merge got no parts; pass at least one (out, lse).")
    for index, part in enumerate(parts):
        if not isinstance(part, (tuple, list)) or len(part) != 2:
            raise ValueError(
                f"Part {index} of merge is {type(part).__name__}; pass (out, lse), as attend gives "
                "with return_lse=True."
            )
        out, lse = part
        if out.shape != parts[0][0].shape:
            raise ValueError(
                f"Part {index} of merge has out of shape {out.shape}, part 0 {parts[0][0].shape}; "
                "all parts must be of the same queries."
            )
        *batch, q_len, heads, _ = out.shape
        if lse.shape != (*batch, heads, q_len):
            raise ValueError(
                f"Part {index} of merge has lse of shape {lse.shape}; out of shape {out.shape} "
                f"needs {(*batch, heads, q_len)}."
            )


def per_sequence(batch: int, **lengths: Any) -> None:
    """A length for each sequence, in integers."""
    for name, value in lengths.items():
        if value is not None:
            value = jnp.asarray(value)
            integers(**{name: value})
            if value.shape != (batch,):
                raise ValueError(
                    f"{name} has shape {value.shape}; expected one length per sequence, ({batch},)."
                )


def per_head(heads: int, **values: Any) -> None:
    """A number for all heads or one for each."""
    for name, value in values.items():
        if jnp.shape(value) not in ((), (heads,)):
            raise ValueError(
                f"{name} has shape {jnp.shape(value)}; expected a number, or one per query head, "
                f"({heads},)."
            )


def one_per_head(heads: int, **values: Any) -> None:
    """An entry for each query head."""
    for name, value in values.items():
        if len(value) != heads:
            raise ValueError(
                f"{name} has {len(value)} entries; expected one per query head, {heads}."
            )


def same_number_of_heads(**values: Any) -> None:
    """Several sequences have an entry for each head."""
    if len({len(value) for value in values.values()}) != 1:
        listed = ", ".join(f"{name}={tuple(value)}" for name, value in values.items())
        raise ValueError(f"{listed}: give one number per query head in each.")


def patterns(given: Any, types: tuple[type, ...]) -> None:
    """A pattern for all heads, or a sequence of them."""
    each = given if isinstance(given, (tuple, list)) else (given,)
    if not each or not all(isinstance(pattern, types) for pattern in each):
        names = ", ".join(f"{t.__name__}(...)" for t in types)
        raise ValueError(
            f"patterns={given!r} must be one of {names} of this method's module, or one of these "
            "per query head."
        )


def order_fits(order: Any, shape: tuple[int, ...]) -> None:
    """An order of tokens fits an array [*batch, length, heads, dim]."""
    integers(order=order)
    *batch, length, heads, _ = shape
    if order.ndim < 2 or order.shape[-1] != length:
        raise ValueError(
            f"order has shape {order.shape}; {length} tokens need [*batch, heads | 1, {length}]."
        )
    count = order.shape[-2]
    if max(count, heads) % min(count, heads):
        raise ValueError(
            f"order has {count} heads and the array {heads}; one must be a multiple of the other."
        )
    batch_fits("order", order.shape[:-2], tuple(batch))


def skip_thresholds(threshold: Any, per_head: tuple[int, ...]) -> None:
    """Thresholds lie in [0, 1] and broadcast to sequences and heads."""
    shape = jnp.shape(threshold)
    try:
        fits = np.broadcast_shapes(shape, per_head) == tuple(per_head)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"threshold has shape {shape}, which does not broadcast to [*batch, heads] {per_head}."
        )
    unit_interval(threshold=threshold)


def calibrations(given: Any, kind: type) -> None:
    """Curves that heads were calibrated to are of their kind, and rise."""
    for curve in given:
        if not isinstance(curve, kind):
            raise ValueError(f"calibration has {curve!r}; it must hold {kind.__name__}(...) alone.")
        for name, value in dataclasses.asdict(curve).items():
            most = 20.0 if name.endswith("b") else float("inf")
            if not 0 <= value <= most or value == float("inf"):
                raise ValueError(
                    f"{name}={value!r} of {curve} must be finite and lie in [0, {most:g}]."
                )


def factor_or_calibration(calibration: Any, *factors: Any) -> None:
    """What a threshold follows from is said once."""
    if calibration is not None and any(factor is not None for factor in factors):
        raise ValueError(
            "calibration and a scale factor both say what the threshold is; pass one of them."
        )


def soft_cap(softcap: Any) -> None:
    """A cap of logits is a finite number above 0."""
    positive_number(softcap=softcap)
    if not math.isfinite(softcap):
        raise ValueError(f"softcap={softcap!r} must be finite; None is for no cap.")


def positions_fit(positions: Any, q_len: int) -> None:
    """A position for each query, known ones consecutive: methods read where one query stands."""
    integers(positions=positions)
    if not positions.ndim or positions.shape[-1] != q_len:
        raise ValueError(
            f"positions has shape {positions.shape}; expected one per query, [*batch, {q_len}]."
        )
    if q_len > 1 and not _compat.is_traced(positions):
        found = np.asarray(positions)
        if (np.diff(found) != 1).any():
            raise ValueError(
                f"positions={found} must be consecutive in each sequence; put queries in the order "
                "of their tokens, and hide keys by mask."
            )


def sinks_shape(sinks: Any, heads: int) -> None:
    """One sink logit per query head."""
    if getattr(sinks, "shape", None) != (heads,):
        raise ValueError(
            f"sinks has shape {getattr(sinks, 'shape', None)}; expected one logit per query head, "
            f"({heads},)."
        )


def mask_type(mask: Any) -> None:
    """A mask is a jsparse mask, not an array."""
    if not hasattr(mask, "flatten_batch"):
        raise ValueError(
            f"mask is {type(mask).__name__}; it must be made by js.masks, e.g. js.masks.causal(). "
            "For an array of bools use js.masks.dense(array)."
        )


def plan_type(plan: Any, types: tuple[type, ...]) -> None:
    """A plan is one of the plan types."""
    if not isinstance(plan, types):
        names = ", ".join(t.__name__ for t in types)
        raise ValueError(f"plan is {type(plan).__name__}; it must be one of {names}, or a tuple.")


def some_plans(plans: Any) -> None:
    """A tuple of plans has at least one."""
    if not len(plans):
        raise ValueError("plan is an empty tuple; pass None to attend to everything.")


def square_plans(plans: Any) -> None:
    """At least one plan, each cutting queries and keys into the same blocks."""
    some_plans(plans)
    for plan in plans:
        q_side, kv_side = (plan.q_len, plan.block_q), (plan.kv_len, plan.block_kv)
        if q_side != kv_side:
            raise ValueError(
                f"a plan has (length, block) {q_side} for queries and {kv_side} for keys; the "
                "receptive field over layers needs both alike."
            )


def cache_room(new: int, max_len: int) -> None:
    """New tokens fit an empty cache."""
    if new > max_len:
        raise ValueError(f"{new} tokens do not fit a cache of max_len={max_len}; make it longer.")


def features(got: int, expected: int) -> None:
    """The last axis has the layer's width."""
    if got != expected:
        raise ValueError(f"x has {got} features; the layer was made for in_features={expected}.")


def pairs(array: Any) -> None:
    """One bool per pair of query and key."""
    if not hasattr(array, "dtype") or not jnp.issubdtype(array.dtype, jnp.bool_):
        raise ValueError(
            f"pairs holds {getattr(array, 'dtype', type(array).__name__)}; it must hold bools, "
            "True means attend."
        )
    if array.ndim < 3:
        raise ValueError(f"pairs has shape {array.shape}; expected [*batch, heads, q_len, kv_len].")


def interval_bounds(bounds: int, causal: bool) -> None:
    """How many bounds per key there may be."""
    allowed = (1, 2) if causal else (2, 4)
    if bounds not in allowed:
        raise ValueError(
            f"startend_row_indices has {bounds} bounds per key; with causal={causal} it must have "
            f"{allowed[0]} or {allowed[1]}."
        )


def some_layers(found: Any) -> None:
    """A model has attention layers to reach."""
    if not found:
        raise ValueError(
            "The model has no js.nn.SparseAttention or js.nn.LatentAttention layer; build it with "
            "those."
        )


def each_runs_once(calls: Any) -> None:
    """What is listed by layer was noted down in one call of each."""
    for number, of_layer in enumerate(calls):
        if len(of_layer) != 1:
            raise ValueError(
                f"Layer {number} of js.nn.attention_layers(model) ran {len(of_layer)} times; there "
                "is one entry per layer, so each must run once. Pass one sequence, and a model, or "
                "the part of it, in which each does."
            )


def no_dropout(rate: float, deterministic: bool) -> None:
    """Attention dropout is not asked for."""
    if rate and not deterministic:
        raise NotImplementedError(
            f"dropout_rate={rate}: jsparse has no attention dropout; set it to 0 and drop out the "
            "layer's output instead, or call with deterministic=True."
        )


def not_given(**values: Any) -> None:
    """Options that have no counterpart here are left at their defaults."""
    for name, value in values.items():
        if value is not None:
            raise NotImplementedError(
                f"{name}={value!r} has no counterpart in jsparse; leave it at None."
            )


def mask_array(mask: Any, query: Any, key: Any) -> None:
    """A module's mask array fits its queries and keys."""
    q_len, kv_len = query.shape[-3], key.shape[-3]
    fits = mask.ndim >= 3 and mask.shape[-2] in (1, q_len) and mask.shape[-1] in (1, kv_len)
    if not fits:
        raise ValueError(
            f"mask has shape {mask.shape}; expected [*batch, heads | 1, {q_len}, {kv_len}]."
        )


def plan_or_method(plan: Any, method: Any) -> None:
    """Not both."""
    if plan is not None and method is not None:
        raise ValueError("plan and method are both given; pass the one that should decide.")


def jax_alone(plan: Any, method: Any) -> None:
    """jax.nn's own implementation takes neither plan nor method."""
    if plan is not None or method is not None:
        raise ValueError(
            "implementation='cudnn' takes neither plan nor method; leave it at None for those."
        )


def neighborhood_axis(number: int, axis: Any) -> None:
    """Window, stride and dilation fit an axis of the grid."""
    # the whole of an axis of one token is one token
    if axis.window < min(2, axis.length):
        raise ValueError(f"window={axis.window} on axis {number} must be at least 2.")
    most = axis.length // axis.dilation
    if axis.window > most:
        raise ValueError(
            f"window={axis.window} on axis {number} must be at most {most}: the axis has "
            f"{axis.length} tokens, and with dilation={axis.dilation} a window spans "
            f"{axis.window * axis.dilation}. window=None takes as many as there are."
        )
    at_most(axis.window, stride=axis.stride)


def axes_need_a_grid(grid: Any, **values: Any) -> None:
    """Numbers for several axes come with the size of each."""
    for name, value in values.items():
        if grid is None and isinstance(value, Sequence) and len(value) != 1:
            raise ValueError(
                f"{name}={value} is for {len(value)} axes; pass grid, the size of each of them."
            )


def default_tile(name: str, grid: Any, most: int) -> None:
    """A grid has not more axes than there are tiles for."""
    if not 1 <= len(grid) <= most:
        raise ValueError(
            f"{name}=None: a grid of {len(grid)} axes has no default tile; give one size per axis."
        )


def whole_grid(grid: Any, q_len: int, kv_len: int) -> None:
    """Queries and keys are the tokens of one grid."""
    if q_len != kv_len:
        raise ValueError(
            f"q has {q_len} tokens and k {kv_len}; regions are of one grid of tokens, so they must "
            "be the same. Give the queries and the keys of all tokens at once."
        )
    if grid is not None and math.prod(grid) != q_len:
        raise ValueError(
            f"grid={tuple(grid)} has {math.prod(grid)} tokens; q and k have {q_len}. Give the "
            "grid's size along each axis."
        )


def both_or_neither(**values: Any) -> None:
    """Of several arguments that go together, none is missing."""
    missing = [name for name, value in values.items() if value is None]
    if missing and len(missing) < len(values):
        raise ValueError(f"{missing[0]}=None: {' and '.join(values)} go together; pass both.")
