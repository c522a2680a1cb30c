"""Tokens of a grid in an order in which every tile of the grid is contiguous.

Where tiles may be smaller at the far end of an axis, `reordering.tile_order` lists the order; here
axes are filled up to whole tiles, so that a block of consecutive tokens is a tile and nothing else.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

Span = tuple[Any, Any]  # first and last, both inclusive


class TokenTiles(NamedTuple):
    """Cuts an axis into residue classes, each of them into tiles.

    The token `(tile * size + place) * dilation + residue` of an axis stands at the digits
    (residues, tiles, places), all axes of each before the next, row-major. Axes are filled up at
    their ends; what is added stands for no token.
    """

    shape: tuple[int, ...]
    tile: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def row_major(cls, shape: tuple[int, ...]) -> "TokenTiles":
        """The order that tokens come in."""
        ones = (1,) * len(shape)
        return cls(shape, ones, ones)

    @property
    def moves(self) -> bool:
        """Whether tokens leave their places."""
        return self != self.row_major(self.shape)

    @property
    def counts(self) -> tuple[int, ...]:
        """Tiles of a residue class along each axis."""
        sizes = zip(self.shape, self.tile, self.dilation, strict=True)
        return tuple(-(-length // (tile * dilation)) for length, tile, dilation in sizes)

    @property
    def length(self) -> int:
        """Tokens, those that were added included."""
        return math.prod(self._sizes)

    @property
    def _sizes(self) -> tuple[int, ...]:
        return (*self.dilation, *self.counts, *self.tile)

    def permute(
        self, x: Shaped[Array, "*batch tokens heads dim"]
    ) -> Shaped[Array, "*batch length heads dim"]:
        """Puts tokens in this order, zeros where there is none."""
        if not self.moves:
            return x
        axes, batch = len(self.shape), x.shape[:-3]
        x = x.reshape(*batch, *self.shape, *x.shape[-2:])
        filled = [a * b * c for a, b, c in zip(self.counts, self.tile, self.dilation, strict=True)]
        missing = [(0, a - b) for a, b in zip(filled, self.shape, strict=True)]
        x = jnp.pad(x, [*[(0, 0)] * len(batch), *missing, (0, 0), (0, 0)])
        # an axis is (tile, place, residue)
        cut = [
            n for sizes in zip(self.counts, self.tile, self.dilation, strict=True) for n in sizes
        ]
        x = x.reshape(*batch, *cut, *x.shape[-2:])
        first = len(batch)
        digits = [first + 3 * axis + part for part in (2, 0, 1) for axis in range(axes)]
        x = x.transpose(*range(first), *digits, x.ndim - 2, x.ndim - 1)
        return x.reshape(*batch, self.length, *x.shape[-2:])

    def restore(
        self, x: Shaped[Array, "*batch length heads dim"]
    ) -> Shaped[Array, "*batch tokens heads dim"]:
        """Puts tokens back and drops what was added."""
        if not self.moves:
            return x
        axes, batch = len(self.shape), x.shape[:-3]
        x = x.reshape(*batch, *self._sizes, *x.shape[-2:])
        first = len(batch)
        digits = [first + part * axes + axis for axis in range(axes) for part in (1, 2, 0)]
        x = x.transpose(*range(first), *digits, x.ndim - 2, x.ndim - 1)
        filled = [a * b * c for a, b, c in zip(self.counts, self.tile, self.dilation, strict=True)]
        x = x.reshape(*batch, *filled, *x.shape[-2:])
        x = x[(..., *(slice(length) for length in self.shape), slice(None), slice(None))]
        return x.reshape(*batch, math.prod(self.shape), *x.shape[-2:])

    def coordinates(self, index: Any) -> list[tuple[Any, Any]]:
        """For each axis the residue of a place and its position in that residue class."""
        axes, digits = len(self.shape), []
        for size in reversed(self._sizes):
            digits.insert(0, index % size)
            index = index // size
        residues, tiles, places = (digits[n * axes : (n + 1) * axes] for n in range(3))
        return [
            (residue, tile * size + place)
            for residue, tile, size, place in zip(residues, tiles, self.tile, places, strict=True)
        ]

    def spans(self, first: Any, last: Any) -> list[tuple[Span, Span]]:
        """For each axis what `coordinates` lie between for places from `first` to `last`."""
        axes, spans, fixed = len(self.shape), [], True
        weight = self.length
        for size in self._sizes:
            weight //= size
            low, high = first // weight % size, last // weight % size
            # once two digits differ, those after them take every value
            spans.append((jnp.where(fixed, low, 0), jnp.where(fixed, high, size - 1)))
            fixed = fixed & (low == high)
        residues, tiles, places = (spans[n * axes : (n + 1) * axes] for n in range(3))
        return [
            (residue, (tile[0] * size + place[0], tile[1] * size + place[1]))
            for residue, tile, size, place in zip(residues, tiles, self.tile, places, strict=True)
        ]

    def original(self, index: Any) -> Any:
        """Where the token of a place stood; for added ones, the last of the same residues."""
        token = 0
        for axis, (residue, position) in enumerate(self.coordinates(index)):
            length, dilation = self.shape[axis], self.dilation[axis]
            position = position.clip(max=(length - 1 - residue) // dilation)
            token = token * length + position * dilation + residue
        return token

    def order(self) -> Int[Array, "1 length"]:
        """`original` of every place."""
        return jnp.asarray(self.original(np.arange(self.length, dtype=np.int32)), jnp.int32)[None]
