"""What happens to logits between q k^T and the softmax, the same in every implementation.

Order: scale, softcap, score_mod, bias, mask.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jsparse import _compat, checks
from jsparse.types import Frame, Mask

ScoreMod = Callable[..., Array]


class Operands(NamedTuple):
    """Everything that attention is differentiated with respect to.

    `bias` has four axes, each 1 or full. `scale` is here only when it is an array; `captured` are
    the arrays that score_mod closes over.
    """

    q: Float[Array, "batch q_len heads dim"]
    k: Float[Array, "batch kv_len kv_heads dim"]
    v: Float[Array, "batch kv_len kv_heads v_dim"]
    bias: Float[Array, "bias_batch bias_heads bias_q bias_kv"] | None = None
    scale: Float[Array, ""] | None = None
    captured: tuple[Array, ...] = ()


class LogitRule(NamedTuple):
    """The static part: which of the steps there are, and their constants.

    Each query makes `group` rows, one per query head of its group; see `packing`.
    """

    q_len: int
    kv_len: int
    scale: float | None
    softcap: float | None
    score_mod: ScoreMod | None
    group: int = 1

    @property
    def rows(self) -> int:
        """Rows of logits per head that executors see."""
        return self.q_len * self.group

    def owner(self, row: Any, head: Any) -> tuple[Any, Any]:
        """The query and the query head that a row of an executor's head stands for."""
        if self.group == 1:
            return row, head
        # not the operators, which round towards minus infinity at some cost: rows are not negative
        query = jax.lax.div(row, jnp.int32(self.group))
        return query, head * self.group + (row - query * self.group)

    @property
    def changes_logits(self) -> bool:
        """Whether anything but a constant scale acts before the mask."""
        return self.scale is None or self.softcap is not None or self.score_mod is not None

    def scaled(self, logits: Array, scale: Array | None) -> Array:
        """Applies the scale, static or traced."""
        factor = self.scale if scale is None else scale
        return logits if factor is None else logits * factor

    def scale_fits(self, dtype: Any) -> bool:
        """Whether queries of a dtype can have a constant scale in them, and nothing is lost.

        Those of 16 bits would be rounded once more: in bfloat16 they take powers of two alone, in
        float16, whose small numbers have fewer bits, none.
        """
        if self.scale is None or dtype == jnp.float16:
            return False
        return dtype == jnp.float32 or abs(math.frexp(self.scale)[0]) == 0.5

    def scale_in(self, queries: Float[Array, "..."]) -> tuple[Float[Array, "..."], "LogitRule"]:
        """The queries with the scale in them if it fits, and what is left of the rule.

        To scale the products instead takes a pass over all logits.
        """
        if not self.scale_fits(queries.dtype):
            return queries, self
        scale = jnp.asarray(self.scale, queries.dtype)
        return queries * scale, self._replace(scale=None)

    def capped(self, logits: Array) -> Array:
        """Applies the softcap."""
        if self.softcap is None:
            return logits
        return self.softcap * jnp.tanh(logits / self.softcap)

    def modify(
        self,
        logits: Float[Array, "..."],
        bias: Float[Array, "..."] | None,
        scale: Float[Array, ""] | None,
        captured: tuple[Array, ...],
        row: Int[Array, "..."],
        kv_index: Int[Array, "..."],
        batch: Int[Array, "..."] | int,
        head: Int[Array, "..."] | int,
    ) -> Float[Array, "..."]:
        """Applies scale, softcap, score_mod and bias. Rows and heads are an executor's.

        Indices broadcast against the logits.
        """
        logits = self.capped(self.scaled(logits, scale))
        if self.score_mod is not None:
            query, head = self.owner(row, head)
            logits = self.score_mod(captured, logits, batch, head, query, kv_index)
        if bias is not None:
            logits = logits + bias
        return logits

    def hide(
        self,
        logits: Float[Array, "..."],
        mask: Mask | None,
        row: Int[Array, "..."],
        kv_index: Int[Array, "..."],
        batch: Int[Array, "..."] | int,
        head: Int[Array, "..."] | int,
        *,
        ragged: bool,
    ) -> Float[Array, "..."]:
        """Sets logits of pairs that the mask forbids, or keys past the end, to -inf."""
        if ragged:
            logits = jnp.where(kv_index < self.kv_len, logits, -jnp.inf)
        if mask is not None:
            query, head = self.owner(row, head)
            frame = Frame(self.q_len, self.kv_len, batch, head)
            logits = jnp.where(mask.visible(query, kv_index, frame), logits, -jnp.inf)
        return logits


def hoist(score_mod: ScoreMod) -> tuple[ScoreMod, tuple[Array, ...]]:
    """Turns what a score_mod closes over into arguments, so that they can be differentiated.

    Args:
      score_mod: `score_mod(logit, batch, head, q_index, kv_index) -> logit` on scalars.

    Returns:
      A function of `(captured, logits, batch, head, q_index, kv_index)` on arrays that broadcast
      against each other, and the captured arrays.

    Raises:
      ValueError: if `score_mod` does not return one float.
    """
    integer = jax.ShapeDtypeStruct((), jnp.int32)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    closed = jax.make_jaxpr(score_mod)(scalar, integer, integer, integer, integer)
    checks.one_logit(closed.out_avals)

    def on_arrays(captured, logits, batch, head, q_index, kv_index):
        def on_scalars(logit, *indices):
            (out,) = _compat.closed_jaxpr_call(closed, captured, logit, *indices)
            return out.astype(jnp.float32)

        return jnp.vectorize(on_scalars)(logits, batch, head, q_index, kv_index)

    return on_arrays, tuple(jnp.asarray(c) for c in closed.consts)
