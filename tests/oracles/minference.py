"""MInference from the paper and the authors' index builder, in float64 loops."""

import numpy as np


def probabilities(q, k, *, last_q):
    """Softmax of the last queries, [heads, last_q, kv_len], and the key that each stands at."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    (q_len, heads, dim), kv_len = q.shape, k.shape[0]
    group = heads // k.shape[1]
    rows = range(q_len - min(last_q, q_len), q_len)
    probs = np.zeros((heads, len(rows), kv_len))
    for h in range(heads):
        for r, i in enumerate(rows):
            own = i + kv_len - q_len
            logits = np.array([q[i, h] @ k[j, h // group] / np.sqrt(dim) for j in range(own + 1)])
            mass = np.exp(logits - logits.max())
            probs[h, r, : own + 1] = mass / mass.sum()
    return probs, [i + kv_len - q_len for i in rows]


def scores(q, k, *, last_q):
    """vert[head, j] and slash[head, d]."""
    probs, own = probabilities(q, k, last_q=last_q)
    heads, rows, kv_len = probs.shape
    vertical, slash = np.zeros((heads, kv_len)), np.zeros((heads, kv_len))
    for h in range(heads):
        for r in range(rows):
            for j in range(own[r] + 1):
                vertical[h, j] += probs[h, r, j]
                slash[h, own[r] - j] += probs[h, r, j]
    return vertical, slash


def best(row, size, *, fewest, forced):
    """The `size` best of a row, at least `fewest`; the first `forced` before all others."""
    size = min(len(row), max(size, fewest))
    ranked = sorted(range(len(row)), key=lambda n: (n >= forced, 0 if n < forced else -row[n], n))
    return set(ranked[:size])


def official_index(columns, distances, tile, block):
    """Offsets of blocks and single columns of one row of tiles, as the authors merge them."""
    end = (tile + 1) * block
    ranges = []
    for d in sorted(distances, reverse=True):
        if d >= end:
            continue
        high = max(end - d, block)
        if not ranges or high > ranges[-1][1] + block:
            ranges.append([high - block, high])
        elif high > ranges[-1][1]:
            ranges[-1][1] += block
    offsets = [o for low, high in ranges for o in range(low, high, block)]
    kept = [
        v
        for v in sorted(columns)
        if any(v < low for low, _ in ranges) and not any(a <= v < b for a, b in ranges)
    ]
    return offsets, kept


def official_pairs(columns, distances, length, block):
    """How often the authors' kernel attends to each causal pair, [length, length]."""
    pairs = np.zeros((length, length), int)
    for tile in range(-(-length // block)):
        offsets, kept = official_index(columns, distances, tile, block)
        for i in range(tile * block, min((tile + 1) * block, length)):
            for offset in offsets:
                for j in range(offset, min(offset + block, i + 1)):
                    pairs[i, j] += 1
            for j in kept:
                pairs[i, j] += 1
    return pairs


def wanted_pairs(columns, distances, length, block):
    """Causal pairs in a column, or among the keys that a row of tiles reaches at a distance."""
    pairs = np.zeros((length, length), bool)
    for i in range(length):
        start = i // block * block
        for j in range(i + 1):
            pairs[i, j] = j in columns or any(start - d <= j < start - d + block for d in distances)
    return pairs


def aligned_pairs(columns, distances, q_len, kv_len, block):
    """Which causal pairs lie in tiles that a distance goes through, or in a column."""
    pairs = np.zeros((q_len, kv_len), bool)
    shift = kv_len - q_len
    for i in range(q_len):
        first = i // block * block
        for j in range(i + shift + 1):
            # is some distance found between a row of this tile, were it whole, and one of its keys?
            low = first + shift - (j // block * block + block - 1)
            high = first + block - 1 + shift - j // block * block
            pairs[i, j] = j in columns or any(low <= d <= high for d in distances)
    return pairs


def a_shape_pairs(n_init, n_local, q_len, kv_len):
    """The first keys and a window."""
    pairs = np.zeros((q_len, kv_len), bool)
    for i in range(q_len):
        own = i + kv_len - q_len
        for j in range(own + 1):
            pairs[i, j] = own - j < n_local or j < n_init
    return pairs


def block_sparse_pairs(q, k, head, *, top_k, block):
    """Causal pairs in the tiles of one head with the best products of means."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    (q_len, heads, _), kv_len = q.shape, k.shape[0]
    kv_head = head // (heads // k.shape[1])
    pairs = np.zeros((q_len, kv_len), bool)
    for first in range(0, q_len, block):
        rows = range(first, min(first + block, q_len))
        reached = rows[-1] + kv_len - q_len
        found = []
        for start in range(0, reached + 1, block):
            keys = range(start, min(start + block, kv_len))
            product = q[list(rows), head].mean(0) @ k[list(keys), kv_head].mean(0)
            found.append((-product, start))
        for _, start in sorted(found)[:top_k]:
            for i in rows:
                for j in range(start, min(start + block, i + kv_len - q_len + 1)):
                    pairs[i, j] = True
    return pairs


def attention(q, k, v, pairs):
    """Softmax attention over the causal `pairs[head][i, j]`, [q_len, heads, v_dim]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (q_len, heads, dim), group = q.shape, q.shape[1] // k.shape[1]
    out = np.zeros((q_len, heads, v.shape[-1]))
    for h in range(heads):
        for i in range(q_len):
            keys = np.flatnonzero(pairs[h][i])
            if len(keys):
                logits = k[keys, h // group] @ q[i, h] / np.sqrt(dim)
                mass = np.exp(logits - logits.max())
                out[i, h] = mass @ v[keys, h // group] / mass.sum()
    return out
