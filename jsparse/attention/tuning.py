"""Times configurations of the Mosaic kernels on this machine, each checked before it is timed."""

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jsparse import checks
from jsparse.attention import block_sparse, whole_tiles
from jsparse.attention import mosaic as adapter
from jsparse.attention.logits import LogitRule
from jsparse.types import BlockMask, InverseList
from pallas_kernels import _compat as kernels
from pallas_kernels import configurations
from pallas_kernels.block_sparse_attention import walk
from pallas_kernels.block_sparse_attention.chip import Forward, Problem, Tunable
from pallas_kernels.block_sparse_attention.logits import LOG2_E, Rule, Tiles
from pallas_kernels.configurations import Entry, Key
from pallas_kernels.ring import LANES

# share of the norm by which two results may differ: each rounds its probabilities and its output,
# by half a unit of the dtype each
TOLERANCE = {"bfloat16": 2.0**-7, "float16": 2.0**-10}


class Sizes(NamedTuple):
    """What a problem is timed on.

    Attributes:
      heads: Query heads.
      kv_heads: Heads of k and v.
      length: Tokens.
      density: Share of the tiles that is computed.
    """

    heads: int = 16
    kv_heads: int = 4
    length: int = 8192
    density: float = 0.25


class Shape(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
      dtype: "bfloat16" or "float16".
      dim: Width of q and k, a multiple of 64.
      v_dim: Width of v, a multiple of 64.
      block_q: Queries per tile.
      block_kv: Keys per tile.
    """

    dtype: str = "bfloat16"
    dim: int = 128
    v_dim: int = 128
    block_q: int = 128
    block_kv: int = 128


class Job(NamedTuple):
    """A kernel to tune.

    Attributes:
      key: What its configuration is chosen by.
      sizes: The problem it is timed on.
      candidates: Its configurations, the default first.
      prepare: Makes its inputs, and what gives for a configuration a call on them.
    """

    key: Key
    sizes: Sizes
    candidates: tuple[Any, ...]
    prepare: Callable[[], Callable[[Any], Callable[[], Any]]]


class Timing(NamedTuple):
    """What became of one configuration.

    Attributes:
      entry: All that is known of its kernel by now.
      config: Its fields.
      ms: Median milliseconds, None if it failed.
      failed: Why it failed, None if it did not.
      kept: Whether an earlier run had timed it.
    """

    entry: Entry
    config: dict[str, Any]
    ms: float | None
    failed: str | None
    kept: bool


class Effort(NamedTuple):
    """How a run is timed, and what surrounds each configuration.

    Attributes:
      milliseconds: About how long one configuration is timed.
      rounds: Batches of calls whose median counts.
      most: At most so many configurations of a kernel, or all.
      surrounding: Makes the context that each is compiled and run in.
    """

    milliseconds: float = 200.0
    rounds: int = 10
    most: int | None = None
    surrounding: Callable[[], Any] = contextlib.nullcontext


FULL = Effort()
# the interpreter takes seconds where the chip takes microseconds: once each, at sizes of one tile
DRY = Effort(0.0, 1, 2, lambda: kernels.interpreter(detect_races=False))
DRY_SIZES = Sizes(heads=1, kv_heads=1, length=64, density=0.5)
DRY_SHAPE = Shape(dim=64, v_dim=64, block_q=64, block_kv=64)


def device_check() -> None:
    """A device of the kernels is there.

    Raises:
      NotImplementedError: if it is not.
    """
    reason = adapter.device_refusal()
    checks.tunable("This machine", reason and f"{reason} --dry-run tries the command without one.")


def jobs(shapes: Sequence[Shape], sizes: Sizes, effort: Effort = FULL) -> list[Job]:
    """Lists the kernels to tune: forward, and backward where it takes the shape.

    Each with and without a rule that changes logits, for that takes registers.

    Raises:
      ValueError: if sizes do not fit each other.
      NotImplementedError: if the kernels cannot take a shape.
    """
    checks.positive(heads=sizes.heads, kv_heads=sizes.kv_heads, length=sizes.length)
    checks.multiple(of=sizes.kv_heads, heads=sizes.heads)
    checks.fractions(density=sizes.density)
    with effort.surrounding():
        device, chip = configurations.device_kind(), adapter.chip()
    found = []
    for shape in dict.fromkeys(shapes):
        widths = shape.block_q, shape.block_kv, shape.dim, shape.v_dim
        checks.multiple(of=LANES, dim=shape.dim, v_dim=shape.v_dim)
        checks.tunable(f"{shape}", chip.forward.refusal(shape.dtype, *widths))
        checks.multiple(of=shape.block_q, length=sizes.length)
        checks.multiple(of=shape.block_kv, length=sizes.length)
        for kernel in _kernels(chip):
            if kernel.refusal(shape.dtype, *widths):
                continue
            candidates = kernel.candidates(*widths)[: effort.most]
            key = Key(kernel.operation, kernel.masked, device, *shape)
            prepare = functools.partial(_prepare, chip.forward, kernel, shape, sizes)
            found.append(Job(key, sizes, candidates, prepare))
    return found


def tune(
    jobs: Sequence[Job], path: Path | None, *, again: bool = False, effort: Effort = FULL
) -> Iterator[Timing]:
    """Times every configuration of every job, one at a time, and keeps what is found in a file.

    A configuration is timed only after its result agreed with that of the default; one that fails
    is passed over. The file is written after each, so that a run that was stopped goes on.

    Args:
      jobs: What to time.
      path: The file; what it holds of other keys is kept. None keeps nothing.
      again: Whether to time also what the file has already.
      effort: How each is timed.

    Raises:
      ValueError: if the file cannot be written, or holds something else.
    """
    entries = _kept(path)
    for job in jobs:
        problem = job.sizes._asdict()
        fresh = Entry(job.key, jax.__version__, problem)
        entry = entries.get(job.key, fresh)
        first = [row["config"] for row in entry.candidates[:1]]
        same = entry.jax == fresh.jax and entry.problem == problem
        if again or not same or first != [dataclasses.asdict(job.candidates[0])]:
            entry = fresh
        entries[job.key] = entry
        # inputs live as long as they are needed, and not at all where nothing is left to time
        job = job._replace(prepare=functools.cache(job.prepare))
        known = {tuple(row["config"].items()): row for row in entry.candidates}
        expected = None
        for config in job.candidates:
            fields = dataclasses.asdict(config)
            row = known.get(tuple(fields.items()))
            kept = row is not None
            if row is None:
                found, expected = _timed(job, config, expected, effort)
                row = {"config": fields, **found}
                entry.candidates.append(row)
                _keep(path, entries)
            yield Timing(entry, fields, row.get("ms"), row.get("failed"), kept)


def milliseconds(
    call: Callable[[], Any], wait: Callable[[Any], Any], budget: float, rounds: int = 10
) -> float:
    """Median time of one call; launches are queued in batches, so that gaps do not count.

    Args:
      call: What is timed.
      wait: Waits for what a call returned.
      budget: About how many milliseconds all batches take; 0 makes each a single call.
      rounds: How many batches.
    """
    wait(call())
    batch = 1
    if budget:
        start = time.perf_counter()
        wait(call())
        once = (time.perf_counter() - start) * 1e3
        batch = max(1, int(budget / rounds / max(once, 1e-3)))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        out = None
        for _ in range(batch):
            out = call()
        wait(out)
        times.append((time.perf_counter() - start) * 1e3 / batch)
    return statistics.median(times)


def _kept(path: Path | None) -> dict[Key, Entry]:
    if path is None or not path.exists():
        return {}
    try:
        return configurations.read(path)
    except (OSError, ValueError) as error:
        checks.tuned_file(path, error)
        raise


def _keep(path: Path | None, entries: dict[Key, Entry]) -> None:
    if path is None:
        return
    try:
        configurations.write(path, entries.values())
    except OSError as error:
        checks.writable(path, error)
    configurations.forget()


def _timed(
    job: Job, config: Any, expected: list[np.ndarray] | None, effort: Effort
) -> tuple[dict[str, Any], list[np.ndarray] | None]:
    """The time of a configuration, or why it has none, and what the default computes."""
    default = job.candidates[0]
    try:
        with effort.surrounding():
            if expected is None and config != default:
                expected = _arrays(job.prepare()(default)())
            call = job.prepare()(config)
            got = _arrays(call())
            expected = expected or got
            errors = [
                float(np.linalg.norm(a - b) / np.linalg.norm(b))
                for a, b in zip(got, expected, strict=True)
            ]
            # written so that what is not a number is wrong too
            if not all(error <= TOLERANCE[job.key.dtype] for error in errors):
                return {"failed": f"its result is off by {max(errors):.1e} of its norm"}, expected
            wait = jax.block_until_ready
            ms = milliseconds(call, wait, effort.milliseconds, effort.rounds)
            return {"ms": ms}, expected
    except Exception as error:  # a compiler's errors are of many classes
        return {"failed": f"{type(error).__name__}: {str(error)[:200]}"}, expected


def _arrays(outputs: Any) -> list[np.ndarray]:
    return [np.asarray(x, np.float32) for x in jax.tree.leaves(outputs)]


def _causal(logits, q_index, kv_index, row_values, column_values):
    return jnp.where(q_index >= kv_index, logits, -jnp.inf)


class _Inputs(NamedTuple):
    """Arrays of a problem, as the kernels of both directions read them."""

    problem: Problem
    lists: walk.Lists
    inverse: walk.Lists


class _Kernel(NamedTuple):
    """A kernel that has configurations.

    Attributes:
      operation: As in its key.
      masked: Whether it runs with a causal mask, applied in every tile.
      backward: Whether its inputs hold what a forward pass left.
      refusal: Why it cannot take a dtype, block_q, block_kv, dim and v_dim, or None.
      candidates: Its configurations for block_q, block_kv, dim and v_dim.
      call: `call(inputs, tiles, config)`.
    """

    operation: str
    masked: bool
    backward: bool
    refusal: Callable[..., str | None]
    candidates: Callable[..., tuple[Any, ...]]
    call: Callable[..., Any]


def _forwards(forward: Forward) -> Iterator[_Kernel]:
    def call(inputs: _Inputs, tiles: Tiles, config: Any) -> Any:
        return forward(*inputs.problem[:3], inputs.lists, tiles, config=config)

    for masked in (False, True):
        yield _Kernel("forward", masked, False, forward.refusal, forward.candidates, call)


def _skipping(forward: Forward) -> Iterator[_Kernel]:
    """The kernel that skips tiles on the way, at work where it skips none."""

    def call(inputs: _Inputs, tiles: Tiles, config: Any) -> Any:
        q, k, v = inputs.problem[:3]
        limits = jnp.full((q.shape[0], q.shape[2], q.shape[1]), -jnp.inf, jnp.float32)
        # what it says of entries is not written where there are none
        return forward(q, k, v, inputs.lists, tiles, limits, config=config)[:2]

    for masked in (False, True):
        yield _Kernel("skipping", masked, False, forward.refusal, forward.candidates, call)


def _backwards(chip: adapter.Chip, kernels: Tunable) -> Iterator[_Kernel]:
    def refusal(dtype: str, *sizes: int) -> str | None:
        return chip.backward.refusal(*sizes)

    def d_queries(inputs: _Inputs, tiles: Tiles, config: Any) -> Any:
        return kernels.d_queries(inputs.problem, inputs.lists, tiles, config)

    def d_keys(**wanted: bool) -> Callable[..., Any]:
        def call(inputs: _Inputs, tiles: Tiles, config: Any) -> Any:
            return kernels.d_keys(inputs.problem, inputs.inverse, tiles, config, **wanted)

        return call

    def own_keys(block_q: int, block_kv: int, dim: int, v_dim: int) -> tuple[Any, ...]:
        return kernels.candidates(block_kv, block_q, dim, v_dim)

    for masked in (False, True):
        yield _Kernel("d_q", masked, True, refusal, kernels.candidates, d_queries)
        yield _Kernel("d_k_d_v", masked, True, refusal, own_keys, d_keys())
    # with some rules, one gradient per pass over keys
    yield _Kernel("d_k", True, True, refusal, own_keys, d_keys(with_v=False))
    yield _Kernel("d_v", True, True, refusal, own_keys, d_keys(with_k=False))


def _kernels(chip: adapter.Chip) -> Iterator[_Kernel]:
    """What attention and its gradient call, and what can be laid out in more than one way."""
    yield from _forwards(chip.forward)
    if chip.backward.tunable:
        yield from _backwards(chip, chip.backward.tunable)
    if chip.skipping:
        yield from _skipping(chip.skipping)


def _prepare(
    forward: Forward, kernel: _Kernel, shape: Shape, sizes: Sizes
) -> Callable[[Any], Callable[[], Any]]:
    """Gives, for a configuration, a call that runs the kernel with it on the same inputs."""
    mask = Rule(_causal) if kernel.masked else None
    tiles = Tiles(shape.block_q, shape.block_kv, shape.dim**-0.5, mask=mask)
    inputs = _inputs(forward if kernel.backward else None, shape, sizes, tiles)

    def run(config: Any) -> Callable[[], Any]:
        compiled = jax.jit(lambda inputs: kernel.call(inputs, tiles, config))
        return lambda: compiled(inputs)

    return run


def _inputs(forward: Forward | None, shape: Shape, sizes: Sizes, tiles: Tiles) -> _Inputs:
    """Those of kernels; `forward` leaves what the backward ones want besides."""
    widths = (sizes.heads, shape.dim), (sizes.kv_heads, shape.dim), (sizes.kv_heads, shape.v_dim)
    *keys, last = jax.random.split(jax.random.key(0), 4)
    q, k, v = (
        jax.random.normal(key, (1, sizes.length, *width), jnp.dtype(shape.dtype))
        for key, width in zip(keys, widths, strict=True)
    )
    rng = np.random.default_rng(0)
    rows, columns = sizes.length // shape.block_q, sizes.length // shape.block_kv
    rank = rng.random((sizes.heads, rows, columns)).argsort(-1).argsort(-1)
    chosen = rank < max(1, round(sizes.density * columns))
    # every query sees itself, so that no row of a causal run is empty
    row = np.arange(rows)
    chosen[:, row, row * shape.block_q // shape.block_kv] = True
    plan = BlockMask.from_dense(
        jnp.asarray(chosen),
        q_len=sizes.length,
        kv_len=sizes.length,
        block_q=shape.block_q,
        block_kv=shape.block_kv,
    )
    rule = LogitRule(sizes.length, sizes.length, tiles.scale, None, None)
    layout = block_sparse.Sizes(
        1,
        sizes.heads,
        sizes.kv_heads,
        shape.block_q,
        shape.block_kv,
        rows,
        columns,
        ragged=False,
    )
    inverse = plan.inverse()
    lists = block_sparse.Lists(plan.kv_indices[None], plan.kv_num_blocks[None], None)
    inverse = InverseList(inverse.q_indices[None], inverse.offsets[None])
    ways = (
        whole_tiles.by_query(lists, rule, layout),
        whole_tiles.by_key(inverse, None, rule, layout),
    )
    if tiles.mask:
        # no tile is called whole, so that the mask is at work in all
        ways = tuple(way._replace(whole=way.first) for way in ways)
    inputs = _Inputs(Problem(q, k, v, v, q, q), *ways)
    if forward is None:
        return inputs
    config = forward.default_config(tiles, shape.dim, shape.v_dim)
    run = jax.jit(lambda q, k, v, lists: forward(q, k, v, lists, tiles, config=config))
    out, lse = run(q, k, v, inputs.lists)
    d_out = jax.random.normal(last, out.shape, out.dtype)
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    return inputs._replace(
        problem=inputs.problem._replace(d_out=d_out, lse2=lse * LOG2_E, delta=delta)
    )
