"""Merging partial attentions over disjoint keys by their log-sum-exp."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jsparse import checks

Part = tuple[Float[Array, "*batch q_len heads v_dim"], Float[Array, "*batch heads q_len"]]


def merge(parts: Sequence[Part]) -> Part:
    """Merges attention outputs over disjoint sets of keys into attention over their union.

    Each part is `(out, lse)` with `lse` the natural log of the row's sum of exponentials. A part
    that saw no key in a row has `lse = -inf` there and counts for nothing.

    Raises:
      ValueError: if there are no parts, or they are not of the same queries.
    """
    checks.merge_parts(parts)
    return _merged(parts)


@jax.jit
def _merged(parts: Sequence[Part]) -> Part:
    shares, lse = _shares(jnp.stack([lse for _, lse in parts]))
    share = jnp.swapaxes(shares, -1, -2)[..., None]
    # added one by one: of a stack, XLA's loops compute the shares anew for each number
    weighted = (out.astype(jnp.float32) * own for (out, _), own in zip(parts, share, strict=True))
    out = functools.reduce(jnp.add, weighted)
    return out.astype(parts[0][0].dtype), lse


@jax.jit
def merge_splits(
    out: Float[Array, "splits *batch q_len heads v_dim"],
    lse: Float[Array, "splits *batch heads q_len"],
) -> Part:
    """Merges as many parts as there are along the first axis, as `merge` does; out in f32."""
    shares, lse = _shares(lse)
    # a product, for which the shares are computed once: see above
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    return product("s...qhd,s...hq->...qhd", out.astype(jnp.float32), shares), lse


def _shares(
    lses: Float[Array, "parts *batch heads q_len"],
) -> tuple[Float[Array, "parts *batch heads q_len"], Float[Array, "*batch heads q_len"]]:
    """What share of each row's sum of exponentials a part has, and the logarithm of the sum."""
    # without a derivative: see the softmax of the reference
    peak = jax.lax.stop_gradient(lses).max(0)
    # a row that no part saw: any finite peak keeps exp(-inf - peak) at 0 instead of nan
    peak = jnp.where(jnp.isneginf(peak), 0.0, peak)
    weights = jnp.exp(lses - peak)
    total = weights.sum(0)
    # not `> 0`: a row of NaNs has to show
    seen = total != 0
    safe = jnp.where(seen, total, 1.0)
    return weights / safe, jnp.where(seen, peak + jnp.log(safe), -jnp.inf)
