"""Power-of-two block distances, row by row, and what is reached over layers."""

import numpy as np


def kept_blocks(row, *, window_size=5, num_sink_blocks=1):
    """The block ids that one block row keeps, as algorithm 1 lists them."""
    kept = set(range(max(0, row - window_size + 1), row + 1))
    kept |= {block for block in range(num_sink_blocks) if block <= row}
    power = 1
    while power <= row:
        kept.add(row - power)
        power *= 2
    return kept


def blocks(count, **settings):
    tiles = np.zeros((count, count), bool)
    for row in range(count):
        for column in kept_blocks(row, **settings):
            tiles[row, column] = True
    return tiles


def pairs(q_len, kv_len, *, block_size, **settings):
    seen = np.zeros((q_len, kv_len), bool)
    for i in range(q_len):
        position = i + kv_len - q_len
        kept = kept_blocks(position // block_size, **settings)
        for j in range(position + 1):
            seen[i, j] = j // block_size in kept
    return seen


def reached(tiles, hops):
    """Blocks that the last row reaches in exactly `hops` steps along the tiles."""
    front = {len(tiles) - 1}
    for _ in range(hops):
        front = {int(j) for i in front for j in np.flatnonzero(tiles[i])}
    return front


def window_and_sink(count, *, window, sink=1):
    tiles = np.zeros((count, count), bool)
    for i in range(count):
        for j in range(i + 1):
            tiles[i, j] = i - j < window or j < sink
    return tiles


def stride_slash(count, *, window, stride, sink=1):
    tiles = np.zeros((count, count), bool)
    for i in range(count):
        for j in range(i + 1):
            tiles[i, j] = i - j < window or (i - j) % stride == 0 or j < sink
    return tiles


def dilated(count, *, window, dilation):
    """`window` blocks `dilation` apart, its reach being `window` blocks."""
    tiles = np.zeros((count, count), bool)
    for i in range(count):
        for j in range(i + 1):
            tiles[i, j] = (i - j) % dilation == 0 and i - j < window
    return tiles


def longnet(count):
    """Segments of 8, 16, ..., 128 blocks, of which every 1st, 2nd, ..., 16th is left."""
    tiles = np.zeros((count, count), bool)
    for i in range(count):
        for j in range(i + 1):
            for power in range(5):
                same_segment = (i ^ j) < 8 << power
                tiles[i, j] |= same_segment and (i | j) % (1 << power) == 0
    return tiles
