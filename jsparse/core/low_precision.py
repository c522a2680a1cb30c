"""Vectors rounded to eight bits, as kernels that multiply such numbers see them."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jsparse import checks

# the least number that a scale is made for, in the authors' kernels
_LEAST = 1e-4


def hadamard(x: Float[Array, "*rest dim"]) -> Float[Array, "*rest dim"]:
    """Turns vectors so that single large features spread over all; products stay as they were.

    Args:
      x: Vectors; `dim` is a power of two.
    """
    matrix = np.ones((1, 1))
    while len(matrix) < x.shape[-1]:
        matrix = np.kron(matrix, [[1, 1], [1, -1]])
    return x @ jnp.asarray(matrix / math.sqrt(len(matrix)), x.dtype)


def rounded(
    x: Float[Array, "*rest dim"], dtype: Any, *, power_of_two: bool = False
) -> Float[Array, "*rest dim"]:
    """The numbers that are left of vectors stored in `dtype`, in f32.

    Types of eight bits have a scale per vector, so that its largest number is their largest.
    Gradients pass as if nothing were rounded.

    Args:
      x: Vectors.
      dtype: Of floating point, such as bfloat16 or float8_e4m3fn; None rounds nothing.
      power_of_two: Whether scales are rounded up to powers of two.

    Raises:
      ValueError: if the dtype has no exponent.
    """
    x = x.astype(jnp.float32)
    if dtype is None:
        return x
    checks.floating(dtype=dtype)
    return _straight_through(x, jnp.dtype(dtype), power_of_two)


# the gradient of a cast is cast too, and has no scale: most of it would be too small for eight bits
@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _straight_through(
    x: Float[Array, "*rest dim"], dtype: Any, power_of_two: bool
) -> Float[Array, "*rest dim"]:
    if dtype.itemsize > 1:
        return x.astype(dtype).astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), _LEAST) / float(jnp.finfo(dtype).max)
    if power_of_two:
        scale = jnp.exp2(jnp.ceil(jnp.log2(scale)))
    return (x / scale).astype(dtype).astype(jnp.float32) * scale


@_straight_through.defjvp
def _as_it_comes(
    dtype: Any, power_of_two: bool, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    return _straight_through(*primals, dtype, power_of_two), tangents[0]
