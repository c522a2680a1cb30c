"""A method that is a plan and nothing more."""

from collections.abc import Callable
from typing import Any

from jsparse.attention.attend import attend
from jsparse.types import Method


def no_params(key: Any, *, num_heads: int, num_kv_heads: int, dim: int, features: int) -> tuple:
    """The parameters of a method that has none."""
    return ()


def planned(plan: Callable[..., Any], *, init: Callable[..., Any] = no_params) -> Method:
    """Completes a plan function to a method: plan, then attend to what was planned.

    Args:
      plan: `plan(params, q, k, *, v, x, positions, mask, state, key) -> (plan, info)`.
      init: Makes the parameters; default none.
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
        implementation: str | None = None,
    ) -> tuple[Any, Any]:
        tiles, info = plan(
            params, q, k, v=v, x=x, positions=positions, mask=mask, state=state, key=key
        )
        out = attend(
            q,
            k,
            v,
            tiles,
            mask=mask,
            bias=bias,
            score_mod=score_mod,
            sinks=sinks,
            softcap=softcap,
            scale=scale,
            implementation=implementation,
        )
        return out, info

    return Method(init, plan, attend_to_plan)
