"""The best numbers of each row so far, and their columns, in the registers of a warpgroup.

They are laid out as an accumulator is: `width` numbers and as many columns for each of 64 rows. Of
a tile comes in the largest number of each row, as long as that is larger than the least of the
best, in whose place it comes. A warp stops when none of its 16 rows has one. A row of n numbers in
random order changes its best about `k * (1 + log(n / k))` times; each change is about 5 operations
on the numbers that a thread holds of the tile and of the best.

Numbers are compared as integers (see `sortable`). Tiles come in ascending order, and of equal
numbers the lower column is the better: a tile's largest is the first of these, it must be larger
than the least of the best to come in, and of equal ones the highest column goes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sortable import NOTHING
from pallas_kernels.warpgroup import Hopper, Interpreted

MOST = 64  # of the best, whose registers are two for each 4 of a row
_ROWS = Hopper.height
_TAKEN = 2**31 - 1  # a place of the best that is none
_NO_COLUMN = 2**30  # from here on columns stand for nothing

Operations = type[Hopper] | type[Interpreted]


class Kept(NamedTuple):
    """The best of each row: integers and columns [rows, width], and the least integer [rows]."""

    best: jax.Array
    columns: jax.Array
    least: jax.Array

    @classmethod
    def nothing(cls, count: int, ops: Operations) -> "Kept":
        """Room for `count` of each row, in which there is nothing."""
        slot = ops.iota((_ROWS, places(count)), 1)
        # places that are too many are never the least; the others differ, so that one goes at once
        best = jnp.where(slot < count, jnp.int32(NOTHING), jnp.int32(_TAKEN))
        return cls(best, slot + _NO_COLUMN, best.min(axis=1))

    def with_tile(self, found: jax.Array, first: jax.Array, ops: Operations) -> "Kept":
        """The best of these and of the integers of a tile, whose first column is `first`."""
        shape, best_shape = found.shape, self.best.shape
        column = ops.iota((shape[0], shape[1]), 1)

        def larger(state):
            _, peak, _, _, least = state
            return ops.any_row(peak > least)

        def take(state):
            """The largest of each row, if larger, in the place of the least of the best."""
            found, peak, best, columns, least = state
            place = jnp.where(found == _along(peak, shape), column, jnp.int32(shape[1]))
            place = place.min(axis=1)
            goes = best == _along(least, best_shape)
            last = jnp.where(goes, columns, jnp.int32(-1)).max(axis=1)
            goes &= columns == _along(last, best_shape)
            goes &= _along(peak, best_shape) > best
            best = jnp.where(goes, _along(peak, best_shape), best)
            columns = jnp.where(goes, _along(place + first, best_shape), columns)
            found = jnp.where(column == _along(place, shape), jnp.int32(NOTHING), found)
            return found, found.max(axis=1), best, columns, best.min(axis=1)

        state = found, found.max(axis=1), *self
        return Kept(*lax.while_loop(larger, take, state)[2:])


def places(count: int) -> int:
    """Places of a row in registers, of which there are 8 or a multiple."""
    return -(-count // 8) * 8


def _along(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number per row in each of its columns."""
    return lax.broadcast_in_dim(rows, shape, (0,))
