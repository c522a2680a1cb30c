"""`d_k` and `d_v` of tiles of few keys by the Triton kernels: span by span of queries.

What entries give is kept for one span at a time, about `_KEPT` times as many numbers as k and v
have for each list.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jsparse.attention.block_sparse import Lists, Sizes, by_spans
from jsparse.attention.lanes import indices
from jsparse.types.inverse_list import invert
from pallas_kernels.block_sparse_attention import triton, triton_columns

_KEPT = 2


def d_keys(
    problem: triton.Problem,
    cotangents: triton.Cotangents,
    lists: Lists,
    tiles: triton.Tiles,
    sizes: Sizes,
) -> tuple[Float[Array, "batch kv_len kv_heads dim"], Float[Array, "batch kv_len kv_heads v_dim"]]:
    """The gradient by k and v."""
    list_batch, list_heads, _, width = lists.kv_indices.shape
    spans = -(-sizes.q_blocks * width // (_KEPT * sizes.kv_blocks))
    span = -(-sizes.q_blocks // min(spans, sizes.q_blocks))

    def one_span(sums, start, entries):
        counts = (entries >= 0).sum(-1, dtype=jnp.int32)
        rows = triton_columns.Rows(start[None], jnp.maximum(entries, 0), counts)
        parts = triton_columns.d_entries(problem, cotangents, rows, tiles)
        first = indices(span)[:, None] * parts.d_k.shape[3]
        places = first + indices(width) * sizes.block_kv
        found = invert(entries.reshape(-1, span, width), sizes.kv_blocks, places)
        offsets, places = (
            x.reshape(list_batch, list_heads, -1) for x in (found.offsets, found.q_indices)
        )
        return triton_columns.add_entries(sums, parts, offsets, places, tiles), None

    sums = tuple(jnp.zeros(x.shape, jnp.float32) for x in (problem.k, problem.v))
    (d_k, d_v), _ = by_spans(one_span, sums, lists, span)
    return d_k.astype(problem.k.dtype), d_v.astype(problem.v.dtype)
