"""Vectors stored in few bits, and what is left of them, as kernels that multiply such see it."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jsparse import checks

# the least number that a scale is made for, in the authors' kernels
_LEAST = 1e-4


class Stored(NamedTuple):
    """Vectors in the type that they are stored in.

    Attributes:
      numbers: Of that type.
      scale: What those of each vector are multiplied by, in f32; None but for eight bits.
    """

    numbers: Float[Array, "*rest dim"]
    scale: Float[Array, "*rest"] | None

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: Any) -> "Stored":
        """Room for vectors, `shape` being that of all their numbers."""
        kept = jnp.dtype(jnp.float32 if dtype is None else dtype)
        scale = jnp.zeros(shape[:-1], jnp.float32) if kept.itemsize == 1 else None
        return cls(jnp.zeros(shape, kept), scale)

    def read(self) -> Float[Array, "*rest dim"]:
        """The vectors in f32."""
        numbers = self.numbers.astype(jnp.float32)
        return numbers if self.scale is None else numbers * self.scale[..., None]


def hadamard(x: Float[Array, "*rest dim"]) -> Float[Array, "*rest dim"]:
    """Turns vectors so that single large features spread over all; products stay as they were.

    Args:
      x: Vectors; `dim` is a power of two.
    """
    matrix = np.ones((1, 1))
    while len(matrix) < x.shape[-1]:
        matrix = np.kron(matrix, [[1, 1], [1, -1]])
    return x @ jnp.asarray(matrix / math.sqrt(len(matrix)), x.dtype)


def stored(x: Float[Array, "*rest dim"], dtype: Any, *, power_of_two: bool = False) -> Stored:
    """Vectors as they are stored in `dtype`.

    Types of eight bits have a scale per vector, so that its largest number is their largest.

    Args:
      x: Vectors.
      dtype: Of floating point, such as bfloat16 or float8_e4m3fn; None rounds nothing: f32.
      power_of_two: Whether scales are rounded up to powers of two.

    Raises:
      ValueError: if the dtype has no exponent.
    """
    x = x.astype(jnp.float32)
    if dtype is None:
        return Stored(x, None)
    checks.floating(dtype=dtype)
    kept = jnp.dtype(dtype)
    if kept.itemsize > 1:
        # before the conversion: one there and back is what a compiler may leave out
        bits = min(jnp.finfo(kept).nmant, jnp.finfo(x.dtype).nmant)
        x = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=bits)
        return Stored(x.astype(kept), None)
    scale = jnp.maximum(jnp.abs(x).max(-1), _LEAST) / float(jnp.finfo(kept).max)
    if power_of_two:
        scale = jnp.exp2(jnp.ceil(jnp.log2(scale)))
    return Stored((x / scale[..., None]).astype(kept), scale)


def rounded(
    x: Float[Array, "*rest dim"], dtype: Any, *, power_of_two: bool = False
) -> Float[Array, "*rest dim"]:
    """The numbers that are left of vectors that are `stored`, in f32.

    Gradients pass as if nothing were rounded.

    Args:
      x: Vectors.
      dtype: As for `stored`.
      power_of_two: As there.

    Raises:
      ValueError: if the dtype has no exponent.
    """
    return _straight_through(x.astype(jnp.float32), dtype, power_of_two)


# the gradient of a cast is cast too, and has no scale: most of it would be too small for eight bits
@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _straight_through(
    x: Float[Array, "*rest dim"], dtype: Any, power_of_two: bool
) -> Float[Array, "*rest dim"]:
    return stored(x, dtype, power_of_two=power_of_two).read()


@_straight_through.defjvp
def _as_it_comes(
    dtype: Any, power_of_two: bool, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    return _straight_through(*primals, dtype, power_of_two), tangents[0]
