"""Seeded q, k, v."""

import jax
import jax.numpy as jnp
import numpy as np


def on_device(x, dtype=None):
    """An array that NumPy made and rounded.

    `jnp.asarray` compiles a program for every shape, and another for a change of dtype.
    """
    return jax.device_put(np.asarray(x, dtype))


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
    # NumPy's generator: JAX's would be compiled for every shape, which costs more than most tests
    rng = np.random.default_rng(seed)
    kv_len = q_len if kv_len is None else kv_len
    shapes = (q_len, heads, dim), (kv_len, kv_heads, dim), (kv_len, kv_heads, v_dim or dim)
    return tuple(on_device(rng.normal(size=(*batch, *shape)), dtype) for shape in shapes)


def leveled(q_len, kv_len=None, *, block=16, spread=5.0, **sizes):
    """Normal q, k, v, the keys of each block with logits of a level of their own."""
    q, k, v = qkv(q_len, kv_len, **sizes)
    blocks = -(-k.shape[-3] // block)
    level = np.random.default_rng(1).normal(size=(blocks, *k.shape[-2:-1])) * spread
    level = np.repeat(level, block, axis=0)[: k.shape[-3]]
    # one of the features is the level's own
    q, k = np.array(q), np.array(k)
    k[..., 0], q[..., 0] = level, q.shape[-1] ** 0.5
    return on_device(q), on_device(k), v
