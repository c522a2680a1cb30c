"""Block sums of a softmax over antidiagonals, by whichever implementation can do it."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jsparse import checks
from jsparse.attention import kernels, whole_tiles
from jsparse.attention.separation import Separated
from jsparse.core import scores
from jsparse.core.blocks import Cells
from jsparse.core.softmax_blocks import softmax_blocks
from jsparse.core.tiling import every_tile
from jsparse.types import TileGrid
from jsparse.types.pytree import flatten_batch
from pallas_kernels.attention_map import mosaic_cells
from pallas_kernels.block_sparse_attention.logits import Rule, Tiles
from pallas_kernels.block_sparse_attention.walk import ROWS
from pallas_kernels.ring import LANES

IMPLEMENTATIONS = ("xla", "mosaic")


def antidiagonal_sums(
    q: Float[Array, "batch q_len heads dim"],
    k: Float[Array, "batch kv_len kv_heads dim"],
    *,
    stride: int,
    cells_per_block: int,
    scale: float,
    cells: Cells,
    implementation: str | None = None,
) -> Float[Array, "batch heads q_blocks kv_blocks"]:
    """Sums, per block of cells, the softmax over sums along the antidiagonals of cells of tokens.

    No array of all pairs of cells is formed. Nothing of it has a gradient. The kernel leaves an f32
    for each query cell and each 4 to 16 key cells, which at 131072 tokens, stride 16 and blocks of
    128 tokens is as much as q in 16 bits of 128 features.

    Args:
      q: Queries.
      k: Keys.
      stride: Tokens per cell; those that the last one lacks count as zeros.
      cells_per_block: Cells per block, on both sides.
      scale: Factor on the sums, above 0 for the kernel.
      cells: Which key cells a query cell may see.
      implementation: "xla" or "mosaic"; default the fastest that can do it.

    Raises:
      ValueError: if there is no such implementation.
      NotImplementedError: if the named implementation cannot do this job here.
    """
    if implementation is not None:
        checks.one_of(IMPLEMENTATIONS, implementation=implementation)
    problem = Problem.of(q, k, stride, cells_per_block)
    reason = None if implementation == "xla" else _refusal(problem, q, cells, scale)
    if implementation == "mosaic" and reason:
        raise NotImplementedError(f"implementation='mosaic': {reason}")
    if implementation == "xla" or reason:
        return softmax_blocks(
            scores.antidiagonal_cells(q, stride, reverse=True),
            scores.antidiagonal_cells(k, stride, reverse=False),
            scale=scale,
            cells_per_block=(cells_per_block, cells_per_block),
            cells=cells,
        ).sums
    return by_kernel(problem, q, k, cells, scale)


class Problem(NamedTuple):
    """Numbers of cells.

    Attributes:
      batches: Sequences.
      heads: Query heads.
      stride: Tokens per cell.
      per_block: Cells per block.
      q_count: Query cells.
      kv_count: Key cells.
      rows: Query cells per tile.
    """

    batches: int
    heads: int
    stride: int
    per_block: int
    q_count: int
    kv_count: int
    rows: int

    @classmethod
    def of(cls, q: Array, k: Array, stride: int, per_block: int) -> "Problem":
        """That of queries and keys with one batch axis."""
        q_count, kv_count = (-(-x.shape[1] // stride) for x in (q, k))
        rows = ROWS if max(q_count, per_block) <= ROWS else 2 * ROWS
        return cls(len(q), q.shape[2], stride, per_block, q_count, kv_count, rows)

    @property
    def grid(self) -> TileGrid:
        """Of the kernel's tiles, in cells."""
        return TileGrid(self.q_count, self.kv_count, self.rows, mosaic_cells.CELLS)

    @property
    def group(self) -> int:
        """Key cells per sum."""
        return math.gcd(self.per_block, mosaic_cells.GROUPS[-1])

    def seen(self, cells: Cells) -> Separated | str:
        """Which cells are seen, as the kernel takes it, or why it cannot."""
        grid = self.grid
        return kernels.seen_cells(
            cells,
            self.kv_count,
            batches=self.batches,
            heads=self.heads,
            q_cells=grid.q_blocks * grid.block_q,
            kv_cells=grid.kv_blocks * grid.block_kv,
        )


def _refusal(problem: Problem, q: Array, cells: Cells, scale: float) -> str | None:
    """Why the kernel cannot do this here, or None if it can."""
    reason = kernels.hopper_refusal()
    if reason:
        return reason
    if not scale > 0:
        return f"it takes a scale above 0, not {scale}."
    if mosaic_cells.CELLS % problem.per_block:
        return f"it takes blocks of 4, 8, 16, 32, 64 or 128 cells, not {problem.per_block}."
    seen = problem.seen(cells)
    reason = mosaic_cells.refusal(q.dtype, problem.rows, problem.group)
    return reason or (seen if isinstance(seen, str) else None)


def by_kernel(
    problem: Problem, q: Array, k: Array, cells: Cells, scale: float
) -> Float[Array, "batch heads q_blocks kv_blocks"]:
    """The kernel's sums over runs of cells, as probabilities, summed over blocks."""
    grid, group = problem.grid, problem.group
    q_cells, kv_cells = grid.q_blocks * grid.block_q, grid.kv_blocks * grid.block_kv

    def padded(x: Array, count: int) -> Array:
        missing = count * problem.stride - x.shape[1]
        x = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)))
        return kernels.pad_width(jax.lax.stop_gradient(x), -(-x.shape[-1] // LANES) * LANES)

    tiles = cells.tiles(grid.block_q, grid.block_kv)
    hides = None
    if tiles is not None or kv_cells > problem.kv_count:
        seen = problem.seen(cells)
        assert not isinstance(seen, str)  # it was refused then
        hides = Rule(seen.rule, seen.row_values, seen.column_values)
    lists = every_tile(grid) if tiles is None else tiles
    lists = flatten_batch(lists, (problem.batches,))
    mass, peaks, lse = mosaic_cells.cell_masses(
        padded(q, q_cells),
        padded(k, kv_cells),
        whole_tiles.in_order(lists.kv_indices, lists.kv_num_blocks),
        Tiles(grid.block_q, grid.block_kv, scale, mask=hides),
        stride=problem.stride,
        group=group,
    )
    # neither a row that sees nothing nor one that is padding has any probability
    exists = jnp.arange(q_cells) < problem.q_count
    lse2 = jnp.where(exists & ~jnp.isneginf(lse), lse / math.log(2), jnp.inf)
    per_block, runs = problem.per_block, grid.block_kv // group
    listed = lists.to_dense()
    listed = jnp.repeat(listed, problem.heads // listed.shape[1], axis=1)
    listed = jnp.repeat(listed, grid.block_q // per_block, axis=2)[..., None, :, None]
    shares = jnp.swapaxes(jnp.exp2(peaks - lse2[:, :, None]), 2, 3)
    rows = problem.batches, problem.heads, q_cells // per_block, per_block, grid.kv_blocks
    # what is not listed was not written
    found = jnp.where(listed, mass.reshape(*rows, runs) * shares.reshape(*rows, 1), 0.0).sum(3)
    found = found.reshape(*rows[:3], kv_cells // per_block, per_block // group).sum(-1)
    return found[:, :, : -(-problem.q_count // per_block), : -(-problem.kv_count // per_block)]
