"""Block-sparse attention, forward and backward, by Pallas' Triton backend.

For what the Mosaic kernels do not take: GPUs from Ampere on, f32, small tiles, values for each pair
of tokens. JAX has deprecated this backend since 0.11 and will remove it; as Mosaic learns a shape
or a chip, that goes there, and this file ends with the backend.

Three kernels: the forward and `d_q` walk the list of a tile of queries, `d_k` with `d_v` the
inverse list of a tile of keys, one query head of the group after the other. Each number has one
writer, so reruns are equal bit by bit. Products of f32 are as precise as
`jax.default_matmul_precision` says.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.block_sparse_attention.logits import LOG2_E
from pallas_kernels.block_sparse_attention.walk import divmod_i32

# rule(logits, q_index, kv_index, values) -> logits; element by element, values as functions that
# read them. gradient(..., d_logits) -> what flows back to the logits, then to each value: None
# where no gradient is asked for
TileRule = Callable[..., jax.Array]
TileGradient = Callable[..., Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Config:
    """How a program is laid out; every legal choice gives the same result up to rounding.

    Attributes:
      own: Tokens that a program computes, at most a tile's.
      other: Tokens it reads per step of its loop, at most a tile's.
      num_warps: Of 32 threads each.
      num_stages: Depth of the pipeline. A step's tokens are read one step ahead with 2; with 3
        its place in the list two steps ahead, or, where a rule wants that place too, the tokens.
    """

    own: int
    other: int
    num_warps: int = 4
    num_stages: int = 3


def default_config(
    own: int, other: int, width: int, dtype: Any, *, rule: bool, backward: bool
) -> Config:
    """A configuration that fits every chip: no register spilled, at most 99 KiB of shared memory.

    That is what GPUs for desktops have. Chosen by what compilers say of it, not measured.

    Args:
      own: Tokens of a tile on the side that a program computes.
      other: Tokens of a tile on the side that it reads.
      width: The larger of dim and v_dim.
      dtype: Of q, k and v.
      rule: Whether a rule changes logits.
      backward: Whether for one of the backward kernels.
    """
    sizes = (_BACKWARD if backward else _FORWARD)[jnp.dtype(dtype).itemsize]
    most = next(config for limit, config in sizes.items() if width <= limit)
    own, other = min(own, most.own), min(other, most.other)
    small = backward and width <= 64  # a third stage spills there on Blackwell
    # few numbers to keep are few threads' work
    num_warps = 4 if own * width <= 2048 else most.num_warps
    return Config(own, other, num_warps, num_stages=2 if rule or small else 3)


# by bytes of a number and by width: the largest pieces of tiles
_FORWARD = {
    2: {128: Config(128, 64, 8), 256: Config(64, 32, 8)},
    4: {64: Config(128, 32, 8), 128: Config(64, 32, 8), 256: Config(32, 16, 8)},
}
_BACKWARD = {
    2: {64: Config(64, 32, 4), 128: Config(64, 64, 8), 256: Config(32, 32, 8)},
    4: {64: Config(32, 32, 4), 128: Config(32, 32, 8), 256: Config(32, 16, 8)},
}


def refusal(dtype: Any, block_q: int, block_kv: int, dim: int, v_dim: int) -> str | None:
    """Why these kernels cannot take a problem, or None if they can.

    Args:
      dtype: Of q, k and v.
      block_q: Queries per tile.
      block_kv: Keys per tile.
      dim: Width of q and k, padded to a power of two.
      v_dim: Width of v, padded to a power of two.
    """
    if jnp.dtype(dtype) not in map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)):
        return f"it takes float32, bfloat16 or float16, not {jnp.dtype(dtype).name}."
    for name, size in (("queries", block_q), ("keys", block_kv)):
        if size not in (16, 32, 64, 128):
            return f"it takes tiles of 16, 32, 64 or 128 {name}, not {size}."
    if max(dim, v_dim) > 256:
        return f"it takes dim and v_dim up to 256, not {dim} and {v_dim}."
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
        row = row_of(problem, indices_ref, tiles, chosen)
        look = row.logits(q_ref, k_ref, indices_ref, value_refs)

        def step(number, softmax):
            logits, at = look(number)
            return softmax.add(logits, tiles.to_base_2, v_ref[*at, :])

        start = Softmax.of_nothing(chosen.own, problem.v.shape[-1])
        loop(0, row.steps(counts_ref), step, start).write(row, out_ref, lse_ref)

    return call(forward_kernel, chosen, programs(problem, chosen), out_and_lse(problem))(
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
    chosen = config or default_config(
        tiles.block_q,
        tiles.block_kv,
        max(dim, problem.v.shape[-1]),
        dtype,
        rule=bool(tiles.rule),
        backward=True,
    )
    wanted = [n for n, x in enumerate(problem.values) if _summed(x) and x.shape[3] == 1]

    def d_queries_kernel(
        q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, indices_ref, counts_ref, *refs
    ):
        value_refs, d_q_ref, *d_value_refs = _split(refs, len(problem.values))
        row = row_of(problem, indices_ref, tiles, chosen)
        here, rows = (row.batch, row.queries, row.head), (row.batch, row.head, row.queries)
        queries, d_out = q_ref[*here, :], d_out_ref[*here, :]
        lse2, delta = lse_ref[rows], delta_ref[rows]

        def step(number, carry):
            d_q, d_values = carry
            kv_start = row.kv_start(indices_ref, number)
            at = row.batch, pl.ds(kv_start, chosen.other), row.kv_head
            keys = k_ref[*at, :]
            raw = _product(queries, keys, 1)
            place = _Place(row.batch, row.head, row.q_start, kv_start, 0, raw.shape)
            logits, pullback = _logits(raw, tiles, place, value_refs)
            probs = jnp.exp2(logits * LOG2_E - lse2[:, None])
            d_probs = _product(d_out, v_ref[*at, :], 1)
            d_raw, d_new = pullback(probs * (d_probs - delta[:, None]))
            d_q = d_q + _product(d_raw.astype(dtype), keys, 0)
            sums = tuple(d_new[n].sum(axis=1) for n in wanted)
            return d_q, tuple(a + b for a, b in zip(d_values, sums, strict=True))

        start = (
            jnp.zeros((chosen.own, dim), jnp.float32),
            tuple(jnp.zeros((chosen.own,), jnp.float32) for _ in wanted),
        )
        d_q, d_values = loop(0, row.steps(counts_ref), step, start)
        d_q_ref[*here, :] = d_q.astype(dtype)
        for ref, d_value in zip(d_value_refs, d_values, strict=True):
            ref[rows] = d_value

    sums = jax.ShapeDtypeStruct((batches, heads, q_len), jnp.float32)
    d_q, *d_values = call(
        d_queries_kernel,
        chosen,
        batches * heads * (q_len // chosen.own),
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
    chosen = config or config_of(problem, tiles, tiles.block_kv, tiles.block_q, backward=True)
    parts, group = tiles.block_q // chosen.other, heads // kv_heads
    wanted = [n for n, x in enumerate(problem.values) if _summed(x) and x.shape[3] > 1]

    def d_keys_kernel(
        q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, offsets_ref, ids_ref, *refs
    ):
        value_refs, d_k_ref, d_v_ref, *d_value_refs = _split(refs, len(problem.values))
        program, part = divmod_i32(pl.program_id(0), kv_len // chosen.own)
        batch, kv_head = divmod_i32(program, kv_heads)
        kv_start, kv_block = part * chosen.own, lax.div(part, tiles.block_kv // chosen.own)
        here = batch, pl.ds(kv_start, chosen.own), kv_head
        keys, values = k_ref[*here, :], v_ref[*here, :]

        def one_head(member, carry):
            head = kv_head * group + member
            at = _list_of(batch, head, heads, offsets_ref)
            first, last = offsets_ref[*at, kv_block], offsets_ref[*at, kv_block + 1]

            def step(number, carry):
                d_k, d_v, d_values = carry
                entry, piece = divmod_i32(number, parts)
                q_start = ids_ref[*at, entry] * tiles.block_q + piece * chosen.other
                tokens = pl.ds(q_start, chosen.other)
                queries, d_out = q_ref[batch, tokens, head, :], d_out_ref[batch, tokens, head, :]
                # keys are the rows, so that no tile of logits is turned round
                raw = _product(keys, queries, 1)
                place = _Place(batch, head, q_start, kv_start, 1, raw.shape)
                logits, pullback = _logits(raw, tiles, place, value_refs)
                probs = jnp.exp2(logits * LOG2_E - lse_ref[batch, head, tokens][None, :])
                d_v = d_v + _product(probs.astype(dtype), d_out, 0)
                d_probs = _product(values, d_out, 1)
                d_logits = probs * (d_probs - delta_ref[batch, head, tokens][None, :])
                d_raw, d_new = pullback(d_logits)
                d_k = d_k + _product(d_raw.astype(dtype), queries, 0)
                sums = tuple(d_new[n].sum(axis=1) for n in wanted)
                return d_k, d_v, tuple(a + b for a, b in zip(d_values, sums, strict=True))

            start = *carry, tuple(jnp.zeros((chosen.own,), jnp.float32) for _ in wanted)
            d_k, d_v, d_values = loop(first * parts, last * parts, step, start)
            for ref, d_value in zip(d_value_refs, d_values, strict=True):
                ref[batch, head, pl.ds(kv_start, chosen.own)] = d_value
            return d_k, d_v

        start = (
            jnp.zeros((chosen.own, dim), jnp.float32),
            jnp.zeros((chosen.own, v_dim), jnp.float32),
        )
        d_k, d_v = loop(0, group, one_head, start)
        d_k_ref[*here, :] = d_k.astype(dtype)
        d_v_ref[*here, :] = d_v.astype(dtype)

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
    """The shipped configuration for a problem."""
    width = max(problem.q.shape[-1], problem.v.shape[-1])
    rule = tiles.rule is not None
    return default_config(own, other, width, problem.q.dtype, rule=rule, backward=backward)


def programs(problem: Problem, config: Config) -> int:
    """How many programs a pass over queries takes."""
    batches, q_len, heads, _ = problem.q.shape
    return batches * heads * (q_len // config.own)


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


def _product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """`a @ b`, or `a @ b.T` where `axis` is 1, in f32."""
    dimensions = (((1,), (axis,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


class Row(NamedTuple):
    """A program's part of a tile of queries, and the list of that tile."""

    batch: jax.Array
    head: jax.Array
    kv_head: jax.Array
    q_start: jax.Array
    list_at: tuple[Any, ...]
    tiles: Tiles
    config: Config

    @property
    def queries(self) -> Any:
        """Its tokens."""
        return pl.ds(self.q_start, self.config.own)

    def steps(self, counts_ref: Any) -> jax.Array:
        """How many pieces of key tiles there are to read."""
        return counts_ref[self.list_at] * (self.tiles.block_kv // self.config.other)

    def kv_start(self, indices_ref: Any, number: jax.Array) -> jax.Array:
        """The first key of a step."""
        entry, part = divmod_i32(number, self.tiles.block_kv // self.config.other)
        start = indices_ref[*self.list_at, entry] * self.tiles.block_kv
        return start + part * self.config.other

    def logits(self, q_ref: Any, k_ref: Any, indices_ref: Any, value_refs: Any) -> Callable:
        """Gives for a step's number the logits of its piece, and where its keys and values are."""
        queries = q_ref[self.batch, self.queries, self.head, :]

        def look(number):
            kv_start = self.kv_start(indices_ref, number)
            at = self.batch, pl.ds(kv_start, self.config.other), self.kv_head
            logits = _product(queries, k_ref[*at, :], 1)
            if self.tiles.rule:
                place = _Place(self.batch, self.head, self.q_start, kv_start, 0, logits.shape)
                arguments = _arguments(logits, self.tiles.scale, place, value_refs)
                logits = self.tiles.rule(*arguments)
            return logits, at

        return look


class Softmax(NamedTuple):
    """Rows so far: their values' sum, their largest logit in base 2, their numerators' sum."""

    acc: jax.Array
    peak: jax.Array
    total: jax.Array

    @classmethod
    def of_nothing(cls, rows: int, v_dim: int) -> "Softmax":
        """Before the first piece."""
        return cls(
            jnp.zeros((rows, v_dim), jnp.float32),
            jnp.full((rows,), -jnp.inf, jnp.float32),
            jnp.zeros((rows,), jnp.float32),
        )

    def add(self, logits: jax.Array, to_base_2: float, values: jax.Array) -> "Softmax":
        """After a further piece."""
        peak = jnp.maximum(self.peak, logits.max(axis=1) * to_base_2)
        # a row that saw nothing yet: 2 ** (-inf - 0) is 0, 2 ** (-inf + inf) would be nan
        shift = jnp.where(peak == -jnp.inf, 0.0, peak)
        probs = jnp.exp2(logits * to_base_2 - shift[:, None])
        decay = jnp.exp2(self.peak - shift)
        acc = self.acc * decay[:, None] + _product(probs.astype(values.dtype), values, 0)
        return Softmax(acc, peak, self.total * decay + probs.sum(axis=1))

    def write(self, row: "Row", out_ref: Any, lse_ref: Any) -> None:
        """Writes the rows' output and log-sum-exp."""
        seen = self.total != 0.0
        safe = jnp.where(seen, self.total, 1.0)
        out_ref[row.batch, row.queries, row.head, :] = self.acc / safe[:, None]
        lse = jnp.where(seen, self.peak / LOG2_E + jnp.log(safe), -jnp.inf)
        lse_ref[row.batch, row.head, row.queries] = lse


def row_of(problem: Problem, indices_ref: Any, tiles: Tiles, config: Config) -> Row:
    """What this program computes."""
    _, q_len, heads, _ = problem.q.shape
    program, part = divmod_i32(pl.program_id(0), q_len // config.own)
    batch, head = divmod_i32(program, heads)
    kv_head = lax.div(head, jnp.int32(heads // problem.k.shape[2]))
    q_block = lax.div(part, jnp.int32(tiles.block_q // config.own))
    list_at = *_list_of(batch, head, heads, indices_ref), q_block
    return Row(batch, head, kv_head, part * config.own, list_at, tiles, config)


def _list_of(batch: jax.Array, head: jax.Array, heads: int, lists: Any) -> tuple[Any, ...]:
    """Which lists a query head reads: they are shared over batch, heads or a group."""
    each = jnp.int32(heads // lists.shape[1])
    return batch if lists.shape[0] > 1 else 0, lax.div(head, each)


class _Place(NamedTuple):
    """Where a piece of logits lies, and which of its axes are the queries."""

    batch: jax.Array
    head: jax.Array
    q_start: jax.Array
    kv_start: jax.Array
    q_axis: int
    shape: tuple[int, ...]

    def index(self, axis: int, start: jax.Array) -> jax.Array:
        return lax.broadcasted_iota(jnp.int32, self.shape, axis) + start

    def reader(self, ref: Any) -> Callable[[], jax.Array]:
        """Gives an array [batch | 1, heads | 1, q_len | 1, kv_len | 1] in the logits' shape."""
        starts, axes = (self.q_start, self.kv_start), (self.q_axis, 1 - self.q_axis)
        full = [axis for axis, size in zip(axes, ref.shape[2:], strict=True) if size > 1]
        at = tuple(
            index if size > 1 else 0
            for index, size in zip((self.batch, self.head), ref.shape, strict=False)
        )
        tokens = tuple(
            pl.ds(start, self.shape[axis]) if axis in full else 0
            for start, axis in zip(starts, axes, strict=True)
        )

        tile = ref[*at, *tokens]
        tile = lax.broadcast_in_dim(tile.T if full == [1, 0] else tile, self.shape, sorted(full))
        return lambda: tile


def _arguments(raw: jax.Array, scale: float | None, place: _Place, value_refs: Any) -> tuple:
    """What a rule is called with."""
    return (
        raw if scale is None else raw * scale,
        place.index(place.q_axis, place.q_start),
        place.index(1 - place.q_axis, place.kv_start),
        tuple(map(place.reader, value_refs)),
    )


def _logits(raw: jax.Array, tiles: Tiles, place: _Place, value_refs: Any):
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


def _summed(value: jax.Array) -> bool:
    """Whether a value has a gradient that a kernel sums: an f32 for a token, not for a pair."""
    return jnp.issubdtype(value.dtype, jnp.floating) and 1 in value.shape[2:]


def _split(refs: Sequence[Any], values: int) -> tuple[Any, ...]:
    return refs[:values], *refs[values:]
