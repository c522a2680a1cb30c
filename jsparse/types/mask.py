"""Masks: who may see whom from positions alone, element by element and tile by tile."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jsparse import checks
from jsparse.types.pytree import flatten_batch, pytree_dataclass

Index = Any  # int32 array of any shape, or a Python int
Range = tuple[Index, Index]  # first and last, both inclusive


class Frame(NamedTuple):
    """What a mask is evaluated in: the lengths, and which sequence and query head.

    `batch` indexes the flattened batch axes. Both indices may be traced, and so may `kv_len` where
    each sequence has a length of its own.
    """

    q_len: int
    kv_len: Index
    batch: Index = 0
    head: Index = 0

    @property
    def diagonal(self) -> Index:
        """The last key that query 0 sees under a bottom-right aligned causal mask."""
        return self.kv_len - self.q_len


class TileGrid(NamedTuple):
    """The tiling of a [q_len, kv_len] plane; the last tiles may be ragged."""

    q_len: int
    kv_len: int
    block_q: int
    block_kv: int

    @property
    def q_blocks(self) -> int:
        """Rows of tiles."""
        return -(-self.q_len // self.block_q)

    @property
    def kv_blocks(self) -> int:
        """Columns of tiles."""
        return -(-self.kv_len // self.block_kv)

    def q_range(self, q_block: Index) -> Range:
        """First and last query of a row of tiles, both inclusive."""
        first = q_block * self.block_q
        return first, jnp.minimum(first + self.block_q, self.q_len) - 1

    def kv_range(self, kv_block: Index) -> Range:
        """First and last key of a column of tiles, both inclusive."""
        first = kv_block * self.block_kv
        return first, jnp.minimum(first + self.block_kv, self.kv_len) - 1

    def first_row(self, query: Index) -> Index:
        """The first row of tiles that has a query from `query` on; past the last if none has."""
        row = jnp.maximum(query, 0) // self.block_q
        return jnp.where(query < self.q_len, row, self.q_blocks)

    def end_row(self, query: Index) -> Index:
        """The row of tiles after the last that has a query before `query`."""
        return jnp.clip(-(-query // self.block_q), 0, self.q_blocks)


class TileBounds(NamedTuple):
    """What is known of a tile without looking at its elements.

    `some` False means that no pair is visible; `every` True means that all are. A mask may err
    towards `some=True, every=False`, never the other way.
    """

    some: Bool[Array, "..."]
    every: Bool[Array, "..."]


class Runs(NamedTuple):
    """Rows of tiles from each `first` up to `end`, which is none of them.

    They may overlap, and be empty. What a run has before the end of an earlier one, an earlier one
    has: so it is where they ascend by `first`.
    """

    first: Int[Array, " runs"]
    end: Int[Array, " runs"]

    @classmethod
    def one(cls, first: Index, end: Index) -> "Runs":
        """A single one."""
        return cls(*(jnp.asarray(x, jnp.int32).reshape(1) for x in (first, end)))

    def united(self, other: "Runs") -> "Runs":
        """What is in either."""
        runs = map(jnp.concatenate, zip(self, other, strict=True))
        return Runs(*jax.lax.sort(tuple(runs), num_keys=1))

    def common(self, other: "Runs") -> "Runs":
        """What is in both."""
        first = jnp.maximum(self.first[:, None], other.first).reshape(-1)
        return Runs(first, jnp.minimum(self.end[:, None], other.end).reshape(-1))


TileClassifier = Callable[[Index, Index, Frame], TileBounds]
M = TypeVar("M", bound="Mask")


@pytree_dataclass
class Mask:
    """A rule for which key each query may see; True means attend.

    Subclasses are pytrees of arrays (segment ids, intervals) and static numbers (window sizes).
    Array fields are declared with `array_field(core_ndim=...)`; axes before the core are batch,
    and `flatten_batch` turns them into one, which is what `visible` and `classifier` index.
    Masks compose with `&`, `|` and `~`.
    """

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        """Says element by element whether query `q_index` may see key `kv_index`."""
        raise NotImplementedError

    def visible_run(
        self, q_index: Index, kv_first: Index, count: int, frame: Frame
    ) -> Bool[Array, "..."]:
        """Says whether query `q_index` may see all of `count` keys from `kv_first` on.

        Masks that know this without asking for each key override it.
        """
        return functools.reduce(
            operator.and_, (self.visible(q_index, kv_first + n, frame) for n in range(count))
        )

    def within(self, q_range: Range, kv_range: Range, frame: Frame) -> TileBounds:
        """Bounds any pairs of queries and keys between a first and a last position each.

        Every mask that knows something of positions alone overrides this; it costs the same for
        any range. Masks of arrays override `classifier` instead.
        """
        shape = jnp.broadcast_shapes(*map(jnp.shape, (*q_range, *kv_range)))
        return TileBounds(jnp.ones(shape, bool), jnp.zeros(shape, bool))

    def classifier(self, grid: TileGrid) -> TileClassifier:
        """Prepares a function of (q_block, kv_block, frame) that bounds whole tiles.

        What is summarised per block (extrema of ids, say) is computed here, once, in time
        proportional to the lengths; the function itself costs the same for any tile size.
        """

        def classify(q_block: Index, kv_block: Index, frame: Frame) -> TileBounds:
            return self.within(grid.q_range(q_block), grid.kv_range(kv_block), frame)

        return classify

    def max_tiles(self, grid: TileGrid) -> int:
        """Bounds from static numbers how many tiles one row of tiles can need."""
        return grid.kv_blocks

    def candidates(
        self, q_block: Index, grid: TileGrid, frame: Frame
    ) -> Int[Array, " count"] | None:
        """Names the kv blocks that one row of tiles can need, where a closed form does.

        Ascending; what is named again, or lies outside of the grid, does not count, and what is not
        needed may be named. None: any may be needed. How many there are depends on static numbers
        alone; masks that name few have their lists made in time proportional to those.
        """
        return None

    def rows(self, kv_block: Index, grid: TileGrid, frame: Frame) -> Runs | None:
        """Names the rows of tiles that need a column, where a closed form does.

        They are those and no others in which `classifier` finds something to see. None: there is no
        closed form. How many runs there are depends on static numbers alone.
        """
        return None

    @property
    def heads(self) -> int:
        """How many query heads the mask tells apart; 1 when it is the same for all."""
        return max([1, *(child.heads for child in self._children())])

    @property
    def by_batch_index(self) -> bool:
        """Whether more depends on the sequence than which entry of an array is read."""
        return any(child.by_batch_index for child in self._children())

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The batch axes that the mask's arrays carry, broadcast against each other."""
        shapes = [child.batch_shape for child in self._children()]
        for name, core_ndim in self._array_fields():
            value = getattr(self, name)
            shapes.append(value.shape[: value.ndim - core_ndim])
        return jnp.broadcast_shapes(*shapes) if shapes else ()

    def flatten_batch(self: M, batch_shape: tuple[int, ...]) -> M:
        """Brings the batch axes of every array to one, of length 1 where all share the array."""
        return flatten_batch(self, batch_shape)

    def check_lengths(self, q_len: int, kv_len: int) -> None:
        """Raises ValueError if an array of the mask was made for other lengths."""
        for child in self._children():
            child.check_lengths(q_len, kv_len)

    def _array_fields(self) -> list[tuple[str, int]]:
        fields = dataclasses.fields(self)
        return [
            (f.name, f.metadata["core_ndim"])
            for f in fields
            if "core_ndim" in f.metadata and getattr(self, f.name) is not None
        ]

    def _children(self) -> list["Mask"]:
        values = [getattr(self, f.name) for f in dataclasses.fields(self)]
        return [value for value in values if isinstance(value, Mask)]

    def __and__(self, other: "Mask") -> "Mask":
        checks.mask_type(other)
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        checks.mask_type(other)
        return Or(self, other)

    def __invert__(self) -> "Mask":
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError("A mask has no truth value; combine masks with `&`, `|`, `~`, not `and`.")


