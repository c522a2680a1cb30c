"""BiFormer: regions of a picture routed to regions. Zhu et al. 2023, arXiv:2303.08810."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jsparse import checks
from jsparse.attention.attend import attend
from jsparse.attention.logits import ScoreMod
from jsparse.attention.planned import no_params
from jsparse.core import blocks, pooling, reordering, selection
from jsparse.core.token_tiles import TokenTiles
from jsparse.masks.reordered import reordered
from jsparse.masks.segments import segments
from jsparse.types import BlockMask, Mask, Method, TileGrid


class BiFormerInfo(NamedTuple):
    """Affinities of regions, and which token stands where in the plan; None where all stay.

    Places that were added to fill regions at the borders repeat a token.
    """

    affinity: Float[Array, "*batch list_heads regions regions"]
    q_order: Int[Array, "1 q_len"] | None
    kv_order: Int[Array, "1 kv_len"] | None


class Regions(NamedTuple):
    """Tokens of a grid, region by region.

    Attributes:
      order: Where tokens stand.
      size: Places per region; the last region of one axis may have fewer.
    """

    order: TokenTiles
    size: int

    @classmethod
    def of(cls, grid: Sequence[int], regions: int) -> "Regions":
        """So many regions along each axis, or as many as leave none empty."""
        tile = tuple(-(-length // regions) for length in grid)
        if len(grid) == 1:
            return cls(TokenTiles.row_major(tuple(grid)), *tile)
        return cls(TokenTiles(tuple(grid), tile, (1,) * len(grid)), math.prod(tile))

    @property
    def tiles(self) -> TileGrid:
        """The map of regions."""
        return TileGrid(self.order.length, self.order.length, self.size, self.size)

    @property
    def exists(self) -> np.ndarray:
        """Which places have a token of their own, and not one that fills a region up."""
        places = self.order.coordinates(np.arange(self.order.length))
        inside = [at < n for (_, at), n in zip(places, self.order.shape, strict=True)]
        return np.logical_and.reduce(inside)

    def mean(self, x: Float[Array, "*batch tokens heads dim"]) -> Float[Array, "..."]:
        """The mean of each region's tokens, in f32."""
        count = pooling.sum_blocks(jnp.asarray(self.exists, jnp.float32)[:, None, None], self.size)
        return pooling.sum_blocks(self.order.permute(x), self.size) / count

    def mask(self, given: Mask | None) -> Mask | None:
        """A mask of tokens in their places, and of places without a token."""
        if not self.order.moves:
            return given
        tokens, own = math.prod(self.order.shape), None
        if self.order.length > tokens:
            own = segments(jnp.where(jnp.asarray(self.exists), 0, -1))
        if given is None:
            return own
        checks.mask_type(given)
        order = self.order.order()
        given = reordered(
            given, heads=given.heads, q_order=order, kv_order=order, lengths=(tokens, tokens)
        )
        return given if own is None else given & own


def region_affinity(
    q: Float[Array, "*batch tokens heads dim"],
    k: Float[Array, "*batch tokens kv_heads dim"],
    regions: Regions,
    *,
    per_head: bool = False,
) -> Float[Array, "*batch list_heads regions regions"]:
    """Products of the mean query of each region with the mean key of each.

    Heads are added up, so that all route alike; the scale of logits would change no ranking.
    Nothing has a gradient.

    Args:
      q: Queries in their places.
      k: Keys in their places.
      regions: What means are over: the tokens that a region has.
      per_head: Whether each query head has a map of its own.
    """
    q, k = (regions.mean(jax.lax.stop_gradient(x)) for x in (q, k))
    group = q.shape[-2] // k.shape[-2]
    q = q.reshape(*q.shape[:-2], -1, group, q.shape[-1])
    if not per_head:
        return jnp.einsum("...qkgd,...skd->...qs", q, k)[..., None, :, :]
    found = jnp.einsum("...qkgd,...skd->...kgqs", q, k)
    return found.reshape(*found.shape[:-4], -1, *found.shape[-2:])


