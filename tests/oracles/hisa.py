"""The lightning indexer, its two stages and its loss by loops in float64: arXiv:2603.28458."""

import math

import numpy as np


def rotate(x, position, base):
    """Halves of a vector paired and turned by its position."""
    half = len(x) // 2
    out = x.copy()
    for i in range(half):
        turned = complex(x[i], x[i + half]) * np.exp(1j * position * base ** (-i / half))
        out[i], out[i + half] = turned.real, turned.imag
    return out


def index(x, params, heads, dim, rotary_dim, base, q_latent=None):
    """Queries [length, heads, dim], weights [length, heads] and keys [length, dim].

    Queries are made of `q_latent`, where there is none of `x`.
    """
    x = np.float64(x)
    q_latent = x if q_latent is None else np.float64(q_latent)
    p = {name: np.float64(value) for name, value in params.items()}
    q, weights, k = (
        np.zeros((len(x), heads, dim)),
        np.zeros((len(x), heads)),
        np.zeros((len(x), dim)),
    )
    for t in range(len(x)):
        raw = x[t] @ p["k"]
        normal = (raw - raw.mean()) / np.sqrt(raw.var() + 1e-6)
        k[t] = normal * p["k_scale"] + p["k_bias"]
        q[t] = (q_latent[t] @ p["q"]).reshape(heads, dim)
        weights[t] = x[t] @ p["weights"] / math.sqrt(heads * dim)
        k[t, :rotary_dim] = rotate(k[t, :rotary_dim], t, base)
        for h in range(heads):
            q[t, h, :rotary_dim] = rotate(q[t, h, :rotary_dim], t, base)
    return q, weights, k


def scores(q, weights, k):
    """Index scores [q_len, kv_len]."""
    found = np.zeros((len(q), len(k)))
    for t, s in np.ndindex(found.shape):
        found[t, s] = weights[t] @ np.maximum(q[t] @ k[s], 0)
    return found


def best(values, candidates, count):
    """The best of some candidates, ties to the lower one, ascending."""
    return sorted(sorted(candidates, key=lambda j: (-values[j], j))[:count])


def select(q, weights, k, *, top_k, block, block_top_k, starts=None, means=None):
    """The tokens of each query, causal; `block_top_k` None looks at all.

    `starts` are the first tokens that queries see, where it is not the first of all; `means` what
    blocks are chosen by, where it is not the mean of their keys.
    """
    kv_len = len(k)
    blocks = math.ceil(kv_len / block)
    if means is None:
        means = np.stack([k[j * block : (j + 1) * block].mean(0) for j in range(blocks)])
    fine, coarse = scores(q, weights, k), scores(q, weights, means)
    chosen = []
    for row in range(len(q)):
        t = row + kv_len - len(q)
        start = 0 if starts is None else starts[row]
        candidates = range(start, t + 1)
        if block_top_k is not None:
            own, first = t // block, start // block
            forced = sorted({first, own})
            rest = best(coarse[row], range(first + 1, own), block_top_k)
            kept = [*forced, *rest]
            if len(kept) > block_top_k:
                free = range(first + 1, own)
                kept = [*forced, *best(coarse[row], free, block_top_k - len(forced))]
            candidates = [s for s in candidates if s // block in kept]
        chosen.append(best(fine[row], list(candidates), top_k))
    return chosen


def loss(
    q, weights, k, queries, keys, chosen, sees=lambda head, row, token: True, cap=None, sinks=None
):
    """KL of true attention, over the chosen tokens, to the indexer's softmax: mean over queries.

    Heads attend to those of the tokens that they see, with capped logits where there is a cap; a
    sink is one more logit in a head's softmax, of which nothing else becomes.
    """
    index_scores = scores(q, weights, k)
    queries, keys = np.float64(queries), np.float64(keys)
    group, total = queries.shape[1] // keys.shape[1], 0.0
    for row, tokens in enumerate(chosen):
        target = np.zeros(len(tokens))
        for h in range(queries.shape[1]):
            own = [n for n, token in enumerate(tokens) if sees(h, row, token)]
            logits = keys[np.array(tokens)[own], h // group] @ queries[row, h]
            logits = logits * queries.shape[-1] ** -0.5
            weights_ = np.exp(logits if cap is None else cap * np.tanh(logits / cap))
            sink = 0.0 if sinks is None else math.exp(sinks[h])
            if own:
                target[own] += weights_ / (weights_.sum() + sink)
        target /= target.sum()
        shares = np.exp(index_scores[row, tokens] - index_scores[row, tokens].max())
        shares /= shares.sum()
        some = target > 0
        total += (target[some] * np.log(target[some] / shares[some])).sum()
    return total / len(chosen)
