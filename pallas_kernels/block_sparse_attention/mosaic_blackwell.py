"""Block-sparse attention, forward, for Blackwell.

A program owns a tile of queries and meets its tiles of keys and values (see `walk`). Each of its
consumers meets 64 keys of every tile and has a softmax of its own over them; two of them merge at
the end. A consumer starts its products itself, and they lie in tensor memory: the logits of the
next tile are computed while it is at the softmax of this one, and this one's values are added while
it is at the next. The sums over values stay there from the first tile to the last, in units of a
power of two near each row's maximum, and are brought to another unit only where the maximum has
grown so much that probabilities would leave their range.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, configurations, ring
from pallas_kernels.block_sparse_attention.chip import Forward
from pallas_kernels.block_sparse_attention.logits import Place, Tiles
from pallas_kernels.block_sparse_attention.softmax import Softmax, merge
from pallas_kernels.block_sparse_attention.walk import (
    RESERVED,
    SHARED_MEMORY,
    Lists,
    Program,
    Side,
    launch,
)
from pallas_kernels.warpgroup import Blackwell

ROWS = Blackwell.height
COLUMNS = 64  # keys of a tile that a consumer meets, and widths in registers at once
TENSOR_MEMORY = 512  # columns of 32 bits, as high as an accumulator
SLACK = 8.0  # powers of two that probabilities may be above 1, with the same relative rounding


@dataclasses.dataclass(frozen=True)
class Config:
    """How a program is laid out; every legal choice gives the same result.

    Attributes:
      stages: kv tiles in flight, at least 2: the keys of the next tile are waited for while the
        values of the last are in their slot.
      consumer_registers: Registers per thread of a consumer, a multiple of 8.
      producer_registers: Registers per thread of the producer, a multiple of 8.
    """

    stages: int = 2
    consumer_registers: int = 224
    producer_registers: int = 56
    columns: ClassVar[int] = COLUMNS


def shared_memory(block_q: int, block_kv: int, dim: int, v_dim: int, config: Config) -> int:
    """Bytes of shared memory that a program asks for, barriers apart."""
    own = dim + (0 if _over_values(block_kv) else v_dim)
    in_flight = config.stages * block_kv * (dim + v_dim)
    softmax = 4 * ROWS * (1 + 2 * (block_kv // COLUMNS))
    return 2 * (block_q * own + in_flight) + softmax


def _over_values(block_kv: int) -> bool:
    """Whether the output has room where values were, which are read by then."""
    return block_kv == ROWS


def tensor_memory(block_kv: int, v_dim: int) -> int:
    """Columns of tensor memory that a program asks for: logits, probabilities and sums."""
    return block_kv // COLUMNS * (COLUMNS + COLUMNS // 2 + v_dim)


def default_config(tiles: Tiles, dim: int, v_dim: int) -> Config | None:
    """The deepest ring that fits, or None where not even one kv tile does."""
    for stages in (4, 3, 2):
        config = Config(stages)
        if layout_refusal(config, tiles.block_q, tiles.block_kv, dim, v_dim) is None:
            return config
    return None


def layout_refusal(config: Config, block_q: int, block_kv: int, dim: int, v_dim: int) -> str | None:
    """Why a program cannot be laid out by this configuration, or None if it can."""
    if config.stages < 2:
        return f"stages must be at least 2 on Blackwell, not {config.stages}."
    return configurations.layout_refusal(
        config,
        consumers=block_kv // COLUMNS,
        rows=block_kv,
        needed=shared_memory(block_q, block_kv, dim, v_dim, config),
        limit=SHARED_MEMORY - RESERVED,
    )


def others(block_q: int, block_kv: int) -> Iterator[Config]:
    """Configurations that may be worth timing, where they are legal."""
    return (
        Config(stages, consumer, producer)
        for stages in (4, 3, 2)
        for consumer, producer in ((224, 56), (232, 40), (240, 24))
    )


def limit(block_q: int, block_kv: int, dim: int, v_dim: int) -> str | None:
    """Why tensor memory has no room, or None if it has."""
    if tensor_memory(block_kv, v_dim) <= TENSOR_MEMORY:
        return None
    return (
        f"tiles of {block_kv} keys with v_dim {v_dim} do not fit in tensor memory; take tiles of "
        "64 keys."
    )


def _compute(
    q: jax.Array, k: jax.Array, v: jax.Array, lists: Lists, tiles: Tiles, chosen: Config
) -> tuple[jax.Array, jax.Array]:
    batches, q_len, heads, _ = q.shape
    v_dim, dtype = v.shape[3], q.dtype
    block_q, block_kv = tiles.block_q, tiles.block_kv
    shape, consumers, ops = (ROWS, COLUMNS), block_kv // COLUMNS, Blackwell
    widths = range(0, v_dim, COLUMNS)

    def consumer(program: Program):
        q_tile, (k_ring, v_ring), me = program.own(0), program.rings, program.member
        lse_rows, peaks, totals, *rest = program.scratch
        logits_memory, probs_memory, sums_memory, logits_done, sums_done, all_done, *rest = rest
        (out_tile,) = rest or (v_ring.slots.at[0],)
        keys, sums = pl.ds(me * COLUMNS, COLUMNS), pl.ds(me * v_dim, v_dim)
        my_logits, my_probs = logits_memory.at[:, keys], probs_memory.at[:, keys]
        my_sums = sums_memory.at[:, sums]
        bound, factor = tiles.bind(program.inputs), tiles.to_base_2
        visit = program.visit(jnp.int32(0), jnp.int32(0))

        def start_logits(step):
            k_ring.wait(step)
            k_piece = _compat.transpose(k_ring.piece(step, me, COLUMNS))
            done = logits_done.at[me]
            plgpu.tcgen05_mma(my_logits, q_tile, k_piece, done, accumulate=False)

        def start_sums(step):
            v_ring.wait(step)
            v_piece = v_ring.piece(step, me, COLUMNS)
            plgpu.tcgen05_mma(my_sums, my_probs, v_piece, sums_done.at[me], accumulate=step > 0)

        def end_sums(step):
            plgpu.barrier_wait(sums_done.at[me])
            v_ring.release(step)

        def wait_for_all():
            plgpu.barrier_arrive(all_done)
            plgpu.barrier_wait(all_done)

        def rescale(decay):
            for at in widths:
                some = my_sums.at[:, pl.ds(at, COLUMNS)]
                found = plgpu.async_load_tmem(some, layout=ops.layout)
                ops.wait_load()
                plgpu.async_store_tmem(some, found * lax.broadcast_in_dim(decay, shape, (0,)))

        def tile(entry, softmax, masked):
            step = visit.step(entry)
            plgpu.barrier_wait(logits_done.at[me])
            raw = plgpu.async_load_tmem(my_logits, layout=ops.layout)
            plgpu.wait_load_tmem()
            k_ring.release(step)
            pl.when(entry + 1 < visit.last)(lambda: start_logits(step + 1))
            kv_start = program.met(visit, entry) * block_kv + me * COLUMNS
            where = program.batch, program.head, program.start, kv_start
            logits = bound.change(raw, Place(*where, 0, shape, program.positions, ops), masked)
            after, probs, decay = softmax.add(logits, factor, SLACK)
            # half as many registers while sums are rescaled
            probs, decay = lax.optimization_barrier((probs.astype(dtype), decay))

            @pl.when(step > 0)
            def before():
                end_sums(step - 1)
                # sums of rows that saw nothing are 0 in any unit
                shrunk = (decay < 1.0) & (softmax.total > 0.0)
                pl.when(ops.any_row(shrunk))(lambda: rescale(decay))

            plgpu.async_store_tmem(my_probs, probs)
            plgpu.commit_tmem()
            start_sums(step)
            return after

        some_tiles = visit.first < visit.last
        pl.when(some_tiles)(lambda: start_logits(jnp.int32(0)))
        nothing = Softmax(ops.rows(ROWS, -math.inf), ops.rows(ROWS, 0.0))
        peaks[me, :], totals[me, :] = visit.tiles(tile, nothing)
        pl.when(some_tiles)(lambda: end_sums(visit.after - 1))
        wait_for_all()

        parts = [
            Softmax(ops.load_rows(peaks.at[n]), ops.load_rows(totals.at[n]))
            for n in range(consumers)
        ]
        softmax, shares = merge(parts)
        norm, lse_tile = softmax.end()
        out_ref, lse_ref = program.results

        def write_width(at):
            def scaled(n):
                some = sums_memory.at[:, pl.ds(n * v_dim + at, COLUMNS)]
                found = plgpu.async_load_tmem(some, layout=ops.layout)
                return found * lax.broadcast_in_dim(shares[n] * norm, shape, (0,))

            out = functools.reduce(jnp.add, map(scaled, range(consumers)))
            # what no product was written to may hold anything
            seen = lax.broadcast_in_dim(softmax.total != 0.0, shape, (0,))
            out_tile[:, pl.ds(at, COLUMNS)] = jnp.where(seen, out, 0.0).astype(dtype)

        for n, at in enumerate(widths):
            pl.when(me == n % consumers)(lambda at=at: write_width(at))
        plgpu.commit_smem()
        wait_for_all()

        @pl.when(me == 0)
        def write():
            lse_rows[...] = lse_tile
            program.write(
                [(out_tile, out_ref.at[program.tokens]), (lse_rows, lse_ref.at[program.numbers])]
            )

    barriers = plgpu.Barrier(num_barriers=consumers, orders_tensor_core=True)
    out, lse = launch(
        consumer,
        Side((q,), block_q),
        Side((k, v), block_kv),
        lists,
        inputs=tiles.values,
        results=(
            jax.ShapeDtypeStruct((batches, q_len, heads, v_dim), dtype),
            jax.ShapeDtypeStruct((batches, heads, q_len), jnp.float32),
        ),
        scratch=(
            plgpu.SMEM((ROWS,), jnp.float32),
            *[plgpu.SMEM((consumers, ROWS), jnp.float32)] * 2,
            plgpu.TMEM((ROWS, block_kv), jnp.float32),
            plgpu.TMEM((ROWS, block_kv), dtype, packed=True),
            plgpu.TMEM((ROWS, consumers * v_dim), jnp.float32),
            *(barriers, barriers),
            plgpu.Barrier(num_arrivals=consumers, orders_tensor_core=True),
            *(() if _over_values(block_kv) else (ring.tile(dtype, ROWS, v_dim),)),
        ),
        config=chosen,
        ops=ops,
        sharing=consumers,
    )
    return out, lse


FORWARD = Forward(_compute, (ROWS,), limit, default_config, others, layout_refusal, shared_memory)
