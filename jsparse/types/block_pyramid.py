"""Exact tiles, and what stands for the rest."""

from jaxtyping import Array, Float, Int

from jsparse import checks
from jsparse.types.block_mask import BlockMask
from jsparse.types.pytree import array_field, pytree_dataclass


@pytree_dataclass
class BlockPyramid:
    """A tile list in which some tiles, or the tiles left out, are stood for by summaries.

    Two forms, and a plan has exactly one of them:

    * `levels`, one per entry of the list: level 0 is the exact tile, level n its keys and values
      mean-pooled over 2**n tokens.
    * `pooled_k`, `pooled_v`, `log_count`: a column per kv block that stands for that block in every
      row whose list leaves it out, with `log_count` added to its logit in the same softmax. Values
      are means where `log_count` is the log of the token count, sums where it is 0. Under a mask a
      column stands in only for rows that may see every key of its block: a mean would show the
      others what is hidden from them, so a tile that is partly visible belongs in the list.
    """

    block_mask: BlockMask
    levels: Int[Array, "*batch list_heads q_blocks width"] | None = array_field(
        core_ndim=3, default=None
    )
    pooled_k: Float[Array, "*batch kv_blocks kv_heads dim"] | None = array_field(
        core_ndim=3, default=None
    )
    pooled_v: Float[Array, "*batch kv_blocks kv_heads v_dim"] | None = array_field(
        core_ndim=3, default=None
    )
    log_count: Float[Array, "*batch kv_blocks kv_heads"] | None = array_field(
        core_ndim=2, default=None
    )

    @classmethod
    def from_levels(
        cls, block_mask: BlockMask, levels: Int[Array, "*batch list_heads q_blocks width"]
    ) -> "BlockPyramid":
        """A plan whose entries each have a level."""
        checks.levels(levels, block_mask)
        return cls(block_mask, levels=levels)

    @classmethod
    def from_pooled(
        cls,
        block_mask: BlockMask,
        pooled_k: Float[Array, "*batch kv_blocks kv_heads dim"],
        pooled_v: Float[Array, "*batch kv_blocks kv_heads v_dim"],
        log_count: Float[Array, "*batch kv_blocks kv_heads"],
    ) -> "BlockPyramid":
        """A plan in which each block left out is stood for by one column."""
        checks.pooled_columns(pooled_k, pooled_v, log_count, block_mask)
        return cls(block_mask, pooled_k=pooled_k, pooled_v=pooled_v, log_count=log_count)

    @property
    def q_len(self) -> int:
        """Number of queries."""
        return self.block_mask.q_len

    @property
    def kv_len(self) -> int:
        """Number of keys."""
        return self.block_mask.kv_len
