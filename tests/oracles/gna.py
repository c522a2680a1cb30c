"""Generalized neighborhood attention, axis by axis and pair by pair."""

import math

import numpy as np


def span(i, *, length, window, stride=1, is_causal=False):
    """First key of query i's window, and the one after its last; no dilation."""
    if is_causal:
        leader = min(i // stride * stride + stride - 1, length - 1)
        return max(leader - window + 1, 0), min(i + 1, length)
    leader = min(i // stride * stride + stride // 2, length - 1)
    start = min(max(leader - window // 2, 0), length - window)
    return start, start + window


def axis_pairs(length, *, window, stride=1, dilation=1, is_causal=False):
    """bool [length, length]."""
    seen = np.zeros((length, length), bool)
    for i in range(length):
        residue = i % dilation
        of_class = len(range(residue, length, dilation))
        start, end = span(
            i // dilation, length=of_class, window=window, stride=stride, is_causal=is_causal
        )
        for j in range(residue, length, dilation):
            seen[i, j] = start <= j // dilation < end
    return seen


def pairs(grid, *, window, stride=1, dilation=1, is_causal=False):
    """bool [tokens, tokens]: the AND over axes."""
    per_axis = [
        x if isinstance(x, tuple) else (x,) * len(grid)
        for x in (window, stride, dilation, is_causal)
    ]
    seen = np.ones((1, 1), bool)
    for length, w, s, d, c in zip(grid, *per_axis, strict=True):
        of_axis = axis_pairs(length, window=w, stride=s, dilation=d, is_causal=c)
        seen = np.kron(seen, of_axis)
    return seen.astype(bool)


def attention(q, k, v, seen, scale):
    """out [tokens, heads, dim] and lse [heads, tokens]; k and v may have fewer heads."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    out = np.zeros((len(q), heads, v.shape[-1]))
    lse = np.zeros((heads, len(q)))
    for i in range(len(q)):
        keys = np.flatnonzero(seen[i])
        for h in range(heads):
            logits = scale * k[keys, h // group].astype(float) @ q[i, h].astype(float)
            lse[h, i] = math.log(np.exp(logits - logits.max()).sum()) + logits.max()
            out[i, h] = np.exp(logits - lse[h, i]) @ v[keys, h // group].astype(float)
    return out, lse


def order(grid, tile, dilation):
    """Original token at each place, -1 for places that were added."""
    rest = [-(-n // (t * d)) for n, t, d in zip(grid, tile, dilation, strict=True)]
    found = []
    for residue in np.ndindex(*dilation):
        for block in np.ndindex(*rest):
            for place in np.ndindex(*tile):
                at = [
                    (b * t + p) * d + r
                    for b, t, p, d, r in zip(block, tile, place, dilation, residue, strict=True)
                ]
                inside = all(x < n for x, n in zip(at, grid, strict=True))
                token = 0
                for x, n in zip(at, grid, strict=True):
                    token = token * n + x
                found.append(token if inside else -1)
    return np.array(found)


def ordered_pairs(seen, q_order, kv_order):
    """The pairs of tokens in other orders; places that were added see nothing."""
    moved = seen[q_order][:, kv_order]
    return moved & (q_order >= 0)[:, None] & (kv_order >= 0)


def queries_of_key(j, *, length, window, stride, is_causal=False):
    """First query that sees key j, and the one after the last; no dilation."""
    if is_causal:
        last = (j + window) // stride + (j + window >= length)
        return j, min(last * stride, length)
    right = window // 2 + window % 2 - 1
    shift = stride - stride // 2 - 1
    first = (j - right + shift if j >= window else 0) // stride * stride
    last = (j + window // 2 + shift + 1) // stride * stride
    return first, length if j >= length - window else last


def fully_block_sparse(length, *, window, stride, q_tile, kv_tile):
    """The published closed form; not for causal axes, and silent on some that are."""
    left, center = window // 2, stride // 2
    last_group = min(length // stride * stride + center, length - 1)
    last, _ = span(last_group, length=length, window=window, stride=stride)
    return length == window or (
        stride % q_tile == 0
        and window % kv_tile == 0
        and (length % stride == 0 or last % kv_tile == 0)
        and (
            (left - center) % kv_tile == 0
            or (
                length % kv_tile == 0
                and math.ceil(length / stride) == 2
                and stride + center >= length - window
            )
        )
    )


def tile_sums(seen, q_tile, kv_tile):
    """How many pairs of each tile are seen, and how many pairs it has."""
    rows, columns = (np.arange(0, n, t) for n, t in zip(seen.shape, (q_tile, kv_tile), strict=True))
    return tuple(
        np.add.reduceat(np.add.reduceat(x, rows, axis=0, dtype=int), columns, axis=1)
        for x in (seen, np.ones_like(seen))
    )
