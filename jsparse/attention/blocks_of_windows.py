"""The blocks that hold most attention to compressed keys, by whichever implementation can do it."""

import functools
import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jsparse import checks
from jsparse.attention import kernels, whole_tiles
from jsparse.attention.separation import Separated, separate
from jsparse.core.blocks import Cells, cells_of
from jsparse.core.running_top_k import Best, running_top_k
from jsparse.core.tile_scores import window_scores
from jsparse.core.windows import Windows
from jsparse.types import BlockMask, Frame, Mask, TileGrid
from jsparse.types.pytree import entry, flatten_batch
from pallas_kernels.block_sparse_attention.logits import Rule
from pallas_kernels.block_sparse_attention.walk import ROWS
from pallas_kernels.ring import LANES
from pallas_kernels.top_k import mosaic_sums

IMPLEMENTATIONS = ("xla", "mosaic")
# queries, and blocks of keys, that XLA scores at once
_SCORED_ROWS, _SCORED_BLOCKS = 256, 64
_LOG2_E = math.log2(math.e)


class Problem(NamedTuple):
    """Whose attention to which windows is summed up, and what is chosen besides; see `nsa`.

    Attributes:
      q: Queries.
      k_windows: One key per window; windows are complete, so there may be none for the last keys.
      lse: Of each query over the windows that it sees, as attention to them returns it.
      windows: Their sizes.
      block: Keys per block, a multiple of the windows' stride.
      kv_len: Keys.
      mask: Who sees which window, with batch axes flattened; the lse is under it too.
      scale: Factor on the logits.
      softcap: Caps the logits, as it did those of the lse.
      offset: The key position of the first query, per sequence.
      num_init: Blocks at the start that are forced.
      num_local: Blocks up to the query's own that are forced, that one included.
      tokens: Who sees which key besides, with batch axes flattened; a block of which no head of a
        group sees any does not count, forced or not. None shows all up to the query's own.
    """

    q: Float[Array, "batch q_len heads dim"]
    k_windows: Float[Array, "batch windows kv_heads dim"]
    lse: Float[Array, "batch heads q_len"]
    windows: Windows
    block: int
    kv_len: int
    mask: Mask
    scale: float | Float[Array, ""]
    softcap: float | None
    offset: Int[Array, " batch"]
    num_init: int = 0
    num_local: int = 1
    tokens: Mask | None = None

    @property
    def group(self) -> int:
        """Query heads that choose together."""
        return self.q.shape[2] // self.k_windows.shape[2]

    @property
    def blocks(self) -> int:
        """Blocks of keys."""
        return -(-self.kv_len // self.block)

    def cells(self) -> Cells | None:
        """Which blocks hold a key that a query sees; None where `tokens` says nothing."""
        if self.tokens is None:
            return None
        return cells_of(self.tokens, TileGrid(self.q.shape[1], self.kv_len, 1, self.block))

    def begun(self, grid: TileGrid) -> BlockMask:
        """The tiles of blocks of which some begin before the last query of a tile."""
        last = self.offset[:, None] + grid.q_range(jnp.arange(grid.q_blocks))[1]
        first_keys = jnp.arange(grid.kv_blocks) * grid.block_kv * self.block
        begun = (first_keys <= last[..., None])[:, None]
        return BlockMask.from_dense(begun, **grid._asdict(), width=grid.kv_blocks)


def blocks_of_windows(problem: Problem, top_k: int, implementation: str | None = None) -> Best:
    """Chooses for each query and kv head the blocks that hold most of its attention to windows.

    The selection of native sparse attention (Yuan et al. 2025, arXiv:2502.11089, equations 9 and
    10): probabilities of windows are summed over the query heads of a group, and over the strides
    that a window and a block share, in f32; they are never all there. Forced blocks come first and
    count, ties go to the lower block, a NaN outranks every number. Nothing of it has a gradient.

    Args:
      problem: Queries, windows and rules.
      top_k: Blocks per query, forced ones included.
      implementation: "xla" or "mosaic"; default the fastest that can do it.

    Raises:
      ValueError: if there is no such implementation, `top_k` is not positive, or `stride` does not
        divide the sizes.
      NotImplementedError: if the named implementation cannot do this job here.
    """
    checks.positive(top_k=top_k)
    if implementation is not None:
        checks.one_of(IMPLEMENTATIONS, implementation=implementation)
    sizes = {"size": problem.windows.size, "block": problem.block}
    checks.positive(stride=problem.windows.stride, **sizes)
    checks.multiple(of=problem.windows.stride, **sizes)
    top_k = min(top_k, problem.blocks)
    reason = None if implementation == "xla" else _refusal(problem, top_k)
    if implementation == "mosaic" and reason:
        raise NotImplementedError(f"implementation='mosaic': {reason}")
    if implementation != "xla" and reason is None:
        return by_kernel(problem, top_k)
    q_len = problem.q.shape[1]
    rows, columns = min(_SCORED_ROWS, q_len), min(_SCORED_BLOCKS, problem.blocks)
    grid = TileGrid(q_len, problem.blocks, rows, columns)
    score = window_scores(
        *problem[:3],
        windows=problem.windows,
        block=problem.block,
        mask=problem.mask,
        grid=grid,
        scale=problem.scale,
        softcap=problem.softcap,
        offset=problem.offset,
        num_init=problem.num_init,
        num_local=problem.num_local,
        tokens=problem.cells(),
    )
    heads = problem.k_windows.shape[2]
    tiles = problem.begun(grid)
    return running_top_k(score, top_k, grid, batches=len(problem.q), heads=heads, tiles=tiles)


def grid_of(problem: Problem) -> TileGrid:
    """That of the kernel."""
    q_len, _, dim = problem.q.shape[1:]
    rows = ROWS if dim > 2 * LANES or q_len <= ROWS else 2 * ROWS
    return TileGrid(q_len, problem.blocks, rows, mosaic_sums.COLUMNS)


def weights_of(windows: Windows, block: int) -> tuple[float, ...]:
    """How many strides each window that reaches into a block shares with it, in their order."""
    overlap, per_block = windows.size // windows.stride, block // windows.stride
    # the first of them begins `overlap - 1` strides before the block
    strides = (
        [n - overlap + 1 + m for m in range(overlap)] for n in range(overlap + per_block - 1)
    )
    return tuple(float(sum(0 <= m < per_block for m in window)) for window in strides)


def _windows_of(problem: Problem, columns: int) -> np.ndarray:
    """The window that each key of each block stands for: first those of all blocks' first keys.

    There may be none of that number.
    """
    windows, per_block = problem.windows, problem.block // problem.windows.stride
    keys = len(weights_of(windows, problem.block))
    first = np.arange(columns) * per_block - windows.size // windows.stride + 1
    return (np.arange(keys)[:, None] + first).reshape(-1).astype(np.int32)


def term_of(problem: Problem, grid: TileGrid) -> Separated | str:
    """What becomes of a product: a window's probability, as the kernel takes it, or why not."""
    columns = grid.kv_blocks * grid.block_kv
    of_column = _windows_of(problem, columns)
    count, (batches, q_len, heads, _) = problem.k_windows.shape[1], problem.q.shape
    table, softcap = jnp.asarray(of_column), problem.softcap

    def probability(product, q_index, column, batch, head):
        window = table[column]
        known = jnp.clip(window, 0, max(count - 1, 0))
        seen = (window >= 0) & (window < count)
        seen &= problem.mask.visible(q_index, known, Frame(q_len, count, batch, head))
        lse2 = problem.lse[batch, head, q_index] * _LOG2_E
        if softcap is None:
            logit2 = product * (problem.scale * _LOG2_E)
        else:
            # a tangent by exponentials: the chip's own is of 11 bits
            grown = jnp.exp2(product * (problem.scale * (2 * _LOG2_E / softcap)))
            logit2 = (softcap * _LOG2_E) * (1.0 - 2.0 / (grown + 1.0))
        return jnp.where(seen, jnp.exp2(logit2 - lse2), jnp.float32(0))

    return separate(
        probability,
        batches=batches,
        heads=heads,
        q_len=grid.q_blocks * grid.block_q,
        kv_len=len(of_column),
    )


def _hides(problem: Problem, grid: TileGrid) -> Separated | str:
    """Which blocks are seen, and which are forced, as the kernel takes it, or why not."""
    rows = grid.q_blocks * grid.block_q
    own = (problem.offset[:, None] + jnp.arange(rows, dtype=jnp.int32)) // problem.block
    cells, group = problem.cells(), problem.group
    members = group if problem.tokens is not None and problem.tokens.heads > 1 else 1

    def own_block(batch, q_cell):
        return own[entry(len(own), batch), q_cell]

    def visible(batch, head, q_cell, kv_cell):
        seen = kv_cell <= own_block(batch, q_cell)
        if cells is None:
            return seen
        known = jnp.minimum(kv_cell, grid.kv_len - 1)
        of_heads = (cells.visible(batch, head * group + n, q_cell, known) for n in range(members))
        return seen & functools.reduce(operator.or_, of_heads)

    def forced(batch, head, q_cell, kv_cell):
        local = kv_cell > own_block(batch, q_cell) - problem.num_local
        return (kv_cell < problem.num_init) | local

    return kernels.seen_cells(
        Cells(visible),
        grid.kv_len,
        batches=len(problem.q),
        heads=problem.k_windows.shape[2],
        q_cells=rows,
        kv_cells=grid.kv_blocks * grid.block_kv,
        forced=forced,
    )


def _refusal(problem: Problem, top_k: int) -> str | None:
    """Why the kernel cannot do this here, or None if it can."""
    reason = kernels.hopper_refusal()
    if reason:
        return reason
    grid = grid_of(problem)
    q, k = problem.q, problem.k_windows
    keys = len(weights_of(problem.windows, problem.block))
    dim = -(-q.shape[3] // LANES) * LANES
    reason = mosaic_sums.refusal((q.dtype, k.dtype), grid.block_q, keys, dim, top_k)
    if reason:
        return reason
    rules = term_of(problem, grid), _hides(problem, grid)
    return next((rule for rule in rules if isinstance(rule, str)), None)


def by_kernel(problem: Problem, top_k: int) -> Best:
    """What the kernel finds, in the order of columns."""
    grid = grid_of(problem)
    term, hides = _rule(term_of(problem, grid)), _rule(_hides(problem, grid))
    weights = weights_of(problem.windows, problem.block)
    lists = flatten_batch(problem.begun(grid), (len(problem.q),))
    columns, keys = mosaic_sums.top_k(
        kernels.padded(problem.q, grid.q_blocks * grid.block_q),
        _keys_of_blocks(problem, grid),
        whole_tiles.in_order(lists.kv_indices, lists.kv_num_blocks),
        mosaic_sums.Sums(weights, term, hides, forcing=True),
        grid.block_q,
        top_k,
    )
    columns, keys = (x[:, :, : grid.q_len] for x in (columns, keys))
    return Best.unordered(columns, mosaic_sums.score_of(keys))


def _rule(separated: Separated | str) -> Rule:
    assert not isinstance(separated, str)  # it was refused then
    # the lse among them: a kernel has no derivative, not even one of zeros
    values = jax.lax.stop_gradient((separated.row_values, separated.column_values))
    return Rule(separated.rule, *values)


def _keys_of_blocks(
    problem: Problem, grid: TileGrid
) -> Float[Array, "batch more_blocks per_block kv_heads dim"]:
    """The windows that begin in each block, later by those that reach into it from before."""
    windows, k = problem.windows, problem.k_windows
    before, per_block = windows.size // windows.stride - 1, problem.block // windows.stride
    keys = len(weights_of(windows, problem.block))
    more = -(-((keys - 1) // per_block) // mosaic_sums.TOGETHER) * mosaic_sums.TOGETHER
    blocks = grid.kv_blocks * grid.block_kv + more
    k = jnp.pad(k[:, : blocks * per_block - before], ((0, 0), (before, 0), (0, 0), (0, 0)))
    k = kernels.padded(k, blocks * per_block)
    return k.reshape(len(k), blocks, per_block, *k.shape[2:])
