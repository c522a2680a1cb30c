"""Cheap estimates of how much each tile of the attention map matters."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jsparse.core import heads as heads_


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
    """Sums, per block, a softmax over the products of cells, one row of blocks at a time.

    Args:
      q_cells: One vector per query cell; the last row of blocks may be ragged.
      k_cells: One vector per key cell.
      scale: Factor on the products.
      cells_per_block: Query and key cells per block.
      visible: `visible(q_cell, head)` gives the bools [kv_cells] that a query cell may see, for
        scalar indices of cell, head and sequence: `visible(batch, head, q_cell)`.
    """
    batches, q_count, heads, _ = q_cells.shape
    kv_count, kv_heads = k_cells.shape[1:3]
    per_q, per_kv = cells_per_block
    q_blocks, kv_blocks = -(-q_count // per_q), -(-kv_count // per_kv)
    missing = q_blocks * per_q - q_count
    q_cells = jnp.pad(q_cells, ((0, 0), (0, missing), (0, 0), (0, 0)))

    def one_row(index):
        rest, q_block = jnp.divmod(index, q_blocks)
        batch, head = jnp.divmod(rest, heads)
        rows = jax.lax.dynamic_slice_in_dim(q_cells[batch, :, head], q_block * per_q, per_q)
        keys = k_cells[batch, :, head // (heads // kv_heads)]
        logits = jnp.dot(rows, keys.T, preferred_element_type=jnp.float32) * scale
        q_cell = q_block * per_q + jnp.arange(per_q)
        seen = jax.vmap(lambda cell: visible(batch, head, cell))(q_cell)
        seen &= (q_cell < q_count)[:, None]
        peak = jnp.where(seen, logits, -jnp.inf).max(-1, keepdims=True)
        peak = jnp.where(jnp.isneginf(peak), 0.0, peak)
        mass = jnp.where(seen, jnp.exp(logits - peak), 0.0)
        total = mass.sum(-1, keepdims=True)
        # summing the keys of a block before dividing keeps the division off the large array
        mass = jnp.pad(mass, ((0, 0), (0, kv_blocks * per_kv - kv_count)))
        mass = mass.reshape(per_q, kv_blocks, per_kv).sum(-1)
        return (mass / jnp.where(total > 0, total, 1.0)).sum(0)

    rows = jax.lax.map(one_row, jnp.arange(batches * heads * q_blocks))
    return rows.reshape(batches, heads, q_blocks, kv_blocks)


