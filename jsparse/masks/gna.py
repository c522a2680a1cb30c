"""GNA: windows on a grid that groups of queries share. Hassani et al. 2025, arXiv:2504.16922."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jsparse.attention.planned import no_params
from jsparse.masks.neighborhood import axes_of
from jsparse.masks.neighborhood_attention import (
    Neighborhoods,
    axis_tiles,
    fully_block_sparse,
    windows_of_tiles,
)
from jsparse.types import Method


class Simulation(NamedTuple):
    """What tiles make of a window, from integers alone.

    Attributes:
      visited: Tiles of keys that each tile of queries needs.
      total: All tiles of keys: what each tile of queries needs in dense attention.
      fully_block_sparse: Whether no tile of keys is seen in part.
      flop_bound: How many times fewer pairs there are than in dense attention.
    """

    visited: Int[np.ndarray, " q_blocks"]
    total: int
    fully_block_sparse: bool
    flop_bound: float

    @property
    def bound_mean(self) -> float:
        """How many times faster than dense attention at most, by the tiles of all queries."""
        return self.total / float(self.visited.mean())

    @property
    def bound_max(self) -> float:
        """The same by the tile of queries that needs most."""
        return self.total / int(self.visited.max())


def simulate(
    grid: Sequence[int],
    *,
    window: int | Sequence[int] | None,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    q_tile: Sequence[int],
    kv_tile: Sequence[int],
    from_window_start: bool = False,
) -> Simulation:
    """Counts the tiles that windows touch, and so bounds what they can save; no array is made.

    A window saves what it leaves out only where it leaves out whole tiles: compare `bound_mean`
    with `flop_bound` for the strides and tiles in question.

    Args:
      grid: Size of the grid along each axis.
      window: See `js.masks.neighborhood`, as for what follows.
      stride: Queries that share a window.
      dilation: Distance between neighboring keys of a window.
      is_causal: Whether a query sees only keys up to its own.
      q_tile: Queries of a tile along each axis.
      kv_tile: Keys of a tile along each axis.
      from_window_start: Whether tiles of keys start where the window of a tile of queries does, as
        in kernels that gather them, instead of at multiples of their size.

    Differs from the paper:
      Its simulator is not released; whether it takes the mean over tiles of queries or the largest
      is not known, so there are both. Whether tiles are whole is found from the window of each
      query of an axis: its closed form overlooks some, and errs where a tile of keys does not
      divide one of queries.

    Raises:
      ValueError: if a number is out of range, or there are not as many as axes.
    """
    axes = axes_of(grid, window=window, stride=stride, dilation=dilation, is_causal=is_causal)
    visited, total, whole, pairs = np.ones(1, np.int64), 1, True, 1.0
    for axis, q_size, kv_size in zip(axes, q_tile, kv_tile, strict=True):
        _, counts = axis_tiles(axis, q_size, kv_size)
        if from_window_start:
            first, last = windows_of_tiles(axis, q_size)
            counts = np.maximum(last - first, -1) // kv_size + 1
        # a tile without queries is no tile
        visited = np.multiply.outer(visited, counts[counts > 0]).reshape(-1)
        total *= axis.dilation * -(-axis.length // (kv_size * axis.dilation))
        whole &= fully_block_sparse(axis, q_size, kv_size)
        pairs *= axis.window
    return Simulation(visited, total, whole, math.prod(grid) / pairs)


def gna(
    *,
    grid: Sequence[int] | None = None,
    window: int | Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    q_tile: Sequence[int] | None = None,
    kv_tile: Sequence[int] | None = None,
) -> Method:
    """Attends to a window of the grid along each axis, shared by groups of queries.

    Stride 1 is a sliding window, a stride of the window's size are blocks that do not overlap, and
    what lies between trades one for the other; `simulate` says which of them make whole tiles.
    Tokens are put in order tile by tile and back again. Tokens outside the grid, such as text that
    every query sees, go to `js.sparse_attention` as `extra_k` and `extra_v`.

    Arguments but the tiles are one number for all axes, or one for each.

    Args:
      grid: Size of the grid along each axis, tokens being row-major; default one axis, the whole
        sequence.
      window: Keys in the window, from 2 to `length // dilation`; default as many as there are.
      stride: Queries that share a window, from 1 to `window`; 1 in the paper unless it is tuned.
      dilation: Distance between neighboring keys of a window; 1 in the paper.
      is_causal: Whether a query sees only keys up to its own.
      q_tile: Queries of a tile along each axis; default (128,), (16, 8) or (4, 4, 8).
      kv_tile: Keys of a tile along each axis; default as for queries.

    Differs from the paper:
      Grid and window may be left out, and then are one axis and the whole of it. Dilated tokens are
      put in order with the others instead of along the batch. A caller's mask is obeyed, and tiles
      that it leaves nothing of are dropped. The tiles of each box are listed, where the authors'
      kernels count along its axes. One pair of tiles serves the gradient too, which sums in a fixed
      order; theirs has tiles of its own, and its sums meet in any order.

    Raises:
      ValueError: if a number is out of range, there are not as many as axes, or the tokens, or
        known positions, are not those of the grid.
    """
    local = Neighborhoods(
        grid,
        window,
        stride,
        dilation,
        is_causal,
        q_tile,
        kv_tile,
        default_tiles=((128,), (16, 8), (4, 4, 8)),
    )
    local.check()
    return Method(no_params, local.plan, local.attend)
