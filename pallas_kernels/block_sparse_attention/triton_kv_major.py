"""Tiles of few queries by Pallas' Triton backend: the queries that list a tile of keys, gathered.

A tile of one query gives a product one row. Here a program owns a chunk of the rows that list one
tile of keys, of one head; it gathers them, so that its products are dense, and reads the tile piece
by piece. What a row gets from one entry of its list has a place of its own, and is merged with the
rest elsewhere: each number has one writer. `d_k` with `d_v` are `triton.d_keys`, which walks the
whole inverse list of its keys in one program.

So the backward pass takes seven products per entry where a program that computed all three
gradients would take five, and gathers q and d_out twice, `4 * (dim + v_dim)` bytes of 16-bit rows.
In return a chunk is a program here: a tile that every query lists keeps many of them busy, and
what is kept of `d_q` is one part per entry, whatever part of a tile of keys a program owns there.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.block_sparse_attention import triton
from pallas_kernels.block_sparse_attention.logits import LOG2_E
from pallas_kernels.block_sparse_attention.triton_pieces import Softmax, read
from pallas_kernels.block_sparse_attention.triton_tokens import Gathered, Run, tokens_of
from pallas_kernels.block_sparse_attention.walk import divmod_i32

_LOWEST = float(jnp.finfo(jnp.float32).min)


def refusal(dtype: Any, block_q: int, block_kv: int, dim: int, v_dim: int) -> str | None:
    """Why these kernels cannot take a problem of small tiles of queries; see `triton.refusal`."""
    if block_kv % triton.LEAST_SIDE:
        return f"for tiles of {block_q} queries it takes multiples of 16 keys, not {block_kv}."
    return triton.arrays_refusal(dtype, dim, v_dim, triton.WIDEST_OF_GRADIENTS)


class Chunks(NamedTuple):
    """Which rows of tiles meet which tile of keys, chunk by chunk.

    Attributes:
      batch: int32 [chunks], the sequence.
      head: int32 [chunks], the query head.
      kv_block: int32 [chunks], the tile of keys.
      members: int32 [chunks, size], the rows of tiles, -1 after the last.
      total: int32 [1], how many chunks there are; those after them are nothing.
    """

    batch: jax.Array
    head: jax.Array
    kv_block: jax.Array
    members: jax.Array
    total: jax.Array


def forward(
    problem: triton.Problem,
    chunks: Chunks,
    tiles: triton.Tiles,
    config: triton.Config | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes what rows get from the tiles of keys that they meet.

    Args:
      problem: The arrays.
      chunks: Which rows meet which tile.
      tiles: Tile sizes, and what happens to logits.
      config: How a program is laid out.

    Returns:
      For each query of the chunks' members, f32 [chunks, size * block_q]: its largest logit, in
      natural units and finite; the sum of exponentials of what logits lack to it; and that sum
      weighted by values, [..., v_dim]. Anything where there is no member.

    Raises:
      NotImplementedError: if the kernel cannot take this problem.
    """
    _refuse(problem, tiles)
    own, chosen = _layout(problem, chunks, tiles, config, backward=False)
    v_dim = problem.v.shape[-1]

    def gathered_forward_kernel(q_ref, k_ref, v_ref, *refs):
        chunk_refs, refs = Chunks(*refs[: len(chunks)]), refs[len(chunks) :]
        value_refs, peak_ref, total_ref, sum_ref = triton.split(refs, len(problem.values))
        mine = _Mine.of(problem, chunk_refs, own, tiles, chosen)
        look = mine.row.logits(q_ref, k_ref, value_refs)

        def step(number, softmax):
            there = mine.keys(number)
            values = read(v_ref, mine.row.keys(there))
            return softmax.add(look(there), tiles.to_base_2, values)

        start = Softmax.of_nothing(chosen.own, v_dim)
        softmax = triton.loop(0, mine.steps, step, start)

        @pl.when(mine.exists)
        def write():
            # finite: the difference of two infinities is no number
            peak_ref[mine.place] = jnp.maximum(softmax.peak / LOG2_E, _LOWEST)
            total_ref[mine.place] = softmax.total
            (sum_ref[*mine.place, :],) = softmax.acc

    shape = len(chunks.batch), own
    parts = triton.call(
        gathered_forward_kernel,
        chosen,
        shape[0] * (own // chosen.own),
        [jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, shape, (*shape, v_dim))],
    )(*problem[:3], *chunks, *problem.values)
    peak, total, acc = (part[:, : _rows(chunks, tiles)] for part in parts)
    return peak, total, acc


