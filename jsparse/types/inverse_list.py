"""Lists turned round: per column the rows that name it, counted and placed without a sort."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jsparse.types.pytree import array_field, pytree_dataclass


@pytree_dataclass
class InverseList:
    """Per kv block the query blocks that use it, as one flat list per head (CSR).

    The ids of kv block `j` are `q_indices[..., offsets[j] : offsets[j + 1]]`, ascending.
    """

    q_indices: Int[Array, "*batch list_heads entries"] = array_field(core_ndim=2)
    offsets: Int[Array, "*batch list_heads kv_blocks_plus_1"] = array_field(core_ndim=2)

    @property
    def q_num_blocks(self) -> Int[Array, "*batch list_heads kv_blocks"]:
        """How many query blocks use each kv block."""
        return self.offsets[..., 1:] - self.offsets[..., :-1]


class Ranks(NamedTuple):
    """Where each entry of some lists stands among those that name the same column."""

    ranks: Int[Array, "lists rows width"]
    counts: Int[Array, "lists columns"]


def column_ranks(entries: Int[Array, "lists rows width"], columns: int) -> Ranks:
    """For each entry how many earlier rows of its list name the same column.

    A row names a column once; entries outside [0, columns) are padding, and their ranks mean
    nothing. Time and memory are those of the entries: rows are cut into segments, as many as make
    a table of a number per segment and column as large as the lists. A table of counts gives each
    segment its first ranks; then all segments walk their rows side by side. No two entries of a
    step meet, so nothing depends on an order that a device may choose.
    """
    lists, rows, width = entries.shape
    steps = -(-rows // min(rows, max(1, rows * width // columns)))
    segments = -(-rows // steps)
    # padding has a column of its own, which is cut off
    inside = (entries >= 0) & (entries < columns)
    entries = jnp.where(inside, entries, columns)
    padded = jnp.pad(
        entries, ((0, 0), (0, segments * steps - rows), (0, 0)), constant_values=columns
    )
    padded = padded.reshape(lists, segments, steps, width)
    owner = jnp.arange(lists)[:, None, None], jnp.arange(segments)[:, None]

    def counted(table: Array, named: Array, **options) -> Array:
        return table.at[(*owner, named)].add(1, mode="promise_in_bounds", **options)

    table = jnp.zeros((lists, segments, columns + 1), jnp.int32)
    table = counted(table, padded.reshape(lists, segments, -1))
    before = jnp.cumsum(table, axis=1, dtype=jnp.int32)
    counts = before[:, -1, :-1]

    def step(table, named):
        ranks = table.at[(*owner, named)].get(mode="promise_in_bounds")
        return counted(table, named), ranks

    _, ranks = jax.lax.scan(step, before - table, jnp.moveaxis(padded, 2, 0))
    ranks = jnp.moveaxis(ranks, 0, 2).reshape(lists, segments * steps, width)
    return Ranks(ranks[:, :rows], counts)


def from_runs(
    first: Int[Array, "columns runs"], end: Int[Array, "columns runs"], entries: int
) -> InverseList:
    """The inverse of one list, of which runs of rows name each column; in an order as `Runs` have.

    Its ids have places for so many entries. Time and memory are those of the entries, which are
    only added up: rows go up by one but for the jumps from run to run.
    """
    end = jax.lax.cummax(end, axis=1)
    # what an earlier run has, a later one has not
    first = jnp.maximum(first, jnp.pad(end[:, :-1], ((0, 0), (1, 0))))
    runs = jnp.maximum(end - first, 0).reshape(-1)
    ends = jnp.cumsum(runs, dtype=jnp.int32)
    starts, listed = ends - runs, ends[-1]
    # where each run's rows stand before their places; runs without any add up to nothing
    ahead = first.reshape(-1) - starts
    jumps = jnp.zeros(entries, jnp.int32).at[starts].add(jnp.diff(ahead, prepend=0), mode="drop")
    place = jnp.arange(entries, dtype=jnp.int32)
    rows = jnp.where(place < listed, jnp.cumsum(jumps, dtype=jnp.int32) + place, 0)
    of_columns = ends.reshape(first.shape)[:, -1]
    return InverseList(rows[None], jnp.pad(of_columns, (1, 0))[None])


def invert(
    entries: Int[Array, "lists rows width"],
    columns: int,
    ids: Int[Array, "rows width"] | None = None,
) -> InverseList:
    """The inverse of lists whose padding is outside [0, columns).

    `ids` are what it names entries by; default the row that an entry is in.
    """
    lists, rows, width = entries.shape
    ranks, counts = column_ranks(entries, columns)
    offsets = jnp.pad(jnp.cumsum(counts, axis=-1, dtype=jnp.int32), ((0, 0), (1, 0)))
    inside = (entries >= 0) & (entries < columns)
    owner = jnp.arange(lists)[:, None, None]
    place = offsets.at[owner, jnp.where(inside, entries, 0)].get(mode="promise_in_bounds") + ranks
    if ids is None:
        ids = jnp.arange(rows, dtype=jnp.int32)[:, None]
    ids = jnp.broadcast_to(ids, entries.shape)
    # padding goes past the end, where nothing is written
    place = jnp.where(inside, place, rows * width)
    found = jnp.zeros((lists, rows * width), jnp.int32).at[owner, place].set(ids, mode="drop")
    return InverseList(found, offsets)
