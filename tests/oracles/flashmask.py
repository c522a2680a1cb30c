"""FlashMask's mask types from their direct definitions, and its columns from the paper's table."""

import numpy as np


def document(docs):
    """For each token: the start and the end of its document."""
    ends = np.cumsum(docs)
    starts = ends - docs
    return np.repeat(starts, docs), np.repeat(ends, docs)


def pairs_from_columns(columns, *, causal, q_len):
    """allowed[i, j] from columns [kv_len, n]."""
    kv_len, bounds = columns.shape
    allowed = np.zeros((q_len, kv_len), bool)
    for i in range(q_len):
        for j in range(kv_len):
            lower_start, lower_end, upper_start, upper_end = columns[j][0], q_len, 0, 0
            if causal and bounds == 2:
                lower_end = columns[j][1]
            if not causal and bounds == 2:
                upper_end = columns[j][1]
            if bounds == 4:
                lower_start, lower_end, upper_start, upper_end = columns[j]
            hidden = lower_start <= i < lower_end or upper_start <= i < upper_end
            allowed[i, j] = not hidden and (not causal or j <= i + kv_len - q_len)
    return allowed


def attention_and_gradients(q, k, v, pairs, weights):
    """(out, dq, dk, dv) of the loss sum(out * weights), row by row over the allowed pairs."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    d_q, d_k, d_v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    scale = 1 / np.sqrt(q.shape[-1])
    for i in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys = [j for j in range(k.shape[0]) if pairs[i, j]]
            if not keys:
                continue
            logits = np.array([q[i, h] @ k[j, h // group] * scale for j in keys])
            probs = np.exp(logits - logits.max())
            probs /= probs.sum()
            out[i, h] = sum(p * v[j, h // group] for p, j in zip(probs, keys, strict=True))
            for p, j in zip(probs, keys, strict=True):
                d_v[j, h // group] += p * weights[i, h]
                d_logit = p * (weights[i, h] @ (v[j, h // group] - out[i, h]))
                d_q[i, h] += d_logit * scale * k[j, h // group]
                d_k[j, h // group] += d_logit * scale * q[i, h]
    return out, d_q, d_k, d_v


def hash_columns(bucket_of):
    """Columns, original positions and buckets of tokens stably sorted by bucket."""
    original = np.argsort(bucket_of, kind="stable")
    buckets = np.asarray(bucket_of)[original]
    columns = np.zeros((len(buckets), 2), np.int32)
    for j, bucket in enumerate(buckets):
        rows = [i for i in range(len(buckets)) if buckets[i] == bucket]
        columns[j] = rows[-1] + 1, next(i for i in rows if original[i] >= original[j])
    return columns, original, buckets


def cases(length=16, docs=(5, 4, 7)):
    """name -> (columns [length, n] or None, causal, definition(i, j) -> bool, allowed pairs)."""
    start, end = document(docs)
    doc = np.repeat(np.arange(len(docs)), docs)
    column = np.arange(length)
    last_start = length - docs[-1]
    answer = np.concatenate([np.full(4, -1), np.repeat([0, 1], [5, 7])])
    answer_end = np.concatenate([np.full(4, 16), np.repeat([9, 16], [5, 7])])
    prefix = np.repeat([2, 3, 1], docs)
    evicted = np.full(length, length + 1)
    evicted[[1, 3, 4]] = [7, 9, 12]
    dropped = (column >= 5) & (column < 9)

    def stack(*vectors):
        return np.stack([np.broadcast_to(v, (length,)) for v in vectors], -1).astype(np.int32)

    def global_window(i, j, g=2, left=3, right=2):
        return i < g or j < g or -right <= i - j <= left

    window_end = np.minimum(column + 4, length)
    is_global = column < 2
    upper = np.where(column > 2 + 2, column - 2, 0)
    return {
        "causal": (None, True, lambda i, j: j <= i, 136),
        "full": (stack(length, 0), False, lambda i, j: True, 256),
        "sliding": (stack(window_end), True, lambda i, j: 0 <= i - j < 4, 58),
        "causal document": (stack(end), True, lambda i, j: j <= i and doc[i] == doc[j], 53),
        "document": (stack(end, start), False, lambda i, j: doc[i] == doc[j], 90),
        "causal blockwise": (
            stack(np.where(doc == 2, length, end), np.where(doc == 2, length, last_start)),
            True,
            lambda i, j: j <= i and (doc[i] == doc[j] or doc[i] == 2),
            116,
        ),
        "share question": (
            stack(answer_end),
            True,
            lambda i, j: j <= i and (answer[j] < 0 or answer[i] == answer[j]),
            101,
        ),
        "global and window": (
            stack(
                np.where(is_global, 0, np.minimum(column + 4, length)),
                np.where(is_global, 0, length),
                np.where(is_global | (upper == 0), 0, 2),
                np.where(is_global, 0, upper),
            ),
            False,
            global_window,
            135,
        ),
        "prefix causal": (
            stack(length, np.where(column < 6, 0, column)),
            False,
            lambda i, j: j <= i or j < 6,
            151,
        ),
        "prefix document": (
            stack(end, np.where(column - start < prefix, start, column)),
            False,
            lambda i, j: doc[i] == doc[j] and (j <= i or j - start[j] < prefix[j]),
            57,
        ),
        "qk sparse": (
            stack(column, np.where(dropped, 9, column)),
            True,
            lambda i, j: j <= i and not (dropped[j] and j <= i < 9),
            126,
        ),
        "eviction": (stack(evicted), True, lambda i, j: j <= i < evicted[j], 116),
    }
