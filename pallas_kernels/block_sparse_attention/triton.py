"""Block-sparse attention, forward and backward, by Pallas' Triton backend.

For what the Mosaic kernels do not take: GPUs from Ampere on, f32, small tiles, gathered columns,
values for each pair of tokens. JAX has deprecated this backend: as Mosaic learns a shape or a chip,
that goes there, and this file ends with the backend.

Three kernels: the forward and `d_q` walk the list of a tile of queries, `d_k` with `d_v` the
inverse list of a tile of keys, one query head of the group after the other. Each number has one
writer, so reruns are bit-equal. Products of f32 are as precise as `jax.default_matmul_precision`.

Tiles of fewer than 16 tokens fill no product: a step gathers several of the list, token by token,
and a program that owns one repeats its last query, and writes nothing for that.
What owns tiles of few keys is in `triton_columns`; where many tiles of few queries list the same
keys, `triton_kv_major` reads these once for several of them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.block_sparse_attention.logits import LOG2_E
from pallas_kernels.block_sparse_attention.triton_configs import Config, default_config
from pallas_kernels.block_sparse_attention.triton_pieces import (
    Pieces,
    Softmax,
    add_products,
    columns,
    inner,
    read,
    zeros,
)
from pallas_kernels.block_sparse_attention.triton_tokens import (
    Gathered,
    Place,
    Run,
    Tokens,
    Walk,
    run_of,
)
from pallas_kernels.block_sparse_attention.walk import divmod_i32

# rule(logits, q_index, kv_index, values) -> logits; element by element, values as functions that
# read them. gradient(..., d_logits) -> what flows back to the logits, then to each value: None
# where no gradient is asked for
TileRule = Callable[..., jax.Array]
TileGradient = Callable[..., Sequence[Any]]


# a tile of fewer tokens is no side of a product
LEAST_SIDE = 16
# columns of q and k, and of v: those of DeepSeek's latents
WIDEST = 576
# where gradients are summed, or what is kept of each entry
WIDEST_OF_GRADIENTS = 256
# tokens that a step gathers, at most
_GATHERED = 64


def refusal(dtype: Any, block_q: int, block_kv: int, dim: int, v_dim: int) -> str | None:
    """Why the kernels that own tiles of queries cannot take a problem, or None if they can.

    Args:
      dtype: Of q, k and v.
      block_q: Queries per tile.
      block_kv: Keys per tile.
      dim: Width of q and k, padded.
      v_dim: Width of v, padded.
    """
    return tiles_refusal(block_q, block_kv) or arrays_refusal(dtype, dim, v_dim, WIDEST)


def tiles_refusal(block_q: int, block_kv: int) -> str | None:
    """Why they cannot take tiles of these sizes, or None."""
    for name, tokens in (("queries", block_q), ("keys", block_kv)):
        if tokens >= LEAST_SIDE and tokens not in (16, 32, 64, 128):
            sizes = f"of 16, 32, 64 or 128 {name}, or of fewer than 16"
            return f"it takes tiles {sizes}, not {tokens}."
    return None


def arrays_refusal(dtype: Any, dim: int, v_dim: int, widest: int) -> str | None:
    """Why a kernel that takes so wide ones cannot take such arrays, or None."""
    if jnp.dtype(dtype) not in map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)):
        return f"it takes float32, bfloat16 or float16, not {jnp.dtype(dtype).name}."
    if jnp.dtype(dtype).itemsize == 4:
        widest = min(widest, 256)  # more of two steps is not in 99 KiB of shared memory
    if max(dim, v_dim) > widest:
        return f"it takes dim and v_dim up to {widest}, not {dim} and {v_dim}."
    return None


class Problem(NamedTuple):
    """The arrays that all kernels read; lengths are whole tiles, widths powers of two from 16 on.

    `q [batch, q_len, heads, dim]`, `k [batch, kv_len, kv_heads, dim]`, `v [..., v_dim]`, in one
    dtype. `values` are handed to the rule: [batch | 1, heads | 1, q_len | 1, kv_len | 1].
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    values: tuple[jax.Array, ...] = ()


