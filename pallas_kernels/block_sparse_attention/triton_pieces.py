"""Rows of a Triton program in pieces of columns, and their softmax.

Arrays in a program have powers of two as sizes. A row of another width, or of a large one, is read
as several arrays: the logits are the sum of their products, and outputs have as many parts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.block_sparse_attention.logits import LOG2_E

Pieces = tuple[jax.Array, ...]

# columns of a piece
_MOST = 512


def columns(width: int) -> list[Any]:
    """The indices of the pieces of a row whose width is a multiple of 16, the wide ones first."""
    found, start = [], 0
    while start < width:
        size = min(_MOST, 1 << ((width - start).bit_length() - 1))
        found.append(pl.ds(start, size))
        start += size
    return found


def read(ref: Any, at: tuple[Any, ...]) -> Pieces:
    """The rows at indices of all axes but the last."""
    return tuple(ref[*at, piece] for piece in columns(ref.shape[-1]))


def zeros(rows: int, width: int) -> Pieces:
    """Sums to begin with."""
    return tuple(jnp.zeros((rows, piece.size), jnp.float32) for piece in columns(width))


def product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """`a @ b`, or `a @ b.T` where `axis` is 1, in f32."""
    dimensions = (((1,), (axis,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def inner(a: Pieces, b: Pieces) -> jax.Array:
    """The products of each row with each, in f32."""
    first, *others = (product(x, y, 1) for x, y in zip(a, b, strict=True))
    return sum(others, start=first)


def add_products(sums: Pieces, weights: jax.Array, rows: Pieces) -> Pieces:
    """Adds sums of rows, each weighted by a row of `weights`, which are rounded as the rows are."""
    rounded = weights.astype(rows[0].dtype)
    return tuple(x + product(rounded, row, 0) for x, row in zip(sums, rows, strict=True))


class Softmax(NamedTuple):
    """Rows so far: their values' sum, their largest logit in base 2, their numerators' sum."""

    acc: Pieces
    peak: jax.Array
    total: jax.Array

    @classmethod
    def of_nothing(cls, rows: int, v_dim: int) -> "Softmax":
        """Before the first piece."""
        return cls(
            zeros(rows, v_dim),
            jnp.full((rows,), -jnp.inf, jnp.float32),
            jnp.zeros((rows,), jnp.float32),
        )

    def add(self, logits: jax.Array, to_base_2: float, values: Pieces) -> "Softmax":
        """After a further piece of keys."""
        peak = jnp.maximum(self.peak, logits.max(axis=1) * to_base_2)
        # a row that saw nothing yet: 2 ** (-inf - 0) is 0, 2 ** (-inf + inf) would be nan
        shift = jnp.where(peak == -jnp.inf, 0.0, peak)
        probs = jnp.exp2(logits * to_base_2 - shift[:, None])
        decay = jnp.exp2(self.peak - shift)
        acc = add_products(tuple(x * decay[:, None] for x in self.acc), probs, values)
        return Softmax(acc, peak, self.total * decay + probs.sum(axis=1))

    def results(self) -> tuple[Pieces, jax.Array]:
        """The rows' output and log-sum-exp."""
        seen = self.total != 0.0
        safe = jnp.where(seen, self.total, 1.0)
        lse = jnp.where(seen, self.peak / LOG2_E + jnp.log(safe), -jnp.inf)
        return tuple(x / safe[:, None] for x in self.acc), lse
