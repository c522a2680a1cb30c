"""MoA from the paper and the authors' pipeline, in float64 loops."""

import math

import numpy as np


def span(alpha, beta, length):
    """First tokens and last tokens that a head keeps."""
    size = min(int(alpha + beta * length), length)
    size = math.ceil(max(size, 128) / 64) * 64
    sink = min(size, 64)
    return sink, size - sink


def pairs(q_len, kv_len, rules, *, block=64, fewest=128, new=0):
    """bool [heads, q_len, kv_len]: row of blocks i keeps j < sinks and j >= i + 1 - local."""
    seen = np.zeros((len(rules), q_len, kv_len), bool)
    for h, (alpha, beta) in enumerate(rules):
        length = kv_len + new
        size = max(min(int(alpha + beta * length), length), fewest)
        local = -(-size // block) - 1
        for i in range(q_len):
            position = i + kv_len - q_len
            for j in range(position + 1):
                near = j // block >= position // block + 1 - local
                seen[h, i, j] = near or j < block
    return seen


def softmax(logits):
    mass = np.exp(logits - logits.max())
    return mass / mass.sum()


def ring_decode(q, k, v, *, sink, local):
    """Decoding token by token with `sink` pinned tokens and a ring of `local` slots; one head.

    Returns [length, v_dim]: each token's output, itself included in what it sees.
    """
    slots = np.zeros((sink + local, k.shape[1])), np.zeros((sink + local, v.shape[1]))
    filled = np.zeros(sink + local, bool)
    write, outs = sink, []
    for t in range(len(q)):
        if t < sink:
            at = t
        else:
            at, write = write, sink + (write + 1 - sink) % local
        slots[0][at], slots[1][at], filled[at] = k[t], v[t], True
        probs = softmax(slots[0][filled] @ q[t] / np.sqrt(q.shape[1]))
        outs.append(probs @ slots[1][filled])
    return np.array(outs)


def influence(probs, gradient, *, first_row=False):
    """E of one row."""
    if first_row:
        return -probs * gradient
    mean = sum(a * g for a, g in zip(probs, gradient, strict=True))
    return np.array(
        [-a * (g - mean) / (1 - a) if a < 1 else 0.0 for a, g in zip(probs, gradient, strict=True)]
    )


def without(probs, j):
    """The row with key j removed, normalised anew."""
    rest = probs.copy()
    rest[j] = 0.0
    return rest / rest.sum()


def block_influence(q, k, v, d_out, *, block):
    """Sums of |E| by blocks, [heads, blocks, blocks]."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    length, heads, dim = q.shape
    group = heads // k.shape[1]
    count = -(-length // block)
    sums = np.zeros((heads, count, count))
    for h in range(heads):
        for i in range(length):
            probs = softmax(k[: i + 1, h // group] @ q[i, h] / np.sqrt(dim))
            effect = influence(probs, v[: i + 1, h // group] @ d_out[i, h], first_row=i == 0)
            for j in range(i + 1):
                sums[h, i // block, j // block] += abs(effect[j])
    return sums


def dropped(sums, kept):
    """What a head loses that keeps `kept` blocks a row, the first one among them."""
    count = len(sums)
    layout = np.zeros((count, count), bool)
    for i in range(count):
        for j in range(i + 1):
            layout[i, j] = j == 0 or j >= i + 1 - (kept - 1)
    return sum(sums[i, j] for i in range(count) for j in range(i + 1) if not layout[i, j])


def rules(longest, least, most, *, interval=1024, betas=9):
    kept = []
    for alpha in np.linspace(-least, longest, (longest + least) // interval + 1):
        for beta in np.linspace(0, 1, betas):
            fits = alpha + beta * longest <= longest and alpha + beta * most <= most
            if fits and alpha + beta * least > 0:
                kept.append((alpha, beta))
    return sorted(kept, key=lambda rule: rule[0] + rule[1] * most)


def plans(loss, cost, budget, *, least=0.0, most_rules=None):
    """All feasible plans with their losses; loss [objectives, layers, heads, rules]."""
    _, layers, heads, count = loss.shape
    found = []
    for flat in np.ndindex(*(count,) * (layers * heads)):
        plan = np.array(flat).reshape(layers, heads)
        if most_rules and max(len({*layer}) for layer in plan.tolist()) > most_rules:
            continue
        spent = [sum(row[r] for r in flat) for row in cost]
        if any(s > b or s < least * b for s, b in zip(spent, budget, strict=True)):
            continue
        losses = [
            sum(z[i, h, plan[i, h]] for i in range(layers) for h in range(heads)) for z in loss
        ]
        found.append((plan, losses))
    return found


def front(found):
    """Those that no other beats, by plain comparison."""

    def beats(a, b):
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    return [(p, z) for p, z in found if not any(beats(other, z) for _, other in found)]
