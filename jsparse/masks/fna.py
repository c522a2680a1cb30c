"""FNA: each token attends to its neighbors on a grid. Hassani et al. 2024, arXiv:2403.04690."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from jsparse import checks
from jsparse.attention.logits import ScoreMod
from jsparse.attention.planned import no_params
from jsparse.masks.neighborhood import for_each_axis
from jsparse.masks.neighborhood_attention import Neighborhoods
from jsparse.types import Method


def relative_bias(
    table: Float[Array, "heads ..."],
    *,
    grid: Sequence[int],
    dilation: int | Sequence[int] = 1,
) -> ScoreMod:
    """A `score_mod` that adds what a table holds of a head and of where a key lies from its query.

    Offsets of neighbors are from -1 to 1 whatever the dilation. Near borders the query is not in
    the middle of its window, so that offsets of a window of w keys are from `1 - w` to `w - 1`.

    Args:
      table: Per query head, for each axis of the grid `2 * window - 1` offsets, ascending.
      grid: Size of the grid along each axis, as for `js.fna`.
      dilation: Distance between neighboring keys of a window.

    Raises:
      ValueError: if the table does not have an odd number of offsets for each axis of the grid.
    """
    grid, apart = tuple(grid), for_each_axis(dilation, grid, "dilation")
    checks.offsets_of_axes(table.shape, grid)

    def score_mod(logit, batch, head, q_index, kv_index):
        at = []
        for length, size, step in reversed([*zip(grid, table.shape[1:], apart, strict=True)]):
            (q_index, query), (kv_index, key) = (
                jnp.divmod(index, length) for index in (q_index, kv_index)
            )
            at.append(key // step - query // step + size // 2)
        # what is outside of every window is hidden, whatever is added
        return logit + table.at[(head, *at[::-1])].get(mode="clip")

    return score_mod


def fna(
    *,
    grid: Sequence[int] | None = None,
    window: int | Sequence[int] | None = None,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    q_tile: Sequence[int] | None = None,
    kv_tile: Sequence[int] | None = None,
) -> Method:
    """Attends to the nearest tokens of the grid along each axis.

    Windows are shifted inside at borders, so that each holds as many keys as any other; on causal
    axes they are cut instead. Models are trained with it.

    Arguments but the tiles are one number for all axes, or one for each.

    Args:
      grid: Size of the grid along each axis, tokens being row-major; default one axis, the whole
        sequence.
      window: Keys in the window, from 2 to `length // dilation`; of an even number one more lies
        to the left. Default as many as there are.
      dilation: Distance between neighboring keys of a window; 1 in the paper.
      is_causal: Whether a query sees only keys up to its own.
      q_tile: Queries of a tile along each axis; default (64,), (8, 8) or (4, 4, 4).
      kv_tile: Keys of a tile along each axis; default as for queries.

    Differs from the paper:
      Tiles of keys lie at multiples of their size, in tokens that were put in order tile by tile,
      instead of starting at each window. Even windows, which came later. Grid and window may be
      left out, and then are one axis and the whole of it. The table of relative position biases,
      which its fused kernel lacks, is no argument: `relative_bias` makes it the `score_mod` of
      `js.sparse_attention`, on causal axes too. One pair of tiles serves the gradient as well, of
      which sums are in a fixed order. There is no form that returns the weights.

    Raises:
      ValueError: if a number is out of range, there are not as many as axes, or the tokens, or
        known positions, are not those of the grid.
    """
    local = Neighborhoods(
        grid,
        window,
        1,
        dilation,
        is_causal,
        q_tile,
        kv_tile,
        default_tiles=((64,), (8, 8), (4, 4, 4)),
    )
    local.check()
    return Method(no_params, local.plan, local.attend)