def biformer(
    *,
    grid: Sequence[int] | None = None,
    regions: int = 7,
    top_k: int | None = 4,
    per_head: bool = False,
) -> Method:
    """Attends from each region of the grid to the regions whose mean keys its mean query points at.

    Tokens are put in order region by region and back again. The default scale of logits is the
    paper's, `(heads * dim) ** -0.5`, the width of all query heads together. `js.nn.BiFormerBlock`
    is the whole block of the authors' backbones.

    Args:
      grid: Size of the grid along each axis, tokens being row-major; default one axis, the whole
        sequence.
      regions: Regions along each axis, at most: they are `ceil(length / regions)` long, so 7 of a
        length of 8 are 4. 7 in the paper, for lengths that it divides.
      top_k: Regions that each attends to; 1, 4 and 16 in the paper's first three stages. None for
        all, as in its last one: then nothing is routed, and the grid is one region.
      per_head: Whether each query head routes by itself; all route together in the paper.

    Differs from the paper:
      Where regions do not fill the grid, its last ones are smaller and what is missing is hidden;
      the authors' two implementations let it take part. A caller's mask is obeyed: regions that it
      hides are not chosen. Ties go to the lower region. Of the authors' options, which no released
      model has on, there is neither the pooling of keys and values inside regions, nor routing with
      parameters, nor the weighting of chosen regions by their affinity.

    Raises:
      ValueError: if a number is not positive, or the tokens, by their number or by known positions,
        are not those of the grid.
    """
    checks.positive(regions=regions)
    if top_k is None:
        regions = top_k = 1
    checks.positive(top_k=top_k)
    for length in grid or ():
        checks.positive(grid=length)

    def laid_out(q, k):
        checks.whole_grid(grid, q.shape[-3], k.shape[-3])
        return Regions.of((q.shape[-3],) if grid is None else grid, regions)

    def route(q, k, positions, mask):
        layout = laid_out(q, k)
        checks.positions_of_a_grid(positions, q.shape[-3])
        affinity = region_affinity(q, k, layout, per_head=per_head)
        own = layout.mask(mask)
        heads = affinity.shape[-3] if own is None else max(affinity.shape[-3], own.heads)
        visible, _ = blocks.candidates(own, layout.tiles, q.shape[:-3], heads)
        keep = selection.top_k(jnp.broadcast_to(affinity, visible.shape), top_k, visible=visible)
        width = min(top_k, layout.tiles.kv_blocks)
        tiles = BlockMask.from_dense(keep, **layout.tiles._asdict(), width=width)
        order = layout.order.order() if layout.order.moves else None
        return tiles, BiFormerInfo(affinity, order, order)

    def plan(params, q, k, *, v=None, x=None, positions=None, mask=None, state=None, key=None):
        return route(q, k, positions, mask)

    def attend_to_regions(
        params: Any,
        q: Any,
        k: Any,
        v: Any,
        *,
        x: Any = None,
        positions: Any = None,
        mask: Any = None,
        state: Any = None,
        key: Any = None,
        bias: Any = None,
        score_mod: Any = None,
        scale: Any = None,
        return_lse: bool = False,
        **options: Any,
    ) -> tuple[Any, Any]:
        tiles, info = route(q, k, positions, mask)
        scale = (q.shape[-2] * q.shape[-1]) ** -0.5 if scale is None else scale
        layout = laid_out(q, k)
        order = layout.order
        if bias is not None:
            checks.bias_array(bias)
            full = (*q.shape[:-3], q.shape[-2], q.shape[-3], k.shape[-3])
            bias = bias.reshape((1,) * (2 - bias.ndim) + bias.shape)
            checks.broadcasts("bias", bias.shape, full)
            for axis in (-2, -1):
                bias = reordering.reorder_pairs(bias, info.q_order, axis, q.shape[-2])
        if score_mod is not None:
            score_mod = _of_places(order, score_mod)
        q, k, v = (order.permute(y) for y in (q, k, v))
        options |= {"bias": bias, "score_mod": score_mod, "scale": scale}
        options["mask"] = layout.mask(mask)
        out, lse = attend(q, k, v, tiles, return_lse=True, **options)
        out = order.restore(out)
        if return_lse:
            rows = order.restore(jnp.swapaxes(lse, -1, -2)[..., None])
            out = out, jnp.swapaxes(rows[..., 0], -1, -2)
        return out, info

    return Method(no_params, plan, attend_to_regions)


def _of_places(order: TokenTiles, score_mod: ScoreMod) -> ScoreMod:
    """A change to logits that is told where tokens stood."""

    def told(logit, batch, head, q_index, kv_index):
        return score_mod(logit, batch, head, order.original(q_index), order.original(kv_index))

    return told
