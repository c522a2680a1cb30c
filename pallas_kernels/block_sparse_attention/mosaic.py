"""Block-sparse attention, forward, for Hopper.

A program owns a tile of queries and meets its tiles of keys and values (see `walk`). Each consumer
warpgroup keeps the softmax of its 64 queries in registers. The schedule is that of Shah et al.
2024, FlashAttention-3, arXiv:2407.08608: a warpgroup starts the product of its queries with the
next keys and that of its last probabilities with their values, and computes the next softmax while
the second goes on; two warpgroups take turns, so that one multiplies while the other is at its
softmax.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import configurations, ring
from pallas_kernels.block_sparse_attention import strips
from pallas_kernels.block_sparse_attention.chip import Forward
from pallas_kernels.block_sparse_attention.logits import Place, Tiles
from pallas_kernels.block_sparse_attention.softmax import Softmax
from pallas_kernels.block_sparse_attention.walk import (
    RESERVED,
    ROWS,
    SHARED_MEMORY,
    Lists,
    Program,
    Side,
    launch,
)
from pallas_kernels.warpgroup import product_nt, warpgroup

# per thread, where two programs of a consumer and a producer share a multiprocessor
HALF_THE_REGISTERS = configurations.REGISTERS // (2 * 2 * configurations.THREADS)


@dataclasses.dataclass(frozen=True)
class Config:
    """How a program is laid out; every legal choice gives the same result.

    Attributes:
      stages: kv tiles in flight, at least 1.
      columns: Keys multiplied at once, 64 or 128, at most a tile's.
      consumer_registers: Registers per thread of a consumer, a multiple of 8.
      producer_registers: Registers per thread of the producer, a multiple of 8.
      overlap: Whether a consumer computes a softmax while the probabilities before it are
        multiplied by their values, and two consumers take turns at starting products. It holds
        two tiles at once, so `stages` is at least 2.
    """

    stages: int = 2
    columns: int = 128
    consumer_registers: int = 240
    producer_registers: int = 24
    overlap: bool = True


def shared_memory(block_q: int, block_kv: int, dim: int, v_dim: int, config: Config) -> int:
    """Bytes of shared memory that a program asks for, barriers apart."""
    out = 0 if v_dim <= dim else v_dim  # or it takes the place of the queries
    rows, keys = max(block_q, ROWS), max(block_kv, ROWS)
    in_flight = config.stages * keys * (dim + v_dim)
    return 2 * (rows * (dim + out) + in_flight) + 4 * rows


def default_config(tiles: Tiles, dim: int, v_dim: int) -> Config | None:
    """The deepest ring that fits, or None where not even one kv tile does.

    A ring of one tile has no room for the overlap: with tiles of 128 x 128, dim 192 and v_dim 128.
    """
    side_by_side = _side_by_side(tiles, dim, v_dim)
    if side_by_side is not None:
        return side_by_side
    block_q, block_kv = tiles.block_q, max(tiles.block_kv, ROWS)
    # vectors with a value per key are held for all keys at once, in every thread
    columns = 64 if tiles.column_values > 2 else block_kv
    for stages in (4, 3, 2, 1):
        config = Config(stages=stages, columns=columns, overlap=stages > 1)
        if shared_memory(block_q, block_kv, dim, v_dim, config) <= SHARED_MEMORY - RESERVED:
            return config
    return None


def _side_by_side(tiles: Tiles, dim: int, v_dim: int) -> Config | None:
    """For few queries, the deepest ring of two programs on a multiprocessor; None if one fits.

    Such programs wait for keys, and while one begins or ends the other still loads. What fits in
    half of the registers was found by compiling: for wide values neither the overlap, which one
    program is to the other, nor what reads a vector of keys.
    """
    if tiles.block_q >= ROWS or _crowded(tiles, v_dim):
        return None
    wide = v_dim > 64
    for stages in (4, 3, 2):
        config = Config(stages, 64, HALF_THE_REGISTERS, overlap=not wide)
        needed = shared_memory(tiles.block_q, tiles.block_kv, dim, v_dim, config)
        if needed <= SHARED_MEMORY // 2 - RESERVED:
            return config
    return None


def _crowded(tiles: Tiles, v_dim: int) -> bool:
    """Whether half of the registers are too few, as was found by compiling."""
    reads_keys = tiles.rule or (tiles.mask and (tiles.block_kv < ROWS or tiles.mask.column_values))
    return bool(v_dim > 128 or (v_dim > 64 and reads_keys))


def for_one_tile(tiles: Tiles, v_dim: int) -> Config:
    """For programs that meet a single tile: two on a multiprocessor where registers allow it."""
    registers = Config.consumer_registers if _crowded(tiles, v_dim) else HALF_THE_REGISTERS
    return Config(1, ROWS, registers, overlap=False)


def layout_refusal(config: Config, block_q: int, block_kv: int, dim: int, v_dim: int) -> str | None:
    """Why a program cannot be laid out by this configuration, or None if it can."""
    reason = configurations.layout_refusal(
        config,
        consumers=max(block_q // ROWS, 1),
        rows=max(block_kv, ROWS),
        needed=shared_memory(block_q, block_kv, dim, v_dim, config),
        limit=SHARED_MEMORY - RESERVED,
    )
    if reason is None and config.overlap and config.stages < 2:
        return "overlap=True holds two tiles at once, so stages must be at least 2, not 1."
    return reason


def others(block_q: int, block_kv: int) -> Iterator[Config]:
    """Configurations that may be worth timing, where they are legal."""
    return (
        Config(stages, columns, consumer, producer, overlap)
        for stages in (4, 3, 2, 1)
        for columns in sorted({64, max(block_kv, ROWS)}, reverse=True)
        for consumer, producer in (
            *((240, 24), (232, 40)),
            *[(HALF_THE_REGISTERS, 24)] * (block_q < ROWS),
        )
        for overlap in (True, False)
    )


def write_rows(program: Program, acc: jax.Array, softmax: Softmax, in_place: bool) -> None:
    """Writes the results of a consumer's rows, `out` and `lse`.

    Args:
      program: Its first scratch are rows of f32 for each consumer.
      acc: f32 [rows, v_dim], the values times the numerators of their probabilities.
      softmax: What is known of the rows.
      in_place: Whether the output takes the place of the queries; where not, there is a tile for
        each consumer in the second scratch.
    """
    share, lse_tile = softmax.end()
    v_dim = acc.shape[1]
    lse_rows, *apart = (x.at[program.member] for x in program.scratch[: 2 - in_place])
    out_tile = program.own(0) if in_place else apart[0]
    out_ref, lse_ref = program.results[:2]
    out = acc * lax.broadcast_in_dim(share, acc.shape, (0,))
    out_tile[:, :v_dim] = out.astype(out_ref.dtype)
    lse_rows[...] = lse_tile
    # a part of the columns lies in one piece for eight rows
    rows = ROWS if out_tile.shape[1] == v_dim else 8
    pairs = [(program.stored(lse_rows), lse_ref.at[program.numbers])]
    rows = min(rows, program.rows)
    for row in range(0, program.rows, rows):
        tokens = pl.ds(program.start + row, rows)
        target = out_ref.at[program.batch, tokens, program.head]
        pairs.append((out_tile.at[pl.ds(row, rows), pl.ds(0, v_dim)], target))
    program.write(pairs)


def _compute(
    q: jax.Array, k: jax.Array, v: jax.Array, lists: Lists, tiles: Tiles, chosen: Config
) -> tuple[jax.Array, jax.Array]:
    batches, q_len, heads, _ = q.shape
    v_dim, dtype = v.shape[3], q.dtype
    own, met = Side((q,), tiles.block_q), Side((k, v), tiles.block_kv)
    columns = min(chosen.columns, met.tile)
    shape, parts, consumers = (ROWS, columns), met.tile // columns, own.tile // ROWS
    lists, tiles, positions, _ = strips.by_query(lists, tiles, own, met)
    in_place = v_dim <= q.shape[3]  # the output takes the place of the queries
    ops = warpgroup()

    def consumer(program: Program):
        k_ring, v_ring = program.rings
        bound, factor = tiles.bind(program.inputs), tiles.to_base_2
        visit = program.visit(jnp.int32(0), jnp.int32(0))
        nothing_met = ops.rows(ROWS, -math.inf), ops.rows(ROWS, 0.0)

        # of two consumers one starts its products while the other is at its softmax
        turns = program.scratch[-1] if consumers == 2 and chosen.overlap else None

        def take_turn():
            if turns is not None:
                plgpu.barrier_wait(turns.at[program.member])

        def give_turn():
            if turns is not None:
                plgpu.barrier_arrive(turns.at[1 - program.member])

        def softmax(raw, entry, part, masked, peak, total):
            """The peak and sum after a piece, what decays sums before it, and its numerators."""
            kv_start = program.first(visit, entry) + part * columns
            where = program.batch, program.head, program.start, kv_start
            at = Place(*where, 0, shape, program.positions, ops, program.listed(visit))
            known = Softmax(peak, total)
            known, probs, decay = known.add(bound.change(raw, at, masked), factor)
            return known.peak, known.total, decay, probs

        def scores(step, part):
            """The products of a piece, waited for."""
            raw = product_nt(
                ops.tile(shape, 0.0), program.own(0), k_ring.piece(step, part, columns)
            )
            if part + 1 == parts:
                k_ring.release(step)
            return raw

        def settled(acc, peak, total, decay, probs):
            """The state between pieces; `acc` lacks the values of the last one."""
            acc = acc * lax.broadcast_in_dim(decay, acc.shape, (0,))
            return acc, peak, total, probs.astype(dtype)

        def with_values(acc, probs, step, part):
            """The output with the values of a piece, waited for."""

            def product(acc):
                acc.add(probs, v_ring.piece(step, part, columns))
                give_turn()
                return ()

            ((acc,), ()) = ops.together(product, (acc,), ())
            return acc

        def one_by_one(entry, state, masked):
            """A product, its softmax, a product: other warpgroups may fill the gaps."""
            step = visit.step(entry)
            k_ring.wait(step)
            for part in range(parts):
                acc, *row_state = state
                found = softmax(scores(step, part), entry, part, masked, *row_state)
                acc, *row_state, probs = settled(acc, *found)
                if part == 0:
                    v_ring.wait(step)
                state = with_values(acc, probs, step, part), *row_state
            v_ring.release(step)
            return state

        def first(entry, masked):
            """The first piece of all: no product with values goes on during its softmax."""
            step = visit.step(entry)
            k_ring.wait(step)
            take_turn()
            raw = scores(step, 0)
            give_turn()
            found = softmax(raw, entry, 0, masked, *nothing_met)
            v_ring.wait(step)
            take_turn()
            return settled(ops.tile((ROWS, v_dim), 0.0), *found)

        def overlapped(entry, state, masked, parts_left=range(parts)):
            """For each piece its scores, then its softmax while those before meet their values."""
            step = visit.step(entry)
            for part in parts_left:
                state = piece(step, entry, part, state, masked)
            return state

        def piece(step, entry, part, state, masked):
            acc, *row_state, probs = state
            last_part, last_step = (part - 1, step) if part else (parts - 1, step - 1)
            if part == 0:
                k_ring.wait(step)

            def products(raw, acc, *row_state):
                raw.add_nt(program.own(0), k_ring.piece(step, part, columns))
                acc.add(probs, v_ring.piece(last_step, last_part, columns))
                give_turn()
                raw = raw.read(running=1)
                if part + 1 == parts:
                    k_ring.release(step)
                found = softmax(raw, entry, part, masked, *row_state[:2])
                # the compiler would move all of it to where it is used, but not past a loop
                found = lax.optimization_barrier(found)
                if part == 0:
                    v_ring.wait(step)
                take_turn()
                return found

            zero, unknown = ops.tile(shape, 0.0), (ops.rows(ROWS, 0.0), ops.tile(shape, 0.0))
            (_, acc), found = ops.together(products, (zero, acc), (*row_state, *unknown))
            if last_part + 1 == parts:
                v_ring.release(last_step)
            # only now: what is multiplied must not change while it is
            return settled(acc, *found)

        def finish(acc, peak, total):
            write_rows(program, acc, Softmax(peak, total), in_place)

        start = ops.tile((ROWS, v_dim), 0.0), *nothing_met
        if not chosen.overlap:
            finish(*visit.tiles(one_by_one, start))
            return

        @pl.when(visit.last > visit.first)
        def some_tiles():
            if turns is not None:
                pl.when(program.member == 1)(give_turn)
            masked = visit.masked(visit.first)
            state = first(visit.first, masked)
            state = overlapped(visit.first, state, masked, range(1, parts))
            acc, *row_state, probs = visit.without_first().tiles(overlapped, state)
            acc = with_values(acc, probs, visit.after - 1, parts - 1)
            v_ring.release(visit.after - 1)
            if turns is not None:
                # so that no program ends with unseen arrivals
                pl.when(program.member == 0)(take_turn)
            finish(acc, *row_state)

        @pl.when(visit.last == visit.first)
        def no_tiles():
            finish(*start)

    out, lse = launch(
        consumer,
        own,
        met,
        lists,
        inputs=tiles.values,
        results=(
            jax.ShapeDtypeStruct((batches, q_len, heads, v_dim), dtype),
            jax.ShapeDtypeStruct((batches, heads, q_len), jnp.float32),
        ),
        scratch=(
            plgpu.SMEM((consumers, ROWS), jnp.float32),
            *[ring.tiles(dtype, consumers, ROWS, v_dim)] * (not in_place),
            *[plgpu.Barrier(num_barriers=2)] * (consumers == 2 and chosen.overlap),
        ),
        config=chosen,
        ops=ops,
        positions=positions,
    )
    return out, lse


SIDES = 8, 16, 32, 64, 128  # of blocks, in tokens
FORWARD = Forward(
    _compute,
    SIDES,
    lambda *sizes: None,
    default_config,
    others,
    layout_refusal,
    shared_memory,
    lengths=SIDES,
    for_one_tile=for_one_tile,
)
