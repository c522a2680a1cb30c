"""What a warpgroup multiplies on GPUs before Hopper: mma.sync, its operands in registers.

Accumulators are laid out as wgmma's are, so that `warpgroup` makes and loads them. For JAX's
interpreter, which knows no such product, the same functions read the same references, so that races
on shared memory are still found, and compute with `jnp` in f32.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels.ring import LANES

Ref = Any


def left(ref: Ref) -> list[jax.Array]:
    """A left operand [rows, depth] from shared memory, in pieces along its depth."""
    return [_operand(piece, is_left=True) for piece in _pieces(ref)]


def add_nt(acc: jax.Array, a: list[jax.Array], b: Ref) -> jax.Array:
    """`acc + a @ b.T`: `a` from `left`, `b` in shared memory."""
    for a_piece, b_piece in zip(a, _pieces(b), strict=True):
        if _compat.interpreting():
            acc = acc + _dot(a_piece, b_piece[...], 1)
        else:
            b_turned = _operand(_compat.transpose(b_piece), is_left=False)
            acc = _compat.mma(acc, a_piece, b_turned)
    return acc


def add(acc: jax.Array, a: jax.Array, b: Ref) -> jax.Array:
    """`acc + a @ b`: `a` in registers, laid out as an accumulator is, `b` in shared memory."""
    if _compat.interpreting():
        return acc + _dot(a, b[...], 0)
    return _compat.mma(acc, _compat.mma_left(a), _operand(b, is_left=False))


def store(ref: Ref, value: jax.Array) -> None:
    """Writes an accumulator, or a number per row of one, to device memory."""
    if _compat.interpreting():
        ref[...] = value
    else:
        _compat.store(ref, value)


def _pieces(ref: Ref) -> Iterator[Ref]:
    """References to [tokens, LANES]: rows of shared memory, which swizzling does not let cut."""
    return (ref.at[:, pl.ds(n, LANES)] for n in range(0, ref.shape[1], LANES))


def _operand(ref: Ref, *, is_left: bool) -> jax.Array:
    return ref[...] if _compat.interpreting() else _compat.mma_operand(ref, is_left=is_left)


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    dimensions = (((1,), (axis,)), ((), ()))
    return lax.dot_general(a.astype(jnp.float32), b.astype(jnp.float32), dimensions)
