"""Masks given as arrays or as functions, and the mask that hides nothing."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jsparse import _compat, checks
from jsparse.types import (
    Frame,
    Mask,
    TileBounds,
    TileGrid,
    array_field,
    entry,
    pytree_dataclass,
    static_field,
)
from jsparse.types.mask import Index, Range, TileClassifier, pad_to_blocks


@pytree_dataclass
class Full(Mask):
    """Every query sees every key."""

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        return jnp.ones(jnp.broadcast_shapes(jnp.shape(q_index), jnp.shape(kv_index)), bool)

    def within(self, q_range: Range, kv_range: Range, frame: Frame) -> TileBounds:
        some, _ = Mask.within(self, q_range, kv_range, frame)
        return TileBounds(some, some)


@pytree_dataclass
class Dense(Mask):
    """What an array says, pair by pair."""

    pairs: Bool[Array, "*batch heads q_len kv_len"] = array_field(core_ndim=3)

    @property
    def heads(self) -> int:
        return self.pairs.shape[-3]

    def _sequence(self, frame: Frame) -> tuple[Index, Index]:
        return entry(len(self.pairs), frame.batch), entry(self.heads, frame.head)

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        return self.pairs[*self._sequence(frame), q_index, kv_index]

    def classifier(self, grid: TileGrid) -> TileClassifier:
        def tiles(fill: bool) -> Array:
            x = pad_to_blocks(self.pairs, grid.block_kv, fill)
            x = x.reshape(*x.shape[:-1], grid.kv_blocks, grid.block_kv)
            x = x.any(-1) if not fill else x.all(-1)
            x = pad_to_blocks(jnp.swapaxes(x, -1, -2), grid.block_q, fill)
            x = x.reshape(*x.shape[:-1], grid.q_blocks, grid.block_q)
            return jnp.swapaxes(x.any(-1) if not fill else x.all(-1), -1, -2)

        some, every = tiles(fill=False), tiles(fill=True)

        def classify(q_block: Index, kv_block: Index, frame: Frame) -> TileBounds:
            at = (*self._sequence(frame), q_block, kv_block)
            return TileBounds(some[at], every[at])

        return classify

    def check_lengths(self, q_len: int, kv_len: int) -> None:
        checks.mask_length("rows", self.pairs.shape[-2], q_len)
        checks.mask_length("columns", self.pairs.shape[-1], kv_len)


@pytree_dataclass
class Predicate(Mask):
    """What a traceable function says, pair by pair; its captured arrays are the mask's leaves."""

    captured: tuple[Array, ...]
    function: Callable[..., Array] = static_field()
    head_count: int = static_field()

    @property
    def heads(self) -> int:
        return self.head_count

    @property
    def by_batch_index(self) -> bool:
        return True

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        def on_scalars(*scalars):
            (seen,) = self.function(self.captured, *scalars)
            return seen

        scalars = (frame.batch, frame.head, q_index, kv_index)
        return jnp.vectorize(on_scalars)(*(jnp.asarray(s, jnp.int32) for s in scalars))


def full() -> Mask:
    """Hides nothing."""
    return Full()


def dense(pairs: Bool[Array, "*batch heads q_len kv_len"]) -> Mask:
    """Lets pairs through where an array is True.

    Args:
      pairs: One bool per pair; the heads axis is 1 or the number of query heads.

    Raises:
      ValueError: if the array does not hold bools or has fewer than three axes.
    """
    checks.pairs(pairs)
    return Dense(jnp.asarray(pairs))


def predicate(function: Callable[..., Any], *, heads: int = 1) -> Mask:
    """Lets pairs through where a function says so.

    Arrays that the function closes over become leaves of the mask, so it may be made inside `jit`
    and passed on. Nothing is known of whole tiles: every tile is computed, unless the predicate is
    combined by `&` with a mask, or used with a plan, that leaves tiles out.

    Args:
      function: `function(batch, head, q_index, kv_index) -> bool` on int32 scalars, of any
        traceable operations; `batch` counts the flattened batch axes.
      heads: How many query heads it tells apart: 1, or the number of query heads.

    Raises:
      ValueError: if the function does not return one bool.
    """
    checks.positive(heads=heads)
    integer = jax.ShapeDtypeStruct((), jnp.int32)
    closed = jax.make_jaxpr(function)(integer, integer, integer, integer)
    checks.one_bool(closed.out_avals)
    captured = tuple(jnp.asarray(c) for c in closed.consts)
    return Predicate(
        captured, lambda consts, *args: _compat.closed_jaxpr_call(closed, consts, *args), heads
    )
