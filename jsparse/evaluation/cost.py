"""The accountant: floating-point operations and bytes, counted rather than timed."""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from jsparse.types import BlockMask


class Cost(NamedTuple):
    """Floating-point operations, and bytes read and written at least."""

    flops: float
    bytes: float


def attend_cost(
    plan: BlockMask, *, heads: int, kv_heads: int, dim: int, v_dim: int, itemsize: int = 4
) -> Cost:
    """Counts what attending to a plan takes, forward.

    Two products per tile; queries and outputs once, keys and values once per tile.
    """
    per_list = float(plan.kv_num_blocks.sum())
    tiles = per_list * heads / plan.list_heads
    flops = 2.0 * tiles * plan.block_q * plan.block_kv * (dim + v_dim)
    batches = prod(plan.batch_shape)
    rows = batches * plan.q_len * heads * (dim + v_dim)
    return Cost(flops, itemsize * (rows + tiles * plan.block_kv * (dim + v_dim)))


def count_flops(function: Callable[..., Any], *args: Any) -> float:
    """Counts the floating-point operations of a traceable function.

    Two per multiply-add of a product, one per element of any other floating-point result; bodies
    of scans count as often as they run. A while loop counts once: how often it runs is not known.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        inner = sum(_count(sub) for sub in _inner(equation.params))
        if equation.primitive.name == "scan":
            inner *= equation.params["length"]
        total += inner
        if inner or equation.primitive.name in _MOVES:
            continue
        out: Any = equation.outvars[0].aval
        if equation.primitive.name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            left: Any = equation.invars[0].aval
            total += 2.0 * prod(out.shape) * prod(left.shape[axis] for axis in contracting)
        elif getattr(out, "dtype", None) is not None and out.dtype.kind in "fV":
            total += prod(out.shape)
    return total


# operations that move or make numbers without computing any
_MOVES = frozenset(
    "broadcast_in_dim reshape transpose squeeze slice dynamic_slice dynamic_update_slice gather "
    "scatter concatenate pad rev convert_element_type copy iota select_n stop_gradient".split()
)


def _inner(params: dict[str, Any]) -> list[Jaxpr]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, Jaxpr):
                found.append(item)
    return found
