"""Seeded q, k, v."""

import jax
import jax.numpy as jnp


def qkv(
    q_len,
    kv_len=None,
    *,
    heads=4,
    kv_heads=2,
    dim=16,
    v_dim=None,
    batch=(),
    dtype=jnp.float32,
    seed=0,
):
    """Normal q, k, v of the given sizes."""
    keys = jax.random.split(jax.random.key(seed), 3)
    kv_len = q_len if kv_len is None else kv_len
    q = jax.random.normal(keys[0], (*batch, q_len, heads, dim), dtype)
    k = jax.random.normal(keys[1], (*batch, kv_len, kv_heads, dim), dtype)
    v = jax.random.normal(keys[2], (*batch, kv_len, kv_heads, v_dim or dim), dtype)
    return q, k, v
