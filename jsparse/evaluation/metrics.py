"""How close sparse attention comes to dense attention, without forming all pairs."""

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
from jsparse.types import BlockMask, Mask, Method, TileGrid, parts_of


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
