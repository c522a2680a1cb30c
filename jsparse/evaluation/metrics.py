"""How close sparse attention comes to dense attention, without forming all pairs."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jsparse import checks
from jsparse.attention.attend import attend
from jsparse.core.blocks import candidates
from jsparse.core.reordering import Orders
from jsparse.types import BlockMask, Frame, Mask, Method, TileGrid, parts_of

# of tiles that are counted pair by pair
_PAIRS_AT_ONCE = 2**20


class Walked(NamedTuple):
    """What attending itself decides, where it skips tiles on the way.

    Attributes:
      scored: The tiles whose logits it computes.
      kept: Those of them that it does not skip.
    """

    scored: BlockMask
    kept: BlockMask

    @classmethod
    def of(cls, info: Any) -> "Walked | None":
        """What a method's `info` says: fields of the same names, where it has them."""
        if not hasattr(info, "scored"):
            return None
        return cls(info.scored, info.kept)


class OutputError(NamedTuple):
    """Distances of each head's output from that of dense attention.

    Attributes:
      relative: The norm of the difference over the norm of the dense output.
      largest: The largest difference of a single number.
      cosine: The cosine of the angle between the two outputs, 1 where both are zero.
    """

    relative: Float[Array, "*batch heads"]
    largest: Float[Array, "*batch heads"]
    cosine: Float[Array, "*batch heads"]


def recalled_mass(
    sparse_lse: Float[Array, "*batch heads q_len"], dense_lse: Float[Array, "*batch heads q_len"]
) -> Float[Array, "*batch heads"]:
    """The share of the dense softmax's mass that falls on the pairs computed, mean over rows.

    Both are log-sum-exps of the same logits, over some pairs and over all. Rows that see no key
    under dense attention are left out.
    """
    seen = ~jnp.isneginf(dense_lse)
    share = jnp.exp(sparse_lse - jnp.where(seen, dense_lse, 0.0))
    return share.mean(-1, where=seen)


def output_error(
    out: Float[Array, "*batch q_len heads v_dim"], dense: Float[Array, "*batch q_len heads v_dim"]
) -> OutputError:
    """Compares outputs head by head, in float32."""
    out, dense = out.astype(jnp.float32), dense.astype(jnp.float32)
    difference = _norm(out - dense)
    norm, dense_norm = _norm(out), _norm(dense)
    relative = jnp.where(difference == 0, 0.0, difference / dense_norm)
    product = norm * dense_norm
    inner = jnp.where((norm == 0) & (dense_norm == 0), 1.0, (out * dense).sum((-3, -1)))
    cosine = inner / jnp.where(product == 0, 1.0, product)
    return OutputError(relative, jnp.abs(out - dense).max((-3, -1)), cosine)


def _norm(x: Float[Array, "*batch q_len heads v_dim"]) -> Float[Array, "*batch heads"]:
    return jnp.sqrt(jnp.square(x).sum((-3, -1)))


