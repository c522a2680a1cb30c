"""Which tokens a Triton program reads: next to each other, or gathered along a list."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.block_sparse_attention.walk import divmod_i32


class Run(NamedTuple):
    """`count` tokens from `start` on."""

    start: jax.Array
    count: int

    @property
    def at(self) -> Any:
        """The index that reads them."""
        return pl.ds(self.start, self.count)

    def along(self, shape: tuple[int, ...], axis: int) -> jax.Array:
        """Their indices in the shape of logits, whose `axis` they are."""
        return lax.broadcasted_iota(jnp.int32, shape, axis) + self.start

    def only_listed(self, x: jax.Array, axis: int, otherwise: float) -> jax.Array:
        """`x`: they are all listed."""
        return x

    def write(self, ref: Any, before: tuple[Any, ...], after: tuple[Any, ...], x: jax.Array):
        """Writes `x`, whose first axis they are, with indices before and after theirs."""
        ref[*before, self.at, *after] = x


class Gathered(NamedTuple):
    """Tokens anywhere; those that are not `listed` repeat one that is."""

    at: jax.Array
    listed: jax.Array

    @property
    def count(self) -> int:
        """How many, repeated ones included."""
        return self.at.shape[0]

    def along(self, shape: tuple[int, ...], axis: int) -> jax.Array:
        """Their indices in the shape of logits, whose `axis` they are."""
        return lax.broadcast_in_dim(self.at, shape, (axis,))

    def only_listed(self, x: jax.Array, axis: int, otherwise: float) -> jax.Array:
        """`x` with another number for tokens that are not listed, which are its `axis`."""
        return jnp.where(lax.broadcast_in_dim(self.listed, x.shape, (axis,)), x, otherwise)


class Few(NamedTuple):
    """The `listed` tokens from `start` on, `count` where the last of them is repeated."""

    start: jax.Array
    listed: int
    count: int

    @property
    def _gathered(self) -> Gathered:
        place = lax.iota(jnp.int32, self.count)
        return Gathered(self.start + jnp.minimum(place, self.listed - 1), place < self.listed)

    @property
    def at(self) -> Any:
        """The index that reads them."""
        return self._gathered.at

    def along(self, shape: tuple[int, ...], axis: int) -> jax.Array:
        """Their indices in the shape of logits, whose `axis` they are."""
        return self._gathered.along(shape, axis)

    def only_listed(self, x: jax.Array, axis: int, otherwise: float) -> jax.Array:
        """`x` with another number for repeated tokens, which are in its `axis`."""
        return self._gathered.only_listed(x, axis, otherwise)

    def write(self, ref: Any, before: tuple[Any, ...], after: tuple[Any, ...], x: jax.Array):
        """Writes `x`, whose first axis they are, but for repeated ones."""
        mask = lax.broadcast_in_dim(self._gathered.listed, x.shape, (0,))
        plt.store(ref.at[*before, pl.ds(self.start, self.count), *after], x, mask=mask)


Tokens = Run | Gathered | Few


def run_of(start: jax.Array, count: int, size: int) -> Run | Few:
    """The first `size` of `count` tokens from `start` on; where there are fewer, the last again."""
    return Run(start, size) if size <= count else Few(start, count, size)


class Walk(NamedTuple):
    """The way along a list of tiles.

    Attributes:
      ids: Reference to the lists.
      at: Which of them.
      first: Its first entry.
      last: The one after its last.
      block: Tokens of a tile.
      size: Tokens of a step: a part of a tile, or of several smaller ones.
    """

    ids: Any
    at: tuple[Any, ...]
    first: Any
    last: Any
    block: int
    size: int

    @property
    def steps(self) -> tuple[Any, Any]:
        """The numbers of its first step and of the one after its last."""
        if self.block >= self.size:
            # not from 0: a kernel would add the first entry to each, and keep it in a register
            parts = self.block // self.size
            return self.first * parts, self.last * parts
        return 0, lax.div(self._tokens + (self.size - 1), jnp.int32(self.size))

    @property
    def _tokens(self) -> jax.Array:
        return (self.last - self.first) * self.block

    def tokens(self, number: jax.Array) -> Tokens:
        """Those of a step."""
        if self.block >= self.size:
            entry, part = divmod_i32(number, self.block // self.size)
            start = self.ids[*self.at, entry] * self.block
            return Run(start + part * self.size, self.size)
        place = number * self.size + lax.iota(jnp.int32, self.size)
        listed = place < self._tokens
        place = jnp.minimum(place, self._tokens - 1)
        return Gathered(tokens_of(self.ids, self.at, self.first, place, self.block), listed)


def tokens_of(ids: Any, at: tuple[Any, ...], first: Any, place: jax.Array, block: int) -> jax.Array:
    """The tokens at some places of the tiles that a list has from an entry on, end to end."""
    if block == 1:
        return ids[*at, first + place]
    size = jnp.full(place.shape, block, jnp.int32)
    entry, token = lax.div(place, size), lax.rem(place, size)
    return ids[*at, first + entry] * block + token


class Place(NamedTuple):
    """Where a piece of logits lies, and which of its axes are the queries."""

    batch: jax.Array
    head: jax.Array
    queries: Tokens
    keys: Tokens
    q_axis: int

    @property
    def shape(self) -> tuple[int, int]:
        """That of the logits."""
        q_count, kv_count = self.queries.count, self.keys.count
        return (q_count, kv_count) if self.q_axis == 0 else (kv_count, q_count)

    @property
    def indices(self) -> tuple[jax.Array, jax.Array]:
        """Of the queries and of the keys, in the logits' shape."""
        q_index = self.queries.along(self.shape, self.q_axis)
        return q_index, self.keys.along(self.shape, 1 - self.q_axis)

    def reader(self, ref: Any) -> Callable[[], jax.Array]:
        """Gives an array [batch | 1, heads | 1, q_len | 1, kv_len | 1] in the logits' shape."""
        axes = self.q_axis, 1 - self.q_axis
        full = [axis for axis, size in zip(axes, ref.shape[2:], strict=True) if size > 1]
        at = tuple(
            index if size > 1 else 0
            for index, size in zip((self.batch, self.head), ref.shape, strict=False)
        )
        sides = self.queries, self.keys
        if len(full) == 2 and any(not isinstance(side, Run) for side in sides):
            tile = ref[*at, *self.indices]
            return lambda: tile
        tokens = (side.at if axis in full else 0 for side, axis in zip(sides, axes, strict=True))
        tile = ref[*at, *tokens]
        tile = lax.broadcast_in_dim(tile.T if full == [1, 0] else tile, self.shape, sorted(full))
        return lambda: tile
