"""Neighborhood: on a grid of tokens, each query sees a window of keys along every axis."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jsparse import _compat, checks
from jsparse.core.token_tiles import Span, TokenTiles
from jsparse.types import Frame, Mask, TileBounds, array_field, pytree_dataclass, static_field
from jsparse.types.mask import Index, Range


class Axis(NamedTuple):
    """Who sees whom along one axis: tokens of one residue by `dilation`, in windows.

    Positions count inside a residue class, whose length is that of its own.
    """

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False

    def class_length(self, residue: Any) -> Any:
        """How many tokens there are of a residue."""
        return (self.length - 1 - residue) // self.dilation + 1

    def window_of(self, position: Any, length: Any) -> Span:
        """First and last key that a query sees; neither ever falls from one query to the next.

        Works on arrays of NumPy as well as of JAX. Queries past the end see what the last one does.
        """
        first_of_group = position // self.stride * self.stride
        if self.is_causal:
            lead = (first_of_group + self.stride - 1).clip(max=length - 1)
            return (lead - self.window + 1).clip(min=0), position.clip(max=length - 1)
        lead = (first_of_group + self.stride // 2).clip(max=length - 1)
        first = (lead - self.window // 2).clip(0, length - self.window)
        return first, first + self.window - 1

    @property
    def sees_all(self) -> bool:
        """Whether every query sees every key of the axis."""
        return self.window == self.length and not self.is_causal


class _Field(NamedTuple):
    """One condition on pairs: `first <= column <= last`, all of them below `size`."""

    first: Int[np.ndarray, " queries"]
    last: Int[np.ndarray, " queries"]
    column: Int[np.ndarray, " keys"]
    size: int

    @property
    def bits(self) -> int:
        """How many bits it takes, with one to borrow from above them."""
        return (self.size - 1).bit_length() + 1


@pytree_dataclass
class Neighborhood(Mask):
    """A key is seen where it is in the query's window along every axis of the grid.

    `q_order` and `kv_order` say which token of the grid stands where. What an order adds to fill
    whole tiles is seen by nobody, and sees what the last query of its residue does.

    Windows are numbers per query, several axes side by side in one word. A guard bit above each
    axis's bits is set before subtracting, and cleared where the difference is below zero.
    """

    axes: tuple[Axis, ...] = static_field()
    q_order: TokenTiles = static_field()
    kv_order: TokenTiles = static_field()
    guards: tuple[int, ...] = static_field()
    bounds: Int[Array, "*batch words 2 q_len"] = array_field(core_ndim=3)
    columns: Int[Array, "*batch words kv_len"] = array_field(core_ndim=2)

    @classmethod
    def of(
        cls, axes: tuple[Axis, ...], q_order: TokenTiles, kv_order: TokenTiles
    ) -> "Neighborhood":
        """Works out every token's numbers, in time proportional to the tokens."""
        queries = q_order.coordinates(np.arange(q_order.length))
        keys = kv_order.coordinates(np.arange(kv_order.length))
        words: list[list[_Field]] = [[]]
        for number, axis in enumerate(axes):
            residue, position = _in_class(axis, q_order.dilation[number], *queries[number])
            kv_residue, column = _in_class(axis, kv_order.dilation[number], *keys[number])
            window = axis.window_of(position, axis.class_length(residue))
            size = kv_order.counts[number] * kv_order.tile[number]
            fields = [_Field(*window, column, size)]
            if axis.dilation > 1:
                fields.append(_Field(residue, residue, kv_residue, axis.dilation))
            for field in fields:
                if sum(other.bits for other in words[-1]) + field.bits > 31:
                    words.append([])
                words[-1].append(field)
        guards = tuple(_packed([1 << (f.bits - 1) for f in word], word) for word in words)
        bounds = [[_packed([f[side] for f in word], word) for side in (0, 1)] for word in words]
        columns = [_packed([f.column for f in word], word) for word in words]
        # known where the mask is made under jit as well, so that the width of lists is
        with _compat.at_once():
            arrays = jnp.asarray(bounds, jnp.int32), jnp.asarray(columns, jnp.int32)
        return cls(axes, q_order, kv_order, guards, *arrays)

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        seen = jnp.asarray(True)
        for word, guards in enumerate(self.guards):
            first, last = (self.bounds[0, word, side, q_index] for side in (0, 1))
            column = self.columns[0, word, kv_index]
            inside = ((column | guards) - first) & ((last | guards) - column)
            seen &= (inside & guards) == guards
        return seen

    def within(self, q_range: Range, kv_range: Range, frame: Frame) -> TileBounds:
        queries, keys = self.q_order.spans(*q_range), self.kv_order.spans(*kv_range)
        some = every = jnp.asarray(True)
        for number, axis in enumerate(self.axes):
            q_residue, q_span = _spans_in_class(
                axis, self.q_order.dilation[number], *queries[number]
            )
            kv_residue, kv_span = _spans_in_class(
                axis, self.kv_order.dilation[number], *keys[number]
            )
            # the higher the residue, the shorter the class; windows move on with both
            lowest = axis.window_of(jnp.asarray(q_span[0]), axis.class_length(q_residue[1]))
            highest = axis.window_of(jnp.asarray(q_span[1]), axis.class_length(q_residue[0]))
            some &= (lowest[0] <= kv_span[1]) & (kv_span[0] <= highest[1])
            some &= (q_residue[0] <= kv_residue[1]) & (kv_residue[0] <= q_residue[1])
            every &= (highest[0] <= kv_span[0]) & (kv_span[1] <= lowest[1])
            every &= (q_residue[1] == kv_residue[0]) & (kv_residue[1] == q_residue[0])
        return TileBounds(some, every)

    def check_lengths(self, q_len: int, kv_len: int) -> None:
        for name, length, order in (
            ("queries", q_len, self.q_order),
            ("keys", kv_len, self.kv_order),
        ):
            checks.mask_length(f"grid of {name}", order.length, length)


