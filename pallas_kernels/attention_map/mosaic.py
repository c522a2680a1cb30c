"""The log-sum-exp of rows, and sums and maxima of probabilities per tile, for Hopper.

Programs are those of the forward pass without values: each owns a tile of queries and meets the
tiles of keys that its list names (see `walk`). A consumer starts the products with both halves of a
tile at once, and works on the first while the second goes on. Of a tile it keeps a number per row;
these wait in shared memory until there are as many tiles as a warpgroup has rows, and are then read
as one accumulator, whose sums along rows are the tiles'.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import configurations
from pallas_kernels.block_sparse_attention.logits import Place, Tiles
from pallas_kernels.block_sparse_attention.softmax import Softmax
from pallas_kernels.block_sparse_attention.walk import (
    RESERVED,
    ROWS,
    SHARED_MEMORY,
    Lists,
    Program,
    Side,
    Visit,
    divmod_i32,
    launch,
)
from pallas_kernels.warpgroup import warpgroup


@dataclasses.dataclass(frozen=True)
class Config:
    """How a program is laid out; every legal choice gives the same result.

    Attributes:
      stages: kv tiles in flight, at least 1.
      columns: Keys multiplied at once, 64 or 128, at most a tile's.
      consumer_registers: Registers per thread of a consumer, a multiple of 8.
      producer_registers: Registers per thread of the producer, a multiple of 8.
    """

    stages: int = 4
    columns: int = 64
    consumer_registers: int = 240
    producer_registers: int = 24


def shared_memory(block_q: int, block_kv: int, dim: int, config: Config) -> int:
    """Bytes of shared memory that a program asks for, barriers apart."""
    waiting = 4 * (block_q // ROWS) * (ROWS + 1) * ROWS
    return 2 * dim * (block_q + config.stages * block_kv) + waiting


def default_config(block_q: int, block_kv: int, dim: int) -> Config | None:
    """The deepest ring that fits, or None where not even one kv tile does."""
    for stages in (4, 3, 2, 1):
        config = Config(stages=stages)
        if shared_memory(block_q, block_kv, dim, config) <= SHARED_MEMORY - RESERVED:
            return config
    return None


def layout_refusal(config: Config, block_q: int, block_kv: int, dim: int) -> str | None:
    """Why a program cannot be laid out by this configuration, or None if it can."""
    return configurations.layout_refusal(
        config,
        consumers=block_q // ROWS,
        rows=block_kv,
        needed=shared_memory(block_q, block_kv, dim, config),
        limit=SHARED_MEMORY - RESERVED,
    )


def refusal(dtype: Any, block_q: int, block_kv: int, dim: int) -> str | None:
    """Why it cannot take a problem, or None if it can.

    Args:
      dtype: Of q and k.
      block_q: Queries per tile.
      block_kv: Keys per tile.
      dim: Width of q and k, padded to a multiple of 64.
    """
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        return f"its matrix products take bfloat16 or float16, not {jnp.dtype(dtype).name}."
    if block_q not in (64, 128) or block_kv not in (64, 128):
        return f"it takes tiles of 64 or 128 queries and keys, not {block_q} x {block_kv}."
    if dim > 256:
        return f"it takes dim up to 256, not {dim}."
    return None


def row_lse(
    q: jax.Array, k: jax.Array, lists: Lists, tiles: Tiles, config: Config | None = None
) -> jax.Array:
    """The log-sum-exp of each row over the listed tiles.

    Args:
      q: [batch, q_len, heads, dim], bf16 or f16; q_len a multiple of a tile's, dim of 64.
      k: [batch, kv_len, kv_heads, dim]; kv_len a multiple of a tile's.
      lists: For each tile of queries the tiles of keys.
      tiles: Tile sizes, and what happens to logits.
      config: How a program is laid out.

    Returns:
      [batch, heads, q_len], natural log, f32; -inf where a row sees no key.
    """
    batches, q_len, heads, _ = q.shape
    ops = warpgroup()

    def consumer(program: Program, visit: Visit, bound: Tiles, pieces: Callable[..., Any]):
        def add(known, logits):
            known, _, _ = Softmax(*known).add(logits, tiles.to_base_2)
            return tuple(known)

        def tile(entry, known, masked):
            return pieces(entry, masked, known, add)

        nothing_met = ops.rows(ROWS, -math.inf), ops.rows(ROWS, 0.0)
        known = visit.tiles(tile, nothing_met)
        rows = program.scratch[0].at[program.member]
        rows[...] = Softmax(*known).end()[1]
        program.write([(rows, program.results[0].at[program.numbers])])

    (lse,) = _launched(
        consumer,
        (q, k, lists, tiles, config, ops),
        results=[jax.ShapeDtypeStruct((batches, heads, q_len), jnp.float32)],
        scratch=[plgpu.SMEM((tiles.block_q // ROWS, ROWS), jnp.float32)],
    )
    return lse


def tile_sums(
    q: jax.Array,
    k: jax.Array,
    lse2: jax.Array,
    lists: Lists,
    tiles: Tiles,
    width: int,
    config: Config | None = None,
) -> jax.Array:
    """The sum of the probabilities in each listed tile.

    Args:
      q: As in `row_lse`.
      k: As in `row_lse`.
      lse2: [batch, heads, q_len], the log-sum-exp in base 2, +inf where a row sees nothing.
      lists: For each tile of queries the tiles of keys; no list is longer than `width`.
      tiles: Tile sizes, and what happens to logits.
      width: Entries of the longest list.
      config: How a program is laid out.

    Returns:
      [batch, heads, q_blocks, width], in the order of the lists; what follows a list is undefined.
    """
    factor = tiles.to_base_2

    def of_piece(total, logits, row_lse2):
        below = lax.broadcast_in_dim(row_lse2, logits.shape, (0,))
        return total + jnp.exp2(logits * factor - below).sum(axis=1)

    found = _of_tiles(
        (q, k, lists, tiles, config),
        lse2,
        width,
        start=0.0,
        of_piece=of_piece,
        of_rows=lambda rows, _: rows,
        of_tiles=lambda x: x.sum(axis=1),
    )
    return found.sum(3)


def tile_maxima(
    q: jax.Array,
    k: jax.Array,
    lse2: jax.Array,
    lists: Lists,
    tiles: Tiles,
    width: int,
    config: Config | None = None,
) -> jax.Array:
    """The largest probability in each listed tile; as `tile_sums`.

    The largest of exp(x - lse) is the exponential of the largest x - lse: one per row and tile.
    """
    factor = tiles.to_base_2
    found = _of_tiles(
        (q, k, lists, tiles, config),
        lse2,
        width,
        start=-math.inf,
        of_piece=lambda peak, logits, _: jnp.maximum(peak, logits.max(axis=1)),
        of_rows=lambda peak, row_lse2: peak * factor - row_lse2,
        of_tiles=lambda x: jnp.exp2(x.max(axis=1)),
    )
    return found.max(3)


def _of_tiles(
    problem: tuple[Any, ...],
    lse2: jax.Array,
    width: int,
    *,
    start: float,
    of_piece: Callable[..., jax.Array],
    of_rows: Callable[..., jax.Array],
    of_tiles: Callable[..., jax.Array],
) -> jax.Array:
    """A number per tile and warpgroup, [batch, heads, q_blocks, warpgroups, width].

    Args:
      problem: Arrays, lists, tiles and configuration.
      lse2: As in `tile_sums`.
      width: As in `tile_sums`.
      start: What is known of a row before its first piece.
      of_piece: `of_piece(known, logits, lse2)` after a piece.
      of_rows: `of_rows(known, lse2)`: what waits of a row.
      of_tiles: From what waits of tiles, [tiles, rows], to a number each.
    """
    q, k, lists, tiles, config = problem
    batches, q_len, heads, _ = q.shape
    ops = warpgroup()
    consumers, whole_width = tiles.block_q // ROWS, -(-width // ROWS) * ROWS

    def consumer(program: Program, visit: Visit, bound: Tiles, pieces: Callable[..., Any]):
        own_lse2 = ops.load_rows(program.inputs[0].at[program.numbers])
        waiting, numbers = (x.at[program.member] for x in program.scratch)

        def write(group):
            numbers[...] = of_tiles(ops.load_tile(waiting))
            own = lax.div(program.start, jnp.int32(ROWS))
            entries = pl.ds(group * ROWS, ROWS)
            target = program.results[0].at[program.batch, program.head, own, entries]
            program.write([(numbers, target)])

        def tile(entry, carry, masked):
            (known,) = pieces(
                entry,
                masked,
                (ops.rows(ROWS, start),),
                lambda known, logits: (of_piece(*known, logits, own_lse2),),
            )
            group, place = divmod_i32(visit.step(entry), ROWS)
            waiting.at[place][...] = of_rows(known, own_lse2)
            pl.when(place == ROWS - 1)(lambda: write(group))
            return carry

        visit.tiles(tile, ())
        group, place = divmod_i32(visit.after, ROWS)
        pl.when(place > 0)(lambda: write(group))

    (found,) = _launched(
        consumer,
        (q, k, lists, tiles, config, ops),
        inputs=[lse2],
        results=[jax.ShapeDtypeStruct((batches, heads, q_len // ROWS, whole_width), jnp.float32)],
        scratch=[
            plgpu.SMEM((consumers, ROWS, ROWS), jnp.float32),
            plgpu.SMEM((consumers, ROWS), jnp.float32),
        ],
    )
    return found[..., :width].reshape(batches, heads, -1, consumers, width)


def _launched(
    consumer: Callable[..., None],
    problem: tuple[Any, ...],
    *,
    results: list[jax.ShapeDtypeStruct],
    scratch: list[Any],
    inputs: Sequence[jax.Array] = (),
) -> Any:
    """Runs `consumer(program, visit, tiles, pieces)` in every consumer warpgroup.

    `pieces(entry, masked, known, add)` meets a tile: `add(known, logits)` after each piece of it.
    """
    q, k, lists, tiles, config, ops = problem
    sizes = tiles.block_q, tiles.block_kv, q.shape[3]
    reason = refusal(q.dtype, *sizes)
    if reason:
        raise NotImplementedError("The Mosaic kernels of attention maps: " + reason)
    default = default_config(*sizes)
    assert default is not None  # any tile that is not refused fits
    chosen = config or default
    reason = layout_refusal(chosen, *sizes)
    if reason:
        raise ValueError(f"config={chosen} is not legal here: {reason}")
    columns = min(chosen.columns, tiles.block_kv)
    parts, shape = tiles.block_kv // columns, (ROWS, columns)

    def of_program(program: Program):
        (k_ring,) = program.rings
        bound = tiles.bind(program.inputs[len(inputs) :])
        visit = program.visit(jnp.int32(0), jnp.int32(0))

        def pieces(entry, masked, known, add):
            step = visit.step(entry)
            k_ring.wait(step)

            def products(*state):
                accumulators, known = state[:parts], state[parts:]
                for part, product in enumerate(accumulators):
                    product.add_nt(program.own(0), k_ring.piece(step, part, columns))
                for part, product in enumerate(accumulators):
                    raw = product.read(running=parts - 1 - part)
                    kv_start = program.met(visit, entry) * tiles.block_kv + part * columns
                    where = program.batch, program.head, program.start, kv_start
                    at = Place(*where, 0, shape, program.positions, ops)
                    known = add(known, bound.change(raw, at, masked))
                return known

            _, known = ops.together(products, (ops.tile(shape, 0.0),) * parts, tuple(known))
            k_ring.release(step)
            return known

        consumer(program, visit, bound, pieces)

    return launch(
        of_program,
        Side((q,), tiles.block_q),
        Side((k,), tiles.block_kv),
        lists,
        inputs=(*inputs, *tiles.values),
        results=results,
        scratch=scratch,
        config=chosen,
        ops=ops,
    )
