"""Rows, or columns, of tiles side by side: what the loops of XLA over listed tiles are made of.

One tile is too little work for a processor with several cores. So rows are sorted by how many tiles
they have, and as many neighbours as keep the machine busy walk their lists together, one tile of
each per step, up to the longest list among them. Neighbours have nearly the same number of tiles:
with n rows at a time, the turns that rows sit out are fewer than n times the longest list in all.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jsparse.attention.block_sparse import Sizes


class _Tuning(NamedTuple):
    """How the work is cut; it changes time, not results.

    `logits` are at work in one step. `parts` is how often an axis is cut that products sum over,
    or that their columns lie on: in jax 0.10, XLA spreads a sum of products over the cores of a
    CPU, while a single product of a tile's size, or a batch of them, it computes on one. Later
    versions spread both; what the parts cost or save there is about a tenth.
    """

    logits: int
    parts: int


_TUNING = {"cpu": _Tuning(logits=2**19, parts=2)}
_TUNING_OF_ACCELERATORS = _Tuning(logits=2**23, parts=1)


def _tuning() -> _Tuning:
    return _TUNING.get(jax.default_backend(), _TUNING_OF_ACCELERATORS)


def lane_count(lists: int, sizes: Sizes) -> int:
    """How many rows, or columns, of tiles are computed together."""
    return max(1, min(lists, _tuning().logits // (sizes.block_q * sizes.block_kv)))


# JAX's own integers are 64 bits wide where that is switched on, and slices want one width
def loop(count, body, carry):
    """`fori_loop` from 0, with a count of 32 bits."""
    return jax.lax.fori_loop(jnp.int32(0), jnp.asarray(count, jnp.int32), body, carry)


def indices(count: int) -> Int[Array, " count"]:
    """0, 1, ... of 32 bits."""
    return jnp.arange(count, dtype=jnp.int32)


def at(x: Array, *index: Any) -> Array:
    """`x[index]` for indices that are in bounds."""
    return x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


class Lanes(NamedTuple):
    """Rows, or columns, of tiles that walk their lists together, the longest list first.

    A lane without tiles reads what the first one reads, since what is in no list may hold a NaN,
    and writes nothing.
    """

    index: Int[Array, "*groups lanes"]
    counts: Int[Array, "*groups lanes"]

    @property
    def longest(self) -> Int[Array, " *groups"]:
        """Steps until the last list is over."""
        return self.counts[..., 0]

    def entry(self, step) -> Int[Array, " lanes"]:
        """The list entry to read; a list that is over stays with its last."""
        last = jnp.where(self.counts > 0, self.counts, self.longest) - 1
        return jnp.clip(step, 0, jnp.maximum(last, 0))

    def only_listed(self, x: Array, nowhere: int) -> Array:
        """Indices to write to: `nowhere`, past an array's end, for lanes without tiles."""
        return jnp.where(self.counts > 0, x, nowhere)

    def over(self, step) -> Float[Array, "lanes 1 1 1"]:
        """What to add to logits: -inf where a list is over."""
        return jnp.where(step < self.counts, 0.0, -jnp.inf)[:, None, None, None]


def by_count(counts: Int[Array, " lists"], together: int) -> Lanes:
    """Groups of lists by falling count; the last group is filled up with empty ones."""
    falling, index = jax.lax.sort_key_val(-counts, indices(len(counts)))
    missing = (0, -len(counts) % together)
    counts = jnp.pad(-falling, missing).reshape(-1, together)
    index = jnp.pad(index, missing).reshape(-1, together)
    return Lanes(jnp.where(counts > 0, index, index[:, :1]), counts)


class Place(NamedTuple):
    """Batch, head and block of lanes."""

    batch: Int[Array, "*groups lanes"]
    head: Int[Array, "*groups lanes"]
    block: Int[Array, "*groups lanes"]

    @classmethod
    def of(cls, index: Array, heads: int, blocks: int) -> "Place":
        """From the positions in the flattened axes."""
        rest, block = jnp.divmod(index, blocks)
        return cls(*jnp.divmod(rest, heads), block)

    def tiles(self, x: Array, size: int) -> Float[Array, "lanes size dim"]:
        """The tiles of an array [batch, length, heads, dim]."""
        return at(in_blocks(x, size), self.batch, self.block, slice(None), self.head)

    def rows(self, x: Array, size: int) -> Float[Array, "lanes dim_parts size dim_part"]:
        """The tiles with their last axis cut, as the rows of `scores`."""
        blocks = in_blocks(x, size)
        cut = parts_of(x.shape[-1])
        blocks = blocks.reshape(*blocks.shape[:-1], cut, -1)
        batch, block, head = (i[:, None] for i in (self.batch, self.block, self.head))
        return at(blocks, batch, block, slice(None), head, indices(cut))

    def columns(self, x: Array, size: int) -> Float[Array, "lanes dim_parts parts tokens dim_part"]:
        """The tiles with both axes cut, as the columns of `scores`."""
        blocks = in_blocks(x, size)
        outer, inner = parts_of(size), parts_of(x.shape[-1])
        blocks = blocks.reshape(
            *blocks.shape[:2], outer, -1, blocks.shape[3], inner, x.shape[-1] // inner
        )
        batch, block, head = (i[:, None, None] for i in (self.batch, self.block, self.head))
        return at(blocks, batch, block, indices(outer), slice(None), head, indices(inner)[:, None])

    def tokens(self, size: int) -> Int[Array, "lanes size"]:
        """The token indices of the tiles."""
        return self.block[:, None] * size + indices(size)

    def list_of(self, lists_shape: tuple[int, ...], sizes: Sizes):
        """Which list a query head reads: lists are shared over batch, heads or a group."""
        batch = self.batch if lists_shape[0] > 1 else jnp.zeros_like(self.batch)
        return batch, self.head // (sizes.heads // lists_shape[1])


