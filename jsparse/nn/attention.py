"""`SparseAttention`: projections, rotary positions and any method, as a Flax NNX module."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jsparse import checks
from jsparse.core.rotary import rotary
from jsparse.nn.cache import KVCache
from jsparse.nn.layer import AttentionLayer
from jsparse.types import Mask, Method


class SparseAttention(AttentionLayer):
    """Multi-head attention with grouped keys and values, sparse by any method.

    What can be assigned to a built one stands at `AttentionLayer`.
    """

    def __init__(
        self,
        in_features: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        method: Method | None = None,
        rope_base: float | None = 10_000.0,
        use_bias: bool = False,
        sinks: bool = False,
        softcap: float | None = None,
        share_qk: bool = False,
        implementation: str | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Makes the layer.

        Args:
          in_features: Width of the input and of the output.
          num_heads: Query heads.
          num_kv_heads: Key and value heads; divides `num_heads`, default equal to it.
          head_dim: Features per head, default `in_features // num_heads`; even with rotary.
          method: What chooses the pairs to compute. Default: all that the mask allows.
          rope_base: Base of the rotary embedding; None leaves it out.
          use_bias: Whether projections have biases.
          sinks: Whether each head has a learned sink logit.
          softcap: See `js.attend`.
          share_qk: Whether keys are the queries, so that there is no projection of keys; then there
            are as many kv heads as heads.
          implementation: See `js.attend`.
          dtype: The computation's dtype, default that of the input and parameters.
          param_dtype: The parameters' dtype.
          rngs: Where initial parameters come from.

        Raises:
          ValueError: if heads do not divide, a size is not positive, or the method turns back
            positions of another base.
        """
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        checks.positive(in_features=in_features, num_heads=num_heads, num_kv_heads=num_kv_heads)
        checks.multiple(of=num_kv_heads, num_heads=num_heads)
        checks.keys_for_all_queries(share_qk, num_heads, num_kv_heads)
        if head_dim is None:
            checks.multiple(of=num_heads, in_features=in_features)
            head_dim = in_features // num_heads
        if rope_base is not None:
            checks.multiple(of=2, head_dim=head_dim)
        self.in_features, self.head_dim = in_features, head_dim
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.rope_base = rope_base
        self.softcap, self.implementation = softcap, implementation

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(
                inputs, outputs, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.q_proj = linear(in_features, num_heads * head_dim)
        self.k_proj = None if share_qk else linear(in_features, num_kv_heads * head_dim)
        self.v_proj = linear(in_features, num_kv_heads * head_dim)
        self.out_proj = linear(num_heads * head_dim, in_features)
        self.sinks = nnx.Param(jnp.zeros((num_heads,), param_dtype)) if sinks else None
        self._take(method, rngs)

    def sizes(self, method: Method | None = None) -> dict[str, Any]:
        """What a method's parameters are made for."""
        heads = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads}
        return {**heads, "dim": self.head_dim, "features": self.in_features}

    def rotation(self) -> float | None:
        """Base of the rotary positions of q and k."""
        return self.rope_base

    def options(self) -> dict[str, Any]:
        """The keywords of `js.attend` that the layer calls it with."""
        sinks = None if self.sinks is None else self.sinks[...]
        return {"sinks": sinks, "softcap": self.softcap, "implementation": self.implementation}

    def init_cache(
        self, batch_shape: tuple[int, ...], max_len: int, dtype: Any = jnp.float32
    ) -> KVCache:
        """An empty cache for `max_len` tokens of this layer, and what its method carries."""
        sizes = self.num_kv_heads, self.head_dim
        return self._with_state(KVCache.empty(batch_shape, max_len, *sizes, dtype))

    def __call__(
        self,
        x: Float[Array, "*batch length features"],
        *,
        mask: Mask | None = None,
        positions: Int[Array, "*batch length"] | None = None,
        cache: KVCache | None = None,
    ) -> Any:
        """Attends from each token to those that `mask` and the method let it see.

        Args:
          x: Hidden states.
          mask: Who may see whom. With a cache, the last of these tokens stands at the last that is
            there, whatever room is left, and a causal mask is added; arrays over keys are as long
            as the cache has room.
          positions: For the rotary embedding; default 0, 1, ... counted on from the cache.
          cache: Tokens before these. Methods that decode by themselves do so: those that are a
            mask, whose step is the row of a prompt, `blasst`, and those that carry a state. What
            others choose is a prompt's tiles, from several queries together: a step of one token
            then attends to all tokens that the mask allows.

        Returns:
          The output, `[*batch, length, features]`; with a cache `(output, cache)`.
        """
        positions = self._positions(x, mask, positions, cache)
        batch_shape, length = x.shape[:-2], x.shape[-2]

        def heads(projected: Array) -> Array:
            return projected.reshape(*batch_shape, length, -1, self.head_dim)

        q, v = heads(self.q_proj(x)), heads(self.v_proj(x))
        k = q if self.k_proj is None else heads(self.k_proj(x))
        if self.rope_base is not None:
            q = rotary(q, positions, base=self.rope_base)
            k = rotary(k, positions, base=self.rope_base)
        where = None
        if cache is not None:
            mask, where = self._after(cache, length, mask)
            cache = cache.append(k, v)
            k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
        out, cache = self._run(q, k, v, mask=mask, x=x, positions=where, cache=cache)
        out = self.out_proj(out.reshape(*batch_shape, length, -1))
        return out if cache is None else (out, cache)
