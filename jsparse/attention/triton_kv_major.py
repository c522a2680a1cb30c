"""Tiles of few queries by the Triton kernels: span by span, what rows get from tiles merged.

The lists turned round, the places of what is kept and its merging are those of `kv_major`, which
computes the same in XLA.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jsparse.attention import kv_major
from jsparse.attention.block_sparse import Lists, Sizes
from jsparse.attention.kv_major import Chunks, Cut
from pallas_kernels.block_sparse_attention import triton, triton_kv_major


def forward(
    problem: triton.Problem, lists: Lists, tiles: triton.Tiles, sizes: Sizes
) -> tuple[Float[Array, "batch q_len heads v_dim"], Float[Array, "batch heads q_len"]]:
    """Computes `(out, lse)`, both f32."""

    def span(carry, start, chunks):
        found = triton_kv_major.forward(problem, _of_kernel(chunks, start), tiles)
        peaks, totals, sums = (_by_member(x, sizes) for x in found)
        return carry, kv_major.merged(peaks, totals, sums, chunks)

    _, (out, lse) = kv_major.by_chunks(span, None, lists, sizes, Cut.of(lists, sizes))
    return jnp.swapaxes(out, 1, 2), lse


def d_queries(
    problem: triton.Problem,
    cotangents: triton.Cotangents,
    lists: Lists,
    tiles: triton.Tiles,
    sizes: Sizes,
) -> tuple[Float[Array, "batch q_len heads dim"], tuple[Array | None, ...]]:
    """The gradient by q, and by each value per query, as `triton.d_queries` gives them."""
    wanted = triton.per_query(problem)

    def span(carry, start, chunks):
        d_q, d_values = triton_kv_major.d_queries(
            problem, cotangents, _of_kernel(chunks, start), tiles
        )
        parts = d_q, *(d_value[..., None] for d_value in d_values)
        sums = (kv_major.sum_of_lists(_by_member(x, sizes), chunks, None) for x in parts)
        return carry, tuple(sums)

    _, (d_q, *d_values) = kv_major.by_chunks(span, None, lists, sizes, Cut.of(lists, sizes))
    found = dict(zip(wanted, d_values, strict=True))
    d_q = jnp.swapaxes(d_q, 1, 2).astype(problem.q.dtype)
    return d_q, tuple(found.get(n) for n in range(len(problem.values)))


def _of_kernel(chunks: Chunks, start: Array) -> triton_kv_major.Chunks:
    """Chunks one after the other, whose members are rows of all tiles, not of the span's alone."""
    members = jnp.where(chunks.members >= 0, chunks.members + start, -1)
    batch, head, kv_block = (x.reshape(-1) for x in (chunks.batch, chunks.head, chunks.kv_block))
    return triton_kv_major.Chunks(
        batch,
        head,
        kv_block,
        members.reshape(-1, members.shape[-1]),
        chunks.total[None],
    )


def _by_member(x: Array, sizes: Sizes) -> Float[Array, "slots block_q ..."]:
    """What the kernel gives for the rows of each chunk, member by member."""
    return x.reshape(-1, sizes.block_q, *x.shape[2:])
