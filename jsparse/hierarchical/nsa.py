"""NSA: compressed, selected and local keys, mixed by gates. Yuan et al. 2025, arXiv:2502.11089."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jsparse import checks
from jsparse.attention.attend import attend
from jsparse.attention.blocks_of_windows import Problem, blocks_of_windows
from jsparse.attention.planned import Queries
from jsparse.core.appending import tokens_from, written
from jsparse.core.rotary import rotary, unrotated
from jsparse.core.windows import Compression, Windows, mlp
from jsparse.masks import causal, sliding_window, whole_windows
from jsparse.types import BlockMask, Branch, Mask, Method


class Pair(NamedTuple):
    """Keys and values that a branch attends to; tokens of the compressed branch are windows."""

    k: Float[Array, "*batch tokens kv_heads dim"]
    v: Float[Array, "*batch tokens kv_heads v_dim"]


class Tokens(NamedTuple):
    """What a branch sees of the tokens, where it is not what the others see."""

    q: Float[Array, "*batch q_len heads dim"]
    k: Float[Array, "*batch kv_len kv_heads dim"]
    v: Float[Array, "*batch kv_len kv_heads v_dim"]


class OwnState(NamedTuple):
    """What a step of branches with projections of their own starts from.

    Attributes:
      windows: The compressed keys and values so far.
      compressed: Those of the tokens that they are made of.
      local: Those of the local branch's tokens.
    """

    windows: Pair
    compressed: Pair
    local: Pair


class NsaInfo(NamedTuple):
    """How blocks were chosen, and what the next step starts from.

    Attributes:
      block_scores: Importance of the chosen blocks, in the order of the lists; -inf past them.
      state: The compressed keys and values so far, for `state` of the next step; with own
        projections what these make of the tokens, too.
      branches: The compressed, selected and local attention; the first is missing where keys are
        fewer than a window has.
    """

    block_scores: Float[Array, "*batch kv_heads q_len top_k"]
    state: Pair | OwnState
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
    own_projections: bool = False,
    rope_base: float | None = None,
    turn_windows: bool = True,
) -> Method:
    """Attends to compressed windows, to the blocks that those point at, and to the last keys.

    A sigmoid gate per query head and branch, from the hidden states `x`, weighs the three outputs.
    It is causal; a mask besides hides what it hides in every branch, and from the compressed branch
    each window of which it hides a key. A block that it hides whole takes no other's place. The
    query heads of a group choose their blocks together. What was compressed is in `info.state`:
    given to the next step, it is only added to.

    All branches see the same queries, keys and values, unless they are given some of their own:
    `plan` and `attend`, and so `js.sparse_attention`, take `compressed=` and `local=`, the
    `Tokens(q, k, v)` that this branch sees, of the shapes of q, k and v, which are then those of
    the others. Windows are made of `compressed`. With `own_projections` the method makes the keys
    and values of both branches itself, of the hidden states.

    Of several documents in one sequence the initial blocks are those of the sequence: only with
    `num_init=0` does a document that begins where a block does choose as it would alone.

    Args:
      compression: What makes one key, and value, of a window's: `js.windows.mlp()` in the paper and
        by default, `mean`, `weighted`, `linear`. Small models that have to look something up learn
        it sooner with `mean`, which has nothing to learn.
      compression_size: Keys per window, a multiple of `stride`; 32 in the paper.
      stride: Keys between the beginnings of two windows; 16 in the paper.
      block_kv: Keys per selected block, a multiple of `stride`; 64 in the paper.
      top_k: Blocks per query, forced ones included; 16 in the paper.
      num_init: Blocks at the start that are always selected; 1 in the paper.
      num_local: Blocks up to the query's own that are always selected, at least 1; 2 in the paper.
      window: Keys of the local branch, the query's own included; 512 in the paper.
      own_projections: Whether the compressed and the local branch have projections of their own,
        of `x`, as in the paper; q, k, v are then those of the selected branch. Their keys and
        values are in the state: without one, x has to have the hidden states of all keys.
      rope_base: Base of the positions that q and k carry, with halves paired as in `js.nn`: windows
        are made of keys as they are before, which are turned back for it. None makes them of keys
        as they come. Keys carry 0, 1, ...: a layer that is called with other `positions` needs
        None. `compressed` comes without positions in its keys, and is not turned back. Local keys
        of `own_projections` get theirs by it: there it has to be the layer's, None included.
      turn_windows: With a `rope_base`, whether a window's key is turned to where the window begins.
        Otherwise the compressed branch has no positions: its queries are turned back as well, and
        come without in `compressed`.

    Differs from the paper:
      All branches share keys and values by default, as in all open implementations; in the paper
      each has its own, as with `own_projections`. The paper does not say how compressed keys go
      with rotary positions: by default windows are made of keys that have them, as in fla-org's
      code; a `rope_base` is XunhaoLai's way, and without `turn_windows` it is lucidrains'. The
      perceptron's hidden layer is twice a token wide, a choice of ours. There are neither
      lucidrains' learned keys and values before the first window, nor its selected keys multiplied
      by a one through which their scores get a gradient.

    Raises:
      ValueError: if a number is not positive, `stride` does not divide the others, or forced blocks
        are more than `top_k`; from the method, if the tokens of a branch have other shapes, or are
        given to one that makes its own.
    """
    checks.positive(stride=stride, top_k=top_k, num_local=num_local, window=window)
    checks.positive(compression_size=compression_size, block_kv=block_kv)
    checks.non_negative(num_init=num_init)
    checks.multiple(of=stride, compression_size=compression_size, block_kv=block_kv)
    checks.forced_blocks(top_k, num_init=num_init, num_local=num_local)
    if rope_base is not None:
        checks.positive_number(rope_base=rope_base)
    windows = Windows(compression_size, stride)
    phi = mlp() if compression is None else compression

    def init(key, *, num_heads, num_kv_heads, dim, features):
        if rope_base is not None:
            checks.multiple(of=2, dim=dim)
        of_k, of_v, of_gates = jax.random.split(key, 3)
        sizes = {"size": windows.size, "heads": num_kv_heads, "dim": dim}
        params = {
            "k": phi.init(of_k, **sizes),
            "v": phi.init(of_v, **sizes),
            "gates": 0.006 * jax.random.normal(of_gates, (features, num_heads, 3)),
        }
        if own_projections:
            # a key that the split above does not give
            of_compressed, of_local = jax.random.split(jax.random.fold_in(key, 3))
            sizes = {"features": features, "heads": num_kv_heads, "dim": dim}
            params["own"] = {
                "compressed": _projections(of_compressed, **sizes),
                "local": _projections(of_local, **sizes),
            }
        return params

    def init_state(k, v):
        """That of a step before the first, for keys and values of these shapes."""
        count = windows.count(k.shape[-3])
        made = Pair(*(jnp.zeros((*x.shape[:-3], count, *x.shape[-2:]), x.dtype) for x in (k, v)))
        if not own_projections:
            return made
        tokens = Pair(jnp.zeros_like(k), jnp.zeros_like(v))
        return OwnState(made, tokens, tokens)

    def projected(params, q, k, x, start, state):
        """What the method's own projections make of all tokens, those of `x` being the newest."""
        checks.hidden_states(x, q, params["gates"].shape[0])
        made = {name: _projected(kernels, x, q.dtype) for name, kernels in params["own"].items()}
        compressed, local = made["compressed"], made["local"]
        if rope_base is not None:
            local = local._replace(k=_turned(rotary, local.k, start, base=rope_base))
        if state is None:
            checks.keys_of_all_tokens(q.shape[-3], k.shape[-3])
            return compressed, local
        first = jnp.broadcast_to(start, q.shape[:-3])
        known = state.compressed, state.local
        return jax.tree.map(lambda x, new: written(x, new, first), known, (compressed, local))

    def compress(params, pair, q_len, start, state, *, with_positions):
        """Windows of all tokens, those that the newest complete being made now."""

        def of_keys(tokens, first):
            if with_positions:
                tokens = tokens.astype(jnp.float32)
                tokens = _turned(unrotated, tokens, first * stride, base=rope_base)
            made = phi.apply(params["k"], windows.of(tokens))
            if rope_base is None or not turn_windows:
                return made
            return _turned(rotary, made, first * stride, stride, base=rope_base)

        def of_values(tokens, first):
            return phi.apply(params["v"], windows.of(tokens))

        make = of_keys, of_values
        new, count = -(-q_len // stride), windows.count(pair.k.shape[-3])
        if state is None or new >= count:
            made = Pair(*(of(x, 0).astype(x.dtype) for of, x in zip(make, pair, strict=True)))
            if state is None:
                return made
            return Pair(*(x.astype(y.dtype) for x, y in zip(made, state, strict=True)))
        done = (start - windows.size) // stride + 1  # complete before the first query
        first = jnp.broadcast_to(jnp.clip(done, 0, count - new), pair.k.shape[:-3])
        length = (new - 1) * stride + windows.size

        def add(of, known, x):
            return written(known, of(tokens_from(x, first * stride, length), first), first)

        return Pair(*(add(*each) for each in zip(make, state, pair, strict=True)))

    def scored(params, q, k, v, x, positions, mask, state, compressed, local, **options):
        """The compressed branch, the two others with what they attend to, and what is to tell."""
        checks.tokens_of_branches(q, k, v, own_projections, compressed=compressed, local=local)
        q_len, kv_len = q.shape[-3], k.shape[-3]
        offset = Queries.of(q, k, positions).offset
        whole = causal(offset=offset) if mask is None else causal(offset=offset) & mask
        start = kv_len - q_len if offset is None else offset
        tokens = Tokens(q, k, k if v is None else v)
        for_windows, for_local = (
            Tokens(*(tokens if y is None else y)) for y in (compressed, local)
        )
        made, own = state, ()
        if own_projections:
            own = projected(params, q, k, x, start, state)
            for_windows, for_local = (Tokens(q, *(y.astype(q.dtype) for y in pair)) for pair in own)
            made = None if state is None else state.windows
        turn_back = rope_base is not None and compressed is None
        if turn_back and not turn_windows:
            for_windows = for_windows._replace(q=_turned(unrotated, q, start, base=rope_base))
        with_positions = turn_back and not own_projections
        pair = Pair(for_windows.k, for_windows.v)
        pair = compress(params, pair, q_len, start, made, with_positions=with_positions)
        k_windows, v_windows = (y.astype(q.dtype) for y in pair)
        seen = whole_windows(whole, size=windows.size, stride=stride, kv_len=kv_len)
        if windows.count(kv_len):
            out, lse = attend(
                for_windows.q, k_windows, v_windows, mask=seen, return_lse=True, **options
            )
        else:
            out = jnp.zeros((*q.shape[:-1], for_windows.v.shape[-1]), for_windows.v.dtype)
            lse = jnp.full((*q.shape[:-3], q.shape[-2], q_len), -jnp.inf)
        logits = {name: options[name] for name in ("scale", "softcap") if name in options}
        plan, scores = select_blocks(
            for_windows.q,
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
        last = whole & sliding_window(left=window - 1, offset=offset)
        further = (tokens, plan, whole), (for_local, None, last)
        branches = (
            Branch(k_windows, None, seen),
            *(Branch(of.k, tiles, visible) for of, tiles, visible in further),
        )
        some = branches if windows.count(kv_len) else branches[1:]
        return out, further, NsaInfo(scores, OwnState(pair, *own) if own else pair, some)

    def plan(
        params: Any,
        q: Any,
        k: Any,
        *,
        v: Any = None,
        x: Any = None,
        positions: Any = None,
        mask: Any = None,
        state: Any = None,
        key: Any = None,
        compressed: Any = None,
        local: Any = None,
    ) -> tuple[Any, Any]:
        given = params, q, k, v, x, positions, mask, state, compressed, local
        _, ((_, tiles, _), _), info = scored(*given)
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
        compressed: Any = None,
        local: Any = None,
        bias: Any = None,
        score_mod: Any = None,
        sinks: Any = None,
        return_lse: bool = False,
        **options: Any,
    ) -> tuple[Any, Any]:
        checks.of_single_keys(bias=bias, score_mod=score_mod, sinks=sinks)
        checks.one_softmax(return_lse)
        checks.hidden_states(x, q, params["gates"].shape[0])
        given = params, q, k, v, x, positions, mask, state, compressed, local
        out, further, info = scored(*given, **options)
        outputs = (
            out,
            *(attend(*of, tiles, mask=visible, **options) for of, tiles, visible in further),
        )
        gates = jax.nn.sigmoid(jnp.einsum("...f,fhb->b...h", x, params["gates"]))
        mixed = sum(g[..., None] * o for g, o in zip(gates, outputs, strict=True))
        return jnp.asarray(mixed, v.dtype), info

    return Method(init, plan, attend_to_branches, init_state, rope_base=rope_base)


def _projections(key: Array, *, features: int, heads: int, dim: int) -> dict[str, Array]:
    """What makes a branch's keys and values of hidden states, at first."""
    normal = jax.nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
    of_k, of_v = jax.random.split(key)
    return {"k": normal(of_k, (features, heads, dim)), "v": normal(of_v, (features, heads, dim))}


def _projected(kernels: dict[str, Array], x: Array, dtype: Any) -> Pair:
    """Keys and values of hidden states, computed in the dtype of those that the others see."""

    def of(kernel):
        return jnp.einsum("...f,fhd->...hd", x.astype(dtype), kernel.astype(dtype))

    return Pair(of(kernels["k"]), of(kernels["v"]))


def _turned(
    turn: Callable[..., Array], x: Array, first: Any, stride: int = 1, *, base: float | None
) -> Array:
    """Queries or keys that stand at `first` and every `stride` tokens from there on, turned."""
    first = jnp.broadcast_to(first, x.shape[:-3])[..., None]
    return turn(x, first + stride * jnp.arange(x.shape[-3]), base=base)
