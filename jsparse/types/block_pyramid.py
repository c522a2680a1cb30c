"""Exact tiles, and what stands for the rest."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jsparse import checks
from jsparse.types.block_mask import BlockMask
from jsparse.types.integers import as_int32
from jsparse.types.pytree import array_field, pytree_dataclass, static_field


@pytree_dataclass
class BlockPyramid:
    """A tile list in which some tiles, or the tiles left out, are stood for by summaries.

    Two forms, and a plan has exactly one of them:

    * `levels`, one per entry of the list: level 0 is the exact tile, level n its keys and values
      mean-pooled over 2**n tokens, up to `top_level`. Where the keys end within 2**n tokens, the
      mean is over those that exist; the log of their number is added to a mean's logit.
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
    top_level: int = static_field(default=0)

    @classmethod
    def from_levels(
        cls,
        block_mask: BlockMask,
        levels: Int[Array, "*batch list_heads q_blocks width"],
        *,
        top_level: int | None = None,
    ) -> "BlockPyramid":
        """A plan whose entries each have a level.

        Args:
          block_mask: The entries.
          levels: From 0 to `top_level`; a traced entry of another level counts as padding.
          top_level: The highest level there may be; `block_kv` is a multiple of `2**top_level`.
            Default: the highest there is, where levels are concrete.

        Raises:
          ValueError: if levels do not fit the list or `top_level`, or they are traced and
            `top_level` is not given.
        """
        checks.levels(levels, block_mask)
        if top_level is None:
            checks.concrete_levels(levels)
            used = jnp.where(block_mask.entries(), levels, 0)
            top_level = max(0, int(used.max(initial=0)))
        checks.level_range(levels, top_level, block_mask)
        return cls(block_mask, levels=as_int32(levels), top_level=top_level)

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
