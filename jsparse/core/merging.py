"""Merging partial attentions over disjoint keys by their log-sum-exp."""

import functools
from collections.abc import Sequence

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
    lses = jnp.stack([lse for _, lse in parts])
    peak = lses.max(0)
    # a row that no part saw: any finite peak keeps exp(-inf - peak) at 0 instead of nan
    peak = jnp.where(jnp.isneginf(peak), 0.0, peak)
    weights = jnp.exp(lses - peak)
    total = weights.sum(0)
    # not `> 0`: a row of NaNs has to show
    seen = total != 0
    share = jnp.swapaxes(weights / jnp.where(seen, total, 1.0), -1, -2)[..., None]
    # added one by one: of a stack, XLA's loops compute the shares anew for each number
    weighted = (out.astype(jnp.float32) * own for (out, _), own in zip(parts, share, strict=True))
    out = functools.reduce(jnp.add, weighted)
    lse = jnp.where(seen, peak + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)
    return out.astype(parts[0][0].dtype), lse
