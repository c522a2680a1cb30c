"""MInference: a pattern per head, filled in from q and k. Jiang et al. 2024, arXiv:2407.02490."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jsparse import checks
from jsparse.attention.planned import Queries, planned
from jsparse.core import blocks, pooling, scores, selection
from jsparse.masks import causal, head_windows
from jsparse.types import BlockMask, Frame, Mask, Method, TileGrid
from jsparse.types.block_mask import dense_to_lists


# dataclasses: as tuples, an A-shape and a vertical-slash of the same numbers would be equal
@dataclasses.dataclass(frozen=True)
class AShape:
    """The first `n_init` keys, and the last `n_local` up to the query's own."""

    n_init: int = 100
    n_local: int = 800


@dataclasses.dataclass(frozen=True)
class VerticalSlash:
    """The `vertical_size` keys and the `slash_size` distances that the last queries attend to."""

    vertical_size: int = 1000
    slash_size: int = 6096


@dataclasses.dataclass(frozen=True)
class BlockSparse:
    """Of each row of tiles the `top_k` with the largest product of mean query and mean key."""

    top_k: int = 100


Pattern = AShape | VerticalSlash | BlockSparse
FALLBACK = VerticalSlash()
# the least of a vertical-slash budget
_FEWEST_COLUMNS, _FEWEST_DISTANCES = 30, 50


class MInferenceInfo(NamedTuple):
    """What patterns were filled in by, None where no head has the pattern, and the whole mask.

    Attributes:
      vertical: Per vertical-slash head the probability of each key, summed over the last queries.
      slash: The same of each distance between query and key.
      block_scores: Per block-sparse head the product of mean query and mean key of each tile.
      mask: What attention applies inside the tiles: the caller's mask, causality, A-shapes.
    """

    vertical: Float[Array, "*batch vertical_slash_heads kv_len"] | None
    slash: Float[Array, "*batch vertical_slash_heads kv_len"] | None
    block_scores: Float[Array, "*batch block_sparse_heads q_blocks kv_blocks"] | None
    mask: Mask


def diagonal_sums(x: Float[Array, "rows columns"]) -> Float[Array, " diagonals"]:
    """Sums along the diagonals; entry `n` is that of column - row = n - rows + 1."""
    rows, columns = x.shape
    # in rows of one entry less each begins one place later than the row before
    skewed = jnp.pad(x[::-1], ((0, 0), (0, rows))).reshape(-1)[:-rows]
    return skewed.reshape(rows, rows + columns - 1).sum(0)


