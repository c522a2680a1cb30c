"""Keys and values of several sequences in the pages of one pool."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jsparse import checks
from jsparse.types.integers import as_int32
from jsparse.types.pytree import pytree_dataclass


@pytree_dataclass
class PagedKV:
    """A pool of pages of keys and values, and a table that says which are whose.

    Token `t` of sequence `b` stands in page `page_table[b, t // page_size]` at `t % page_size`, for
    `t < lengths[b]`. What a table holds past the length counts for nothing, and an entry that is
    not in [0, pages) is no page: its tokens are not there. A page may be in several tables, each
    time at the same place: keys carry their position, so that is what sharing a prefix means. What
    a page holds past the length is hidden, and must be finite.

    `overflowed` says whose tokens found no room; see `js.cache.paged`.
    """

    k: Float[Array, "pages page_size kv_heads dim"]
    v: Float[Array, "pages page_size kv_heads v_dim"]
    page_table: Int[Array, "batch table_width"]
    lengths: Int[Array, " batch"]
    overflowed: Bool[Array, " batch"]

    @classmethod
    def from_table(
        cls,
        k: Float[Array, "pages page_size kv_heads dim"],
        v: Float[Array, "pages page_size kv_heads v_dim"],
        page_table: Int[Array, "batch table_width"],
        lengths: Int[Array, " batch"],
    ) -> "PagedKV":
        """Takes over pages and tables that somebody else keeps.

        Args:
          k: Keys, page by page.
          v: Values.
          page_table: The pages of each sequence, in order.
          lengths: True tokens of each sequence, those of the step at hand included.

        Raises:
          ValueError: if shapes or dtypes do not fit each other.
        """
        checks.page_table(k, v, page_table, lengths)
        table, lengths = map(as_int32, (page_table, lengths))
        return cls(k, v, table, lengths, jnp.zeros(lengths.shape, bool))

    @property
    def pages(self) -> int:
        """Pages of the pool."""
        return self.k.shape[0]

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.k.shape[1]

    @property
    def table_width(self) -> int:
        """Pages that a sequence may have."""
        return self.page_table.shape[1]

    @property
    def kv_len(self) -> int:
        """Tokens that a sequence may have: the `kv_len` of plans over its pages."""
        return self.table_width * self.page_size

    def page_counts(self) -> Int[Array, " batch"]:
        """How many pages of each table its sequence's tokens reach into."""
        return jnp.clip(-(-self.lengths // self.page_size), 0, self.table_width)

    def listed(self) -> Bool[Array, "batch table_width"]:
        """True where an entry of `page_table` counts and names a page."""
        return self.exists(self.page_table) & (
            jnp.arange(self.table_width) < self.page_counts()[:, None]
        )

    def exists(self, page: Any) -> Bool[Array, "..."]:
        """Whether numbers name pages of the pool."""
        return (page >= 0) & (page < self.pages)
