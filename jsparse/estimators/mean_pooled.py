"""Mean-pooled block scores with top-k: the plain baseline that block-sparse methods start from.

The block scorer of Jiang et al. 2024, arXiv:2407.02490, section 3.2 (block-sparse heads).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jsparse import checks
from jsparse.attention.planned import planned
from jsparse.core import blocks, pooling, scores, selection
from jsparse.types import BlockMask, Method, TileGrid


class MeanPooledInfo(NamedTuple):
    """The product of mean query and mean key per block, scaled."""

    block_scores: Float[Array, "*batch heads q_blocks kv_blocks"]


@functools.partial(jax.jit, static_argnames="block_size")
def mean_pooled_scores(
    q: Float[Array, "*batch q_len heads dim"],
    k: Float[Array, "*batch kv_len kv_heads dim"],
    *,
    block_size: int,
) -> Float[Array, "*batch heads q_blocks kv_blocks"]:
    """Scores each block by the product of its mean query and mean key."""
    q_blocks = pooling.mean_blocks(q, block_size)
    k_blocks = pooling.mean_blocks(k, block_size)
    return scores.pooled_logits(q_blocks, k_blocks, scale=q.shape[-1] ** -0.5)


def mean_pooled(
    *,
    block_size: int = 128,
    density: float | Float[Array, "*heads"] = 0.25,
    width: int | None = None,
) -> Method:
    """Keeps, per query block, the best kv blocks by the product of block means.

    With a mask, the first block and the last visible one (the diagonal, when causal) are always
    among them and count; without one nothing is forced.

    Args:
      block_size: Tokens per block, on both sides.
      density: Share of its visible blocks that each row keeps, rounded up; in (0, 1]; a
        number or one per query head.
      width: Most blocks a row can hold; default all. Rows that need more are marked `overflowed`.

    Differs from the paper:
      The number of blocks is a share of the visible ones rather than a fixed count, so that it can
      be compared at equal density; first and diagonal blocks are forced under a mask.

    Raises:
      ValueError: if a number is out of range, or there are not as many as query heads.
    """
    checks.positive(block_size=block_size)
    checks.fractions(density=density)

    def plan(params, q, k, *, v=None, x=None, positions=None, mask=None, state=None, key=None):
        checks.per_head(q.shape[-2], density=density)
        block_scores = mean_pooled_scores(q, k, block_size=block_size)
        grid = TileGrid(q.shape[-3], k.shape[-3], block_size, block_size)
        visible, forced = blocks.candidates(mask, grid, q.shape[:-3], q.shape[-2])
        per_head = jnp.asarray(density, jnp.float32)[..., None, None]
        count = jnp.ceil(per_head * visible.sum(-1, keepdims=True)).astype(jnp.int32)
        count = jnp.maximum(count, forced.sum(-1, keepdims=True))
        keep = selection.top_k(block_scores, count, visible=visible, forced=forced)
        tiles = BlockMask.from_dense(keep, **grid._asdict(), width=width)
        return tiles, MeanPooledInfo(block_scores)

    return planned(plan)