@functools.partial(jax.jit, static_argnames=("last_q", "heads"))
def vertical_slash_scores(
    q: Float[Array, "*batch q_len heads dim"],
    k: Float[Array, "*batch kv_len kv_heads dim"],
    *,
    last_q: int,
    mask: Mask | None = None,
    offset: Int[Array, "*batch"] | None = None,
    heads: tuple[int, ...] | None = None,
) -> tuple[Float[Array, "*batch scored_heads kv_len"], Float[Array, "*batch scored_heads kv_len"]]:
    """Sums the last queries' attention probabilities by key and by distance (section 3.2).

    Args:
      q: Queries.
      k: Keys.
      last_q: How many queries to look at.
      mask: Who may see whom.
      offset: The key index that query 0 sits at; default `kv_len - q_len`.
      heads: Query heads to look at; default all.
    """
    (*batch_shape, q_len, all_heads, dim), (kv_len, kv_heads) = q.shape, k.shape[-3:-1]
    index = jnp.arange(all_heads) if heads is None else jnp.asarray(heads, jnp.int32)
    rows = min(last_q, q_len)
    flat_q = q[..., q_len - rows :, :, :].reshape(-1, rows, all_heads, dim)
    flat_k = k.reshape(-1, kv_len, kv_heads, dim)
    whole = (causal() if mask is None else mask).flatten_batch(tuple(batch_shape))
    last = kv_len - 1 if offset is None else offset + q_len - 1
    last = jnp.broadcast_to(last, batch_shape).reshape(-1)
    q_index, kv_index = jnp.arange(q_len - rows, q_len)[:, None], jnp.arange(kv_len)

    # one head at a time: [last_q, kv_len] is all that there ever is of the attention map
    def one_head(number):
        batch, head = jnp.divmod(number, len(index))
        head = index[head]
        keys = flat_k[batch, :, head // (all_heads // kv_heads)]
        logits = jnp.dot(flat_q[batch, :, head], keys.T, preferred_element_type=jnp.float32)
        seen = whole.visible(q_index, kv_index, Frame(q_len, kv_len, batch, head))
        logits = jnp.where(seen, logits * dim**-0.5, -jnp.inf)
        peak = logits.max(-1, keepdims=True)
        mass = jnp.exp(logits - jnp.where(jnp.isneginf(peak), 0.0, peak))
        total = mass.sum(-1, keepdims=True)
        probs = mass / jnp.where(total != 0, total, 1.0)
        # the last query's own key, at distance 0, ends a diagonal of all rows
        ends = last[batch] - kv_index
        slash = (
            diagonal_sums(probs)
            .at[ends]
            .get(mode="fill", fill_value=0.0, wrap_negative_indices=False)
        )
        return probs.sum(0), slash

    sums = jax.lax.map(one_head, jnp.arange(flat_q.shape[0] * len(index)))
    return jax.tree.map(lambda x: x.reshape(*batch_shape, len(index), kv_len), sums)


def mean_products(
    q: Float[Array, "*batch q_len heads dim"],
    k: Float[Array, "*batch kv_len kv_heads dim"],
    *,
    block_size: int,
    heads: tuple[int, ...],
) -> Float[Array, "*batch scored_heads q_blocks kv_blocks"]:
    """Scores the tiles of some query heads by the product of their mean query and mean key."""
    group = q.shape[-2] // k.shape[-2]
    q_blocks = pooling.mean_blocks(q[..., list(heads), :], block_size)
    k_blocks = pooling.mean_blocks(k[..., [head // group for head in heads], :], block_size)
    # unscaled: only their order matters
    return scores.pooled_logits(q_blocks, k_blocks, scale=1.0)


def minference(
    *,
    patterns: Pattern | Sequence[Pattern] = FALLBACK,
    minference_ratio: float = 1.0,
    block_size: int = 64,
    last_q: int = 64,
    forced_vertical: int = 30,
    forced_slash: int = 100,
    width: int | None = None,
) -> Method:
    """Gives each head one of three sparse patterns, filled in from q and k; always causal.

    A vertical-slash head keeps the columns and the diagonals on which the last queries' attention
    lies. Its plan is a tuple of two disjoint ones: tiles that the diagonals touch, and of each row
    of tiles the columns that lie in none of these, gathered one by one. `jsparse plan` finds which
    pattern suits which head of a model.

    Args:
      patterns: One for all heads, or one per query head, as `AShape(n_init, n_local)`,
        `VerticalSlash(vertical_size, slash_size)` or `BlockSparse(top_k)`.
      minference_ratio: Factor on both sizes of vertical-slash heads, above 0. Of these at least 30
        columns and 50 distances remain.
      block_size: Tokens per tile, on both sides; 64 in the authors' kernels.
      last_q: Queries at the end that the estimate looks at; 64 in the paper.
      forced_vertical: Columns at the start that are taken first; 30 in the authors' code.
      forced_slash: Distances from 0 up that are taken first; 100 in the authors' code.
      width: Most tiles a row can hold; default all. Rows that need more are marked `overflowed`.

    Differs from the paper:
      Distances are aligned to tiles, as in the authors' branch for training: distance d takes the
      tiles at block offsets d // block_size and, unless it is a multiple, one more. These hold the
      block_size keys that a row of tiles reaches at that distance, and not what the authors' kernel
      adds where it merges such runs. Ties go to the lower key and distance. Means of a ragged last
      tile are over the tokens it has. Estimates are of what the caller's mask shows. Layers that
      stay dense are the model's to choose. Decoding stays dense in `js.nn.SparseAttention`, as in
      the paper; a single query that is handed to the method itself is planned like any other.

    Raises:
      ValueError: if a number is out of range, a pattern is none of the three, or there is not one
        per head.
    """
    checks.patterns(patterns, (AShape, VerticalSlash, BlockSparse))
    shared = not isinstance(patterns, Sequence)
    given = (patterns,) if shared else tuple(patterns)
    for pattern in given:
        if isinstance(pattern, AShape):
            checks.non_negative(n_init=pattern.n_init)
            checks.positive(n_local=pattern.n_local)
        else:
            checks.positive(**dataclasses.asdict(pattern))
    checks.positive(block_size=block_size, last_q=last_q)
    checks.non_negative(forced_vertical=forced_vertical, forced_slash=forced_slash)
    checks.positive_number(minference_ratio=minference_ratio)

    def of_heads(heads: int) -> tuple[Pattern, ...]:
        checks.one_per_head(heads, patterns=given * heads if shared else given)
        return given * heads if shared else given

    def restrict(mask: Mask | None, queries: Queries) -> Mask:
        whole = causal(offset=queries.offset)
        if any(isinstance(pattern, AShape) for pattern in given):
            shapes = [
                (p.n_init, p.n_local) if isinstance(p, AShape) else (0, None)
                for p in of_heads(queries.heads)
            ]
            num_sink, window = zip(*shapes, strict=True)
            whole &= head_windows(num_sink=num_sink, window=window, offset=queries.offset)
        return whole if mask is None else mask & whole

    def plan(params, q, k, *, v=None, x=None, positions=None, mask=None, state=None, key=None):
        queries = Queries.of(q, k, positions)
        of = of_heads(queries.heads)
        grid = TileGrid(q.shape[-3], k.shape[-3], block_size, block_size)
        budget = Budget.of(of, minference_ratio, grid.kv_len)
        whole = restrict(mask, queries)
        info = MInferenceInfo(None, None, None, whole)
        if budget.vertical_slash:
            vertical, slash = vertical_slash_scores(
                q, k, last_q=last_q, mask=whole, offset=queries.offset, heads=budget.vertical_slash
            )
            info = info._replace(vertical=vertical, slash=slash)
        if budget.block_sparse:
            block_scores = mean_products(q, k, block_size=block_size, heads=budget.block_sparse)
            info = info._replace(block_scores=block_scores)
        keep, columns = _select(
            q.shape[:-3], info, whole, queries.offset, grid, budget, (forced_vertical, forced_slash)
        )
        tiles = BlockMask.from_dense(keep, **grid._asdict(), width=width)
        return (tiles if columns is None else (tiles, columns)), info

    return planned(plan, restrict=restrict)


class Budget(NamedTuple):
    """Which heads have which pattern, and how much they keep of what they choose from."""

    heads: int
    vertical_slash: tuple[int, ...]
    block_sparse: tuple[int, ...]
    columns: tuple[int, ...]
    distances: tuple[int, ...]
    tiles: tuple[int, ...]

    @classmethod
    def of(cls, patterns: Sequence[Pattern], ratio: float, kv_len: int) -> "Budget":
        """Of one pattern per query head."""
        lines = {h: p for h, p in enumerate(patterns) if isinstance(p, VerticalSlash)}
        boxes = {h: p for h, p in enumerate(patterns) if isinstance(p, BlockSparse)}

        def scaled(size: int, fewest: int) -> int:
            return min(kv_len, max(int(size * ratio), fewest))

        return cls(
            len(patterns),
            tuple(lines),
            tuple(boxes),
            tuple(scaled(p.vertical_size, _FEWEST_COLUMNS) for p in lines.values()),
            tuple(scaled(p.slash_size, _FEWEST_DISTANCES) for p in lines.values()),
            tuple(p.top_k for p in boxes.values()),
        )


@functools.partial(jax.jit, static_argnames=("batch_shape", "grid", "budget", "forced"))
def _select(
    batch_shape: tuple[int, ...],
    info: MInferenceInfo,
    mask: Mask,
    offset: Any,
    grid: TileGrid,
    budget: Budget,
    forced: tuple[int, int],
) -> tuple[Bool[Array, "*batch heads q_blocks kv_blocks"], BlockMask | None]:
    """The tiles of all heads, and the columns gathered besides; None where no head has any."""
    keep, _ = blocks.candidates(mask, grid, batch_shape, budget.heads)
    if info.block_scores is not None:
        of = keep[..., budget.block_sparse, :, :]
        most = jnp.asarray(budget.tiles)[:, None, None]
        best = selection.top_k(info.block_scores, most, visible=of)
        keep = keep.at[..., budget.block_sparse, :, :].set(best)
    if info.vertical is None or info.slash is None:
        return keep, None
    first = _first_key(offset, grid, batch_shape)
    # neither a column nor a distance goes past the last query's own key
    index = jnp.arange(grid.kv_len)
    reached = index < first[..., None, None] + grid.q_len
    # where more are forced than fit, the first of them are taken: a query's own key is never lost
    columns, distances = (
        selection.top_k(
            jnp.where(index < least, jnp.inf, x),
            jnp.asarray(most)[:, None],
            visible=reached,
            forced=index < least,
        )
        for x, most, least in zip(
            (info.vertical, info.slash), (budget.columns, budget.distances), forced, strict=True
        )
    )
    of, lists, counts = tiles_and_columns(
        distances,
        columns,
        visible=keep[..., budget.vertical_slash, :, :],
        mask=mask,
        heads=budget.vertical_slash,
        first=first,
        grid=grid,
        width=max(budget.columns),
    )
    keep = keep.at[..., budget.vertical_slash, :, :].set(of)

    def of_all_heads(x: Array, core_ndim: int) -> Array:
        every = jnp.zeros((*batch_shape, budget.heads, *x.shape[-core_ndim:]), x.dtype)
        at = (..., jnp.asarray(budget.vertical_slash), *(slice(None),) * core_ndim)
        return every.at[at].set(x)

    lists, counts = of_all_heads(lists, 2), of_all_heads(counts, 1)
    nothing_lost = jnp.zeros(counts.shape[:-1], bool)
    return keep, BlockMask(lists, counts, nothing_lost, *grid._replace(block_kv=1))


def _first_key(offset: Any, grid: TileGrid, batch_shape: tuple[int, ...]) -> Int[Array, "*batch"]:
    """The key index that query 0 sits at."""
    offset = grid.kv_len - grid.q_len if offset is None else offset
    return jnp.broadcast_to(jnp.asarray(offset, jnp.int32), batch_shape)


def diagonal_tiles(
    distances: Bool[Array, "*batch heads kv_len"], first: Int[Array, "*batch"], grid: TileGrid
) -> Bool[Array, "*batch heads q_blocks kv_blocks"]:
    """The tiles in which some query sees a key at one of the distances.

    Args:
      distances: Which distances between query and key are wanted.
      first: The key index that query 0 sits at.
      grid: Square tiles.
    """
    # a distance goes through two neighbouring diagonals of tiles, or exactly along one
    shift = jnp.arange(grid.kv_len) - first[..., None, None]
    nearest, farthest = shift // grid.block_q, -(-shift // grid.block_q)
    size = grid.q_blocks + grid.kv_blocks
    rows = jnp.arange(distances.size // grid.kv_len)[:, None]
    touched = jnp.zeros((len(rows), size + 1), bool)
    for diagonal in (nearest, farthest):
        place = diagonal + grid.kv_blocks
        # what is not wanted, and what no tile lies on, goes to a place of its own
        place = jnp.where(distances & (place >= 0) & (place < size), place, size)
        touched = touched.at[rows, place.reshape(len(rows), -1)].set(True)
    tiles = jnp.arange(grid.q_blocks)[:, None] - jnp.arange(grid.kv_blocks) + grid.kv_blocks
    return touched[:, tiles].reshape(*distances.shape[:-1], *tiles.shape)


def tiles_and_columns(
    distances: Bool[Array, "*batch heads kv_len"],
    columns: Bool[Array, "*batch heads kv_len"],
    *,
    visible: Bool[Array, "*batch heads q_blocks kv_blocks"],
    mask: Mask,
    heads: tuple[int, ...],
    first: Int[Array, "*batch"],
    grid: TileGrid,
    width: int,
) -> tuple[
    Bool[Array, "*batch heads q_blocks kv_blocks"],
    Int[Array, "*batch heads q_blocks width"],
    Int[Array, "*batch heads q_blocks"],
]:
    """Turns distances into tiles, and lists per row of tiles the columns that lie in none of them.

    Args:
      distances: Which distances between query and key are kept.
      columns: Which keys are kept for all queries that see them.
      visible: Tiles of which the mask leaves something to see.
      mask: Who may see whom.
      heads: Which query heads these are.
      first: The key index that query 0 sits at.
      grid: Square tiles.
      width: Columns that a list can hold, at least the most of any head.

    Returns:
      The tiles; the columns, ascending; and how many columns each row has.
    """
    tiles = visible & diagonal_tiles(distances, first, grid)
    batch_shape = first.shape
    chosen = dense_to_lists(columns, width)
    counted = jnp.arange(width) < columns.sum(-1, keepdims=True)
    classify = mask.flatten_batch(batch_shape).classifier(grid._replace(block_kv=1))
    rows = jnp.arange(grid.q_blocks)[:, None]

    def besides(batch, head, chosen, counted, tiles):
        frame = Frame(grid.q_len, grid.kv_len, batch, head)
        seen = classify(rows, chosen, frame).some
        listed = counted & seen & ~tiles[:, chosen // grid.block_kv]
        return chosen[dense_to_lists(listed, width)], listed.sum(-1, dtype=jnp.int32)

    flat = (x.reshape(-1, *x.shape[len(batch_shape) :]) for x in (chosen, counted, tiles))
    over_heads = jax.vmap(besides, in_axes=(None, 0, 0, 0, 0))
    over_batch = jax.vmap(over_heads, in_axes=(0, None, 0, 0, 0))
    lists, counts = over_batch(jnp.arange(math.prod(batch_shape)), jnp.asarray(heads), *flat)
    shape = *batch_shape, len(heads), grid.q_blocks
    return tiles, lists.reshape(*shape, width), counts.reshape(shape)
