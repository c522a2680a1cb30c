"""Cheap estimates of how much each tile of the attention map matters."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jsparse.core import heads as heads_

# scores worked on at once: a product large enough for all cores, little memory at any length
_SCORES_AT_ONCE = 2**18
_FEWEST_CELLS_AT_ONCE = 128


def pooled_logits(
    q_blocks: Float[Array, "*batch q_blocks heads dim"],
    k_blocks: Float[Array, "*batch kv_blocks kv_heads dim"],
    *,
    scale: float,
) -> Float[Array, "*batch heads q_blocks kv_blocks"]:
    """Products of one vector per query block with one per key block."""
    k_blocks = heads_.expand_kv_heads(k_blocks, q_blocks.shape[-2])
    return jnp.einsum("...ihd,...jhd->...hij", q_blocks, k_blocks) * scale


def antidiagonal_cells(
    x: Float[Array, "*batch length heads dim"], stride: int, *, reverse: bool
) -> Float[Array, "*batch cells heads stride_dim"]:
    """Concatenates the tokens of each run of `stride`, backwards where asked.

    The product of a reversed and a plain cell is the sum over the antidiagonal of their
    stride-by-stride tile. The last cell is filled up with zeros, which add nothing.
    """
    missing = -x.shape[-3] % stride
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, missing), (0, 0), (0, 0)])
    x = x.reshape(*x.shape[:-3], -1, stride, *x.shape[-2:])
    x = x[..., ::-1, :, :] if reverse else x
    x = jnp.moveaxis(x, -3, -2)  # cells heads stride dim
    return x.reshape(*x.shape[:-2], -1)


def softmax_block_sums(
    q_cells: Float[Array, "batch q_cells heads features"],
    k_cells: Float[Array, "batch kv_cells kv_heads features"],
    *,
    scale: float,
    cells_per_block: tuple[int, int],
    visible,
) -> Float[Array, "batch heads q_blocks kv_blocks"]:
    """Sums, per block, a softmax over the products of cells, a chunk of rows at a time.

    Args:
      q_cells: One vector per query cell; the last row of blocks may be ragged.
      k_cells: One vector per key cell.
      scale: Factor on the products.
      cells_per_block: Query and key cells per block.
      visible: `visible(batch, head, q_cell)`, on scalar indices, gives the bools [kv_cells] of the
        keys that a query cell may see.
    """
    batches, q_count, heads, _ = q_cells.shape
    kv_count, kv_heads = k_cells.shape[1:3]
    per_q, per_kv = cells_per_block
    q_blocks, kv_blocks = -(-q_count // per_q), -(-kv_count // per_kv)
    cells_at_once = max(_FEWEST_CELLS_AT_ONCE, _SCORES_AT_ONCE // kv_count)
    at_once = min(q_blocks, max(1, cells_at_once // per_q))
    chunks = -(-q_blocks // at_once)
    missing = chunks * at_once * per_q - q_count
    q_cells = jnp.pad(q_cells, ((0, 0), (0, missing), (0, 0), (0, 0)))

    def one_head(index):
        batch, head = jnp.divmod(index, heads)
        # sliced once per head, not once per row: the copy would cost more than the product
        rows = q_cells[batch, :, head]
        keys = k_cells[batch, :, head // (heads // kv_heads)]
        chunk = functools.partial(one_chunk, batch, head, rows, keys)
        return jax.lax.map(chunk, jnp.arange(chunks))

    def one_chunk(batch, head, rows, keys, chunk):
        q_cell = chunk * at_once * per_q + jnp.arange(at_once * per_q)
        rows = jax.lax.dynamic_slice_in_dim(rows, q_cell[0], at_once * per_q)
        logits = jnp.dot(rows, keys.T, preferred_element_type=jnp.float32) * scale
        seen = jax.vmap(lambda cell: visible(batch, head, cell))(q_cell)
        seen &= (q_cell < q_count)[:, None]
        logits = jnp.where(seen, logits, -jnp.inf)
        peak = logits.max(-1, keepdims=True)
        mass = jnp.exp(logits - jnp.where(jnp.isneginf(peak), 0.0, peak))
        # summing the keys of a block before dividing keeps the division off the large array
        mass = jnp.pad(mass, ((0, 0), (0, kv_blocks * per_kv - kv_count)))
        mass = mass.reshape(at_once * per_q, kv_blocks, per_kv).sum(-1)
        total = mass.sum(-1, keepdims=True)
        mass = mass / jnp.where(total != 0, total, 1.0)
        return mass.reshape(at_once, per_q, kv_blocks).sum(1)

    sums = jax.lax.map(one_head, jnp.arange(batches * heads))
    sums = sums.reshape(batches, heads, chunks * at_once, kv_blocks)
    return sums[:, :, :q_blocks]
