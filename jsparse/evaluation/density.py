"""How much a method computes of what it could, head by head: of one call, and of a model's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jsparse import checks
from jsparse.attention.length_switch import dense
from jsparse.core.reordering import Orders
from jsparse.evaluation.metrics import pairs_attended, pairs_visible, visible_density
from jsparse.masks.reordered import follow
from jsparse.types import BlockMask, Mask, Method


class DensityReport(NamedTuple):
    """Shares of what a mask leaves visible; prints as a line per head.

    Attributes:
      tiles: Of the tiles that hold a visible pair, those that are computed.
      pairs: Of the visible pairs of tokens, those that are attended to.
      overflowed: Whether a list was too short for what was chosen.
    """

    tiles: Float[Array, "*batch heads"]
    pairs: Float[Array, "*batch heads"]
    overflowed: Bool[Array, ""]

    def __str__(self) -> str:
        tiles, pairs = (np.asarray(x) for x in (self.tiles, self.pairs))
        sequences = tuple(range(tiles.ndim - 1))
        lines = [
            f"{name:<9}tiles {100 * a:5.1f} %   pairs {100 * b:5.1f} %"
            for name, a, b in zip(
                [*(f"head {head}" for head in range(tiles.shape[-1])), "mean"],
                [*tiles.mean(sequences), tiles.mean()],
                [*pairs.mean(sequences), pairs.mean()],
                strict=True,
            )
        ]
        if self.overflowed:
            lines.append("overflowed: a list was too short, tiles are missing; pass a larger width")
        return "\n".join(lines)


def density_report(
    method: Method | None,
    q: Float[Array, "*batch q_len heads dim"],
    k: Float[Array, "*batch kv_len kv_heads dim"],
    v: Float[Array, "*batch kv_len kv_heads v_dim"],
    *,
    mask: Mask | None = None,
    params: Any = (),
    **given: Any,
) -> DensityReport:
    """Counts what a method computes of the tiles and pairs that the mask leaves visible.

    Tiles come from the method's plan, pairs from running it with every logit zero, which sees what
    it hides inside its tiles too. Works under `jit`. Where a method mixes several attentions, tiles
    are of its plan and pairs of all of them, added up: a pair that two compute counts twice, one
    with a compressed key as one.

    Args:
      method: What plans and attends; None attends to all that the mask allows.
      q: Queries.
      k: Keys.
      v: Values.
      mask: Who may see whom.
      params: The method's parameters.
      **given: What else it takes: x, positions, state, key.
    """
    batch_shape, (q_len, heads, _), kv_len = q.shape[:-3], q.shape[-3:], k.shape[-3]
    method = dense if method is None else method
    plan, info = method.plan(params, q, k, v=v, mask=mask, **given)
    in_order = follow(mask, Orders.of(info), heads, (q_len, kv_len))
    tiles = visible_density(plan, in_order, heads)
    attended = pairs_attended(method, q, k, v, params=params, mask=mask, **given)
    visible = pairs_visible(mask, q_len, kv_len, heads, batch_shape)
    # one list of tiles, several that are executed in parts, or none
    parts = jax.tree.leaves(plan, is_leaf=lambda part: isinstance(part, BlockMask))
    overflowed = jnp.asarray([part.overflowed.any() for part in parts], bool).any()
    tiles = jnp.broadcast_to(tiles, (*batch_shape, heads))
    return DensityReport(tiles, attended / jnp.maximum(visible, 1.0), overflowed)


def reporting(method: Method | None, observe: Callable[[DensityReport], None]) -> Method:
    """The same method, which says of each call how much it computes, whatever calls it.

    It goes where methods go: `js.nn.SparseAttention`, `js.nn.attention_fn`,
    `js.dot_product_attention`, `js.sparse_attention`. What it computes stays as it was; the report
    costs a plan and attention besides.

    Args:
      method: What plans and attends; None attends to all that the mask allows.
      observe: `observe(report)` is given a `density_report` of each call, `reports.append` say.
        While a function is traced its arrays are traced too: return them from that function.

    Raises:
      ValueError: if `method` is of another type.
    """
    of = dense if method is None else method
    checks.method_type(of)

    def attend(params, q, k, v, *, x=None, positions=None, mask=None, state=None, key=None, **more):
        given = {"x": x, "positions": positions, "mask": mask, "state": state, "key": key}
        still = jax.lax.stop_gradient((q, k, v))
        observe(density_report(of, *still, params=params, **given))
        return of.attend(params, q, k, v, **given, **more)

    return of._replace(attend=attend)


def density_of_layers(model: Any, *inputs: Any, **options: Any) -> list[DensityReport]:
    """Runs a model and reports on each attention layer, in the order of `js.nn.attention_layers`.

    A model that is not asked is not touched: nothing is kept, nothing is computed besides.

    Args:
      model: A Flax NNX model with `js.nn.SparseAttention` layers.
      *inputs: What it is called with.
      **options: The same, by keyword.

    Raises:
      ValueError: if the model has no such layer, or one does not run exactly once.
    """
    from flax import nnx

    from jsparse.nn import attention_layers

    def reported(layer: Any, found: list[DensityReport]):
        run = layer.attention or layer._method

        def attention(q, k, v, *, mask, x, positions):
            options = {"mask": mask, "params": layer.params(), "x": x, "positions": positions}
            found.append(density_report(layer.method, q, k, v, **options))
            return run(q, k, v, mask=mask, x=x, positions=positions)

        return attention

    copy = nnx.merge(*nnx.split(model))
    layers = attention_layers(copy)
    reports: list[list[DensityReport]] = [[] for _ in layers]
    for layer, found in zip(layers, reports, strict=True):
        layer.attention = reported(layer, found)
    copy(*inputs, **options)
    checks.each_runs_once(reports)
    return [report for (report,) in reports]
