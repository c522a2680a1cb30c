"""Block-sparse attention, backward, for Hopper: two kernels, no atomics, nothing saved but the lse.

`d_q` walks the list of each tile of queries, as the forward does. `d_k` and `d_v` walk the inverse
list of each tile of keys, one query head of the group after the other, with the products transposed
so that keys are the rows of a warpgroup. Each number has one writer, so reruns are equal bit by
bit.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import configurations, ring
from pallas_kernels.block_sparse_attention.mosaic import (
    LOG2_E,
    RESERVED,
    ROWS,
    SHARED_MEMORY,
    TileRule,
    divmod_i32,
    value_readers,
)
from pallas_kernels.warpgroup import warpgroup


@dataclasses.dataclass(frozen=True)
class Config:
    """How a program is laid out; every legal choice gives the same result up to rounding.

    Attributes:
      stages: Tiles in flight, at least 1.
      columns: Tokens multiplied at once, 64 or 128.
      consumer_registers: Registers per thread of a consumer, a multiple of 8.
      producer_registers: Registers per thread of the producer, a multiple of 8.
    """

    stages: int = 2
    columns: int = 64
    consumer_registers: int = 240
    producer_registers: int = 24


class Problem(NamedTuple):
    """The arrays that both kernels read; lengths are whole tiles.

    `lse2` is the log-sum-exp in base 2, +inf where a row saw nothing. `delta` is the row sum of
    `out * d_out`, less the gradient of the lse.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    d_out: jax.Array
    lse2: jax.Array
    delta: jax.Array
    row_values: tuple[jax.Array, ...]
    column_values: tuple[jax.Array, ...]


# gradient(logits, q_index, kv_index, row_values, column_values, d_logits) -> what flows back to the
# logits, to each f32 value per query, to each f32 value per key
TileGradient = Callable[..., Sequence[jax.Array]]


class Tiles(NamedTuple):
    """Static: tile sizes, and what happens to logits (see `forward`)."""

    block_q: int
    block_kv: int
    scale: float | None = None
    rule: TileRule | None = None
    gradient: TileGradient | None = None


def shared_memory(own: int, other: int, dim: int, v_dim: int, config: Config) -> int:
    """Bytes of shared memory: a program's own tile and the ring of the others, barriers apart."""
    return 2 * (dim + v_dim) * (own + config.stages * other) + 64 * own


def default_config(own: int, other: int, dim: int, v_dim: int) -> Config | None:
    """The deepest ring that fits, or None where not even one tile does."""
    for stages in (3, 2, 1):
        config = Config(stages=stages)
        if shared_memory(own, other, dim, v_dim, config) <= SHARED_MEMORY - RESERVED:
            return config
    return None


def layout_refusal(config: Config, own: int, other: int, dim: int, v_dim: int) -> str | None:
    """Why a program cannot be laid out by this configuration, or None if it can."""
    return configurations.layout_refusal(
        config,
        consumers=own // ROWS,
        rows=other,
        needed=shared_memory(own, other, dim, v_dim, config),
        limit=SHARED_MEMORY - RESERVED,
    )


def candidates(own: int, other: int, dim: int, v_dim: int) -> tuple[Config, ...]:
    """The configurations worth timing, the default first; none where nothing fits."""
    default = default_config(own, other, dim, v_dim)
    if default is None:
        return ()
    others = (
        Config(stages, columns, consumer, producer)
        for stages in (3, 2, 1)
        for columns in sorted({64, other})
        for consumer, producer in ((240, 24), (232, 40))
    )
    legal = (c for c in others if layout_refusal(c, own, other, dim, v_dim) is None)
    return (default, *(config for config in legal if config != default))


def refusal(block_q: int, block_kv: int, dim: int, v_dim: int) -> str | None:
    """Why the backward kernels cannot take what the forward takes, or None if they can."""
    if dim + v_dim > 256:
        return f"its gradients take dim + v_dim up to 256, not {dim} + {v_dim}."
    fits = default_config(block_q, block_kv, dim, v_dim)
    if fits is None or default_config(block_kv, block_q, dim, v_dim) is None:
        return "the tiles of its gradients do not fit in shared memory; take smaller ones."
    return None


