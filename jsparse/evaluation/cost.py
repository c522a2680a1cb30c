"""The accountant: floating-point operations and bytes, counted rather than timed."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import jax

from jsparse import _compat
from jsparse.attention import grouped, pyramid
from jsparse.attention.problem import Plan
from jsparse.types import BlockMask, BlockPyramid, TokenGroups


class Cost(NamedTuple):
    """Floating-point operations, and bytes read and written at least."""

    flops: float
    bytes: float

    def plus(self, other: "Cost") -> "Cost":
        """Both pieces of work, one after the other."""
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def share(self, of: "Cost") -> "Cost":
        """This cost as a share of another, such as that of dense attention."""
        return Cost(self.flops / of.flops, self.bytes / of.bytes)


def attend_cost(
    plan: Plan | Sequence[Plan],
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    v_dim: int,
    itemsize: int = 4,
    scored: BlockMask | None = None,
) -> Cost:
    """Counts what attending to a plan takes, forward.

    Two products per tile; queries and outputs once, keys and values once per tile. The parts of a
    tuple add up. Where tiles are skipped on the way, `scored` are those whose logits and keys it
    takes all the same to find the plan, which is then one list.
    """
    total = Cost(0.0, 0.0)
    for part in tile_lists(plan):
        tiles, rows, _ = _sizes(part, heads, kv_heads)
        looked_at = tiles
        if scored is not None:
            # what all sequences share is looked at for each
            times = prod(part.batch_shape) / prod(scored.batch_shape)
            looked_at = times * _sizes(scored, heads, kv_heads)[0]
        per_tile = looked_at * dim + tiles * v_dim
        flops = 2.0 * part.block_q * part.block_kv * per_tile
        numbers = rows * (dim + v_dim) + part.block_kv * per_tile
        total = total.plus(Cost(flops, float(itemsize * numbers)))
    return total


def attend_backward_cost(
    plan: Plan | Sequence[Plan],
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    v_dim: int,
    itemsize: int = 4,
) -> Cost:
    """Counts what the gradients of q, k and v take, after a forward pass.

    Five products per tile, none saved: the logits again, the gradients of the probabilities and of
    q, k and v. Keys, values and their gradients once; queries, outgoing gradients, two numbers per
    row and the gradient of q, read and written, once per tile; besides, each row's output and
    outgoing gradient once for their product. The parts of a tuple add up.
    """
    total = Cost(0.0, 0.0)
    for part in tile_lists(plan):
        tiles, rows, columns = _sizes(part, heads, kv_heads)
        flops = 2.0 * tiles * part.block_q * part.block_kv * (3 * dim + 2 * v_dim)
        per_tile = part.block_q * (3 * dim + v_dim + 2)
        numbers = 2 * rows * v_dim + tiles * per_tile + 2 * columns * (dim + v_dim)
        total = total.plus(Cost(flops, float(itemsize * numbers)))
    return total


def tile_lists(plan: Plan | Sequence[Plan]) -> tuple[BlockMask, ...]:
    """The lists of tiles that a plan of any kind comes down to where nothing is masked."""
    if isinstance(plan, BlockMask):
        return (plan,)
    if isinstance(plan, TokenGroups):
        groups = plan.without_missing_tokens()
        return (grouped.tile_list(groups, grouped.tile_side(groups, 1)),)
    if isinstance(plan, BlockPyramid):
        return pyramid.tile_lists(plan)
    return tuple(tiles for part in plan for tiles in tile_lists(part))


def plan_cost(plan_of: Callable[..., Any], *args: Any) -> Cost:
    """Counts what making a plan takes: `count_flops`, its inputs read and the plan written once."""
    arrays = jax.tree.leaves((args, jax.eval_shape(plan_of, *args)))
    size = sum(prod(x.shape) * x.dtype.itemsize for x in arrays)
    return Cost(count_flops(plan_of, *args), float(size))


def _sizes(plan: BlockMask, heads: int, kv_heads: int) -> tuple[float, int, int]:
    """Tiles over all query heads, rows over all query heads, columns over all kv heads."""
    tiles = float(plan.kv_num_blocks.sum()) * heads / plan.list_heads
    batches = prod(plan.batch_shape)
    return tiles, batches * plan.q_len * heads, batches * plan.kv_len * kv_heads


def count_flops(function: Callable[..., Any], *args: Any) -> float:
    """Counts the floating-point operations of a traceable function.

    Two per multiply-add of a product, one per element of any other floating-point result; bodies
    of scans count as often as they run. A while loop counts once: how often it runs is not known.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        inner = sum(_count(sub) for sub in _compat.inner_jaxprs(equation.params))
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