def _join(operation: Callable[..., Any], left: TileClassifier, right: TileClassifier):
    """Combines what two masks know of the same tile."""

    def bounds(*where: Any) -> TileBounds:
        return TileBounds(*map(operation, left(*where), right(*where)))

    return bounds


@pytree_dataclass
class And(Mask):
    """Visible where both masks say so."""

    left: Mask
    right: Mask

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        left = self.left.visible(q_index, kv_index, frame)
        return left & self.right.visible(q_index, kv_index, frame)

    def visible_run(
        self, q_index: Index, kv_first: Index, count: int, frame: Frame
    ) -> Bool[Array, "..."]:
        run = kv_first, count, frame
        return self.left.visible_run(q_index, *run) & self.right.visible_run(q_index, *run)

    def within(self, q_range: Range, kv_range: Range, frame: Frame) -> TileBounds:
        return _join(operator.and_, self.left.within, self.right.within)(q_range, kv_range, frame)

    def classifier(self, grid: TileGrid) -> TileClassifier:
        return _join(operator.and_, self.left.classifier(grid), self.right.classifier(grid))

    def max_tiles(self, grid: TileGrid) -> int:
        return min(self.left.max_tiles(grid), self.right.max_tiles(grid))

    def candidates(
        self, q_block: Index, grid: TileGrid, frame: Frame
    ) -> Int[Array, " count"] | None:
        named = [side.candidates(q_block, grid, frame) for side in (self.left, self.right)]
        return min((of for of in named if of is not None), key=len, default=None)

    def rows(self, kv_block: Index, grid: TileGrid, frame: Frame) -> Runs | None:
        left, right = (side.rows(kv_block, grid, frame) for side in (self.left, self.right))
        return None if left is None or right is None else left.common(right)


