"""Reordered: a mask that follows tokens which were put in another order."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jsparse import checks
from jsparse.core.reordering import Orders
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


@pytree_dataclass
class Reordered(Mask):
    """Token `n` of either side is seen, and sees, as the original token `order[n]`.

    `lengths` are the numbers of original tokens where orders have more places than those.
    """

    mask: Mask
    q_order: Int[Array, "*batch order_heads q_len"] | None = array_field(core_ndim=2)
    kv_order: Int[Array, "*batch order_heads kv_len"] | None = array_field(core_ndim=2)
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


def reordered(
    mask: Mask,
    *,
    heads: int,
    q_order: Int[Array, "*batch q_order_heads q_len"] | None = None,
    kv_order: Int[Array, "*batch kv_order_heads kv_len"] | None = None,
    lengths: tuple[int, int] | None = None,
) -> Mask:
    """The mask that sees reordered tokens as `mask` sees the original ones.

    Tiles are bounded by the first and last original position among their tokens, for masks that
    know something of positions alone (causal, windows, sinks, strides, lengths); for segments,
    intervals and predicates every tile counts as partly visible.

    Args:
      mask: Who may see whom, in original positions.
      heads: Number of query heads.
      q_order: The order of the queries; default their own.
      kv_order: The order of the keys; default their own.
      lengths: How many queries and keys `mask` is for, where orders have more places than those:
        places that were added to fill whole tiles may name any token.

    Raises:
      ValueError: if orders are not of integers, their heads do not divide `heads`, or the mask has
        neither one head nor as many.
    """
    checks.mask_heads(mask.heads, heads)

    def expand(**orders: Array | None) -> Array | None:
        ((name, order),) = orders.items()
        if order is None:
            return None
        checks.integers(**{name: order})
        count = order.shape[-2]
        checks.multiple(of=count, heads=heads)
        return order if count == 1 else jnp.repeat(order, heads // count, axis=-2)

    return Reordered(mask, expand(q_order=q_order), expand(kv_order=kv_order), lengths)


def follow(
    mask: Mask | None, orders: Orders, heads: int, lengths: tuple[int, int] | None = None
) -> Mask | None:
    """The mask of tokens that a method has put in these orders; see `reordered`."""
    if mask is None or not orders.moved:
        return mask
    return reordered(mask, heads=heads, lengths=lengths, **orders._asdict())
