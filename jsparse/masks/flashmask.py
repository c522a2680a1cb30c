"""FlashMask: masks as intervals per key column. Wang et al. 2024, arXiv:2410.01359."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from jsparse import checks
from jsparse.attention.planned import Queries, masked
from jsparse.masks.causal import causal as causal_mask
from jsparse.masks.intervals import intervals
from jsparse.types import Mask, Method


def sliding_window_columns(length: int, *, window: int) -> Int[Array, "1 length 1"]:
    """Columns of a causal window of `window` keys, the own one included."""
    return jnp.minimum(jnp.arange(length) + window, length)[None, :, None]


def causal_document_columns(
    document_ends: Int[Array, "*batch length"],
) -> Int[Array, "*batch 1 length 1"]:
    """Columns of causal attention inside packed documents, from each token's document end."""
    return document_ends[..., None, :, None]


def flashmask(
    *,
    startend_row_indices: Int[Array, "*batch mask_heads kv_len bounds"] | None = None,
    causal: bool = True,
) -> Method:
    """Attends exactly under a mask given as at most two hidden row intervals per key column.

    Args:
      startend_row_indices: Interval bounds per key; see `js.masks.intervals` for the meaning of 1,
        2 or 4 of them. The heads axis is 1, the number of kv heads or that of query heads.
        Default: no intervals. Rows are queries as they come, or, where their positions are given,
        by those: so in a cache, for which the columns are as many as it has room.
      causal: Whether keys past the query's own position are hidden too, bottom-right aligned.

    Differs from the paper:
      `causal` is True unless said otherwise, so that the method without columns is causal
      attention. Tiles are 128 x 128 whatever the head dimension. The block_mask option is a plan
      here: intersect it with the plan by `&`. The window_size option is a mask here:
      `js.masks.sliding_window`, whose bounds do not count the query's own key.

    Raises:
      ValueError: if bounds are not integers, or not as many as `causal` asks.
    """
    columns = startend_row_indices
    if columns is not None:
        checks.integers(startend_row_indices=columns)
        checks.interval_bounds(columns.shape[-1], causal)

    def own_mask(queries: Queries) -> Mask | None:
        if columns is None:
            return causal_mask(offset=queries.offset) if causal else None
        q_len, heads = queries.q_len, queries.heads
        count = columns.shape[-3]
        checks.multiple(of=count, heads=heads)
        per_head = columns if count == 1 else jnp.repeat(columns, heads // count, axis=-3)
        return intervals(per_head, causal=causal, q_len=q_len, offset=queries.offset)

    return masked(own_mask)
