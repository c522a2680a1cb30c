"""Mean-pooled top-k blocks, in float64 loops."""

import math

import numpy as np


def block_scores(q, k, *, block):
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    group = q.shape[1] // k.shape[1]
    q_blocks, k_blocks = -(-len(q) // block), -(-len(k) // block)
    scores = np.zeros((q.shape[1], q_blocks, k_blocks))
    for h in range(q.shape[1]):
        for i in range(q_blocks):
            for j in range(k_blocks):
                mean_q = q[i * block : (i + 1) * block, h].mean(0)
                mean_k = k[j * block : (j + 1) * block, h // group].mean(0)
                scores[h, i, j] = mean_q @ mean_k / np.sqrt(q.shape[-1])
    return scores


def select(scores, density, *, q_len, kv_len, block, causal=True):
    tiles = np.zeros(scores.shape, bool)
    for h, i in np.ndindex(scores.shape[:2]):
        last_query = min(i * block + block, q_len) - 1 + kv_len - q_len
        seen = [j for j in range(scores.shape[2]) if not causal or j * block <= last_query]
        if not seen:
            continue
        forced = sorted({0, seen[-1]}) if causal else []
        others = sorted((j for j in seen if j not in forced), key=lambda j: -scores[h, i, j])
        count = max(math.ceil(density * len(seen)), len(forced))
        for j in (forced + others)[:count]:
            tiles[h, i, j] = True
    return tiles
