"""The best columns of every row, of scores that are never all there.

Scores come a tile at a time, and of each row no more is kept than its best so far. The rules are
those of `selection.top_k`, and so is the result.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jsparse import checks
from jsparse.types import BlockMask, TileGrid
from jsparse.types.pytree import entry, flatten_batch


class TileScores(NamedTuple):
    """What is known of the columns of a tile, row by row; higher scores are better.

    `forced` columns, where they are visible, outrank all scores; None forces nothing.
    """

    scores: Float[Array, "block_q block_kv"]
    visible: Bool[Array, "block_q block_kv"]
    forced: Bool[Array, "block_q block_kv"] | None = None


class Best(NamedTuple):
    """The chosen columns of each row, the best first; what follows a row's count is -1 and -inf."""

    indices: Int[Array, "batch heads rows width"]
    counts: Int[Array, "batch heads rows"]
    scores: Float[Array, "batch heads rows width"]


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
    a NaN outranks every number, and -inf counts as the lowest finite one. Nothing has a gradient.

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
    shape = grid.block_q, k
    # whether anything is forced is known before anything is computed
    number = jax.ShapeDtypeStruct((), jnp.int32)
    ranks = 1 if jax.eval_shape(score, *[number] * 4).forced is None else 2

    def one_row(index):
        rest, q_tile = jnp.divmod(index, grid.q_blocks)
        batch, head = jnp.divmod(rest, heads)
        if tiles is None:
            order, count = jnp.arange(grid.kv_blocks), grid.kv_blocks
        else:
            row = entry(len(tiles.kv_indices), batch), head // (heads // tiles.list_heads), q_tile
            order, count = tiles.kv_indices[row], tiles.kv_num_blocks[row]

        def one_tile(number, known):
            kv_tile = order[number]
            column = kv_tile * grid.block_kv + jnp.arange(grid.block_kv)
            found = jax.lax.stop_gradient(score(batch, head, q_tile, kv_tile))
            seen = found.visible & (column < grid.kv_len)
            keys = _ordered(found.scores)
            of_rank = (
                [seen] if found.forced is None else [seen & found.forced, seen & ~found.forced]
            )
            return tuple(
                _best_of(best, jnp.where(chosen, keys, -jnp.inf), column)
                for best, chosen in zip(known, of_rank, strict=True)
            )

        nothing = jnp.full(shape, -jnp.inf, jnp.float32), jnp.full(shape, -1, jnp.int32)
        known = jax.lax.fori_loop(0, count, one_tile, (nothing,) * ranks)
        return _joined(known)

    # ascending lists: of equal scores the one that is kept already is the lower column
    found = jax.lax.map(one_row, jnp.arange(batches * heads * grid.q_blocks))
    scores, indices = (x.reshape(batches, heads, -1, k)[:, :, : grid.q_len] for x in found)
    return Best(indices, (indices >= 0).sum(-1, dtype=jnp.int32), scores)


Kept = tuple[Float[Array, "block_q k"], Int[Array, "block_q k"]]


def _ordered(scores: Float[Array, "..."]) -> Float[Array, "..."]:
    """The same scores as numbers that sort as `selection` ranks them, all above -inf."""
    scores = scores.astype(jnp.float32)
    # of the two zeros and the many NaNs one each
    scores = jnp.where(scores == 0, 0.0, jnp.where(jnp.isnan(scores), jnp.nan, scores))
    return jnp.maximum(scores, jnp.finfo(jnp.float32).min)


def _best_of(kept: Kept, keys: Float[Array, "block_q block_kv"], column: Array) -> Kept:
    """The best of what is kept and of a tile; -inf stands for what may not be chosen."""
    scores, indices = kept
    merged, place = jax.lax.top_k(jnp.concatenate([scores, keys], axis=1), scores.shape[1])
    columns = jnp.broadcast_to(column.astype(jnp.int32), keys.shape)
    columns = jnp.where(jnp.isneginf(keys), -1, columns)
    every = jnp.concatenate([indices, columns], axis=1)
    return merged, jnp.take_along_axis(every, place, axis=1)


def _joined(known: tuple[Kept, ...]) -> Kept:
    """The best of all ranks, those of the first one before all others."""
    first, *others = known
    for scores, indices in others:
        width = indices.shape[1]
        place, count = jnp.arange(width), (first[1] >= 0).sum(1, keepdims=True)
        # no more than `width` in all: what does not fit of the others falls away
        at = jnp.where(place < count, place, width + place - count)
        first = tuple(
            jnp.take_along_axis(jnp.concatenate(pair, axis=1), at, axis=1)
            for pair in zip(first, (scores, indices), strict=True)
        )
    return first
