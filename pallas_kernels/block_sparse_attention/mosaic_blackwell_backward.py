"""Block-sparse attention, backward, for Blackwell: two kernels, no atomics, nothing saved but lse.

As on Hopper (see `mosaic_backward`), a program owns a tile of queries for `d_q`, and of keys for
`d_k` and `d_v`. Here its one consumer has logits, gradients of probabilities and all sums in tensor
memory: the first two of the next piece are computed while it is at this one in registers, and this
one is added to the sums while it is at the next. Sums have room beside each other, so one pass
gives all gradients.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat
from pallas_kernels.block_sparse_attention.chip import Backward, Gradients, Problem
from pallas_kernels.block_sparse_attention.logits import Place, Tiles
from pallas_kernels.block_sparse_attention.mosaic_backward import (
    Config,
    add_sums,
    floats,
    place,
)
from pallas_kernels.block_sparse_attention.mosaic_blackwell import (
    COLUMNS,
    ROWS,
    TENSOR_MEMORY,
)
from pallas_kernels.block_sparse_attention.walk import (
    RESERVED,
    SHARED_MEMORY,
    Lists,
    Program,
    Side,
    Visit,
    divmod_i32,
    launch,
)
from pallas_kernels.warpgroup import Blackwell

PIECE = (ROWS, COLUMNS)  # tokens that are owned, and tokens that are met
SHAPE = (ROWS, COLUMNS // 2)  # of what is in registers at once


def tensor_memory(widths: Sequence[int]) -> int:
    """Columns of tensor memory that a program asks for whose sums are of these widths."""
    return 2 * COLUMNS + len(widths) * (COLUMNS // 2) + sum(widths)


def shared_memory(dim: int, v_dim: int, config: Config, values: int = 0) -> int:
    """Bytes of shared memory: a program's own tile and the ring of the others, barriers apart."""
    return 2 * (dim + v_dim) * ROWS * (1 + config.stages) + 4 * ROWS * max(values, 1)


def default_config(dim: int, v_dim: int, values: int = 0) -> Config | None:
    """The deepest ring that fits, or None where not even two tiles do."""
    for stages in (3, 2):
        # there are enough for both warpgroups, and the compiler computes much before they part
        config = Config(stages, COLUMNS, producer_registers=168)
        if shared_memory(dim, v_dim, config, values) <= SHARED_MEMORY - RESERVED:
            return config
    return None


def refusal(block_q: int, block_kv: int, dim: int, v_dim: int) -> str | None:
    """Why the backward kernels cannot take what the forward takes, or None if they can."""
    if (block_q, block_kv) != (ROWS, ROWS):
        return f"its gradients take tiles of {ROWS} x {ROWS}, not {block_q} x {block_kv}."
    if tensor_memory((dim, v_dim)) > TENSOR_MEMORY:
        return f"its gradients do not fit in tensor memory with dim {dim} and v_dim {v_dim}."
    if default_config(dim, v_dim) is None:
        return f"its gradients do not fit in shared memory with dim {dim} and v_dim {v_dim}."
    return None


def gradients(problem: Problem, lists: Lists, inverse: Lists, tiles: Tiles) -> Gradients:
    """All gradients.

    Args:
      problem: The arrays.
      lists: For each tile of queries the tiles of keys.
      inverse: For each tile of keys the tiles of queries.
      tiles: Tile sizes, and what happens to logits.
    """
    d_q, d_rows = d_queries(problem, lists, tiles)
    d_k, d_v, d_columns = d_keys(problem, inverse, tiles)
    return Gradients(d_q, d_k, d_v, d_rows, d_columns)


