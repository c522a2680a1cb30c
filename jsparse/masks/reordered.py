"""Reordered: a mask that follows tokens which were put in another order."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from jsparse import checks
from jsparse.core.reordering import Orders, Reordered
from jsparse.types import Mask


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
