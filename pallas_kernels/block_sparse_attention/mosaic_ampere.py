"""Block-sparse attention, forward, for GPUs of compute capability 8: Ampere and Ada.

A program is one warpgroup. It owns a tile of queries or half of one, keeps their softmax in
registers, and copies the pieces of keys and values that its list names while it multiplies those
before (see `stream`).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, mma, ring, stream
from pallas_kernels.block_sparse_attention.chip import Forward
from pallas_kernels.block_sparse_attention.logits import Place, Tiles
from pallas_kernels.block_sparse_attention.softmax import Softmax
from pallas_kernels.block_sparse_attention.walk import Lists, Side, Sides, divmod_i32
from pallas_kernels.mma import HEIGHT
from pallas_kernels.ring import LANES
from pallas_kernels.warpgroup import warpgroup

SHARED_MEMORY = 101_376  # bytes a program may have on the chip with the least, 8.6 or 8.9
PAIRED = SHARED_MEMORY // 2  # what leaves room for a second program on a multiprocessor
RESERVED = 2048  # of which the compiler's scratch for reductions takes a part


@dataclasses.dataclass(frozen=True)
class Config:
    """How a program is laid out; every legal choice gives the same result up to rounding.

    Attributes:
      rows: Queries of a program, 64 or 128, at most a tile's.
      columns: Keys multiplied at once, a power of 2 from 16 to 128, at most a tile's.
      stages: Pieces of keys, and of values, that there is room for, at least 1.
      hold_queries: Whether queries stay in registers, or are read again for each piece of keys.
    """

    rows: int = 64
    columns: int = 64
    stages: int = 1
    hold_queries: bool = True


def shared_memory(block_q: int, block_kv: int, dim: int, v_dim: int, config: Config) -> int:
    """Bytes of shared memory that a program asks for."""
    return 2 * (config.rows * dim + config.stages * config.columns * (dim + v_dim))


def many_values(tiles: Tiles) -> bool:
    """Whether values per query and per key, and what a rule computes from them, fill registers."""
    return len(tiles.values) > 2 or bool(tiles.rule and tiles.rule.column_values)


def default_config(tiles: Tiles, dim: int, v_dim: int) -> Config:
    """Two programs on a multiprocessor where that can be, and then the deepest ring they leave.

    Args:
      tiles: Tile sizes, and what happens to logits.
      dim: Width of q and k, a multiple of 64.
      v_dim: Width of v, a multiple of 64.
    """
    # what is read of keys and values serves twice the rows, where registers suffice for them
    if tiles.block_q == 128 and max(dim, v_dim) == 64 and not tiles.rule:
        return Config(rows=128, hold_queries=False)
    full = many_values(tiles)
    base = Config(
        columns=32 if dim + v_dim > 320 or full else 64,
        hold_queries=max(dim, v_dim) <= 128 and not full,
    )
    deeper = dataclasses.replace(base, stages=2)
    needed = shared_memory(tiles.block_q, tiles.block_kv, dim, v_dim, deeper)
    return deeper if needed <= PAIRED - RESERVED else base


def limit(block_q: int, block_kv: int, dim: int, v_dim: int) -> str | None:
    """Why this jax has no products for the chip, or None if it has."""
    if _compat.HAS_MMA:
        return None
    return f"its matrix products need jax 0.11 or newer; this is {jax.__version__}."


def layout_refusal(config: Config, block_q: int, block_kv: int, dim: int, v_dim: int) -> str | None:
    """Why a program cannot be laid out by this configuration, or None if it can."""
    if config.rows not in (64, 128) or config.rows > block_q:
        return f"rows must be 64 or 128, at most a tile's {block_q}, not {config.rows}."
    if config.columns not in (16, 32, 64, 128) or config.columns > block_kv:
        return f"columns must be 16, 32, 64 or 128, at most {block_kv}, not {config.columns}."
    if config.stages < 1:
        return f"stages must be at least 1, not {config.stages}."
    needed = shared_memory(block_q, block_kv, dim, v_dim, config)
    if needed > SHARED_MEMORY - RESERVED:
        return f"it asks for {needed} bytes of shared memory, of {SHARED_MEMORY - RESERVED}."
    return None


def others(block_q: int, block_kv: int) -> Iterator[Config]:
    """Configurations that may be worth timing, where they are legal."""
    return (
        Config(rows, columns, stages, held)
        for rows in sorted({64, block_q})
        for columns in (64, 32)
        for stages in (2, 1, 3)
        for held in (True, False)
    )


def _compute(
    q: jax.Array, k: jax.Array, v: jax.Array, lists: Lists, tiles: Tiles, chosen: Config
) -> tuple[jax.Array, jax.Array]:
    batches, q_len, heads, dim = q.shape
    v_dim, dtype = v.shape[3], q.dtype
    block_q, block_kv = tiles.block_q, tiles.block_kv
    rows, columns = min(chosen.rows, block_q), min(chosen.columns, block_kv)
    shape, parts, shares = (HEIGHT, columns), block_kv // columns, block_q // rows
    heights = range(0, rows, HEIGHT)
    sides = Sides(Side((q,), block_q), Side((k, v), block_kv))
    programs = sides.order(lists)
    given = [x for x in lists if x is not None]
    # accumulators of mma are laid out as those of wgmma
    ops = warpgroup()

    def kernel(order_ref, positions_ref, q_ref, k_ref, v_ref, *refs):
        left = iter(refs)
        listed = Lists(*itertools.islice(left, len(given)))
        bound = tiles.bind(tuple(itertools.islice(left, len(tiles.values))))
        out_ref, lse_ref, q_tile, k_slots, v_slots, *copying = left
        program, share = divmod_i32(lax.axis_index("program"), shares)
        owner = sides.owner(order_ref[program])
        visit = sides.visit(listed, owner, jnp.int32(0), jnp.int32(0))
        start = owner.block * block_q + share * rows

        def met(entry, part):
            return listed.ids[*visit.row, entry] * block_kv + part * columns

        def source(array, step):
            entry, part = divmod_i32(step, parts)
            tokens = pl.ds(met(visit.first + entry, part), columns)
            ref, width = ((k_ref, dim), (v_ref, v_dim))[array]
            return ref.at[owner.batch, tokens, pl.ds(visit.head * width, width)]

        arriving = stream.Stream(
            stream.copies(copying),
            source,
            (k_slots, v_slots),
            (visit.last - visit.first) * parts,
        )
        own = q_ref.at[owner.batch, pl.ds(start, rows), pl.ds(owner.head * dim, dim)]
        arriving.begin([(own, q_tile)])
        operand = mma.Held if chosen.hold_queries else mma.Read
        queries = [operand(q_tile.at[pl.ds(n, HEIGHT)]) for n in heights]

        def tile(entry, carry, masked):
            for part in range(parts):
                step = visit.step(entry) * parts + part
                carry = piece(step, met(entry, part), carry, masked)
            return carry

        def piece(step, kv_start, carry, masked):
            accs, before = carry
            zeros = [ops.tile(shape, 0.0) for _ in heights]
            products = mma.add_nt(zeros, queries, arriving.wait(0, step))
            decayed, after, numerators = [], [], []
            for n, raw, acc, softmax in zip(heights, products, accs, before, strict=True):
                place = owner.batch, owner.head, start + n, kv_start
                at = Place(*place, 0, shape, positions_ref, ops)
                logits = bound.change(raw, at, masked)
                softmax, probs, decay = softmax.add(logits, tiles.to_base_2)
                decayed.append([x * lax.broadcast_in_dim(decay, x.shape, (0,)) for x in acc])
                after.append(softmax)
                numerators.append(probs.astype(dtype))
            return mma.add(decayed, numerators, arriving.wait(1, step)), after

        nothing = Softmax(ops.rows(HEIGHT, -math.inf), ops.rows(HEIGHT, 0.0))
        zeros = [ops.tile((HEIGHT, LANES), 0.0) for _ in range(0, v_dim, LANES)]
        accs, softmaxes = visit.tiles(tile, ([zeros for _ in heights], [nothing for _ in heights]))
        for n, acc, softmax in zip(heights, accs, softmaxes, strict=True):
            inverse, lse = softmax.end()
            tokens = pl.ds(start + n, HEIGHT)
            mma.store(lse_ref.at[owner.batch, owner.head, tokens], lse)
            for m, x in enumerate(acc):
                out = x * lax.broadcast_in_dim(inverse, x.shape, (0,))
                width = pl.ds(owner.head * v_dim + m * LANES, LANES)
                mma.store(out_ref.at[owner.batch, tokens, width], out.astype(dtype))

    # heads stand side by side in a row: copies by cp.async are of two axes
    flat = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
    positions = jnp.arange(max(q_len, k.shape[1]), dtype=jnp.int32)
    out, lse = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((batches, q_len, heads * v_dim), dtype),
            jax.ShapeDtypeStruct((batches, heads, q_len), jnp.float32),
        ),
        scratch_types=(
            plgpu.SMEM((rows, dim), dtype, transforms=ring.TRANSFORMS),
            ring.tiles(dtype, chosen.stages, columns, dim),
            ring.tiles(dtype, chosen.stages, columns, v_dim),
            *stream.scratch(1 + 2 * chosen.stages),
        ),
        grid=(programs.size * shares,),
        grid_names=("program",),
        # the stream's waits are all the barriers there need be: registers meet nowhere else
        compiler_params=dataclasses.replace(ops.compiler_params, unsafe_no_auto_barriers=True),
    )(programs, positions, *flat, *given, *tiles.values)
    return out.reshape(batches, q_len, heads, v_dim), lse


FORWARD = Forward(_compute, (64, 128), limit, default_config, others, layout_refusal, shared_memory)
