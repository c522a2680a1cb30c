"""Block-sparse attention, backward, for Hopper: two kernels, no atomics, nothing saved but the lse.

`d_q` walks the list of each tile of queries, as the forward does. `d_k` and `d_v` walk the inverse
list of each tile of keys, one query head of the group after the other, with the products transposed
so that keys are the rows of a warpgroup. Each number has one writer, so reruns are equal bit by
bit.
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

from pallas_kernels import configurations
from pallas_kernels.block_sparse_attention import strips
from pallas_kernels.block_sparse_attention.chip import (
    Backward,
    Gradients,
    Problem,
    Tunable,
    choose,
)
from pallas_kernels.block_sparse_attention.logits import Place, Tiles
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


def shared_memory(own: int, other: int, dim: int, v_dim: int, config: Config) -> int:
    """Bytes of shared memory: a program's own tile and the ring of the others, barriers apart."""
    own, other = max(own, ROWS), max(other, ROWS)
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
        consumers=max(own // ROWS, 1),
        rows=max(other, ROWS),
        needed=shared_memory(own, other, dim, v_dim, config),
        limit=SHARED_MEMORY - RESERVED,
    )


def candidates(own: int, other: int, dim: int, v_dim: int) -> tuple[Config, ...]:
    """The configurations worth timing, the default first; none where nothing fits."""
    others = (
        Config(stages, columns, consumer, producer)
        for stages in (3, 2, 1)
        for columns in sorted({64, max(other, ROWS)})
        for consumer, producer in ((240, 24), (232, 40))
    )
    return configurations.candidates(
        default_config(own, other, dim, v_dim),
        others,
        lambda config: layout_refusal(config, own, other, dim, v_dim),
    )


def refusal(block_q: int, block_kv: int, dim: int, v_dim: int) -> str | None:
    """Why the backward kernels cannot take what the forward takes, or None if they can."""
    if dim + v_dim > 256:
        return f"its gradients take dim + v_dim up to 256, not {dim} + {v_dim}."
    fits = default_config(block_q, block_kv, dim, v_dim)
    if fits is None or default_config(block_kv, block_q, dim, v_dim) is None:
        return "the tiles of its gradients do not fit in shared memory; take smaller ones."
    return None


def gradients(problem: Problem, lists: Lists, inverse: Lists, tiles: Tiles) -> Gradients:
    """All gradients, in as many passes as registers ask for.

    Args:
      problem: The arrays.
      lists: For each tile of queries the tiles of keys.
      inverse: For each tile of keys the tiles of queries.
      tiles: Tile sizes, and what happens to logits.
    """
    rule = tiles.rule
    d_q, _ = d_queries(problem, lists, tiles, with_values=False)
    if _one_pass(tiles, problem.q.shape[3] + problem.v.shape[3]):
        d_k, d_v, _ = d_keys(problem, inverse, tiles)
        return Gradients(d_q, d_k, d_v, (), ())
    # these want registers of their own: one accumulator at a time, logits computed anew
    d_k, _, _ = d_keys(problem, inverse, tiles, with_v=False, with_values=False)
    _, d_v, _ = d_keys(problem, inverse, tiles, with_k=False, with_values=False)
    if rule is None:
        return Gradients(d_q, d_k, d_v, (), ())
    d_rows: tuple[jax.Array | None, ...] = (None,) * len(rule.row_values)
    d_columns: tuple[jax.Array | None, ...] = (None,) * len(rule.column_values)
    if floats(rule.row_values):
        _, d_rows = d_queries(problem, lists, tiles, with_q=False)
    if floats(rule.column_values):
        _, _, d_columns = d_keys(problem, inverse, tiles, with_k=False, with_v=False)
    return Gradients(d_q, d_k, d_v, d_rows, d_columns)


def _one_pass(tiles: Tiles, width: int) -> bool:
    """Whether registers hold the sums of d_k and d_v, `width` wide, beside what changes logits.

    Found by compiling: a mask that reads values per token beside accumulators of 256 columns
    spills, and so does any mask in a program with one consumer.
    """
    mask = tiles.mask
    if tiles.rule is not None:
        return False
    return mask is None or width <= 128 or (tiles.block_kv > ROWS and not mask.values)


