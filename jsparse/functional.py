"""Whole calls: a method on q, k, v; and jax.nn's attention with a plan or a method."""

from typing import Any

from jaxtyping import Array, Float

from jsparse.types import Mask, Method


def sparse_attention(
    q: Float[Array, "*batch q_len heads dim"],
    k: Float[Array, "*batch kv_len kv_heads dim"],
    v: Float[Array, "*batch kv_len kv_heads v_dim"],
    method: Method,
    *,
    params: Any = (),
    mask: Mask | None = None,
    x: Float[Array, "*batch q_len features"] | None = None,
    positions: Any = None,
    state: Any = None,
    key: Any = None,
    **attend: Any,
) -> Float[Array, "*batch q_len heads v_dim"]:
    """Plans, attends and corrects in one call.

    Args:
      q: Queries.
      k: Keys.
      v: Values.
      method: What `js.xattention(...)` or another factory returns.
      params: The method's parameters, from `method.init`; `()` where it has none.
      mask: Who may see whom; the method plans within it.
      x: Hidden states, for methods that look at them.
      positions: Token positions, for methods that use them.
      state: What the method returned as `info.state` at the step or layer before.
      key: A PRNG key, for methods that sample.
      **attend: Keywords of `js.attend`: bias, score_mod, sinks, softcap, scale, implementation.
    """
    out, _ = method.attend(
        params, q, k, v, x=x, positions=positions, mask=mask, state=state, key=key, **attend
    )
    return out
