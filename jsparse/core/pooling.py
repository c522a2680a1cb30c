"""Statistics per block of tokens, with the true count of the last block.

Where arrays have room for more tokens than there are, `length` says how many of each sequence are
true; blocks without any are zeros.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# x [*batch, length, heads, dim], block -> [*batch, blocks, heads, dim]; keys in a cache, which has
# room for more, come with length [*batch] besides: how many of them are true
Pool = Callable[..., Array]


def block_counts(length: int, block: int) -> Int[Array, " blocks"]:
    """How many tokens each block has; the last may have fewer."""
    first = jnp.arange(-(-length // block)) * block
    return jnp.minimum(block, length - first)


@functools.partial(jax.jit, static_argnames="block")
def sum_blocks(
    x: Float[Array, "*batch length heads dim"],
    block: int,
    length: Int[Array, "*batch"] | None = None,
) -> Float[Array, "*batch blocks heads dim"]:
    """Sums each block's tokens, in f32."""
    if length is not None:
        x = jnp.where(_true(x, length), x, 0)
    missing = -x.shape[-3] % block
    pad = [(0, 0)] * (x.ndim - 3) + [(0, missing), (0, 0), (0, 0)]
    x = jnp.pad(x.astype(jnp.float32), pad)
    return x.reshape(*x.shape[:-3], -1, block, *x.shape[-2:]).sum(-3)


@functools.partial(jax.jit, static_argnames="block")
def mean_blocks(
    x: Float[Array, "*batch length heads dim"],
    block: int,
    length: Int[Array, "*batch"] | None = None,
) -> Float[Array, "*batch blocks heads dim"]:
    """Averages each block's tokens, in f32; the last block over those that it has."""
    if length is None:
        counts = block_counts(x.shape[-3], block)
    else:
        first = jnp.arange(-(-x.shape[-3] // block)) * block
        counts = jnp.clip(length[..., None] - first, 1, block)
    return sum_blocks(x, block, length) / counts[..., None, None]


@functools.partial(jax.jit, static_argnames="block")
def max_blocks(
    x: Float[Array, "*batch length heads dim"],
    block: int,
    length: Int[Array, "*batch"] | None = None,
) -> Float[Array, "*batch blocks heads dim"]:
    """Takes the largest of each block's tokens, feature by feature, in f32."""
    x = x.astype(jnp.float32)
    if length is not None:
        x = jnp.where(_true(x, length), x, -jnp.inf)
    missing = -x.shape[-3] % block
    pad = [(0, 0)] * (x.ndim - 3) + [(0, missing), (0, 0), (0, 0)]
    x = jnp.pad(x, pad, constant_values=-jnp.inf)
    largest = x.reshape(*x.shape[:-3], -1, block, *x.shape[-2:]).max(-3)
    if length is None:
        return largest
    first = jnp.arange(largest.shape[-3]) * block
    return jnp.where((first < length[..., None])[..., None, None], largest, 0.0)


@functools.partial(jax.jit, static_argnames="block")
def min_blocks(
    x: Float[Array, "*batch length heads dim"],
    block: int,
    length: Int[Array, "*batch"] | None = None,
) -> Float[Array, "*batch blocks heads dim"]:
    """Takes the smallest of each block's tokens, feature by feature, in f32."""
    return -max_blocks(-x, block, length)


def _true(x: Array, length: Int[Array, "*batch"]) -> Bool[Array, "*batch length 1 1"]:
    return (jnp.arange(x.shape[-3]) < length[..., None])[..., None, None]
