"""Rows of tiles side by side: what the loops of XLA over listed tiles are made of.

One tile is too little work for a processor with several cores. So rows are sorted by how many tiles
they have, and as many neighbours as keep the machine busy walk their lists together, one tile of
each per step, or several narrow ones, up to the longest list among them. Neighbours have nearly the
same number of tiles: with n rows at a time, the turns that rows sit out are fewer than n times the
longest list in all.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jsparse import _compat
from jsparse.attention.block_sparse import Lists, Sizes


class _Tuning(NamedTuple):
    """How the work is cut; it changes time, not results.

    `logits` are at work in one step. Rows that are few go in so many `groups`: a list that is
    longer than others holds up those of its own group alone. `parts` is how often an axis is cut
    that products sum over, or that their columns lie on: where XLA spreads sums of products over
    the cores of a CPU, and not their batches, two parts are worth the tenth that they cost.
    """

    logits: int
    groups: int
    parts: int


_TUNING = {"cpu": _Tuning(logits=2**19, groups=8, parts=1 if _compat.SPREADS_BATCHES else 2)}
_TUNING_OF_ACCELERATORS = _Tuning(logits=2**23, groups=1, parts=1)


def _tuning() -> _Tuning:
    return _TUNING.get(jax.default_backend(), _TUNING_OF_ACCELERATORS)


# one product takes about so many keys: narrower tiles go several at a time
_COLUMNS = 128
# below so many queries per tile, a step's work is in reading the keys
_LEAST_ROWS = 32
# fewer of such tiles are too little work for a step
_LEAST_LANES = 8


def in_products(
    lists: Lists,
    sizes: Sizes,
    group: int,
    *,
    per_row: int,
    per_column: int = 1,
    columns: int = _COLUMNS,
) -> tuple[Lists, Sizes]:
    """The same problem in tiles of the sizes that XLA computes well.

    Tiles are halved until no sum of products has more numbers than `_compat.LARGEST_SUM`: a tile's
    logits, and the sums that have so many numbers `per_row` or `per_column`. There are at most so
    many `columns`. The `group` rows of a token stay together.
    """
    largest = _compat.LARGEST_SUM.get(jax.default_backend())
    if largest is None:
        return lists, sizes
    columns = _halved(sizes.block_kv, min(columns, largest // per_column), 1)
    rows = _halved(sizes.block_q, largest // max(columns, per_row), group)
    down, across = sizes.block_q // rows, sizes.block_kv // columns
    if down == across == 1:
        return lists, sizes
    ids = lists.kv_indices[..., None] * across + indices(across)
    ids = jnp.repeat(ids.reshape(*ids.shape[:3], -1), down, axis=2)
    counts = jnp.repeat(lists.kv_num_blocks * across, down, axis=2)
    lists = lists._replace(kv_indices=ids, kv_num_blocks=counts, turned=None)
    return lists, sizes._replace(
        block_q=rows,
        block_kv=columns,
        q_blocks=sizes.q_blocks * down,
        kv_blocks=sizes.kv_blocks * across,
    )


def _halved(size: int, most: int, unit: int) -> int:
    """The size, halved while it is above `most` and more than `_LEAST_ROWS` whole units."""
    while size > max(most, _LEAST_ROWS) and size % (2 * unit) == 0:
        size //= 2
    return size


def are_few(rows: int) -> bool:
    """Whether tiles have so few queries that a step's work is in reading the keys."""
    return rows < _LEAST_ROWS


