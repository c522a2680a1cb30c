"""A method: pure functions, their hyper-parameters captured by the factory's closure."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from jsparse.types.block_mask import BlockMask
from jsparse.types.mask import Mask
from jsparse.types.pytree import pytree_dataclass


class Branch(NamedTuple):
    """One of several attentions that a method mixes, each with a softmax of its own.

    Attributes:
      k: Its keys, which may stand for several tokens each.
      plan: The tiles of them that are computed; None: those that the mask touches.
      mask: Who may see whom.
    """

    k: Float[Array, "*batch kv_len kv_heads dim"]
    plan: BlockMask | None
    mask: Mask | None


@pytree_dataclass
class Untrained:
    """Parameters that no gradient moves; a method's `update` does. Subclasses have the fields.

    Their gradients are zeros, which weight decay does not care for: give optimizers the others
    alone, as `nnx.Optimizer(model, ..., wrt=nnx.Param)` does, or `optax.masked` with False here.
    """


class LatentStates(NamedTuple):
    """Hidden states, and the low-rank queries that latent attention makes of them.

    Attributes:
      x: The hidden states; or their width.
      q_latent: The low-rank queries, normalised, of which it makes those of its heads; or their
        width.
    """

    x: Any
    q_latent: Any

    @classmethod
    def of(cls, x: Any) -> "LatentStates":
        """Both of what a method is given; hidden states by themselves stand for both."""
        return x if isinstance(x, cls) else cls(x, x)


class Method(NamedTuple):
    """What a factory such as `js.xattention(threshold=0.9)` returns.

    Attributes:
      init: `init(key, *, num_heads, num_kv_heads, dim, features) -> params`; `()` without any.
      plan: `plan(params, q, k, *, v, x, positions, mask, state, key) -> (plan, info)`; all after
        `k` optional. Where tiles are of tokens in another order, the fields `q_order` and
        `kv_order` of `info` say so.
      attend: `attend(params, q, k, v, *, x, positions, mask, state, key, **attend) -> (out, info)`,
        where the attend keywords are those of `js.attend` (bias, sinks, softcap, scale, ...); with
        `return_lse=True`, `out` is `(out, lse)`. Where attending itself skips tiles, the fields
        `scored` and `kept` of either `info` are the plans of what it looks at and what it keeps.
        Where it mixes several attentions, the field `branches` of either `info` has a `Branch` of
        each.
      init_state: `init_state(k, v) -> state`, the `state` of the first step over a cache of these
        shapes; `info.state` is that of the next. A method that has it decodes by itself, and one
        that has nothing to carry has `()` there. None where a choice is made for several queries
        together, such as a tile of them, so that a step of decoding attends to all keys instead.
      update: `update(params, info) -> params`, what a step of training makes of the parameters
        that are `Untrained`. None where there are none.
      of_latents: Whether it makes something of low-rank queries where there are some: its `x` may
        be `LatentStates` then, and `features` of `init` the widths of both.
      rope_base: Base of the rotary positions that all features of q and k have to carry, halves
        paired, for the method turns them back. None where it takes q and k as they come.
    """

    init: Callable[..., Any]
    plan: Callable[..., Any]
    attend: Callable[..., Any]
    init_state: Callable[..., Any] | None = None
    update: Callable[..., Any] | None = None
    of_latents: bool = False
    rope_base: float | None = None
