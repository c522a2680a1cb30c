"""Routing Transformer by loops in float64: arXiv:2003.05997."""

import math

import numpy as np


def layer_norm(x):
    """Vectors less their mean over their deviation, without scale or bias."""
    x = np.float64(x)
    out = np.zeros_like(x)
    for at in np.ndindex(x.shape[:-1]):
        mean = sum(x[at]) / x.shape[-1]
        deviation = math.sqrt(sum((n - mean) ** 2 for n in x[at]) / x.shape[-1] + 1e-6)
        out[at] = [(n - mean) / deviation for n in x[at]]
    return out


def l2_norm(x):
    """Vectors over their length."""
    x = np.float64(x)
    out = np.zeros_like(x)
    for at in np.ndindex(x.shape[:-1]):
        length = math.sqrt(sum(n * n for n in x[at]))
        out[at] = x[at] / length if length else 0.0
    return out


def scores(x, means):
    """Products of tokens [length, heads, dim] with centroids: [heads, length, clusters]."""
    found = np.zeros((x.shape[1], len(x), means.shape[1]))
    for h, t, c in np.ndindex(found.shape):
        found[h, t, c] = np.float64(x[t, h]) @ np.float64(means[h, c])
    return found


def balanced(score, window, exists=None):
    """members[head][cluster]: the `window` tokens that score most, ascending."""
    heads, length, clusters = score.shape
    tokens = range(length if exists is None else exists)
    return [
        [sorted(sorted(tokens, key=lambda t: -score[h, t, c])[:window]) for c in range(clusters)]
        for h in range(heads)
    ]


def closest(score):
    """The cluster of each token: [heads, length]."""
    return np.array(
        [[max(range(len(row)), key=lambda c: row[c]) for row in head] for head in score]
    )


def own(score, exists=None):
    """members[head][cluster]: the tokens to which no other cluster is closer, ascending."""
    ids = closest(score)[:, :exists]
    return [
        [[t for t in range(len(of_head)) if of_head[t] == c] for c in range(score.shape[-1])]
        for of_head in ids
    ]


def queries_of(members, start, q_len):
    """Queries in the clusters of their own keys."""
    return [
        [[t - start for t in tokens if 0 <= t - start < q_len] for tokens in head]
        for head in members
    ]


def attention(
    q,
    k,
    v,
    q_members,
    kv_members,
    *,
    causal,
    scale=None,
    by_rank=False,
    self_logit=None,
    memory=None,
    count_eps=None,
):
    """(out, lse, counts): mean over each query's clusters, lse over all that it met there.

    Members of queries are per query head or per kv head, those of keys per kv head; `memory` is
    (k, v) [kv_heads, clusters, num_memory, dim].
    """
    q, k, v = map(np.float64, (q, k, v))
    (q_len, heads, dim), (kv_len, kv_heads, v_dim) = q.shape, v.shape
    scale, start = dim**-0.5 if scale is None else scale, kv_len - q_len
    out, counts = np.zeros((q_len, heads, v_dim)), np.zeros((heads, q_len))
    lse = np.full((heads, q_len), -np.inf)
    for h in range(heads):
        g = h // (heads // kv_heads)
        queries = q_members[h // (heads // len(q_members))]
        for c, (rows, columns) in enumerate(zip(queries, kv_members[g], strict=True)):
            for rank, i in enumerate(rows):
                counts[h, i] += 1
                logits, values = [], []
                for other, j in enumerate(columns):
                    if causal and j > i + start or by_rank and other > rank:
                        continue
                    alone = self_logit is not None and i + start == j
                    logits.append(self_logit if alone else scale * q[i, h] @ k[j, g])
                    values.append(v[j, g])
                for m in range(0 if memory is None else memory[0].shape[2]):
                    logits.append(scale * q[i, h] @ np.float64(memory[0][g, c, m]))
                    values.append(np.float64(memory[1][g, c, m]))
                if logits:
                    peak = max(logits)
                    weights = np.exp(np.array(logits) - peak)
                    out[i, h] += weights @ np.array(values) / weights.sum()
                    lse[h, i] = np.logaddexp(lse[h, i], peak + math.log(weights.sum()))
    below = np.maximum(counts, 1) if count_eps is None else counts + count_eps
    return out / below.T[..., None], lse, counts


def local_members(length, block, flange):
    """Tokens of each block, and of the blocks around it, as members of one head."""
    blocks = range(math.ceil(length / block))
    queries = [list(range(b * block, min((b + 1) * block, length))) for b in blocks]
    keys = [
        list(range(max(b - flange, 0) * block, min((b + 1 + flange) * block, length)))
        for b in blocks
    ]
    return queries, keys


def tally(x, means):
    """How many tokens are closest to each centroid, and their sum; zeros are padding."""
    counts, sums = np.zeros(means.shape[:2]), np.zeros(means.shape)
    ids = closest(scores(x, means))
    for h, t in np.ndindex(ids.shape):
        if np.any(x[t, h]):
            counts[h, ids[h, t]] += 1
            sums[h, ids[h, t]] += np.float64(x[t, h])
    return counts, sums


def commitment(x, means):
    """Mean square of tokens less their closest centroids, over all numbers."""
    ids = closest(scores(x, means))
    each = [(np.float64(x[t, h]) - means[h, ids[h, t]]) ** 2 for h, t in np.ndindex(ids.shape)]
    return np.mean(each)


def spherical_step(means, counts, sums, decay):
    """Means moved towards directions of sums; those without tokens stay."""
    out = np.float64(means).copy()
    for at in np.ndindex(counts.shape):
        if counts[at]:
            direction = sums[at] / math.sqrt(sums[at] @ sums[at])
            out[at] = decay * out[at] + (1 - decay) * direction
    return out


def counted_step(old_counts, old_sums, counts, sums, decay, smoothing=1e-5):
    """(means, counts, sums) after one step of the authors' rule."""
    n = decay * np.float64(old_counts) + (1 - decay) * counts
    m = decay * np.float64(old_sums) + (1 - decay) * sums
    means = np.zeros_like(m)
    for h in range(len(n)):
        total = sum(n[h])
        for c in range(len(n[h])):
            smooth = (n[h, c] + smoothing) / (total + len(n[h]) * smoothing) * total
            means[h, c] = m[h, c] / smooth
    return means, n, m
