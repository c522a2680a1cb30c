"""Attention in float64 by NumPy over any columns, for what tests lay out themselves."""

import numpy as np


def attention(q, k, v, shown, *, scale, softcap=None, added=0.0, sinks=None):
    """`(out, lse)` of q [batch, q_len, heads, dim] over columns k, v [batch, columns, heads, _].

    `shown [batch, heads, q_len, columns]` says who sees what; `added` comes after the softcap.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    logits = np.where(shown, logits + added, -np.inf)
    if sinks is not None:
        column = np.broadcast_to(
            np.asarray(sinks, np.float64)[:, None, None], logits.shape[:3] + (1,)
        )
        logits = np.concatenate([logits, column], -1)
        v = np.concatenate([v, np.zeros_like(v[:, :1])], 1)
    peak = np.maximum(logits.max(-1, keepdims=True), np.finfo(np.float64).min)
    mass = np.exp(logits - peak)
    total = mass.sum(-1, keepdims=True)
    out = np.einsum("bhqk,bkhd->bqhd", mass / np.where(total > 0, total, 1.0), v)
    with np.errstate(divide="ignore"):
        return out, (peak + np.log(total))[..., 0]


def close(got, expected, tolerance):
    """Every array within `tolerance` of the largest entry of the expected one."""
    assert len(got) == len(expected)
    for mine, true in zip(got, expected, strict=True):
        mine, true = np.asarray(mine, np.float64), np.asarray(true, np.float64)
        finite = np.isfinite(true)
        np.testing.assert_array_equal(np.isfinite(mine), finite)
        size = max(1.0, np.abs(true[finite]).max(initial=0.0))
        np.testing.assert_allclose(mine[finite], true[finite], rtol=0, atol=tolerance * size)