def in_blocks(x: Array, size: int) -> Float[Array, "batch blocks size heads dim"]:
    """An array [batch, length, heads, dim], tile by tile."""
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def sums_by_rows(x: Array, size: int) -> Float[Array, "batch blocks heads dim_parts size dim_part"]:
    """Zeros for sums in the order of `Place.rows`, where adding a tile touches one stretch."""
    parts, (batch, length, heads, dim) = parts_of(x.shape[-1]), x.shape
    return jnp.zeros((batch, length // size, heads, parts, size, dim // parts), jnp.float32)


def from_rows(
    sums: Float[Array, "batch blocks heads dim_parts size dim_part"], like: Array
) -> Float[Array, "batch length heads dim"]:
    """Sums in the order and dtype of the array `like`."""
    return jnp.transpose(sums, (0, 1, 4, 2, 3, 5)).reshape(like.shape).astype(like.dtype)


def parts_of(length: int) -> int:
    """How many parts an axis is cut into."""
    parts = _tuning().parts
    return 1 if length % parts else parts


def cut(x: Array, axis: int) -> Shaped[Array, "lanes parts ..."]:
    """Cuts an axis that is summed over into parts, which come second."""
    parts = parts_of(x.shape[axis])
    return jnp.moveaxis(x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :]), axis, 1)


def scores(
    rows: Float[Array, "lanes dim_parts rows dim_part"],
    columns: Float[Array, "lanes dim_parts parts column_part dim_part"],
) -> Float[Array, "lanes parts rows column_part"]:
    """Products of rows with columns; those come in parts."""
    rows = jnp.broadcast_to(rows[:, :, None], (*columns.shape[:3], *rows.shape[2:]))
    dims = (((4,), (4,)), ((0, 1, 2), (0, 1, 2)))
    return jax.lax.dot_general(rows, columns, dims, preferred_element_type=jnp.float32).sum(1)


def weighted(
    weights: Float[Array, "lanes parts rows column_part"], values: Float[Array, "lanes columns dim"]
) -> Float[Array, "lanes rows dim"]:
    """Sums of values over the tiles' columns."""
    dims = (((3,), (2,)), ((0, 1), (0, 1)))
    values = cut(values, 1)
    return jax.lax.dot_general(weights, values, dims, preferred_element_type=jnp.float32).sum(1)


def weighted_columns(
    weights: Float[Array, "lanes parts rows column_part"],
    columns: Float[Array, "lanes dim_parts parts column_part dim_part"],
) -> Float[Array, "lanes dim_parts rows dim_part"]:
    """The same of what `scores` takes, which saves a second copy in another order."""
    weights = jnp.broadcast_to(weights[:, None], (*columns.shape[:3], *weights.shape[2:]))
    dims = (((4,), (3,)), ((0, 1, 2), (0, 1, 2)))
    return jax.lax.dot_general(weights, columns, dims, preferred_element_type=jnp.float32).sum(2)


def weighted_rows(
    rows: Float[Array, "lanes dim rows"], weights: Float[Array, "lanes parts rows column_part"]
) -> Float[Array, "lanes parts dim column_part"]:
    """Sums of rows, one sum per column of the weights."""
    rows = cut(rows, 2)[:, None]
    rows = jnp.broadcast_to(rows, (rows.shape[0], weights.shape[1], *rows.shape[2:]))
    shape = *weights.shape[:2], rows.shape[2], -1, weights.shape[3]
    dims = (((4,), (3,)), ((0, 1, 2), (0, 1, 2)))
    weights = weights.reshape(shape)
    return jax.lax.dot_general(rows, weights, dims, preferred_element_type=jnp.float32).sum(2)


def on_rows(x: Array) -> Shaped[Array, "lanes 1 rows 1"]:
    """Numbers per row, to go with `scores`."""
    return x[:, None, :, None]


def on_columns(x: Array) -> Shaped[Array, "lanes parts 1 column_part"]:
    """Numbers per column, to go with `scores`."""
    return cut(x, 1)[:, :, None]


class Bias(NamedTuple):
    """A bias, each axis 1 or full, tile by tile."""

    tiles: Float[Array, "bias_batch bias_heads rows q_size columns kv_size"] | None

    @classmethod
    def of(cls, bias: Array | None, sizes: Sizes) -> "Bias":
        """From a bias with four axes, lengths being whole tiles."""
        if bias is None:
            return cls(None)
        q_size = sizes.block_q if bias.shape[2] > 1 else 1
        kv_size = sizes.block_kv if bias.shape[3] > 1 else 1
        rows, columns = bias.shape[2] // q_size, bias.shape[3] // kv_size
        return cls(bias.reshape(*bias.shape[:2], rows, q_size, columns, kv_size))

    def position(self, queries: Place, kv_block: Array):
        """Where the lanes' tiles are; an axis of 1 is the same for all."""
        assert self.tiles is not None
        shape = self.tiles.shape
        batch, head, q_block, kv_block = (
            index if shape[axis] > 1 else jnp.zeros_like(index)
            for axis, index in zip((0, 1, 2, 4), (*queries, kv_block), strict=True)
        )
        return batch, head, q_block, slice(None), kv_block

    def load(self, queries: Place, kv_block) -> Float[Array, "lanes q_size kv_size"] | None:
        """The lanes' tiles."""
        return None if self.tiles is None else at(self.tiles, *self.position(queries, kv_block))
