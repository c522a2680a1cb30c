"""Native sparse attention by loops in float64: arXiv:2502.11089, equations 5 to 12, causal."""

import numpy as np


def softmax_rows(logits, values):
    """Attention of one query over the keys it sees; zeros without any."""
    if not len(logits):
        return np.zeros(values.shape[-1]), np.zeros(0)
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    return weights @ values, weights


def rotated(x, positions, base):
    """Each token of x [length, heads, dim] turned by its position, halves paired."""
    x, half = np.asarray(x, np.float64), x.shape[-1] // 2
    pairs = x[..., :half] + 1j * x[..., half:]
    for i in range(half):
        pairs[..., i] *= np.exp(1j * np.asarray(positions) * base ** (-i / half))[:, None]
    return np.concatenate([pairs.real, pairs.imag], -1)


def compress(x, size, stride, phi):
    """One vector for each whole window and head of x [length, heads, dim]."""
    x = np.asarray(x, np.float64)
    count = max(0, (len(x) - size) // stride + 1)
    out = np.zeros((count, *x.shape[1:]))
    for i, h in np.ndindex(count, x.shape[1]):
        out[i, h] = phi(x[i * stride : i * stride + size, h], h)
    return out


def block_scores(probs, blocks, size, stride, block):
    """Weights of windows [windows], summed over blocks (equation 9)."""
    scores = np.zeros(blocks)
    for j in range(blocks):
        for m in range(block // stride):
            for c in range(size // stride):
                i = j * (block // stride) + m - c
                if 0 <= i < len(probs):
                    scores[j] += probs[i]
    return scores


def branches(
    q, k, v, *, phi_k, phi_v, size, stride, block, top_k, num_init, num_local, window,
    sees=lambda head, row, token: True, compressed=None, local=None, place=lambda keys: keys,
):  # fmt: skip
    """The three outputs [q_len, heads, v_dim] and the chosen blocks of (query, kv head).

    `sees` hides keys besides; a window goes with any of its keys, a block with all of them.
    `compressed` and `local` are the q, k, v of those branches, where they are not the selected
    branch's; `place` gives compressed keys [windows, heads, dim] their positions.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    first, last = (
        tuple(np.asarray(x, np.float64) for x in given or (q, k, v))
        for given in (compressed, local)
    )
    q_len, heads, dim = q.shape
    kv_len, kv_heads = k.shape[:2]
    k_cmp = place(compress(first[1], size, stride, phi_k))
    v_cmp = compress(first[2], size, stride, phi_v)
    outputs, chosen = np.zeros((3, q_len, heads, v.shape[-1])), {}
    scale, group = dim**-0.5, heads // kv_heads
    for row, g in np.ndindex(q_len, kv_heads):
        t = row + kv_len - q_len
        own = t // block
        importance = np.zeros(len(k_cmp))
        members = range(g * group, (g + 1) * group)
        for h in members:
            seen = [
                i for i in range(len(k_cmp))
                if all(s <= t and sees(h, row, s) for s in range(i * stride, i * stride + size))
            ]  # fmt: skip
            logits = np.array([scale * first[0][row, h] @ k_cmp[i, g] for i in seen])
            outputs[0, row, h], weights = softmax_rows(logits, v_cmp[seen, g])
            importance[seen] += weights
        scores = block_scores(importance, own + 1, size, stride, block)
        some = {s // block for h in members for s in range(t + 1) if sees(h, row, s)}
        forced = [j for j in sorted(some) if j < num_init or j > own - num_local]
        free = sorted(sorted(some - {*forced}), key=lambda j: -scores[j])
        chosen[row, g] = sorted([*forced, *free[: top_k - len(forced)]])[:top_k]
        of_blocks = [s for s in range(t + 1) if s // block in chosen[row, g]]
        newest = list(range(max(0, t - window + 1), t + 1))
        for h in members:
            for branch, keys, seen in ((1, of_blocks, (q, k, v)), (2, newest, last)):
                keys = [s for s in keys if sees(h, row, s)]
                logits = scale * seen[1][keys, g] @ seen[0][row, h]
                outputs[branch, row, h], _ = softmax_rows(logits, seen[2][keys, g])
    return outputs, chosen


def mix(outputs, x, weights):
    """Each branch times its gate: a sigmoid of x [q_len, features] times weights."""
    gates = 1 / (1 + np.exp(-np.einsum("tf,fhb->bth", *map(np.float64, (x, weights)))))
    return (gates[..., None] * outputs).sum(0)
