"""PBS-Attn: keys sorted inside segments, then blocks by their means. 2025, arXiv:2510.21270."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jsparse import checks
from jsparse.attention.planned import Queries, no_params
from jsparse.attention.reordered import attend_reordered
from jsparse.core import blocks, pooling, reordering, scores, selection
from jsparse.core.reordering import Orders
from jsparse.masks.reordered import follow
from jsparse.types import BlockMask, Frame, Mask, Method, TileGrid

Pool = Callable[[Array, int], Array]


class PBSAttnInfo(NamedTuple):
    """In which order each head put the keys, and the estimated mass of what it chose from.

    `kv_order` is None where there is nothing to sort: the plan's keys stand in their own places.
    """

    kv_order: Int[Array, "*batch order_heads kv_len"] | None
    block_scores: Float[Array, "*batch heads q_blocks kv_blocks"]


@functools.partial(jax.jit, static_argnames=("last", "length"))
def last_queries_attention(
    q: Float[Array, "*batch q_len heads dim"],
    k: Float[Array, "*batch kv_len kv_heads dim"],
    *,
    last: int,
    length: int,
    mask: Mask | None = None,
) -> Float[Array, "*batch heads length"]:
    """Averages the attention that the last queries pay to each of the first keys.

    Args:
      q: Queries, positions applied.
      k: Keys, positions applied.
      last: How many queries.
      length: How many keys; the softmax is over these.
      mask: Who may see whom.
    """
    batch_shape, (q_len, heads, dim) = q.shape[:-3], q.shape[-3:]
    kv_len, kv_heads = k.shape[-3:-1]
    last = min(last, q_len)
    flat_mask = None if mask is None else mask.flatten_batch(batch_shape)
    flat_q = q[..., q_len - last :, :, :].reshape(-1, last, heads, dim)
    flat_k = k[..., :length, :, :].reshape(-1, length, kv_heads, dim)
    queries, keys = jnp.arange(q_len - last, q_len)[:, None], jnp.arange(length)

    # one head at a time: [last, length] is all that there ever is of the attention map
    def one_head(index):
        batch, head = jnp.divmod(index, heads)
        of_k = flat_k[batch, :, head // (heads // kv_heads)]
        logits = jnp.dot(flat_q[batch, :, head], of_k.T, preferred_element_type=jnp.float32)
        seen = None
        if flat_mask is not None:
            seen = flat_mask.visible(queries, keys, Frame(q_len, kv_len, batch, head))
            seen = jnp.broadcast_to(seen, logits.shape)
        return jax.nn.softmax(logits * dim**-0.5, axis=-1, where=seen).mean(0)

    found = jax.lax.map(one_head, jnp.arange(len(flat_q) * heads))
    return found.reshape(*batch_shape, heads, length)


def order_in_segments(
    weights: Float[Array, "*batch order_heads length"], *, segment_size: int, kv_len: int
) -> Int[Array, "*batch order_heads kv_len"]:
    """Sorts the tokens of each segment by falling weight; tokens after the last one stay.

    Args:
      weights: Of the tokens of complete segments.
      segment_size: Tokens per segment; divides their number.
      kv_len: Number of tokens altogether.
    """
    *lead, length = weights.shape
    falling = -weights.reshape(*lead, length // segment_size, segment_size)
    first = jnp.arange(0, length, segment_size, dtype=jnp.int32)[:, None]
    order = first + jnp.argsort(falling, axis=-1, stable=True).astype(jnp.int32)
    rest = jnp.broadcast_to(jnp.arange(length, kv_len, dtype=jnp.int32), (*lead, kv_len - length))
    return jnp.concatenate([order.reshape(*lead, length), rest], axis=-1)


def pbs_attn(
    *,
    block_size: int = 128,
    segment_size: int | None = None,
    threshold: float | Float[Array, "*heads"] = 0.9,
    force_first_block: bool = True,
    query_pool: Pool = pooling.mean_blocks,
    key_pool: Pool = pooling.mean_blocks,
    share_in_group: bool = False,
    width: int | None = None,
) -> Method:
    """Sorts keys inside segments by what the last queries attend to, then keeps top-p blocks.

    Important keys come to stand in the first blocks of their segments, so that fewer blocks hold
    as much mass. A row computes all that it sees of the segments its own queries stand in, and of
    the other segments the fewest blocks that hold `threshold` of their estimated mass. Queries stay
    where they are. The mask follows the keys, so causality is exact, but the choice looks ahead:
    what an early row computes depends on the last queries. Do not train through it.

    Args:
      block_size: Tokens per block, on both sides; 128 in the paper.
      segment_size: Keys that are sorted together, a multiple of `block_size`; 256 in the paper,
        and two blocks by default. One block sorts nothing that matters.
      threshold: Mass to keep of the blocks outside the own segments, in (0, 1]; a number or one per
        query head; 0.9 in the paper.
      force_first_block: Whether every row keeps the block that holds key 0.
      query_pool: What stands for a block of queries: `jsparse.core.pooling.mean_blocks`, or
        `max_blocks` there.
      key_pool: What stands for a block of keys.
      share_in_group: Whether query heads that share a kv head also share one order, by the mean of
        their attention. Keys and values are copied once per kv head instead of per query head.
      width: Most blocks a row can hold; default all. Rows that need more are marked `overflowed`.

    Differs from the paper:
      Averages are over the tokens that a block has; the authors' code averages padding in.
      Blocks of the own segment in which no key is visible are left out: they would give nothing.
      The last queries weigh keys that the mask shows them; theirs, all of complete segments.
      Where the sum stays below the threshold, all blocks are kept; in theirs, none.
      Queries may be fewer than keys, aligned by `positions`; a block of them that spans segments
      owns each. Any mask will do, or none: the other segments are those before and after.
      Keys of equal weight stay in their order, and of equal blocks the lower is taken first; the
      authors' sorts leave both open. Hidden keys have no weight; theirs have logits lowered by a
      million. `share_in_group` is not in the paper. Decoding stays dense in
      `js.nn.SparseAttention`, as in the paper; a single query that is handed to the method itself
      is planned like any other.

    Raises:
      ValueError: if `block_size` does not divide `segment_size`, or a number is out of range.
    """
    checks.positive(block_size=block_size)
    segment = 2 * block_size if segment_size is None else segment_size
    checks.positive(segment_size=segment)
    checks.multiple(of=block_size, segment_size=segment)
    checks.fractions(threshold=threshold)

    def order_of(q: Array, k: Array, mask: Mask | None) -> Array | None:
        heads, (kv_len, kv_heads) = q.shape[-2], k.shape[-3:-1]
        if kv_len <= segment:
            return None
        length = kv_len // segment * segment
        weights = last_queries_attention(q, k, last=block_size, length=length, mask=mask)
        if share_in_group:
            groups = (*weights.shape[:-2], kv_heads, heads // kv_heads, length)
            weights = weights.reshape(groups).mean(-2)
        return order_in_segments(weights, segment_size=segment, kv_len=kv_len)

    def plan(params, q, k, *, v=None, x=None, positions=None, mask=None, state=None, key=None):
        batch_shape, (q_len, heads, dim), kv_len = q.shape[:-3], q.shape[-3:], k.shape[-3]
        checks.per_head(heads, threshold=threshold)
        grid = TileGrid(q_len, kv_len, block_size, block_size)
        order = order_of(q, k, mask)
        visible, _ = blocks.candidates(mask, grid, batch_shape, heads)
        if mask is not None and order is not None:
            moved = follow(mask, Orders(kv_order=order), heads)
            # what is seen nowhere in a segment is not seen wherever in it a key has gone
            visible = _anywhere_in_segment(visible, segment // block_size)
            visible &= blocks.candidates(moved, grid, batch_shape, heads)[0]
        sorted_k = k if order is None else reordering.reorder(k, order)
        logits = scores.pooled_logits(
            query_pool(q, block_size), key_pool(sorted_k, block_size), scale=dim**-0.5
        )
        own = _own_segments(grid, segment, Queries.of(q, k, positions).offset)
        others = visible & ~own
        mass = jax.nn.softmax(logits, axis=-1, where=others)
        per_head = jnp.asarray(threshold, jnp.float32)[..., None, None]
        keep = selection.top_p(mass, per_head, visible=others) | (visible & own)
        if force_first_block:
            keep |= visible & _holds_first(order, grid, heads)
        tiles = BlockMask.from_dense(keep, **grid._asdict(), width=width)
        return tiles, PBSAttnInfo(order, mass)

    def attend(
        params, q, k, v, *, x=None, positions=None, mask=None, state=None, key=None, **options
    ):
        tiles, info = plan(params, q, k, positions=positions, mask=mask)
        moved = follow(mask, Orders.of(info), q.shape[-2])
        out = attend_reordered(q, k, v, tiles, kv_order=info.kv_order, mask=moved, **options)
        return out, info

    return Method(no_params, plan, attend)


def _own_segments(
    grid: TileGrid, segment: int, offset: Int[Array, "*batch"] | None
) -> Bool[Array, "*batch 1 q_blocks kv_blocks"]:
    """Which blocks of keys lie in a segment that some query of the row stands in."""
    start = jnp.asarray(grid.kv_len - grid.q_len if offset is None else offset)
    start = start[..., None, None, None]
    first, last = grid.q_range(jnp.arange(grid.q_blocks)[:, None])
    segments = jnp.arange(grid.kv_blocks) * grid.block_kv // segment
    # floor division: queries before all keys stand in a segment below 0
    return (segments >= (start + first) // segment) & (segments <= (start + last) // segment)


def _anywhere_in_segment(
    tiles: Bool[Array, "*rows kv_blocks"], blocks_per_segment: int
) -> Bool[Array, "*rows kv_blocks"]:
    """For each block whether any block of its segment is True."""
    missing = -tiles.shape[-1] % blocks_per_segment
    padded = jnp.pad(tiles, [(0, 0)] * (tiles.ndim - 1) + [(0, missing)])
    found = padded.reshape(*tiles.shape[:-1], -1, blocks_per_segment).any(-1)
    return jnp.repeat(found, blocks_per_segment, axis=-1)[..., : tiles.shape[-1]]


def _holds_first(
    order: Int[Array, "*batch order_heads kv_len"] | None, grid: TileGrid, heads: int
) -> Bool[Array, "*batch heads 1 kv_blocks"]:
    """Which block key 0 has gone to, for each head."""
    index = jnp.arange(grid.kv_blocks)
    if order is None:
        return jnp.broadcast_to(index == 0, (heads, 1, grid.kv_blocks))
    place = jnp.argmin(order, axis=-1) // grid.block_kv
    place = jnp.repeat(place, heads // order.shape[-2], axis=-1)
    return place[..., None, None] == index
