"""FlashMoBA: each query routed to blocks by their mean keys. Xiao et al. 2025, arXiv:2511.11571."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jsparse import checks
from jsparse.attention.attend import attend
from jsparse.attention.best_blocks import best_blocks
from jsparse.attention.planned import Queries
from jsparse.core.appending import tokens_from, written
from jsparse.core.pooling import mean_blocks
from jsparse.types import BlockMask, Method


class FlashMobaInfo(NamedTuple):
    """What queries and the means of the chosen blocks gave, and what the next step starts from.

    Attributes:
      block_scores: Their products, in the order of the lists; -inf past them. A query's own block
        has its score like any other.
      state: The mean key of each block so far, of convolved keys, for `state` of the next step.
    """

    block_scores: Float[Array, "*batch heads q_len top_k"]
    state: Float[Array, "*batch kv_blocks kv_heads dim"]


def convolve_keys(
    k: Float[Array, "*batch kv_len kv_heads dim"], weights: Float[Array, "taps kv_heads dim"]
) -> Float[Array, "*batch kv_len kv_heads dim"]:
    """Adds to each key what a causal convolution makes of it and the keys just before it.

    Related neighbours grow alike, so that the mean of their block tells more of each (section 4.2):
    `k[t] + silu(sum_u weights[u] * k[t - u])`, feature by feature. Weights of 0 change nothing.

    Args:
      k: Keys.
      weights: Of the key itself, then of the one before it, and so on.
    """
    taps, length = len(weights), k.shape[-3]
    padded = jnp.pad(k, [(0, 0)] * (k.ndim - 3) + [(taps - 1, 0), (0, 0), (0, 0)])
    shifted = (padded[..., taps - 1 - n : taps - 1 - n + length, :, :] for n in range(taps))
    inside = sum(x * w.astype(k.dtype) for x, w in zip(shifted, weights, strict=True))
    return k + jax.nn.silu(inside)  # pyright: ignore


def signal_to_noise(
    dim: int, block_kv: int, *, gap: float, related: int = 1, gain: float = 0.0
) -> float:
    """How far the score of the block with a query's key stands above others, in deviations.

    A product of normalised q and k scatters by `1 / sqrt(dim)`; a mean over a block hides the one
    key that matters among `block_kv` others (section 3): half the block, sqrt(2) times the ratio.

    Args:
      dim: Width of queries and keys.
      block_kv: Keys per block.
      gap: How much larger the product with the right key is than with others, on average.
      related: Keys of the block that belong together, the right one included.
      gain: How much larger the products with those others are.
    """
    return (gap + (related - 1) * gain) * math.sqrt(dim / (2 * block_kv))


def failure_rate(ratio: float) -> float:
    """How often a block without the key outranks the one with it, by a signal-to-noise ratio."""
    return math.erfc(ratio / math.sqrt(2)) / 2


def flashmoba(*, block_kv: int = 128, top_k: int = 8, taps: int = 0) -> Method:
    """Attends, for each query and head, to the blocks whose mean keys it points at.

    Routing has no parameters and no gradient: queries and keys learn through the output. Under a
    mask, a causal one or another, a query's own block is among the `top_k` wherever the mask shows
    any of it; under a causal one all others lie wholly in its past. Without a mask all blocks are
    alike. Mean keys are in `info.state`: given to the next step, only those of the blocks
    that its tokens are in are made anew, of the keys of these blocks alone. What a step attends to
    is convolved over the whole cache.

    Args:
      block_kv: Keys per block; 128 in the paper's fastest models, 512 to 4096 in MoBA.
      top_k: Blocks per query, its own included; 8 in the paper's benchmark.
      taps: Keys that a learned convolution over keys reaches, the own one included; 3 and 5 in the
        paper, 0 for none.

    Differs from the paper:
      Of blocks with equal scores the lower ones are taken; the authors' reference and kernel take
      the higher. Queries and keys are routed as they come: with their rotary positions, where they
      are those of `js.nn`, and of MoBA's and fla-org's layers. The convolution acts on keys as they
      come too, after their positions, and starts as the identity: neither is published, and the
      authors' code has no convolution. It reaches over the border of documents, as block means do;
      before positions it is `convolve_keys`, with `taps=0` here. A step of decoding chooses blocks
      as a whole sequence does; the authors of MoBA decode with dense attention.

    Raises:
      ValueError: if a size is not positive, or `taps` is negative.
    """
    checks.positive(block_kv=block_kv, top_k=top_k)
    checks.non_negative(taps=taps)

    def init(key, *, num_heads, num_kv_heads, dim, features):
        return {"convolution": jnp.zeros((taps, num_kv_heads, dim))} if taps else ()

    def convolved(params, k):
        return convolve_keys(k, params["convolution"]) if taps else k

    def init_state(k, v):
        """That of a step before the first, for keys of this shape."""
        kv_blocks = -(-k.shape[-3] // block_kv)
        return jnp.zeros((*k.shape[:-3], kv_blocks, *k.shape[-2:]), jnp.float32)

    def mean_keys(params, k, keys, q_len, start, state):
        """Of each block; with a state those alone that the newest tokens are in are made."""
        if state is None:
            return mean_blocks(keys, block_kv)
        # of so many tokens, wherever the first stands in its own block
        new, kv_blocks = -(-(q_len - 1) // block_kv) + 1, state.shape[-3]
        if new >= kv_blocks:
            return mean_blocks(keys, block_kv, start + q_len)
        first = jnp.clip(start // block_kv, 0, kv_blocks - new)
        before = max(0, taps - 1)
        near = tokens_from(k, first * block_kv - before, before + new * block_kv)
        near = convolved(params, near)[..., before:, :, :]
        made = mean_blocks(near, block_kv, start + q_len - first * block_kv)
        return written(state, made, first)

    def route(params, q, k, keys, positions, mask, state):
        batch_shape, (q_len, heads, dim) = q.shape[:-3], q.shape[-3:]
        kv_len, batches = k.shape[-3], math.prod(q.shape[:-3])
        offset = Queries.of(q, k, positions).offset
        start = jnp.broadcast_to(kv_len - q_len if offset is None else offset, batch_shape)
        means = mean_keys(params, k, keys, q_len, start, state)
        best = best_blocks(
            q.reshape(batches, q_len, heads, dim),
            means.reshape(batches, -1, *means.shape[-2:]),
            block=block_kv,
            kv_len=kv_len,
            top_k=top_k,
            mask=None if mask is None else mask.flatten_batch(batch_shape),
            offset=start.reshape(-1),
        )
        indices, counts, scores = (x.reshape(*batch_shape, *x.shape[1:]) for x in best)
        none = jnp.zeros(indices.shape[:-2], bool)
        tiles = BlockMask(indices, counts, none, q_len, kv_len, 1, block_kv)
        return tiles, FlashMobaInfo(scores, means)

    def plan(params, q, k, *, v=None, x=None, positions=None, mask=None, state=None, key=None):
        # with a state, only a step that attends needs all keys; a program leaves out what is not
        return route(params, q, k, convolved(params, k), positions, mask, state)

    def attend_to_blocks(
        params: Any,
        q: Any,
        k: Any,
        v: Any,
        *,
        x: Any = None,
        positions: Any = None,
        mask: Any = None,
        state: Any = None,
        key: Any = None,
        **options: Any,
    ) -> tuple[Any, Any]:
        keys = convolved(params, k)
        tiles, info = route(params, q, k, keys, positions, mask, state)
        return attend(q, keys, v, tiles, mask=mask, **options), info

    return Method(init, plan, attend_to_blocks, init_state)
