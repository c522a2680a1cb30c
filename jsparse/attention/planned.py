"""A method that is a plan and nothing more."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jsparse import _compat, checks
from jsparse.attention.attend import attend
from jsparse.core.tiling import block_mask, with_inverse
from jsparse.types import LatentStates, Mask, Method


class Queries(NamedTuple):
    """What a method's own mask is made for.

    `offset` is the key position of the first query, per sequence; None where the last query stands
    at the last key.
    """

    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    offset: Any

    @classmethod
    def of(cls, q: Any, k: Any, positions: Any) -> "Queries":
        """From queries and their positions among the keys, None being the last ones.

        Raises:
          ValueError: if positions are not one per query, or known ones are not consecutive.
        """
        q_len, heads = q.shape[-3:-1]
        kv_len, kv_heads = k.shape[-3:-1]
        if positions is None:
            return cls(q_len, kv_len, heads, kv_heads, None)
        checks.positions_fit(positions, q_len)
        return cls(q_len, kv_len, heads, kv_heads, positions[..., 0])


class MaskedInfo(NamedTuple):
    """What a method hides element by element besides what it plans; nothing is carried on.

    `mask` is what `attend` applies inside the tiles: the caller's and the method's own.
    """

    mask: Mask | None
    state: tuple[()] = ()


def no_params(key: Any, *, num_heads: int, num_kv_heads: int, dim: int, features: int) -> tuple:
    """The parameters of a method that has none."""
    return ()


def no_state(k: Any, v: Any) -> tuple[()]:
    """The `init_state` of a method whose steps of decoding are rows of the whole as they are."""
    return ()


def has_parameters(
    method: Method, *, num_heads: int, num_kv_heads: int, dim: int, features: int | LatentStates
) -> bool:
    """Whether `method.init` makes any for these sizes; it is traced, nothing is computed."""
    if method.init is no_params:
        return False
    sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "dim": dim, "features": features}
    key = jax.eval_shape(jax.random.key, 0)
    return bool(jax.tree.leaves(jax.eval_shape(lambda key: method.init(key, **sizes), key)))


def planned(
    plan: Callable[..., Any],
    *,
    init: Callable[..., Any] = no_params,
    restrict: Callable[[Mask | None, Queries], Mask | None] = lambda mask, queries: mask,
    init_state: Callable[..., Any] | None = None,
    turn: Callable[[Any, Mask | None], Any] = lambda tiles, mask: tiles,
) -> Method:
    """Completes a plan function to a method: plan, then attend to what was planned.

    Args:
      plan: `plan(params, q, k, *, v, x, positions, mask, state, key) -> (plan, info)`.
      init: Makes the parameters; default none.
      restrict: For methods that decide element by element too: maps the caller's mask to the one
        that `attend` applies, which `info.mask` is to be.
      init_state: For methods that decode by themselves; see `Method`.
      turn: Gives a plan the inverse that a gradient needs, where it knows a shorter way, from what
        `restrict` gave.
    """

    def attend_to_plan(
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
        softcap: Any = None,
        scale: Any = None,
        return_lse: bool = False,
        implementation: str | None = None,
    ) -> tuple[Any, Any]:
        tiles, info = plan(
            params, q, k, v=v, x=x, positions=positions, mask=mask, state=state, key=key
        )
        whole = restrict(mask, Queries.of(q, k, positions))
        # what is not needed is left out of a program, but not where each step runs at once
        if _compat.is_traced(q):
            tiles = turn(tiles, whole)
        out = attend(
            q,
            k,
            v,
            tiles,
            mask=whole,
            bias=bias,
            score_mod=score_mod,
            sinks=sinks,
            softcap=softcap,
            scale=scale,
            return_lse=return_lse,
            implementation=implementation,
        )
        return out, info

    return Method(init, plan, attend_to_plan, init_state)


def masked(
    own_mask: Callable[[Queries], Mask | None], *, block_q: int = 128, block_kv: int = 128
) -> Method:
    """Completes a mask to a method: the tiles it touches, and the mask inside them.

    It knows each query by its position, so a single one gets its row of the whole.

    Args:
      own_mask: The method's mask for some queries; None hides nothing.
      block_q: Queries per tile; of a single query 1.
      block_kv: Keys per tile.
    """

    def restrict(mask, queries):
        own = own_mask(queries)
        if own is None or mask is None:
            return mask if own is None else own
        return mask & own

    def plan(params, q, k, *, v=None, x=None, positions=None, mask=None, state=None, key=None):
        whole = restrict(mask, Queries.of(q, k, positions))
        info = MaskedInfo(whole)
        if whole is None:
            return None, info
        q_len = q.shape[-3]
        sizes = {"block_q": 1 if q_len == 1 else block_q, "block_kv": block_kv}
        return block_mask(whole, q_len, k.shape[-3], **sizes), info

    def turn(tiles, whole):
        return tiles if whole is None else with_inverse(tiles, whole)

    return planned(plan, restrict=restrict, init_state=no_state, turn=turn)
