"""FNA: each token attends to its neighbors on a grid. Hassani et al. 2024, arXiv:2403.04690."""

from collections.abc import Sequence

from jsparse.attention.planned import no_params
from jsparse.masks.neighborhood_attention import Neighborhoods
from jsparse.types import Method


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
      instead of starting at each window. Even windows, which came later. A window may be left out.
      The table of relative position biases, which its fused kernel lacks as well, is a `bias` of
      `js.attend`.

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
