"""NSA: compressed, selected and local keys, mixed by gates. Yuan et al. 2025, arXiv:2502.11089."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jsparse import checks
from jsparse.attention.attend import attend
from jsparse.attention.blocks_of_windows import Problem, blocks_of_windows
from jsparse.attention.planned import Queries
from jsparse.core.windows import Compression, Windows, mlp
from jsparse.masks import causal, sliding_window, whole_windows
from jsparse.types import BlockMask, Branch, Mask, Method


class Pair(NamedTuple):
    """Keys and values that a branch attends to; tokens of the compressed branch are windows."""

    k: Float[Array, "*batch tokens kv_heads dim"]
    v: Float[Array, "*batch tokens kv_heads v_dim"]


class NsaInfo(NamedTuple):
    """How blocks were chosen, and what the next step starts from.

    Attributes:
      block_scores: Importance of the chosen blocks, in the order of the lists; -inf past them.
      state: The compressed keys and values so far, for `state` of the next step.
      branches: The compressed, selected and local attention; the first is missing where keys are
        fewer than a window has.
    """

    block_scores: Float[Array, "*batch kv_heads q_len top_k"]
    state: Pair
    branches: tuple[Branch, ...]


@functools.partial(
    jax.jit,
    static_argnames=("windows", "block_kv", "top_k", "kv_len", "num_init", "num_local", "softcap"),
)
def select_blocks(
    q: Float[Array, "*batch q_len heads dim"],
    k_windows: Float[Array, "*batch windows kv_heads dim"],
    lse: Float[Array, "*batch heads q_len"],
    *,
    windows: Windows,
    block_kv: int,
    top_k: int,
    kv_len: int,
    mask: Mask,
    num_init: int = 0,
    num_local: int = 1,
    scale: float | Float[Array, ""] | None = None,
    softcap: float | None = None,
    offset: Int[Array, "*batch"] | None = None,
    token_mask: Mask | None = None,
) -> tuple[BlockMask, Float[Array, "*batch kv_heads q_len top_k"]]:
    """Chooses for each query and kv head the blocks that hold most of its compressed attention.

    Probabilities of windows are summed over the query heads of a group and over the strides that a
    window and a block share (equations 9 and 10); no array of queries times windows is kept.
    Nothing has a gradient.

    Args:
      q: Queries, as the compressed branch sees them.
      k_windows: Compressed keys.
      lse: Of each query's logits over the windows that it sees.
      windows: Their sizes.
      block_kv: Keys per block, a multiple of the windows' stride.
      top_k: How many blocks, forced ones included.
      kv_len: Keys.
      mask: Who sees which window.
      num_init: Blocks at the start that are always chosen.
      num_local: Blocks up to the query's own that are always chosen, its own included.
      scale: Factor on the logits, default `dim ** -0.5`.
      softcap: Caps the logits.
      offset: The key position of the first query; default such that the last query is at the last
        key.
      token_mask: Who sees which key besides; a block of which it shows a group's heads nothing is
        not chosen, however it is forced. Default all up to a query's own.

    Returns:
      The lists, and the score of each entry.
    """
    batch_shape, (q_len, heads, dim) = q.shape[:-3], q.shape[-3:]
    batches, kv_heads = math.prod(batch_shape), k_windows.shape[-2]
    start = jnp.broadcast_to(kv_len - q_len if offset is None else offset, batch_shape).reshape(-1)
    problem = Problem(
        q.reshape(batches, q_len, heads, dim),
        k_windows.reshape(batches, -1, kv_heads, dim),
        lse.reshape(batches, heads, q_len),
        windows,
        block_kv,
        kv_len,
        mask.flatten_batch(batch_shape),
        dim**-0.5 if scale is None else scale,
        softcap,
        start,
        num_init,
        num_local,
        None if token_mask is None else token_mask.flatten_batch(batch_shape),
    )
    best = blocks_of_windows(problem, top_k)
    indices, counts, scores = (x.reshape(*batch_shape, *x.shape[1:]) for x in best)
    none = jnp.zeros(indices.shape[:-2], bool)
    return BlockMask(indices, counts, none, q_len, kv_len, 1, block_kv), scores


def nsa(
    *,
    compression: Compression | None = None,
    compression_size: int = 32,
    stride: int = 16,
    block_kv: int = 64,
    top_k: int = 16,
    num_init: int = 1,
    num_local: int = 2,
    window: int = 512,
) -> Method:
    """Attends to compressed windows, to the blocks that those point at, and to the last keys.

    A sigmoid gate per query head and branch, from the hidden states `x`, weighs the three outputs.
    It is causal; a mask besides hides what it hides in every branch, and from the compressed branch
    each window of which it hides a key. A block that it hides whole takes no other's place. The
    query heads of a group choose their blocks together. What was compressed is in `info.state`:
    given to the next step, it is only added to.

    Args:
      compression: What makes one key, and value, of a window's: `js.windows.mlp()` in the paper and
        by default, `mean`, `weighted`, `linear`.
      compression_size: Keys per window, a multiple of `stride`; 32 in the paper.
      stride: Keys between the beginnings of two windows; 16 in the paper.
      block_kv: Keys per selected block, a multiple of `stride`; 64 in the paper.
      top_k: Blocks per query, forced ones included; 16 in the paper.
      num_init: Blocks at the start that are always selected; 1 in the paper.
      num_local: Blocks up to the query's own that are always selected, at least 1; 2 in the paper.
      window: Keys of the local branch, the query's own included; 512 in the paper.

    Differs from the paper:
      All branches share the keys and values that they are given, as all open implementations do;
      `select_blocks` and `js.attend` make up branches with some of their own. Windows are made of
      keys with their rotary positions applied. The perceptron's hidden layer is twice a token
      wide, a choice of ours.

    Raises:
      ValueError: if a number is not positive, `stride` does not divide the others, or forced blocks
        are more than `top_k`.
    """
    checks.positive(stride=stride, top_k=top_k, num_local=num_local, window=window)
    checks.positive(compression_size=compression_size, block_kv=block_kv)
    checks.non_negative(num_init=num_init)
    checks.multiple(of=stride, compression_size=compression_size, block_kv=block_kv)
    checks.forced_blocks(top_k, num_init=num_init, num_local=num_local)
    windows = Windows(compression_size, stride)
    compressed = mlp() if compression is None else compression

    def init(key, *, num_heads, num_kv_heads, dim, features):
        of_k, of_v, of_gates = jax.random.split(key, 3)
        sizes = {"size": windows.size, "heads": num_kv_heads, "dim": dim}
        return {
            "k": compressed.init(of_k, **sizes),
            "v": compressed.init(of_v, **sizes),
            "gates": 0.006 * jax.random.normal(of_gates, (features, num_heads, 3)),
        }

    def init_state(k, v):
        """That of a step before the first, for keys and values of these shapes."""
        count = windows.count(k.shape[-3])
        return Pair(*(jnp.zeros((*x.shape[:-3], count, *x.shape[-2:]), x.dtype) for x in (k, v)))

    def compress(params, k, v, q_len, start, state):
        """Windows of all tokens, those that the newest complete being made now."""

        def of(name, x):
            return compressed.apply(params[name], windows.of(x)).astype(x.dtype)

        new, count = -(-q_len // stride), windows.count(k.shape[-3])
        if state is None:
            return Pair(of("k", k), of("v", v))
        if new >= count:
            return Pair(of("k", k).astype(state.k.dtype), of("v", v).astype(state.v.dtype))
        done = (start - windows.size) // stride + 1  # complete before the first query

        def add(name, known, x, first):
            first = jnp.clip(first, 0, count - new)
            length = (new - 1) * stride + windows.size
            tokens = jax.lax.dynamic_slice_in_dim(x, first * stride, length)
            made = of(name, tokens).astype(known.dtype)
            return jax.lax.dynamic_update_slice_in_dim(known, made, first, axis=0)

        def one(known, k, v, first):
            return Pair(add("k", known.k, k, first), add("v", known.v, v, first))

        for _ in k.shape[:-3]:
            one = jax.vmap(one)
        return one(state, k, v, jnp.broadcast_to(done, k.shape[:-3]))

    def scored(params, q, k, v, positions, mask, state, **options):
        """The compressed branch, the lists that follow from it, and what else they are made of."""
        q_len, kv_len = q.shape[-3], k.shape[-3]
        offset = Queries.of(q, k, positions).offset
        whole = causal(offset=offset) if mask is None else causal(offset=offset) & mask
        start = kv_len - q_len if offset is None else offset
        pair = compress(params, k, v, q_len, start, state)
        k_windows, v_windows = (x.astype(q.dtype) for x in pair)
        seen = whole_windows(whole, size=windows.size, stride=stride, kv_len=kv_len)
        if windows.count(kv_len):
            out, lse = attend(q, k_windows, v_windows, mask=seen, return_lse=True, **options)
        else:
            out = jnp.zeros((*q.shape[:-1], v.shape[-1]), v.dtype)
            lse = jnp.full((*q.shape[:-3], q.shape[-2], q_len), -jnp.inf)
        logits = {name: options[name] for name in ("scale", "softcap") if name in options}
        plan, scores = select_blocks(
            q,
            k_windows,
            lse,
            windows=windows,
            block_kv=block_kv,
            top_k=top_k,
            kv_len=kv_len,
            mask=seen,
            num_init=num_init,
            num_local=num_local,
            offset=offset,
            token_mask=mask,
            **logits,
        )
        local = whole & sliding_window(left=window - 1, offset=offset)
        branches = Branch(k_windows, None, seen), Branch(k, plan, whole), Branch(k, None, local)
        some = branches if windows.count(kv_len) else branches[1:]
        return out, plan, whole, local, NsaInfo(scores, pair, some)

    def plan(params, q, k, *, v=None, x=None, positions=None, mask=None, state=None, key=None):
        values = k if v is None else v
        _, tiles, *_, info = scored(params, q, k, values, positions, mask, state)
        return tiles, info

    def attend_to_branches(
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
        bias: Any = None,
        score_mod: Any = None,
        sinks: Any = None,
        return_lse: bool = False,
        **options: Any,
    ) -> tuple[Any, Any]:
        checks.of_single_keys(bias=bias, score_mod=score_mod, sinks=sinks)
        checks.one_softmax(return_lse)
        checks.hidden_states(x, q, params["gates"].shape[0])
        out, tiles, whole, local, info = scored(params, q, k, v, positions, mask, state, **options)
        outputs = (
            out,
            attend(q, k, v, tiles, mask=whole, **options),
            attend(q, k, v, mask=local, **options),
        )
        gates = jax.nn.sigmoid(jnp.einsum("...f,fhb->b...h", x, params["gates"]))
        mixed = sum(g[..., None] * o for g, o in zip(gates, outputs, strict=True))
        return jnp.asarray(mixed, v.dtype), info

    return Method(init, plan, attend_to_branches, init_state)
