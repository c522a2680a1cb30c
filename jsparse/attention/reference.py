"""The dense reference: the meaning of every plan, mask and modification, in the plainest form.

Materialises [q_len, kv_len]; for tests, and for inputs small enough not to care.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jsparse.attention.logits import LogitRule, Operands
from jsparse.attention.problem import Plan
from jsparse.core import heads as heads_
from jsparse.core.pooling import block_counts, mean_blocks
from jsparse.types import BlockMask, BlockPyramid, Frame, Mask, TokenGroups
from jsparse.types.mask import pad_to_blocks


def forward(
    operands: Operands, plan: Plan | None, mask: Mask | None, rule: LogitRule
) -> tuple[Float[Array, "batch q_len heads v_dim"], Float[Array, "batch heads q_len"]]:
    """Computes `(out, lse)`, both f32, every pair formed; JAX differentiates it at any order."""
    return _softmax(*_logits(operands, plan, mask, rule))


def skipping_forward(
    operands: Operands,
    plan: BlockMask,
    mask: Mask | None,
    log_threshold: Float[Array, "batch heads"],
    rule: LogitRule,
) -> tuple[Float[Array, "batch q_len heads v_dim"], Float[Array, "batch heads q_len"], BlockMask]:
    """Computes `(out, lse, kept)` without the tiles that are far below those before them.

    A tile that is skipped holds no row's largest logit so far, so the largest logit of all tiles
    up to one is that of the tiles that were kept.
    """
    logits, v = _logits(operands, plan, mask, rule)
    grid = plan.grid
    peaks = pad_to_blocks(logits, grid.block_kv, -jnp.inf)
    peaks = peaks.reshape(*logits.shape[:-1], grid.kv_blocks, grid.block_kv).max(-1)
    so_far = jax.lax.cummax(peaks, axis=peaks.ndim - 1)
    near = (peaks >= so_far + log_threshold[..., None, None]) | jnp.isnan(peaks + so_far)
    near &= ~jnp.isneginf(peaks)
    near = jnp.pad(near, ((0, 0), (0, 0), (0, -grid.q_len % grid.block_q), (0, 0)))
    tiles = near.reshape(*near.shape[:2], grid.q_blocks, grid.block_q, grid.kv_blocks).any(3)
    overflowed = jnp.repeat(plan.overflowed, tiles.shape[1] // plan.list_heads, axis=-1)
    kept = BlockMask.from_dense(tiles, **grid._asdict(), width=plan.width)
    kept = dataclasses.replace(kept, overflowed=jnp.broadcast_to(overflowed, tiles.shape[:2]))
    logits = jnp.where(visible(kept, tiles.shape[1]), logits, -jnp.inf)
    return *_softmax(logits, v), kept


def _logits(
    operands: Operands, plan: Plan | None, mask: Mask | None, rule: LogitRule
) -> tuple[Float[Array, "batch heads q_len columns"], Float[Array, "batch columns heads v_dim"]]:
    """The logit of every pair, -inf where it is hidden, and the values; both of all heads."""
    batches, q_len, heads, _ = operands.q.shape
    k = heads_.expand_kv_heads(operands.k, heads).astype(jnp.float32)
    v = heads_.expand_kv_heads(operands.v, heads).astype(jnp.float32)
    q = operands.q.astype(jnp.float32)
    batch = jnp.arange(batches)[:, None, None, None]
    head = jnp.arange(heads)[:, None, None]
    q_index, kv_index = jnp.arange(q_len)[:, None], jnp.arange(rule.kv_len)

    # broken keys and values reach the rows that see them and no others: 0 * nan would be nan
    broken_k, k = _cut_out(k)
    broken_v, v = _cut_out(v)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    logits = rule.modify(
        logits, operands.bias, operands.scale, operands.captured, q_index, kv_index, batch, head
    )
    logits = jnp.where(broken_k | broken_v, jnp.nan, logits)
    logits = rule.hide(logits, mask, q_index, kv_index, batch, head, ragged=False)
    if isinstance(plan, BlockPyramid):
        logits, v = _append_summaries(logits, v, operands, plan, mask, rule)
    elif plan is not None:
        logits = jnp.where(visible(plan, heads), logits, -jnp.inf)
    return logits, v


def _softmax(
    logits: Float[Array, "batch heads q_len columns"],
    v: Float[Array, "batch columns heads v_dim"],
) -> tuple[Float[Array, "batch q_len heads v_dim"], Float[Array, "batch heads q_len"]]:
    # results do not depend on it. Its derivative asks which logit equals it: none at all, where a
    # compiler computes them anew and rounds otherwise
    peak = jax.lax.stop_gradient(logits).max(-1, keepdims=True)
    peak = jnp.where(jnp.isneginf(peak), 0.0, peak)
    probs = jnp.exp(logits - peak)
    total = probs.sum(-1, keepdims=True)
    # not `> 0`: a row of NaNs has to show
    seen = total != 0
    safe = jnp.where(seen, total, 1.0)
    out = jnp.einsum("bhqk,bkhd->bqhd", jnp.where(seen, probs / safe, 0.0), v)
    lse = jnp.where(seen, peak + jnp.log(safe), -jnp.inf)[..., 0]
    return out, lse


def _cut_out(x: Array) -> tuple[Bool[Array, "batch heads 1 kv_len"], Array]:
    """Which tokens hold something that is not finite, and the array with zeros there."""
    finite = jnp.isfinite(x).all(-1, keepdims=True)
    return ~jnp.transpose(finite, (0, 2, 3, 1)), jnp.where(finite, x, 0.0)


def visible(plan: BlockMask | TokenGroups, heads: int) -> Bool[Array, "*batch heads q_len kv_len"]:
    """A plan as one bool per pair and head."""
    if isinstance(plan, TokenGroups):
        pairs = plan.visible()
    else:
        tiles = _rows_of_tiles(plan, plan.list_heads)
        pairs = jnp.repeat(tiles, plan.block_kv, axis=-1)[..., : plan.kv_len]
    return jnp.repeat(pairs, heads // plan.list_heads, axis=-3)


def _append_summaries(
    logits: Array,
    v: Array,
    operands: Operands,
    plan: BlockPyramid,
    mask: Mask | None,
    rule: LogitRule,
) -> tuple[Array, Array]:
    """Hides what is not computed exactly and appends the columns that stand for several keys."""
    q = operands.q.astype(jnp.float32)
    batches, _, heads, _ = q.shape
    if plan.levels is None:
        lists, summaries = plan.block_mask, [_pooled(plan, heads)]
    else:
        lists, *coarser = (_entries_of(plan, level) for level in range(plan.top_level + 1))
        summaries = [_means(operands, tiles, n, heads) for n, tiles in enumerate(coarser, start=1)]
    all_logits, all_v = [jnp.where(visible(lists, heads), logits, -jnp.inf)], [v]
    for columns in summaries:
        broken_k, k = _cut_out(heads_.expand_kv_heads(columns.k, heads).astype(jnp.float32))
        broken_v, values = _cut_out(heads_.expand_kv_heads(columns.v, heads).astype(jnp.float32))
        pooled = rule.capped(rule.scaled(jnp.einsum("bqhd,bkhd->bhqk", q, k), operands.scale))
        pooled = jnp.where(broken_k | broken_v, jnp.nan, pooled + columns.bias)
        shown = columns.shown & _whole_runs(columns.size, mask, rule, batches, heads)
        all_logits.append(jnp.where(shown, pooled, -jnp.inf))
        all_v.append(jnp.broadcast_to(values, (batches, *values.shape[1:])))
    return jnp.concatenate(all_logits, -1), jnp.concatenate(all_v, -3)


class _Summaries(NamedTuple):
    """Keys and values that stand for `size` tokens each, and the rows whose lists ask for them."""

    k: Float[Array, "*k_batch columns kv_heads dim"]
    v: Float[Array, "*k_batch columns kv_heads v_dim"]
    bias: Float[Array, "*bias_batch bias_heads 1 columns"]
    shown: Bool[Array, "*list_batch heads q_len columns"]
    size: int


def _pooled(plan: BlockPyramid, heads: int) -> _Summaries:
    lists, k, v, log_count = plan.block_mask, plan.pooled_k, plan.pooled_v, plan.log_count
    assert k is not None
    assert v is not None
    assert log_count is not None
    bias = jnp.repeat(log_count, heads // log_count.shape[-1], axis=-1)
    bias = jnp.swapaxes(bias, -1, -2)[..., None, :]
    return _Summaries(k, v, bias, ~_rows_of_tiles(lists, heads), lists.block_kv)


def _means(operands: Operands, tiles: BlockMask, level: int, heads: int) -> _Summaries:
    size = 2**level
    k, v = (mean_blocks(x, size) for x in (operands.k, operands.v))
    bias = jnp.log(block_counts(tiles.kv_len, size).astype(jnp.float32))[None, None, None]
    shown = jnp.repeat(_rows_of_tiles(tiles, heads), tiles.block_kv // size, axis=-1)
    return _Summaries(k, v, bias, shown[..., : bias.shape[-1]], size)


def _entries_of(plan: BlockPyramid, level: int) -> BlockMask:
    """The entries of one level."""
    lists = plan.block_mask
    own = jnp.where(plan.levels == level, lists.kv_indices, -1)
    counts = lists.kv_num_blocks
    return BlockMask.from_lists(own, counts, **lists.grid._asdict(), overflowed=lists.overflowed)


def _rows_of_tiles(lists: BlockMask, heads: int) -> Bool[Array, "*batch heads q_len kv_blocks"]:
    """Which blocks the list of each query names."""
    tiles = jnp.repeat(lists.to_dense(), heads // lists.list_heads, axis=-3)
    return jnp.repeat(tiles, lists.block_q, axis=-2)[..., : lists.q_len, :]


def _whole_runs(
    size: int, mask: Mask | None, rule: LogitRule, batches: int, heads: int
) -> Bool[Array, "_ _ _ columns"]:
    """Runs of `size` keys of which a query may see every one that exists."""
    if mask is None:
        return jnp.ones((1, 1, 1, -(-rule.kv_len // size)), bool)
    batch, head = jnp.arange(batches)[:, None, None, None], jnp.arange(heads)[:, None, None]
    frame = Frame(rule.q_len, rule.kv_len, batch, head)
    pairs = mask.visible(jnp.arange(rule.q_len)[:, None], jnp.arange(rule.kv_len), frame)
    pairs = jnp.broadcast_to(pairs, (batches, heads, rule.q_len, rule.kv_len))
    pairs = pad_to_blocks(pairs, size, True)
    return pairs.reshape(*pairs.shape[:-1], -1, size).all(-1)
