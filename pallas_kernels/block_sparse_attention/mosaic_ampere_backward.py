"""Block-sparse attention, backward, for compute capability 8: no atomics, nothing saved but lse.

As on Hopper (see `mosaic_backward`), a program owns a tile of queries, or a part of one, for `d_q`,
and of keys for `d_k` and `d_v`. It is one warpgroup, whose sums are in registers, and copies the
pieces that its list names while it multiplies those before (see `stream`).
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import configurations, mma, ring, stream
from pallas_kernels.block_sparse_attention.chip import (
    Backward,
    Gradients,
    Problem,
    Tunable,
    choose,
)
from pallas_kernels.block_sparse_attention.logits import Place, Tiles
from pallas_kernels.block_sparse_attention.mosaic_ampere import (
    RESERVED,
    SHARED_MEMORY,
    many_values,
)
from pallas_kernels.block_sparse_attention.mosaic_backward import add_sums, floats, key, place
from pallas_kernels.block_sparse_attention.walk import Lists, Side, Sides, divmod_i32
from pallas_kernels.mma import HEIGHT
from pallas_kernels.ring import LANES
from pallas_kernels.warpgroup import warpgroup


@dataclasses.dataclass(frozen=True)
class Config:
    """How a program is laid out; every legal choice gives the same result up to rounding.

    Attributes:
      rows: Tokens that a program owns, 64 or 128, at most a tile's.
      columns: Tokens multiplied at once, a power of 2 from 16 to 64.
      stages: Pieces of either array that there is room for, at least 2.
      hold: Whether what a program owns stays in registers, or is read again for each piece.
    """

    rows: int = 64
    columns: int = 32
    stages: int = 2
    hold: bool = False


def shared_memory(dim: int, v_dim: int, config: Config) -> int:
    """Bytes of shared memory that a program asks for."""
    return 2 * (dim + v_dim) * (config.rows + config.stages * config.columns)


def default_config(dim: int, v_dim: int) -> Config:
    """What registers and shared memory have room for."""
    return Config(columns=16 if dim + v_dim > 320 else 32)


def layout_refusal(config: Config, own: int, other: int, dim: int, v_dim: int) -> str | None:
    """Why a program cannot be laid out by this configuration, or None if it can."""
    if config.rows not in (64, 128) or config.rows > own:
        return f"rows must be 64 or 128, at most a tile's {own}, not {config.rows}."
    if config.columns not in (16, 32, 64) or config.columns > other:
        return f"columns must be 16, 32 or 64, at most {other}, not {config.columns}."
    if config.stages < 2:
        return f"stages must be at least 2, not {config.stages}."
    needed = shared_memory(dim, v_dim, config)
    if needed > SHARED_MEMORY - RESERVED:
        return f"it asks for {needed} bytes of shared memory, of {SHARED_MEMORY - RESERVED}."
    return None


def candidates(own: int, other: int, dim: int, v_dim: int) -> tuple[Config, ...]:
    """The configurations worth timing, the default first."""
    others = (
        Config(rows, columns, stages, held)
        for rows in sorted({64, own})
        for columns in (64, 32, 16)
        for stages in (2, 3)
        for held in (True, False)
    )
    return configurations.candidates(
        default_config(dim, v_dim),
        others,
        lambda config: layout_refusal(config, own, other, dim, v_dim),
    )


def refusal(block_q: int, block_kv: int, dim: int, v_dim: int) -> str | None:
    """Why the backward kernels cannot take what the forward takes: they can."""
    return None


def gradients(problem: Problem, lists: Lists, inverse: Lists, tiles: Tiles) -> Gradients:
    """All gradients, in as many passes as registers ask for.

    Args:
      problem: The arrays.
      lists: For each tile of queries the tiles of keys.
      inverse: For each tile of keys the tiles of queries.
      tiles: Tile sizes, and what happens to logits.
    """
    d_q, d_rows = d_queries(problem, lists, tiles)
    if _one_pass(tiles, problem.q.shape[3] + problem.v.shape[3]):
        d_k, d_v, d_columns = d_keys(problem, inverse, tiles)
    else:
        d_k, _, d_columns = d_keys(problem, inverse, tiles, with_v=False)
        _, d_v, _ = d_keys(problem, inverse, tiles, with_k=False)
    return Gradients(d_q, d_k, d_v, d_rows, d_columns)


def _one_pass(tiles: Tiles, width: int) -> bool:
    """Whether registers hold the sums of d_k and d_v, `width` wide; found by compiling."""
    return width <= 128 and not many_values(tiles)


def d_queries(
    problem: Problem, lists: Lists, tiles: Tiles, config: Config | None = None
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    """The gradient by q, and by each f32 value per query.

    Args:
      problem: The arrays, in the shapes of `forward`.
      lists: For each tile of queries the tiles of keys.
      tiles: Tile sizes, and what happens to logits.
      config: How a program is laid out.

    Returns:
      `d_q` in q's shape and dtype; for each of the rule's values per query in f32 its gradient
      [batch, heads, q_len], not yet summed where it is shared; None for the others.
    """
    values = tiles.rule.row_values if tiles.rule else ()
    wanted = floats(values)
    own = Side((problem.q, problem.d_out), tiles.block_q)
    met = Side((problem.k, problem.v), tiles.block_kv)
    outputs = {"q": True, "values": bool(wanted)}
    chosen = config or _chosen(problem, own, met, lists, tiles, d_queries, outputs)
    (d_q,), d_values = _sum(problem, own, met, lists, tiles, chosen, (0,), len(wanted))
    return d_q, place(d_values, wanted, len(values))


def d_keys(
    problem: Problem,
    inverse: Lists,
    tiles: Tiles,
    config: Config | None = None,
    *,
    with_k: bool = True,
    with_v: bool = True,
) -> Any:
    """The gradients by k and v, and by each f32 value per key.

    Args:
      problem: The arrays, in the shapes of `forward`.
      inverse: For each tile of keys the tiles of queries.
      tiles: Tile sizes, and what happens to logits.
      config: How a program is laid out.
      with_k: Whether to compute `d_k`, and the gradients by values.
      with_v: Whether to compute `d_v`.

    Returns:
      `d_k`, `d_v` in the shapes and dtypes of k and v, summed over the query heads of a group; for
      each of the rule's values per key in f32 its gradient [batch, heads, kv_len]; None for the
      others, and for what was not asked for.
    """
    values = tiles.rule.column_values if tiles.rule else ()
    wanted = floats(values) if with_k else ()
    own = Side((problem.k, problem.v), tiles.block_kv)
    met = Side((problem.q, problem.d_out), tiles.block_q)
    again = functools.partial(d_keys, with_k=with_k, with_v=with_v)
    outputs = {"k": with_k, "v": with_v, "values": bool(wanted)}
    chosen = config or _chosen(problem, own, met, inverse, tiles, again, outputs)
    sums = (0,) * with_k + (1,) * with_v
    found, d_values = _sum(problem, own, met, inverse, tiles, chosen, sums, len(wanted))
    d_k, d_v = (dict(zip(sums, found, strict=True)).get(n) for n in (0, 1))
    return d_k, d_v, place(d_values, wanted, len(values))


def _chosen(problem, own, met, lists, tiles, kernel, outputs) -> Config:
    sizes = own.block, met.block, problem.q.shape[3], problem.v.shape[3]
    return choose(
        key(problem, tiles, outputs),
        default_config(*sizes[2:]),
        lambda tuned: layout_refusal(tuned, *sizes),
        kernel,
        (problem, lists),
        tiles,
    )


def _sum(
    problem: Problem,
    own: Side,
    met: Side,
    lists: Lists,
    tiles: Tiles,
    chosen: Config,
    wanted: tuple[int, ...],
    values: int,
) -> tuple[Sequence[jax.Array], Sequence[jax.Array]]:
    """Sums over the tokens that are met what they contribute to gradients of those owned.

    Args:
      problem: The arrays.
      own: The side whose tiles are owned; its first array is multiplied with the first of `met` to
        logits, its second with the second to gradients of probabilities.
      met: The other side.
      lists: Which of its tiles are met.
      tiles: Tile sizes, and what happens to logits.
      chosen: How a program is laid out.
      wanted: Which arrays of `own` to give the gradients of: the first, by the gradients of logits
        and the first of `met`, the second, by probabilities and the second of `met`.
      values: Of how many values per token that is owned to give the gradients besides.

    Returns:
      Gradients in the shapes and dtypes of `own`, and by values [batch, heads, tokens].
    """
    dtype, heads = problem.q.dtype, problem.q.shape[2]
    batches, tokens = own.arrays[0].shape[:2]
    widths = [x.shape[3] for x in own.arrays]
    sides, q_axis = Sides(own, met), 0 if own.arrays[0] is problem.q else 1
    rows, columns = min(chosen.rows, own.block), min(chosen.columns, met.block)
    shape, parts, shares = (HEIGHT, columns), met.block // columns, own.block // rows
    heights = range(0, rows, HEIGHT)
    together, with_d_probs, lse_inside = len(wanted) == 2, 0 in wanted, tiles.rule is None
    # an array that a sum reads again comes last, and is there until the next one has come
    arrival = (1, 0) if wanted == (0,) else (0, 1)
    programs = sides.order(lists)
    given = [x for x in lists if x is not None]
    # accumulators of mma are laid out as those of wgmma
    ops = warpgroup()

    def kernel(order_ref, positions_ref, *refs):
        left = iter(refs)

        def take(count):
            return tuple(itertools.islice(left, count))

        own_refs, met_refs, (lse_ref, delta_ref) = take(2), take(2), take(2)
        listed, bound = Lists(*take(len(given))), tiles.bind(take(len(tiles.values)))
        results, value_results = take(len(wanted)), take(values)
        own_tiles, slots, copying = take(1 + with_d_probs), take(2), stream.copies(tuple(left))
        program, share = divmod_i32(lax.axis_index("program"), shares)
        owner = sides.owner(order_ref[program])
        start = owner.block * own.block + share * rows

        def width(array, head):
            return pl.ds(head * widths[array], widths[array])

        def one_head(which, sums):
            visit = sides.visit(listed, owner, which, jnp.int32(0)).in_pieces(parts)
            q_head = visit.head if q_axis else owner.head

            def met_start(piece):
                entry, part = divmod_i32(piece, parts)
                return listed.ids[*visit.row, entry] * met.block + part * columns

            def source(number, step):
                here = pl.ds(met_start(visit.first + step), columns)
                array = arrival[number]
                return met_refs[array].at[owner.batch, here, width(array, visit.head)]

            arriving = stream.Stream(
                copying,
                source,
                tuple(slots[n] for n in arrival),
                visit.last - visit.first,
                together,
            )

            @pl.when(which == 0)
            def first():
                own_rows = [
                    ref.at[owner.batch, pl.ds(start, rows), width(n, owner.head)]
                    for n, ref in enumerate(own_refs)
                ]
                arriving.begin(list(zip(own_rows, own_tiles, strict=False)))

            @pl.when(which > 0)
            def again():
                # no thread reads a tile of the head before any more
                copying.wait(0)
                arriving.begin([])

            operand = mma.Held if chosen.hold else mma.Read
            owned = [[operand(x.at[pl.ds(n, HEIGHT)]) for n in heights] for x in own_tiles]

            def terms(ref, met_tokens):
                """The numbers of a piece's queries, for each height."""
                for n in heights:
                    here = pl.ds(start + n, HEIGHT) if q_axis == 0 else met_tokens
                    load = ops.load_columns if q_axis else ops.load_rows
                    yield ops.along(load(ref.at[owner.batch, q_head, here]), shape, q_axis)

            def piece(number, carry, masked):
                sums, d_values = carry
                step, met_at = visit.step(number), met_start(number)
                met_tokens = pl.ds(met_at, columns)
                pieces = {}

                def products(array):
                    pieces[array] = arriving.wait(arrival.index(array), step)
                    # they start from -lse and -delta, so that no register holds those beside them
                    if array:
                        starts = [-x for x in terms(delta_ref, met_tokens)]
                    elif lse_inside:
                        starts = [x * (-1 / tiles.to_base_2) for x in terms(lse_ref, met_tokens)]
                    else:
                        starts = [ops.tile(shape, 0.0) for _ in heights]
                    return mma.add_nt(starts, owned[array], pieces[array])

                def at(n):
                    starts = (start + n, met_at) if q_axis == 0 else (met_at, start + n)
                    return Place(owner.batch, q_head, *starts, q_axis, shape, positions_ref, ops)

                def probabilities(raws):
                    found = [
                        bound.change(raw, at(n), masked) * tiles.to_base_2
                        for n, raw in zip(heights, raws, strict=True)
                    ]
                    if not lse_inside:
                        lses = terms(lse_ref, met_tokens)
                        found = [x - lse for x, lse in zip(found, lses, strict=True)]
                    return [jnp.exp2(x) for x in found]

                d_probs = products(1) if arrival == (1, 0) else []
                raws = products(0)
                probs = probabilities(raws)
                if together:
                    d_probs = products(1)
                elif not with_d_probs:
                    pieces[1] = arriving.wait(1, step)
                factors = {1: [x.astype(dtype) for x in probs]}
                if with_d_probs:
                    d_raws, d_new = [], []
                    for n, raw, p, d_p in zip(heights, raws, probs, d_probs, strict=True):
                        d_raw, *d_some = bound.pull_back(raw, at(n), p * d_p)
                        d_raws.append(d_raw.astype(dtype))
                        d_new.append(d_some[len(d_some) - values :] if q_axis else d_some[:values])
                    factors[0] = d_raws
                    d_values = [add_sums(a, b) for a, b in zip(d_values, d_new, strict=True)]
                sums = [
                    mma.add(x, factors[n], pieces[n]) for n, x in zip(wanted, sums, strict=True)
                ]
                return sums, d_values

            nothing = tuple(ops.rows(HEIGHT, 0.0) for _ in range(values))
            sums, d_values = visit.tiles(piece, (sums, [nothing for _ in heights]))
            for n, found in zip(heights, d_values, strict=True):
                for ref, value in zip(value_results, found, strict=True):
                    mma.store(ref.at[owner.batch, q_head, pl.ds(start + n, HEIGHT)], value)
            return sums

        def zeros(array):
            return [ops.tile((HEIGHT, LANES), 0.0) for _ in range(0, widths[array], LANES)]

        empty = [[zeros(n) for _ in heights] for n in wanted]
        sums = lax.fori_loop(0, sides.visits, one_head, empty)
        for array, ref, found in zip(wanted, results, sums, strict=True):
            factor = 1.0 if array else tiles.to_raw
            for n, acc in zip(heights, found, strict=True):
                for m, x in enumerate(acc):
                    lanes = pl.ds(owner.head * widths[array] + m * LANES, LANES)
                    target = ref.at[owner.batch, pl.ds(start + n, HEIGHT), lanes]
                    mma.store(target, (x * factor).astype(dtype))

    # heads stand side by side in a row: copies by cp.async are of two axes
    flat = [x.reshape(*x.shape[:2], -1) for x in (*own.arrays, *met.arrays)]
    length = max(side.arrays[0].shape[1] for side in (own, met))
    found = plgpu.kernel(
        kernel,
        out_type=(
            *(jax.ShapeDtypeStruct(flat[n].shape, dtype) for n in wanted),
            *[jax.ShapeDtypeStruct((batches, heads, tokens), jnp.float32)] * values,
        ),
        scratch_types=(
            *(
                plgpu.SMEM((rows, n), dtype, transforms=ring.TRANSFORMS)
                for n in widths[: 1 + with_d_probs]
            ),
            *(ring.tiles(dtype, chosen.stages, columns, n) for n in widths),
            *stream.scratch(2 + 2 * chosen.stages),
        ),
        grid=(programs.size * shares,),
        grid_names=("program",),
        # the stream's waits are all the barriers there need be: registers meet nowhere else
        compiler_params=dataclasses.replace(ops.compiler_params, unsafe_no_auto_barriers=True),
    )(
        programs,
        jnp.arange(length, dtype=jnp.int32),
        *flat,
        problem.lse2,
        problem.delta,
        *given,
        *tiles.values,
    )
    shaped = [x.reshape(own.arrays[n].shape) for n, x in zip(wanted, found, strict=False)]
    return shaped, found[len(wanted) :]


def layouts(tiles: Tiles, dim: int, v_dim: int) -> list[tuple[int, int]]:
    """The stages and bytes of shared memory of programs that own queries, and keys."""
    config = default_config(dim, v_dim)
    return [(config.stages, shared_memory(dim, v_dim, config))]


BACKWARD = Backward(gradients, refusal, layouts, Tunable(d_queries, d_keys, candidates))
