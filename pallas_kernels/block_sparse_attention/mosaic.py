"""Block-sparse attention, forward, for Hopper.

A program computes one tile of queries. A producer warpgroup reads the list of kv tiles and copies
them by TMA into a ring of shared memory; the consumer warpgroups, 64 queries each, multiply and
keep the softmax in registers. Every consumer waits for a tile to be full and says when it is done
with it; the producer waits for all of them before it overwrites a slot.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import configurations, ring
from pallas_kernels.warpgroup import warpgroup

ROWS = 64  # of one warpgroup: the height of a wgmma
SHARED_MEMORY = 232_448  # bytes a program may have on Hopper
RESERVED = 4096  # of which barriers and the compiler's scratch for reductions take a part
LOG2_E = math.log2(math.e)

# rule(logits, q_index, kv_index, row_values, column_values) -> logits; element by element. The
# values come as functions that read them, for one vector of keys fills a quarter of the registers
TileRule = Callable[..., jax.Array]


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
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        return f"its matrix products take bfloat16 or float16, not {jnp.dtype(dtype).name}."
    if block_q not in (64, 128):
        return f"it takes tiles of 64 or 128 queries, not {block_q}."
    if block_kv not in (64, 128):
        return f"it takes tiles of 64 or 128 keys, not {block_kv}."
    if max(dim, v_dim) > 256:
        return f"it takes dim and v_dim up to 256, not {dim} and {v_dim}."
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
    kv_indices: jax.Array,
    kv_num_blocks: jax.Array,
    *,
    block_q: int,
    block_kv: int,
    scale: float | None = None,
    rule: TileRule | None = None,
    row_values: tuple[jax.Array, ...] = (),
    column_values: tuple[jax.Array, ...] = (),
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes attention over the listed tiles.

    Args:
      q: [batch, q_len, heads, dim], bf16 or f16; q_len a multiple of `block_q`, dim of 64.
      k: [batch, kv_len, kv_heads, dim]; kv_len a multiple of `block_kv`.
      v: [batch, kv_len, kv_heads, v_dim]; v_dim a multiple of 64.
      kv_indices: int32 [batch | 1, heads | kv_heads | 1, q_blocks, width], the tiles of each row.
      kv_num_blocks: int32 [batch | 1, heads | kv_heads | 1, q_blocks], how many of them count.
      block_q: Queries per tile, 64 or 128.
      block_kv: Keys per tile, 64 or 128.
      scale: Constant factor on the logits, before the rule.
      rule: Changes a tile of logits, element by element; -inf hides. None changes nothing.
      row_values: Arrays [batch | 1, heads | 1, q_len | 1] handed to the rule, a value per query.
      column_values: Arrays [batch | 1, heads | 1, kv_len | 1] handed to it, a value per key.
      config: How a program is laid out.

    Returns:
      `out [batch, q_len, heads, v_dim]` in q's dtype; `lse [batch, heads, q_len]`, natural log,
      f32. A row that sees no key has `out = 0`, `lse = -inf`.

    Raises:
      NotImplementedError: if the kernel cannot take this problem.
    """
    batches, q_len, heads, dim = q.shape
    kv_heads, v_dim = v.shape[2:]
    reason = refusal(q.dtype, block_q, block_kv, dim, v_dim)
    if reason:
        raise NotImplementedError("The Mosaic block-sparse forward: " + reason)
    sizes = block_q, block_kv, dim, v_dim
    default = default_config(*sizes, len(column_values))
    assert default is not None
    # many vectors of keys ask for registers that what was timed had to spare
    operation = "forward" if len(column_values) <= 2 else "forward, many values"
    chosen = config or configurations.chosen(
        configurations.key(operation, rule is not None, q.dtype, *sizes),
        default,
        refusal=lambda tuned: layout_refusal(tuned, *sizes),
        trial=lambda tuned: configurations.compiles(
            functools.partial(
                forward, block_q=block_q, block_kv=block_kv, scale=scale, rule=rule, config=tuned
            ),
            *(q, k, v, kv_indices, kv_num_blocks),
            row_values=row_values,
            column_values=column_values,
        ),
    )
    stages, columns = chosen.stages, min(chosen.columns, block_kv)
    consumers, q_blocks, group = block_q // ROWS, q_len // block_q, heads // kv_heads
    ops, dtype = warpgroup(), q.dtype
    rows_count, columns_count = len(row_values), len(column_values)
    # with a rule logits stay in natural units; without, base 2 and scale are one factor
    factor = LOG2_E * (1.0 if scale is None or rule is not None else scale)

    def kernel(q_ref, k_ref, v_ref, indices_ref, counts_ref, *refs):
        row_refs, refs = refs[:rows_count], refs[rows_count:]
        column_refs, refs = refs[:columns_count], refs[columns_count:]
        out_ref, lse_ref, q_smem, k_smem, v_smem, out_smem, lse_smem = refs[:7]
        q_full, k_full, v_full, k_free, v_free = refs[7:]
        program, q_block = divmod_i32(lax.axis_index("program"), q_blocks)
        batch, head = divmod_i32(program, heads)
        kv_head = lax.div(head, jnp.int32(group))
        lists = (
            batch if indices_ref.shape[0] > 1 else 0,
            lax.div(head, jnp.int32(heads // indices_ref.shape[1])),
            q_block,
        )
        count = counts_ref[lists]
        member = lax.axis_index("warpgroup")

        @pl.when(member == consumers)
        def producer():
            plgpu.set_max_registers(chosen.producer_registers, action="decrease")

            def copy(entry, _):
                block = indices_ref[*lists, entry]
                source = batch, pl.ds(block * block_kv, block_kv), kv_head
                ring.fill(k_ref.at[source], k_smem, k_full, k_free, entry, stages)
                ring.fill(v_ref.at[source], v_smem, v_full, v_free, entry, stages)

            lax.fori_loop(0, count, copy, None)
            ring.drain(count, stages, (k_free, v_free))

        @pl.when(member < consumers)
        def consumer():
            plgpu.set_max_registers(chosen.consumer_registers, action="increase")
            q_start = q_block * block_q + member * ROWS
            here = batch, pl.ds(q_start, ROWS), head
            plgpu.copy_gmem_to_smem(q_ref.at[here], q_smem.at[member], q_full.at[member])
            plgpu.barrier_wait(q_full.at[member])
            shape = (ROWS, columns)
            where = batch, head
            per_query = value_readers(row_refs, where, q_start, shape, 0)

            def tile(entry, carry):
                slot = lax.rem(entry, jnp.int32(stages))
                plgpu.barrier_wait(k_full.at[slot])
                for part in range(block_kv // columns):
                    carry = piece(entry, slot, part, carry)
                plgpu.barrier_arrive(v_free.at[slot])
                return carry

            def piece(entry, slot, part, carry):
                acc, peak, total = carry
                here = pl.ds(part * columns, columns)
                logits = ops.product_nt(q_smem.at[member], k_smem.at[slot, here])
                if (part + 1) * columns == block_kv:
                    plgpu.barrier_arrive(k_free.at[slot])
                if rule is not None:
                    kv_start = indices_ref[*lists, entry] * block_kv + part * columns
                    logits = rule(
                        logits if scale is None else logits * scale,
                        ops.iota(shape, 0) + q_start,
                        ops.iota(shape, 1) + kv_start,
                        per_query,
                        value_readers(column_refs, where, kv_start, shape, 1),
                    )
                new_peak = jnp.maximum(peak, logits.max(axis=1) * factor)
                # a row that saw nothing yet: 2 ** (-inf - 0) is 0, 2 ** (-inf + inf) would be nan
                shift = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
                probs = jnp.exp2(logits * factor - lax.broadcast_in_dim(shift, shape, (0,)))
                decay = jnp.exp2(peak - shift)
                total = total * decay + probs.sum(axis=1)
                acc = acc * lax.broadcast_in_dim(decay, acc.shape, (0,))
                if part == 0:
                    plgpu.barrier_wait(v_full.at[slot])
                acc = ops.add_product(acc, probs.astype(dtype), v_smem.at[slot, here])
                return acc, new_peak, total

            start = (
                ops.tile((ROWS, v_dim), 0.0),
                ops.rows(ROWS, -math.inf),
                ops.rows(ROWS, 0.0),
            )
            acc, peak, total = lax.fori_loop(0, count, tile, start)
            seen = total != 0.0
            safe = jnp.where(seen, total, 1.0)
            acc = acc * lax.broadcast_in_dim(1.0 / safe, acc.shape, (0,))
            out_smem[member] = acc.astype(dtype)
            lse_smem[member] = jnp.where(seen, peak / LOG2_E + jnp.log(safe), -math.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[member], out_ref.at[here])
            plgpu.copy_smem_to_gmem(
                lse_smem.at[member], lse_ref.at[batch, head, pl.ds(q_start, ROWS)]
            )
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((batches, q_len, heads, v_dim), dtype),
            jax.ShapeDtypeStruct((batches, heads, q_len), jnp.float32),
        ),
        scratch_types=(
            ring.tiles(dtype, consumers, ROWS, dim),
            ring.tiles(dtype, stages, block_kv, dim),
            ring.tiles(dtype, stages, block_kv, v_dim),
            ring.tiles(dtype, consumers, ROWS, v_dim),
            plgpu.SMEM((consumers, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=consumers),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages, num_arrivals=consumers),
            plgpu.Barrier(num_barriers=stages, num_arrivals=consumers),
        ),
        grid=(batches * heads * q_blocks,),
        grid_names=("program",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=ops.compiler_params,
    )(q, k, v, kv_indices, kv_num_blocks, *row_values, *column_values)


def value_readers(
    refs: Sequence[Any],
    where: tuple[jax.Array, jax.Array],
    start: jax.Array,
    shape: tuple[int, int],
    axis: int,
) -> tuple[Callable[[], jax.Array], ...]:
    """Functions that read values for a tile of logits.

    Args:
      refs: Arrays [batch | 1, heads | 1, tokens | 1] in device memory.
      where: Sequence and query head.
      start: First token of the tile.
      shape: Shape of the tile.
      axis: Which axis of the tile the tokens are.
    """
    ops = warpgroup()
    load = (ops.load_rows, ops.load_columns)[axis]

    def reader(ref):
        at = tuple(index % size for index, size in zip(where, ref.shape, strict=False))
        if ref.shape[2] == 1:
            # one number: a register, where a vector of it would take sixteen
            return lambda: lax.broadcast_in_dim(ref[*at, 0], shape, ())
        tokens = pl.ds(start, shape[axis])
        return lambda: lax.broadcast_in_dim(load(ref.at[*at, tokens]), shape, (axis,))

    return tuple(map(reader, refs))


def divmod_i32(a: jax.Array, b: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of numbers that are not negative."""
    return lax.div(a, jnp.int32(b)), lax.rem(a, jnp.int32(b))
