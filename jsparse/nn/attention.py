"""`SparseAttention`: projections, rotary positions and any method, as a Flax NNX module."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jsparse import checks
from jsparse.attention.attend import attend
from jsparse.core.rotary import rotary
from jsparse.masks import causal
from jsparse.masks.lengths import in_room
from jsparse.nn.cache import KVCache
from jsparse.types import Mask, Method, Untrained

AttentionFn = Callable[..., Array]


class Statistic(nnx.Variable):
    """What a method's own rule moves, and no optimizer: leaves of `jsparse.types.Untrained`."""


class SparseAttention(nnx.Module):
    """Multi-head attention with grouped keys and values, sparse by any method.

    The attribute `attention` is what turns projected q, k, v into the output; assign another
    callable of the same form to a built model to capture tensors or to change the method. A state
    that the module's method carries while decoding then stays as it is.

    Attributes:
      attention: `attention(q, k, v, *, mask, x, positions) -> out`; default: the module's method.
      observe: `observe(info)` is given what the method says of each call, while it is traced: for a
        loss that is added to a model's own. Default: nothing is.
      use_running_average: Whether the method's statistics stay as they are, which they always do
        while decoding. `model.train()` makes it False: each call then moves them, after its output
        is computed; `model.eval()` makes it True.
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
          ValueError: if heads do not divide, or a size is not positive.
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
        self.method, self.rope_base = method, rope_base
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
        self.method_params = nnx.data(self.new_params(method, rngs))
        self.attention: AttentionFn | None = None
        self.observe: Callable[[Any], None] | None = None
        self.use_running_average = True

    def new_params(self, method: Method | None, rngs: nnx.Rngs) -> Any:
        """The parameters of a method for this layer's sizes, as `method_params` has them."""
        if method is None:
            return ()
        checks.method_type(method)
        return _variables(method.init(rngs.params(), **self.sizes()))

    def sizes(self) -> dict[str, int]:
        """What a method's parameters are made for."""
        heads = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads}
        return {**heads, "dim": self.head_dim, "features": self.in_features}

    def init_cache(
        self, batch_shape: tuple[int, ...], max_len: int, dtype: Any = jnp.float32
    ) -> KVCache:
        """An empty cache for `max_len` tokens of this layer, and what its method carries."""
        cache = KVCache.empty(batch_shape, max_len, self.num_kv_heads, self.head_dim, dtype)
        if self.method is None or self.method.init_state is None:
            return cache
        return dataclasses.replace(cache, state=self.method.init_state(cache.k, cache.v))

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
        checks.features(x.shape[-1], self.in_features)
        if mask is not None:
            checks.mask_type(mask)
        batch_shape, length = x.shape[:-2], x.shape[-2]
        if positions is None:
            start = jnp.zeros(batch_shape, jnp.int32) if cache is None else cache.length
            positions = start[..., None] + jnp.arange(length, dtype=jnp.int32)

        def heads(projected: Array) -> Array:
            return projected.reshape(*batch_shape, length, -1, self.head_dim)

        q, v = heads(self.q_proj(x)), heads(self.v_proj(x))
        k = q if self.k_proj is None else heads(self.k_proj(x))
        if self.rope_base is not None:
            q = rotary(q, positions, base=self.rope_base)
            k = rotary(k, positions, base=self.rope_base)
        where = None
        if cache is not None:
            past = causal(offset=cache.length)
            where = cache.length[..., None] + jnp.arange(length, dtype=jnp.int32)
            mask = past if mask is None else in_room(mask, cache.length + length) & past
            cache = cache.append(k, v)
            k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
        method = self.method if self.attention is None else None
        if cache is not None and method is not None and method.init_state is not None:
            checks.a_state(cache.state, jax.eval_shape(method.init_state, cache.k, cache.v))
            out, info = method.attend(
                self.params(),
                q,
                k,
                v,
                mask=mask,
                x=x,
                positions=where,
                state=cache.state,
                **self._options(),
            )
            cache = dataclasses.replace(cache, state=info.state)
            self._tell(info)
        else:
            decodes = cache is not None and length == 1
            run = self._dense if decodes else self.attention or self._method
            out = run(q, k, v, mask=mask, x=x, positions=where)
        out = self.out_proj(out.reshape(*batch_shape, length, -1))
        return out if cache is None else (out, cache)

    def _dense(
        self, q: Array, k: Array, v: Array, *, mask: Mask | None, x: Array, positions: Array | None
    ) -> Array:
        return attend(q, k, v, mask=mask, **self._options())

    def _method(
        self, q: Array, k: Array, v: Array, *, mask: Mask | None, x: Array, positions: Array | None
    ) -> Array:
        if self.method is None:
            return self._dense(q, k, v, mask=mask, x=x, positions=positions)
        params = self.params()
        out, info = self.method.attend(
            params, q, k, v, mask=mask, x=x, positions=positions, **self._options()
        )
        if self.method.update is not None and not self.use_running_average:
            moved = self.method.update(params, info)
            jax.tree.map(_write, self.method_params, moved, is_leaf=_is_variable)
        self._tell(info)
        return out

    def _tell(self, info: Any) -> None:
        if self.observe is not None:
            self.observe(info)

    def params(self) -> Any:
        """The method's parameters, as it takes them."""
        return jax.tree.map(lambda x: x[...], self.method_params, is_leaf=_is_variable)

    def _options(self) -> dict[str, Any]:
        return {
            "sinks": None if self.sinks is None else self.sinks[...],
            "softcap": self.softcap,
            "implementation": self.implementation,
        }


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _variables(params: Any) -> Any:
    """Parameters as variables, of a kind that optimizers take or of one that they do not."""

    def variables(x: Any) -> Any:
        return jax.tree.map(Statistic if isinstance(x, Untrained) else nnx.Param, x)

    return jax.tree.map(variables, params, is_leaf=lambda x: isinstance(x, Untrained))


def _write(variable: nnx.Variable, value: Array) -> None:
    if isinstance(variable, Statistic):
        variable[...] = value
