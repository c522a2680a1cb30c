"""Numbers as integers that compare as they do: both zeros are one, every NaN is above all."""

import jax
import jax.numpy as jnp
from jax import lax

NOTHING = -(2**31)  # less than what any number becomes
_NAN = 0x7FC00000
_MAGNITUDE = 2**31 - 1  # all bits of a float but its sign


def sortable(numbers: jax.Array) -> jax.Array:
    """Integers of 32 bits in the order of numbers of f32."""
    numbers = jnp.where(numbers == 0.0, 0.0, numbers)
    bits = lax.bitcast_convert_type(numbers, jnp.int32)
    bits = jnp.where(numbers != numbers, jnp.int32(_NAN), bits)
    return jnp.where(bits < 0, bits ^ jnp.int32(_MAGNITUDE), bits)


def numbers_of(integers: jax.Array) -> jax.Array:
    """What `sortable` was given, f32."""
    bits = jnp.where(integers < 0, integers ^ jnp.int32(_MAGNITUDE), integers)
    return lax.bitcast_convert_type(bits, jnp.float32)
