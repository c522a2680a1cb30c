"""Lists of blocks that are shorter than a tile, brought to whole tiles of several blocks each."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.logits import Tiles
from pallas_kernels.block_sparse_attention.walk import Lists, Side, readable


class Strips(NamedTuple):
    """Lists in whole tiles, and which of their blocks count.

    Attributes:
      lists: Each part begins with a tile, and all numbers but `ids` count tiles. What fills up the
        last tile of a part is its last block again: memory that is there and that is read anyway.
      counted: bool, as `lists.ids`: False for what only fills up.
      block: Tokens per block.
    """

    lists: Lists
    counted: jax.Array
    block: int

    def positions(self, hidden: int | None = None) -> jax.Array:
        """The position of each token, int32 [batch | 1, heads | kv_heads | 1, tokens].

        Args:
          hidden: That of tokens that do not count; default theirs.
        """
        return _positions(self.lists.ids, self.counted, self.block, hidden)

    def along(self, values: jax.Array, heads: int, otherwise: float | None = None) -> jax.Array:
        """Numbers per token in the order of the lists.

        Args:
          values: [batch | 1, heads | 1, tokens | 1].
          heads: All heads of the values' side.
          otherwise: The number of tokens that do not count; default theirs.

        Returns:
          [batch | 1, heads | 1, tokens]; as it is if all tokens share a number.
        """
        if values.shape[2] == 1:
            return values
        return _along(values, self.lists.ids, self.counted, self.block, heads, otherwise)


class Arranged(NamedTuple):
    """What a kernel walks along, and what it reads on the way.

    Attributes:
      lists: Which tiles its programs meet.
      tiles: The given ones, their values where programs look for them.
      positions: As `walk.launch` takes them, None where each block is a tile.
      numbers: Numbers per query, likewise.
    """

    lists: Lists
    tiles: Tiles
    positions: jax.Array | None
    numbers: tuple[jax.Array, ...] = ()


def by_query(
    lists: Lists, tiles: Tiles, own: Side, met: Side, numbers: tuple[jax.Array, ...] = ()
) -> Arranged:
    """Arranges what programs read that own queries.

    Args:
      lists: For each block of queries the blocks of keys.
      tiles: Sizes of blocks, and what happens to logits.
      own: The queries.
      met: The keys.
      numbers: f32 [batch, heads, q_len].
    """
    rows = partial(readable, own=own)
    numbers = tuple(map(rows, numbers))
    found = strips(lists, met)
    if found is None:
        return Arranged(lists, tiles.arranged(rows, _as_they_are), None, numbers)
    kv_len = met.arrays[0].shape[1]
    tiles = tiles.hiding(kv_len).arranged(rows, partial(found.along, heads=own.heads))
    return Arranged(found.lists, tiles, found.positions(kv_len), numbers)


def by_key(
    inverse: Lists, tiles: Tiles, own: Side, met: Side, lse2: jax.Array, delta: jax.Array
) -> Arranged:
    """Arranges what programs read that own keys; numbers are `lse2` and `delta`.

    Args:
      inverse: For each block of keys the blocks of queries.
      tiles: Sizes of blocks, and what happens to logits.
      own: The keys.
      met: The queries.
      lse2: f32 [batch, heads, q_len]; +inf makes the probabilities of a row 0.
      delta: f32 [batch, heads, q_len].
    """
    columns = partial(readable, own=own)
    found = strips(inverse, met)
    if found is None:
        return Arranged(inverse, tiles.arranged(_as_they_are, columns), None, (lse2, delta))
    along = partial(found.along, heads=met.heads)
    numbers = along(lse2, otherwise=math.inf), along(delta)
    return Arranged(found.lists, tiles.arranged(along, columns), found.positions(), numbers)


def strips(lists: Lists, met: Side) -> Strips | None:
    """The lists of blocks of `met` in whole tiles; None where each block is a tile."""
    count = met.strips
    if count == 1:
        return None
    # where no mask hides anything, what fills up a tile is hidden all the same
    whole = lists.last if lists.whole is None else lists.whole
    found, counted = _in_tiles(lists._replace(whole=whole), count=count)
    return Strips(found, counted, met.block)


# compiled as a whole also where the caller is not: each step would be compiled apart
@partial(jax.jit, static_argnames="count")
def _in_tiles(lists: Lists, count: int) -> tuple[Lists, jax.Array]:
    # of each part, the last tile alone may be filled up
    length = (lists.ids.shape[2] + (count - 1) * lists.first.shape[2]) // count * count
    entries = jnp.arange(length, dtype=jnp.int32)

    def one_list(ids, first, last, whole):
        tiles = (last - first + count - 1) // count
        after = jnp.cumsum(tiles, dtype=jnp.int32)
        before = after - tiles
        own = jnp.searchsorted(after, entries // count, side="right").astype(jnp.int32)
        # what follows the last part belongs to none
        own = jnp.minimum(own, len(after) - 1)
        place = first[own] + entries - before[own] * count
        counted = place < last[own]
        source = jnp.clip(jnp.minimum(place, last[own] - 1), 0, len(ids) - 1)
        return Lists(ids[source], before, after, before + (whole - first) // count), counted

    return jax.vmap(jax.vmap(one_list))(*lists)


@partial(jax.jit, static_argnames=("block", "hidden"))
def _positions(ids: jax.Array, counted: jax.Array, block: int, hidden: int | None) -> jax.Array:
    found = ids[..., None] * block + jnp.arange(block, dtype=jnp.int32)
    if hidden is not None:
        found = jnp.where(counted[..., None], found, hidden)
    return _tokens(found)


@partial(jax.jit, static_argnames=("block", "heads", "otherwise"))
def _along(
    values: jax.Array,
    ids: jax.Array,
    counted: jax.Array,
    block: int,
    heads: int,
    otherwise: float | None,
) -> jax.Array:
    several = max(ids.shape[1], values.shape[1]) > 1
    sizes = max(ids.shape[0], values.shape[0]), heads if several else 1
    batch, head = jnp.arange(sizes[0])[:, None], jnp.arange(sizes[1])
    of_list = batch % ids.shape[0], head // (sizes[1] // ids.shape[1])
    of_value = batch % values.shape[0], head % values.shape[1]
    blocks = values.reshape(*values.shape[:2], -1, block)
    found = blocks[of_value[0][..., None], of_value[1][..., None], ids[of_list]]
    if otherwise is not None:
        found = jnp.where(counted[of_list][..., None], found, otherwise)
    return _tokens(found)


def _as_they_are(values: jax.Array) -> jax.Array:
    return values


def _tokens(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-2], -1)
