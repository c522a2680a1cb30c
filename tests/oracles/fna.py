"""Neighborhood attention in its gathered form: each query and its list of neighbors."""

import math

import numpy as np


def neighbors(i, *, length, window, dilation=1, is_causal=False):
    """The keys of query i along one axis."""
    residue, place = i % dilation, i // dilation
    of_class = math.ceil((length - residue) / dilation)
    if is_causal:
        start, end = max(place - window + 1, 0), place + 1
    else:
        start = min(max(place - window // 2, 0), of_class - window)
        end = start + window
    return [residue + dilation * j for j in range(start, end)]


def neighborhood(query, grid, window, dilation, is_causal):
    """The tokens that a token sees; all arguments per axis."""
    at = np.unravel_index(query, grid)
    per_axis = [
        neighbors(i, length=n, window=w, dilation=d, is_causal=c)
        for i, n, w, d, c in zip(at, grid, window, dilation, is_causal, strict=True)
    ]
    tokens = np.arange(math.prod(grid)).reshape(grid)
    return tokens[np.ix_(*per_axis)].reshape(-1).tolist()


def offset(query, key, grid, window, dilation):
    """Where a table of relative positions has a key's entry: its offset in its class, from 0 up."""
    at = zip(np.unravel_index(query, grid), np.unravel_index(key, grid), strict=True)
    return [int(j // d - i // d + w - 1) for (i, j), w, d in zip(at, window, dilation, strict=True)]


def attention(q, k, v, grid, window, dilation, is_causal, scale, table=None):
    """out [tokens, heads, dim], lse [heads, tokens] and the weights [heads, tokens, tokens].

    `table` [heads, 2 * window - 1, ...] is added to logits by the distance of key and query.
    """
    tokens, heads, _ = q.shape
    group = heads // k.shape[1]
    out = np.zeros((tokens, heads, v.shape[-1]))
    lse = np.zeros((heads, tokens))
    weights = np.zeros((heads, tokens, tokens))
    for i in range(tokens):
        keys = neighborhood(i, grid, window, dilation, is_causal)
        for h in range(heads):
            logits = [scale * float(np.dot(q[i, h], k[j, h // group])) for j in keys]
            if table is not None:
                places = [offset(i, j, grid, window, dilation) for j in keys]
                logits = [x + table[(h, *at)] for x, at in zip(logits, places, strict=True)]
            lse[h, i] = math.log(sum(math.exp(x - max(logits)) for x in logits)) + max(logits)
            for j, x in zip(keys, logits, strict=True):
                weights[h, i, j] = math.exp(x - lse[h, i])
                out[i, h] += weights[h, i, j] * v[j, h // group]
    return out, lse, weights


def queries_of_key(j, *, length, window, is_causal=False):
    """First query that sees key j, and the one after the last."""
    if is_causal:
        return j, min(j + window, length)
    right = window // 2 + window % 2 - 1
    first = j - right if j >= window else 0
    return first, length if j >= length - window else j + window // 2 + 1
