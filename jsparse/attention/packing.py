"""Query heads of a group as rows of one tile, where they share a list and tiles hold few queries.

Such a tile reads the same keys once for each of these heads, and gives products few rows. Packed,
row `token * group + member` stands for a token and a head of its group; `LogitRule.owner` says
which, so that masks, bias and score_mod see true positions and heads.

Where a tile's rows are not as many as a kernel's tiles can have, rows that count for nothing are
appended to each.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jsparse.attention.logits import LogitRule, Operands
from jsparse.types import BlockMask
from jsparse.types.pytree import carrying

Packed = tuple[Operands, BlockMask, LogitRule]


class Rows(NamedTuple):
    """How many rows the tiles of an executor should have.

    Attributes:
      enough: Tiles of so many queries fill the rows of a product by themselves.
      most: No tile may have more; default any number.
    """

    enough: int
    most: int | None = None


def pack(operands: Operands, plan: BlockMask, rule: LogitRule, rows: Rows) -> Packed:
    """The problem with each group of query heads as one head; as it is where that does not pay.

    Where all heads of a group make too many rows, equal parts of it become a head each.
    """
    heads, kv_heads = operands.q.shape[-2], operands.k.shape[-2]
    whole = heads // kv_heads
    most = whole if rows.most is None else max(1, rows.most // plan.block_q)
    group = next(n for n in range(min(whole, most), 0, -1) if whole % n == 0)
    if group == 1 or plan.list_heads > kv_heads or plan.block_q >= rows.enough:
        return operands, plan, rule
    packed = dataclasses.replace(plan, q_len=plan.q_len * group, block_q=plan.block_q * group)
    # rows of tiles are as many as before
    plan = carrying(packed, turned=plan.turned)
    operands = operands._replace(q=_to_rows(operands.q, group))
    return operands, plan, rule._replace(group=group)


def unpack(
    out: Float[Array, "batch rows kv_heads v_dim"], lse: Float[Array, "batch kv_heads rows"], group
) -> tuple[Float[Array, "batch q_len heads v_dim"], Float[Array, "batch heads q_len"]]:
    """Output and lse with the query heads apart again."""
    if group == 1:
        return out, lse
    batches, rows, kv_heads, v_dim = out.shape
    out = out.reshape(batches, rows // group, group, kv_heads, v_dim).swapaxes(2, 3)
    lse = lse.reshape(batches, kv_heads, rows // group, group).swapaxes(2, 3)
    return out.reshape(batches, rows // group, -1, v_dim), lse.reshape(batches, -1, rows // group)


class Filling(NamedTuple):
    """Rows appended to each tile of queries.

    They stand for the last row of their tile, so that what is looked up for them is there.

    Attributes:
      rows: Of a tile, without them.
      filled: Of a tile, with them.
    """

    rows: int
    filled: int

    def length(self, rows: int) -> int:
        """How many rows the tiles have that so many fill or begin."""
        return -(-rows // self.rows) * self.filled

    def fill(
        self, x: Shaped[Array, "..."], axis: int = 1, value: float = 0.0
    ) -> Shaped[Array, "..."]:
        """Whole tiles along an axis, with their appended rows of this value."""
        if self.rows == self.filled:
            return x
        tiles = x.reshape(*x.shape[:axis], -1, self.rows, *x.shape[axis + 1 :])
        pads = [(0, 0)] * tiles.ndim
        pads[axis + 1] = 0, self.filled - self.rows
        padded = jnp.pad(tiles, pads, constant_values=value)
        return padded.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    def cut(self, x: Shaped[Array, "..."], axis: int = 1) -> Shaped[Array, "..."]:
        """Whole tiles along an axis, without their appended rows."""
        if self.rows == self.filled:
            return x
        tiles = x.reshape(*x.shape[:axis], -1, self.filled, *x.shape[axis + 1 :])
        cut = jax.lax.slice_in_dim(tiles, 0, self.rows, axis=axis + 1)
        return cut.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    def row(self, filled: Any) -> Any:
        """The row that stands at an index among filled ones."""
        if self.rows == self.filled:
            return filled
        tile = jax.lax.div(filled, jnp.int32(self.filled))
        within = jnp.minimum(filled - tile * self.filled, self.rows - 1)
        return tile * self.rows + within


def _to_rows(q: Array, group: int) -> Float[Array, "batch rows kv_heads dim"]:
    batches, q_len, heads, dim = q.shape
    q = q.reshape(batches, q_len, heads // group, group, dim).swapaxes(2, 3)
    return q.reshape(batches, q_len * group, heads // group, dim)
