"""The gradient of the tiles of one step: the same wherever rows and columns come from."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jsparse.attention.block_sparse import Sizes
from jsparse.attention.lanes import (
    Bias,
    Blocks,
    ColumnSums,
    across,
    from_rows,
    on_rows,
    scores,
    weighted_columns,
    weighted_rows,
)
from jsparse.attention.logits import LogitRule, Operands
from jsparse.types import Mask


class Modifiers(NamedTuple):
    """What changes logits and has a gradient: tiles of the bias, the scale, captured floats."""

    bias: Any  # an array, or None where there is none; and so the scale
    scale: Any
    captured: tuple[Array, ...]

    def add(self, step: "Modifiers", bias: Bias, queries: Blocks, keys: Blocks) -> "Modifiers":
        """Sums with those of a step added; the sums of the bias are kept tile by tile."""
        return Modifiers(
            None if step.bias is None else bias.add(self.bias, queries, keys, step.bias),
            None if step.scale is None else self.scale + step.scale,
            jax.tree.map(jnp.add, self.captured, step.captured),
        )


class Terms(NamedTuple):
    """What the derivative of a softmax wants per row, in blocks of queries.

    The lse of a row that saw nothing is +inf, so that its probabilities are 0. Delta is the row sum
    of `out * d_out`, less the gradient of the lse.
    """

    lse: Float[Array, "batch heads q_blocks block_q"]
    delta: Float[Array, "batch heads q_blocks block_q"]

    @classmethod
    def of(cls, out: Array, lse: Array, d_out: Array, d_lse: Array, sizes: Sizes) -> "Terms":
        """From the outputs, lengths being whole tiles, and their gradients."""
        empty = jnp.isneginf(lse)
        delta = jnp.swapaxes((out * d_out.astype(jnp.float32)).sum(-1), 1, 2)
        delta = delta - jnp.where(empty, 0.0, d_lse)
        lse = jnp.where(empty, jnp.inf, lse)
        shape = sizes.batches, sizes.heads, sizes.q_blocks, sizes.block_q
        return cls(lse.reshape(shape), delta.reshape(shape))


class OwnRows(NamedTuple):
    """What a step has of its rows, in the orders that products take them in."""

    queries: Float[Array, "lanes dim_parts rows dim_part"]
    d_outs: Float[Array, "lanes dim_parts rows dim_part"]
    summed_queries: Float[Array, "lanes ..."]
    summed_d_outs: Float[Array, "lanes ..."]
    lse: Float[Array, "lanes rows"]
    delta: Float[Array, "lanes rows"]

    @classmethod
    def of(
        cls, queries: Array, d_outs: Array, lse: Array, delta: Array, *, few: bool = False
    ) -> "OwnRows":
        """From the rows as `scores` takes them, and whether they are few for `weighted_rows`."""
        turned = from_rows if few else across
        return cls(queries, d_outs, turned(queries), turned(d_outs), lse, delta)


class StepGradient(NamedTuple):
    """What a step gives its rows, its columns, and what changes logits."""

    queries: Float[Array, "lanes dim_parts rows dim_part"]
    keys: Float[Array, "lanes ..."]
    values: Float[Array, "lanes ..."]
    modifiers: Modifiers


class Differentiated:
    """A rule on logits and the arrays it takes, split into what has a gradient and the rest."""

    def __init__(self, operands: Operands, rule: LogitRule, mask: Mask | None, ragged: bool):
        self.operands, self.mask, self.ragged = operands, mask, ragged
        # the derivative would keep a constant as an array: d_q takes it at the end, and so does d_k
        # unless queries have it already
        self.factor = 1.0 if rule.scale is None else rule.scale
        self.of_products = 1.0 if rule.scale_fits(operands.q.dtype) else self.factor
        self.rule, self._with_scale = rule._replace(scale=None), rule
        self.inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in operands.captured]
        self.floats = tuple(
            x for x, is_float in zip(operands.captured, self.inexact, strict=True) if is_float
        )

    def zeros(self, bias: Bias) -> Modifiers:
        """Sums of gradients to begin with; those of the bias tile by tile."""
        return jax.tree.map(
            lambda x: jnp.zeros(x.shape, jnp.float32),
            Modifiers(bias.tiles, self.operands.scale, self.floats),
        )

    def queries(self, rows: Array) -> Array:
        """Rows of queries as products take them."""
        return self._with_scale.scale_in(rows)[0]

    def step(
        self, own: OwnRows, keys: Array, values: Array, bias: Bias, tiles: Any, over: Any, where
    ) -> StepGradient:
        """The gradient through a step's logits.

        Args:
          own: The rows, their queries from `queries`; an lse of +inf hides a row's logits.
          keys: The columns, as `scores` takes them.
          values: Theirs.
          bias: Whose `tiles` these are.
          tiles: What `bias.load` gave.
          over: Added to the logits; -inf where there is no column.
          where: Row, key, sequence and head of each logit.
        """

        def modify(products, bias_tiles, scale, floats):
            rows = bias.on_rows(bias_tiles, own.lse.shape[1])
            return self.rule.modify(products, rows, scale, self._captured(floats), *where)

        products = scores(own.queries, keys) * self.of_products
        logits, pullback = jax.vjp(modify, products, tiles, self.operands.scale, self.floats)
        logits = self.rule.hide(logits, self.mask, *where, ragged=self.ragged)
        probs = jnp.exp(logits + over - on_rows(own.lse))
        d_logits = probs * (scores(own.d_outs, values) - on_rows(own.delta))
        d_raw, *d_modifiers = pullback(d_logits)
        d_raw = d_raw.astype(own.queries.dtype)
        return StepGradient(
            weighted_columns(d_raw, keys),
            weighted_rows(own.summed_queries, d_raw),
            weighted_rows(own.summed_d_outs, probs.astype(values.dtype)),
            Modifiers(*d_modifiers),
        )

    def of_queries(self, d_q: Array) -> Array:
        """The gradient by queries, from sums over all their keys."""
        return (d_q * self.factor).astype(self.operands.q.dtype)

    def of_operands(
        self, d_q: Array, d_k: ColumnSums, d_v: ColumnSums, sums: Modifiers, bias: Bias
    ) -> Operands:
        """The gradient by the operands, from that by queries and sums over all steps."""
        d_k = ColumnSums(d_k.sums * self.of_products)
        of, floats = self.operands, iter(sums.captured)
        captured: Any = tuple(
            next(floats).astype(x.dtype) if is_float else np.zeros(x.shape, jax.dtypes.float0)
            for x, is_float in zip(of.captured, self.inexact, strict=True)
        )
        return Operands(
            d_q.reshape(of.q.shape),
            d_k.like(of.k),
            d_v.like(of.v),
            None if of.bias is None else bias.like(sums.bias, of.bias),
            None if of.scale is None else sums.scale.astype(of.scale.dtype),
            captured,
        )

    def _captured(self, floats: tuple[Array, ...]) -> tuple[Array, ...]:
        of_floats = iter(floats)
        return tuple(
            next(of_floats) if is_float else x
            for x, is_float in zip(self.operands.captured, self.inexact, strict=True)
        )
