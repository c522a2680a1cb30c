"""Attention of regions to routed regions by loops in float64: arXiv:2303.08810."""

import math

import numpy as np


def region_of(height, width, regions):
    """The region of each token of a map, row-major, and how many there are."""
    h, w = math.ceil(height / regions), math.ceil(width / regions)
    columns = math.ceil(width / w)
    rows = math.ceil(height / h)
    ids = [y // h * columns + x // w for y in range(height) for x in range(width)]
    return np.array(ids), rows * columns


def affinity(q, k, ids, count):
    """Products of mean queries and mean keys of regions: [heads, regions, regions]."""
    q, k = np.float64(q), np.float64(k)
    group = q.shape[1] // k.shape[1]
    found = np.zeros((q.shape[1], count, count))
    for h, a, b in np.ndindex(found.shape):
        found[h, a, b] = q[ids == a, h].mean(0) @ k[ids == b, h // group].mean(0)
    return found


def select(scores, top_k):
    """The best regions of each row [rows, columns], ties to the lower one."""
    return [sorted(sorted(range(len(row)), key=lambda j: (-row[j], j))[:top_k]) for row in scores]


def attention(q, k, v, ids, chosen, scale):
    """Softmax of each token over the tokens of its region's regions; chosen per head."""
    q, k, v = map(np.float64, (q, k, v))
    group = q.shape[1] // k.shape[1]
    out = np.zeros((len(q), q.shape[1], v.shape[-1]))
    for t, h in np.ndindex(len(q), q.shape[1]):
        tokens = np.flatnonzero(np.isin(ids, chosen[h][ids[t]]))
        logits = scale * k[tokens, h // group] @ q[t, h]
        weights = np.exp(logits - logits.max())
        out[t, h] = weights @ v[tokens, h // group] / weights.sum()
    return out


def convolution(x, kernel, bias):
    """Depthwise, zeros around a map [height, width, features]; kernel [side, side, features]."""
    x, side = np.float64(x), len(kernel)
    padded = np.pad(x, [(side // 2, side // 2)] * 2 + [(0, 0)])
    out = np.zeros_like(x)
    for i, j in np.ndindex(x.shape[:2]):
        out[i, j] = (padded[i : i + side, j : j + side] * kernel).sum((0, 1)) + bias
    return out


def region_attention(x, weights, *, heads, qk_dim, regions, top_k):
    """Routed attention to a map [height, width, features], and the convolution of the values.

    `weights` are `{part: (kernel, bias)}`; kernels of convolutions are [side, side, features].
    """
    height, width, features = x.shape
    kernel, bias = weights["qkv"]
    tokens = (x @ kernel + bias).reshape(height * width, -1)
    q, k = tokens[:, :qk_dim], tokens[:, qk_dim : 2 * qk_dim]
    q, k = (y.reshape(len(y), heads, qk_dim // heads) for y in (q, k))
    v = tokens[:, 2 * qk_dim :]
    ids, count = region_of(height, width, regions)
    chosen = select(affinity(q, k, ids, count).sum(0), top_k)
    values = v.reshape(len(v), heads, features // heads)
    out = attention(q, k, values, ids, [chosen] * heads, qk_dim**-0.5).reshape(x.shape)
    out = out + convolution(v.reshape(x.shape), *weights["local"])
    kernel, bias = weights["out"]
    return out @ kernel + bias


def layer_norm(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale + bias


def gelu(x):
    return np.vectorize(lambda y: y * (1 + math.erf(y / math.sqrt(2))) / 2)(x)


def block(x, weights, **options):
    """Position, attention and perceptron, each added: of a map [height, width, features]."""
    x = np.float64(x)
    weights = {part: tuple(np.float64(y) for y in pair) for part, pair in weights.items()}
    x = x + convolution(x, *weights["position"])
    x = x + region_attention(layer_norm(x, *weights["attention_norm"]), weights, **options)
    kernel, bias = weights["expand"]
    hidden = gelu(layer_norm(x, *weights["perceptron_norm"]) @ kernel + bias)
    kernel, bias = weights["contract"]
    return x + hidden @ kernel + bias
