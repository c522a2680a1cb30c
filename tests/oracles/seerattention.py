"""SeerAttention's gate, targets and selection by loops in float64: arXiv:2410.13276."""

import math

import numpy as np


def turn(x, position, base):
    """Halves of a vector paired and turned by a position; a negative one turns back."""
    half = len(x) // 2
    out = np.zeros_like(x)
    for i in range(half):
        turned = complex(x[i], x[i + half]) * np.exp(1j * position * base ** (-i / half))
        out[i], out[i + half] = turned.real, turned.imag
    return out


def pooled(x, weights, pools, block, base, start=0):
    """Gate vectors [blocks, heads, gate_dim] of x [length, heads, dim], which carries positions."""
    x = np.float64(x)
    reduce = {"max": np.max, "min": np.min, "mean": np.mean}
    blocks = math.ceil(len(x) / block)
    out = np.zeros((blocks, x.shape[1], weights.shape[-1]))
    for j, h in np.ndindex(blocks, x.shape[1]):
        places = range(j * block, min((j + 1) * block, len(x)))
        plain = np.stack([turn(x[t, h], -(start + t), base) for t in places])
        found = np.concatenate([reduce[name](plain, axis=0) for name in pools])
        out[j, h] = turn(found @ np.float64(weights[h]), start + j * block, base)
    return out


def gate(q, k, w_q, w_k, *, block, base, q_pools=("mean",), k_pools=("max", "min", "mean")):
    """Logits [heads, q_blocks, kv_blocks], causal, where queries are the last tokens."""
    start, group = len(k) - len(q), q.shape[1] // k.shape[1]
    of_q, of_k = (
        pooled(q, w_q, q_pools, block, base, start), pooled(k, w_k, k_pools, block, base)
    )  # fmt: skip
    logits = np.full((q.shape[1], len(of_q), len(of_k)), -np.inf)
    for h, i, j in np.ndindex(logits.shape):
        last = min((i + 1) * block, len(q)) - 1 + start
        if j * block <= last:
            logits[h, i, j] = of_q[i, h] @ of_k[j, h // group] / math.sqrt(w_q.shape[-1])
    return logits


def targets(q, k, block):
    """Largest causal probability of each tile, rows divided by their sums."""
    q, k = np.float64(q), np.float64(k)
    start, group = len(k) - len(q), q.shape[1] // k.shape[1]
    found = np.zeros((q.shape[1], math.ceil(len(q) / block), math.ceil(len(k) / block)))
    for h, row in np.ndindex(q.shape[1], len(q)):
        logits = k[: start + row + 1, h // group] @ q[row, h] * q.shape[-1] ** -0.5
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        for s, weight in enumerate(weights):
            i, j = row // block, s // block
            found[h, i, j] = max(found[h, i, j], weight)
    return found / found.sum(-1, keepdims=True)


def loss(logits, wanted, skipped):
    """KL of the targets to the gate's softmax, mean over heads and rows that count."""
    total, count = 0.0, 0
    for h, i in np.ndindex(logits.shape[:2]):
        if i < int(skipped * logits.shape[1]):
            continue
        count += 1
        shares = np.exp(logits[h, i] - logits[h, i].max())
        shares /= shares.sum()
        for share, target in zip(shares, wanted[h, i], strict=True):
            total += target * np.log(target / share) if target > 0 else 0.0
    return total / count


def select(logits, *, threshold=None, density=None, dense_rows=2):
    """Kept tiles [heads, q_blocks, kv_blocks]: by threshold, or by density over all columns."""
    keep = np.zeros(logits.shape, bool)
    rows, columns = logits.shape[1:]
    for h, i in np.ndindex(logits.shape[:2]):
        seen = [j for j in range(columns) if logits[h, i, j] > -np.inf]
        if density is not None:
            count = max(1, int((1 - math.sqrt(1 - density)) * columns))
            kept = sorted(seen, key=lambda j: -logits[h, i, j])[:count]
        else:
            shares = np.exp(logits[h, i] - logits[h, i].max())
            shares /= shares.sum()
            kept = [j for j in seen if shares[j] >= threshold]
        kept = seen if i >= rows - dense_rows else [*kept, seen[-1]]
        keep[h, i, kept] = True
    return keep
