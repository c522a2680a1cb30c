"""`from_length`: a method for long inputs, dense attention for short ones."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from jsparse import checks
from jsparse.attention.planned import masked
from jsparse.types import Method

# all that the caller's mask allows
dense = masked(lambda queries: None)


class DenseInfo(NamedTuple):
    """What dense attention has to say: the state that it was given and left alone."""

    state: Any


def from_length(method: Method, *, min_length: int) -> Method:
    """Attends densely below so many keys, by the method from there on.

    Lengths are static, so the choice is made while tracing and costs nothing. A cache counts as
    long as it has room. Parameters are the method's own, made for any length; below `min_length`
    they and the state are left as they are, and what the method alone is given, such as `local=` of
    `js.nsa`, is left alone: dense attention is that of q, k and v.

    Args:
      method: What plans and attends to long inputs.
      min_length: The fewest keys for which it does.

    Raises:
      ValueError: if `min_length` is not positive.
    """
    checks.positive(min_length=min_length)

    # with the signature of what they stand for, as another of these asks for it
    @functools.wraps(method.plan)
    def plan(params, q, k, *, state=None, **given):
        if k.shape[-3] >= min_length:
            return method.plan(params, q, k, state=state, **given)
        tiles, _ = dense.plan((), q, k, **_without_own(given, method.plan, dense.plan))
        return tiles, DenseInfo(state)

    @functools.wraps(method.attend)
    def attend(params, q, k, v, *, state=None, **given):
        if k.shape[-3] >= min_length:
            return method.attend(params, q, k, v, state=state, **given)
        out, _ = dense.attend((), q, k, v, **_without_own(given, method.attend, dense.attend))
        return out, DenseInfo(state)

    moves = method.update

    def update(params, info):
        if moves is None or isinstance(info, DenseInfo):
            return params
        return moves(params, info)

    own = None if moves is None else update
    return method._replace(plan=plan, attend=attend, update=own)


def _without_own(
    given: dict[str, Any], own: Callable[..., Any], plain: Callable[..., Any]
) -> dict[str, Any]:
    """Keywords but for those that only the first function has; those of neither stay, and fail."""
    of_own, of_plain = (inspect.signature(x).parameters.keys() for x in (own, plain))
    return {name: x for name, x in given.items() if name not in of_own - of_plain}
