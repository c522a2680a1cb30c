"""Writing tokens after those that are there, into arrays with room for more."""

import jax
from jaxtyping import Array, Float, Int


@jax.jit
def written(
    known: Float[Array, "..."], new: Float[Array, "..."], first: Int[Array, "*batch"]
) -> Float[Array, "..."]:
    """The tokens so far with new ones written over them, per sequence.

    Args:
      known: Those so far, on the axis after those of the batch; the result has its dtype.
      new: Others, as many as fit.
      first: Where the first of them goes.
    """

    def write(known, new, first):
        return jax.lax.dynamic_update_slice_in_dim(known, new.astype(known.dtype), first, axis=0)

    for _ in first.shape:
        write = jax.vmap(write)
    return write(known, new, first)
