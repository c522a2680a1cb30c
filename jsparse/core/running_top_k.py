"""The best columns of every row, of scores that are never all there.

Scores come a tile at a time, and of each row no more is kept than its best so far. The rules are
those of `selection.top_k`, and so is the result.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jsparse import _compat, checks
from jsparse.core.largest import largest
from jsparse.types import BlockMask, TileGrid
from jsparse.types.block_mask import dense_to_lists
from jsparse.types.pytree import entry, flatten_batch
from pallas_kernels.sortable import NOTHING, numbers_of, sortable


class TileScores(NamedTuple):
    """What is known of the columns of a tile, row by row; higher scores are better.

    `forced` columns, where they are visible, outrank all scores; None forces nothing.
    """

    scores: Float[Array, "block_q block_kv"]
    visible: Bool[Array, "block_q block_kv"]
    forced: Bool[Array, "block_q block_kv"] | None = None


class Best(NamedTuple):
    """The chosen columns of each row, ascending; -1 and -inf follow what counts."""

    indices: Int[Array, "batch heads rows width"]
    counts: Int[Array, "batch heads rows"]
    scores: Float[Array, "batch heads rows width"]

    @classmethod
    def of(
        cls,
        indices: Int[Array, "batch heads rows width"],
        keys: Int[Array, "batch heads rows width"],
    ) -> "Best":
        """Those of `sortable` scores; -1 where there is none, which follow what counts."""
        counts = (indices >= 0).sum(-1, dtype=jnp.int32)
        return cls(indices, counts, jnp.where(indices < 0, -jnp.inf, numbers_of(keys)))

    @classmethod
    def unordered(
        cls,
        columns: Int[Array, "batch heads rows width"],
        keys: Int[Array, "batch heads rows width"],
    ) -> "Best":
        """The same of columns in any order, where what has the key `NOTHING` is none."""
        columns = jnp.where(keys > NOTHING, columns, _LAST)
        columns, keys = jax.lax.sort((columns, keys), num_keys=1)
        return cls.of(jnp.where(columns < _LAST, columns, -1), keys)


# (batch, head, q_tile, kv_tile), all scalars, to what is known of that tile
ScoreOfTile = Callable[[Array, Array, Array, Array], TileScores]


def running_top_k(
    score: ScoreOfTile,
    k: int,
    grid: TileGrid,
    *,
    batches: int = 1,
    heads: int = 1,
    tiles: BlockMask | None = None,
) -> Best:
    """Chooses the `k` best columns of each row; forced ones come first and count inside `k`.

    Memory is that of the result and of one tile; time that of the tiles that are listed. What is
    not visible is never chosen, even where fewer than `k` columns are; ties go to the lower column;
    a NaN outranks every number. Nothing has a gradient.

    Args:
      score: `score(batch, head, q_tile, kv_tile)`, on scalars, gives the scores of a tile of the
        grid. Rows and columns past the last ones are asked about too; what is said of them does not
        count.
      k: How many, at least 1.
      grid: Rows and columns, and how many of each make a tile.
      batches: Sequences.
      heads: Heads, or groups of heads that choose together.
      tiles: Which tiles have something visible, in lists over this grid; default all.

    Raises:
      ValueError: if `k` is not positive, or the lists are of another grid.
    """
    checks.positive(k=k)
    checks.tile_grid(grid)
    k = min(k, grid.kv_len)
    if tiles is not None:
        checks.same_grid(tiles.grid, grid)
        checks.multiple(of=tiles.list_heads, heads=heads)
        tiles = flatten_batch(tiles, (batches,))
    # whether anything is forced is known before anything is computed
    number = jax.ShapeDtypeStruct((), jnp.int32)
    forced = jax.eval_shape(score, *[number] * 4).forced is not None

    def one_row(index):
        rest, q_tile = jnp.divmod(index, grid.q_blocks)
        batch, head = jnp.divmod(rest, heads)
        if tiles is None:
            order, count = jnp.arange(grid.kv_blocks, dtype=jnp.int32), grid.kv_blocks
        else:
            row = entry(len(tiles.kv_indices), batch), head // (heads // tiles.list_heads), q_tile
            order, count = tiles.kv_indices[row], tiles.kv_num_blocks[row]

        def one_tile(number, known):
            kv_tile = order[number]
            column = kv_tile * grid.block_kv + jnp.arange(grid.block_kv, dtype=jnp.int32)
            found = jax.lax.stop_gradient(score(batch, head, q_tile, kv_tile))
            seen = found.visible & (column < grid.kv_len)
            first = found.forced
            ranks = (seen,) if first is None else (seen & first, seen & ~first)
            keys = sortable(found.scores.astype(jnp.float32))
            return tuple(
                kept.add(_Kept.of(keys, column, rank))
                for kept, rank in zip(known, ranks, strict=True)
            )

        zeros = jnp.zeros((grid.block_q, k), jnp.int32)
        nothing = _Kept.of(zeros, zeros, jnp.zeros((), bool))
        known = _compat.fori_loop(0, count, one_tile, (nothing, nothing) if forced else (nothing,))
        return known[0].before(known[1]) if forced else known[0]

    rows = jnp.arange(batches * heads * grid.q_blocks, dtype=jnp.int32)
    found = jax.lax.map(one_row, rows)
    keys, indices = (x.reshape(batches, heads, -1, k)[:, :, : grid.q_len] for x in found)
    return Best.of(indices, keys)


_LAST = 2**31 - 1  # above every column, and every score


class _Kept(NamedTuple):
    """Keys of some columns of each row, these ascending; -1 where there is none."""

    keys: Int[Array, "rows width"]
    columns: Int[Array, "rows width"]

    @classmethod
    def of(cls, keys: Array, columns: Array, chosen: Array) -> "_Kept":
        """Those that are chosen; the others take up room."""
        columns = jnp.broadcast_to(columns, keys.shape)
        return cls(jnp.where(chosen, keys, NOTHING), jnp.where(chosen, columns, -1))

    def add(self, higher: "_Kept") -> "_Kept":
        """The best of these and of others in higher columns, as many as there is room for here."""
        width = self.keys.shape[1]
        both = [jnp.concatenate(pair, axis=1) for pair in zip(self, higher, strict=True)]
        best = largest(both[0], width)
        place = dense_to_lists(best, width)
        keys, columns = (jnp.take_along_axis(x, place, axis=1) for x in both)
        return _Kept.of(keys, columns, jnp.arange(width) < best.sum(1, keepdims=True))

    def before(self, others: "_Kept") -> "_Kept":
        """All of these and the best of others, as many as there is room for here."""
        room = (self.columns < 0).sum(1, keepdims=True)
        others = _Kept.of(*others, largest(others.keys, room))
        columns, keys = (
            jnp.concatenate([getattr(x, name) for x in (self, others)], axis=1)
            for name in ("columns", "keys")
        )
        # what takes up room goes to the end
        columns = jnp.where(columns < 0, _LAST, columns)
        sorted_by_column = jax.lax.sort((columns, keys), num_keys=1)
        columns, keys = (x[:, : self.keys.shape[1]] for x in sorted_by_column)
        return _Kept.of(keys, columns, columns < _LAST)
