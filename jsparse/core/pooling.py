"""Statistics per block of tokens, with the true count of the last block."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def block_counts(length: int, block: int) -> Int[Array, " blocks"]:
    """How many tokens each block has; the last may have fewer."""
    first = jnp.arange(-(-length // block)) * block
    return jnp.minimum(block, length - first)


@functools.partial(jax.jit, static_argnames="block")
def sum_blocks(
    x: Float[Array, "*batch length heads dim"], block: int
) -> Float[Array, "*batch blocks heads dim"]:
    """Sums each block's tokens, in f32."""
    missing = -x.shape[-3] % block
    pad = [(0, 0)] * (x.ndim - 3) + [(0, missing), (0, 0), (0, 0)]
    x = jnp.pad(x.astype(jnp.float32), pad)
    return x.reshape(*x.shape[:-3], -1, block, *x.shape[-2:]).sum(-3)


@functools.partial(jax.jit, static_argnames="block")
def mean_blocks(
    x: Float[Array, "*batch length heads dim"], block: int
) -> Float[Array, "*batch blocks heads dim"]:
    """Averages each block's tokens, in f32; the last block over those that it has."""
    return sum_blocks(x, block) / block_counts(x.shape[-3], block)[:, None, None]


@functools.partial(jax.jit, static_argnames="block")
def max_blocks(
    x: Float[Array, "*batch length heads dim"], block: int
) -> Float[Array, "*batch blocks heads dim"]:
    """Takes the largest of each block's tokens, feature by feature, in f32."""
    missing = -x.shape[-3] % block
    pad = [(0, 0)] * (x.ndim - 3) + [(0, missing), (0, 0), (0, 0)]
    x = jnp.pad(x.astype(jnp.float32), pad, constant_values=-jnp.inf)
    return x.reshape(*x.shape[:-3], -1, block, *x.shape[-2:]).max(-3)


@functools.partial(jax.jit, static_argnames="block")
def min_blocks(
    x: Float[Array, "*batch length heads dim"], block: int
) -> Float[Array, "*batch blocks heads dim"]:
    """Takes the smallest of each block's tokens, feature by feature, in f32."""
    return -max_blocks(-x, block)
