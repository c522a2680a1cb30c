"""Block-sparse attention, forward, for Hopper.

A program owns a tile of queries and meets its tiles of keys and values (see `walk`). Each consumer
warpgroup keeps the softmax of its 64 queries in registers.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import configurations, ring
from pallas_kernels.block_sparse_attention import walk
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


@dataclasses.dataclass(frozen=True)
class Config:
    """How a program is laid out; every legal choice gives the same result.

    Attributes:
      stages: kv tiles in flight, at least 1.
      columns: Keys multiplied at once, 64 or 128, at most a tile's.
      consumer_registers: Registers per thread of a consumer, a multiple of 8.
      producer_registers: Registers per thread of the producer, a multiple of 8.
    """

    stages: int = 2
    columns: int = 128
    consumer_registers: int = 232
    producer_registers: int = 40


def shared_memory(block_q: int, block_kv: int, dim: int, v_dim: int, config: Config) -> int:
    """Bytes of shared memory that a program asks for, barriers apart."""
    in_flight = config.stages * block_kv * (dim + v_dim)
    return 2 * (block_q * (dim + v_dim) + in_flight) + 4 * block_q


def default_config(
    block_q: int, block_kv: int, dim: int, v_dim: int, column_values: int = 0
) -> Config | None:
    """The deepest ring that fits, or None where not even one kv tile does."""
    # vectors with a value per key are held for all keys at once, in every thread
    columns = 64 if column_values > 2 else block_kv
    for stages in (4, 3, 2, 1):
        config = Config(stages=stages, columns=columns)
        if shared_memory(block_q, block_kv, dim, v_dim, config) <= SHARED_MEMORY - RESERVED:
            return config
    return None


def layout_refusal(config: Config, block_q: int, block_kv: int, dim: int, v_dim: int) -> str | None:
    """Why a program cannot be laid out by this configuration, or None if it can."""
    return configurations.layout_refusal(
        config,
        consumers=block_q // ROWS,
        rows=block_kv,
        needed=shared_memory(block_q, block_kv, dim, v_dim, config),
        limit=SHARED_MEMORY - RESERVED,
    )


def candidates(block_q: int, block_kv: int, dim: int, v_dim: int) -> tuple[Config, ...]:
    """The configurations worth timing, the default first; none where nothing fits."""
    default = default_config(block_q, block_kv, dim, v_dim)
    if default is None:
        return ()
    others = (
        Config(stages, columns, consumer, producer)
        for stages in (4, 3, 2, 1)
        for columns in sorted({64, block_kv}, reverse=True)
        for consumer, producer in ((232, 40), (240, 24), (216, 56))
    )
    legal = (c for c in others if layout_refusal(c, block_q, block_kv, dim, v_dim) is None)
    return (default, *(config for config in legal if config != default))


def refusal(dtype: Any, block_q: int, block_kv: int, dim: int, v_dim: int) -> str | None:
    """Why this kernel cannot take a problem, or None if it can.

    Args:
      dtype: Of q, k and v.
      block_q: Queries per tile.
      block_kv: Keys per tile.
      dim: Width of q and k, padded to a multiple of 64.
      v_dim: Width of v, padded to a multiple of 64.
    """
    reason = walk.refusal(dtype, block_q, block_kv, dim, v_dim)
    if reason:
        return reason
    if default_config(block_q, block_kv, dim, v_dim) is None:
        return (
            f"tiles of {block_q} x {block_kv} with dim {dim} and v_dim {v_dim} do not fit in "
            "shared memory; take smaller tiles."
        )
    return None


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lists: Lists,
    tiles: Tiles,
    *,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes attention over the listed tiles.

    Args:
      q: [batch, q_len, heads, dim], bf16 or f16; q_len a multiple of a tile's, dim of 64.
      k: [batch, kv_len, kv_heads, dim]; kv_len a multiple of a tile's.
      v: [batch, kv_len, kv_heads, v_dim]; v_dim a multiple of 64.
      lists: For each tile of queries the tiles of keys.
      tiles: Tile sizes, and what happens to logits.
      config: How a program is laid out.

    Returns:
      `out [batch, q_len, heads, v_dim]` in q's dtype; `lse [batch, heads, q_len]`, natural log,
      f32. A row that sees no key has `out = 0`, `lse = -inf`.

    Raises:
      NotImplementedError: if the kernel cannot take this problem.
    """
    batches, q_len, heads, dim = q.shape
    v_dim, dtype = v.shape[3], q.dtype
    block_q, block_kv = tiles.block_q, tiles.block_kv
    reason = refusal(dtype, block_q, block_kv, dim, v_dim)
    if reason:
        raise NotImplementedError("The Mosaic block-sparse forward: " + reason)
    column_values = sum(len(rule.column_values) for rule in (tiles.rule, tiles.mask) if rule)
    sizes = block_q, block_kv, dim, v_dim
    default = default_config(*sizes, column_values)
    assert default is not None
    # many vectors of keys ask for registers that what was timed had to spare
    operation = "forward" if column_values <= 2 else "forward, many values"
    chosen = config or configurations.chosen(
        configurations.key(operation, tiles.changes, dtype, *sizes),
        default,
        refusal=lambda tuned: layout_refusal(tuned, *sizes),
        trial=lambda tuned: configurations.compiles(
            lambda q, k, v, lists, values: forward(
                q, k, v, lists, tiles.bind(values), config=tuned
            ),
            *(q, k, v, lists, tiles.values),
        ),
    )
    columns = min(chosen.columns, block_kv)
    shape, parts, consumers = (ROWS, columns), block_kv // columns, block_q // ROWS
    ops = warpgroup()

    def consumer(program: Program):
        (q_tile,), (k_ring, v_ring) = program.own, program.rings
        bound, factor = tiles.bind(program.inputs), tiles.to_base_2
        visit = program.visit(jnp.int32(0), jnp.int32(0))

        def tile(entry, carry, masked):
            step = visit.step(entry)
            k_ring.wait(step)
            for part in range(parts):
                carry = piece(entry, step, part, carry, masked)
            v_ring.release(step)
            return carry

        def piece(entry, step, part, carry, masked):
            acc, softmax = carry
            raw = product_nt(ops.tile(shape, 0.0), q_tile, k_ring.piece(step, part, columns))
            if part + 1 == parts:
                k_ring.release(step)
            kv_start = program.met(visit, entry) * block_kv + part * columns
            at = Place(
                program.batch,
                program.head,
                program.start,
                kv_start,
                0,
                shape,
                program.positions,
                ops,
            )
            logits = bound.change(raw, at, masked)
            softmax, probs, decay = softmax.add(logits, factor)
            acc = acc * lax.broadcast_in_dim(decay, acc.shape, (0,))
            if part == 0:
                v_ring.wait(step)
            ((acc,), ()) = ops.together(
                lambda acc: acc.add(probs.astype(dtype), v_ring.piece(step, part, columns)) or (),
                (acc,),
                (),
            )
            return acc, softmax

        nothing = Softmax(ops.rows(ROWS, -math.inf), ops.rows(ROWS, 0.0))
        acc, softmax = visit.tiles(tile, (ops.tile((ROWS, v_dim), 0.0), nothing))
        share, lse_tile = softmax.end()
        out_tile, lse_rows = (x.at[program.member] for x in program.scratch)
        out_tile[...] = (acc * lax.broadcast_in_dim(share, acc.shape, (0,))).astype(dtype)
        lse_rows[...] = lse_tile
        out_ref, lse_ref = program.results
        program.write(
            [(out_tile, out_ref.at[program.tokens]), (lse_rows, lse_ref.at[program.numbers])]
        )

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
            ring.tiles(dtype, consumers, ROWS, v_dim),
            plgpu.SMEM((consumers, ROWS), jnp.float32),
        ),
        config=chosen,
        ops=ops,
    )
    return out, lse
