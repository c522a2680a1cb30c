"""What a softmax over cells of tokens leaves in each block of cells, for Hopper.

A cell is `stride` tokens next to each other. The logit of two cells sums the products of their
tokens along the antidiagonal: of all cells one product of [q_cells, stride * dim] and
[stride * dim, kv_cells]. No such operands are made. Their columns come `dim` at a time: one token
of each cell, which is a box of q or k as they are. Sixteen tokens of 128 numbers are more than
shared memory holds for 64 cells, so q streams through a ring as k does, once per tile.

The map is computed once. What a tile leaves are the sums, for each row and run of `group` cells, of
exponentials over the largest logit that the row has met so far, and that logit; a row's last
log-sum-exp turns them into probabilities. That is `1 / group` of the map in f32. Computing the map
a second time instead, as `mosaic` does for tokens, would double what costs most: at 131072 tokens,
stride 16 and dim 128 a head has 1.4e11 operations under a causal mask, at best 139 us of an H200's
tensor cores (989 TFLOP/s), and 17 MB of sums to write and 34 MB to read, at best 11 us of its
memory (4.8 TB/s).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import configurations, ring
from pallas_kernels.block_sparse_attention.logits import Place, Tiles
from pallas_kernels.block_sparse_attention.softmax import Softmax
from pallas_kernels.block_sparse_attention.walk import (
    RESERVED,
    ROWS,
    SHARED_MEMORY,
    Lists,
    Side,
    Sides,
    divmod_i32,
)
from pallas_kernels.ring import LANES, Ring
from pallas_kernels.warpgroup import warpgroup

CELLS = 128  # key cells of a tile
GROUPS = 4, 8, 16  # cells of a sum: a product has 8 columns or more
_TOGETHER = 8  # tokens of a cell whose products are started without a loop


@dataclasses.dataclass(frozen=True)
class Config:
    """How a program is laid out; every legal choice gives the same result.

    Attributes:
      stages: Tokens of a tile's cells in flight, at least 1.
      consumer_registers: Registers per thread of a consumer, a multiple of 8.
      producer_registers: Registers per thread of the producer, a multiple of 8.
    """

    stages: int = 4
    consumer_registers: int = 240
    producer_registers: int = 24
    columns = CELLS


def shared_memory(rows: int, group: int, dim: int, config: Config) -> int:
    """Bytes of shared memory that a program asks for, barriers apart."""
    sums = CELLS // group
    in_flight = config.stages * (rows + CELLS) * _width(dim)
    return 2 * (in_flight + sums * CELLS) + 4 * rows * (sums + 1)


def default_config(rows: int, group: int, dim: int) -> Config:
    """The deepest ring that fits; one of two tokens always does."""
    return next(
        config
        for config in map(Config, (6, 4, 3, 2))
        if shared_memory(rows, group, dim, config) <= SHARED_MEMORY - RESERVED
    )


def layout_refusal(config: Config, rows: int, group: int, dim: int) -> str | None:
    """Why a program cannot be laid out by this configuration, or None if it can."""
    return configurations.layout_refusal(
        config,
        consumers=rows // ROWS,
        rows=CELLS,
        needed=shared_memory(rows, group, dim, config),
        limit=SHARED_MEMORY - RESERVED,
    )


def refusal(dtype: Any, rows: int, group: int) -> str | None:
    """Why it cannot take a problem, or None if it can.

    Args:
      dtype: Of q and k.
      rows: Query cells per tile.
      group: Key cells per sum.
    """
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        return f"its matrix products take bfloat16 or float16, not {jnp.dtype(dtype).name}."
    if rows not in (ROWS, 2 * ROWS):
        return f"it takes tiles of {ROWS} or {2 * ROWS} query cells, not {rows}."
    if group not in GROUPS:
        return f"it sums runs of 4, 8 or 16 key cells, not {group}."
    return None


def cell_masses(
    q: jax.Array,
    k: jax.Array,
    lists: Lists,
    tiles: Tiles,
    *,
    stride: int,
    group: int,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums of exponentials in runs of key cells, what they are relative to, and rows' log-sum-exps.

    Args:
      q: [batch, q_cells * stride, heads, dim], bf16 or f16; q_cells a multiple of a tile's, dim of
        64.
      k: [batch, kv_cells * stride, kv_heads, dim]; kv_cells a multiple of `CELLS`.
      lists: For each tile of query cells the tiles of key cells.
      tiles: Tile sizes in cells, a constant scale, and as `mask` what tells cells that are seen,
        by a number that is not 0.
      stride: Tokens per cell.
      group: Key cells per sum, 4, 8 or 16.
      config: How a program is laid out.

    Returns:
      Sums `[batch, heads, q_cells, kv_cells / group]` of `2 ** (logit - peak)` with logits in base
      2, peaks `[batch, heads, kv_tiles, q_cells]`, both undefined in tiles that are not listed, and
      log-sum-exps `[batch, heads, q_cells]`, natural log, -inf where a row sees nothing; all f32.
    """
    rows = tiles.block_q
    dim = q.shape[3]
    reason = refusal(q.dtype, rows, group)
    if reason:
        raise NotImplementedError("The Mosaic kernel of antidiagonals: " + reason)
    chosen = config or default_config(rows, group, dim)
    reason = layout_refusal(chosen, rows, group, dim)
    if reason:
        raise ValueError(f"config={chosen} is not legal here: {reason}")
    batches, heads, kv_heads = len(q), q.shape[2], k.shape[2]
    q_cells, kv_cells = q.shape[1] // stride, k.shape[1] // stride
    width, sums = _width(dim), CELLS // group
    parts, consumers = dim // width, rows // ROWS

    def side(x: jax.Array, block: int) -> Side:
        """Whose tokens are cells: of its arrays their sizes count."""
        sizes: Any = jax.ShapeDtypeStruct((batches, x.shape[1] // stride, *x.shape[2:]), x.dtype)
        return Side((sizes,), block)

    sides = Sides(side(q, rows), side(k, CELLS))
    # the tokens of a cell next to its heads: of such an array a token of every cell is a box
    q, k = (x.reshape(batches, -1, stride * x.shape[2], dim) for x in (q, k))
    number = jnp.arange(CELLS, dtype=jnp.int32)
    indicator = (number // group == jnp.arange(sums)[:, None]).astype(jnp.bfloat16)
    ops = warpgroup()
    shape = ROWS, CELLS
    given = [x for x in lists if x is not None]
    # what a tile takes of either ring, and how much of that without a loop
    pieces = stride * parts
    unrolled = next(n for n in range(_TOGETHER, 0, -1) if pieces % n == 0)

    def kernel(order_ref, positions_ref, indicator_ref, q_ref, k_ref, *refs):
        bound = Lists(*refs[: len(given)])
        refs = refs[len(given) :]
        value_refs, refs = refs[: len(tiles.values)], refs[len(tiles.values) :]
        sums_ref, peaks_ref, lse_ref, q_slots, k_slots, member_of, *refs = refs
        q_ring, k_ring = Ring(q_slots, *refs[:2]), Ring(k_slots, *refs[2:4])
        arrived, sums_rows, peak_rows = refs[4:]
        owner = sides.owner(order_ref[lax.axis_index("program")])
        visit = sides.visit(bound, owner, jnp.int32(0), jnp.int32(0))
        batch, kv_head, head, block = owner
        member = lax.axis_index("warpgroup")

        @pl.when(member == consumers)
        def producer():
            plgpu.set_max_registers(chosen.producer_registers, action="decrease")

            def copy(entry, step):
                key_cell = bound.ids[*visit.row, entry] * CELLS

                def one(n, step):
                    token, part = divmod_i32(n, parts)
                    columns = pl.ds(part * width, width)
                    mirrored = (stride - 1 - token) * heads + head
                    plain = token * kv_heads + kv_head
                    queries = q_ref.at[batch, pl.ds(block * rows, rows), mirrored, columns]
                    keys = k_ref.at[batch, pl.ds(key_cell, CELLS), plain, columns]
                    q_ring.fill([queries], step)
                    k_ring.fill([keys], step)
                    return step + 1

                return lax.fori_loop(0, pieces, one, step)

            steps = lax.fori_loop(visit.first, visit.last, copy, jnp.int32(0))
            for slots in (q_ring, k_ring):
                slots.drain(steps)

        @pl.when(member < consumers)
        def consume():
            plgpu.set_max_registers(chosen.consumer_registers, action="increase")

            @pl.when(member == 0)
            def load():
                plgpu.copy_gmem_to_smem(indicator_ref, member_of, arrived)

            plgpu.barrier_wait(arrived)
            bound_tiles = tiles.bind(value_refs)
            start = block * rows + member * ROWS
            own_sums, own_peaks = sums_rows.at[member], peak_rows.at[member]

            def products(first, acc):
                def some(product):
                    for n in range(unrolled):
                        step = first + n
                        q_ring.wait(step)
                        k_ring.wait(step)
                        keys = k_ring.piece(step, 0, CELLS)
                        product.add_nt(q_ring.piece(step, member, ROWS), keys)
                        if n:
                            product.wait(running=1)
                            release(step - 1)
                    product.wait(running=0)
                    release(first + unrolled - 1)
                    return ()

                ((acc,), ()) = ops.together(some, (acc,), ())
                return acc

            def release(step):
                q_ring.release(step)
                k_ring.release(step)

            def tile(entry, known):
                first = visit.step(entry) * pieces
                raw = lax.fori_loop(
                    0,
                    pieces // unrolled,
                    lambda n, acc: products(first + n * unrolled, acc),
                    ops.tile(shape, 0.0),
                )
                met_tile = bound.ids[*visit.row, entry]
                if bound_tiles.mask is not None:
                    where = batch, head, start, met_tile * CELLS
                    at = Place(*where, 0, shape, positions_ref, ops)
                    raw = jnp.where(at.apply(bound_tiles.mask, raw) != 0.0, raw, -math.inf)
                known, numerators, _ = Softmax(*known).add(raw, tiles.to_base_2)
                # two 8-bit numbers hold 16 bits of each
                high = numerators.astype(jnp.bfloat16)
                low = (numerators - high.astype(jnp.float32)).astype(jnp.bfloat16)

                def in_runs(product):
                    product.add_nt(high, member_of)
                    product.add_nt(low, member_of)
                    return ()

                ((found,), ()) = ops.together(in_runs, (ops.tile((ROWS, sums), 0.0),), ())
                # what was written last is read by now
                plgpu.wait_smem_to_gmem(0)
                own_sums[...] = found
                own_peaks[...] = known.peak
                plgpu.commit_smem()
                cells = pl.ds(start, ROWS)
                columns = pl.ds(met_tile * sums, sums)
                plgpu.copy_smem_to_gmem(own_sums, sums_ref.at[batch, head, cells, columns])
                plgpu.copy_smem_to_gmem(own_peaks, peaks_ref.at[batch, head, met_tile, cells])
                return tuple(known)

            nothing_met = ops.rows(ROWS, -math.inf), ops.rows(ROWS, 0.0)
            known = lax.fori_loop(visit.first, visit.last, tile, nothing_met)
            plgpu.wait_smem_to_gmem(0)
            own_peaks[...] = Softmax(*known).end()[1]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_peaks, lse_ref.at[batch, head, pl.ds(start, ROWS)])
            plgpu.wait_smem_to_gmem(0)

    programs = sides.order(lists)
    longest = max(q_cells, kv_cells)
    rows_of = batches, heads, q_cells
    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((*rows_of, kv_cells // group), jnp.float32),
            jax.ShapeDtypeStruct((batches, heads, kv_cells // CELLS, q_cells), jnp.float32),
            jax.ShapeDtypeStruct(rows_of, jnp.float32),
        ),
        scratch_types=(
            ring.tiles(q.dtype, chosen.stages, rows, width),
            ring.tiles(k.dtype, chosen.stages, CELLS, width),
            ring.tile(jnp.bfloat16, sums, CELLS),
            *ring.barriers(chosen.stages, consumers),
            *ring.barriers(chosen.stages, consumers),
            plgpu.Barrier(),
            plgpu.SMEM((consumers, ROWS, sums), jnp.float32),
            plgpu.SMEM((consumers, ROWS), jnp.float32),
        ),
        grid=programs.shape,
        grid_names=("program",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=ops.compiler_params,
    )(programs, jnp.arange(longest, dtype=jnp.int32), indicator, q, k, *given, *tiles.values)


def _width(dim: int) -> int:
    """Numbers of a token that are copied at once."""
    return 2 * LANES if dim % (2 * LANES) == 0 else LANES
