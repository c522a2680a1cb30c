"""The dense reference: the meaning of every plan, mask and modification, in the plainest form.

Materialises [q_len, kv_len]; for tests, and for inputs small enough not to care.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jsparse.attention.logits import LogitRule, Operands
from jsparse.core import heads as heads_
from jsparse.types import BlockMask, BlockPyramid, Frame, Mask, TokenGroups
from jsparse.types.mask import pad_to_blocks

Plan = BlockMask | TokenGroups | BlockPyramid


def forward(
    operands: Operands, plan: Plan | None, mask: Mask | None, rule: LogitRule
) -> tuple[Float[Array, "batch q_len heads v_dim"], Float[Array, "batch heads q_len"]]:
    """Computes `(out, lse)` with every pair formed. Differentiable any number of times by JAX."""
    return _softmax(*_logits(operands, plan, mask, rule), operands.v.dtype)


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
    return *_softmax(logits, v, operands.v.dtype), kept


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
        logits, v = _append_pooled(logits, v, operands, plan, mask, rule)
    elif plan is not None:
        logits = jnp.where(visible(plan, heads), logits, -jnp.inf)
    return logits, v


def _softmax(
    logits: Float[Array, "batch heads q_len columns"],
    v: Float[Array, "batch columns heads v_dim"],
    dtype: Any,
) -> tuple[Float[Array, "batch q_len heads v_dim"], Float[Array, "batch heads q_len"]]:
    peak = logits.max(-1, keepdims=True)
    peak = jnp.where(jnp.isneginf(peak), 0.0, peak)
    probs = jnp.exp(logits - peak)
    total = probs.sum(-1, keepdims=True)
    # not `> 0`: a row of NaNs has to show
    seen = total != 0
    safe = jnp.where(seen, total, 1.0)
    out = jnp.einsum("bhqk,bkhd->bqhd", jnp.where(seen, probs / safe, 0.0), v)
    lse = jnp.where(seen, peak + jnp.log(safe), -jnp.inf)[..., 0]
    return out.astype(dtype), lse


def _cut_out(x: Array) -> tuple[Bool[Array, "batch heads 1 kv_len"], Array]:
    """Which tokens hold something that is not finite, and the array with zeros there."""
    finite = jnp.isfinite(x).all(-1, keepdims=True)
    return ~jnp.transpose(finite, (0, 2, 3, 1)), jnp.where(finite, x, 0.0)


def visible(plan: BlockMask | TokenGroups, heads: int) -> Bool[Array, "*batch heads q_len kv_len"]:
    """A plan as one bool per pair and head."""
    if isinstance(plan, TokenGroups):
        pairs = plan.visible()
    else:
        tiles = jnp.repeat(plan.to_dense(), plan.block_q, axis=-2)[..., : plan.q_len, :]
        pairs = jnp.repeat(tiles, plan.block_kv, axis=-1)[..., : plan.kv_len]
    return jnp.repeat(pairs, heads // plan.list_heads, axis=-3)


def _append_pooled(
    logits: Array,
    v: Array,
    operands: Operands,
    plan: BlockPyramid,
    mask: Mask | None,
    rule: LogitRule,
) -> tuple[Array, Array]:
    """Hides what the list leaves out and appends one column per block in its place."""
    if plan.pooled_k is None or plan.pooled_v is None or plan.log_count is None:
        raise NotImplementedError("the reference takes pyramids of pooled columns, not of levels.")
    if operands.bias is not None or rule.score_mod is not None:
        raise NotImplementedError(
            "bias and score_mod act on pairs; a pooled column stands for many and has none."
        )
    q = operands.q.astype(jnp.float32)
    heads = q.shape[-2]
    lists = plan.block_mask
    tiles = jnp.repeat(lists.to_dense(), heads // lists.list_heads, axis=-3)
    tiles = jnp.repeat(tiles, lists.block_q, axis=-2)[..., : plan.q_len, :]
    hidden = tiles | ~_whole_blocks(lists, mask, q.shape[0], heads)
    logits = jnp.where(visible(lists, heads), logits, -jnp.inf)
    pooled_k = heads_.expand_kv_heads(plan.pooled_k, heads).astype(jnp.float32)
    pooled_v = heads_.expand_kv_heads(plan.pooled_v, heads).astype(jnp.float32)
    log_count = jnp.repeat(plan.log_count, heads // plan.log_count.shape[-1], axis=-1)
    pooled = rule.capped(rule.scaled(jnp.einsum("bqhd,bkhd->bhqk", q, pooled_k), operands.scale))
    pooled = pooled + jnp.swapaxes(log_count, -1, -2)[..., None, :]
    pooled = jnp.where(hidden, -jnp.inf, pooled)
    pooled_v = jnp.broadcast_to(pooled_v, (v.shape[0], *pooled_v.shape[1:]))
    return jnp.concatenate([logits, pooled], -1), jnp.concatenate([v, pooled_v], -3)


def _whole_blocks(
    lists: BlockMask, mask: Mask | None, batches: int, heads: int
) -> Bool[Array, "batch heads q_len kv_blocks"]:
    """Blocks of which a query may see every key."""
    grid = lists.grid
    pairs = jnp.ones((batches, heads, grid.q_len, grid.kv_len), bool)
    if mask is not None:
        batch, head = jnp.arange(batches)[:, None, None, None], jnp.arange(heads)[:, None, None]
        frame = Frame(grid.q_len, grid.kv_len, batch, head)
        pairs &= mask.visible(jnp.arange(grid.q_len)[:, None], jnp.arange(grid.kv_len), frame)
    pairs = pad_to_blocks(pairs, grid.block_kv, True)
    return pairs.reshape(*pairs.shape[:-1], -1, grid.block_kv).all(-1)