def _in_class(axis: Axis, dilation: int, residue: Index, position: Index) -> tuple[Index, Index]:
    """Residue and position by the axis's dilation, from those by an order's."""
    if dilation == axis.dilation:
        return residue, position
    token = position * dilation + residue
    return token % axis.dilation, token // axis.dilation


def _spans_in_class(axis: Axis, dilation: int, residue: Span, position: Span) -> tuple[Span, Span]:
    if dilation == axis.dilation:
        return residue, position
    first, last = (p * dilation + r for p, r in zip(position, residue, strict=True))
    one = first == last
    residues = (
        jnp.where(one, first % axis.dilation, 0),
        jnp.where(one, first % axis.dilation, axis.dilation - 1),
    )
    return residues, (first // axis.dilation, last // axis.dilation)


def _packed(values: Sequence[Any], word: list[_Field]) -> Any:
    """One value of each field, the last in the lowest bits."""
    packed = 0
    for value, field in zip(values, word, strict=True):
        packed = packed << field.bits | value
    return packed


def axes_of(
    grid: Sequence[int],
    *,
    window: int | Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> tuple[Axis, ...]:
    """The rule of every axis; see `neighborhood` for the arguments and the errors."""
    sizes = tuple(grid)
    every = {"stride": stride, "dilation": dilation, "is_causal": is_causal, "window": window}
    per_axis = {name: for_each_axis(value, sizes, name) for name, value in every.items()}
    axes = []
    for number, length in enumerate(sizes):
        of = {name: values[number] for name, values in per_axis.items()}
        checks.positive(grid=length, stride=of["stride"], dilation=of["dilation"])
        if of["window"] is None:
            of["window"] = length // of["dilation"]
        checks.positive(window=of["window"])
        axis = Axis(length, **of)
        checks.neighborhood_axis(number, axis)
        axes.append(axis)
    return tuple(axes)


def for_each_axis(value: Any, grid: Sequence[int], name: str) -> tuple[Any, ...]:
    """One value per axis; a single one serves all."""
    if not isinstance(value, Sequence):
        return (value,) * len(grid)
    checks.same_number_of_axes(grid=grid, **{name: value})
    return tuple(value)


def neighborhood(
    grid: Sequence[int],
    *,
    window: int | Sequence[int] | None,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> Mask:
    """Lets each token of a grid see a window of tokens along every axis.

    Along an axis, groups of `stride` queries share the window of the one in their middle (of an
    even number the right one), which reaches `window // 2` to its left; at borders the window is
    shifted, so that it always holds `window` keys. On a causal axis a group's window ends with its
    last query, is cut at the border, and no query sees keys past its own. With a dilation, all this
    holds inside each class of tokens whose positions have the same remainder.

    Arguments but `grid` are one number for all axes, or one for each.

    Args:
      grid: Size of the grid along each axis; tokens are counted row-major. Queries and keys are
        both the whole grid.
      window: Keys in the window, from 2 to `length // dilation`; None is as many as there are.
      stride: Queries that share a window, from 1 to `window`.
      dilation: Distance between neighboring keys of a window.
      is_causal: Whether a query sees only keys up to its own.

    Raises:
      ValueError: if a number is out of range, or there are not as many as axes.
    """
    axes = axes_of(grid, window=window, stride=stride, dilation=dilation, is_causal=is_causal)
    order = TokenTiles.row_major(tuple(grid))
    return Neighborhood.of(axes, order, order)
