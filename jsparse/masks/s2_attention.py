"""S2-Attention: a window, old blocks shared out to heads. Lin et al. 2024, arXiv:2407.17678."""

import warnings

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jsparse import checks
from jsparse.attention.planned import Queries, masked
from jsparse.core.block_tiles import blocks_of, tiles_of_blocks, tiles_per_block
from jsparse.masks.causal import as_int32, causal, key_position
from jsparse.types import (
    BlockMask,
    Frame,
    Mask,
    Method,
    TileBounds,
    TileGrid,
    array_field,
    pytree_dataclass,
    static_field,
)
from jsparse.types.mask import Index, Range, Runs


@pytree_dataclass
class ShardedBlocks(Mask):
    """Block `i` sees `j <= i` in its window, and those with `(j + residue) % stride == 0`.

    Strides and residues are per query head; a stride of 1 keeps every block.
    """

    block_size: int = static_field()
    local_blocks: int = static_field()
    strides: tuple[int, ...] = static_field()
    residues: tuple[int, ...] = static_field()
    offset: Int[Array, "*batch"] | None = array_field(core_ndim=0, default=None)

    @property
    def heads(self) -> int:
        return len(self.strides)

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        q_block = (q_index + key_position(self.offset, frame)) // self.block_size
        kv_block = kv_index // self.block_size
        stride, residue = self._of_head(frame)
        kept = ((kv_block + residue) % stride == 0) | (q_block - kv_block < self.local_blocks)
        return kept & (kv_block <= q_block)

    def within(self, q_range: Range, kv_range: Range, frame: Frame) -> TileBounds:
        offset = key_position(self.offset, frame)
        q_first, q_last = ((index + offset) // self.block_size for index in q_range)
        kv_first, kv_last = (index // self.block_size for index in kv_range)
        stride, residue = self._of_head(frame)
        past = jnp.minimum(kv_last, q_last)
        multiples = (past + residue) // stride - (kv_first - 1 + residue) // stride
        local = q_first - kv_last < self.local_blocks
        some = (kv_first <= q_last) & (local | (multiples > 0))
        all_kept = (q_last - kv_first < self.local_blocks) | (multiples == kv_last - kv_first + 1)
        return TileBounds(some, (kv_last <= q_first) & all_kept)

    def max_tiles(self, grid: TileGrid) -> int:
        blocks, rows = blocks_of(grid, self.block_size)
        window = self.local_blocks + rows - 1
        old = -(-max(0, blocks - window) // min(self.strides))
        return min(grid.kv_blocks, (window + old) * tiles_per_block(grid, self.block_size))

    def candidates(self, q_block: Index, grid: TileGrid, frame: Frame) -> Int[Array, " count"]:
        blocks, rows = blocks_of(grid, self.block_size)
        stride, residue = self._of_head(frame)
        first = grid.q_range(q_block)[0] + key_position(self.offset, frame)
        window = first // self.block_size - self.local_blocks + 1
        # the head's share up to the newest block before the window, which then repeats
        newest = window - 1 - (window - 1 + residue) % stride
        old = -residue % stride + stride * jnp.arange(-(-blocks // min(self.strides)))
        recent = window + jnp.arange(self.local_blocks + rows - 1)
        listed = jnp.concatenate([jnp.minimum(old, newest), recent])
        return tiles_of_blocks(listed, grid, self.block_size)

    def rows(self, kv_block: Index, grid: TileGrid, frame: Frame) -> Runs:
        offset, size = key_position(self.offset, frame), self.block_size
        kv_first, kv_last = (index // size for index in grid.kv_range(kv_block))
        stride, residue = self._of_head(frame)
        # rows up to the last that has it in its window; all, where one of its blocks is kept
        kept = kv_first + -(kv_first + residue) % stride <= kv_last
        window = grid.end_row((kv_last + self.local_blocks) * size - offset)
        first = grid.first_row(kv_first * size - offset)
        return Runs.one(first, jnp.where(kept, grid.q_blocks, window))

    def _of_head(self, frame: Frame) -> tuple[Array, Array]:
        return jnp.asarray(self.strides)[frame.head], jnp.asarray(self.residues)[frame.head]


@pytree_dataclass
class RelativeBlocks(Mask):
    """Blocks at distances inside `(-right, left)`, and every `stride`-th one on either side."""

    block_size: int = static_field()
    left: int = static_field()
    right: int = static_field()
    stride: int = static_field()
    offset: Int[Array, "*batch"] | None = array_field(core_ndim=0, default=None)

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        q_block = (q_index + key_position(self.offset, frame)) // self.block_size
        return self._beyond(q_block - kv_index // self.block_size) % self.stride == 0

    def within(self, q_range: Range, kv_range: Range, frame: Frame) -> TileBounds:
        offset = key_position(self.offset, frame)
        q_first, q_last = ((index + offset) // self.block_size for index in q_range)
        kv_first, kv_last = (index // self.block_size for index in kv_range)
        # every distance between the two occurs, and how far it is beyond the window grows by ones
        low, high = self._beyond(q_first - kv_last), self._beyond(q_last - kv_first)
        some = high // self.stride * self.stride >= low
        return TileBounds(some, some & ((low == high) | (self.stride == 1)))

    def _beyond(self, distance: Index) -> Index:
        """By how many blocks a distance lies past the window; negative to the right of it."""
        past = jnp.maximum(distance - self.left + 1, 0)
        return past - jnp.maximum(-distance - self.right + 1, 0)


def sharded_blocks(
    *,
    heads: int,
    kv_heads: int,
    block_size: int,
    local_blocks: int,
    vert_stride: int,
    head_sliding_step: int | None = None,
    head_sliding_offset: int = 0,
    num_dense_heads: int = 0,
    homo_head: bool = False,
    offset: Int[Array, "*batch"] | int | None = None,
) -> ShardedBlocks:
    """The blocks that each query head keeps; combine with `causal()` for the diagonal blocks.

    Query head `h` of kv head `g` keeps block `j` of the past if it is among the last
    `local_blocks`, or if `(j + g * step + head_sliding_offset) % vert_stride == 0`.

    Args:
      heads: Query heads.
      kv_heads: Key/value heads.
      block_size: Tokens per block, counted from key 0.
      local_blocks: Blocks of the window, the query's own included.
      vert_stride: One in so many old blocks is kept; 1 keeps all.
      head_sliding_step: By how much the residue grows from one kv head to the next; default
        `max(1, vert_stride // heads)`.
      head_sliding_offset: The residue of kv head 0.
      num_dense_heads: Of the last kv heads, how many keep all blocks.
      homo_head: Whether all heads keep what kv head 0 does.
      offset: The key index that query 0 sits at, per sequence; see `js.masks.causal`.

    Raises:
      ValueError: if a number is out of range.
    """
    checks.positive(block_size=block_size, local_blocks=local_blocks, vert_stride=vert_stride)
    checks.non_negative(num_dense_heads=num_dense_heads)
    checks.at_most(kv_heads, num_dense_heads=num_dense_heads)
    checks.multiple(of=kv_heads, heads=heads)
    step = max(1, vert_stride // heads) if head_sliding_step is None else head_sliding_step
    strides, residues = [], []
    for kv_head in range(kv_heads):
        dense = kv_head >= kv_heads - num_dense_heads
        shift = 0 if homo_head else kv_head * step
        strides += [1 if dense else vert_stride] * (heads // kv_heads)
        residues += [(shift + head_sliding_offset) % vert_stride] * (heads // kv_heads)
    if len({*zip(strides, residues, strict=True)}) == 1:
        # lists that all heads share are built once
        strides, residues = strides[:1], residues[:1]
    sizes = block_size, local_blocks, tuple(strides), tuple(residues)
    return ShardedBlocks(*sizes, as_int32(offset=offset))


def kv_efficient(plan: BlockMask) -> Bool[Array, "*batch heads"]:
    """Says of each head whether a block of keys that leaves its lists never comes back.

    Then a cache may drop it: `plan[i + 1, j]` implies `plan[i, j]` below the diagonal.
    """
    tiles = plan.to_dense()
    rows, columns = tiles.shape[-2:]
    below = jnp.arange(rows - 1)[:, None] > jnp.arange(columns)
    return ~(below & tiles[..., 1:, :] & ~tiles[..., :-1, :]).any((-2, -1))


def s2_attention(
    *,
    block_size: int = 64,
    local_blocks: int = 16,
    vert_stride: int = 8,
    head_sliding_step: int | None = None,
    head_sliding_offset: int = 0,
    num_dense_heads: int = 0,
    homo_head: bool = False,
) -> Method:
    """Keeps a window of blocks, and of the older ones every head a share of its own; causal.

    The union over heads is the whole past as long as their residues are as many as `vert_stride`;
    a warning says where they are not. A block that a head has dropped it never needs again
    (`kv_efficient`). Models have to be trained with it, best with some dense layers.

    Args:
      block_size: Tokens per block.
      local_blocks: Blocks of the window, the query's own included; 16 in Phi-3-small.
      vert_stride: One in so many old blocks is kept; 8 in Phi-3-small.
      head_sliding_step: See `sharded_blocks`.
      head_sliding_offset: The residue of the first kv head; ports of Phi-3-small have 1.
      num_dense_heads: Of the last kv heads, how many keep all blocks.
      homo_head: Whether all heads keep the same blocks.

    Differs from the paper:
      The defaults are those of Phi-3-small. Which layers stay dense is the model's to choose.
      Causality inside the diagonal blocks is exact also where the cache is longer than the
      queries, and so are tiles of several blocks; the authors' kernel sees too much in these where
      a pattern is not `kv_efficient`. Attention in both directions is a mask of its own,
      `two_sided_blocks`. A cache keeps all keys, those as well that no head needs again.

    Raises:
      ValueError: if a number is out of range.
    """
    pattern = {
        "block_size": block_size,
        "local_blocks": local_blocks,
        "vert_stride": vert_stride,
        "head_sliding_step": head_sliding_step,
        "head_sliding_offset": head_sliding_offset,
        "num_dense_heads": num_dense_heads,
        "homo_head": homo_head,
    }
    # says what is wrong before there are queries
    sharded_blocks(heads=max(1, num_dense_heads), kv_heads=max(1, num_dense_heads), **pattern)

    def own_mask(queries: Queries) -> Mask:
        heads, kv_heads, offset = queries.heads, queries.kv_heads, queries.offset
        blocks = sharded_blocks(heads=heads, kv_heads=kv_heads, offset=offset, **pattern)
        _warn_of_holes(blocks, vert_stride, homo_head)
        return blocks & causal(offset=offset)

    return masked(own_mask, block_q=min(128, block_size), block_kv=min(128, block_size))


def _warn_of_holes(blocks: ShardedBlocks, vert_stride: int, homo_head: bool) -> None:
    shares = {*blocks.residues}
    if 1 not in blocks.strides and len(shares) < vert_stride and not homo_head:
        warnings.warn(
            f"s2_attention: the heads keep {len(shares)} of {vert_stride} shares of the old "
            "blocks, so that some are seen by none; pass a vert_stride of at most the number of kv "
            "heads, a head_sliding_step that tells them apart, or num_dense_heads=1.",
            stacklevel=2,
        )


def two_sided_blocks(
    *,
    block_size: int,
    local_blocks: tuple[int, int],
    vert_stride: int,
    offset: Int[Array, "*batch"] | int | None = None,
) -> Mask:
    """The pattern for attention in both directions: strides are relative to the query's block.

    Args:
      block_size: Tokens per block.
      local_blocks: Blocks of the window to the left and to the right, the own one counted in each.
      vert_stride: Distance between kept blocks outside the window.
      offset: The key index that query 0 sits at, per sequence; see `js.masks.causal`.

    Raises:
      ValueError: if a number is out of range.
    """
    left, right = local_blocks
    checks.positive(block_size=block_size, left=left, right=right, vert_stride=vert_stride)
    return RelativeBlocks(block_size, left, right, vert_stride, as_int32(offset=offset))
