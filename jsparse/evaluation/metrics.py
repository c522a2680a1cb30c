"""How close sparse attention comes to dense attention, without forming all pairs."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jsparse.core.blocks import candidates
from jsparse.types import BlockMask, Mask


def recalled_mass(
    sparse_lse: Float[Array, "*batch heads q_len"], dense_lse: Float[Array, "*batch heads q_len"]
) -> Float[Array, "*batch heads"]:
    """The share of the dense softmax's mass that falls on the pairs computed, mean over rows.

    Both are log-sum-exps of the same logits, over some pairs and over all.
    """
    seen = ~jnp.isneginf(dense_lse)
    share = jnp.exp(sparse_lse - jnp.where(seen, dense_lse, 0.0))
    return share.mean(-1, where=seen)


def output_error(
    out: Float[Array, "*batch q_len heads v_dim"], dense: Float[Array, "*batch q_len heads v_dim"]
) -> Float[Array, "*batch heads"]:
    """Relative error of each head's output: the norm of the difference over that of the dense."""
    difference = jnp.square(out - dense).sum((-3, -1))
    return jnp.sqrt(difference / jnp.square(dense).sum((-3, -1)))


def visible_density(
    plan: BlockMask | None, mask: Mask | None, heads: int
) -> Float[Array, "*batch heads"]:
    """The share of the tiles that the mask leaves visible which the plan computes."""
    if plan is None:
        return jnp.ones((heads,))
    visible, _ = candidates(mask, plan.grid, plan.batch_shape, heads)
    computed = jnp.repeat(plan.kv_num_blocks.sum(-1), heads // plan.list_heads, axis=-1)
    return computed / visible.sum((-1, -2))
