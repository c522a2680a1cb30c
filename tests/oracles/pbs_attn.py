"""PBS-Attn from the paper, in float64 loops. `visible[i, j]` says whether query i may see key j."""

import math

import numpy as np


def weights(q, k, *, block, segment, visible):
    """w[head, j] over the keys of complete segments: mean attention of the last queries."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    (q_len, heads, dim), (kv_len, kv_heads, _) = q.shape, k.shape
    length = kv_len // segment * segment
    last = range(max(0, q_len - block), q_len)
    w = np.zeros((heads, length))
    for h in range(heads):
        for i in last:
            seen = [j for j in range(length) if visible[i, j]]
            logits = {j: q[i, h] @ k[j, h // (heads // kv_heads)] / math.sqrt(dim) for j in seen}
            total = sum(math.exp(x) for x in logits.values())
            for j in seen:
                w[h, j] += math.exp(logits[j]) / total / len(last)
    return w


def orders(w, *, segment, kv_len):
    """order[head, n]: the original key that comes to stand at n."""
    order = np.tile(np.arange(kv_len), (len(w), 1))
    for h in range(len(w)):
        for start in range(0, w.shape[1], segment):
            tokens = range(start, start + segment)
            order[h, start : start + segment] = sorted(tokens, key=lambda j: -w[h, j])
    return order


def block_scores(q, k, order, *, block, segment, visible):
    """s[head, I, J] and what a row may choose from, and what it keeps whatever the scores."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    (q_len, heads, dim), (kv_len, kv_heads, _) = q.shape, k.shape
    q_blocks, k_blocks = -(-q_len // block), -(-kv_len // block)
    scores = np.zeros((heads, q_blocks, k_blocks))
    chosen_from, kept = np.zeros_like(scores, bool), np.zeros_like(scores, bool)
    for h in range(heads):
        for i in range(q_blocks):
            rows = range(i * block, min(i * block + block, q_len))
            own = {(r + kv_len - q_len) // segment for r in rows}
            logits = {}
            for j in range(k_blocks):
                tokens = order[h, j * block : j * block + block]
                if not any(visible[r, t] for r in rows for t in tokens):
                    continue
                if j * block // segment in own:
                    kept[h, i, j] = True
                    continue
                qb = np.mean([q[r, h] for r in rows], axis=0)
                kb = np.mean([k[t, h // (heads // kv_heads)] for t in tokens], axis=0)
                logits[j] = qb @ kb / math.sqrt(dim)
                kept[h, i, j] = 0 in tokens
            total = sum(math.exp(x) for x in logits.values())
            for j, x in logits.items():
                chosen_from[h, i, j], scores[h, i, j] = True, math.exp(x) / total
    return scores, chosen_from, kept


def select(scores, chosen_from, kept, threshold):
    """Tiles[head, I, J]: the shortest prefix by falling score that reaches the threshold."""
    tiles = kept.copy()
    for h, i in np.ndindex(scores.shape[:2]):
        tau = np.broadcast_to(threshold, len(scores))[h]
        taken = 0.0
        for j in sorted(np.flatnonzero(chosen_from[h, i]), key=lambda j: -scores[h, i, j]):
            tiles[h, i, j] = True
            taken += scores[h, i, j]
            if taken >= tau and tau < 1:
                break
    return tiles


def attention(q, k, v, order, tiles, *, block, visible):
    """The output over the pairs that are visible and in a tile."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (q_len, heads, dim), (kv_len, kv_heads, v_dim) = q.shape, v.shape
    out = np.zeros((q_len, heads, v_dim))
    for h in range(heads):
        group = h // (heads // kv_heads)
        for i in range(q_len):
            seen = [
                order[h, n]
                for n in range(kv_len)
                if tiles[h, i // block, n // block] and visible[i, order[h, n]]
            ]
            if seen:
                p = np.exp([q[i, h] @ k[j, group] / math.sqrt(dim) for j in seen])
                out[i, h] = sum(a * v[j, group] for a, j in zip(p / p.sum(), seen, strict=True))
    return out