def tiles_together(lists: Lists, sizes: Sizes) -> int:
    """How many tiles of its list a row takes per step."""
    return max(1, min(lists.kv_indices.shape[-1], _COLUMNS // sizes.block_kv))


def lane_count(lists: Lists, sizes: Sizes) -> int:
    """How many rows of tiles are computed together."""
    columns = sizes.block_kv * tiles_together(lists, sizes)
    rows = sizes.batches * sizes.heads * sizes.q_blocks
    most = _tuning().logits // (max(sizes.block_q, _LEAST_ROWS) * columns)
    if are_few(sizes.block_q):
        most = min(most, max(_LEAST_LANES, rows // _tuning().groups))
    return max(1, min(rows, most))


def lanes_that_go_on(lanes: int) -> int:
    """How many rows take a step's second half together, of those that do not skip it."""
    return max(1, lanes // 4)


def row_counts(lists: Lists, sizes: Sizes) -> Int[Array, " rows"]:
    """How many tiles each row of the problem has."""
    counts = lists.kv_num_blocks
    counts = jnp.repeat(counts, sizes.heads // counts.shape[1], axis=1)
    return jnp.broadcast_to(counts, (sizes.batches, sizes.heads, sizes.q_blocks)).reshape(-1)


# JAX's own integers are 64 bits wide where that is switched on, and slices want one width
def loop(count, body, carry):
    """`fori_loop` from 0, with a count of 32 bits."""
    return _compat.fori_loop(jnp.int32(0), jnp.asarray(count, jnp.int32), body, carry)


def indices(count: int) -> Int[Array, " count"]:
    """0, 1, ... of 32 bits."""
    return jnp.arange(count, dtype=jnp.int32)


def at(x: Array, *index: Any, of: Callable[[Array], Array] = lambda x: x) -> Array:
    """`of(x)[index]` for indices that are in bounds; floats of 16 bits have no derivative here.

    `of` gives `x` another shape. All that is read of such floats is read of one copy.
    """
    found = of(bits(x)).at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return from_bits(found, x.dtype)


def bits(x: Array) -> Array:
    """Floats of 16 bits as integers, others as they are.

    XLA for CPUs neither reads nor writes floats this short: it makes an f32 array of all of them
    first, and in a loop for every turn.
    """
    half = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if half else x


def from_bits(x: Array, dtype: Any) -> Array:
    """Floats again from what `bits` made of them."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


class Lanes(NamedTuple):
    """Rows of tiles that walk their lists together, the longest list first.

    A lane without tiles reads what the first one reads, since what is in no list may hold a NaN,
    and writes nothing.
    """

    index: Int[Array, "*groups lanes"]
    counts: Int[Array, "*groups lanes"]

    @property
    def longest(self) -> Int[Array, " *groups"]:
        """Tiles of the longest list."""
        return self.counts[..., 0]

    def entries(self, first: Array, together: int) -> Int[Array, "lanes together"]:
        """The list entries to read from `first` on; a list that is over stays with its last."""
        last = jnp.where(self.counts > 0, self.counts, self.longest) - 1
        return jnp.clip(first + indices(together), 0, jnp.maximum(last, 0)[:, None])

    def listed(self, first: Array, together: int) -> Bool[Array, "lanes together"]:
        """Whether there are entries from `first` on, or the list is over."""
        return first + indices(together) < self.counts[:, None]

    def only_listed(self, x: Array, nowhere: int) -> Array:
        """Indices to write to: `nowhere`, past an array's end, for lanes without tiles."""
        return jnp.where(self.counts > 0, x, nowhere)

    def over(self, first: Array) -> Bool[Array, " lanes"]:
        """Which lists have no entry from `first` on."""
        return first >= self.counts

    def ends(
        self, first: Array, together: int, block_kv: int
    ) -> Float[Array, "lanes parts 1 _"] | float:
        """What to add to logits: -inf where a list ends among the entries from `first` on.

        One that is over by then need not be hidden here, which takes a pass over all logits.
        """
        if together == 1:
            return 0.0
        over = jnp.where(self.listed(first, together), 0.0, -jnp.inf)
        return on_columns(jnp.repeat(over, block_kv, axis=1))


def by_count(counts: Int[Array, " lists"], together: int) -> Lanes:
    """Groups of lists by falling count; the last group is filled up with empty ones."""
    falling, index = jax.lax.sort_key_val(-counts, indices(len(counts)))
    missing = (0, -len(counts) % together)
    counts = jnp.pad(-falling, missing).reshape(-1, together)
    index = jnp.pad(index, missing).reshape(-1, together)
    return Lanes(jnp.where(counts > 0, index, index[:, :1]), counts)


class Rows(NamedTuple):
    """Batch, head and block of the queries that lanes compute."""

    batch: Int[Array, "*groups lanes"]
    head: Int[Array, "*groups lanes"]
    block: Int[Array, "*groups lanes"]

    @classmethod
    def of(cls, index: Array, sizes: Sizes) -> "Rows":
        """From the positions in the flattened axes."""
        rest, block = jnp.divmod(index, sizes.q_blocks)
        return cls(*jnp.divmod(rest, sizes.heads), block)

    def tiles(self, x: Array, size: int) -> Float[Array, "lanes size dim"]:
        """The tiles of an array [batch, length, heads, dim]."""
        index = self.batch, self.block, slice(None), self.head
        return at(x, *index, of=lambda x: in_blocks(x, size))

    def rows(self, x: Array, size: int) -> Float[Array, "lanes dim_parts size dim_part"]:
        """The tiles with their last axis cut, as the rows of `scores`."""
        inner = parts_of(x.shape[-1])
        batch, head, block = (i[:, None] for i in self)
        index = batch, block, slice(None), head, indices(inner)
        return at(x, *index, of=lambda x: in_blocks(x, size, inner))

    def tokens(self, size: int) -> Int[Array, "lanes size"]:
        """The token indices of the tiles."""
        return self.block[:, None] * size + indices(size)

    @property
    def alone(self) -> "Blocks":
        """The same, a block per lane."""
        return Blocks(self.batch, self.head, self.block[:, None])

    def list_of(self, lists_shape: tuple[int, ...], sizes: Sizes):
        """Which list a query head reads: lists are shared over batch, heads or a group."""
        batch = self.batch if lists_shape[0] > 1 else jnp.zeros_like(self.batch)
        return batch, self.head // (sizes.heads // lists_shape[1])


class Blocks(NamedTuple):
    """Batch, head and blocks of tokens that lanes take in one step, the tokens end to end."""

    batch: Int[Array, " lanes"]
    head: Int[Array, " lanes"]
    blocks: Int[Array, "lanes together"]

    def tiles(self, x: Array, size: int) -> Float[Array, "lanes tokens dim"]:
        """The tiles of an array [batch, length, heads, dim], end to end."""
        index = self.batch[:, None], self.blocks, slice(None), self.head[:, None]
        tiles = at(x, *index, of=lambda x: in_blocks(x, size))
        return tiles.reshape(tiles.shape[0], -1, x.shape[-1])

    def rows(self, x: Array, size: int) -> Float[Array, "lanes dim_parts tokens dim_part"]:
        """The same with the last axis cut, as the rows of `scores`."""
        tiles = self.tiles(x, size)
        tiles = tiles.reshape(*tiles.shape[:-1], parts_of(x.shape[-1]), -1)
        return jnp.moveaxis(tiles, 2, 1)

    def columns(self, x: Array, size: int) -> Float[Array, "lanes dim_parts parts tokens dim_part"]:
        """The tiles with both axes cut, as the columns of `scores`."""
        inner = parts_of(x.shape[-1])
        lanes, together = self.blocks.shape
        batch, head = (i[:, None, None] for i in (self.batch, self.head))
        index = batch, self.blocks[:, None], slice(None), head, indices(inner)[:, None]
        tiles = at(x, *index, of=lambda x: in_blocks(x, size, inner))
        return tiles.reshape(lanes, inner, parts_of(together * size), -1, tiles.shape[-1])

    def tokens(self, size: int) -> Int[Array, "lanes tokens"]:
        """The token indices of the tiles."""
        tokens = self.blocks[..., None] * size + indices(size)
        return tokens.reshape(len(tokens), -1)


class ColumnSums(NamedTuple):
    """Sums over lanes and steps for an array of keys, from `weighted_rows`.

    Where tiles come one at a time, and of many rows, they are kept as they come, the tokens last
    and in parts.
    """

    sums: Float[Array, "batch blocks heads *tile"]

    @property
    def _in_parts(self) -> bool:
        return self.sums.ndim == 6

    @classmethod
    def zeros(cls, x: Array, size: int, together: int = 1, *, few: bool = False) -> "ColumnSums":
        """For an array [batch, length, heads, dim], in tiles of `size`, so many per step.

        `few` says whether these are of few rows.
        """
        batch, length, heads, dim = x.shape
        parts = parts_of(size)
        in_parts = together == 1 and not few
        tile = (parts, dim, size // parts) if in_parts else (size, dim)
        return cls(jnp.zeros((batch, length // size, heads, *tile), jnp.float32))

    def add(
        self,
        there: Blocks,
        tiles: Float[Array, "lanes parts dim column_part"] | Float[Array, "lanes columns dim"],
    ) -> "ColumnSums":
        """Adds a step's tiles; lanes may meet."""
        if self._in_parts:
            # an axis more for the one tile would cost a copy
            index = there.batch, there.blocks[:, 0], there.head
        else:
            if tiles.ndim == 4:
                tiles = jnp.moveaxis(tiles, 2, 3)
            tiles = tiles.reshape(*there.blocks.shape, *self.sums.shape[-2:])
            index = there.batch[:, None], there.blocks, there.head[:, None]
        return ColumnSums(
            self.sums.at[index].add(tiles, mode="promise_in_bounds", wrap_negative_indices=False)
        )

    def like(self, x: Array) -> Array:
        """The sums in the order and dtype of the array `x`."""
        order = (0, 1, 3, 5, 2, 4) if self._in_parts else (0, 1, 3, 2, 4)
        return jnp.transpose(self.sums, order).reshape(x.shape).astype(x.dtype)


def in_blocks(
    x: Array, size: int, dim_parts: int | None = None
) -> Shaped[Array, "batch blocks size heads *dim"]:
    """An array [batch, length, heads, dim], tile by tile, its last axis in parts if so wished."""
    dim = x.shape[3:] if dim_parts is None else (dim_parts, x.shape[3] // dim_parts)
    return x.reshape(x.shape[0], -1, size, x.shape[2], *dim)


def from_rows(x: Float[Array, "lanes dim_parts size dim_part"]) -> Float[Array, "lanes size dim"]:
    """Tiles with their last axis whole again."""
    return jnp.moveaxis(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)


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


def peaks_of_tiles(
    logits: Float[Array, "lanes parts rows column_part"], together: int
) -> Float[Array, "lanes rows together"]:
    """The largest logit of each row in each tile of a step."""
    if together == 1:
        return logits.max((1, 3))[..., None]
    lanes, _, rows, _ = logits.shape
    return jnp.moveaxis(logits, 1, 2).reshape(lanes, rows, together, -1).max(-1)


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


def across(
    rows: Float[Array, "lanes dim_parts rows dim_part"],
) -> Float[Array, "lanes row_parts dim row_part"]:
    """What `scores` takes, for sums over the rows themselves."""
    x = jnp.swapaxes(cut(rows, 2), 3, 4)
    return x.reshape(*x.shape[:2], -1, x.shape[4])


def weighted_rows(
    rows: Float[Array, "lanes row_parts dim row_part"] | Float[Array, "lanes rows dim"],
    weights: Float[Array, "lanes parts rows column_part"],
) -> Float[Array, "lanes parts dim column_part"] | Float[Array, "lanes columns dim"]:
    """Sums of rows, one sum per column of the weights.

    Many rows come as `across` gives them. Few come whole, and so do their sums: these are small
    beside what it costs to turn them round.
    """
    if rows.ndim == 3:
        weights = jnp.moveaxis(weights, 1, 2).reshape(*rows.shape[:2], -1)
        dims = (((1,), (1,)), ((0,), (0,)))
        return jax.lax.dot_general(weights, rows, dims, preferred_element_type=jnp.float32)
    rows = rows[:, None]
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
    """A bias, each axis 1 or full, tile by tile.

    A tile's rows are `stored` queries times heads of a group, each 1 or all that there are.
    """

    tiles: Float[Array, "bias_batch bias_heads rows columns q_size kv_size"] | None
    stored: tuple[int, int] = (1, 1)
    full: tuple[int, int] = (1, 1)

    @classmethod
    def of(cls, bias: Array | None, sizes: Sizes, group: int) -> "Bias":
        """From a bias with four axes, lengths being whole tiles, heads packed in groups."""
        if bias is None:
            return cls(None)
        full = sizes.block_q // group, group
        q_size = full[0] if bias.shape[2] > 1 else 1
        members = group if bias.shape[1] > 1 else 1
        kv_size = sizes.block_kv if bias.shape[3] > 1 else 1
        batches, heads = bias.shape[0], bias.shape[1] // members
        rows, columns = bias.shape[2] // q_size, bias.shape[3] // kv_size
        tiles = bias.reshape(batches, heads, members, rows, q_size, columns, kv_size)
        tiles = jnp.transpose(tiles, (0, 1, 3, 5, 4, 2, 6))
        tiles = tiles.reshape(*tiles.shape[:4], q_size * members, kv_size)
        return cls(tiles, (q_size, members), full)

    def load(self, queries: Blocks, keys: Blocks) -> Float[Array, "lanes parts _ _"] | None:
        """The lanes' tiles, below each other or side by side; `on_rows` of them is for `scores`."""
        if self.tiles is None:
            return None
        where = self._position(queries, keys)
        tiles = at(self.tiles, *where)
        down, across = self._repeats(where)
        tiles = tiles.reshape(len(tiles), down, across, *tiles.shape[-2:])
        tiles = jnp.swapaxes(tiles, 2, 3)
        return cut(tiles.reshape(len(tiles), down * tiles.shape[2], -1), 2)

    def on_rows(self, tiles: Array | None, rows: int) -> Float[Array, "lanes parts _ _"] | None:
        """What `load` gave, for each of a step's rows or for all alike."""
        if tiles is None or tiles.shape[2] in (1, rows):
            return tiles
        lanes, parts, stored, part = tiles.shape
        tiles = tiles.reshape(lanes, parts, stored // math.prod(self.stored), *self.stored, part)
        blocks = rows // math.prod(self.full)
        tiles = jnp.broadcast_to(tiles, (lanes, parts, blocks, *self.full, part))
        return tiles.reshape(lanes, parts, rows, part)

    def add(self, sums: Array, queries: Blocks, keys: Blocks, tiles: Array) -> Array:
        """Adds what `load` gave to sums in the order of `tiles`; lanes may meet."""
        where = self._position(queries, keys)
        down, across = self._repeats(where)
        lanes, parts, rows, part = tiles.shape
        tiles = jnp.moveaxis(tiles, 1, 2)
        tiles = tiles.reshape(lanes, down, rows // down, across, parts * part // across)
        tiles = jnp.swapaxes(tiles, 2, 3)
        tiles = tiles.reshape(lanes, down * across, *tiles.shape[3:])
        return sums.at[where].add(tiles, mode="promise_in_bounds", wrap_negative_indices=False)

    def like(self, sums: Array, bias: Array) -> Array:
        """Sums in the order and dtype of the bias."""
        sums = sums.reshape(*sums.shape[:4], *self.stored, sums.shape[-1])
        return jnp.transpose(sums, (0, 1, 5, 2, 4, 3, 6)).reshape(bias.shape).astype(bias.dtype)

    def _repeats(self, where: tuple[Array, ...]) -> tuple[int, int]:
        """How many tiles a step has one below the other, and side by side."""
        return where[2].shape[1], where[3].shape[1]

    def _position(self, queries: Blocks, keys: Blocks):
        """Where the tiles are; an axis of 1 is the same for all."""
        assert self.tiles is not None
        shape = self.tiles.shape
        # one bias for all queries or all keys needs no tile of each
        all_queries = shape[2] == 1 and self.stored[0] == 1
        all_keys = shape[3] == 1 and shape[5] == 1
        q_blocks = queries.blocks[:, :1] if all_queries else queries.blocks
        kv_blocks = keys.blocks[:, :1] if all_keys else keys.blocks
        index = queries.batch[:, None], queries.head[:, None], q_blocks, kv_blocks
        return tuple(
            i if size > 1 else jnp.zeros_like(i) for i, size in zip(index, shape[:4], strict=True)
        )
