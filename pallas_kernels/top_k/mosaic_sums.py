"""The best columns of each query by sums over heads, which are never written; for Hopper.

A program owns a tile of queries of all heads of a group and meets tiles of columns in ascending
order. A column has one key or several, and a column's score is a sum over the heads of the group
and over its keys: what a rule makes of each product, in f32 registers, times the key's weight.
Sums over windows, or blocks, are of the same lanes in this way, and as exact as f32.

What a tile of columns needs of keys stays in shared memory until the last head has met it. Queries
of all heads would not fit beside it: a producer warpgroup copies them by TMA, a head at a time and
again for each tile of columns, a consumer's 64 rows to a slot of the ring. That is 64 * dim numbers
for `keys * 64 * 64 * dim` products. Two products are started at once, and what a rule makes of the
first is computed while the second goes on.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import configurations, ring
from pallas_kernels.block_sparse_attention.logits import Place, Rule
from pallas_kernels.block_sparse_attention.walk import (
    RESERVED,
    ROWS,
    SHARED_MEMORY,
    Lists,
    Side,
    Sides,
    Visit,
)
from pallas_kernels.ring import Ring
from pallas_kernels.sortable import NOTHING, sortable
from pallas_kernels.top_k.kept import MOST, Kept, places
from pallas_kernels.warpgroup import Hopper, Interpreted, warpgroup

COLUMNS = 64  # of a tile
TOGETHER = 8  # columns of an array of keys come in as many, or a multiple
# what stands for a pair: not seen, seen, or taken before all others
SEEN, FORCED = 1.0, 2.0
_BELOW = NOTHING + 1  # brings the integers of numbers that are not negative below 0


class Sums(NamedTuple):
    """What scores are sums of.

    Attributes:
      weights: Of each key of a column.
      term: What becomes of a product before it is added: a rule on query heads and on the keys of
        all columns, the first ones of all columns before the second ones.
      hides: What tells pairs of queries and columns, for the heads of k: 0, `SEEN` or `FORCED`.
      forcing: Whether it may say `FORCED`; no score is negative then.
    """

    weights: tuple[float, ...]
    term: Rule
    hides: Rule
    forcing: bool


@dataclasses.dataclass(frozen=True)
class Config:
    """How a program is laid out; every legal choice gives the same result.

    Attributes:
      stages: Tiles of keys in flight, at least as many as a column has keys.
      q_stages: Tiles of queries in flight, at least 1.
      at_once: Products that are started together, at least 1; each has 32 registers of a thread.
      consumer_registers: Registers per thread of a consumer, a multiple of 8.
      producer_registers: Registers per thread of the producer, a multiple of 8.
    """

    stages: int
    q_stages: int = 2
    at_once: int = 2
    consumer_registers: int = 232
    producer_registers: int = 40
    columns = COLUMNS


def shared_memory(rows: int, dim: int, width: int, config: Config) -> int:
    """Bytes of shared memory that a program asks for, barriers apart."""
    tiles = 2 * dim * (rows * config.q_stages + COLUMNS * config.stages)
    return tiles + 8 * rows * width


def default_config(
    rows: int, keys: int, dim: int, width: int, column_values: int = 0
) -> Config | None:
    """The deepest rings that fit, or None where not even a tile's keys do.

    Two products are started at once where the compiler spilled nothing then: for two consumers, of
    which each has fewer registers, and where what the rule reads per key is little.
    """
    at_once = 2 if rows > ROWS and column_values <= 2 else 1
    registers = 232 if rows > ROWS else 240
    for q_stages, more in ((3, 2), (2, 2), (2, 1), (2, 0), (1, 1), (1, 0)):
        config = Config(keys + more, q_stages, at_once, registers)
        if shared_memory(rows, dim, width, config) <= SHARED_MEMORY - RESERVED:
            return config
    return None


def layout_refusal(config: Config, rows: int, keys: int, dim: int, width: int) -> str | None:
    """Why a program cannot be laid out by this configuration, or None if it can."""
    if config.stages < keys or config.q_stages < 1 or config.at_once < 1:
        return f"it has to hold {keys} tiles of keys and one of queries, and start a product."
    return configurations.layout_refusal(
        config,
        consumers=rows // ROWS,
        rows=COLUMNS,
        needed=shared_memory(rows, dim, width, config),
        limit=SHARED_MEMORY - RESERVED,
    )


def refusal(dtypes: Sequence[Any], rows: int, keys: int, dim: int, top_k: int) -> str | None:
    """Why it cannot take a problem, or None if it can.

    Args:
      dtypes: Of q and k.
      rows: Queries per tile.
      keys: Keys of a column.
      dim: Width of q and k, padded to a multiple of 64.
      top_k: How many of the best.
    """
    for dtype in map(jnp.dtype, dtypes):
        if dtype != jnp.dtype(jnp.bfloat16):
            return f"its matrix products take bfloat16, not {dtype.name}."
    if rows not in (ROWS, 2 * ROWS):
        return f"it takes tiles of {ROWS} or {2 * ROWS} queries, not {rows}."
    if top_k > MOST:
        return f"it keeps up to {MOST} of each row in registers, not {top_k}."
    if default_config(rows, keys, dim, places(top_k)) is None:
        return f"it has no room for {keys} tiles of keys of width {dim}."
    return None


class _Program(NamedTuple):
    """A program, as each of its warpgroups sees it.

    Attributes:
      batch: The sequence.
      kv_head: The head of k, whose group of query heads it is for.
      group: How many these are.
      start: The first of its queries.
      stripes: How many consumers share its queries.
      visit: The tiles of columns that it meets.
      ids: `Lists.ids`.
      q_ring: Tiles of queries [ROWS, dim], a slot for each consumer.
      k_ring: Tiles of keys [COLUMNS, dim].
    """

    batch: jax.Array
    kv_head: jax.Array
    group: int
    start: jax.Array
    stripes: int
    visit: Visit
    ids: Any
    q_ring: Ring
    k_ring: Ring

    def first_column(self, entry: jax.Array) -> jax.Array:
        """Of the tile that an entry is."""
        return self.ids[*self.visit.row, entry] * COLUMNS

    def copy(self, q: Any, k: Any, keys: int) -> None:
        """What the producer does: copies queries and keys in the order in which they are met."""
        per_column = k.shape[2]

        # steps are carried, where they might be derived: registers are few here
        def tile(entry, steps):
            q_step, k_step = steps
            column = self.first_column(entry)

            def queries(head, step):
                for stripe in range(self.stripes):
                    rows = pl.ds(self.start + stripe * ROWS, ROWS)
                    source = q.at[self.batch, rows, self.kv_head * self.group + head]
                    self.q_ring.fill([source], step + stripe)
                return step + self.stripes

            # the first ones before keys, for whose slots all heads of the last tile are waited
            q_step = queries(jnp.int32(0), q_step)
            for n in range(keys):
                further, which = divmod(n, per_column)
                rows = pl.ds(column + further, COLUMNS)
                self.k_ring.fill([k.at[self.batch, rows, which, self.kv_head]], k_step + n)
            return lax.fori_loop(1, self.group, queries, q_step), k_step + keys

        start = jnp.int32(0), jnp.int32(0)
        q_steps, k_steps = lax.fori_loop(self.visit.first, self.visit.last, tile, start)
        self.q_ring.drain(q_steps)
        self.k_ring.drain(k_steps)

    def scores(
        self,
        entry: jax.Array,
        member: jax.Array,
        keys: Sequence[range],
        added: Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array],
        ops: type[Hopper] | type[Interpreted],
    ) -> jax.Array:
        """The scores of a consumer's rows with a tile of columns.

        Args:
          entry: Which tile.
          member: Which consumer.
          keys: The keys of a column, in parts whose products are started at once.
          added: `added(total, product, head, key)`: the sum of what was, and of what a product
            becomes.
          ops: The functions of the chip.
        """
        shape, met = (ROWS, COLUMNS), self.visit.step(entry)
        first_key = met * keys[-1].stop

        def each(act, part):
            for n in part:
                act(first_key + n)

        def of_head(head, total):
            q_step = (met * self.group + head) * self.stripes + member
            self.q_ring.wait(q_step)

            def products(part, *state):
                *accumulators, total = state
                for n, product in zip(part, accumulators, strict=True):
                    piece = self.k_ring.piece(first_key + n, 0, COLUMNS)
                    product.add_nt(self.q_ring.piece(q_step, 0, ROWS), piece)
                for n, product in zip(part, accumulators, strict=True):
                    total = added(total, product.read(running=part.stop - 1 - n), head, n)
                return (total,)

            for part in keys:
                pl.when(head == 0)(partial(each, self.k_ring.wait, part))
                zeros = (ops.tile(shape, 0.0),) * len(part)
                _, (total,) = ops.together(partial(products, part), zeros, (total,))
                pl.when(head == self.group - 1)(partial(each, self.k_ring.release, part))
            self.q_ring.release(q_step)
            return total

        return lax.fori_loop(0, self.group, of_head, ops.tile(shape, 0.0))


def top_k(
    q: jax.Array,
    k: jax.Array,
    lists: Lists,
    sums: Sums,
    block_q: int,
    count: int,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The columns with the largest scores of each query, in no order, and these scores.

    They are integers: `sortable` ones; where columns are forced, `score_of` makes such of them.

    Args:
      q: [batch, q_len, heads, dim], bf16; q_len a multiple of `block_q`, dim of 64.
      k: [batch, columns + more, per_column, kv_heads, dim], bf16; columns are a multiple of
        `COLUMNS`, and as few more as there need be a multiple of `TOGETHER`. Key `n` of column `c`
        is `k[:, c + n // per_column, n % per_column]`, so that neighbours may share keys.
      lists: For each tile of queries the tiles of columns, ascending; for all heads or for those
        of k.
      sums: What scores are sums of.
      block_q: Queries of a tile.
      count: How many, at most `MOST`.
      config: How a program is laid out.

    Returns:
      Columns and integers, int32 [batch, kv_heads, q_len, count]: where fewer are seen, the other
      integers are `NOTHING` and their columns mean nothing.
    """
    batches, q_len, heads, dim = q.shape
    per_column, kv_heads = k.shape[2:4]
    group, keys, width = heads // kv_heads, len(sums.weights), places(count)
    sizes = block_q, keys, dim
    reason = refusal((q.dtype, k.dtype), *sizes, count)
    if reason:
        raise NotImplementedError("The Mosaic kernel of the best sums: " + reason)
    default = default_config(*sizes, width, len(sums.term.column_values))
    assert default is not None  # or it was refused
    chosen = config or default
    reason = layout_refusal(chosen, *sizes, width)
    if reason:
        raise ValueError(f"config={chosen} is not legal here: {reason}")
    ops = warpgroup()
    shape, consumers = (ROWS, COLUMNS), block_q // ROWS
    columns = (k.shape[1] - (keys - 1) // per_column) // COLUMNS * COLUMNS
    # a program's queries are those of a group, as if it were one wide head
    sides = Sides(
        Side((q.reshape(batches, q_len, kv_heads, group * dim),), block_q),
        Side((k.reshape(batches, -1, kv_heads, dim),), COLUMNS),
    )
    parts = [range(n, min(n + chosen.at_once, keys)) for n in range(0, keys, chosen.at_once)]

    def kernel(order_ref, positions_ref, q_ref, k_ref, ids_ref, first_ref, last_ref, *refs):
        inputs, results, shared = refs[:-10], refs[-10:-8], refs[-8:]
        term = sums.term.bind(inputs[: len(sums.term.values)])
        hides = sums.hides.bind(inputs[len(sums.term.values) :])
        owner = sides.owner(order_ref[lax.axis_index("program")])
        batch, kv_head, _, block = owner
        start, member = block * block_q, lax.axis_index("warpgroup")
        all_lists = Lists(ids_ref, first_ref, last_ref)
        visit = sides.visit(all_lists, owner, jnp.int32(0), jnp.int32(0))
        rings = Ring(*shared[:3]), Ring(*shared[3:6])
        program = _Program(batch, kv_head, group, start, consumers, visit, ids_ref, *rings)

        @pl.when(member == consumers)
        def producer():
            plgpu.set_max_registers(chosen.producer_registers, action="decrease")
            program.copy(q_ref, k_ref, keys)

        @pl.when(member < consumers)
        def consumer():
            plgpu.set_max_registers(chosen.consumer_registers, action="increase")
            own_start = start + member * ROWS

            def place(head, column):
                # or the compiler would keep what lies there of all keys, for all heads
                where = ring.anew(own_start), ring.anew(column)
                return Place(batch, head, *where, 0, shape, positions_ref, ops)

            def tile(entry, kept):
                column = program.first_column(entry)

                def added(total, product, head, key):
                    at = place(kv_head * group + head, key * columns + column)
                    weight, number = sums.weights[key], at.apply(term, product)
                    return total + (number if weight == 1 else number * weight)

                total = program.scores(entry, member, parts, added, ops)
                found = sortable(total)
                said = place(kv_head, column).apply(hides, total)
                if sums.forcing:
                    found = jnp.where(said == FORCED, found, found + jnp.int32(_BELOW))
                found = jnp.where(said == 0.0, jnp.int32(NOTHING), found)
                return Kept(*kept).with_tile(found, column, ops)

            best = lax.fori_loop(visit.first, visit.last, tile, Kept.nothing(count, ops))
            own = [x.at[member] for x in shared[6:]]
            for ref, value in zip(own, (best.columns, best.best), strict=True):
                ops.store(ref, value)
            plgpu.commit_smem()
            for ref, result in zip(own, results, strict=True):
                rows = pl.ds(own_start, ROWS)
                plgpu.copy_smem_to_gmem(ref, result.at[batch, kv_head, rows])
            plgpu.wait_smem_to_gmem(0)

    programs = sides.order(lists)
    q_slots = chosen.q_stages * consumers
    found = plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((batches, kv_heads, q_len, width), jnp.int32),) * 2,
        scratch_types=(
            ring.tiles(q.dtype, q_slots, ROWS, dim),
            *ring.barriers(q_slots, readers=1),
            ring.tiles(k.dtype, chosen.stages, COLUMNS, dim),
            *ring.barriers(chosen.stages, readers=consumers),
            *[plgpu.SMEM((consumers, ROWS, width), jnp.int32)] * 2,
        ),
        grid=programs.shape,
        grid_names=("program",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=ops.compiler_params,
    )(
        programs,
        jnp.arange(max(q_len, keys * columns), dtype=jnp.int32),
        *(q, k, *lists[:3]),
        *(*sums.term.values, *sums.hides.values),
    )
    return tuple(x[..., :count] for x in found)


def score_of(integers: jax.Array) -> jax.Array:
    """`sortable` integers from those of a problem in which columns are forced."""
    lowered = (integers < 0) & (integers > NOTHING)
    return jnp.where(lowered, integers - jnp.int32(_BELOW), integers)
