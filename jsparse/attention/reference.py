"""The dense reference: the meaning of every plan, mask and modification, in the plainest form.

Materialises [q_len, kv_len]; for tests, and for inputs small enough not to care.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jsparse.attention.logits import LogitRule, Operands
from jsparse.core import heads as heads_
from jsparse.types import BlockMask, BlockPyramid, Mask, TokenGroups

Plan = BlockMask | TokenGroups | BlockPyramid


def forward(
    operands: Operands, plan: Plan | None, mask: Mask | None, rule: LogitRule
) -> tuple[Float[Array, "batch q_len heads v_dim"], Float[Array, "batch heads q_len"]]:
    """Computes `(out, lse)` with every pair formed. Differentiable any number of times by JAX."""
    batches, q_len, heads, _ = operands.q.shape
    k = heads_.expand_kv_heads(operands.k, heads).astype(jnp.float32)
    v = heads_.expand_kv_heads(operands.v, heads).astype(jnp.float32)
    q = operands.q.astype(jnp.float32)
    batch = jnp.arange(batches)[:, None, None, None]
    head = jnp.arange(heads)[:, None, None]
    q_index, kv_index = jnp.arange(q_len)[:, None], jnp.arange(rule.kv_len)

    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    logits = rule.modify(
        logits, operands.bias, operands.scale, operands.captured, q_index, kv_index, batch, head
    )
    logits = rule.hide(logits, mask, q_index, kv_index, batch, head, ragged=False)
    if isinstance(plan, BlockPyramid):
        logits, v = _append_pooled(logits, v, operands, plan, rule)
    elif plan is not None:
        logits = jnp.where(visible(plan, heads), logits, -jnp.inf)

    peak = logits.max(-1, keepdims=True)
    peak = jnp.where(jnp.isneginf(peak), 0.0, peak)
    probs = jnp.exp(logits - peak)
    total = probs.sum(-1, keepdims=True)
    # not `> 0`: a row of NaNs has to show
    seen = total != 0
    safe = jnp.where(seen, total, 1.0)
    out = jnp.einsum("bhqk,bkhd->bqhd", jnp.where(seen, probs / safe, 0.0), v)
    lse = jnp.where(seen, peak + jnp.log(safe), -jnp.inf)[..., 0]
    return out.astype(operands.v.dtype), lse


def visible(plan: BlockMask | TokenGroups, heads: int) -> Bool[Array, "*batch heads q_len kv_len"]:
    """A plan as one bool per pair and head."""
    if isinstance(plan, TokenGroups):
        pairs = plan.visible()
    else:
        tiles = jnp.repeat(plan.to_dense(), plan.block_q, axis=-2)[..., : plan.q_len, :]
        pairs = jnp.repeat(tiles, plan.block_kv, axis=-1)[..., : plan.kv_len]
    return jnp.repeat(pairs, heads // plan.list_heads, axis=-3)


def _append_pooled(logits, v, operands: Operands, plan: BlockPyramid, rule: LogitRule):
    """Hides what the list leaves out and appends one column per block in its place."""
    if plan.pooled_k is None or plan.pooled_v is None or plan.log_count is None:
        raise NotImplementedError("the reference takes pyramids of pooled columns, not of levels.")
    q = operands.q.astype(jnp.float32)
    heads = q.shape[-2]
    tiles = plan.block_mask.to_dense()
    tiles = jnp.repeat(tiles, heads // plan.block_mask.list_heads, axis=-3)
    tiles = jnp.repeat(tiles, plan.block_mask.block_q, axis=-2)[..., : plan.q_len, :]
    logits = jnp.where(visible(plan.block_mask, heads), logits, -jnp.inf)
    pooled_k = heads_.expand_kv_heads(plan.pooled_k, heads).astype(jnp.float32)
    pooled_v = heads_.expand_kv_heads(plan.pooled_v, heads).astype(jnp.float32)
    log_count = jnp.repeat(plan.log_count, heads // plan.log_count.shape[-1], axis=-1)
    pooled = rule.scaled(jnp.einsum("bqhd,bkhd->bhqk", q, pooled_k), operands.scale)
    pooled = pooled + jnp.swapaxes(log_count, -1, -2)[..., None, :]
    pooled = jnp.where(tiles, -jnp.inf, pooled)
    return jnp.concatenate([logits, pooled], -1), jnp.concatenate([v, pooled_v], -3)
