"""Attention in neighborhoods: tokens by tiles of the grid, and a box of key tiles for each."""

import functools
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
from jsparse.core.tiling import restrict
from jsparse.core.token_tiles import TokenTiles
from jsparse.masks.neighborhood import Axis, Neighborhood, axes_of, for_each_axis
from jsparse.masks.reordered import reordered
from jsparse.types import BlockMask, Mask


class NeighborhoodInfo(NamedTuple):
    """Which token stands where in the plan, as a count from the first; None where all stay.

    Places that were added to fill whole tiles repeat a token.
    """

    q_order: Int[Array, "1 q_len"] | None
    kv_order: Int[Array, "1 kv_len"] | None


class AxisTiles(NamedTuple):
    """Along one axis, the tiles of keys that each tile of queries needs: `count` from `first` on.

    No tiles where a tile of queries holds none.
    """

    first: Int[np.ndarray, "residues q_tiles"]
    count: Int[np.ndarray, "residues q_tiles"]


def axis_tiles(axis: Axis, q_tile: int, kv_tile: int) -> AxisTiles:
    """The tiles of keys that tiles of queries need along an axis, one row per residue."""
    first, last = windows_of_tiles(axis, q_tile)
    count = last // kv_tile - first // kv_tile + 1
    return AxisTiles(first // kv_tile, np.where(first > last, 0, count))


def windows_of_tiles(
    axis: Axis, q_tile: int
) -> tuple[Int[np.ndarray, "residues q_tiles"], Int[np.ndarray, "residues q_tiles"]]:
    """First and last key that each tile of queries needs; for one without queries none."""
    tiles = -(-axis.length // (q_tile * axis.dilation))
    q_first = np.arange(tiles) * q_tile
    length = axis.class_length(np.arange(axis.dilation)[:, None])
    first, _ = axis.window_of(q_first, length)
    _, last = axis.window_of(q_first + q_tile - 1, length)
    return first, np.where(q_first < length, last, -1)


def fully_block_sparse(axis: Axis, q_tile: int, kv_tile: int) -> bool:
    """Whether along an axis every tile of keys is seen by all of a tile of queries, or by none."""
    for residue in {0, axis.dilation - 1}:  # the longest class and the shortest
        length = axis.class_length(residue)
        position = np.arange(length)
        first, last = axis.window_of(position, length)
        tile_first = position // q_tile * q_tile
        shared = (first == first[tile_first]) & (last == last[tile_first])
        aligned = (first % kv_tile == 0) & ((last == length - 1) | ((last + 1) % kv_tile == 0))
        if not (shared & aligned).all():
            return False
    return True


class Layout(NamedTuple):
    """The rule of every axis, the order of the tokens, and the tiles that blocks of them are."""

    axes: tuple[Axis, ...]
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    q_order: TokenTiles
    kv_order: TokenTiles

    @property
    def hides_in_tiles(self) -> bool:
        """Whether some tile is seen in part, so that attention needs the mask."""
        sizes = zip(self.axes, self.q_tile, self.kv_tile, strict=True)
        whole = all(fully_block_sparse(*of_axis) for of_axis in sizes)
        return not whole or self._has_places_without_keys

    @property
    def _has_places_without_keys(self) -> bool:
        return self.kv_order.length > math.prod(self.kv_order.shape)

    def info(self) -> NeighborhoodInfo:
        """The orders as arrays."""
        orders = self.q_order, self.kv_order
        return NeighborhoodInfo(*(order.order() if order.moves else None for order in orders))

    def mask(self, given: Mask | None) -> Mask | None:
        """What is hidden inside listed tiles: by the windows, and by a mask of tokens in place."""
        if given is not None:
            checks.mask_type(given)
            q_order, kv_order = self.info()
            if q_order is not None or kv_order is not None:
                tokens = math.prod(self.q_order.shape)
                given = reordered(
                    given,
                    heads=given.heads,
                    q_order=q_order,
                    kv_order=kv_order,
                    lengths=(tokens, tokens),
                )
        if not self.hides_in_tiles:
            return given
        own = Neighborhood.of(self.axes, self.q_order, self.kv_order)
        return own if given is None else given & own

    @functools.partial(jax.jit, static_argnums=0)
    def plan(self) -> BlockMask:
        """The tiles that windows touch: of each tile of queries a box, which is listed as it is."""
        sizes = zip(self.axes, self.q_tile, self.kv_tile, strict=True)
        boxes = [axis_tiles(*of_axis) for of_axis in sizes]
        dilation = tuple(axis.dilation for axis in self.axes)
        q_tiles = [box.first.shape[1] for box in boxes]
        q_blocks = math.prod(dilation) * math.prod(q_tiles)
        digits = np.unravel_index(np.arange(q_blocks), (*dilation, *q_tiles))
        residues, tiles = digits[: len(boxes)], digits[len(boxes) :]
        of_block = list(zip(boxes, residues, tiles, strict=True))
        firsts = [box.first[residue, tile] for box, residue, tile in of_block]
        counts = [box.count[residue, tile] for box, residue, tile in of_block]
        totals = np.prod(counts, axis=0)
        # the number of an entry, axis by axis from the last, in a box that is row-major
        entry = rest = jnp.arange(max(1, totals.max()), dtype=jnp.int32)
        kv_block, weight = jnp.zeros((q_blocks, 1), jnp.int32), 1
        for axis, size, first, count in reversed(
            list(zip(self.axes, self.kv_tile, firsts, counts, strict=True))
        ):
            rest, place = jnp.divmod(rest, np.maximum(count, 1)[:, None].astype(np.int32))
            kv_block += (place + first[:, None].astype(np.int32)) * weight
            weight *= -(-axis.length // (size * axis.dilation))
        residue = np.ravel_multi_index(residues, dilation).astype(np.int32)
        kv_block += residue[:, None] * weight
        listed = entry < totals[:, None]
        return BlockMask(
            jnp.where(listed, kv_block, 0)[None],
            jnp.asarray(totals, jnp.int32)[None],
            jnp.zeros(1, bool),
            self.q_order.length,
            self.kv_order.length,
            math.prod(self.q_tile),
            math.prod(self.kv_tile),
        )

    def bias(self, bias: Array | None) -> Array | None:
        """A bias of tokens in place, in the order of the plan."""
        if bias is None:
            return None
        checks.bias_array(bias)
        bias = bias.reshape((1,) * (2 - bias.ndim) + bias.shape)
        for axis, order in zip((-2, -1), self.info(), strict=True):
            if order is not None and bias.shape[axis] > 1:
                bias = jnp.take(bias, order[0], axis=axis)
        return bias

    def score_mod(self, score_mod: ScoreMod | None) -> ScoreMod | None:
        """The same of a change to logits."""
        if score_mod is None:
            return None

        def reordered_mod(logit, batch, head, q_index, kv_index):
            q_index, kv_index = self.q_order.original(q_index), self.kv_order.original(kv_index)
            return score_mod(logit, batch, head, q_index, kv_index)

        return reordered_mod


class Neighborhoods(NamedTuple):
    """A method's `plan` and `attend` for windows on a grid; None stands for all there are.

    `default_tiles` are for grids of one, two and three axes.
    """

    grid: Sequence[int] | None
    window: int | Sequence[int] | None
    stride: int | Sequence[int]
    dilation: int | Sequence[int]
    is_causal: bool | Sequence[bool]
    q_tile: Sequence[int] | None
    kv_tile: Sequence[int] | None
    default_tiles: tuple[tuple[int, ...], ...]

    def check(self) -> None:
        """Says what is wrong before there are tokens.

        Raises:
          ValueError: if a number is out of range, or there are not as many as axes.
        """
        numbers = {
            name: getattr(self, name)
            for name in ("window", "stride", "dilation", "is_causal", "q_tile", "kv_tile")
        }
        checks.axes_need_a_grid(self.grid, **numbers)
        # where the length is not known yet, no window is too long
        self._layout((_ANY_LENGTH,) if self.grid is None else self.grid)

    def layout(self, q_len: int, kv_len: int, positions: Any) -> Layout:
        """How these tokens are laid out."""
        checks.whole_grid(self.grid, q_len, kv_len)
        checks.positions_of_a_grid(positions, q_len)
        return self._layout((q_len,) if self.grid is None else self.grid)

    def _layout(self, grid: Sequence[int]) -> Layout:
        axes = axes_of(
            grid,
            window=self.window,
            stride=self.stride,
            dilation=self.dilation,
            is_causal=self.is_causal,
        )
        q_tile = self._tile(grid, q_tile=self.q_tile)
        kv_tile = self._tile(grid, kv_tile=self.kv_tile)
        shape, dilation = tuple(grid), tuple(axis.dilation for axis in axes)
        if all(axis.sees_all for axis in axes):
            # then it does not matter what a tile holds
            shape, dilation = (math.prod(shape),), (1,)
            axes = (Axis(*shape, window=shape[0]),)
            q_tile, kv_tile = (math.prod(q_tile),), (math.prod(kv_tile),)
        if dilation == (1,):
            order = TokenTiles.row_major(shape)
            return Layout(axes, q_tile, kv_tile, order, order)
        orders = (TokenTiles(shape, tile, dilation) for tile in (q_tile, kv_tile))
        return Layout(axes, q_tile, kv_tile, *orders)

    def _tile(self, grid: Sequence[int], **given: Any) -> tuple[int, ...]:
        ((name, tile),) = given.items()
        if tile is None:
            checks.default_tile(name, grid, len(self.default_tiles))
            return self.default_tiles[len(grid) - 1]
        sizes = for_each_axis(tuple(tile), grid, name)
        for size in sizes:
            checks.positive(**{name: size})
        return sizes

    def plan(
        self,
        params: Any,
        q: Any,
        k: Any,
        *,
        v: Any = None,
        x: Any = None,
        positions: Any = None,
        mask: Mask | None = None,
        state: Any = None,
        key: Any = None,
    ) -> tuple[BlockMask, NeighborhoodInfo]:
        """The tiles, of tokens in the order that the info names."""
        layout = self.layout(q.shape[-3], k.shape[-3], positions)
        return self._restricted(layout, mask), layout.info()

    def _restricted(self, layout: Layout, mask: Mask | None) -> BlockMask:
        plan = layout.plan()
        whole = None if mask is None else layout.mask(mask)
        return plan if whole is None else restrict(plan, whole)

    def attend(
        self,
        params: Any,
        q: Float[Array, "*batch tokens heads dim"],
        k: Float[Array, "*batch kv_tokens kv_heads dim"],
        v: Float[Array, "*batch kv_tokens kv_heads v_dim"],
        *,
        x: Any = None,
        positions: Any = None,
        mask: Mask | None = None,
        state: Any = None,
        key: Any = None,
        bias: Any = None,
        score_mod: Any = None,
        sinks: Any = None,
        softcap: Any = None,
        scale: Any = None,
        return_lse: bool = False,
        implementation: str | None = None,
    ) -> tuple[Any, NeighborhoodInfo]:
        """Attention in the plan's order; the result is in that of the tokens."""
        layout = self.layout(q.shape[-3], k.shape[-3], positions)
        out, lse = attend(
            layout.q_order.permute(q),
            layout.kv_order.permute(k),
            layout.kv_order.permute(v),
            self._restricted(layout, mask),
            mask=layout.mask(mask),
            bias=layout.bias(bias),
            score_mod=layout.score_mod(score_mod),
            sinks=sinks,
            softcap=softcap,
            scale=scale,
            return_lse=True,
            implementation=implementation,
        )
        out = layout.q_order.restore(out)
        if return_lse:
            columns = layout.q_order.restore(jnp.swapaxes(lse, -1, -2)[..., None])
            out = out, jnp.swapaxes(columns[..., 0], -1, -2)
        return out, layout.info()


_ANY_LENGTH = 2**30