def visible_density(
    plan: BlockMask | Sequence[BlockMask] | None, mask: Mask | None, heads: int
) -> Float[Array, "*batch heads"]:
    """The share of the tiles that the mask leaves visible which the plan computes.

    Of a tuple, tiles of the widest part; what other parts compute counts by its area.
    """
    if plan is None:
        return jnp.ones((heads,))
    widest = widest_part(plan)
    visible, _ = candidates(mask, widest.grid, widest.batch_shape, heads)
    computed = jnp.zeros((heads,))
    for part in parts_of(plan):
        tiles = part.kv_num_blocks.sum(-1) * _share(part, widest)
        computed = computed + jnp.repeat(tiles, heads // part.list_heads, axis=-1)
    return computed / jnp.maximum(visible.sum((-1, -2)), 1)


def tile_shares(
    plan: BlockMask | Sequence[BlockMask], heads: int
) -> Float[np.ndarray, "heads q_blocks kv_blocks"]:
    """How much of each tile a concrete plan of one sequence computes; of a tuple's widest part."""
    widest = widest_part(plan)
    shares = np.zeros((heads, widest.grid.q_blocks, widest.grid.kv_blocks), np.float32)
    for part in parts_of(plan):
        head, row, entry = np.nonzero(np.asarray(part.entries()))
        column = np.asarray(part.kv_indices)[head, row, entry]
        found = np.zeros((part.list_heads, *shares.shape[1:]), np.float32)
        # a narrow tile lies within the wide one that holds its first pair
        rows = row * part.block_q // widest.block_q
        np.add.at(found, (head, rows, column * part.block_kv // widest.block_kv), 1)
        shares += np.repeat(found * _share(part, widest), heads // part.list_heads, axis=0)
    return shares


def widest_part(plan: BlockMask | Sequence[BlockMask]) -> BlockMask:
    """The plan itself, or of several parts the one of the largest tiles."""
    return max(parts_of(plan), key=lambda part: part.block_q * part.block_kv)


def _share(part: BlockMask, widest: BlockMask) -> float:
    """A part's tile as a share of a tile of the widest part."""
    return part.block_q * part.block_kv / (widest.block_q * widest.block_kv)


def in_place(
    shares: Float[np.ndarray, "*batch heads q_blocks kv_blocks"], orders: Orders, grid: TileGrid
) -> Float[np.ndarray, "*batch heads q_blocks kv_blocks"]:
    """What is computed of tiles of reordered tokens, as tiles of tokens in their own places.

    Args:
      shares: The share of each tile's pairs that is computed.
      orders: The orders that a method put tokens in.
      grid: The lengths and tile sizes.
    """
    moved = shares
    for order, block, axis in zip(orders, (grid.block_q, grid.block_kv), (-2, -1), strict=True):
        if order is not None:
            held = _block_shares(np.asarray(order), block)
            held = np.repeat(held, shares.shape[-3] // held.shape[-3], axis=-3)
            moved = held @ moved if axis == -2 else moved @ np.swapaxes(held, -1, -2)
    return moved


def _block_shares(
    order: Int[np.ndarray, "*batch order_heads length"], block: int
) -> Float[np.ndarray, "*batch order_heads blocks blocks"]:
    """Of each block of tokens in their own places, the share that each block of the order holds."""
    length = order.shape[-1]
    blocks = -(-length // block)
    flat = order.reshape(-1, length)
    found = np.zeros((len(flat), blocks, blocks), np.float32)
    np.add.at(found, (np.arange(len(flat))[:, None], flat // block, np.arange(length) // block), 1)
    found /= found.sum(-1, keepdims=True)
    return found.reshape(*order.shape[:-1], blocks, blocks)


def pairs_attended(
    method: Method,
    q: Float[Array, "*batch q_len heads dim"],
    k: Float[Array, "*batch kv_len kv_heads dim"],
    v: Float[Array, "*batch kv_len kv_heads v_dim"],
    *,
    params: Any = (),
    **given: Any,
) -> Float[Array, "*batch heads"]:
    """Counts the pairs of tokens that a method attends to, element-wise masks included.

    With every logit zero, a row's log-sum-exp is the logarithm of how many keys it sees, so the
    executor that does the work does the counting too, one tile at a time. Exact up to f32
    rounding. What is skipped for its logits is found with the true ones before. Where a method
    mixes several attentions their pairs are added up, those with a compressed key as well.

    Args:
      method: What plans and attends.
      q: Queries.
      k: Keys.
      v: Values.
      params: The method's parameters.
      **given: What else it takes: mask, x, positions, state, key.
    """

    def zero(logit, batch, head, q_index, kv_index):
        return jnp.zeros_like(logit)

    def counted(k, v, plan, mask):
        _, lse = attend(q, k, v, plan, mask=mask, score_mod=zero, return_lse=True)
        return jnp.exp(lse).sum(-1)

    def branches():
        return getattr(method.plan(params, q, k, v=v, **given)[1], "branches", ())

    # most methods have none, and need not plan for that to be known
    if jax.eval_shape(branches):
        found = [counted(each.k, each.k, each.plan, each.mask) for each in branches()]
        return jnp.stack(found).sum(0)
    (_, lse), info = method.attend(params, q, k, v, **given, score_mod=zero, return_lse=True)
    if Walked.of(info) is not None:
        walked = Walked.of(method.attend(params, q, k, v, **given)[1])
        assert walked is not None
        return counted(k, v, walked.kept, given.get("mask"))
    return jnp.exp(lse).sum(-1)


def pairs_visible(
    mask: Mask | None, q_len: int, kv_len: int, heads: int, batch_shape: tuple[int, ...] = ()
) -> Float[Array, "*batch heads"]:
    """Counts the pairs of tokens that a mask leaves visible, per head."""
    q, k = (jnp.zeros((*batch_shape, length, heads, 1)) for length in (q_len, kv_len))
    _, lse = jax.jit(lambda q, k: attend(q, k, k, mask=mask, return_lse=True))(q, k)
    return jnp.exp(lse).sum(-1)


def pairs_planned(
    plan: BlockMask | Sequence[BlockMask], mask: Mask, heads: int
) -> Float[np.ndarray, " heads"]:
    """Counts the pairs of tokens that a concrete plan of one sequence and a mask let through.

    Tiles that are visible as a whole count by their area, and of the others every pair is looked
    at: exact, at a small part of what attending takes.

    Args:
      plan: The tiles, in one list or in disjoint ones.
      mask: What attention applies inside them, which may be more than the caller's mask: methods
        that hide more have it as `mask` in their `info`.
      heads: How many query heads.
    """
    mask = mask.flatten_batch(())
    pairs = np.zeros(heads)
    for part in parts_of(plan):
        grid = part.grid
        lists, every, partly = map(np.asarray, _tiles_by_kind(part, mask, heads))
        head, row, entry = np.nonzero(every)
        sizes = (
            np.minimum(block, length - block * index)
            for block, length, index in (
                (grid.block_q, grid.q_len, row),
                (grid.block_kv, grid.kv_len, lists[head, row, entry]),
            )
        )
        np.add.at(pairs, head, np.multiply(*sizes))
        head, row, entry = np.nonzero(partly)
        tiles = np.stack([head, row, lists[head, row, entry]], -1)
        # as many at a time as one compiled program is for, the last of them once more to fill it up
        at_once = max(1, _PAIRS_AT_ONCE // (grid.block_q * grid.block_kv))
        for first in range(0, len(tiles), at_once):
            some = tiles[first : first + at_once]
            filled = np.pad(some, ((0, at_once - len(some)), (0, 0)), mode="edge")
            found = np.asarray(_visible_in(mask, grid, filled))
            np.add.at(pairs, some[:, 0], found[: len(some)])
    return pairs


@functools.partial(jax.jit, static_argnums=2)
def _tiles_by_kind(plan: BlockMask, mask: Mask, heads: int) -> tuple[Array, Array, Array]:
    """Each head's lists, which entries a mask leaves whole, and which it may leave in part."""
    grid, classify = plan.grid, mask.classifier(plan.grid)
    times = heads // plan.list_heads
    lists, listed = (jnp.repeat(x, times, axis=0) for x in (plan.kv_indices, plan.entries()))

    def bounds(head, q_block, kv_blocks):
        return classify(q_block, kv_blocks, Frame(grid.q_len, grid.kv_len, 0, head))

    of_rows = jax.vmap(bounds, in_axes=(None, 0, 0))
    some, every = jax.vmap(of_rows, in_axes=(0, None, 0))(
        jnp.arange(heads), jnp.arange(grid.q_blocks), lists
    )
    return lists, listed & every, listed & some & ~every


@functools.partial(jax.jit, static_argnums=1)
def _visible_in(mask: Mask, grid: TileGrid, tiles: Int[Array, "tiles 3"]) -> Int[Array, " tiles"]:
    """How many pairs a mask lets through of each tile, given as head, row and column."""

    def of_tile(tile):
        head, row, column = tile
        q_index = row * grid.block_q + jnp.arange(grid.block_q)[:, None]
        kv_index = column * grid.block_kv + jnp.arange(grid.block_kv)
        seen = mask.visible(q_index, kv_index, Frame(grid.q_len, grid.kv_len, 0, head))
        return (seen & (q_index < grid.q_len) & (kv_index < grid.kv_len)).sum(dtype=jnp.int32)

    return jax.vmap(of_tile)(tiles)


def list_overlap(left: BlockMask, right: BlockMask) -> Float[Array, "*batch list_heads q_blocks"]:
    """What two plans have in common: entries of both lists of a row over those of either.

    Rows in which both are empty have 1.

    Raises:
      ValueError: if the plans are of other lengths or tiles, or have other numbers of lists.
    """
    checks.same_grid(left.grid, right.grid)
    checks.same_shape("plans", left.kv_num_blocks.shape, right.kv_num_blocks.shape)
    last = left.grid.kv_blocks

    def common(own, other):
        places = jnp.clip(jnp.searchsorted(other, own), 0, len(other) - 1)
        return ((own < last) & (other[places] == own)).sum()

    for _ in left.kv_num_blocks.shape:
        common = jax.vmap(common)
    # padding after the last entry, wherever it stood
    lists = [jnp.sort(jnp.where(x.entries(), x.kv_indices, last), axis=-1) for x in (left, right)]
    both = common(*lists)
    either = left.entries().sum(-1) + right.entries().sum(-1) - both
    return jnp.where(either > 0, both / jnp.maximum(either, 1), 1.0)
