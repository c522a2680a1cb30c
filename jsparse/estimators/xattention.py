"""XAttention: block scores from antidiagonal sums. Xu et al. 2025, arXiv:2503.16428."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jsparse import checks
from jsparse.attention.antidiagonals import antidiagonal_sums
from jsparse.attention.planned import planned
from jsparse.core import blocks, selection
from jsparse.types import BlockMask, Mask, Method, TileGrid


class XAttentionInfo(NamedTuple):
    """Estimated attention mass per block; a row of full blocks sums to block_size / stride."""

    block_scores: Float[Array, "*batch heads q_blocks kv_blocks"]


@functools.partial(jax.jit, static_argnames=("stride", "block_size", "norm", "implementation"))
def antidiagonal_scores(
    q: Float[Array, "*batch q_len heads dim"],
    k: Float[Array, "*batch kv_len kv_heads dim"],
    *,
    stride: int,
    block_size: int,
    norm: float = 1.0,
    mask: Mask | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch heads q_blocks kv_blocks"]:
    """Estimates the attention mass of each block from its antidiagonals.

    Each cell of stride x stride tokens gets the mean of its antidiagonal as logit; a softmax over a
    row of cells, summed over blocks, is the score (section 2.1). All antidiagonals together are one
    product of strided, concatenated q and k; it is formed for some rows and some keys at a time,
    where the mask leaves anything visible.

    Args:
      q: Queries, positions applied.
      k: Keys, positions applied.
      stride: Side of a cell, S in the paper.
      block_size: Side of a block, B in the paper; a multiple of `stride`.
      norm: Temperature divisor of the logits.
      mask: Who may see whom. A cell counts as visible where any of its pairs is.
      implementation: "xla" or "mosaic"; default the fastest that can do it.

    Raises:
      NotImplementedError: if the named implementation cannot do this job here.
    """
    batch_shape, (q_len, heads, dim) = q.shape[:-3], q.shape[-3:]
    flat_q, flat_k = q.reshape(-1, *q.shape[-3:]), k.reshape(-1, *k.shape[-3:])
    # queries are the last ones: cells are counted from the first query, as blocks are
    grid = TileGrid(q_len, k.shape[-3], stride, stride)
    flat_mask = None if mask is None else mask.flatten_batch(batch_shape)
    mass = antidiagonal_sums(
        flat_q,
        flat_k,
        stride=stride,
        cells_per_block=block_size // stride,
        scale=dim**-0.5 / (stride * norm),
        cells=blocks.cells_of(flat_mask, grid),
        implementation=implementation,
    )
    return mass.reshape(*batch_shape, heads, *mass.shape[-2:])


def xattention(
    *,
    stride: int = 16,
    block_size: int = 128,
    threshold: float | Float[Array, "*heads"] = 0.9,
    norm: float = 1.0,
    width: int | None = None,
) -> Method:
    """Keeps, per query block, the fewest kv blocks that hold `threshold` of the estimated mass.

    With a mask, the first block and the last visible one (the diagonal, when causal) are taken
    first and count towards the threshold; without one nothing is forced.

    Args:
      stride: Side of an antidiagonal cell; 8 or 16 in the paper. Divides `block_size`.
      block_size: Tokens per block, on both sides; 128 in the paper.
      threshold: Mass to keep, in (0, 1]; a number or one per query head (the paper's per-head
        thresholds); 0.9 in the paper.
      norm: Temperature divisor of the estimate's logits, above 0; 1 in the authors' code.
      width: Most blocks a row can hold; default all. Rows that need more are marked `overflowed`.

    Differs from the paper:
      Lengths need not be multiples of anything: a ragged last block counts the cells that exist.
      Ties go to the lower block (the authors' sort is unstable). A ragged last cell averages over
      `stride` as if its missing tokens had logit 0. Logits and sums are in f32; theirs are in the
      inputs' dtype and in f64. Any mask forces the first and the last visible block, in the paper
      causality does; the authors' `keep_sink` and `keep_recent`, which force them without it, are
      no arguments here, nor are their other patterns of a cell (diagonal, random, doubled) and
      estimates from some query cells only. How many rows are scored at once is not an argument.

    Raises:
      ValueError: if `stride` does not divide `block_size`, or a number is out of range.
    """
    checks.positive(stride=stride, block_size=block_size)
    checks.multiple(of=stride, block_size=block_size)
    checks.fractions(threshold=threshold)
    checks.positive_number(norm=norm)

    def plan(params, q, k, *, v=None, x=None, positions=None, mask=None, state=None, key=None):
        checks.per_head(q.shape[-2], threshold=threshold)
        mass = antidiagonal_scores(q, k, stride=stride, block_size=block_size, norm=norm, mask=mask)
        grid = TileGrid(q.shape[-3], k.shape[-3], block_size, block_size)
        visible, forced = blocks.candidates(mask, grid, q.shape[:-3], q.shape[-2])
        per_head = jnp.asarray(threshold, jnp.float32)[..., None, None]
        keep = selection.top_p(mass, per_head, visible=visible, forced=forced)
        tiles = BlockMask.from_dense(keep, **grid._asdict(), width=width)
        return tiles, XAttentionInfo(mass)

    return planned(plan)