@pytree_dataclass
class Or(Mask):
    """Visible where either mask says so."""

    left: Mask
    right: Mask

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        left = self.left.visible(q_index, kv_index, frame)
        return left | self.right.visible(q_index, kv_index, frame)

    def within(self, q_range: Range, kv_range: Range, frame: Frame) -> TileBounds:
        return _join(operator.or_, self.left.within, self.right.within)(q_range, kv_range, frame)

    def classifier(self, grid: TileGrid) -> TileClassifier:
        return _join(operator.or_, self.left.classifier(grid), self.right.classifier(grid))

    def max_tiles(self, grid: TileGrid) -> int:
        return min(grid.kv_blocks, self.left.max_tiles(grid) + self.right.max_tiles(grid))

    def candidates(
        self, q_block: Index, grid: TileGrid, frame: Frame
    ) -> Int[Array, " count"] | None:
        left, right = (side.candidates(q_block, grid, frame) for side in (self.left, self.right))
        return None if left is None or right is None else jnp.sort(jnp.concatenate([left, right]))

    def rows(self, kv_block: Index, grid: TileGrid, frame: Frame) -> Runs | None:
        left, right = (side.rows(kv_block, grid, frame) for side in (self.left, self.right))
        return None if left is None or right is None else left.united(right)


@pytree_dataclass
class Not(Mask):
    """Visible where the mask says otherwise."""

    mask: Mask

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        return ~self.mask.visible(q_index, kv_index, frame)

    def within(self, q_range: Range, kv_range: Range, frame: Frame) -> TileBounds:
        some, every = self.mask.within(q_range, kv_range, frame)
        return TileBounds(~every, ~some)

    def classifier(self, grid: TileGrid) -> TileClassifier:
        inner = self.mask.classifier(grid)

        def classify(q_block: Index, kv_block: Index, frame: Frame) -> TileBounds:
            some, every = inner(q_block, kv_block, frame)
            return TileBounds(~every, ~some)

        return classify


def pad_to_blocks(x: Array, block: int, fill: Any) -> Array:
    """Lengthens the last axis to whole blocks."""
    missing = -x.shape[-1] % block
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], constant_values=fill)


def block_extrema(x: Array, block: int) -> tuple[Array, Array]:
    """Minimum and maximum of each block of the last axis, over the tokens that exist."""
    info = jnp.iinfo(x.dtype)
    low, high = pad_to_blocks(x, block, info.max), pad_to_blocks(x, block, info.min)
    shape = (*x.shape[:-1], -1, block)
    return low.reshape(shape).min(-1), high.reshape(shape).max(-1)
