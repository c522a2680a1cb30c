"""Lists as kernels take them: first the tiles in which the mask hides nothing, which skip it.

Which tiles those are follows from the mask's bounds on whole tiles, in time proportional to the
listed tiles, and may depend on data under `jit`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jsparse.attention.block_sparse import Lists, Sizes
from jsparse.attention.logits import LogitRule
from jsparse.types import Frame, InverseList, Mask, TileGrid
from pallas_kernels.block_sparse_attention import walk


def by_query(lists: Lists, rule: LogitRule, sizes: Sizes) -> walk.Lists:
    """For each tile of queries the tiles of keys."""
    flat = in_order(lists.kv_indices, lists.kv_num_blocks)
    return _whole_first(flat, lists.mask, rule, sizes, own_is_q=True)


def by_query_in_order(lists: Lists, rule: LogitRule, sizes: Sizes) -> walk.Lists:
    """The same in the order of the lists: what is called whole are the tiles they begin with."""
    flat = in_order(lists.kv_indices, lists.kv_num_blocks)
    if lists.mask is None and not sizes.ragged:
        return flat
    whole = _whole(flat, lists.mask, rule, sizes, own_is_q=True)
    leading = jnp.cumprod(whole.reshape(lists.kv_indices.shape), axis=-1, dtype=jnp.int32)
    return flat._replace(whole=flat.first + leading.sum(-1, dtype=jnp.int32))


def in_order(
    kv_indices: Int[Array, "batch list_heads q_blocks width"],
    kv_num_blocks: Int[Array, "batch list_heads q_blocks"],
) -> walk.Lists:
    """The same in the order of the lists, nothing said of whole tiles."""
    batches, heads, blocks, width = kv_indices.shape
    first = jnp.arange(blocks, dtype=jnp.int32) * width
    return walk.Lists(
        kv_indices.reshape(batches, heads, blocks * width),
        jnp.broadcast_to(first, kv_num_blocks.shape),
        first + kv_num_blocks,
    )


def by_key(inverse: InverseList, mask: Mask | None, rule: LogitRule, sizes: Sizes) -> walk.Lists:
    """For each tile of keys the tiles of queries."""
    offsets = inverse.offsets
    flat = walk.Lists(inverse.q_indices, offsets[..., :-1], offsets[..., 1:])
    return _whole_first(flat, mask, rule, sizes, own_is_q=False)


def _whole_first(
    lists: walk.Lists, mask: Mask | None, rule: LogitRule, sizes: Sizes, *, own_is_q: bool
) -> walk.Lists:
    if mask is None and not sizes.ragged:
        return lists
    entries = jnp.arange(lists.ids.shape[2], dtype=jnp.int32)

    def one_list(ids, first, last, whole):
        own = _owners(first, entries)
        before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(whole, dtype=jnp.int32)])
        split = first + before[last] - before[first]
        # how many whole tiles come earlier in the same part of the list
        earlier = before[:-1] - before[first[own]]
        target = jnp.where(whole, first[own] + earlier, split[own] + entries - first[own] - earlier)
        target = jnp.where(entries < last[own], target, entries)
        return jnp.zeros_like(ids).at[target].set(ids, unique_indices=True), split

    whole = _whole(lists, mask, rule, sizes, own_is_q=own_is_q)
    ids, split = jax.vmap(jax.vmap(one_list))(*lists[:3], whole)
    return lists._replace(ids=ids, whole=split)


def _whole(
    lists: walk.Lists, mask: Mask | None, rule: LogitRule, sizes: Sizes, *, own_is_q: bool
) -> Bool[Array, "list_batch list_heads entries"]:
    """Which entries are tiles in which nothing is hidden; False past the end of a list."""
    list_batches, list_heads, length = lists.ids.shape
    entries = jnp.arange(length, dtype=jnp.int32)
    whole_for_list = _classifier(mask, rule, sizes, list_batches, list_heads)

    def one_list(ids, first, last, list_batch, list_head):
        own = _owners(first, entries)
        tiles = (own, ids) if own_is_q else (ids, own)
        return (entries < last[own]) & whole_for_list(*tiles, list_batch, list_head)

    over_heads = jax.vmap(one_list, in_axes=(0, 0, 0, None, 0))
    over_batches = jax.vmap(over_heads, in_axes=(0, 0, 0, 0, None))
    return over_batches(*lists[:3], jnp.arange(list_batches), jnp.arange(list_heads))


def _owners(first: Int[Array, " blocks"], entries: Int[Array, " entries"]) -> Array:
    """The tile to whose part of a list each entry belongs."""
    return jnp.searchsorted(first, entries, side="right").astype(jnp.int32) - 1


def _classifier(
    mask: Mask | None, rule: LogitRule, sizes: Sizes, list_batches: int, list_heads: int
) -> Callable[..., Bool[Array, " entries"]]:
    """A function of (q_blocks, kv_blocks, list_batch, list_head): which tiles are seen entirely."""
    # tiles of tokens: packed rows are several per token
    block_q = sizes.block_q // rule.group
    grid = TileGrid(rule.q_len, rule.kv_len, block_q, sizes.block_kv)

    def inside(q_blocks, kv_blocks, list_batch, list_head):
        # a last tile of keys that is not full has some to hide
        return kv_blocks < rule.kv_len // sizes.block_kv

    if mask is None:
        return inside
    classify = mask.classifier(grid)
    # how many sequences and heads share a list, and how many of them the mask tells apart
    per_list = sizes.batches // list_batches, sizes.heads * rule.group // list_heads
    told_apart = math.prod(mask.batch_shape), mask.heads
    batches, heads = (n if m > 1 else 1 for n, m in zip(per_list, told_apart, strict=True))

    def whole(q_blocks, kv_blocks, list_batch, list_head):
        def for_one(n):
            batch = list_batch * per_list[0] + n // heads
            head = list_head * per_list[1] + n % heads
            frame = Frame(rule.q_len, rule.kv_len, batch, head)
            every = classify(q_blocks, kv_blocks, frame).every
            return jnp.broadcast_to(every, q_blocks.shape)

        every = jax.vmap(for_one)(jnp.arange(batches * heads)).all(0)
        return every & inside(q_blocks, kv_blocks, list_batch, list_head)

    return whole
