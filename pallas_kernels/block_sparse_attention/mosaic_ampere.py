"""Block-sparse attention, forward, for GPUs of compute capability 8: Ampere, and Ada.

A program is one warpgroup. It owns a tile of queries, or a part of one, keeps their softmax in
registers, and copies the pieces of keys and values that its list names while it multiplies those
before (see `stream`).
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, configurations, mma, ring, stream
from pallas_kernels.block_sparse_attention.logits import Place, Tiles
from pallas_kernels.block_sparse_attention.softmax import Softmax
from pallas_kernels.block_sparse_attention.walk import Lists, Side, Sides, divmod_i32
from pallas_kernels.warpgroup import warpgroup


@dataclasses.dataclass(frozen=True)
class Config:
    """How a program is laid out; every legal choice gives the same result up to rounding.

    Attributes:
      rows: Queries of a program, 64 or 128, at most a tile's.
      columns: Keys multiplied at once, 16 to 128, a divisor of a tile's.
      stages: Pieces of keys, and of values, that there is room for, at least 1.
      hold_queries: Whether queries stay in registers, or are read anew for each piece of keys.
    """

    rows: int = 64
    columns: int = 64
    stages: int = 1
    hold_queries: bool = True


def forward(q, k, v, lists, tiles, *, config):
    batches, q_len, heads, dim = q.shape
    v_dim, dtype = v.shape[3], q.dtype
    block_q, block_kv = tiles.block_q, tiles.block_kv
    rows, columns = min(config.rows, block_q), min(config.columns, block_kv)
    shape, parts, shares = (rows, columns), block_kv // columns, block_q // rows
    sides = Sides(Side((q,), block_q), Side((k, v), block_kv))
    given = [x for x in lists if x is not None]
    programs = sides.order(lists)
    ops = warpgroup()
    scratch = stream.scratch(1 + 2 * config.stages)

    def kernel(order_ref, positions_ref, q_ref, k_ref, v_ref, *refs):
        left = iter(refs)
        bound_lists = Lists(*itertools.islice(left, len(given)))
        bound = tiles.bind(tuple(itertools.islice(left, len(tiles.values))))
        out_ref, lse_ref, q_tile, k_slots, v_slots, *copying = left
        program, share = divmod_i32(lax.axis_index("program"), shares)
        owner = sides.owner(order_ref[program])
        visit = sides.visit(bound_lists, owner, jnp.int32(0), jnp.int32(0))
        start = owner.block * block_q + share * rows

        def met(entry):
            return bound_lists.ids[*visit.row, entry] * block_kv

        def source(array, step):
            entry, part = divmod_i32(step, parts)
            tokens = pl.ds(met(visit.first + entry) + part * columns, columns)
            ref, width = ((k_ref, dim), (v_ref, v_dim))[array]
            return ref.at[owner.batch, tokens, pl.ds(visit.head * width, width)]

        pieces = stream.Stream(
            stream.copies(copying),
            source,
            (k_slots, v_slots),
            (visit.last - visit.first) * parts,
        )
        tokens = owner.batch, pl.ds(start, rows)
        pieces.begin([(q_ref.at[*tokens, pl.ds(owner.head * dim, dim)], q_tile)])
        held = mma.left(q_tile) if config.hold_queries else None

        def tile(entry, carry, masked):
            for part in range(parts):
                step = visit.step(entry) * parts + part
                carry = piece(step, met(entry) + part * columns, carry, masked)
            return carry

        def piece(step, kv_start, carry, masked):
            acc, softmax = carry
            queries = held or mma.left(q_tile)
            raw = mma.add_nt(ops.tile(shape, 0.0), queries, pieces.wait(0, step))
            at = Place(owner.batch, owner.head, start, kv_start, 0, shape, positions_ref)
            logits = bound.change(raw, at, masked)
            softmax, probs, decay = softmax.add(logits, tiles.to_base_2)
            acc = acc * lax.broadcast_in_dim(decay, acc.shape, (0,))
            return mma.add(acc, probs.astype(dtype), pieces.wait(1, step)), softmax

        nothing = Softmax(ops.rows(rows, -math.inf), ops.rows(rows, 0.0))
        acc, softmax = visit.tiles(tile, (ops.tile((rows, v_dim), 0.0), nothing))
        share_of, lse = softmax.end()
        out = acc * lax.broadcast_in_dim(share_of, acc.shape, (0,))
        mma.store(out_ref.at[*tokens, pl.ds(owner.head * v_dim, v_dim)], out.astype(dtype))
        mma.store(lse_ref.at[owner.batch, owner.head, pl.ds(start, rows)], lse)

    positions = jnp.arange(max(q_len, k.shape[1]), dtype=jnp.int32)
    flat = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
    out, lse = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((batches, q_len, heads * v_dim), dtype),
            jax.ShapeDtypeStruct((batches, heads, q_len), jnp.float32),
        ),
        scratch_types=(
            plgpu.SMEM((rows, dim), dtype, transforms=ring.TRANSFORMS),
            ring.tiles(dtype, config.stages, columns, dim),
            ring.tiles(dtype, config.stages, columns, v_dim),
            *scratch,
        ),
        grid=(programs.size * shares,),
        grid_names=("program",),
        compiler_params=dataclasses.replace(ops.compiler_params, unsafe_no_auto_barriers=True),
    )(programs, positions, *flat, *given, *tiles.values)
    return out.reshape(batches, q_len, heads, v_dim), lse
