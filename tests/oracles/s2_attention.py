"""Heterogeneous context sharding, head by head and block by block."""

import numpy as np


def blocks(
    count,
    *,
    heads,
    kv_heads,
    local_blocks,
    vert_stride,
    step=None,
    head_offset=0,
    num_dense_heads=0,
    homo_head=False,
):
    """bool [heads, count, count]."""
    step = max(1, vert_stride // heads) if step is None else step
    kept = np.zeros((heads, count, count), bool)
    for h in range(heads):
        kv_head = h // (heads // kv_heads)
        shift = 0 if homo_head else kv_head
        for i in range(count):
            for j in range(i + 1):
                vertical = (j + shift * step + head_offset) % vert_stride == 0
                vertical = vertical or kv_head >= kv_heads - num_dense_heads
                kept[h, i, j] = vertical or i - j < local_blocks
    return kept


def row_length(i, *, local_blocks, vert_stride, residue):
    """Blocks that row i keeps, by the closed form."""
    older = sum((j + residue) % vert_stride == 0 for j in range(max(0, i - local_blocks + 1)))
    return min(local_blocks, i + 1) + older


def two_sided(count, *, left, right, vert_stride):
    kept = np.zeros((count, count), bool)
    for i in range(count):
        for j in range(count):
            beyond = max(i - j - left + 1, 0) + max(j - i - right + 1, 0)
            kept[i, j] = beyond % vert_stride == 0
    return kept


def pairs(q_len, kv_len, *, block_size, **settings):
    tiles = blocks(-(-kv_len // block_size), **settings)
    seen = np.zeros((len(tiles), q_len, kv_len), bool)
    for i in range(q_len):
        position = i + kv_len - q_len
        for j in range(position + 1):
            seen[:, i, j] = tiles[:, position // block_size, j // block_size]
    return seen