def d_queries(
    problem: Problem, lists: Lists, tiles: Tiles
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    """The gradient by q, and by each f32 value per query.

    Args:
      problem: The arrays, in the shapes of `forward`.
      lists: For each tile of queries the tiles of keys.
      tiles: Tile sizes, and what happens to logits.

    Returns:
      `d_q` in q's shape and dtype; for each of the rule's values per query in f32 its gradient
      [batch, heads, q_len], not yet summed where it is shared; None for the others.
    """
    values = tiles.rule.row_values if tiles.rule else ()
    wanted = floats(values)

    def piece(bound: Tiles, terms: tuple[Any, Any], program: Program):
        lse2, delta = (
            lax.broadcast_in_dim(program.ops.load_rows(x.at[program.numbers]), SHAPE, (0,))
            for x in terms
        )

        def compute(visit, met_start, raw, d_probs, masked):
            at = _place(program, program.head, program.start, met_start, 0)
            probs = jnp.exp2(bound.change(raw, at, masked) * tiles.to_base_2 - lse2)
            d_raw, *d_values = bound.pull_back(raw, at, probs * (d_probs - delta))
            return (d_raw,), d_values[: len(wanted)]

        return compute

    own, met = (problem.q, problem.d_out), (problem.k, problem.v)
    (d_q,), d_values = _launch(problem, own, met, lists, tiles, piece, (tiles.to_raw,), len(wanted))
    return d_q, place(d_values, wanted, len(values))


def d_keys(
    problem: Problem, inverse: Lists, tiles: Tiles
) -> tuple[jax.Array, jax.Array, tuple[jax.Array | None, ...]]:
    """The gradients by k and v, and by each f32 value per key.

    Args:
      problem: The arrays, in the shapes of `forward`.
      inverse: For each tile of keys the tiles of queries.
      tiles: Tile sizes, and what happens to logits.

    Returns:
      `d_k`, `d_v` in the shapes and dtypes of k and v, summed over the query heads of a group; for
      each of the rule's values per key in f32 its gradient [batch, heads, kv_len]; None for the
      others.
    """
    values = tiles.rule.column_values if tiles.rule else ()
    wanted = floats(values)

    def piece(bound: Tiles, terms: tuple[Any, Any], program: Program):
        def compute(visit, met_start, raw, d_probs, masked):
            at = _place(program, visit.head, met_start, program.start, 1)
            numbers = program.batch, visit.head, pl.ds(met_start, SHAPE[1])
            lse2, delta = (
                program.ops.along(program.ops.load_columns(x.at[numbers]), SHAPE, 1) for x in terms
            )
            probs = jnp.exp2(bound.change(raw, at, masked) * tiles.to_base_2 - lse2)
            d_raw, *d_values = bound.pull_back(raw, at, probs * (d_probs - delta))
            return (d_raw, probs), d_values[len(d_values) - len(wanted) :]

        return compute

    own, met = (problem.k, problem.v), (problem.q, problem.d_out)
    factors = tiles.to_raw, 1.0
    (d_k, d_v), d_values = _launch(problem, own, met, inverse, tiles, piece, factors, len(wanted))
    return d_k, d_v, place(d_values, wanted, len(values))


def _place(
    program: Program, head: jax.Array, q_start: jax.Array, kv_start: jax.Array, q_axis: int
) -> Place:
    where = program.batch, head, q_start, kv_start
    return Place(*where, q_axis, SHAPE, program.positions, program.ops)


class _Memory(NamedTuple):
    """Where a program's consumer has what: in tensor memory, and sums of values in shared."""

    logits: Any
    d_probs: Any
    weights: tuple[Any, ...]
    sums: tuple[Any, ...]
    products_done: Any
    sums_done: Any
    values: Any


def _launch(
    problem: Problem,
    own: tuple[jax.Array, jax.Array],
    met: tuple[jax.Array, jax.Array],
    lists: Lists,
    tiles: Tiles,
    piece: Callable[..., Callable[..., tuple[Sequence[jax.Array], Sequence[jax.Array]]]],
    factors: Sequence[float],
    values: int,
) -> tuple[Sequence[jax.Array], Sequence[jax.Array]]:
    """Sums what pieces weigh over the tokens that are met.

    Args:
      problem: The arrays.
      own: Arrays of the side whose tiles are owned; the first is multiplied with the first of
        `met` to logits, the second with the second to gradients of probabilities.
      met: Arrays of the other side.
      lists: Which of its tiles are met.
      tiles: Tile sizes, and what happens to logits.
      piece: Gives, for bound tiles, references to lse and delta, and a program, a function of a
        visit, the first token met, logits, gradients of probabilities and whether to mask. It
        returns weights [owned, met], one for each of the first arrays of `met`, and gradients by
        values.
      factors: What the sums, an array of `own` each, are multiplied by.
      values: How many gradients by values there are.

    Returns:
      The sums in the shapes and dtypes of `own`, and gradients by values [batch, heads, tokens].
    """
    dtype, heads = own[0].dtype, problem.q.shape[2]
    batches, tokens = own[0].shape[:2]
    widths = [x.shape[3] for x in own[: len(factors)]]
    config = default_config(own[0].shape[3], own[1].shape[3], values)
    assert config is not None
    parts, ops = ROWS // COLUMNS, Blackwell

    def consumer(program: Program):
        rings, count, left = program.rings, len(factors), iter(program.scratch)
        memory = _Memory(
            logits=next(left),
            d_probs=next(left),
            weights=tuple(itertools.islice(left, count)),
            sums=tuple(itertools.islice(left, count)),
            products_done=next(left),
            sums_done=next(left),
            values=next(left),
        )
        owned = [program.own(n) for n in range(len(program.tiles))]
        lse_ref, delta_ref, *rule_values = program.inputs
        compute = piece(tiles.bind(rule_values), (lse_ref, delta_ref), program)

        def start_products(step, part):
            @pl.when(part == 0)
            def arrived():
                for ring in rings:
                    ring.wait(step)

            targets = memory.logits, memory.d_probs
            for target, tile, ring in zip(targets, owned, rings, strict=True):
                other = _compat.transpose(ring.piece(step, part, COLUMNS))
                plgpu.tcgen05_mma(target, tile, other, accumulate=False)
            plgpu.tcgen05_commit_arrive(memory.products_done)

        def start_sums(step, part):
            for target, weight, ring in zip(memory.sums, memory.weights, rings, strict=False):
                other = ring.piece(step, part, COLUMNS)
                plgpu.tcgen05_mma(target, weight, other, accumulate=step + part > 0)
            plgpu.tcgen05_commit_arrive(memory.sums_done)

        def end_sums(step, part):
            plgpu.barrier_wait(memory.sums_done)

            @pl.when(part == parts - 1)
            def released():
                for ring in rings:
                    ring.release(step)

        def one_visit(which, steps):
            visit = program.visit(which, steps)
            pieces = visit.in_pieces(parts)
            first, last = pieces.first, pieces.last

            def at(number):
                entry, part = divmod_i32(number, parts)
                return entry, visit.step(entry), part

            def one_piece(number, sums, masked):
                entry, step, part = at(number)
                plgpu.barrier_wait(memory.products_done)
                start = program.met(visit, entry) * ROWS + part * COLUMNS
                found = []
                for here in range(0, COLUMNS, SHAPE[1]):
                    logits, d_probs = (
                        plgpu.async_load_tmem(x.at[:, pl.ds(here, SHAPE[1])], layout=ops.layout)
                        for x in (memory.logits, memory.d_probs)
                    )
                    if here + SHAPE[1] == COLUMNS:
                        plgpu.wait_load_tmem()
                        pl.when(number + 1 < last)(lambda: start_products(*at(number + 1)[1:]))
                    weights, d_values = compute(visit, start + here, logits, d_probs, masked)
                    # half as many registers while others are computed
                    weights = tuple(x.astype(dtype) for x in weights)
                    weights, sums = lax.optimization_barrier((weights, add_sums(sums, d_values)))
                    found.append(weights)
                pl.when(number > first)(lambda: end_sums(*at(number - 1)[1:]))
                for n, weights in enumerate(found):
                    for target, weight in zip(memory.weights, weights, strict=True):
                        half = target.at[:, pl.ds(n * SHAPE[1], SHAPE[1])]
                        plgpu.async_store_tmem(half, weight)
                plgpu.commit_tmem()
                start_sums(step, part)
                return sums

            some = first < last
            pl.when(some)(lambda: start_products(visit.before, jnp.int32(0)))
            sums = pieces.tiles(one_piece, tuple(ops.rows(ROWS, 0.0) for _ in range(values)))
            pl.when(some)(lambda: end_sums(visit.after - 1, jnp.int32(parts - 1)))
            write_values(visit, sums)
            return visit.after

        def write_values(visit: Visit, sums):
            q_head = visit.head if program.visits > 1 else program.head
            batch, _, rows = program.numbers
            pairs = []
            for n, value in enumerate(sums):
                memory.values[n, :] = value
                target = program.results[count + n].at[batch, q_head, rows]
                pairs.append((memory.values.at[n], target))
            if pairs:
                program.write(pairs)

        steps = lax.fori_loop(0, program.visits, one_visit, jnp.int32(0))
        pairs = []
        for found, tile, factor, result in zip(
            memory.sums, owned, factors, program.results, strict=False
        ):
            for at in range(0, tile.shape[1], COLUMNS):
                width = pl.ds(at, COLUMNS)
                value = plgpu.async_load_tmem(found.at[:, width], layout=ops.layout)
                # what no product was written to may hold anything
                value = jnp.where(steps > 0, value * factor, 0.0)
                tile[:, width] = value.astype(dtype)
            pairs.append((tile, result.at[program.tokens]))
        program.write(pairs)

    done = plgpu.Barrier(orders_tensor_core=True)
    results = launch(
        consumer,
        Side(own, ROWS),
        Side(met, ROWS),
        lists,
        inputs=(problem.lse2, problem.delta, *tiles.values),
        results=[
            *(jax.ShapeDtypeStruct(x.shape, dtype) for x in own[: len(factors)]),
            *[jax.ShapeDtypeStruct((batches, heads, tokens), jnp.float32)] * values,
        ],
        scratch=[
            *[plgpu.TMEM(PIECE, jnp.float32)] * 2,
            *[plgpu.TMEM(PIECE, dtype, packed=True)] * len(factors),
            *(plgpu.TMEM((ROWS, width), jnp.float32) for width in widths),
            *(done, done),
            plgpu.SMEM((max(values, 1), ROWS), jnp.float32),
        ],
        config=config,
        ops=ops,
    )
    return results[: len(factors)], results[len(factors) :]


def layouts(tiles: Tiles, dim: int, v_dim: int) -> list[tuple[int, int]]:
    """The stages and bytes of shared memory of programs that own queries, or keys."""
    config = default_config(dim, v_dim)
    return [(config.stages, shared_memory(dim, v_dim, config))] if config else []


BACKWARD = Backward(gradients, refusal, layouts)
