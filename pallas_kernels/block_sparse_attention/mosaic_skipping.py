"""The forward pass that skips tiles on the way, for Hopper.

A program walks the tiles of its list in their order. Of each it computes the logits; then all its
consumer warpgroups vote, and the tile's exponentials and products with values are computed only if
a row of one of them needs them. While they decide, and take the exponentials, the tensor cores
already multiply the queries with the keys of the next tile, which nobody skips. So a tile that is
skipped costs a product, or what it takes to find the largest logits where that is longer.

The copy engine brings the values of every tile, for they are asked for long before it is known
whether they are needed; those that are not are released unread. The vote is over the whole tile of
queries, as the lists are, so what is skipped is the same for every implementation.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import ring
from pallas_kernels.block_sparse_attention import mosaic
from pallas_kernels.block_sparse_attention.chip import Forward
from pallas_kernels.block_sparse_attention.logits import Place, Tiles
from pallas_kernels.block_sparse_attention.softmax import Softmax
from pallas_kernels.block_sparse_attention.walk import (
    ROWS,
    Lists,
    Program,
    Side,
    launch,
)
from pallas_kernels.warpgroup import product_nt, warpgroup

# of tiles, in tokens. Shorter tiles of keys are met several at once, which would be one decision
# about all of them, and shorter tiles of queries have rows beside them that would vote
SIDES = 64, 128


@dataclasses.dataclass(frozen=True)
class Config:
    """How a program is laid out; every legal choice gives the same result.

    Attributes:
      stages: kv tiles in flight, at least 1.
      ahead: Whether the logits of the next tile are computed while it is decided over one, which
        holds those of two in registers and their keys in the ring: `stages` is at least 2.
      consumer_registers: Registers per thread of a consumer, a multiple of 8.
      producer_registers: Registers per thread of the producer, a multiple of 8.
    """

    stages: int = 2
    ahead: bool = True
    consumer_registers: int = 240
    producer_registers: int = 24


def default_config(tiles: Tiles, dim: int, v_dim: int) -> Config | None:
    """The deepest ring that fits, or None where not even one kv tile does."""
    # found by compiling: beside wide values, or a vector with a value per key, registers hold the
    # logits of one tile of 128 keys
    room = tiles.block_kv == 64 or (v_dim <= 128 and not tiles.column_values)
    for stages in (4, 3, 2, 1):
        config = Config(stages, ahead=room and stages > 1)
        if layout_refusal(config, tiles.block_q, tiles.block_kv, dim, v_dim) is None:
            return config
    return None


def others(block_q: int, block_kv: int) -> Iterator[Config]:
    """Configurations that may be worth timing, where they are legal."""
    return (
        Config(stages, ahead, consumer, producer)
        for stages in (4, 3, 2, 1)
        for ahead in (True, False)
        for consumer, producer in ((240, 24), (232, 40))
    )


def shared_memory(block_q: int, block_kv: int, dim: int, v_dim: int, config: Config) -> int:
    """Bytes of shared memory that a program asks for, barriers apart."""
    return mosaic.shared_memory(block_q, block_kv, dim, v_dim, _dense(config, block_kv))


def layout_refusal(config: Config, block_q: int, block_kv: int, dim: int, v_dim: int) -> str | None:
    """Why a program cannot be laid out by this configuration, or None if it can."""
    dense = _dense(config, block_kv)
    reason = mosaic.layout_refusal(dense, block_q, block_kv, dim, v_dim)
    if reason is None and config.ahead and config.stages < 2:
        return "ahead=True holds the keys of two tiles at once, so stages must be at least 2."
    return reason


def _dense(config: Config, block_kv: int) -> mosaic.Config:
    """The kernel that skips nothing with as many tiles and registers."""
    registers = config.consumer_registers, config.producer_registers
    return mosaic.Config(config.stages, block_kv, *registers, overlap=False)


def _compute(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lists: Lists,
    limits: jax.Array,
    tiles: Tiles,
    chosen: Config,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    batches, q_len, heads, _ = q.shape
    v_dim, dtype = v.shape[3], q.dtype
    own, met = Side((q,), tiles.block_q), Side((k, v), tiles.block_kv)
    shape, consumers = (ROWS, met.tile), own.tile // ROWS
    in_place = v_dim <= q.shape[3]  # the output takes the place of the queries
    ops = warpgroup()

    def consumer(program: Program):
        k_ring, v_ring = program.rings
        *values, limits_ref = program.inputs
        bound, factor = tiles.bind(values), tiles.to_base_2
        visit = program.visit(jnp.int32(0), jnp.int32(0))
        kept_ref, ballot = program.results[2], program.scratch[2 - in_place :]
        limit = ops.load_rows(limits_ref.at[program.numbers])

        def keys(step):
            return k_ring.piece(step, 0, met.tile)

        def decided(entry, raw, known, masked):
            """The logits of a tile, the largest of each row, and whether it is kept."""
            kv_start = program.met(visit, entry) * met.block
            where = program.batch, program.head, program.start, kv_start
            at = Place(*where, 0, shape, program.positions, ops)
            logits = bound.change(raw, at, masked)
            largest = logits.max(axis=1) * factor
            needed = known.needs(largest, limit)
            keep = ops.vote(needed, ballot, program.member, consumers, visit.step(entry))

            @pl.when(program.member == 0)
            def say():
                kept_ref[program.batch, program.head, entry] = keep.astype(jnp.int32)

            return logits, largest, keep

        def settled(entry, raw, state, masked):
            """The state after a tile whose products with the queries are known."""
            acc, *row_state = state
            known, step = Softmax(*row_state), visit.step(entry)
            logits, largest, keep = decided(entry, raw, known, masked)

            def with_values():
                after, probs, decay = known.add(logits, factor, largest=largest)
                probs, tile = probs.astype(dtype), v_ring.piece(step, 0, met.tile)
                start = acc * lax.broadcast_in_dim(decay, acc.shape, (0,))
                ((out,), ()) = ops.together(lambda x: x.add(probs, tile) or (), (start,), ())
                return out, *after

            # also where they are not needed: they are on their way
            v_ring.wait(step)
            state = lax.cond(keep, with_values, lambda: (acc, *known))
            v_ring.release(step)
            return state

        def products(entry):
            """A tile's products with the queries, waited for."""
            step = visit.step(entry)
            k_ring.wait(step)
            raw = product_nt(ops.tile(shape, 0.0), program.own(0), keys(step))
            k_ring.release(step)
            return raw

        def one_by_one(entry, state, masked):
            return settled(entry, products(entry), state, masked)

        def ahead(entry, raw_and_state, masked):
            """The rest of a tile while the products of the next one are computed."""
            raw, *state = raw_and_state
            following = visit.step(entry) + 1
            k_ring.wait(following)

            def meanwhile(product, *state):
                product.add_nt(program.own(0), keys(following))
                return settled(entry, raw, state, masked)

            ((raw,), state) = ops.together(meanwhile, (ops.tile(shape, 0.0),), tuple(state))
            k_ring.release(following)
            return raw, *state

        def finish(acc, peak, total):
            mosaic.write_rows(program, acc, Softmax(peak, total), in_place)

        nothing_met = ops.rows(ROWS, -math.inf), ops.rows(ROWS, 0.0)
        start = ops.tile((ROWS, v_dim), 0.0), *nothing_met
        if not chosen.ahead:
            finish(*visit.tiles(one_by_one, start))
            return

        @pl.when(visit.last > visit.first)
        def some_tiles():
            last = visit.last - 1
            whole = None if visit.whole is None else jnp.minimum(visit.whole, last)
            but_last = visit._replace(last=last, whole=whole)
            raw, *state = but_last.tiles(ahead, (products(visit.first), *start))
            finish(*settled(last, raw, state, visit.masked(last)))

        @pl.when(visit.last == visit.first)
        def no_tiles():
            finish(*start)

    entries = lists.ids.shape[2]
    out, lse, kept = launch(
        consumer,
        own,
        met,
        lists,
        inputs=(*tiles.values, limits),
        results=(
            jax.ShapeDtypeStruct((batches, q_len, heads, v_dim), dtype),
            jax.ShapeDtypeStruct((batches, heads, q_len), jnp.float32),
            jax.ShapeDtypeStruct((batches, heads, entries), jnp.int32),
        ),
        scratch=(
            plgpu.SMEM((consumers, ROWS), jnp.float32),
            *[ring.tiles(dtype, consumers, ROWS, v_dim)] * (not in_place),
            *ops.ballot(consumers),
        ),
        config=chosen,
        ops=ops,
    )
    return out, lse, kept


SKIPPING = Forward(
    _compute,
    SIDES,
    lambda *sizes: None,
    default_config,
    others,
    layout_refusal,
    shared_memory,
    lengths=SIDES,
    operation="skipping",
)
"""Takes besides f32 [batch, heads, q_len], how far below in base 2 a tile's largest logit must be
for each query, not positive; +inf where a query has no say. Lists are walked in their order. Gives
besides int32 [batch, heads, entries]: 1 where an entry of the lists was kept, 0 where it was
skipped, anything where no list has an entry.
"""
