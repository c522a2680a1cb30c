"""SeerAttention-R's gate, targets and selection by loops in float64: arXiv:2506.08889."""

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


def normed(x, scale):
    """Divided by its root mean square, and scaled; as it is where there is no scale."""
    if scale is None:
        return x
    return x / math.sqrt(np.mean(x**2) + 1e-6) * np.float64(scale)


def key(k, head, block, end, params, size, base, pools=("max", "min", "mean")):
    """The gate's key of a block of one kv head, of its tokens before `end`."""
    reduce = {"max": np.max, "min": np.min, "mean": np.mean}
    places = range(block * size, min((block + 1) * size, end))
    plain = np.stack([turn(np.float64(k[t, head]), -t, base) for t in places])
    pooled = np.concatenate([reduce[name](plain, axis=0) for name in pools])
    made = normed(pooled @ np.float64(params["k"][head]), params.get("k_norm"))
    return turn(made, block * size, base)


def queries(q, head, group, place, params, kind, base):
    """The gate's queries of a group: one, or with Qorig one for each of its heads."""
    plain = [turn(np.float64(x), -place, base) for x in q[head * group : (head + 1) * group]]
    if kind == "Qproj":
        made = [sum(x @ np.float64(w) for x, w in zip(plain, params["q"][head], strict=True))]
    elif kind == "Qavgproj":
        made = [np.mean(plain, axis=0) @ np.float64(params["q"][head])]
    elif kind == "Qavg":
        made = [np.mean(plain, axis=0)]
    else:
        made = plain
    return [turn(normed(x, params.get("q_norm")), place, base) for x in made]


def gate(q, k, params, *, size, base, kind="Qproj", pools=("max", "min", "mean")):
    """Logits [kv_heads, q_len, kv_blocks], causal, where queries are the last tokens."""
    start, kv_heads = len(k) - len(q), k.shape[1]
    group = q.shape[1] // kv_heads
    logits = np.full((kv_heads, len(q), math.ceil(len(k) / size)), -np.inf)
    for h, i in np.ndindex(kv_heads, len(q)):
        place = start + i
        found = queries(q[i], h, group, place, params, kind, base)
        for j in range(place // size + 1):
            # of the block that the query stands in there is what is not after it
            of_block = key(k, h, j, place + 1, params, size, base, pools)
            scores = [x @ of_block / math.sqrt(len(of_block)) for x in found]
            logits[h, i, j] = sum(scores) / len(scores)
    return logits


def targets(q, k, size):
    """Largest causal probability of each query, group and block, as shares of a query."""
    q, k = np.float64(q), np.float64(k)
    start, kv_heads = len(k) - len(q), k.shape[1]
    group = q.shape[1] // kv_heads
    found = np.zeros((kv_heads, len(q), math.ceil(len(k) / size)))
    for head, i in np.ndindex(q.shape[1], len(q)):
        logits = k[: start + i + 1, head // group] @ q[i, head] * q.shape[-1] ** -0.5
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        for t, weight in enumerate(weights):
            at = head // group, i, t // size
            found[at] = max(found[at], weight)
    return found / (found.sum(-1, keepdims=True) + 1e-9)


def loss(logits, wanted, skipped):
    """KL of the targets to the gate's softmax, mean over kv heads and queries that count."""
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


def select(logits, *, size, token_budget=None, threshold=None):
    """Kept blocks [kv_heads, q_len, kv_blocks]; the last block counts inside a budget."""
    keep = np.zeros(logits.shape, bool)
    for h, i in np.ndindex(logits.shape[:2]):
        seen = [j for j in range(logits.shape[2]) if logits[h, i, j] > -np.inf]
        last = seen.pop()
        if threshold is None:
            kept = sorted(seen, key=lambda j: -logits[h, i, j])[: max(1, token_budget // size) - 1]
        else:
            shares = np.exp(logits[h, i] - logits[h, i].max())
            shares /= shares.sum()
            kept = [j for j in seen if shares[j] >= threshold]
        keep[h, i, [*kept, last]] = True
    return keep
