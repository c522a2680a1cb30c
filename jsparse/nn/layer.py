"""What attention layers share: a method with its parameters, and how it runs in a layer."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jsparse import checks
from jsparse.attention.attend import attend
from jsparse.masks import causal
from jsparse.masks.lengths import in_room
from jsparse.nn.cache import KVCache, LatentCache
from jsparse.types import Mask, Method, Untrained

AttentionFn = Callable[..., Array]
Cache = TypeVar("Cache", KVCache, LatentCache)


class Statistic(nnx.Variable):
    """What a method's own rule moves, and no optimizer: leaves of `jsparse.types.Untrained`."""


class AttentionLayer(nnx.Module):
    """A layer that turns hidden states into q, k, v, which any method attends with.

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

    in_features: int
    method: Method | None
    method_params: Any
    implementation: str | None
    attention: AttentionFn | None
    observe: Callable[[Any], None] | None
    use_running_average: bool

    def sizes(self, method: Method | None = None) -> dict[str, Any]:
        """What a method's parameters are made for."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The keywords of `js.attend` that the layer calls it with."""
        return {"implementation": self.implementation}

    def rotation(self) -> float | None:
        """Base of the rotary positions of q and k, halves paired; None unless all features do."""
        raise NotImplementedError

    def check(self, method: Method | None) -> None:
        """Refuses what is no method, or one that would turn back other positions."""
        if method is not None:
            checks.method_type(method)
            checks.positions_to_turn_back(method.rope_base, self.rotation(), type(self).__name__)

    def new_params(self, method: Method | None, rngs: nnx.Rngs) -> Any:
        """The parameters of a method for this layer's sizes, as `method_params` has them."""
        self.check(method)
        if method is None:
            return ()
        return _variables(method.init(rngs.params(), **self.sizes(method)))

    def params(self) -> Any:
        """The method's parameters, as it takes them."""
        return jax.tree.map(lambda x: x[...], self.method_params, is_leaf=_is_variable)

    def _take(self, method: Method | None, rngs: nnx.Rngs) -> None:
        """Begins with a method, after what the sizes of its parameters depend on is there."""
        self.method = method
        self.method_params = nnx.data(self.new_params(method, rngs))
        self.attention = None
        self.observe = None
        self.use_running_average = True

    def _with_state(self, cache: Cache) -> Cache:
        """An empty cache with what the method carries."""
        if self.method is None or self.method.init_state is None:
            return cache
        return dataclasses.replace(cache, state=self.method.init_state(cache.k, cache.v))

    def _positions(
        self,
        x: Float[Array, "*batch length features"],
        mask: Mask | None,
        positions: Int[Array, "*batch length"] | None,
        cache: KVCache | LatentCache | None,
    ) -> Int[Array, "*batch length"]:
        """Checks what a call is given, and says where its tokens stand."""
        checks.features(x.shape[-1], self.in_features)
        if mask is not None:
            checks.mask_type(mask)
        if positions is not None:
            return positions
        start = jnp.zeros(x.shape[:-2], jnp.int32) if cache is None else cache.length
        return start[..., None] + jnp.arange(x.shape[-2], dtype=jnp.int32)

    def _after(
        self, cache: KVCache | LatentCache, length: int, mask: Mask | None
    ) -> tuple[Mask, Int[Array, "*batch length"]]:
        """Whom so many tokens after those of a cache may see, and where they stand in it."""
        past = causal(offset=cache.length)
        where = cache.length[..., None] + jnp.arange(length, dtype=jnp.int32)
        return past if mask is None else in_room(mask, cache.length + length) & past, where

    def _run(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        mask: Mask | None,
        x: Any,
        positions: Array | None,
        cache: Cache | None,
    ) -> tuple[Array, Cache | None]:
        """What the layer's method, or what stands in its place, makes of q, k, v; and the cache.

        With a cache, k and v are all that it has room for.
        """
        method = self.method if self.attention is None else None
        if cache is not None and method is not None and method.init_state is not None:
            checks.a_state(cache.state, jax.eval_shape(method.init_state, cache.k, cache.v))
            given = {"mask": mask, "x": x, "positions": positions, "state": cache.state}
            out, info = method.attend(self.params(), q, k, v, **given, **self.options())
            self._tell(info)
            return out, dataclasses.replace(cache, state=info.state)
        decodes = cache is not None and q.shape[-3] == 1
        run = self._dense if decodes else self.attention or self._method
        return run(q, k, v, mask=mask, x=x, positions=positions), cache

    def _dense(
        self, q: Array, k: Array, v: Array, *, mask: Mask | None, x: Any, positions: Array | None
    ) -> Array:
        return attend(q, k, v, mask=mask, **self.options())

    def _method(
        self, q: Array, k: Array, v: Array, *, mask: Mask | None, x: Any, positions: Array | None
    ) -> Array:
        if self.method is None:
            return self._dense(q, k, v, mask=mask, x=x, positions=positions)
        params = self.params()
        out, info = self.method.attend(
            params, q, k, v, mask=mask, x=x, positions=positions, **self.options()
        )
        if self.method.update is not None and not self.use_running_average:
            moved = self.method.update(params, info)
            jax.tree.map(_write, self.method_params, moved, is_leaf=_is_variable)
        self._tell(info)
        return out

    def _tell(self, info: Any) -> None:
        if self.observe is not None:
            self.observe(info)


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
