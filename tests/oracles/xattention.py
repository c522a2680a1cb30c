"""XAttention from the paper, in float64 loops."""

import numpy as np


def block_scores(q, k, *, stride, block, norm=1.0, causal=True):
    """A[head, I, J] for q [q_len, heads, dim], k [kv_len, kv_heads, dim]."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    (q_len, heads, dim), kv_len = q.shape, k.shape[0]
    group = heads // k.shape[1]
    q_cells, k_cells = -(-q_len // stride), -(-kv_len // stride)
    q_blocks, k_blocks = -(-q_len // block), -(-kv_len // block)
    per = block // stride
    scores = np.zeros((heads, q_blocks, k_blocks))
    for h in range(heads):
        for i in range(q_cells):
            row = np.full(k_cells, -np.inf)
            for j in range(k_cells):
                last_query = min(i * stride + stride, q_len) - 1 + kv_len - q_len
                if causal and j * stride > last_query:
                    continue
                total = 0.0
                for s in range(stride):
                    a, b = i * stride + stride - 1 - s, j * stride + s
                    if a < q_len and b < kv_len:
                        total += q[a, h] @ k[b, h // group]
                row[j] = total / (np.sqrt(dim) * stride * norm)
            probs = np.exp(row - row.max())
            probs /= probs.sum()
            for j in range(k_cells):
                scores[h, i // per, j // per] += probs[j]
    return scores


def select(scores, threshold, *, q_len, kv_len, block, causal=True):
    """Tiles[head, I, J]: forced blocks first, then by falling mass while below the threshold."""
    heads, q_blocks, k_blocks = scores.shape
    tiles = np.zeros(scores.shape, bool)
    for h in range(heads):
        tau = np.broadcast_to(threshold, (heads,))[h]
        for i in range(q_blocks):
            last_query = min(i * block + block, q_len) - 1 + kv_len - q_len
            seen = [j for j in range(k_blocks) if not causal or j * block <= last_query]
            if not seen:
                continue
            forced = sorted({0, seen[-1]}) if causal else []
            others = sorted((j for j in seen if j not in forced), key=lambda j: -scores[h, i, j])
            need = tau * sum(scores[h, i, j] for j in seen)
            taken = 0.0
            for j in forced:
                tiles[h, i, j] = True
                taken += scores[h, i, j]
            for place, j in enumerate(others):
                if taken >= need and not (place == 0 and not forced) and tau < 1:
                    break
                tiles[h, i, j] = True
                taken += scores[h, i, j]
    return tiles
