"""`d_k` and `d_v` of gathered columns, tiles of few keys, by Pallas' Triton backend.

A program owns a tile of queries and a piece of its list. It gathers the keys of some entries, so
that its products are dense, computes their gradient by the queries of the tile, of every head that
shares the list, and writes that for each entry apart. Then a program for each key adds up what its
entries gave, in the order of the inverse list: each number has one writer.

Per entry of one key that takes four products with `block_q` rows, `4 * block_q * (dim + v_dim)`
operations for each head, and moves `8 * (dim + v_dim)` bytes: an f32 written and read again. The
tile's q and d_out are read once per piece, of 32 or 64 entries. A program that owned one key had no
product; one that owned 16 neighbours would read q and d_out, `2 * block_q * (dim + v_dim)` bytes of
16 bits, for every tile that lists one of them. That is less only where more than `block_q / 4`
neighbours are listed together, and where they are, tiles of 16 keys and more are the better plan.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.block_sparse_attention import triton
from pallas_kernels.block_sparse_attention.triton_pieces import columns
from pallas_kernels.block_sparse_attention.triton_tokens import Walk, run_of
from pallas_kernels.block_sparse_attention.walk import divmod_i32

# a key's entries per step, and threads: its numbers are few
_SUMS = triton.Config(own=1, other=16, num_warps=2, num_stages=2)
# queries of a tile that fill one step
_ONE_STEP = triton.LEAST_SIDE


class Rows(NamedTuple):
    """The lists of some rows of tiles.

    Attributes:
      start: int32 [1], the first row of tiles.
      kv_indices: int32 [batch | 1, heads | kv_heads | 1, rows, width].
      kv_num_blocks: int32 [batch | 1, heads | kv_heads | 1, rows]; 0 for rows past the last tile.
    """

    start: jax.Array
    kv_indices: jax.Array
    kv_num_blocks: jax.Array


class Parts(NamedTuple):
    """What each entry gives its keys, f32.

    `d_k [batch, owners, rows, places, dim]` and `d_v [..., v_dim]`. An owner is a query head, or a
    head of k and v whose queries share a list. A row's places are its tiles' keys end to end, and
    hold anything past the last.
    """

    d_k: jax.Array
    d_v: jax.Array


def spills(dtype: Any, block_q: int, dim: int, v_dim: int) -> bool:
    """Whether what a program reads at once is more than its registers hold."""
    return jnp.dtype(dtype).itemsize == 4 and block_q <= _ONE_STEP and max(dim, v_dim) > 128


def d_entries(
    problem: triton.Problem,
    cotangents: triton.Cotangents,
    rows: Rows,
    tiles: triton.Tiles,
    config: triton.Config | None = None,
) -> Parts:
    """The gradient by the keys and values of each entry.

    Args:
      problem: The arrays.
      cotangents: What flows back.
      rows: Which entries.
      tiles: Tile sizes, and what happens to logits.
      config: How a program is laid out.
    """
    batches, kv_heads = problem.k.shape[0], problem.k.shape[2]
    heads, dim, v_dim = problem.q.shape[2], problem.q.shape[3], problem.v.shape[3]
    list_heads, count, width = rows.kv_indices.shape[1:]
    owners, keys = max(kv_heads, list_heads), width * tiles.block_kv
    most = max(triton.LEAST_SIDE, 1 << (keys - 1).bit_length())
    if problem.q.dtype.itemsize == 4 and max(dim, v_dim) > 64 and tiles.block_q <= _ONE_STEP:
        most = triton.LEAST_SIDE  # a loop of one step is none: all it reads is in registers
    # two steps, so that one is read while the other is computed
    half = max(triton.LEAST_SIDE, tiles.block_q // 2)
    chosen = config or triton.direct_config_of(problem, tiles, most, half)
    pieces = -(-keys // chosen.own)
    size = min(tiles.block_q, chosen.other)
    parts = tiles.block_q // size

    def d_entries_kernel(q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, *refs):
        start_ref, indices_ref, counts_ref, *value_refs, d_k_ref, d_v_ref = refs
        program, piece = divmod_i32(pl.program_id(0), pieces)
        program, row = divmod_i32(program, count)
        batch, owner = divmod_i32(program, owners)
        at = *triton.list_of(batch, owner, owners, indices_ref), row
        walk = Walk(indices_ref, at, 0, counts_ref[*at], tiles.block_kv, chosen.own)

        @pl.when(piece < walk.steps[1])
        def compute():
            kv_head = lax.div(owner, jnp.int32(owners // kv_heads))
            column = triton.Column(batch, kv_head, walk.tokens(piece), tiles)
            refs = q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref
            add = column.gradient(refs, value_refs, ())
            first = (start_ref[0] + row) * tiles.block_q

            def step(number, sums):
                member, part = divmod_i32(number, parts)
                there = run_of(first + part * size, size, chosen.other)
                return add(owner * (heads // owners) + member, there, (*sums, ()))[:2]

            steps = (heads // owners) * parts
            d_k, d_v = triton.loop(0, steps, step, column.no_gradient(dim, v_dim))
            here = batch, owner, row, pl.ds(piece * chosen.own, chosen.own)
            for ref, pieces in ((d_k_ref, d_k), (d_v_ref, d_v)):
                for part, x in zip(columns(ref.shape[-1]), pieces, strict=True):
                    ref[*here, part] = x

    shape = batches, owners, count, pieces * chosen.own
    shapes = [jax.ShapeDtypeStruct((*shape, size), jnp.float32) for size in (dim, v_dim)]
    programs = batches * owners * count * pieces
    parts = triton.call(d_entries_kernel, chosen, programs, shapes)(
        *problem[:3], *cotangents, *rows, *problem.values
    )
    return Parts(*parts)


def add_entries(
    sums: tuple[jax.Array, jax.Array],
    parts: Parts,
    offsets: jax.Array,
    places: jax.Array,
    tiles: triton.Tiles,
) -> tuple[jax.Array, jax.Array]:
    """Adds what entries give to their keys' sums, in the order of the inverse list.

    Args:
      sums: f32 [batch, kv_len, kv_heads, dim] and [..., v_dim].
      parts: What each entry gives.
      offsets: int32 [batch | 1, heads | kv_heads | 1, kv_blocks + 1], where each key tile's part of
        `places` begins; the next one's beginning is its end.
      places: int32 [batch | 1, heads | kv_heads | 1, entries], where entries are in `parts`, rows
        end to end.
      tiles: Tile sizes.
    """
    batches, kv_len, kv_heads, _ = sums[0].shape
    owners, count = parts.d_k.shape[1], _SUMS.other
    members = owners // kv_heads

    def add_entries_kernel(d_k_ref, d_v_ref, part_k_ref, part_v_ref, offsets_ref, places_ref, *out):
        program, token = divmod_i32(pl.program_id(0), kv_len)
        batch, kv_head = divmod_i32(program, kv_heads)
        kv_block, within = divmod_i32(token, tiles.block_kv)
        here = batch, token, kv_head

        def one_owner(member, sums):
            owner = kv_head * members + member
            at = triton.list_of(batch, owner, owners, offsets_ref)
            first, last = offsets_ref[*at, kv_block], offsets_ref[*at, kv_block + 1]
            walk = Walk(places_ref, at, first, last, 1, count)

            def step(number, sums):
                found = walk.tokens(number)
                parts = (
                    ref[batch, owner, found.at + within, :] for ref in (part_k_ref, part_v_ref)
                )
                new = (found.only_listed(part, 0, 0.0).sum(axis=0) for part in parts)
                return tuple(a + b for a, b in zip(sums, new, strict=True))

            return triton.loop(*walk.steps, step, sums)

        found = triton.loop(0, members, one_owner, (d_k_ref[*here, :], d_v_ref[*here, :]))
        for ref, x in zip(out, found, strict=True):
            ref[*here, :] = x

    in_rows = (part.reshape(batches, owners, -1, part.shape[-1]) for part in parts)
    d_k, d_v = triton.call(
        add_entries_kernel,
        _SUMS,
        batches * kv_heads * kv_len,
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in sums],
    )(*sums, *in_rows, offsets, places)
    return d_k, d_v
