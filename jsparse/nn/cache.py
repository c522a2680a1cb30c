"""Contiguous caches for decoding step by step: of keys and values, and of latents."""

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


@pytree_dataclass
class LatentCache:
    """What latent attention keeps of the tokens so far, with room for `max_len`, and a state.

    A token has one vector, which is its key and its value for all heads.
    """

    latents: Float[Array, "*batch max_len 1 dim"]
    length: Int[Array, "*batch"]
    state: Any = ()

    @classmethod
    def empty(
        cls, batch_shape: tuple[int, ...], max_len: int, dim: int, dtype: Any = jnp.float32
    ) -> "LatentCache":
        """A cache that holds no token yet."""
        checks.positive(max_len=max_len)
        latents = jnp.zeros((*batch_shape, max_len, 1, dim), dtype)
        return cls(latents, jnp.zeros(batch_shape, jnp.int32))

    @property
    def k(self) -> Float[Array, "*batch max_len 1 dim"]:
        """The keys."""
        return self.latents

    @property
    def v(self) -> Float[Array, "*batch max_len 1 dim"]:
        """The values, which are the keys."""
        return self.latents

    @property
    def max_len(self) -> int:
        """How many tokens fit."""
        return self.latents.shape[-3]

    def append(self, latents: Float[Array, "*batch length 1 dim"]) -> "LatentCache":
        """Writes tokens after those that are there, per sequence.

        Raises:
          ValueError: as of `KVCache.append`.
        """
        checks.cache_room(latents.shape[-3], self.max_len)
        return dataclasses.replace(
            self,
            latents=written(self.latents, latents, self.length),
            length=self.length + latents.shape[-3],
        )
