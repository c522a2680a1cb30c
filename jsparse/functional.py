"""Whole calls: a method on q, k, v; and jax.nn's attention with a plan or a method."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jsparse import checks
from jsparse.attention.attend import attend
from jsparse.attention.planned import has_parameters
from jsparse.core.merging import merge
from jsparse.masks import causal, dense, lengths, sliding_window
from jsparse.types import LatentStates, Mask, Method


def sparse_attention(
    q: Float[Array, "*batch q_len heads dim"],
    k: Float[Array, "*batch kv_len kv_heads dim"],
    v: Float[Array, "*batch kv_len kv_heads v_dim"],
    method: Method,
    *,
    params: Any = (),
    mask: Mask | None = None,
    extra_k: Float[Array, "*batch extra_len kv_heads dim"] | None = None,
    extra_v: Float[Array, "*batch extra_len kv_heads v_dim"] | None = None,
    x: Float[Array, "*batch q_len features"] | LatentStates | None = None,
    positions: Int[Array, "*batch q_len"] | None = None,
    state: Any = None,
    key: Any = None,
    **options: Any,
) -> Any:
    """Plans, attends and corrects in one call.

    Tokens of another kind that every query sees, such as a picture's caption, may stand beside the
    keys: the result is one softmax over both.

    Args:
      q: Queries.
      k: Keys.
      v: Values.
      method: What `js.xattention(...)` or another factory returns.
      params: The method's parameters, from `method.init`; `()` where it has none.
      mask: Who may see whom; the method plans within it.
      extra_k: Keys of further tokens, which method, mask, bias and score_mod leave alone.
      extra_v: Their values.
      x: Hidden states, for methods that look at them; or with low-rank queries, for those that are
        `of_latents`.
      positions: Where each query stands among the keys, consecutive per sequence; default the last
        `q_len` of them. A mask of one's own is aligned by its `offset`.
      state: What the method returned as `info.state` at the step or layer before.
      key: A PRNG key, for methods that sample.
      **options: Keywords of `js.attend`: bias, score_mod, sinks, softcap, scale, return_lse,
        implementation; and what the method itself takes besides, such as `local=` of `js.nsa`.

    Returns:
      What `js.attend` returns: the output, or `(out, lse)` with `return_lse=True`.

    Raises:
      ValueError: if arguments do not fit each other; the sentence names the remedy.
    """
    _check_parameters(method, params, q, k, v, x)
    if mask is not None:
        checks.mask_type(mask)
    given = {"x": x, "positions": positions, "mask": mask, "state": state, "key": key, **options}
    checks.both_or_neither(extra_k=extra_k, extra_v=extra_v)
    if extra_k is None or extra_v is None:
        return method.attend(params, q, k, v, **given)[0]
    checks.attention_inputs(q, extra_k, extra_v, names=("q", "extra_k", "extra_v"))
    # a sink is in one of the two sums, so it is in the merged one
    of_both = {name: options.get(name) for name in ("softcap", "scale", "implementation")}
    (own, own_lse), _ = method.attend(params, q, k, v, **{**given, "return_lse": True})
    further = attend(q, extra_k, extra_v, return_lse=True, **of_both)
    out, lse = merge([(own, own_lse), further])
    return (out, lse) if options.get("return_lse", False) else out


def _check_parameters(method: Method, params: Any, q: Any, k: Any, v: Any, x: Any) -> None:
    """A method is one, and is given parameters where it has some."""
    checks.method_type(method)
    if not jax.tree.leaves(params):
        checks.attention_inputs(q, k, v)
        heads, dim = q.shape[-2:]
        sizes = {"num_heads": heads, "num_kv_heads": k.shape[-2], "dim": dim}
        x = x if method.of_latents else LatentStates.of(x).x
        features = heads * dim if x is None else jax.tree.map(lambda y: y.shape[-1], x)
        checks.parameters_given(has_parameters(method, **sizes, features=features))


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    plan: Any = None,
    method: Method | None = None,
) -> Any:
    """Computes what `jax.nn.dot_product_attention` computes, sparsely where it is told how.

    Signature and semantics are jax.nn's: a call site changes its import and nothing else. That
    includes what differs from `js.attend`: causality and windows are aligned top-left, and a row
    whose keys are all hidden gives the mean of all values.

    Args:
      query: [batch, q_len, heads, dim], or without the batch axis.
      key: [batch, kv_len, kv_heads, dim].
      value: Of the key's shape, but for `dim`, which may differ.
      bias: Added to the scaled logits; broadcastable to [batch, heads, q_len, kv_len].
      mask: Bools, True means attend; broadcastable like `bias`.
      scale: Factor on the logits, default `dim ** -0.5`, or what a method says that has its own.
      is_causal: Whether query `i` sees keys `j <= i` only.
      query_seq_lengths: True queries per sequence; the rest of the output is zero.
      key_value_seq_lengths: True keys per sequence.
      local_window_size: Keys visible to the (left, right) of each query; one number for both.
      implementation: jax.nn's "xla" and "cudnn", or any of `js.attend`. "cudnn" goes to jax.nn
        itself and takes neither plan nor method.
      return_residual: Also return the log-sum-exp, [batch, q_len, heads], which has no gradient;
        that of `js.attend` has one.
      plan: Which tiles are computed; see `js.attend`. Rows that it leaves empty give zeros.
      method: What chooses the tiles, without parameters; see `js.sparse_attention`.

    Raises:
      ValueError: if arguments do not fit each other, or both `plan` and `method` are given.
    """
    checks.plan_or_method(plan, method)
    if implementation == "cudnn":
        checks.jax_alone(plan, method)
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias,
            mask,
            scale=scale,
            is_causal=is_causal,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            local_window_size=local_window_size,
            implementation="cudnn",
            return_residual=return_residual,
        )
    q, k, v = (jnp.asarray(x) for x in (query, key, value))
    shape = q.shape
    q, k, v = (x if x.ndim == 4 else x[None] for x in (q, k, v))
    checks.attention_inputs(q, k, v)
    lengths_given = {
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
    }
    checks.per_sequence(q.shape[0], **lengths_given)
    q_len, kv_len = q.shape[1], k.shape[1]
    parts: list[Mask] = []
    if mask is not None:
        pairs = jnp.asarray(mask)
        pairs = pairs.reshape((1,) * (4 - pairs.ndim) + pairs.shape)
        checks.pairs(pairs)
        checks.broadcasts("mask", pairs.shape, (*q.shape[:1], q.shape[2], q_len, kv_len))
        parts.append(dense(jnp.broadcast_to(pairs, (*pairs.shape[:2], q_len, kv_len))))
    if is_causal:
        parts.append(causal(offset=0))
    if local_window_size is not None:
        window = local_window_size
        left, right = (window, window) if isinstance(window, int) else window
        parts.append(sliding_window(left=left, right=right, offset=0))
    if query_seq_lengths is not None or key_value_seq_lengths is not None:
        parts.append(lengths(*(x if x is None else jnp.asarray(x) for x in lengths_given.values())))
    whole: Mask | None = None
    for part in parts:
        whole = part if whole is None else whole & part

    options = {"bias": bias, "scale": scale, "implementation": implementation}
    if method is None:
        out, lse = attend(q, k, v, plan, mask=whole, return_lse=True, **options)
    else:
        _check_parameters(method, (), q, k, v, None)
        found, _ = method.attend((), q, k, v, mask=whole, return_lse=return_residual, **options)
        if not return_residual:
            # not asked for: methods of several softmaxes have none
            return found.reshape(*shape[:-1], v.shape[-1])
        out, lse = found
    lse = jnp.swapaxes(lse, -1, -2)
    if plan is None and method is None:
        out, lse = _fill_empty_rows(out, lse, v, query_seq_lengths)
    out = out.reshape(*shape[:-1], v.shape[-1])
    # as in jax.nn: rounded to the inputs' dtype, and without a gradient
    residual = jax.lax.stop_gradient(lse.astype(q.dtype).reshape(shape[:-1]))
    return (out, residual) if return_residual else out


def _fill_empty_rows(out: Array, lse: Array, v: Array, q_lengths: Any) -> tuple[Array, Array]:
    """What jax.nn gives rows without a key: logits all equally low, so the mean of the values."""
    group = out.shape[2] // v.shape[2]
    mean = jnp.repeat(v.astype(jnp.float32).mean(1), group, axis=1)[:, None].astype(out.dtype)
    empty = jnp.isneginf(lse)
    fill = empty
    if q_lengths is not None:
        true = jnp.arange(out.shape[1]) < jnp.asarray(q_lengths)[:, None]
        fill = empty & true[..., None]
    lowest = -0.7 * float(jnp.finfo(jnp.float32).max)
    return jnp.where(fill[..., None], mean, out), jnp.where(empty, lowest, lse)
