"""Rotary position embedding."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@functools.partial(jax.jit, static_argnames="base")
def rotary(
    x: Float[Array, "*batch length heads dim"],
    positions: Int[Array, "*batch length"],
    *,
    base: float = 10_000.0,
) -> Float[Array, "*batch length heads dim"]:
    """Rotates pairs of features by angles that grow with position.

    Feature `i` is paired with `i + dim / 2` and turned by `position * base ** (-2 i / dim)`, so
    that a product of two rotated vectors depends on the distance of their positions alone.

    Args:
      x: Queries or keys; `dim` is even.
      positions: The position of each token.
      base: The slowest pair turns about once in `2 pi base` tokens.

    Reference:
      Su et al. 2021, arXiv:2104.09864, equation 34, with halves paired instead of neighbours.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


@functools.partial(jax.jit, static_argnames="base")
def unrotated(
    x: Float[Array, "*batch length heads dim"],
    positions: Int[Array, "*batch length"],
    *,
    base: float = 10_000.0,
) -> Float[Array, "*batch length heads dim"]:
    """Turns back what `rotary` has turned."""
    return rotary(x, -positions, base=base)


@functools.partial(jax.jit, static_argnames="base")
def interleaved_rotary(
    x: Float[Array, "*batch length heads dim"],
    positions: Int[Array, "*batch length"],
    *,
    base: float = 10_000.0,
) -> Float[Array, "*batch length heads dim"]:
    """Rotates as `rotary` does, with neighbours paired: feature `2 i` and `2 i + 1`.

    Trained parameters are for one of the two; each is the other with features in another order.

    Reference:
      Su et al. 2021, arXiv:2104.09864, equation 34.
    """
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    halves = rotary(jnp.swapaxes(pairs, -1, -2).reshape(x.shape), positions, base=base)
    turned = halves.reshape(*x.shape[:-1], 2, -1)
    return jnp.swapaxes(turned, -1, -2).reshape(x.shape)