class Gradients(NamedTuple):
    """By each array of a problem; None for values that are not f32."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    row_values: tuple[jax.Array | None, ...]
    column_values: tuple[jax.Array | None, ...]


def gradients(
    problem: Problem,
    lists: tuple[jax.Array, jax.Array],
    inverse: tuple[jax.Array, jax.Array],
    tiles: Tiles,
) -> Gradients:
    """All gradients, in as many passes as registers ask for.

    Args:
      problem: The arrays.
      lists: `kv_indices` and `kv_num_blocks`, as for `d_queries`.
      inverse: `offsets` and `q_indices`, as for `d_keys`.
      tiles: Tile sizes, and what happens to logits.
    """
    d_rows: tuple[jax.Array | None, ...] = (None,) * len(problem.row_values)
    d_columns: tuple[jax.Array | None, ...] = (None,) * len(problem.column_values)

    d_q, _ = d_queries(problem, *lists, tiles, with_values=False)
    if tiles.rule is None:
        d_k, d_v, _ = d_keys(problem, *inverse, tiles)
        return Gradients(d_q, d_k, d_v, d_rows, d_columns)
    # a rule wants registers of its own: one accumulator at a time, logits computed anew
    d_k, _, _ = d_keys(problem, *inverse, tiles, with_v=False, with_values=False)
    _, d_v, _ = d_keys(problem, *inverse, tiles, with_k=False, with_values=False)
    if _floats(problem.row_values):
        _, d_rows = d_queries(problem, *lists, tiles, with_q=False)
    if _floats(problem.column_values):
        _, _, d_columns = d_keys(problem, *inverse, tiles, with_k=False, with_v=False)
    return Gradients(d_q, d_k, d_v, d_rows, d_columns)


def d_queries(
    problem: Problem,
    kv_indices: jax.Array,
    kv_num_blocks: jax.Array,
    tiles: Tiles,
    config: Config | None = None,
    *,
    with_q: bool = True,
    with_values: bool = True,
) -> Any:
    """The gradient by q, and by each f32 value per query.

    Args:
      problem: The arrays, in the shapes of `forward`.
      kv_indices: int32 [batch | 1, heads | kv_heads | 1, q_blocks, width].
      kv_num_blocks: int32 [batch | 1, heads | kv_heads | 1, q_blocks].
      tiles: Tile sizes, and what happens to logits.
      config: How a program is laid out.
      with_q: Whether to compute `d_q`.
      with_values: Whether to compute the gradients by values.

    Returns:
      `d_q` in q's shape and dtype; for each of `row_values` in f32 its gradient
      [batch, heads, q_len], not yet summed where it is shared; None for the others, and for what
      was not asked for.
    """
    batches, q_len, heads, dim = problem.q.shape
    kv_heads, v_dim = problem.v.shape[2:]
    block_q, block_kv = tiles.block_q, tiles.block_kv
    wanted = _floats(problem.row_values) if with_values else ()
    sizes = block_q, block_kv, dim, v_dim
    default = default_config(*sizes)
    assert default is not None
    again = functools.partial(d_queries, tiles=tiles, with_q=with_q, with_values=with_values)
    chosen = config or configurations.chosen(
        _key(problem, tiles, {"q": with_q, "values": bool(wanted)}),
        default,
        refusal=lambda tuned: layout_refusal(tuned, *sizes),
        trial=lambda tuned: configurations.compiles(
            functools.partial(again, config=tuned), problem, kv_indices, kv_num_blocks
        ),
    )
    stages, columns = chosen.stages, min(chosen.columns, block_kv)
    consumers, q_blocks, group = block_q // ROWS, q_len // block_q, heads // kv_heads
    ops, dtype = warpgroup(), problem.q.dtype
    sums = len(wanted)

    def kernel(q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, indices_ref, counts_ref, *refs):
        values, refs = _split(refs, problem)
        results, refs = refs[: with_q + sums], refs[with_q + sums :]
        d_q_refs, d_value_refs = results[:with_q], results[with_q:]
        q_smem, d_out_smem, k_smem, v_smem, sums_smem = refs[:5]
        q_full, d_out_full, k_full, v_full, k_free, v_free = refs[5:]
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
                for ref, smem, full, free in (
                    (k_ref, k_smem, k_full, k_free),
                    (v_ref, v_smem, v_full, v_free),
                ):
                    ring.fill(ref.at[source], smem, full, free, entry, stages)

            lax.fori_loop(0, count, copy, None)
            ring.drain(count, stages, (k_free, v_free))

        @pl.when(member < consumers)
        def consumer():
            plgpu.set_max_registers(chosen.consumer_registers, action="increase")
            q_start = q_block * block_q + member * ROWS
            here = batch, pl.ds(q_start, ROWS), head
            for ref, smem, full in (
                (q_ref, q_smem, q_full),
                (d_out_ref, d_out_smem, d_out_full),
            ):
                plgpu.copy_gmem_to_smem(ref.at[here], smem.at[member], full.at[member])
            plgpu.barrier_wait(q_full.at[member])
            plgpu.barrier_wait(d_out_full.at[member])
            shape = ROWS, columns
            rows = batch, head, pl.ds(q_start, ROWS)
            lse2, delta = (
                lax.broadcast_in_dim(ops.load_rows(ref.at[rows]), shape, (0,))
                for ref in (lse_ref, delta_ref)
            )

            def piece(entry, slot, part, carry):
                d_q, d_values = carry
                part_at = pl.ds(part * columns, columns)
                raw = ops.product_nt(q_smem.at[member], k_smem.at[slot, part_at])
                if part == 0:
                    plgpu.barrier_wait(v_full.at[slot])
                d_probs = ops.product_nt(d_out_smem.at[member], v_smem.at[slot, part_at])
                if (part + 1) * columns == block_kv:
                    plgpu.barrier_arrive(v_free.at[slot])
                kv_start = indices_ref[*lists, entry] * block_kv + part * columns
                at = Place(batch, head, q_start, kv_start, q_axis=0, shape=shape)
                logits, pullback = _logits(raw, tiles, ops, at, values)
                probs = jnp.exp2(logits * LOG2_E - lse2)
                d_raw, *d_new = pullback(probs * (d_probs - delta))
                if with_q:
                    d_q = ops.add_product(d_q, d_raw.astype(dtype), k_smem.at[slot, part_at])
                d_new = d_new[:sums]
                return d_q, tuple(a + b.sum(axis=1) for a, b in zip(d_values, d_new, strict=True))

            def tile(entry, carry):
                slot = lax.rem(entry, jnp.int32(stages))
                plgpu.barrier_wait(k_full.at[slot])
                for part in range(block_kv // columns):
                    carry = piece(entry, slot, part, carry)
                plgpu.barrier_arrive(k_free.at[slot])
                return carry

            start = (
                ops.tile((ROWS, dim), 0.0) if with_q else None,
                tuple(ops.rows(ROWS, 0.0) for _ in wanted),
            )
            d_q, d_values = lax.fori_loop(0, count, tile, start)
            if with_q:
                q_smem[member] = d_q.astype(dtype)
            for n, d_value in enumerate(d_values):
                sums_smem[member, n] = d_value
            plgpu.commit_smem()
            for ref in d_q_refs:
                plgpu.copy_smem_to_gmem(q_smem.at[member], ref.at[here])
            for n, ref in enumerate(d_value_refs):
                plgpu.copy_smem_to_gmem(sums_smem.at[member, n], ref.at[rows])
            plgpu.wait_smem_to_gmem(0)

    out_types = [jax.ShapeDtypeStruct(problem.q.shape, dtype)] * with_q
    out_types += [jax.ShapeDtypeStruct((batches, heads, q_len), jnp.float32)] * sums
    results = plgpu.kernel(
        kernel,
        out_type=tuple(out_types),
        scratch_types=(
            ring.tiles(dtype, consumers, ROWS, dim),
            ring.tiles(dtype, consumers, ROWS, v_dim),
            ring.tiles(dtype, stages, block_kv, dim),
            ring.tiles(dtype, stages, block_kv, v_dim),
            plgpu.SMEM((consumers, max(sums, 1), ROWS), jnp.float32),
            *[plgpu.Barrier(num_barriers=consumers)] * 2,
            *[plgpu.Barrier(num_barriers=stages)] * 2,
            *[plgpu.Barrier(num_barriers=stages, num_arrivals=consumers)] * 2,
        ),
        grid=(batches * heads * q_blocks,),
        grid_names=("program",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=ops.compiler_params,
    )(*problem[:6], kv_indices, kv_num_blocks, *problem.row_values, *problem.column_values)
    d_q = results[0] if with_q else None
    return d_q, _place(results[with_q:], wanted, len(problem.row_values))


def d_keys(
    problem: Problem,
    offsets: jax.Array,
    q_indices: jax.Array,
    tiles: Tiles,
    config: Config | None = None,
    *,
    with_k: bool = True,
    with_v: bool = True,
    with_values: bool = True,
) -> Any:
    """The gradients by k and v, and by each f32 value per key.

    Args:
      problem: The arrays, in the shapes of `forward`.
      offsets: int32 [batch | 1, heads | kv_heads | 1, kv_blocks + 1], where the list of each tile
        of keys begins and ends.
      q_indices: int32 [batch | 1, heads | kv_heads | 1, entries], the tiles of queries that use it.
      tiles: Tile sizes, and what happens to logits.
      config: How a program is laid out.
      with_k: Whether to compute `d_k`.
      with_v: Whether to compute `d_v`.
      with_values: Whether to compute the gradients by values.

    Returns:
      `d_k`, `d_v` in the shapes and dtypes of k and v, summed over the query heads of a group; for
      each of `column_values` in f32 its gradient [batch, heads, kv_len]; None for the others, and
      for what was not asked for.
    """
    batches, _, heads, dim = problem.q.shape
    kv_len, kv_heads, v_dim = problem.v.shape[1:]
    block_q, block_kv = tiles.block_q, tiles.block_kv
    wanted = _floats(problem.column_values) if with_values else ()
    sizes = block_kv, block_q, dim, v_dim
    default = default_config(*sizes)
    assert default is not None
    again = functools.partial(
        d_keys, tiles=tiles, with_k=with_k, with_v=with_v, with_values=with_values
    )
    chosen = config or configurations.chosen(
        _key(problem, tiles, {"k": with_k, "v": with_v, "values": bool(wanted)}),
        default,
        refusal=lambda tuned: layout_refusal(tuned, *sizes),
        trial=lambda tuned: configurations.compiles(
            functools.partial(again, config=tuned), problem, offsets, q_indices
        ),
    )
    stages, columns = chosen.stages, min(chosen.columns, block_q)
    consumers, kv_blocks, group = block_kv // ROWS, kv_len // block_kv, heads // kv_heads
    ops, dtype = warpgroup(), problem.q.dtype
    outputs = with_k + with_v
    sums = len(wanted)

    def kernel(q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, offsets_ref, ids_ref, *refs):
        values, refs = _split(refs, problem)
        results, refs = refs[: outputs + sums], refs[outputs + sums :]
        d_refs, d_value_refs = results[:outputs], results[outputs:]
        k_smem, v_smem, q_smem, d_out_smem, sums_smem = refs[:5]
        k_full, v_full, q_full, d_out_full, q_free, d_out_free = refs[5:]
        program, kv_block = divmod_i32(lax.axis_index("program"), kv_blocks)
        batch, kv_head = divmod_i32(program, kv_heads)
        list_batch = batch if ids_ref.shape[0] > 1 else 0
        member = lax.axis_index("warpgroup")

        def list_of(which):
            """The query head, its list, and where this tile's part of that begins and ends."""
            head = kv_head * group + which
            at = list_batch, lax.div(head, jnp.int32(heads // ids_ref.shape[1]))
            return head, at, offsets_ref[*at, kv_block], offsets_ref[*at, kv_block + 1]

        @pl.when(member == consumers)
        def producer():
            plgpu.set_max_registers(chosen.producer_registers, action="decrease")

            def one_head(which, step):
                head, at, first, last = list_of(which)

                def copy(entry, step):
                    block = ids_ref[*at, entry]
                    source = batch, pl.ds(block * block_q, block_q), head
                    for ref, smem, full, free in (
                        (q_ref, q_smem, q_full, q_free),
                        (d_out_ref, d_out_smem, d_out_full, d_out_free),
                    ):
                        ring.fill(ref.at[source], smem, full, free, step, stages)
                    return step + 1

                return lax.fori_loop(first, last, copy, step)

            steps = lax.fori_loop(0, group, one_head, jnp.int32(0))
            ring.drain(steps, stages, (q_free, d_out_free))

        @pl.when(member < consumers)
        def consumer():
            plgpu.set_max_registers(chosen.consumer_registers, action="increase")
            kv_start = kv_block * block_kv + member * ROWS
            here = batch, pl.ds(kv_start, ROWS), kv_head
            for ref, smem, full in ((k_ref, k_smem, k_full), (v_ref, v_smem, v_full)):
                plgpu.copy_gmem_to_smem(ref.at[here], smem.at[member], full.at[member])
            plgpu.barrier_wait(k_full.at[member])
            plgpu.barrier_wait(v_full.at[member])
            shape = ROWS, columns

            def one_head(which, carry):
                d_k, d_v, step = carry  # None for what is not asked for
                head, at, first, last = list_of(which)

                def piece(entry, slot, part, carry):
                    d_k, d_v, d_values = carry
                    part_at = pl.ds(part * columns, columns)
                    q_start = ids_ref[*at, entry] * block_q + part * columns
                    tokens = batch, head, pl.ds(q_start, columns)
                    raw = ops.product_nt(k_smem.at[member], q_smem.at[slot, part_at])
                    place = Place(batch, head, q_start, kv_start, q_axis=1, shape=shape)
                    logits, pullback = _logits(raw, tiles, ops, place, values)
                    lse2 = lax.broadcast_in_dim(ops.load_columns(lse_ref.at[tokens]), shape, (1,))
                    probs = jnp.exp2(logits * LOG2_E - lse2)
                    if part == 0:
                        plgpu.barrier_wait(d_out_full.at[slot])
                    d_out = d_out_smem.at[slot, part_at]
                    if with_v:
                        d_v = ops.add_product(d_v, probs.astype(dtype), d_out)
                    if not (with_k or wanted):
                        return d_k, d_v, d_values
                    # from -delta on, so that no register holds delta beside the product
                    delta = ops.load_columns(delta_ref.at[tokens])
                    delta = lax.broadcast_in_dim(-delta, shape, (1,))
                    d_probs = ops.product_nt(v_smem.at[member], d_out, delta)
                    d_raw, *d_new = pullback(probs * d_probs)
                    if with_k:
                        d_k = ops.add_product(d_k, d_raw.astype(dtype), q_smem.at[slot, part_at])
                    d_values = tuple(
                        a + b.sum(axis=1)
                        for a, b in zip(d_values, d_new[len(d_new) - sums :], strict=True)
                    )
                    return d_k, d_v, d_values

                def tile(entry, carry):
                    *carry, step = carry
                    slot = lax.rem(step, jnp.int32(stages))
                    plgpu.barrier_wait(q_full.at[slot])
                    for part in range(block_q // columns):
                        carry = piece(entry, slot, part, carry)
                    plgpu.barrier_arrive(q_free.at[slot])
                    plgpu.barrier_arrive(d_out_free.at[slot])
                    return *carry, step + 1

                start = d_k, d_v, tuple(ops.rows(ROWS, 0.0) for _ in wanted), step
                d_k, d_v, d_values, step = lax.fori_loop(first, last, tile, start)
                if wanted:
                    for n, d_value in enumerate(d_values):
                        sums_smem[member, n] = d_value
                    plgpu.commit_smem()
                    for n, ref in enumerate(d_value_refs):
                        target = ref.at[batch, head, pl.ds(kv_start, ROWS)]
                        plgpu.copy_smem_to_gmem(sums_smem.at[member, n], target)
                    plgpu.wait_smem_to_gmem(0)
                return d_k, d_v, step

            start = (
                ops.tile((ROWS, dim), 0.0) if with_k else None,
                ops.tile((ROWS, v_dim), 0.0) if with_v else None,
                jnp.int32(0),
            )
            d_k, d_v, _ = lax.fori_loop(0, group, one_head, start)
            sums_of = [(d_k, k_smem)] * with_k + [(d_v, v_smem)] * with_v
            for gradient, smem in sums_of:
                smem[member] = gradient.astype(dtype)
            plgpu.commit_smem()
            for (_, smem), ref in zip(sums_of, d_refs, strict=True):
                plgpu.copy_smem_to_gmem(smem.at[member], ref.at[here])
            plgpu.wait_smem_to_gmem(0)

    kept = [problem.k] * with_k + [problem.v] * with_v
    out_types = [jax.ShapeDtypeStruct(x.shape, dtype) for x in kept]
    out_types += [jax.ShapeDtypeStruct((batches, heads, kv_len), jnp.float32)] * sums
    results = plgpu.kernel(
        kernel,
        out_type=tuple(out_types),
        scratch_types=(
            ring.tiles(dtype, consumers, ROWS, dim),
            ring.tiles(dtype, consumers, ROWS, v_dim),
            ring.tiles(dtype, stages, block_q, dim),
            ring.tiles(dtype, stages, block_q, v_dim),
            plgpu.SMEM((consumers, max(sums, 1), ROWS), jnp.float32),
            *[plgpu.Barrier(num_barriers=consumers)] * 2,
            *[plgpu.Barrier(num_barriers=stages)] * 2,
            *[plgpu.Barrier(num_barriers=stages, num_arrivals=consumers)] * 2,
        ),
        grid=(batches * kv_heads * kv_blocks,),
        grid_names=("program",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=ops.compiler_params,
    )(*problem[:6], offsets, q_indices, *problem.row_values, *problem.column_values)
    results, d_values = list(results[:outputs]), results[outputs:]
    d_k = results.pop(0) if with_k else None
    d_v = results.pop(0) if with_v else None
    return d_k, d_v, _place(d_values, wanted, len(problem.column_values))


def _key(problem: Problem, tiles: Tiles, outputs: dict[str, bool]) -> configurations.Key:
    """What a kernel with these outputs is chosen by."""
    operation = "_".join(f"d_{name}" for name, wanted in outputs.items() if wanted)
    masked = tiles.rule is not None
    dim, v_dim = problem.q.shape[-1], problem.v.shape[-1]
    return configurations.key(
        operation, masked, problem.q.dtype, tiles.block_q, tiles.block_kv, dim, v_dim
    )


class Place(NamedTuple):
    """Where a piece of logits lies, and which of its axes are the queries."""

    batch: jax.Array
    head: jax.Array
    q_start: jax.Array
    kv_start: jax.Array
    q_axis: int
    shape: tuple[int, int]


def _logits(raw, tiles: Tiles, ops, at: Place, values):
    """Logits in natural units, and how a gradient goes back to `raw` and to the f32 values."""
    scale = 1.0 if tiles.scale is None else tiles.scale
    rule, gradient = tiles.rule, tiles.gradient
    if rule is None or gradient is None:
        return raw * scale, lambda d_logits: (d_logits * scale,)
    row_refs, column_refs = values
    q_axis, kv_axis = at.q_axis, 1 - at.q_axis

    where = at.batch, at.head
    arguments = (
        raw if tiles.scale is None else raw * scale,
        ops.iota(at.shape, q_axis) + at.q_start,
        ops.iota(at.shape, kv_axis) + at.kv_start,
        value_readers(row_refs, where, at.q_start, at.shape, q_axis),
        value_readers(column_refs, where, at.kv_start, at.shape, kv_axis),
    )

    def pullback(d_logits):
        # or the compiler would keep what the rule computed until it is needed again
        again = lax.optimization_barrier(arguments[0])
        d_scaled, *d_values = gradient(again, *arguments[1:], d_logits)
        return d_scaled if tiles.scale is None else d_scaled * scale, *d_values

    return rule(*arguments), pullback


def _floats(values: tuple[jax.Array, ...]) -> tuple[int, ...]:
    return tuple(n for n, x in enumerate(values) if jnp.issubdtype(x.dtype, jnp.floating))


def _place(results, wanted, count: int) -> tuple[jax.Array | None, ...]:
    found = dict(zip(wanted, results, strict=True))
    return tuple(found.get(n) for n in range(count))


def _split(refs, problem: Problem):
    rows, columns = len(problem.row_values), len(problem.column_values)
    return (refs[:rows], refs[rows : rows + columns]), refs[rows + columns :]
