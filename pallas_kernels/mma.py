"""What a warpgroup multiplies on GPUs before Hopper: mma.sync, its operands in registers.

A warpgroup has one or more accumulators of HEIGHT rows, and what it reads of a right operand serves
them all. They are laid out as wgmma's are, so that `warpgroup` makes and loads them. For JAX's
interpreter, which knows no such product, the same functions read the same references, so that races
on shared memory are still found, and compute with `jnp` in f32.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels.ring import LANES
from pallas_kernels.warpgroup import dot

Ref = Any

HEIGHT = 64  # rows of an accumulator, 16 of each warp


class Held:
    """A left operand [HEIGHT, depth] that stays in registers."""

    def __init__(self, ref: Ref):
        self._pieces = [_read_left(piece) for piece in _pieces(ref)]

    def piece(self, n: int) -> jax.Array:
        """Columns n * LANES to (n + 1) * LANES."""
        return self._pieces[n]


class Read:
    """A left operand [HEIGHT, depth] that is read from shared memory each time."""

    def __init__(self, ref: Ref):
        self._pieces = list(_pieces(ref))

    def piece(self, n: int) -> jax.Array:
        """Columns n * LANES to (n + 1) * LANES."""
        return _read_left(self._pieces[n])


def add_nt(accs: Sequence[jax.Array], a: Sequence[Held | Read], b: Ref) -> list[jax.Array]:
    """`acc + a @ b.T` for each of them, `b` in shared memory."""
    for n, piece in enumerate(_pieces(b)):
        right = _read_right(piece, turned=True)
        accs = [_multiply(acc, x.piece(n), right, 1) for acc, x in zip(accs, a, strict=True)]
    return list(accs)


def add(
    accs: Sequence[Sequence[jax.Array]], a: Sequence[jax.Array], b: Ref
) -> list[list[jax.Array]]:
    """`acc + a @ b` for each of them: `a` laid out as an accumulator is, `b` in shared memory.

    Each `acc` is a sequence of its pieces, LANES columns each.
    """
    sums: list[list[jax.Array]] = [[] for _ in accs]
    for n, piece in enumerate(_pieces(b)):
        right = _read_right(piece, turned=False)
        for done, acc, x in zip(sums, accs, a, strict=True):
            x = x if _compat.interpreting() else _compat.mma_left(x)
            done.append(_multiply(acc[n], x, right, 0))
    return sums


def store(ref: Ref, value: jax.Array) -> None:
    """Writes an accumulator, or a number per row of one, to device memory."""
    if _compat.interpreting():
        ref[...] = value
    else:
        _compat.store(ref, value)


def _pieces(ref: Ref) -> Iterator[Ref]:
    """References to [tokens, LANES]: rows of shared memory, which swizzling does not let cut."""
    return (ref.at[:, pl.ds(n, LANES)] for n in range(0, ref.shape[1], LANES))


def _read_left(ref: Ref) -> jax.Array:
    return ref[...] if _compat.interpreting() else _compat.load_mma_left(ref)


def _read_right(ref: Ref, *, turned: bool) -> jax.Array:
    if _compat.interpreting():
        return ref[...]
    return _compat.load_mma_right(_compat.transpose(ref) if turned else ref)


def _multiply(acc: jax.Array, a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """`acc` and the sums over the columns of `a` and an axis of `b`."""
    return acc + dot(a, b, axis) if _compat.interpreting() else _compat.mma(acc, a, b)
