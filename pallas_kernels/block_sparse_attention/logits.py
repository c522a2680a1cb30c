"""What happens to a tile of logits in registers, and how gradients go back through it."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.warpgroup import Operations

LOG2_E = math.log2(math.e)

# apply(logits, q_index, kv_index, row_values, column_values) -> logits; element by element. The
# values come as functions that read them, for one vector of keys fills a quarter of the registers
TileRule = Callable[..., jax.Array]
# gradient(logits, q_index, kv_index, row_values, column_values, d_logits) -> what flows back to the
# logits, to each f32 value per query, to each f32 value per key
TileGradient = Callable[..., Sequence[jax.Array]]


class Rule(NamedTuple):
    """Changes logits element by element.

    Attributes:
      apply: `apply(logits, q_index, kv_index, row_values, column_values) -> logits`.
      row_values: Arrays [batch | 1, heads | 1, q_len | 1] handed to it, a value per query.
      column_values: Arrays [batch | 1, heads | 1, kv_len | 1] handed to it, a value per key.
      gradient: Takes `d_logits` besides; gives what flows back to the logits, then to each f32
        value per query, then per key. None for a rule that only hides: where it gives -inf, no
        gradient arrives.
    """

    apply: TileRule
    row_values: tuple[Any, ...] = ()
    column_values: tuple[Any, ...] = ()
    gradient: TileGradient | None = None

    @property
    def values(self) -> tuple[Any, ...]:
        """All values, those per query first."""
        return *self.row_values, *self.column_values

    def bind(self, refs: Sequence[Any]) -> "Rule":
        """The same with references, in a kernel, in the place of arrays."""
        rows = len(self.row_values)
        return self._replace(row_values=tuple(refs[:rows]), column_values=tuple(refs[rows:]))


class Place(NamedTuple):
    """Where a piece of logits lies, and which of its axes are the queries.

    `positions` is a reference to the numbers from 0 on, at least as many as there are tokens; `ops`
    are the functions of the chip on arrays in registers. Where tiles of the second axis are strips
    from several places, `listed` is a row of `positions`, which has those of their tokens in the
    order of the lists; the start on that axis counts along it, and so do values per token.
    """

    batch: jax.Array
    head: jax.Array
    q_start: jax.Array
    kv_start: jax.Array
    q_axis: int
    shape: tuple[int, int]
    positions: Any
    ops: Operations
    listed: tuple[jax.Array, ...] = ()

    def _arguments(self, rule: Rule) -> tuple[Any, ...]:
        q_axis, kv_axis = self.q_axis, 1 - self.q_axis
        return (
            self._index(self.q_start, q_axis),
            self._index(self.kv_start, kv_axis),
            self._readers(rule.row_values, self.q_start, q_axis),
            self._readers(rule.column_values, self.kv_start, kv_axis),
        )

    def _index(self, start: jax.Array, axis: int) -> jax.Array:
        ops = self.ops
        if axis == 0:
            return ops.iota(self.shape, 0) + start
        # the compiler would keep what it adds to each start in sixteen registers, for all tiles
        numbers = ops.load_columns(self.positions.at[*self.listed, pl.ds(start, self.shape[1])])
        return ops.along(numbers, self.shape, 1)

    def _readers(
        self, refs: Sequence[Any], start: jax.Array, axis: int
    ) -> tuple[Callable[[], jax.Array], ...]:
        """Functions that read the values of this piece, along one of its axes."""
        ops = self.ops
        load = (ops.load_rows, ops.load_columns)[axis]
        where = self.batch, self.head

        def reader(ref):
            at = tuple(index % size for index, size in zip(where, ref.shape, strict=False))
            if ref.shape[2] == 1:
                # one number: a register, where a vector of it would take sixteen
                return lambda: lax.broadcast_in_dim(ref[*at, 0], self.shape, ())
            tokens = pl.ds(start, self.shape[axis])
            return lambda: ops.along(load(ref.at[*at, tokens]), self.shape, axis)

        return tuple(map(reader, refs))

    def apply(self, rule: Rule, logits: jax.Array) -> jax.Array:
        """The logits of this piece, changed."""
        return rule.apply(logits, *self._arguments(rule))

    def gradient(self, rule: Rule, logits: jax.Array, d_logits: jax.Array) -> Sequence[jax.Array]:
        """What flows back to the logits that `apply` took, and to f32 values."""
        assert rule.gradient is not None
        return rule.gradient(logits, *self._arguments(rule), d_logits)


class Tiles(NamedTuple):
    """Static: tile sizes, and what happens to the logits in them.

    Attributes:
      block_q: Queries per block of the lists: 64 or 128, on Hopper also 8, 16 or 32.
      block_kv: Keys per block of the lists: the same.
      scale: Constant positive factor on the logits, before all else.
      rule: Changes the logits of every tile. None changes nothing.
      mask: Hides, in the tiles that a list does not call whole, with -inf. None hides nothing.
    """

    block_q: int
    block_kv: int
    scale: float | None = None
    rule: Rule | None = None
    mask: Rule | None = None

    @property
    def changes(self) -> bool:
        """Whether anything but a constant scale happens to logits."""
        return self.rule is not None or self.mask is not None

    @property
    def values(self) -> tuple[Any, ...]:
        """The arrays that a kernel is given for rule and mask."""
        return sum((rule.values for rule in (self.rule, self.mask) if rule), ())

    @property
    def column_values(self) -> int:
        """How many of them have a value per key."""
        return sum(len(rule.column_values) for rule in (self.rule, self.mask) if rule)

    def bind(self, refs: Sequence[Any]) -> "Tiles":
        """The same with references, in a kernel, in the place of arrays."""
        count = len(self.rule.values) if self.rule else 0
        return self._replace(
            rule=self.rule and self.rule.bind(refs[:count]),
            mask=self.mask and self.mask.bind(refs[count:]),
        )

    def arranged(
        self,
        rows: Callable[[jax.Array], jax.Array],
        columns: Callable[[jax.Array], jax.Array],
    ) -> "Tiles":
        """The same with values per query and per key as these functions lay them out."""

        def each(rule: Rule | None) -> Rule | None:
            return rule and rule._replace(
                row_values=tuple(map(rows, rule.row_values)),
                column_values=tuple(map(columns, rule.column_values)),
            )

        return self._replace(rule=each(self.rule), mask=each(self.mask))

    def hiding(self, kv_len: int) -> "Tiles":
        """The same where the mask also hides keys from position `kv_len` on."""
        hide = self.mask or Rule(lambda logits, *_: logits)

        def apply(logits, q_index, kv_index, row_values, column_values):
            logits = hide.apply(logits, q_index, kv_index, row_values, column_values)
            return jnp.where(kv_index < kv_len, logits, -jnp.inf)

        return self._replace(mask=hide._replace(apply=apply))

    @property
    def to_base_2(self) -> float:
        """The factor from what `change` gives to logits in base 2."""
        # with a rule logits are in natural units; without, base 2 and scale are one factor
        return LOG2_E if self.rule else LOG2_E * self.to_raw

    @property
    def to_raw(self) -> float:
        """The factor that gradients from `pull_back` lack."""
        return 1.0 if self.rule or self.scale is None else self.scale

    def _scaled(self, x: jax.Array) -> jax.Array:
        return x if self.scale is None else x * self.scale

    def change(self, raw: jax.Array, at: Place, masked: bool | jax.Array) -> jax.Array:
        """The logits of a piece, `to_base_2` apart, from its products of q and k."""
        logits = at.apply(self.rule, self._scaled(raw)) if self.rule else raw
        mask = self.mask
        if mask is None or masked is False:
            return logits
        if masked is True:
            return at.apply(mask, logits)
        return lax.cond(masked, lambda: at.apply(mask, logits), lambda: logits)

    def pull_back(self, raw: jax.Array, at: Place, d_logits: jax.Array) -> Sequence[jax.Array]:
        """What flows back to the products, `to_raw` apart, and to the rule's f32 values."""
        if self.rule is None:
            return (d_logits,)
        # or the compiler would keep what the rule computed until it is needed again
        again = lax.optimization_barrier(self._scaled(raw))
        d_scaled, *d_values = at.gradient(self.rule, again, d_logits)
        return self._scaled(d_scaled), *d_values