class Tiles(NamedTuple):
    """Static: tile sizes, and what happens to logits: a constant factor, then the rule."""

    block_q: int
    block_kv: int
    scale: float | None = None
    rule: TileRule | None = None
    gradient: TileGradient | None = None

    @property
    def to_base_2(self) -> float:
        """The factor from logits to base 2, which has the scale in it where there is no rule."""
        return LOG2_E if self.rule else LOG2_E * (1.0 if self.scale is None else self.scale)


def forward(
    problem: Problem,
    kv_indices: jax.Array,
    kv_num_blocks: jax.Array,
    tiles: Tiles,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes attention over the listed tiles.

    Args:
      problem: The arrays.
      kv_indices: int32 [batch | 1, heads | kv_heads | 1, q_blocks, width], the tiles of each row.
      kv_num_blocks: int32 [batch | 1, heads | kv_heads | 1, q_blocks], how many of them count.
      tiles: Tile sizes, and what happens to logits.
      config: How a program is laid out.

    Returns:
      `out [batch, q_len, heads, v_dim]` and `lse [batch, heads, q_len]`, natural log, both f32. A
      row that sees no key has `out = 0`, `lse = -inf`.

    Raises:
      NotImplementedError: if the kernels cannot take this problem.
    """
    sizes = tiles.block_q, tiles.block_kv, problem.q.shape[-1], problem.v.shape[-1]
    reason = refusal(problem.v.dtype, *sizes)
    if reason:
        raise NotImplementedError("The Triton block-sparse attention: " + reason)
    chosen = config or config_of(problem, tiles, tiles.block_q, tiles.block_kv, backward=False)

    def forward_kernel(q_ref, k_ref, v_ref, indices_ref, counts_ref, *refs):
        *value_refs, out_ref, lse_ref = refs
        row, walk = row_of(problem, indices_ref, counts_ref, tiles, chosen)
        look = row.logits(q_ref, k_ref, value_refs)

        def step(number, softmax):
            there = walk.tokens(number)
            return softmax.add(look(there), tiles.to_base_2, read(v_ref, row.keys(there)))

        start = Softmax.of_nothing(chosen.own, problem.v.shape[-1])
        row.write(out_ref, lse_ref, *loop(*walk.steps, step, start).results())

    return call(forward_kernel, chosen, programs(problem, tiles, chosen), out_and_lse(problem))(
        *problem[:3], kv_indices, kv_num_blocks, *problem.values
    )


class Cotangents(NamedTuple):
    """What the backward kernels read besides the problem.

    `d_out` is in v's dtype. `lse2` is the log-sum-exp in base 2, +inf where a row saw nothing.
    `delta` is the row sum of `out * d_out`, less the gradient of the lse.
    """

    d_out: jax.Array
    lse2: jax.Array
    delta: jax.Array


def d_queries(
    problem: Problem,
    cotangents: Cotangents,
    kv_indices: jax.Array,
    kv_num_blocks: jax.Array,
    tiles: Tiles,
    config: Config | None = None,
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    """The gradient by q, and by each f32 value per query.

    Args:
      problem: The arrays.
      cotangents: What flows back.
      kv_indices: As for `forward`.
      kv_num_blocks: As for `forward`.
      tiles: Tile sizes, and what happens to logits.
      config: How a program is laid out.

    Returns:
      `d_q` in q's shape and dtype; for each of the values its gradient [batch, heads, q_len, 1],
      not yet summed where it is shared, or None where it is not an f32 value per query.
    """
    batches, q_len, heads, dim = problem.q.shape
    dtype = problem.q.dtype
    chosen = config or config_of(problem, tiles, tiles.block_q, tiles.block_kv, backward=True)
    wanted = per_query(problem)

    def d_queries_kernel(
        q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, indices_ref, counts_ref, *refs
    ):
        value_refs, d_q_ref, *d_value_refs = split(refs, len(problem.values))
        row, walk = row_of(problem, indices_ref, counts_ref, tiles, chosen)
        refs = q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref
        add = row.gradient(refs, value_refs, wanted)
        d_q, d_values = loop(
            *walk.steps,
            lambda number, sums: add(walk.tokens(number), sums),
            row.no_gradient(dim, wanted),
        )
        row.write_rows(d_q_ref, tuple(x.astype(dtype) for x in d_q))
        for ref, d_value in zip(d_value_refs, d_values, strict=True):
            row.write_numbers(ref, d_value)

    sums = jax.ShapeDtypeStruct((batches, heads, q_len), jnp.float32)
    d_q, *d_values = call(
        d_queries_kernel,
        chosen,
        programs(problem, tiles, chosen),
        [jax.ShapeDtypeStruct(problem.q.shape, dtype)] + [sums] * len(wanted),
    )(*problem[:3], *cotangents, kv_indices, kv_num_blocks, *problem.values)
    found = {n: d[..., None] for n, d in zip(wanted, d_values, strict=True)}
    return d_q, tuple(found.get(n) for n in range(len(problem.values)))


def d_keys(
    problem: Problem,
    cotangents: Cotangents,
    offsets: jax.Array,
    q_indices: jax.Array,
    tiles: Tiles,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array | None, ...]]:
    """The gradient by k, by v, and by each f32 value per key.

    Args:
      problem: The arrays.
      cotangents: What flows back.
      offsets: int32 [batch | 1, heads | kv_heads | 1, kv_blocks + 1], where each key tile's part
        of `q_indices` begins; the next one's beginning is its end.
      q_indices: int32 [batch | 1, heads | kv_heads | 1, entries], the query tiles of key tiles.
      tiles: Tile sizes, and what happens to logits.
      config: How a program is laid out.

    Returns:
      `d_k` and `d_v` in the shapes and dtype of k and v; for each of the values its gradient
      [batch, heads, 1, kv_len], not yet summed where it is shared, or None where it is not an f32
      value per key.
    """
    batches, kv_len, kv_heads, dim = problem.k.shape
    heads, v_dim, dtype = problem.q.shape[2], problem.v.shape[-1], problem.k.dtype
    own = tiles.block_kv
    if tiles.block_q < LEAST_SIDE and max(dim, v_dim) <= 64:
        own = math.gcd(own, 32)  # 64 keys and gathered queries spill on Blackwell
    chosen = config or config_of(problem, tiles, own, tiles.block_q, backward=True)
    group, wanted = heads // kv_heads, per_key(problem)

    def d_keys_kernel(
        q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, offsets_ref, ids_ref, *refs
    ):
        value_refs, d_k_ref, d_v_ref, *d_value_refs = split(refs, len(problem.values))
        program, part = divmod_i32(pl.program_id(0), kv_len // chosen.own)
        batch, kv_head = divmod_i32(program, kv_heads)
        kv_block = lax.div(part, tiles.block_kv // chosen.own)
        column = Column(batch, kv_head, Run(part * chosen.own, chosen.own), tiles)
        here = batch, column.tokens.at, kv_head
        refs = q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref
        add = column.gradient(refs, value_refs, wanted)

        def one_head(member, carry):
            head = kv_head * group + member
            at = list_of(batch, head, heads, offsets_ref)
            first, last = offsets_ref[*at, kv_block], offsets_ref[*at, kv_block + 1]
            walk = Walk(ids_ref, at, first, last, tiles.block_q, chosen.other)

            def step(number, sums):
                return add(head, walk.tokens(number), sums)

            start = *carry, column.no_value_gradient(wanted)
            d_k, d_v, d_values = loop(*walk.steps, step, start)
            for ref, d_value in zip(d_value_refs, d_values, strict=True):
                ref[batch, head, column.tokens.at] = d_value
            return d_k, d_v

        d_k, d_v = loop(0, group, one_head, column.no_gradient(dim, v_dim))
        for ref, pieces in ((d_k_ref, d_k), (d_v_ref, d_v)):
            for piece, x in zip(columns(ref.shape[-1]), pieces, strict=True):
                ref[*here, piece] = x.astype(dtype)

    sums = jax.ShapeDtypeStruct((batches, heads, kv_len), jnp.float32)
    d_k, d_v, *d_values = call(
        d_keys_kernel,
        chosen,
        batches * kv_heads * (kv_len // chosen.own),
        [jax.ShapeDtypeStruct(x.shape, dtype) for x in problem[1:3]] + [sums] * len(wanted),
    )(*problem[:3], *cotangents, offsets, q_indices, *problem.values)
    found = {n: d[..., None, :] for n, d in zip(wanted, d_values, strict=True)}
    return d_k, d_v, tuple(found.get(n) for n in range(len(problem.values)))


def config_of(problem: Problem, tiles: Tiles, own: int, other: int, *, backward: bool) -> Config:
    """The shipped configuration for a problem, whose tiles have so many tokens on either side."""
    width = max(problem.q.shape[-1], problem.v.shape[-1])
    rule = tiles.rule is not None
    sides = (_piece(max(own, LEAST_SIDE)), _piece(other))
    return default_config(*sides, width, problem.q.dtype, rule=rule, backward=backward)


def direct_config_of(
    problem: Problem, tiles: Tiles, own: int, other: int, *, backward: bool = True
) -> Config:
    """The same for programs whose steps follow from no list.

    There is no place in one to read ahead: a third stage would be shared memory alone.
    """
    chosen = config_of(problem, tiles, own, other, backward=backward)
    return dataclasses.replace(chosen, num_stages=2)


def _piece(block: int) -> int:
    """The largest piece of a tile, or of several small ones."""
    return block & -block if block >= LEAST_SIDE else _GATHERED


def programs(problem: Problem, tiles: Tiles, config: Config) -> int:
    """How many programs a pass over queries takes."""
    batches, q_len, heads, _ = problem.q.shape
    return batches * heads * (q_len // min(tiles.block_q, config.own))


def out_and_lse(problem: Problem) -> list[jax.ShapeDtypeStruct]:
    """What a forward pass writes."""
    batches, q_len, heads, _ = problem.q.shape
    return [
        jax.ShapeDtypeStruct((batches, q_len, heads, problem.v.shape[-1]), jnp.float32),
        jax.ShapeDtypeStruct((batches, heads, q_len), jnp.float32),
    ]


def call(kernel: Callable, config: Config, programs: int, out_shape: list) -> Callable:
    """The function of arrays that runs a kernel."""
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=(programs,),
        compiler_params=plt.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
    )


def loop(first: Any, last: Any, step: Callable, carry: Any) -> Any:
    """`fori_loop` with counts of 32 bits."""
    # JAX's own integers are 64 bits wide where that is switched on
    return lax.fori_loop(jnp.asarray(first, jnp.int32), jnp.asarray(last, jnp.int32), step, carry)


class Row(NamedTuple):
    """The queries of a program, of one head."""

    batch: jax.Array
    head: jax.Array
    kv_head: jax.Array
    tokens: Tokens
    tiles: Tiles

    def keys(self, there: Tokens) -> tuple[Any, ...]:
        """Where in k and v tokens are."""
        return self.batch, there.at, self.kv_head

    @property
    def here(self) -> tuple[Any, ...]:
        """Where they are in q and in the output."""
        return self.batch, self.tokens.at, self.head

    def write(self, out_ref: Any, lse_ref: Any, out: Pieces, lse: jax.Array) -> None:
        """Writes what was computed of them."""
        self.write_rows(out_ref, out)
        self.write_numbers(lse_ref, lse)

    def write_numbers(self, ref: Any, x: jax.Array) -> None:
        """Writes one number for each into an array like the log-sum-exp."""
        assert not isinstance(self.tokens, Gathered)  # those have places of their own
        self.tokens.write(ref, (self.batch, self.head), (), x)

    def write_rows(self, ref: Any, pieces: Pieces) -> None:
        """Writes rows into an array like q."""
        assert not isinstance(self.tokens, Gathered)
        for piece, x in zip(columns(ref.shape[-1]), pieces, strict=True):
            self.tokens.write(ref, (self.batch,), (self.head, piece), x)

    def _place(self, there: Tokens) -> Place:
        return Place(self.batch, self.head, self.tokens, there, 0)

    def logits(self, q_ref: Any, k_ref: Any, value_refs: Any) -> Callable[[Tokens], jax.Array]:
        """Gives the logits of some keys; -inf where these are not listed."""
        queries = read(q_ref, self.here)

        def look(there):
            logits = inner(queries, read(k_ref, self.keys(there)))
            if self.tiles.rule:
                arguments = _arguments(logits, self.tiles.scale, self._place(there), value_refs)
                logits = self.tiles.rule(*arguments)
            return there.only_listed(logits, 1, -jnp.inf)

        return look

    def gradient(self, refs: Sequence[Any], value_refs: Any, wanted: Sequence[int]) -> Callable:
        """Gives the sums with some keys' part added: those of `d_q`, and of the wanted values.

        `refs` are to q, k, v and to the cotangents.
        """
        q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref = refs
        rows = self.batch, self.head
        queries, d_out = read(q_ref, self.here), read(d_out_ref, self.here)
        lse2, delta = lse_ref[*rows, self.tokens.at], delta_ref[*rows, self.tokens.at]

        def add(there, sums):
            d_q, d_values = sums
            keys = read(k_ref, self.keys(there))
            raw = inner(queries, keys)
            logits, pullback = _logits(raw, self.tiles, self._place(there), value_refs)
            logits = there.only_listed(logits, 1, -jnp.inf)
            probs = jnp.exp2(logits * LOG2_E - lse2[:, None])
            d_probs = inner(d_out, read(v_ref, self.keys(there)))
            d_raw, d_new = pullback(probs * (d_probs - delta[:, None]))
            d_q = add_products(d_q, d_raw, keys)
            new = (d_new[n].sum(axis=1) for n in wanted)
            return d_q, tuple(a + b for a, b in zip(d_values, new, strict=True))

        return add

    def no_gradient(self, dim: int, wanted: Sequence[int]) -> tuple[Pieces, Any]:
        """The sums to begin with."""
        rows = self.tokens.count
        none = (jnp.zeros((rows,), jnp.float32) for _ in wanted)
        return zeros(rows, dim), tuple(none)


class Column(NamedTuple):
    """The keys of a program, of one head of k and v."""

    batch: jax.Array
    kv_head: jax.Array
    tokens: Tokens
    tiles: Tiles

    def gradient(self, refs: Sequence[Any], value_refs: Any, wanted: Sequence[int]) -> Callable:
        """Gives the sums with some queries' part added: `d_k`, `d_v`, and those of values.

        `refs` are to q, k, v and to the cotangents.
        """
        q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref = refs
        here = self.batch, self.tokens.at, self.kv_head
        keys, values = read(k_ref, here), read(v_ref, here)

        def add(head, there, sums):
            d_k, d_v, d_values = sums
            at, rows = (self.batch, there.at, head), (self.batch, head, there.at)
            queries, d_out = read(q_ref, at), read(d_out_ref, at)
            # keys are the rows, so that no tile of logits is turned round
            raw = inner(keys, queries)
            place = Place(self.batch, head, there, self.tokens, 1)
            logits, pullback = _logits(raw, self.tiles, place, value_refs)
            lse2 = there.only_listed(lse_ref[rows], 0, jnp.inf)
            probs = jnp.exp2(logits * LOG2_E - lse2[None, :])
            d_v = add_products(d_v, probs, d_out)
            d_probs = inner(values, d_out)
            d_raw, d_new = pullback(probs * (d_probs - delta_ref[rows][None, :]))
            d_k = add_products(d_k, d_raw, queries)
            new = (d_new[n].sum(axis=1) for n in wanted)
            return d_k, d_v, tuple(a + b for a, b in zip(d_values, new, strict=True))

        return add

    def no_gradient(self, dim: int, v_dim: int) -> tuple[Pieces, Pieces]:
        """The sums of `d_k` and `d_v` to begin with."""
        return zeros(self.tokens.count, dim), zeros(self.tokens.count, v_dim)

    def no_value_gradient(self, wanted: Sequence[int]) -> tuple[jax.Array, ...]:
        """Those of the wanted values."""
        return tuple(jnp.zeros((self.tokens.count,), jnp.float32) for _ in wanted)


def row_of(
    problem: Problem, indices_ref: Any, counts_ref: Any, tiles: Tiles, config: Config
) -> tuple[Row, Walk]:
    """What this program computes, and the list of its tile of queries."""
    _, q_len, heads, _ = problem.q.shape
    own = min(tiles.block_q, config.own)
    program, part = divmod_i32(pl.program_id(0), q_len // own)
    batch, head = divmod_i32(program, heads)
    kv_head = lax.div(head, jnp.int32(heads // problem.k.shape[2]))
    q_block = lax.div(part, jnp.int32(tiles.block_q // own))
    at = *list_of(batch, head, heads, indices_ref), q_block
    walk = Walk(indices_ref, at, 0, counts_ref[*at], tiles.block_kv, config.other)
    return Row(batch, head, kv_head, run_of(part * own, own, config.own), tiles), walk


def list_of(batch: jax.Array, head: jax.Array, heads: int, lists: Any) -> tuple[Any, ...]:
    """Which lists a query head reads: they are shared over batch, heads or a group."""
    return batch if lists.shape[0] > 1 else 0, lax.div(head, jnp.int32(heads // lists.shape[1]))


def _arguments(raw: jax.Array, scale: float | None, place: Place, value_refs: Any) -> tuple:
    """What a rule is called with."""
    scaled = raw if scale is None else raw * scale
    return scaled, *place.indices, tuple(map(place.reader, value_refs))


def _logits(raw: jax.Array, tiles: Tiles, place: Place, value_refs: Any):
    """Logits in natural units, and how a gradient goes back to `raw` and to the values."""
    scale, rule, gradient = tiles.scale, tiles.rule, tiles.gradient
    if rule is None or gradient is None:
        factor = 1.0 if scale is None else scale
        return raw * factor, lambda d_logits: (d_logits * factor, ())
    arguments = _arguments(raw, scale, place, value_refs)

    def pullback(d_logits):
        d_scaled, *d_values = gradient(*arguments, d_logits)
        return d_scaled if scale is None else d_scaled * scale, d_values

    return rule(*arguments), pullback


def per_query(problem: Problem) -> list[int]:
    """Which values have a gradient that `d_queries` sums: an f32 for a query, not for a pair."""
    return [n for n, x in enumerate(problem.values) if _summed(x) and x.shape[3] == 1]


def per_key(problem: Problem) -> list[int]:
    """Which values have a gradient that `d_keys` sums."""
    return [n for n, x in enumerate(problem.values) if _summed(x) and x.shape[3] > 1]


def _summed(value: jax.Array) -> bool:
    return jnp.issubdtype(value.dtype, jnp.floating) and 1 in value.shape[2:]


def split(refs: Sequence[Any], values: int) -> tuple[Any, ...]:
    """References to values as one tuple, then the others."""
    return refs[:values], *refs[values:]
