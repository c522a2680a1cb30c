"""Integers of any width as the int32 that lists and tables hold."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


def as_int32(x: Any) -> Int[Array, "..."]:
    """Integers as int32, where those beyond it become its ends: they name nothing then either.

    A cast would make 0 of 2**32. What is -1 to an unsigned type stays -1, or becomes it.
    """
    if x.dtype.itemsize > 4:
        ends = np.iinfo(np.int32)
        x = x.astype(np.int64).clip(ends.min, ends.max)
    return jnp.asarray(x, jnp.int32)