def d_queries(
    problem: triton.Problem,
    cotangents: triton.Cotangents,
    chunks: Chunks,
    tiles: triton.Tiles,
    config: triton.Config | None = None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The parts of the gradient by q, and by each f32 value per query, that tiles of keys give.

    Args:
      problem: The arrays.
      cotangents: What flows back.
      chunks: Which rows meet which tile.
      tiles: Tile sizes, and what happens to logits.
      config: How a program is laid out.

    Returns:
      f32 [chunks, size * block_q, dim], and [chunks, size * block_q] for each value that
      `triton.per_query` names. Anything where there is no member.
    """
    own, chosen = _layout(problem, chunks, tiles, config, backward=True)
    dim, wanted = problem.q.shape[-1], triton.per_query(problem)

    def gathered_d_queries_kernel(q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, *refs):
        chunk_refs, refs = Chunks(*refs[: len(chunks)]), refs[len(chunks) :]
        value_refs, d_q_ref, *d_value_refs = triton.split(refs, len(problem.values))
        mine = _Mine.of(problem, chunk_refs, own, tiles, chosen)
        given = q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref
        add = mine.row.gradient(given, value_refs, wanted)
        d_q, d_values = triton.loop(
            0,
            mine.steps,
            lambda number, sums: add(mine.keys(number), sums),
            mine.row.no_gradient(dim, wanted),
        )

        @pl.when(mine.exists)
        def write():
            (d_q_ref[*mine.place, :],) = d_q
            for ref, d_value in zip(d_value_refs, d_values, strict=True):
                ref[mine.place] = d_value

    shape = len(chunks.batch), own
    shapes = (*shape, dim), *(shape for _ in wanted)
    parts = triton.call(
        gathered_d_queries_kernel,
        chosen,
        shape[0] * (own // chosen.own),
        [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes],
    )(*problem[:3], *cotangents, *chunks, *problem.values)
    d_q, *d_values = (part[:, : _rows(chunks, tiles)] for part in parts)
    return d_q, tuple(d_values)


class _Mine(NamedTuple):
    """A program's rows, its tile of keys, and the place of what it computes."""

    row: triton.Row
    kv_start: jax.Array
    exists: jax.Array
    steps: jax.Array
    place: tuple[Any, ...]
    size: int

    @classmethod
    def of(
        cls,
        problem: triton.Problem,
        chunks: Chunks,
        own: int,
        tiles: triton.Tiles,
        config: triton.Config,
    ) -> "_Mine":
        """Of the program that this is; `chunks` are references, of `own` rows each."""
        chunk, part = divmod_i32(pl.program_id(0), own // config.own)
        batch, head = chunks.batch[chunk], chunks.head[chunk]
        row = part * config.own + lax.iota(jnp.int32, config.own)
        last = chunks.members.shape[1] * tiles.block_q - 1
        there = row <= last
        row = jnp.minimum(row, last)
        tokens = tokens_of(chunks.members, (chunk,), 0, row, tiles.block_q)
        # where there is no member, what is computed of the first query is not read again
        queries = Gathered(jnp.maximum(tokens, 0), there)
        kv_head = lax.div(head, jnp.int32(problem.q.shape[2] // problem.k.shape[2]))
        exists = chunk < chunks.total[0]
        steps = lax.select(exists, jnp.int32(tiles.block_kv // config.other), jnp.int32(0))
        return cls(
            triton.Row(batch, head, kv_head, queries, tiles),
            chunks.kv_block[chunk] * tiles.block_kv,
            exists,
            steps,
            (chunk, pl.ds(part * config.own, config.own)),
            config.other,
        )

    def keys(self, number: jax.Array) -> Run:
        """Those of a step."""
        return Run(self.kv_start + number * self.size, self.size)


def _layout(
    problem: triton.Problem,
    chunks: Chunks,
    tiles: triton.Tiles,
    config: triton.Config | None,
    *,
    backward: bool,
) -> tuple[int, triton.Config]:
    """Rows of a chunk with those that fill it up, and how a program is laid out."""
    own = max(triton.LEAST_SIDE, 1 << (_rows(chunks, tiles) - 1).bit_length())
    most = own
    width = max(problem.q.shape[-1], problem.v.shape[-1])
    if not backward and problem.q.dtype.itemsize == 4 and width > 64:
        most = min(own, 32)  # more gathered rows spill on Blackwell where there is a rule
    sides = most, tiles.block_kv
    return own, config or triton.direct_config_of(problem, tiles, *sides, backward=backward)


def _rows(chunks: Chunks, tiles: triton.Tiles) -> int:
    return chunks.members.shape[1] * tiles.block_q


def _refuse(problem: triton.Problem, tiles: triton.Tiles) -> None:
    sizes = tiles.block_q, tiles.block_kv, problem.q.shape[-1], problem.v.shape[-1]
    reason = refusal(problem.v.dtype, *sizes)
    if reason:
        raise NotImplementedError("The Triton attention of gathered queries: " + reason)
