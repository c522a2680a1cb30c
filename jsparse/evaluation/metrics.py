"""How close sparse attention comes to dense attention, without forming all pairs."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jsparse.attention.attend import attend
from jsparse.core.blocks import candidates
from jsparse.types import BlockMask, Mask, Method, parts_of


class OutputError(NamedTuple):
    """Distances of each head's output from that of dense attention.

    Attributes:
      relative: The norm of the difference over the norm of the dense output.
      largest: The largest difference of a single number.
      cosine: The cosine of the angle between the two outputs, 1 where both are zero.
    """

    relative: Float[Array, "*batch heads"]
    largest: Float[Array, "*batch heads"]
    cosine: Float[Array, "*batch heads"]


def recalled_mass(
    sparse_lse: Float[Array, "*batch heads q_len"], dense_lse: Float[Array, "*batch heads q_len"]
) -> Float[Array, "*batch heads"]:
    """The share of the dense softmax's mass that falls on the pairs computed, mean over rows.

    Both are log-sum-exps of the same logits, over some pairs and over all. Rows that see no key
    under dense attention are left out.
    """
    seen = ~jnp.isneginf(dense_lse)
    share = jnp.exp(sparse_lse - jnp.where(seen, dense_lse, 0.0))
    return share.mean(-1, where=seen)


def output_error(
    out: Float[Array, "*batch q_len heads v_dim"], dense: Float[Array, "*batch q_len heads v_dim"]
) -> OutputError:
    """Compares outputs head by head, in float32."""
    out, dense = out.astype(jnp.float32), dense.astype(jnp.float32)
    difference = _norm(out - dense)
    norm, dense_norm = _norm(out), _norm(dense)
    relative = jnp.where(difference == 0, 0.0, difference / dense_norm)
    product = norm * dense_norm
    inner = jnp.where((norm == 0) & (dense_norm == 0), 1.0, (out * dense).sum((-3, -1)))
    cosine = inner / jnp.where(product == 0, 1.0, product)
    return OutputError(relative, jnp.abs(out - dense).max((-3, -1)), cosine)


def _norm(x: Float[Array, "*batch q_len heads v_dim"]) -> Float[Array, "*batch heads"]:
    return jnp.sqrt(jnp.square(x).sum((-3, -1)))


def visible_density(
    plan: BlockMask | Sequence[BlockMask] | None, mask: Mask | None, heads: int
) -> Float[Array, "*batch heads"]:
    """The share of the tiles that the mask leaves visible which the plan computes.

    Of a tuple, tiles of the widest part; what other parts compute counts by its area.
    """
    if plan is None:
        return jnp.ones((heads,))
    widest = _widest(plan)
    visible, _ = candidates(mask, widest.grid, widest.batch_shape, heads)
    computed = jnp.zeros((heads,))
    for part in parts_of(plan):
        tiles = part.kv_num_blocks.sum(-1) * _share(part, widest)
        computed = computed + jnp.repeat(tiles, heads // part.list_heads, axis=-1)
    return computed / visible.sum((-1, -2))


def tile_shares(
    plan: BlockMask | Sequence[BlockMask], heads: int
) -> Float[np.ndarray, "heads q_blocks kv_blocks"]:
    """How much of each tile a concrete plan of one sequence computes; of a tuple's widest part."""
    widest = _widest(plan)
    shares = np.zeros((heads, widest.grid.q_blocks, widest.grid.kv_blocks), np.float32)
    for part in parts_of(plan):
        head, row, entry = np.nonzero(np.asarray(part.entries()))
        column = np.asarray(part.kv_indices)[head, row, entry]
        found = np.zeros((part.list_heads, *shares.shape[1:]), np.float32)
        # a narrow tile lies within the wide one that holds its first pair
        rows = row * part.block_q // widest.block_q
        np.add.at(found, (head, rows, column * part.block_kv // widest.block_kv), 1)
        shares += np.repeat(found * _share(part, widest), heads // part.list_heads, axis=0)
    return shares


def _widest(plan: BlockMask | Sequence[BlockMask]) -> BlockMask:
    return max(parts_of(plan), key=lambda part: part.block_q * part.block_kv)


def _share(part: BlockMask, widest: BlockMask) -> float:
    """A part's tile as a share of a tile of the widest part."""
    return part.block_q * part.block_kv / (widest.block_q * widest.block_kv)


def pairs_attended(
    method: Method,
    q: Float[Array, "*batch q_len heads dim"],
    k: Float[Array, "*batch kv_len kv_heads dim"],
    v: Float[Array, "*batch kv_len kv_heads v_dim"],
    *,
    mask: Mask | None = None,
) -> Float[Array, "*batch heads"]:
    """Counts the pairs of tokens that a method attends to, element-wise masks included.

    With every logit zero, a row's log-sum-exp is the logarithm of how many keys it sees, so the
    executor that does the work does the counting too, one tile at a time. Exact up to f32
    rounding.
    """

    def zero(logit, batch, head, q_index, kv_index):
        return jnp.zeros_like(logit)

    (_, lse), _ = method.attend((), q, k, v, mask=mask, score_mod=zero, return_lse=True)
    return jnp.exp(lse).sum(-1)


def pairs_visible(mask: Mask, q_len: int, kv_len: int, heads: int) -> Float[Array, " heads"]:
    """Counts the pairs of tokens that a mask without batch axes leaves visible, per head."""
    zeros = jnp.zeros((1, heads, 1))
    q, k = jnp.broadcast_to(zeros, (q_len, heads, 1)), jnp.broadcast_to(zeros, (kv_len, heads, 1))
    _, lse = jax.jit(lambda q, k: attend(q, k, k, mask=mask, return_lse=True))(q, k)
    return jnp.exp(lse).sum(-1)
