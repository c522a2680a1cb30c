"""BLASST from the paper, in float64 loops."""

import math

import numpy as np


def attend(q, k, v, threshold, *, block_q, block_kv, causal=True, scale=None):
    """Output, log-sum-exp and kept[head, I, J] for q [q_len, heads, dim], k [kv_len, kv_heads, ..].

    The running softmax of section 3, tile by tile and keys upwards, a threshold per head.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (q_len, heads, dim), kv_len = q.shape, k.shape[0]
    group = heads // k.shape[1]
    scale = dim**-0.5 if scale is None else scale
    out, lse = np.zeros((q_len, heads, v.shape[-1])), np.full((heads, q_len), -np.inf)
    kept = np.zeros((heads, -(-q_len // block_q), -(-kv_len // block_kv)), bool)
    for h in range(heads):
        limit = np.broadcast_to(threshold, (heads,))[h]
        for i in range(kept.shape[1]):
            rows = range(i * block_q, min((i + 1) * block_q, q_len))
            peak = {r: -math.inf for r in rows}
            total = {r: 0.0 for r in rows}
            acc = {r: np.zeros(v.shape[-1]) for r in rows}
            for j in range(kept.shape[2]):
                tile = {}
                for r in rows:
                    last = r + kv_len - q_len if causal else kv_len - 1
                    columns = range(j * block_kv, min((j + 1) * block_kv, kv_len, last + 1))
                    tile[r] = {c: scale * q[r, h] @ k[c, h // group] for c in columns}
                seen = [r for r in rows if tile[r]]
                # a row's say: exp(tile max - running max) < lambda; a row's first tile has no max
                if all(math.exp(max(tile[r].values()) - peak[r]) < limit
                       if peak[r] > -math.inf else False for r in seen):  # fmt: skip
                    continue
                kept[h, i, j] = True
                for r in seen:
                    new = max(peak[r], *tile[r].values())
                    shrink = math.exp(peak[r] - new)
                    weights = {c: math.exp(s - new) for c, s in tile[r].items()}
                    total[r] = total[r] * shrink + sum(weights.values())
                    acc[r] = acc[r] * shrink + sum(w * v[c, h // group] for c, w in weights.items())
                    peak[r] = new
            for r in rows:
                if total[r]:
                    out[r, h] = acc[r] / total[r]
                    lse[h, r] = peak[r] + math.log(total[r])
    return out, lse, kept


def sparsity(q, k, threshold, *, block_q, block_kv):
    """Skipped over causal tiles, per head, of queries and keys that are the same tokens."""
    kept = attend(q, k, np.zeros((*k.shape[:-1], 1)), threshold, block_q=block_q, block_kv=block_kv)
    length, tiles = len(q), 0
    for i in range(-(-length // block_q)):
        last = min((i + 1) * block_q, length) - 1
        tiles += last // block_kv + 1
    return 1 - kept[2].sum((1, 2)) / tiles
