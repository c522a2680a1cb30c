"""Writing tokens after those that are there, into arrays with room for more, and reading them."""

import functools

import jax
import jax.numpy as jnp
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


@functools.partial(jax.jit, static_argnames="count")
def tokens_from(
    x: Float[Array, "*batch length heads dim"], first: Int[Array, "*batch"], count: int
) -> Float[Array, "*batch count heads dim"]:
    """So many tokens from one on, per sequence; zeros where there are none.

    Args:
      x: All tokens.
      first: Where the first of them stands; it may lie before the beginning, the last past the end.
      count: How many.
    """
    places = first[..., None] + jnp.arange(count)
    known = jnp.take_along_axis(x, places[..., None, None], axis=-3, mode="clip")
    there = (places >= 0) & (places < x.shape[-3])
    return jnp.where(there[..., None, None], known, 0)
