"""Mixture of block attention by loops in float64: arXiv:2502.13189 and arXiv:2511.11571."""

import math

import numpy as np


def convolve(k, weights):
    """Keys [length, heads, dim] with what a causal convolution makes of them added."""
    k, weights = np.float64(k), np.float64(weights)
    out = np.zeros_like(k)
    for t in range(len(k)):
        inside = sum(weights[u] * k[t - u] for u in range(len(weights)) if t >= u)
        out[t] = k[t] + inside / (1 + np.exp(-inside))
    return out


def gates(q, k, block):
    """Products of each query and head with the mean key of each block: [heads, q_len, blocks]."""
    q, k = np.float64(q), np.float64(k)
    blocks, group = math.ceil(len(k) / block), q.shape[1] // k.shape[1]
    found = np.zeros((q.shape[1], len(q), blocks))
    for h, t, j in np.ndindex(found.shape):
        found[h, t, j] = q[t, h] @ k[j * block : (j + 1) * block, h // group].mean(0)
    return found


def select(scores, kv_len, block, top_k, causal=True):
    """The chosen blocks of (head, query), ascending."""
    chosen = {}
    heads, q_len, blocks = scores.shape
    for h, row in np.ndindex(heads, q_len):
        own = (row + kv_len - q_len) // block
        free = [j for j in range(own)] if causal else list(range(blocks))
        ranked = sorted(free, key=lambda j: -scores[h, row, j])
        forced = [own] if causal else []
        chosen[h, row] = sorted([*forced, *ranked[: top_k - len(forced)]])
    return chosen


def attention(q, k, v, chosen, block, causal=True):
    """Softmax over the tokens of the chosen blocks: (out [q_len, heads, v_dim], lse by block)."""
    q, k, v = map(np.float64, (q, k, v))
    group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    out, lse = np.zeros((len(q), q.shape[1], v.shape[-1])), {}
    for (h, row), blocks in chosen.items():
        t = row + len(k) - len(q)
        tokens = []
        for j in blocks:
            of_block = [s for s in range(j * block, min((j + 1) * block, len(k)))]
            of_block = [s for s in of_block if s <= t or not causal]
            logits = scale * k[of_block, h // group] @ q[row, h]
            lse[h, row, j] = np.log(np.exp(logits).sum())
            tokens += of_block
        logits = scale * k[tokens, h // group] @ q[row, h]
        weights = np.exp(logits - logits.max())
        out[row, h] = weights @ v[tokens, h // group] / weights.sum()
    return out, lse


def pairwise_failure(dim, block, gap, related, gain, trials, seed=0):
    """How often a block of noise outranks the one with a query's key, by simulation."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(trials, 2, block)) / math.sqrt(dim)
    noise[:, 0, 0] += gap
    noise[:, 0, 1:related] += gain
    signal, other = noise.mean(-1).T
    return (other > signal).mean()
