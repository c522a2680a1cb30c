"""The largest entries of rows, without sorting.

On a CPU, to add up a row 32 times over takes a twentieth of the time of sorting it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from jsparse import _compat
from jsparse.types.counts import counted
from pallas_kernels.sortable import NOTHING

_LAST = 2**31 - 1  # no key is larger
_FUSED_BYTES = 2**14  # a vector of so many is not put into the loop of its product


def largest(
    keys: Int[Array, "*rows columns"], count: Int[Array, "..."] | int
) -> Bool[Array, "*rows columns"]:
    """Which keys are the `count` largest of their row, the first ones where some are equal.

    What is `NOTHING` is not among them.
    """

    def enough(least):
        return _sums((keys >= least).astype(jnp.int32)) >= count

    least = _greatest(enough, keys)
    above, equal = keys > least, (keys == least) & (keys > NOTHING)
    room = count - _sums(above.astype(jnp.int32))

    def first_ones():
        return equal & (counted(equal) <= room)

    too_many = (_sums(equal.astype(jnp.int32)) > room).any()
    return above | _compat.cond(too_many, first_ones, lambda: equal)


def largest_with_mass(
    keys: Int[Array, "*rows columns"],
    mass: Shaped[Array, "*rows columns"],
    need: Shaped[Array, "*rows 1"],
) -> Bool[Array, "*rows columns"]:
    """Which keys have less than `need` of mass before them, when they are taken by falling size.

    The first of equal keys goes first. Mass is not negative; that of keys that are `NOTHING` is
    zero, and they are not among these. Where it is not a number, all others are.
    """

    def enough(least):
        return _sums(jnp.where(keys >= least, mass, 0)) >= need

    least = _greatest(enough, keys)
    equal = keys == least
    of_equal = jnp.where(equal, mass, 0)
    before = _sums(jnp.where(keys > least, mass, 0))
    before = before + jnp.cumsum(of_equal, axis=-1) - of_equal
    return ((keys > least) | (equal & ~(before >= need))) & (keys > NOTHING)


def _sums(x: Shaped[Array, "*rows columns"]) -> Shaped[Array, "*rows 1"]:
    """The sum of each row, as a product with ones.

    XLA for CPUs computes what is summed on the way, if the ones are few and come first, with as
    many rows at once as a register holds, in a quarter of the time of `x.sum(-1)`. For GPUs it
    makes a sum of it.
    """
    columns = x.shape[-1]
    flat, ones = x.reshape(-1, columns), jnp.ones(columns, x.dtype)
    few = ones.nbytes < _FUSED_BYTES
    sums = jnp.dot(*((ones, flat.T) if few else (flat, ones)), precision=jax.lax.Precision.HIGHEST)
    return sums.reshape(*x.shape[:-1], 1)


def _greatest(holds: Callable[[Array], Array], keys: Array) -> Int[Array, "*rows 1"]:
    """The greatest key of each row for which something holds that holds for all smaller ones.

    It is found by halving what it may be.
    """

    def halve(_, bounds):
        low, high = bounds
        # rounded up, and without the sum, which may not fit
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        held = holds(middle)
        return jnp.where(held, middle, low), jnp.where(held, high, middle - 1)

    shape = *keys.shape[:-1], 1
    bounds = jnp.full(shape, NOTHING, jnp.int32), jnp.full(shape, _LAST, jnp.int32)
    return _compat.fori_loop(0, 32, halve, bounds)[0]
