"""Packed documents: tokens see the tokens of their own segment."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jsparse import checks
from jsparse.types import Frame, Mask, TileBounds, TileGrid, array_field, entry, pytree_dataclass
from jsparse.types.mask import Index, TileClassifier, block_extrema


@pytree_dataclass
class Segments(Mask):
    """Query `i` sees key `j` where their ids are equal and not negative."""

    q_ids: Int[Array, "*batch q_len"] = array_field(core_ndim=1)
    kv_ids: Int[Array, "*batch kv_len"] = array_field(core_ndim=1)

    def visible(self, q_index: Index, kv_index: Index, frame: Frame) -> Bool[Array, "..."]:
        q_id = self.q_ids[entry(len(self.q_ids), frame.batch), q_index]
        kv_id = self.kv_ids[entry(len(self.kv_ids), frame.batch), kv_index]
        return (q_id == kv_id) & (q_id >= 0)

    def visible_run(
        self, q_index: Index, kv_first: Index, count: int, frame: Frame
    ) -> Bool[Array, "..."]:
        q_id = self.q_ids[entry(len(self.q_ids), frame.batch), q_index]
        row = entry(len(self.kv_ids), frame.batch)
        # what keys say by themselves, kernels are told before; then two numbers are left to compare
        ids = [self.kv_ids[row, kv_first + n] for n in range(count)]
        low, high = (functools.reduce(f, ids) for f in (jnp.minimum, jnp.maximum))
        return (q_id == low) & (q_id == high) & (q_id >= 0)

    def classifier(self, grid: TileGrid) -> TileClassifier:
        q_low, q_high = block_extrema(self.q_ids, grid.block_q)
        kv_low, kv_high = block_extrema(self.kv_ids, grid.block_kv)

        def classify(q_block: Index, kv_block: Index, frame: Frame) -> TileBounds:
            q_at = entry(len(q_low), frame.batch), q_block
            kv_at = entry(len(kv_low), frame.batch), kv_block
            overlap = (q_low[q_at] <= kv_high[kv_at]) & (kv_low[kv_at] <= q_high[q_at])
            one = (q_low[q_at] == q_high[q_at]) & (kv_low[kv_at] == kv_high[kv_at])
            some = overlap & (jnp.minimum(q_high[q_at], kv_high[kv_at]) >= 0)
            return TileBounds(some, some & one & (q_low[q_at] >= 0))

        return classify

    def check_lengths(self, q_len: int, kv_len: int) -> None:
        checks.mask_length("q_ids", self.q_ids.shape[-1], q_len)
        checks.mask_length("kv_ids", self.kv_ids.shape[-1], kv_len)


def segments(
    q_ids: Int[Array, "*batch q_len"], kv_ids: Int[Array, "*batch kv_len"] | None = None
) -> Mask:
    """Lets tokens see the tokens of their own segment, such as one of several packed documents.

    Args:
      q_ids: The segment of each query; need not be sorted. A token with a negative id is padding:
        it sees nothing and nothing sees it.
      kv_ids: The segment of each key, default that of the queries.

    Raises:
      ValueError: if ids are not integers, or concrete ones are too large for int32.
    """
    kv_ids = q_ids if kv_ids is None else kv_ids
    checks.integers(q_ids=q_ids, kv_ids=kv_ids)
    remedy = (
        "number the segments by np.unique(ids, return_inverse=True)[1], over queries and keys "
        "together, and leave padding negative."
    )
    checks.within_int32(remedy, q_ids=q_ids, kv_ids=kv_ids)
    return Segments(jnp.asarray(q_ids, jnp.int32), jnp.asarray(kv_ids, jnp.int32))