def d_queries(
    problem: Problem,
    lists: Lists,
    tiles: Tiles,
    config: Config | None = None,
    *,
    with_q: bool = True,
    with_values: bool = True,
) -> Any:
    """The gradient by q, and by each f32 value per query.

    Args:
      problem: The arrays, in the shapes of `forward`.
      lists: For each tile of queries the tiles of keys.
      tiles: Tile sizes, and what happens to logits.
      config: How a program is laid out.
      with_q: Whether to compute `d_q`.
      with_values: Whether to compute the gradients by values.

    Returns:
      `d_q` in q's shape and dtype; for each of the rule's values per query in f32 its gradient
      [batch, heads, q_len], not yet summed where it is shared; None for the others, and for what
      was not asked for.
    """
    batches, q_len, heads, dim = problem.q.shape
    dtype = problem.q.dtype
    own, met = (
        Side((problem.q, problem.d_out), tiles.block_q),
        Side((problem.k, problem.v), tiles.block_kv),
    )
    row_values = tiles.rule.row_values if tiles.rule else ()
    wanted = floats(row_values) if with_values else ()
    sizes = own.block, met.block, dim, problem.v.shape[3]
    default = default_config(*sizes)
    assert default is not None
    chosen = config or choose(
        key(problem, tiles, {"q": with_q, "values": bool(wanted)}),
        _spare(default) if tiles.rule else default,
        lambda tuned: layout_refusal(tuned, *sizes),
        functools.partial(d_queries, with_q=with_q, with_values=with_values),
        (problem, lists),
        tiles,
    )
    columns = min(chosen.columns, met.tile)
    shape, parts = (ROWS, columns), met.tile // columns
    sums = len(wanted)
    numbers = problem.lse2, problem.delta
    lists, tiles, positions, numbers = strips.by_query(lists, tiles, own, met, numbers)
    ops = warpgroup()

    def consumer(program: Program):
        k_ring, v_ring = program.rings
        lse_ref, delta_ref, *values = program.inputs
        bound, visit = tiles.bind(values), program.visit(jnp.int32(0), jnp.int32(0))
        tokens = program.batch, program.head, pl.ds(program.start, ROWS)
        lse2, delta = (
            lax.broadcast_in_dim(ops.load_rows(ref.at[tokens]), shape, (0,))
            for ref in (lse_ref, delta_ref)
        )

        def tile(entry, carry, masked):
            step = visit.step(entry)
            k_ring.wait(step)
            v_ring.wait(step)
            for part in range(parts):
                carry = piece(entry, step, part, carry, masked)
            v_ring.release(step)
            k_ring.release(step)
            return carry

        def piece(entry, step, part, carry, masked):
            d_q, d_values = carry
            k_piece, v_piece = (x.piece(step, part, columns) for x in (k_ring, v_ring))
            kv_start = program.first(visit, entry) + part * columns
            at = Place(
                program.batch,
                program.head,
                program.start,
                kv_start,
                0,
                shape,
                program.positions,
                ops,
                program.listed(visit),
            )

            def products(raw, d_probs, *rest):
                raw.add_nt(program.own(0), k_piece)
                d_probs.add_nt(program.own(1), v_piece)
                found = raw.read(running=1)
                probs = jnp.exp2(bound.change(found, at, masked) * tiles.to_base_2 - lse2)
                d_logits = probs * (d_probs.read() - delta)
                d_raw, *d_new = bound.pull_back(found, at, d_logits)
                if with_q:
                    rest[0].add(d_raw.astype(dtype), k_piece)
                return add_sums(rest[with_q:], d_new[:sums])

            zero = ops.tile(shape, 0.0)
            (_, _, *d_q), d_values = ops.together(products, (zero, zero, *d_q), d_values)
            return tuple(d_q), d_values

        start = (ops.tile((ROWS, dim), 0.0),) * with_q, _no_sums(ops, sums)
        d_q, d_values = visit.tiles(tile, start)
        pairs = []
        if with_q:
            q_tile = program.own(0)
            q_tile[...] = (d_q[0] * tiles.to_raw).astype(dtype)
            pairs.append((program.stored(q_tile), program.results[0].at[program.tokens]))
        pairs += _sums_to_write(program, d_values, program.head)
        program.write(pairs)

    out_types = [jax.ShapeDtypeStruct(problem.q.shape, dtype)] * with_q
    out_types += [jax.ShapeDtypeStruct((batches, heads, q_len), jnp.float32)] * sums
    results = launch(
        consumer,
        own,
        met,
        lists,
        inputs=(*numbers, *tiles.values),
        results=out_types,
        scratch=[plgpu.SMEM((own.tile // ROWS, max(sums, 1), ROWS), jnp.float32)],
        config=chosen,
        ops=ops,
        positions=positions,
    )
    d_q = results[0] if with_q else None
    return d_q, place(results[with_q:], wanted, len(row_values))


def d_keys(
    problem: Problem,
    inverse: Lists,
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
      inverse: For each tile of keys the tiles of queries.
      tiles: Tile sizes, and what happens to logits.
      config: How a program is laid out.
      with_k: Whether to compute `d_k`.
      with_v: Whether to compute `d_v`.
      with_values: Whether to compute the gradients by values.

    Returns:
      `d_k`, `d_v` in the shapes and dtypes of k and v, summed over the query heads of a group; for
      each of the rule's values per key in f32 its gradient [batch, heads, kv_len]; None for the
      others, and for what was not asked for.
    """
    batches, kv_len, _, v_dim = problem.v.shape
    heads, dim = problem.q.shape[2:]
    dtype = problem.q.dtype
    own, met = (
        Side((problem.k, problem.v), tiles.block_kv),
        Side((problem.q, problem.d_out), tiles.block_q),
    )
    column_values = tiles.rule.column_values if tiles.rule else ()
    wanted = floats(column_values) if with_values else ()
    sizes = own.block, met.block, dim, v_dim
    default = default_config(*sizes)
    assert default is not None
    chosen = config or choose(
        key(problem, tiles, {"k": with_k, "v": with_v, "values": bool(wanted)}),
        default if with_k and with_v else _spare(default),
        lambda tuned: layout_refusal(tuned, *sizes),
        functools.partial(d_keys, with_k=with_k, with_v=with_v, with_values=with_values),
        (problem, inverse),
        tiles,
    )
    columns = min(chosen.columns, met.tile)
    shape, parts = (ROWS, columns), met.tile // columns
    sums = len(wanted)
    with_d_probs, lse_inside = with_k or bool(wanted), tiles.rule is None
    ops = warpgroup()
    numbers = problem.lse2, problem.delta
    inverse, tiles, positions, numbers = strips.by_key(inverse, tiles, own, met, *numbers)

    def consumer(program: Program):
        q_ring, d_out_ring = program.rings
        lse_ref, delta_ref, *values = program.inputs
        bound = tiles.bind(values)

        def one_head(which, carry):
            d_k, d_v, steps = carry  # of one array each, of none where it is not asked for
            visit = program.visit(which, steps)

            def tile(entry, carry, masked):
                step = visit.step(entry)
                q_ring.wait(step)
                for part in range(parts):
                    carry = piece(entry, step, part, carry, masked)
                q_ring.release(step)
                d_out_ring.release(step)
                return carry

            def piece(entry, step, part, carry, masked):
                d_k, d_v, d_values = carry
                q_piece, d_out_piece = (x.piece(step, part, columns) for x in (q_ring, d_out_ring))
                q_start = program.first(visit, entry) + part * columns
                at = Place(
                    program.batch,
                    visit.head,
                    q_start,
                    program.start,
                    1,
                    shape,
                    program.positions,
                    ops,
                    program.listed(visit),
                )
                numbers = program.batch, visit.head, pl.ds(q_start, columns)

                def per_query(ref):
                    return lax.broadcast_in_dim(ops.load_columns(ref.at[numbers]), shape, (1,))

                # products start from -lse and -delta, so that no register holds those beside them
                nothing = ops.tile(shape, 0.0)
                raw = per_query(lse_ref) * (-1 / tiles.to_base_2) if lse_inside else nothing
                raw = product_nt(raw, program.own(0), q_piece)
                logits = bound.change(raw, at, masked) * tiles.to_base_2
                # what a mask reads takes registers that the next products want
                logits = lax.optimization_barrier(logits)
                if part == 0:
                    d_out_ring.wait(step)

                def products(*rest):
                    d_probs, d_k, d_v, sums_before = _grouped(rest, with_d_probs, with_k, with_v)
                    for product in d_probs:
                        product.add_nt(program.own(1), d_out_piece)
                    probs = jnp.exp2(logits if lse_inside else logits - per_query(lse_ref))
                    d_raw, d_new = [], []
                    for product in d_probs:
                        back, *d_new = bound.pull_back(raw, at, probs * product.read())
                        d_raw.append(back)
                    # all of them before the first is multiplied, or products wait for each other
                    factors = [x.astype(dtype) for x in (*d_raw[:with_k], *[probs] * with_v)]
                    factors = lax.optimization_barrier(factors)
                    for product, factor, piece in zip(
                        (*d_k, *d_v), factors, (q_piece, d_out_piece)[not with_k :], strict=False
                    ):
                        product.add(factor, piece)
                    return add_sums(sums_before, d_new[len(d_new) - sums :])

                d_probs = [-per_query(delta_ref)] * with_d_probs
                found, d_values = ops.together(products, (*d_probs, *d_k, *d_v), d_values)
                d_k, d_v = _grouped(found[with_d_probs:], with_k)
                return d_k, d_v, d_values

            d_k, d_v, d_values = visit.tiles(tile, (d_k, d_v, _no_sums(ops, sums)))
            if wanted:
                program.write(_sums_to_write(program, d_values, visit.head))
            return d_k, d_v, visit.after

        start = (
            (ops.tile((ROWS, dim), 0.0),) * with_k,
            (ops.tile((ROWS, v_dim), 0.0),) * with_v,
            jnp.int32(0),
        )
        d_k, d_v, _ = lax.fori_loop(0, program.visits, one_head, start)
        d_k = [x * tiles.to_raw for x in d_k]
        own = [program.own(0)] * with_k + [program.own(1)] * with_v
        pairs = []
        for value, tile, result in zip((*d_k, *d_v), own, program.results, strict=False):
            tile[...] = value.astype(dtype)
            pairs.append((program.stored(tile), result.at[program.tokens]))
        program.write(pairs)

    kept = [problem.k] * with_k + [problem.v] * with_v
    out_types = [jax.ShapeDtypeStruct(x.shape, dtype) for x in kept]
    out_types += [jax.ShapeDtypeStruct((batches, heads, kv_len), jnp.float32)] * sums
    results = launch(
        consumer,
        own,
        met,
        inverse,
        inputs=(*numbers, *tiles.values),
        results=out_types,
        scratch=[plgpu.SMEM((own.tile // ROWS, max(sums, 1), ROWS), jnp.float32)],
        config=chosen,
        ops=ops,
        positions=positions,
    )
    results, d_values = list(results[: len(kept)]), results[len(kept) :]
    d_k = results.pop(0) if with_k else None
    d_v = results.pop(0) if with_v else None
    return d_k, d_v, place(d_values, wanted, len(column_values))


def key(problem: Problem, tiles: Tiles, outputs: dict[str, bool]) -> configurations.Key:
    """What a kernel with these outputs is chosen by."""
    operation = "_".join(f"d_{name}" for name, wanted in outputs.items() if wanted)
    dim, v_dim = problem.q.shape[-1], problem.v.shape[-1]
    return configurations.key(
        operation, tiles.changes, problem.q.dtype, tiles.block_q, tiles.block_kv, dim, v_dim
    )


def _spare(config: Config) -> Config:
    """The same where consumers with one accumulator leave registers to the producer."""
    return dataclasses.replace(config, consumer_registers=232, producer_registers=40)


def _grouped(found: Sequence[Any], *counts: int) -> list[tuple[Any, ...]]:
    """Splits a sequence into groups of these sizes, and what is left."""
    left = iter(found)
    return [*(tuple(itertools.islice(left, n)) for n in counts), tuple(left)]


def _no_sums(ops, count: int) -> tuple[jax.Array, ...]:
    return tuple(ops.rows(ROWS, 0.0) for _ in range(count))


def add_sums(sums: tuple[jax.Array, ...], tiles: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Sums per row, with those of further tiles."""
    return tuple(a + b.sum(axis=1) for a, b in zip(sums, tiles, strict=True))


def _sums_to_write(program: Program, sums: Sequence[jax.Array], q_head: jax.Array):
    """Brings sums per row to shared memory, and says where they go: to the last results."""
    (smem,) = program.scratch
    targets = program.results[len(program.results) - len(sums) :]
    batch, _, rows = program.numbers
    pairs = []
    for n, (value, target) in enumerate(zip(sums, targets, strict=True)):
        smem[program.member, n] = value
        source = program.stored(smem.at[program.member, n])
        pairs.append((source, target.at[batch, q_head, rows]))
    return pairs


def floats(values: tuple[jax.Array, ...]) -> tuple[int, ...]:
    """Which values have a gradient."""
    return tuple(n for n, x in enumerate(values) if jnp.issubdtype(x.dtype, jnp.floating))


def place(results, wanted, count: int) -> tuple[jax.Array | None, ...]:
    """Gradients in the places of the values that have one, None in the others."""
    found = dict(zip(wanted, results, strict=True))
    return tuple(found.get(n) for n in range(count))


def layouts(tiles: Tiles, dim: int, v_dim: int) -> list[tuple[int, int]]:
    """The stages and bytes of shared memory of programs that own queries, and keys."""
    sizes = (
        (tiles.block_q, tiles.block_kv, dim, v_dim),
        (tiles.block_kv, tiles.block_q, dim, v_dim),
    )
    configs = [(some, default_config(*some)) for some in sizes]
    return [(config.stages, shared_memory(*some, config)) for some, config in configs if config]


BACKWARD = Backward(gradients, refusal, layouts, Tunable(d_queries, d_keys, candidates))
