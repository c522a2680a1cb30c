"""Query heads of a group as rows of one tile, where they share a list and tiles hold few queries.

Such a tile reads the same keys once for each of these heads, and gives products few rows. Packed,
row `token * group + member` stands for a token and a head of its group; `LogitRule.owner` says
which, so that masks, bias and score_mod see true positions and heads.
"""

import dataclasses

from jaxtyping import Array, Float

from jsparse.attention.logits import LogitRule, Operands
from jsparse.types import BlockMask

Packed = tuple[Operands, BlockMask, LogitRule]


def pack(operands: Operands, plan: BlockMask, rule: LogitRule, least_queries: int) -> Packed:
    """The problem with each group of query heads as one head; as it is where that does not pay.

    Tiles of `least_queries` fill the rows of a product by themselves.
    """
    heads, kv_heads = operands.q.shape[-2], operands.k.shape[-2]
    group = heads // kv_heads
    if group == 1 or plan.list_heads > kv_heads or plan.block_q >= least_queries:
        return operands, plan, rule
    plan = dataclasses.replace(plan, q_len=plan.q_len * group, block_q=plan.block_q * group)
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


def _to_rows(q: Array, group: int) -> Float[Array, "batch rows kv_heads dim"]:
    batches, q_len, heads, dim = q.shape
    q = q.reshape(batches, q_len, heads // group, group, dim).swapaxes(2, 3)
    return q.reshape(batches, q_len * group, heads // group, dim)
