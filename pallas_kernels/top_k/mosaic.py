"""The best keys of each query by the products with all of them, which are never written; Hopper.

Programs are those of `walk`: each owns a tile of queries and meets tiles of keys in ascending
order. A consumer keeps the best so far of its 64 rows in registers (see `kept`). What is not seen
is less than all.

Products are as precise as f32 where q has 16 bits and keys have more: these come in up to three
parts of 8 bits each, which are multiplied one after the other.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import configurations
from pallas_kernels.block_sparse_attention.logits import Place, Tiles
from pallas_kernels.block_sparse_attention.walk import (
    RESERVED,
    ROWS,
    SHARED_MEMORY,
    Lists,
    Program,
    Side,
    launch,
)
from pallas_kernels.sortable import NOTHING, sortable
from pallas_kernels.top_k.kept import MOST, Kept, places
from pallas_kernels.warpgroup import warpgroup

KEYS = 64  # of a tile
# what stands for a pair: not seen, seen, or taken before all others; one of a row at most is
SEEN, FORCED = 1.0, 2.0
FIRST = 2**31 - 2  # the integer of what is forced, above that of every number


@dataclasses.dataclass(frozen=True)
class Config:
    """How a program is laid out; every legal choice gives the same result.

    Attributes:
      stages: Tiles of keys in flight, at least 1.
      consumer_registers: Registers per thread of a consumer, a multiple of 8.
      producer_registers: Registers per thread of the producer, a multiple of 8.
    """

    stages: int = 4
    consumer_registers: int = 240
    producer_registers: int = 24
    columns = KEYS


def shared_memory(rows: int, parts: int, dim: int, width: int, config: Config) -> int:
    """Bytes of shared memory that a program asks for, barriers apart."""
    return 2 * dim * (rows + config.stages * parts * KEYS) + 4 * rows * (2 * width + 1)


def default_config(rows: int, parts: int, dim: int, width: int) -> Config | None:
    """The deepest ring that fits, or None where not even one tile of keys does."""
    for stages in (4, 3, 2, 1):
        config = Config(stages)
        if shared_memory(rows, parts, dim, width, config) <= SHARED_MEMORY - RESERVED:
            return config
    return None


def layout_refusal(config: Config, rows: int, parts: int, dim: int, width: int) -> str | None:
    """Why a program cannot be laid out by this configuration, or None if it can."""
    return configurations.layout_refusal(
        config,
        consumers=rows // ROWS,
        rows=KEYS,
        needed=shared_memory(rows, parts, dim, width, config),
        limit=SHARED_MEMORY - RESERVED,
    )


def refusal(dtype: Any, rows: int, parts: int, dim: int, top_k: int) -> str | None:
    """Why it cannot take a problem, or None if it can.

    Args:
      dtype: Of q.
      rows: Queries per tile.
      parts: Of keys, each of as many bits as q has.
      dim: Width of q and k, padded to a multiple of 64.
      top_k: How many of the best.
    """
    if jnp.dtype(dtype) != jnp.dtype(jnp.bfloat16):
        return f"its matrix products take bfloat16, not {jnp.dtype(dtype).name}."
    if rows not in (ROWS, 2 * ROWS):
        return f"it takes tiles of {ROWS} or {2 * ROWS} queries, not {rows}."
    if top_k > MOST:
        return f"it keeps up to {MOST} of each row in registers, not {top_k}."
    if default_config(rows, parts, dim, places(top_k)) is None:
        return f"it has no room for a tile of {parts} parts of keys of width {dim}."
    return None


def top_k(
    q: jax.Array,
    k: tuple[jax.Array, ...],
    lists: Lists,
    tiles: Tiles,
    count: int,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The columns of the largest products of each query, in no order, and these products.

    They are `sortable` integers. A key that is forced is among them, its integer `FIRST`.

    Args:
      q: [batch, q_len, heads, dim], bf16; q_len a multiple of a tile's, dim of 64.
      k: Arrays [batch, kv_len, kv_heads, dim], bf16, of which keys are the sum; kv_len a multiple
        of `KEYS`.
      lists: For each tile of queries the tiles of keys, ascending.
      tiles: Tile sizes, and as `mask` what tells pairs: 0, `SEEN` or `FORCED`.
      count: How many, at most `MOST`.
      config: How a program is laid out.

    Returns:
      Columns and integers, int32 [batch, heads, q_len, count]: where fewer are seen, the other
      integers are `NOTHING` and their columns mean nothing. The integer [batch, heads, q_len] of
      each row's forced product, or `NOTHING`.
    """
    batches, q_len, heads, dim = q.shape
    width = places(count)
    sizes = tiles.block_q, len(k), dim
    reason = refusal(q.dtype, *sizes, count)
    if reason:
        raise NotImplementedError("The Mosaic kernel of the best products: " + reason)
    default = default_config(*sizes, width)
    assert default is not None  # or it was refused
    chosen = config or default
    reason = layout_refusal(chosen, *sizes, width)
    if reason:
        raise ValueError(f"config={chosen} is not legal here: {reason}")
    ops = warpgroup()
    per_row = (width,), (width,), ()
    shape, consumers = (ROWS, KEYS), tiles.block_q // ROWS

    def consumer(program: Program):
        bound = tiles.bind(program.inputs)
        visit = program.visit(jnp.int32(0), jnp.int32(0))

        def products_with(step):
            """The products with a tile, waited for."""

            def products(product):
                for ring in program.rings:
                    ring.wait(step)
                    product.add_nt(program.own(0), ring.piece(step, 0, KEYS))
                return ()

            ((raw,), ()) = ops.together(products, (ops.tile(shape, 0.0),), ())
            for ring in program.rings:
                ring.release(step)
            return raw

        def tile(entry, known):
            *known, of_forced = known
            raw = products_with(visit.step(entry))
            first = program.met(visit, entry) * KEYS
            found = sortable(raw)
            if bound.mask is not None:
                where = program.batch, program.head, program.start, first
                at = Place(*where, 0, shape, program.positions, ops)
                said = at.apply(bound.mask, raw)
                nothing = jnp.int32(NOTHING)
                own = jnp.where(said == FORCED, found, nothing).max(axis=1)
                of_forced = jnp.maximum(of_forced, own)
                found = jnp.where(said == FORCED, jnp.int32(FIRST), found)
                found = jnp.where(said == 0.0, nothing, found)
            return *Kept(*known).with_tile(found, first, ops), of_forced

        start = Kept.nothing(count, ops)
        # the least is nothing in every row, and so is what is forced so far
        state = *start, start.least
        *known, of_forced = lax.fori_loop(visit.first, visit.last, tile, state)
        best, columns, _ = known
        own = [x.at[program.member] for x in program.scratch]
        for ref, value in zip(own, (columns, best, of_forced), strict=True):
            ops.store(ref, value)
        program.write(
            [(x, y.at[program.numbers]) for x, y in zip(own, program.results, strict=True)]
        )

    columns, integers, of_forced = launch(
        consumer,
        Side((q,), tiles.block_q),
        Side(k, KEYS),
        lists,
        inputs=tiles.values,
        results=[
            jax.ShapeDtypeStruct((batches, heads, q_len, *rest), jnp.int32) for rest in per_row
        ],
        scratch=[plgpu.SMEM((consumers, ROWS, *rest), jnp.int32) for rest in per_row],
        config=chosen,
        ops=ops,
    )
    return columns[..., :count], integers[..., :count], of_forced
