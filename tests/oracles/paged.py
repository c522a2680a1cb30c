"""Attention over a paged cache, token by token through the tables, in float64."""

import math

import numpy as np


def attention(
    q, k, v, table, lengths, selected, *, scale, softcap=None, added=None, visible=None, sinks=None
):
    """`(out, lse)` of q [batch, q_len, heads, dim] over pages k, v [pages, page_size, kv_heads, _].

    `selected [batch, list_heads, q_len, table_width]` says which places of its sequence's table a
    query reads. `visible(b, h, i, j)` and `added(b, h, i, j)` take the query's number and the key's
    place in its sequence.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, q_len, heads, _ = q.shape
    pages, page_size, kv_heads, v_dim = v.shape
    out = np.zeros((batch, q_len, heads, v_dim))
    lse = np.full((batch, heads, q_len), -np.inf)
    for b, i, h in np.ndindex(batch, q_len, heads):
        position = lengths[b] - q_len + i
        list_head, kv_head = h * len(selected[b]) // heads, h * kv_heads // heads
        logits, values = [], []
        for place, page in enumerate(table[b]):
            if not selected[b][list_head][i][place] or not 0 <= page < pages:
                continue
            for token in range(page_size):
                j = place * page_size + token
                if j > position or (visible is not None and not visible(b, h, i, j)):
                    continue
                logit = scale * float(q[b, i, h] @ k[page, token, kv_head])
                if softcap is not None:
                    logit = softcap * math.tanh(logit / softcap)
                logits.append(logit + (0.0 if added is None else added(b, h, i, j)))
                values.append(v[page, token, kv_head])
        if sinks is not None:
            logits.append(float(sinks[h]))
            values.append(np.zeros(v_dim))
        if logits:
            peak = max(logits)
            mass = np.exp(np.array(logits) - peak)
            out[b, i, h] = mass @ np.array(values) / mass.sum()
            lse[b, h, i] = peak + math.log(mass.sum())
    return out, lse
