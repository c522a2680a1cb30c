"""Cheap estimates of how much each tile of the attention map matters."""

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
