"""Grouped-query heads: repeating kv heads to query heads, and summing back."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def expand_kv_heads(
    x: Float[Array, "*batch length kv_heads dim"], heads: int
) -> Float[Array, "*batch length heads dim"]:
    """Repeats each kv head for the query heads of its group."""
    return jnp.repeat(x, heads // x.shape[-2], axis=-2)


def sum_groups(
    x: Float[Array, "*batch length heads dim"], kv_heads: int
) -> Float[Array, "*batch length kv_heads dim"]:
    """Sums over the query heads of each group; the transpose of `expand_kv_heads`."""
    *lead, heads, dim = x.shape
    return x.reshape(*lead, kv_heads, heads // kv_heads, dim).sum(-2)
