"""Putting tokens in another order and back, per head or for all.

An `order` lists original positions: the token that comes to stand at place `n` is `order[..., n]`.
Attention does not depend on the order of the keys, and the order of the queries is undone on the
output, so a method is free to bring together what belongs together before it cuts tiles. A mask
follows the tokens by `js.masks.reordered`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jsparse import checks
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
from jsparse.types.mask import Index, TileClassifier, block_extrema

Order = Int[Array, "*batch order_heads length"]


class Orders(NamedTuple):
    """Where a method has put tokens before it cut tiles; None where they stand in their places."""

    q_order: Order | None = None
    kv_order: Order | None = None

    @classmethod
    def of(cls, info: Any) -> "Orders":
        """What a method's `info` says: fields of the same names, where it has them."""
        return cls(getattr(info, "q_order", None), getattr(info, "kv_order", None))

    @property
    def moved(self) -> bool:
        """Whether any token stands elsewhere."""
        return any(order is not None for order in self)


def tile_order(shape: Sequence[int], tile: Sequence[int]) -> Int[Array, "1 length"]:
    """The order that makes each tile of a grid of tokens contiguous.

    Tiles come row-major, and so do the tokens in each; tiles at the far end of an axis may be
    smaller. A tile that spans an axis moves that axis innermost: `tile_order((frames, places),
    (frames, 1))` goes from frame after frame to place after place.

    Args:
      shape: Size of the grid along each axis; tokens are counted row-major.
      tile: Size of a tile along each axis.

    Raises:
      ValueError: if the two differ in length, or a size is not positive.
    """
    checks.same_number_of_axes(shape=shape, tile=tile)
    for size, side in zip(shape, tile, strict=True):
        checks.positive(shape=size, tile=side)
    places = np.indices(shape).reshape(len(shape), -1)
    sides = np.asarray(tile)[:, None]
    # the last key is the primary one
    order = np.lexsort([*reversed(places % sides), *reversed(places // sides)])
    return jnp.asarray(order[None], jnp.int32)


@jax.jit
def inverse(
    order: Int[Array, "*batch order_heads length"],
) -> Int[Array, "*batch order_heads length"]:
    """The order that undoes an order: where each original token stands."""
    flat = order.reshape(-1, order.shape[-1])
    rows = jnp.arange(flat.shape[0])[:, None]
    places = jnp.broadcast_to(jnp.arange(order.shape[-1], dtype=jnp.int32), flat.shape)
    undone = jnp.zeros_like(places).at[rows, flat].set(places, unique_indices=True)
    return undone.reshape(order.shape)


def reorder(
    x: Float[Array, "*batch length heads dim"],
    order: Int[Array, "*order_batch order_heads length"],
) -> Float[Array, "*batch length out_heads dim"]:
    """Puts tokens in another order.

    Heads on either side are shared by groups where the other has more: keys of 2 kv heads in the
    orders of 8 query heads become 8 heads, and queries of 8 heads in the orders of 2 kv heads each
    follow their group's. An order may lack batch axes that `x` has.

    Args:
      x: Queries, keys, values or outputs.
      order: A permutation of the tokens, per head or shared.

    Raises:
      ValueError: if the order is not of integers, or does not fit the length or the heads.
    """
    checks.order_fits(order, x.shape)
    return _taken(x, order)


def gather(
    x: Float[Array, "*batch length heads dim"],
    order: Int[Array, "*order_batch order_heads places"],
) -> Float[Array, "*batch places out_heads dim"]:
    """Puts tokens in places, which may be more or fewer; a token may stand in several.

    Heads are shared as in `reorder`.
    """
    # so that a token's gradient, a sum over its places, is taken in f32
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return _taken(x.astype(wide), order).astype(x.dtype)


@functools.partial(jax.jit, static_argnames="length")
def add_up(
    x: Float[Array, "*batch places heads dim"],
    order: Int[Array, "*order_batch order_heads places"],
    length: int,
) -> Float[Array, "*batch length heads dim"]:
    """Sums what stands in the places of each token, in f32; the transpose of `gather`.

    Args:
      x: What the places have.
      order: Which token stands where, per head or for several; a negative one is none.
      length: How many tokens.
    """
    x, order = _for_each_head(x, order)
    flat = jnp.swapaxes(x, -2, -3).reshape(-1, x.shape[-3], x.shape[-1])
    at = _places_of(order, length)
    total = jnp.zeros((len(flat), length, x.shape[-1]))
    total = total.at[at].add(flat.astype(jnp.float32), mode="drop")
    total = total.reshape(*x.shape[:-3], x.shape[-2], length, x.shape[-1])
    return jnp.swapaxes(total, -2, -3)


@functools.partial(jax.jit, static_argnames="length")
def log_add_up(
    x: Float[Array, "*batch heads places"],
    order: Int[Array, "*order_batch order_heads places"],
    length: int,
) -> Float[Array, "*batch heads length"]:
    """The logarithm of what `add_up` makes of exponentials; -inf for a token without a place."""
    _, order = _for_each_head(jnp.swapaxes(x, -1, -2)[..., None], order)
    flat, at = x.reshape(-1, x.shape[-1]), _places_of(order, length)
    peak = jnp.full((len(flat), length), -jnp.inf)
    peak = peak.at[at].max(jax.lax.stop_gradient(flat), mode="drop")
    peak = jnp.where(jnp.isneginf(peak), 0.0, peak)
    total = (
        jnp.zeros_like(peak).at[at].add(jnp.exp(flat - peak.at[at].get(mode="clip")), mode="drop")
    )
    some = total != 0
    logarithm = jnp.where(some, peak + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)
    return logarithm.reshape(*x.shape[:-1], length)


def _places_of(order: Array, length: int) -> tuple[Array, Array]:
    """Where the tokens of places stand in rows of `length`; past the end where there is none."""
    order = jnp.where(order < 0, length, order).reshape(-1, order.shape[-1])
    return jnp.arange(len(order))[:, None], order


def restore(
    x: Float[Array, "*batch length heads dim"],
    order: Int[Array, "*order_batch order_heads length"],
) -> Float[Array, "*batch length out_heads dim"]:
    """Puts tokens back where they stood before `reorder`."""
    return reorder(x, inverse(order))


@functools.partial(jax.jit, static_argnames=("axis", "heads"))
def reorder_pairs(
    x: Float[Array, "..."], order: Order | None, axis: int, heads: int
) -> Float[Array, "..."]:
    """Puts one of the two token axes of an array of pairs, such as a bias, in another order.

    Args:
      x: Each of its axes may be 1, the same for all; without tokens on that axis it stays as it is.
      order: A permutation of the tokens, per head or shared; None leaves them.
      axis: -2 for the queries, -1 for the keys.
      heads: Query heads; an order per kv head holds for its group.
    """
    if order is None or x.shape[axis] == 1:
        return x
    if order.shape[-2] > 1:
        order = jnp.repeat(order, heads // order.shape[-2], axis=-2)
    index = jnp.expand_dims(order, -3 - axis)
    return jnp.take_along_axis(x, index.reshape((1,) * (x.ndim - index.ndim) + index.shape), axis)


@jax.jit
def _taken(x: Array, order: Array) -> Array:
    x, order = _for_each_head(x, order)
    index = jnp.swapaxes(order, -1, -2)[..., None]
    return jnp.take_along_axis(x, index, axis=-3, mode="promise_in_bounds")


def _for_each_head(x: Array, order: Array) -> tuple[Array, Array]:
    heads = max(x.shape[-2], order.shape[-2])
    x = jnp.repeat(x, heads // x.shape[-2], axis=-2)
    order = jnp.repeat(order, heads // order.shape[-2], axis=-2)
    return x, jnp.broadcast_to(order, (*x.shape[:-3], *order.shape[-2:]))


@pytree_dataclass
class Reordered(Mask):
    """Token `n` of either side is seen, and sees, as the original token `order[n]`.

    `lengths` are the numbers of original tokens where orders have more places than those.
    """

    mask: Mask
    q_order: Int[Array, "*q_batch q_heads q_len"] | None = array_field(core_ndim=2)
    kv_order: Int[Array, "*kv_batch kv_heads kv_len"] | None = array_field(core_ndim=2)
    lengths: tuple[int, int] | None = static_field(default=None)

    @property
    def heads(self) -> int:
        orders = [x for x in (self.q_order, self.kv_order) if x is not None]
        return max([self.mask.heads, *(x.shape[-2] for x in orders)])

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        q_index = _look_up(self.q_order, q_index, frame)
        kv_index = _look_up(self.kv_order, kv_index, frame)
        return self.mask.visible(q_index, kv_index, self._original(frame))

    def classifier(self, grid: TileGrid) -> TileClassifier:
        # a tile's tokens lie somewhere between their first and last original position
        q_extrema = None if self.q_order is None else block_extrema(self.q_order, grid.block_q)
        kv_extrema = None if self.kv_order is None else block_extrema(self.kv_order, grid.block_kv)

        def classify(q_block: Index, kv_block: Index, frame: Frame) -> TileBounds:
            q_range, kv_range = grid.q_range(q_block), grid.kv_range(kv_block)
            if q_extrema is not None:
                q_range = tuple(_look_up(x, q_block, frame) for x in q_extrema)
            if kv_extrema is not None:
                kv_range = tuple(_look_up(x, kv_block, frame) for x in kv_extrema)
            return self.mask.within(q_range, kv_range, self._original(frame))

        return classify

    def _original(self, frame: Frame) -> Frame:
        if self.lengths is None:
            return frame
        return frame._replace(q_len=self.lengths[0], kv_len=self.lengths[1])

    def check_lengths(self, q_len: int, kv_len: int) -> None:
        self.mask.check_lengths(*(self.lengths or (q_len, kv_len)))
        for name, order, length in (
            ("q_order", self.q_order, q_len),
            ("kv_order", self.kv_order, kv_len),
        ):
            if order is not None:
                checks.mask_length(name, order.shape[-1], length)


def _look_up(x: Array | None, index: Index, frame: Frame) -> Index:
    if x is None:
        return index
    return x[entry(len(x), frame.batch), entry(x.shape[-2], frame.head), index]
