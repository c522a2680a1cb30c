"""What a softmax over many keys leaves in each tile, without ever holding a row of tiles' pairs.

A piece of rows and keys at a time: of each row and tile its largest logit and its sum of
exponentials over that are kept. When a row has met all its keys, these two numbers per tile are all
that its log-sum-exp, the sums and the maxima of its probabilities need: each product and each
exponential is computed once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jsparse import _compat
from jsparse.core.blocks import Cells, cells_of
from jsparse.types import Mask, TileGrid
from jsparse.types.pytree import entry, flatten_batch


class _Piece(NamedTuple):
    """Fewest rows and keys of a piece; they change time, not results.

    On a CPU little enough to stay in a core's cache and to follow narrow masks, and enough for XLA
    to share a piece among cores: of 256 rows it computes most on one of them.
    """

    rows: int
    keys: int


_PIECES = {"cpu": _Piece(512, 256)}
_PIECE_OF_ACCELERATORS = _Piece(1024, 1024)


class SoftmaxBlocks(NamedTuple):
    """Of each tile the sum and the largest of its probabilities; of each row the log-sum-exp.

    A row that sees nothing adds nothing, and its log-sum-exp is -inf.
    """

    sums: Float[Array, "*batch heads q_blocks kv_blocks"]
    maxima: Float[Array, "*batch heads q_blocks kv_blocks"]
    lse: Float[Array, "*batch heads q_cells"]


@functools.partial(jax.jit, static_argnames=("block_q", "block_kv", "scale"))
def map_blocks(
    q: Float[Array, "*batch q_len heads dim"],
    k: Float[Array, "*batch kv_len kv_heads dim"],
    *,
    block_q: int = 128,
    block_kv: int = 128,
    scale: float | None = None,
    mask: Mask | None = None,
) -> SoftmaxBlocks:
    """Sums and maxima of the true attention map per tile, and each query's log-sum-exp.

    Time is that of the pairs in the pieces that the mask leaves something to see of; memory that of
    the results, the inputs and some rows of tiles. Nothing of it has a gradient.

    Args:
      q: Queries, positions applied.
      k: Keys, positions applied; `heads` is a multiple of `kv_heads`.
      block_q: Queries per tile.
      block_kv: Keys per tile.
      scale: Factor on the logits, default `dim ** -0.5`.
      mask: Who may see whom.
    """
    batch_shape = q.shape[:-3]
    flat_mask = None if mask is None else mask.flatten_batch(batch_shape)
    found = softmax_blocks(
        q.reshape(-1, *q.shape[-3:]),
        k.reshape(-1, *k.shape[-3:]),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        cells_per_block=(block_q, block_kv),
        cells=cells_of(flat_mask, TileGrid(q.shape[-3], k.shape[-3], 1, 1)),
    )
    return SoftmaxBlocks(*(x.reshape(*batch_shape, *x.shape[1:]) for x in found))


def softmax_blocks(
    q_cells: Float[Array, "batch q_cells heads features"],
    k_cells: Float[Array, "batch kv_cells kv_heads features"],
    *,
    scale: float,
    cells_per_block: tuple[int, int],
    cells: Cells,
) -> SoftmaxBlocks:
    """Sums and maxima, per block, of a softmax over the products of cells.

    Args:
      q_cells: One vector per query cell; the last row of blocks may be ragged.
      k_cells: One vector per key cell.
      scale: Factor on the products.
      cells_per_block: Query and key cells per block.
      cells: Which key cells a query cell may see.
    """
    q_cells, k_cells = jax.lax.stop_gradient((q_cells, k_cells))
    batches, q_count, heads, _ = q_cells.shape
    kv_count, kv_heads = k_cells.shape[1:3]
    per_q, per_kv = cells_per_block
    q_blocks, kv_blocks = -(-q_count // per_q), -(-kv_count // per_kv)
    least = _PIECES.get(jax.default_backend(), _PIECE_OF_ACCELERATORS)
    # whole blocks, and no more than there are
    rows = per_q * min(q_blocks, max(1, least.rows // per_q))
    keys = per_kv * min(kv_blocks, max(1, least.keys // per_kv))
    chunks, pieces = -(-q_count // rows), -(-kv_count // keys)
    q_cells = jnp.pad(q_cells, ((0, 0), (0, chunks * rows - q_count), (0, 0), (0, 0)))
    k_cells = jnp.pad(k_cells, ((0, 0), (0, pieces * keys - kv_count), (0, 0), (0, 0)))
    lists = cells.tiles(rows, keys)
    lists = None if lists is None else flatten_batch(lists, (batches,))

    def one_head(index):
        batch, head = jnp.divmod(index, heads)
        # sliced once per head, not once per piece: the copy would cost more than the product
        of_q = q_cells[batch, :, head]
        of_k = k_cells[batch, :, head // (heads // kv_heads)]
        return jax.lax.map(
            functools.partial(one_chunk, batch, head, of_q, of_k), jnp.arange(chunks)
        )

    def one_chunk(batch, head, of_q, of_k, chunk):
        q_cell = chunk * rows + jnp.arange(rows)[:, None]
        queries = jax.lax.dynamic_slice_in_dim(of_q, chunk * rows, rows)

        def one_piece(known, piece):
            kv_cell = piece * keys + jnp.arange(keys)
            met = jax.lax.dynamic_slice_in_dim(of_k, piece * keys, keys)
            logits = jnp.dot(queries, met.T, preferred_element_type=jnp.float32) * scale
            seen = cells.visible(batch, head, q_cell, kv_cell) & (kv_cell < kv_count)
            logits = jnp.where(seen, logits, -jnp.inf).reshape(rows, -1, per_kv)
            peaks = logits.max(-1)
            mass = jnp.exp(logits - _finite(peaks)[..., None]).sum(-1)
            at = piece * (keys // per_kv)
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(x, new, at, axis=1)
                for x, new in zip(known, (peaks, mass), strict=True)
            )

        shape = rows, pieces * keys // per_kv
        nothing = jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32)
        if lists is None:

            def every(known, number):
                return one_piece(known, number), None

            step, steps = every, pieces
        else:
            lists_of = entry(len(lists.kv_indices), batch), head // (heads // lists.list_heads)
            order, count = (x[*lists_of, chunk] for x in (lists.kv_indices, lists.kv_num_blocks))

            # what is not listed is passed over, so that the loop's length and its work are known
            def listed(known, number):
                meet = functools.partial(one_piece, piece=order[number])
                return _compat.cond(number < count, meet, lambda known: known, known), None

            step, steps = listed, len(order)
        (peaks, mass), _ = _compat.scan(step, nothing, jnp.arange(steps))
        peak = _finite(peaks.max(-1, keepdims=True))
        total = (mass * jnp.exp(peaks - peak)).sum(-1, keepdims=True)
        lse = jnp.where(total != 0, peak + jnp.log(jnp.where(total != 0, total, 1.0)), -jnp.inf)
        share = jnp.exp(peaks - _finite(lse))
        share = jnp.where(q_cell < q_count, share, 0.0).reshape(-1, per_q, shape[1])
        sums = (mass.reshape(share.shape) * share).sum(1)
        return sums[:, :kv_blocks], share.max(1)[:, :kv_blocks], lse[:, 0]

    found = jax.lax.map(one_head, jnp.arange(batches * heads))
    sums, maxima, lse = (x.reshape(batches, heads, -1, *x.shape[3:]) for x in found)
    return SoftmaxBlocks(sums[:, :, :q_blocks], maxima[:, :, :q_blocks], lse[:, :, :q_count])


def _finite(peak: Array) -> Array:
    """The peak, or 0 where there is none: exp(-inf - 0) is 0, exp(-inf + inf) is nan."""
    return jnp.where(jnp.isneginf(peak), 0.0, peak)
