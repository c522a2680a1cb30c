"""Sums and maxima of the true attention map per tile, by whichever implementation can do it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jsparse import checks
from jsparse.attention import kernels, whole_tiles
from jsparse.attention.attend import Problem, prepare
from jsparse.attention.block_sparse import Lists, Sizes
from jsparse.attention.separation import Separated, separate
from jsparse.core.softmax_blocks import SoftmaxBlocks, map_blocks
from jsparse.core.tiling import block_mask, every_tile
from jsparse.types import BlockMask, Mask, TileGrid
from jsparse.types.pytree import flatten_batch
from pallas_kernels.attention_map import mosaic
from pallas_kernels.block_sparse_attention.logits import Rule, Tiles
from pallas_kernels.ring import LANES

IMPLEMENTATIONS = ("xla", "mosaic")


def map_sums(
    q: Float[Array, "*batch q_len heads dim"],
    k: Float[Array, "*batch kv_len kv_heads dim"],
    *,
    block_q: int = 128,
    block_kv: int = 128,
    scale: float | None = None,
    mask: Mask | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch heads q_blocks kv_blocks"]:
    """Sums the probabilities of dense attention in each tile; a row of tiles sums to its queries.

    No array of pairs is ever formed. Nothing of it has a gradient.

    Args:
      q: Queries, positions applied.
      k: Keys, positions applied; `heads` is a multiple of `kv_heads`.
      block_q: Queries per tile.
      block_kv: Keys per tile.
      scale: Factor on the logits, default `dim ** -0.5`.
      mask: Who may see whom.
      implementation: "xla" or "mosaic"; default the fastest that can do it.

    Raises:
      ValueError: if arguments do not fit each other.
      NotImplementedError: if the named implementation cannot do this job here.
    """
    which = _Which(lambda blocks: blocks.sums, mosaic.tile_sums)
    return _scores(which, q, k, block_q, block_kv, scale, mask, implementation)


def map_maxima(
    q: Float[Array, "*batch q_len heads dim"],
    k: Float[Array, "*batch kv_len kv_heads dim"],
    *,
    block_q: int = 128,
    block_kv: int = 128,
    scale: float | None = None,
    mask: Mask | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch heads q_blocks kv_blocks"]:
    """Finds the largest probability of dense attention in each tile; arguments as `map_sums`."""
    which = _Which(lambda blocks: blocks.maxima, mosaic.tile_maxima)
    return _scores(which, q, k, block_q, block_kv, scale, mask, implementation)


class _Which(NamedTuple):
    """What is wanted of a map, from all that XLA computes and from a kernel."""

    of_blocks: Callable[[SoftmaxBlocks], Array]
    kernel: Callable[..., Array]


def _scores(
    which: _Which,
    q: Array,
    k: Array,
    block_q: int,
    block_kv: int,
    scale: float | None,
    mask: Mask | None,
    implementation: str | None,
) -> Array:
    grid = TileGrid(q.shape[-3], k.shape[-3], block_q, block_kv)
    checks.tile_grid(grid)
    if scale is not None:
        checks.number(scale=scale)
    problem = prepare(q, k, k, mask=mask, scale=scale)
    if implementation is not None:
        checks.one_of(IMPLEMENTATIONS, implementation=implementation)
    reason = _mosaic_refuses(problem, grid)
    if implementation == "mosaic" and reason:
        raise NotImplementedError(f"implementation='mosaic': {reason}")
    if implementation == "xla" or reason:
        sizes = {"block_q": block_q, "block_kv": block_kv}
        return which.of_blocks(map_blocks(q, k, scale=scale, mask=mask, **sizes))
    found = by_kernels(which.kernel, problem, grid)
    return found.reshape(*problem.batch_shape, *found.shape[1:])


def _mosaic_refuses(problem: Problem, grid: TileGrid) -> str | None:
    """Why the kernels cannot do this here, or None if they can."""
    reason = kernels.hopper_refusal()
    if reason:
        return reason
    scale = problem.rule.scale
    if scale is None or not scale > 0:
        return f"it takes a scale above 0, not {scale}."
    q = problem.operands.q
    reason = mosaic.refusal(q.dtype, grid.block_q, grid.block_kv, _padded(q.shape[-1], LANES))
    if reason:
        return reason
    hidden = _hidden(problem, grid)
    return hidden if isinstance(hidden, str) else None


def _padded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _hidden(problem: Problem, grid: TileGrid) -> Separated | str | None:
    """What hides logits, as kernels take it, or a sentence that says why they cannot."""
    mask, rule, ragged = problem.mask, problem.rule, bool(grid.kv_len % grid.block_kv)
    if mask is None and not ragged:
        return None

    def hide(logit, q_index, kv_index, batch, head):
        return rule.hide(logit, mask, q_index, kv_index, batch, head, ragged=ragged)

    batches, _, heads, _ = problem.operands.q.shape
    return separate(
        hide,
        batches=batches,
        heads=heads,
        q_len=grid.q_blocks * grid.block_q,
        kv_len=grid.kv_blocks * grid.block_kv,
    )


def by_kernels(kernel: Callable[..., Array], problem: Problem, grid: TileGrid) -> Array:
    """The log-sum-exp of each row first, then what is wanted of the tiles that are visible."""
    q, k = (jax.lax.stop_gradient(x) for x in problem.operands[:2])
    batches, _, heads, dim = q.shape
    ragged = bool(grid.kv_len % grid.block_kv)
    blocks = grid.q_blocks, grid.kv_blocks
    sizes = Sizes(batches, heads, k.shape[2], grid.block_q, grid.block_kv, *blocks, ragged)
    plan = flatten_batch(_visible(problem.mask, grid), (batches,))
    lists = Lists(plan.kv_indices, plan.kv_num_blocks, problem.mask)
    walked = whole_tiles.by_query(lists, problem.rule, sizes)
    hidden: Any = _hidden(problem, grid)
    hides = hidden and Rule(hidden.rule, hidden.row_values, hidden.column_values)
    tiles = Tiles(grid.block_q, grid.block_kv, problem.rule.scale, mask=hides)

    def padded(x: Array, length: int) -> Array:
        widths = (0, 0), (0, length - x.shape[1]), (0, 0), (0, _padded(dim, LANES) - dim)
        return jnp.pad(x, widths)

    q = padded(q, grid.q_blocks * grid.block_q)
    k = padded(k, grid.kv_blocks * grid.block_kv)
    lse = mosaic.row_lse(q, k, walked, tiles)
    # neither a row that sees nothing nor one that is padding has any probability
    exists = jnp.arange(lse.shape[2]) < grid.q_len
    lse2 = jnp.where(exists & ~jnp.isneginf(lse), lse / math.log(2), jnp.inf)
    found = kernel(q, k, lse2, walked, tiles, plan.width)
    # kernels meet whole tiles first; padding goes to a column of its own, which is cut off
    ids = walked.ids.reshape(plan.kv_indices.shape)
    columns = jnp.repeat(jnp.where(plan.entries(), ids, blocks[1]), heads // plan.list_heads, 1)
    columns = jnp.broadcast_to(columns, found.shape)
    scores = jnp.zeros((*found.shape[:3], blocks[1] + 1), jnp.float32)
    return jnp.put_along_axis(scores, columns, found, axis=3, inplace=False)[..., :-1]


def _visible(mask: Mask | None, grid: TileGrid) -> BlockMask:
    """The tiles that a mask touches, or all."""
    return every_tile(grid) if mask is None else block_mask(mask, **grid._asdict())
