"""Block-sparse attention, forward, for Blackwell.

A program owns a tile of queries and meets its tiles of keys and values (see `walk`). Its consumer
starts the products itself. They lie in tensor memory: the logits of the next piece are computed
while it is at the softmax of this one, and this one's values are added while it is at the next. The
sums over values stay in tensor memory from the first piece to the last, in units of two to a power
that is near each row's maximum; they are brought to another only where a maximum has grown so much
that the units would overflow.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, configurations, ring
from pallas_kernels.block_sparse_attention import mosaic
from pallas_kernels.block_sparse_attention.logits import LOG2_E, Place, Tiles
from pallas_kernels.block_sparse_attention.mosaic import Config
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
TENSOR_MEMORY = 512  # columns of 32 bits, of as many rows as an accumulator has
SLACK = 8.0  # powers of two that probabilities may be above 1: exact in 16 bits as in 32
CHUNK = 64  # columns of sums that are in registers at once


def tensor_memory(v_dim: int, columns: int) -> int:
    """Columns of tensor memory that a program asks for: logits, probabilities and sums."""
    return columns + columns // 2 + v_dim


def default_config(
    block_q: int, block_kv: int, dim: int, v_dim: int, column_values: int = 0
) -> Config | None:
    """The deepest ring that fits, or None where not even one kv tile does."""
    # vectors with a value per key are held for all keys at once, in every thread
    columns = 64 if column_values > 2 else block_kv
    for stages in (4, 3, 2, 1):
        config = Config(stages=stages, columns=columns)
        if layout_refusal(config, block_q, block_kv, dim, v_dim) is None:
            return config
    return None


def layout_refusal(config: Config, block_q: int, block_kv: int, dim: int, v_dim: int) -> str | None:
    """Why a program cannot be laid out by this configuration, or None if it can."""
    asked = tensor_memory(v_dim, min(config.columns, block_kv))
    if asked > TENSOR_MEMORY:
        return f"it asks for {asked} columns of tensor memory, of {TENSOR_MEMORY} that there are."
    return configurations.layout_refusal(
        config,
        consumers=block_q // ROWS,
        rows=block_kv,
        needed=mosaic.shared_memory(block_q, block_kv, dim, v_dim, config),
        limit=SHARED_MEMORY - RESERVED,
    )


def refusal(dtype: Any, block_q: int, block_kv: int, dim: int, v_dim: int) -> str | None:
    """Why this kernel cannot take a problem, or None if it can.

    Args:
      dtype: Of q, k and v.
      block_q: Queries per tile.
      block_kv: Keys per tile.
      dim: Width of q and k, padded to a multiple of 64.
      v_dim: Width of v, padded to a multiple of 64.
    """
    if block_q != ROWS:
        return f"on Blackwell it takes tiles of {ROWS} queries, not {block_q}."
    return mosaic.refusal(dtype, block_q, block_kv, dim, v_dim)


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
    chosen = config or default_config(block_q, block_kv, dim, v_dim, column_values)
    assert chosen is not None
    columns = min(chosen.columns, block_kv)
    shape, parts, consumers = (ROWS, columns), block_kv // columns, block_q // ROWS
    ops = Blackwell

    def consumer(program: Program):
        (q_tile,), (k_ring, v_ring) = program.own, program.rings
        out_tiles, lse_tiles, logits_tmem, probs_tmem, sums_tmem, *barriers = program.scratch
        logits_done, sums_done = (barrier.at[program.member] for barrier in barriers)
        bound, factor = tiles.bind(program.inputs), tiles.to_base_2
        visit = program.visit(jnp.int32(0), jnp.int32(0))

        def start_logits(step, part):
            if part == 0:
                k_ring.wait(step)
            keys = _compat.transpose(k_ring.piece(step, part, columns))
            plgpu.tcgen05_mma(logits_tmem, q_tile, keys, logits_done, accumulate=False)

        def start_sums(step, part):
            if part == 0:
                v_ring.wait(step)
            values = v_ring.piece(step, part, columns)
            more = step > 0 if part == 0 else True
            plgpu.tcgen05_mma(sums_tmem, probs_tmem, values, sums_done, accumulate=more)

        def end_sums(step, part):
            plgpu.barrier_wait(sums_done)
            if part + 1 == parts:
                v_ring.release(step)

        def rescale(decay):
            for at in range(0, v_dim, CHUNK):
                some = sums_tmem.at[:, pl.ds(at, CHUNK)]
                sums = plgpu.async_load_tmem(some, layout=ops.layout)
                ops.wait_load()
                plgpu.async_store_tmem(some, sums * ops.along(decay, (ROWS, CHUNK), 0))

        def tile(entry, carry, masked):
            step = visit.step(entry)
            for part in range(parts):
                carry = piece(entry, step, part, carry, masked)
            return carry

        def piece(entry, step, part, carry, masked):
            unit, total = carry
            plgpu.barrier_wait(logits_done)
            raw = plgpu.async_load_tmem(logits_tmem, layout=ops.layout)
            plgpu.wait_load_tmem()
            if part + 1 < parts:
                start_logits(step, part + 1)
            else:
                k_ring.release(step)
                pl.when(entry + 1 < visit.last)(lambda: start_logits(step + 1, 0))
            kv_start = program.met(visit, entry) * block_kv + part * columns
            where = program.batch, program.head, program.start, kv_start
            logits = bound.change(raw, Place(*where, 0, shape, program.positions, ops), masked)
            peak = logits.max(axis=1) * factor
            grown = peak > unit + SLACK
            new_unit = jnp.where(grown, peak, unit)
            # a row that saw nothing yet: 2 ** (-inf - 0) is 0, 2 ** (-inf + inf) would be nan
            finite = jnp.where(new_unit == -jnp.inf, 0.0, new_unit)
            decay = jnp.where(grown, jnp.exp2(unit - finite), 1.0)
            probs = jnp.exp2(logits * factor - ops.along(finite, shape, 0))
            total = total * decay + probs.sum(axis=1)

            def before():
                end_sums(*((step, part - 1) if part else (step - 1, parts - 1)))
                pl.when(ops.any_row(grown))(lambda: rescale(decay))

            before() if part else pl.when(step > 0)(before)
            plgpu.async_store_tmem(probs_tmem, probs.astype(dtype))
            plgpu.commit_tmem()
            start_sums(step, part)
            return new_unit, total

        some = visit.first < visit.last
        pl.when(some)(lambda: start_logits(jnp.int32(0), 0))
        unit, total = visit.tiles(tile, (ops.rows(ROWS, -math.inf), ops.rows(ROWS, 0.0)))
        pl.when(some)(lambda: end_sums(visit.after - 1, parts - 1))
        seen = total != 0.0
        safe = jnp.where(seen, total, 1.0)
        out_tile, lse_rows = (x.at[program.member] for x in (out_tiles, lse_tiles))
        for at in range(0, v_dim, CHUNK):
            here = (ROWS, CHUNK)
            sums = plgpu.async_load_tmem(sums_tmem.at[:, pl.ds(at, CHUNK)], layout=ops.layout)
            # what no product was written to may hold anything
            sums = jnp.where(ops.along(seen, here, 0), sums, 0.0)
            out_tile[:, pl.ds(at, CHUNK)] = (sums * ops.along(1.0 / safe, here, 0)).astype(dtype)
        lse_rows[...] = jnp.where(seen, unit / LOG2_E + jnp.log(safe), -math.inf)
        out_ref, lse_ref = program.results
        program.write(
            [(out_tile, out_ref.at[program.tokens]), (lse_rows, lse_ref.at[program.numbers])]
        )

    done = plgpu.Barrier(num_barriers=consumers, orders_tensor_core=True)
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
            plgpu.TMEM(shape, jnp.float32),
            plgpu.TMEM(shape, dtype, packed=True),
            plgpu.TMEM((ROWS, v_dim), jnp.float32),
            *(done, done),
        ),
        config=chosen,
        ops=ops,
    )
    return out, lse
