"""The tile list: which tiles of the attention map are computed exactly."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jsparse import _compat, checks
from jsparse.types.counts import counted
from jsparse.types.integers import as_int32
from jsparse.types.inverse_list import InverseList, invert
from jsparse.types.mask import TileGrid
from jsparse.types.pytree import array_field, carrying, pytree_dataclass, static_field


@pytree_dataclass
class BlockMask:
    """The tiles of a [q_len, kv_len] attention map that are computed, as lists per row of tiles.

    Entries `kv_indices[..., i, :kv_num_blocks[..., i]]` are ascending and unique; what follows is
    padding. The heads axis is 1 (shared by all), kv_heads (shared by a group) or heads. Everything
    but the sizes may be traced, so a list can depend on data under `jit`; its `width` is static,
    and `overflowed` says, per head, that some row needed more than that.

    A plan may carry its inverse, `turned`, for gradients in kernels and whoever asks for it: see
    `with_inverse`. A plan made from another by `dataclasses.replace` carries none.
    """

    kv_indices: Int[Array, "*batch list_heads q_blocks width"] = array_field(core_ndim=3)
    kv_num_blocks: Int[Array, "*batch list_heads q_blocks"] = array_field(core_ndim=2)
    overflowed: Bool[Array, "*batch list_heads"] = array_field(core_ndim=1)
    q_len: int = static_field()
    kv_len: int = static_field()
    block_q: int = static_field()
    block_kv: int = static_field()
    turned: InverseList | None = dataclasses.field(init=False, default=None)

    @classmethod
    def from_lists(
        cls,
        kv_indices: Int[Array, "*batch list_heads q_blocks width"],
        kv_num_blocks: Int[Array, "*batch list_heads q_blocks"],
        *,
        q_len: int,
        kv_len: int,
        block_q: int,
        block_kv: int,
        overflowed: Bool[Array, "*batch list_heads"] | None = None,
    ) -> "BlockMask":
        """Builds a plan from lists in any order.

        A tile listed twice counts once. Negative entries are padding wherever they stand, and so
        is what follows a row's count, whatever it holds.

        Args:
          kv_indices: The kv blocks of each row of tiles.
          kv_num_blocks: How many entries of each row count.
          q_len: Number of queries.
          kv_len: Number of keys.
          block_q: Queries per tile.
          block_kv: Keys per tile.
          overflowed: Lists that are known to lack tiles. Added to these are lists with a count
            above their width or, where they are traced, an entry past the last block.

        Raises:
          ValueError: if shapes or dtypes do not fit the lengths and tile sizes, or a concrete list
            has an entry past the last block.
        """
        grid = TileGrid(q_len, kv_len, block_q, block_kv)
        checks.tile_grid(grid)
        checks.block_lists(kv_indices, kv_num_blocks, grid)
        counts, lists = as_int32(kv_num_blocks), as_int32(kv_indices)
        width = lists.shape[-1]
        if width == 0:  # a list needs room for one entry to be read at all
            lists = jnp.zeros((*lists.shape[:-1], 1), jnp.int32)
        counted = jnp.arange(lists.shape[-1]) < jnp.minimum(counts, width)[..., None]
        outside = counted & (lists >= grid.kv_blocks)
        checks.blocks_exist(outside, lists, kv_indices, grid.kv_blocks)
        lost = ((counts > width) | outside.any(-1)).any(-1)
        overflowed = lost if overflowed is None else overflowed | lost
        lists, counts = _ascending_and_unique(lists, counted, grid.kv_blocks)
        return cls(lists, counts, overflowed, q_len, kv_len, block_q, block_kv)

    @classmethod
    def from_dense(
        cls,
        tiles: Bool[Array, "*batch list_heads q_blocks kv_blocks"],
        *,
        q_len: int,
        kv_len: int,
        block_q: int,
        block_kv: int,
        width: int | None = None,
    ) -> "BlockMask":
        """Builds a plan from one bool per tile.

        Args:
          tiles: True where a tile is computed.
          q_len: Number of queries.
          kv_len: Number of keys.
          block_q: Queries per tile.
          block_kv: Keys per tile.
          width: Entries that a row can hold. Default: the fullest row where `tiles` is concrete,
            all kv blocks where it is traced. Rows that need more lose their last tiles, and
            `overflowed` says so.
        """
        grid = TileGrid(q_len, kv_len, block_q, block_kv)
        checks.tile_grid(grid)
        checks.dense_tiles(tiles, grid)
        if width is None:
            if _compat.is_traced(tiles):
                width = grid.kv_blocks
            else:
                with _compat.at_once():
                    width = max(1, int(_fullest_row(tiles)))
        checks.positive(width=width)
        lists, counts, overflowed = _lists_of(tiles, min(width, grid.kv_blocks))
        return cls(lists, counts, overflowed, q_len, kv_len, block_q, block_kv)

    @property
    def grid(self) -> TileGrid:
        """The lengths and tile sizes."""
        return TileGrid(self.q_len, self.kv_len, self.block_q, self.block_kv)

    @property
    def width(self) -> int:
        """Entries that a row can hold."""
        return self.kv_indices.shape[-1]

    @property
    def list_heads(self) -> int:
        """How many lists there are per sequence: 1, kv_heads or heads."""
        return self.kv_indices.shape[-3]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The batch axes of the lists."""
        return self.kv_indices.shape[:-3]

    def entries(self) -> Bool[Array, "*batch list_heads q_blocks width"]:
        """True where an entry of `kv_indices` counts, False where it is padding.

        An entry outside [0, kv_blocks) is padding wherever it stands.
        """
        return _entries(self.kv_indices, self.kv_num_blocks, self.grid.kv_blocks)

    def without_missing_blocks(self) -> "BlockMask":
        """The plan as it counts: entries that name no block are padding, as if they were past it.

        Lists that have none such are only read.
        """

        @jax.custom_batching.sequential_vmap
        def cleaned(lists: Array, counts: Array) -> tuple[Array, Array]:
            # nothing else of the plan: what is closed over may not be mapped
            entries = _entries(lists, counts, self.grid.kv_blocks)
            counted = jnp.arange(self.width) < counts[..., None]
            clean = (counts <= self.width).all() & (entries == counted).all()
            return jax.lax.cond(
                clean,
                lambda: (lists, counts),
                lambda: _ascending_and_unique(lists, entries, self.grid.kv_blocks),
            )

        lists, counts = cleaned(self.kv_indices, self.kv_num_blocks)
        clean = dataclasses.replace(self, kv_indices=lists, kv_num_blocks=counts)
        # of lists that count as before
        return carrying(clean, turned=self.turned)

    @jax.jit
    def to_dense(self) -> Bool[Array, "*batch list_heads q_blocks kv_blocks"]:
        """One bool per tile, True where it is computed."""
        grid = self.grid
        shape = (*self.kv_num_blocks.shape, grid.kv_blocks)
        rows = int(np.prod(shape[:-1]))
        # padding goes to a column of its own, which is cut off
        columns = jnp.where(self.entries(), self.kv_indices, grid.kv_blocks)
        columns = columns.reshape(rows, self.width)
        tiles = jnp.zeros((rows, grid.kv_blocks + 1), bool)
        tiles = tiles.at[jnp.arange(rows)[:, None], columns].set(True)
        return tiles[:, :-1].reshape(shape)

    @jax.jit
    def density(self) -> Float[Array, "*batch list_heads"]:
        """The share of all tiles that is computed, per list."""
        # a mean, not a sum: the number of tiles may exceed an int32
        return self.kv_num_blocks.mean(-1, dtype=jnp.float32) / self.grid.kv_blocks

    def inverse(self) -> InverseList:
        """The lists turned round: per kv block the query blocks that use it."""
        return self._inverted() if self.turned is None else self.turned

    @jax.jit
    def _inverted(self) -> InverseList:
        lists = jnp.where(self.entries(), self.kv_indices, -1)
        found = invert(lists.reshape(-1, *lists.shape[-2:]), self.grid.kv_blocks)
        return jax.tree.map(lambda x: x.reshape(*lists.shape[:-2], -1), found)

    def with_inverse(self, inverse: InverseList | None = None) -> "BlockMask":
        """The same plan with its inverse, so that no gradient has to make it again.

        It pays where a plan serves several layers or steps. Kernels on GPUs use it.

        Args:
          inverse: What `inverse()` would give, if it is known; default that.
        """
        return carrying(self, turned=self.inverse() if inverse is None else inverse)

    def __or__(self, other: "BlockMask") -> "BlockMask":
        """The tiles that either plan computes."""
        left, right = _aligned(self, other)
        width = min(self.grid.kv_blocks, self.width + other.width)
        overflowed = left.overflowed | right.overflowed
        return self._from_tiles(left.to_dense() | right.to_dense(), width, overflowed)

    def __and__(self, other: "BlockMask") -> "BlockMask":
        """The tiles that both plans compute."""
        left, right = _aligned(self, other)
        overflowed = left.overflowed | right.overflowed
        width = min(self.width, other.width)
        return self._from_tiles(left.to_dense() & right.to_dense(), width, overflowed)

    def _from_tiles(self, tiles: Array, width: int, overflowed: Array) -> "BlockMask":
        plan = BlockMask.from_dense(tiles, **self.grid._asdict(), width=width)
        # what was lost before is still lost
        return dataclasses.replace(plan, overflowed=plan.overflowed | overflowed)

    def draw(self, *, max_columns: int = 64) -> str:
        """A picture in text, one panel per list: a full block is a computed tile.

        Where there are more tiles than `max_columns`, a character stands for several, its shade
        for how many of them are computed.
        """
        tiles = np.asarray(self.to_dense(), np.float32)
        step = -(-max(tiles.shape[-2:]) // max_columns)
        rows = -(-tiles.shape[-2] // step) * step
        columns = -(-tiles.shape[-1] // step) * step
        padded = np.full((int(np.prod(tiles.shape[:-2])), rows, columns), np.nan, np.float32)
        padded[:, : tiles.shape[-2], : tiles.shape[-1]] = tiles.reshape(-1, *tiles.shape[-2:])
        cells = padded.reshape(len(padded), rows // step, step, columns // step, step)
        shades = np.ceil(np.nanmean(cells, axis=(2, 4)) * 4).astype(int)
        panels = []
        for index, panel in zip(np.ndindex(tiles.shape[:-2]), shades, strict=True):
            title = ", ".join(map(str, index))
            lines = ["".join("·░▒▓█"[shade] for shade in row) for row in panel]
            panels.append("\n".join([f"[{title}]", *lines]))
        return "\n\n".join(panels)


def _aligned(left: BlockMask, right: BlockMask) -> tuple[BlockMask, BlockMask]:
    """Two plans with a list for each head that either tells apart."""
    checks.same_grid(left.grid, right.grid)
    heads = max(left.list_heads, right.list_heads)
    checks.multiple(of=left.list_heads, list_heads=heads)
    checks.multiple(of=right.list_heads, list_heads=heads)

    def repeated(plan: BlockMask) -> BlockMask:
        times = heads // plan.list_heads
        return dataclasses.replace(
            plan,
            kv_indices=jnp.repeat(plan.kv_indices, times, axis=-3),
            kv_num_blocks=jnp.repeat(plan.kv_num_blocks, times, axis=-2),
            overflowed=jnp.repeat(plan.overflowed, times, axis=-1),
        )

    return repeated(left), repeated(right)


@functools.partial(jax.jit, static_argnums=2)
def _entries(lists: Array, counts: Array, kv_blocks: int) -> Bool[Array, "... width"]:
    exists = (lists >= 0) & (lists < kv_blocks)
    return exists & (jnp.arange(lists.shape[-1]) < counts[..., None])


@functools.partial(jax.jit, static_argnums=2)
def _ascending_and_unique(lists: Array, counted: Array, kv_blocks: int) -> tuple[Array, Array]:
    """Sorts each row, drops what does not count, and says how many entries are left."""
    # what is dropped sorts last
    lists = jnp.sort(jnp.where(counted & (lists >= 0), lists, kv_blocks), axis=-1)
    repeats = jnp.concatenate(
        [jnp.zeros_like(counted[..., :1]), lists[..., 1:] == lists[..., :-1]], -1
    )
    lists = jnp.sort(jnp.where(repeats, kv_blocks, lists), axis=-1)
    counts = (lists < kv_blocks).sum(-1, dtype=jnp.int32)
    return jnp.where(lists < kv_blocks, lists, 0), counts


@jax.jit
def _fullest_row(tiles: Array) -> Array:
    return tiles.sum(-1, dtype=jnp.int32).max(initial=0)


@functools.partial(jax.jit, static_argnums=1)
def _lists_of(tiles: Array, width: int) -> tuple[Array, Array, Array]:
    """Lists, their counts, and whether they lack tiles."""
    counts = tiles.sum(-1, dtype=jnp.int32)
    overflowed = (counts > width).any(-1)
    return dense_to_lists(tiles, width), jnp.minimum(counts, width), overflowed


def parts_of(plan: BlockMask | Sequence[BlockMask]) -> tuple[BlockMask, ...]:
    """The tile lists of a plan, which is one of them or a tuple that is executed in parts."""
    return (plan,) if isinstance(plan, BlockMask) else tuple(plan)


def dense_to_lists(tiles: Array, width: int) -> Int[Array, "... width"]:
    """Positions of the first `width` True entries of each row, ascending, zero-padded."""
    size = tiles.shape[-1]
    position = counted(tiles) - 1
    # entries past the width and False ones go to a slot of their own, which is cut off
    slot = jnp.where(tiles & (position < width), position, width)
    flat = slot.reshape(-1, size)
    lists = jnp.zeros((flat.shape[0], width + 1), jnp.int32)
    columns = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), flat.shape)
    lists = lists.at[jnp.arange(flat.shape[0])[:, None], slot.reshape(-1, size)].set(columns)
    return lists[:, :width].reshape(*tiles.shape[:-1], width)
