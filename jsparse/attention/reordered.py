"""`attend_reordered`: attention for a plan whose tiles were cut after tokens changed places."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jsparse import checks
from jsparse.attention.attend import attend
from jsparse.core import reordering
from jsparse.types import entry
from jsparse.types.pytree import flatten_axes


def attend_reordered(
    q: Float[Array, "*batch q_len heads dim"],
    k: Float[Array, "*batch kv_len kv_heads dim"],
    v: Float[Array, "*batch kv_len kv_heads v_dim"],
    plan: Any,
    *,
    q_order: Int[Array, "*order_batch q_order_heads q_len"] | None = None,
    kv_order: Int[Array, "*order_batch kv_order_heads kv_len"] | None = None,
    bias: Float[Array, "*bias"] | None = None,
    score_mod: Callable[..., Array] | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """Puts tokens in an order, attends there, and puts what comes out back.

    Whoever calls it sees tokens in their own places: `bias`, the indices that `score_mod` gets, and
    the output. The plan and the mask are of the tokens in the order; `js.masks.reordered` makes
    that mask.

    Args:
      q: Queries.
      k: Keys. Orders per query head make a copy for each of them.
      v: Values.
      plan: Which tiles of the reordered tokens are computed; see `js.attend`.
      q_order: The order of the queries; default their own.
      kv_order: The order of the keys and values; default their own.
      bias: See `js.attend`; one with an axis of tokens that change places is copied for each order.
      score_mod: See `js.attend`.
      return_lse: See `js.attend`.
      **options: Its other keywords, `mask` among them.
    """
    for order, x in ((q_order, q), (kv_order, k)):
        if order is not None:
            checks.order_fits(order, x.shape)
    out, lse = attend_in_places(
        q, k, v, plan, q_order=q_order, kv_order=kv_order, bias=bias, score_mod=score_mod, **options
    )
    if q_order is not None:
        out = reordering.restore(out, q_order)
        by_token = jnp.swapaxes(lse, -1, -2)[..., None]
        lse = jnp.swapaxes(reordering.restore(by_token, q_order)[..., 0], -1, -2)
    return (out, lse) if return_lse else out


def attend_in_places(
    q: Float[Array, "*batch q_len heads dim"],
    k: Float[Array, "*batch kv_len kv_heads dim"],
    v: Float[Array, "*batch kv_len kv_heads v_dim"],
    plan: Any,
    *,
    q_order: Int[Array, "*order_batch q_order_heads q_places"] | None = None,
    kv_order: Int[Array, "*order_batch kv_order_heads kv_places"] | None = None,
    bias: Float[Array, "*bias"] | None = None,
    score_mod: Callable[..., Array] | None = None,
    **options: Any,
) -> tuple[Float[Array, "*batch q_places heads v_dim"], Float[Array, "*batch heads q_places"]]:
    """As `attend_reordered`, but what comes out stays where it is, and comes with its lse.

    Orders may name a token several times, or never.
    """
    batch_shape, (q_len, heads, _), kv_len = q.shape[:-3], q.shape[-3:], k.shape[-3]
    if bias is not None:
        checks.bias_array(bias)
        full = (*batch_shape, heads, q_len, kv_len)
        bias = bias.reshape((1,) * (len(full) - bias.ndim) + bias.shape)
        checks.broadcasts("bias", bias.shape, full)
        for axis, order in ((-2, q_order), (-1, kv_order)):
            bias = reordering.reorder_pairs(bias, order, axis, heads)
    if score_mod is not None:
        places = [_original_place(x, heads, batch_shape) for x in (q_order, kv_order)]
        score_mod = _at(places, score_mod)
    if q_order is not None:
        q = reordering.gather(q, q_order)
    if kv_order is not None:
        k, v = reordering.gather(k, kv_order), reordering.gather(v, kv_order)
    return attend(q, k, v, plan, bias=bias, score_mod=score_mod, return_lse=True, **options)


def _at(places: list[Callable[..., Any]], score_mod: Callable[..., Array]) -> Callable[..., Array]:
    """A `score_mod` that is told where the tokens stood."""

    def told(logit, batch, head, *indices):
        original = (at(batch, head, index) for at, index in zip(places, indices, strict=True))
        return score_mod(logit, batch, head, *original)

    return told


def _original_place(
    order: Array | None, heads: int, batch_shape: tuple[int, ...]
) -> Callable[..., Any]:
    """A function of (batch, head, index) that says which original token stands there."""
    if order is None:
        return lambda batch, head, index: index
    flat = flatten_axes(order, 2, batch_shape)
    per_order = heads // flat.shape[1]
    return lambda batch, head, index: flat[entry(len(flat), batch), head // per_order, index]
