"""A contiguous KV cache for decoding step by step."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jsparse import checks
from jsparse.core.appending import written
from jsparse.types import pytree_dataclass


@pytree_dataclass
class KVCache:
    """Keys and values of the tokens so far, with room for `max_len`, and a method's state."""

    k: Float[Array, "*batch max_len kv_heads dim"]
    v: Float[Array, "*batch max_len kv_heads dim"]
    length: Int[Array, "*batch"]
    state: Any = ()

    @classmethod
    def empty(
        cls,
        batch_shape: tuple[int, ...],
        max_len: int,
        kv_heads: int,
        dim: int,
        dtype: Any = jnp.float32,
    ) -> "KVCache":
        """A cache that holds no token yet."""
        checks.positive(max_len=max_len)
        zeros = jnp.zeros((*batch_shape, max_len, kv_heads, dim), dtype)
        return cls(zeros, zeros, jnp.zeros(batch_shape, jnp.int32))

    @property
    def max_len(self) -> int:
        """How many tokens fit."""
        return self.k.shape[-3]

    def append(
        self,
        k: Float[Array, "*batch length kv_heads dim"],
        v: Float[Array, "*batch length kv_heads dim"],
    ) -> "KVCache":
        """Writes tokens after those that are there, per sequence.

        Raises:
          ValueError: if more tokens come at once than the cache can ever hold. Whether they fit
            after what is there depends on data: it is the caller's to stop at `max_len`.
        """
        checks.cache_room(k.shape[-3], self.max_len)
        return dataclasses.replace(
            self,
            k=written(self.k, k, self.length),
            v=written(self.v, v, self.length),
            length=self.length + k.shape[-3],
        )
