"""Numerics, then timings, of kinds of attention on this machine's GPU, against the tile kernel.

    python3 -m benchmarks.gpu_kin            # writes benchmarks/results/gpu_kin_<device>.json
    python3 -m benchmarks.gpu_kin --dry-run  # tiny sizes on any machine, to try the script itself

Needs no network and no installation, as `benchmarks.gpu`. Every implementation that takes a kind is
held to the reference, output and gradients, on fewer tokens, and only then timed. Beside its rate
stands that of 128 x 128 tiles at random which have as many pairs, timed in the same run, and what
the roofline expects at best. Routed queries are compared with dense causal attention by cuDNN at
the setting of FlashMoBA's figures (README: head dim 128, 16 heads, batch 2; blocks of 128, 8 of
them per query; up to 14.7 times as fast as FlashAttention-2), decoding over pages with a copy of an
array that no cache holds.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

# first: it says to jax what has to be said before that is loaded
from benchmarks import gpu  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np

import jsparse as js
from benchmarks import gpu_peers, roofline
from benchmarks.random_plans import random_groups, random_lists, skip, skipped
from jsparse.attention.pyramid import level_tiles
from jsparse.attention.tuning import milliseconds
from jsparse.core.pooling import mean_blocks

BLOCK = 128
DENSITY = 1 / 8
DTYPE = "bfloat16"


class Run(NamedTuple):
    """What the command line chose.

    Attributes:
      implementations: Those that are timed, where they take a kind.
      check_length: Tokens on which each is held to the reference.
      length: Tokens on which it is timed.
      routed_length: Tokens of routed queries, which FlashMoBA's figures have more of.
      dim: Width of heads.
      batch: Sequences that decode.
      copied: Bytes of the copied array.
      milliseconds: About how long each is timed.
    """

    implementations: tuple[str, ...]
    check_length: int
    length: int
    routed_length: int
    dim: int
    batch: int
    copied: int
    milliseconds: float


FULL = Run(("mosaic", "triton"), 2048, 16384, 65536, 128, 64, 2**31, 200.0)
DRY = Run(("xla",), 256, 256, 256, 32, 2, 2**16, 0.0)


class Kernel(NamedTuple):
    """One kind of attention, made for some length.

    Attributes:
      arrays: What it is computed of; the first `differentiable` of these have gradients.
      compute: `compute(implementation, *arrays)` gives the output.
      work: Of each kernel of the forward pass and the gradients, as far as it is known.
      flops: Of the products that count.
      differentiable: How many arrays have gradients.
      peer: `peer(run, row)` adds what the kind is compared with to a row that has its times.
    """

    arrays: tuple[Any, ...]
    compute: Callable[..., jax.Array]
    work: dict[str, roofline.Work]
    flops: float
    peer: Callable[[Run, dict[str, Any]], None]
    differentiable: int = 3


class Case(NamedTuple):
    """What is timed.

    Attributes:
      name: Of its row.
      make: `make(run, length)` makes the kernel.
      length: Which of a run's lengths it is timed on.
    """

    name: str
    make: Callable[[Run, int], Kernel]
    length: Callable[[Run], int] = lambda run: run.length


def operands(
    length: int, heads: int, kv_heads: int, dim: int, batch: int = 1
) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(
        jax.random.normal(key, (batch, length, n, dim), jnp.dtype(DTYPE))
        for key, n in zip(keys, (heads, kv_heads, kv_heads), strict=True)
    )


def problem(run: Run, plan: js.BlockMask, heads: int, kv_heads: int) -> roofline.Problem:
    """What the roofline wants to know of attention to a list of tiles."""
    tiles = float(np.asarray(plan.kv_num_blocks).sum()) * heads / plan.list_heads
    lengths = plan.q_len, plan.kv_len
    sizes = heads, kv_heads, *lengths, run.dim, run.dim, tiles, plan.block_q, plan.block_kv
    return roofline.Problem(*sizes)


def of_tiles(heads: int, kv_heads: int, length: int, flops: float) -> Callable[..., None]:
    """Compares with 128 x 128 tiles at random, with as many pairs."""

    def peer(run: Run, row: dict[str, Any]) -> None:
        pairs = flops / (4.0 * run.dim)
        plan = gpu.random_plan(length, heads, min(1.0, pairs / (heads * length**2)))
        own = problem(run, plan, heads, kv_heads)
        q, k, v = operands(length, heads, kv_heads, run.dim)
        name = run.implementations[0]
        tiles = jax.jit(lambda *x: js.attend(*x, implementation=name))
        ms = milliseconds(lambda: tiles(q, k, v, plan), jax.block_until_ready, run.milliseconds)
        rate = roofline.forward(own).flops / ms / 1e9
        row["tiles"] = {"ms": ms, "tflops": rate}
        for times in row["times"].values():
            if "tflops" in times:
                times["of_tiles"] = times["tflops"] / rate

    return peer


def listed(
    heads: int,
    kv_heads: int,
    lists: Callable[[int, float], js.BlockMask],
    work: Callable[[roofline.Problem], dict[str, roofline.Work]],
    run: Run,
    length: int,
) -> Kernel:
    """Attention to lists at random."""
    plan = lists(length, DENSITY)
    own = problem(run, plan, heads, kv_heads)
    flops = roofline.forward(own).flops
    return Kernel(
        (*operands(length, heads, kv_heads, run.dim), plan),
        lambda name, q, k, v, plan: js.attend(q, k, v, plan, implementation=name),
        work(own),
        flops,
        of_tiles(heads, kv_heads, length, flops),
    )


def packed(kv_heads: int, own: roofline.Problem) -> dict[str, roofline.Work]:
    """The heads of a group are the rows of one tile."""
    group = own.heads // kv_heads
    return roofline.kernels_of_short_tiles(
        own._replace(
            heads=kv_heads,
            q_len=own.q_len * group,
            tiles=own.tiles / group,
            block_q=own.block_q * group,
        )
    )


def rows(group: int) -> Case:
    """Single queries, of which a group of heads shares a list of blocks of 64 keys."""
    heads, kv_heads = 4 * group, 4
    lists = random_lists(1, 64, kv_heads)
    make = partial(listed, heads, kv_heads, lists, partial(packed, kv_heads))
    return Case(f"rows of {group} heads", make)


def tokens(group: int) -> Case:
    """Single queries, of which a group of heads shares a list of tokens."""
    heads, kv_heads = 4 * group, 4
    lists = random_lists(1, 1, kv_heads)
    make = partial(listed, heads, kv_heads, lists, partial(packed, kv_heads))
    return Case(f"tokens of {group} heads", make)


def latents(run: Run, length: int) -> Kernel:
    """Single queries to listed tokens, whose latents are key and value of all heads."""
    heads, dim = 16, 576
    plan = random_lists(1, 1, 1)(length, DENSITY)
    q, k, _ = operands(length, heads, 1, dim)
    own = problem(run, plan, heads, 1)._replace(dim=dim, v_dim=dim)
    return Kernel(
        (q, k, plan),
        lambda name, q, k, plan: js.attend(q, k, k, plan, implementation=name),
        packed(1, own),
        roofline.forward(own).flops,
        lambda run, row: None,
        differentiable=2,
    )


def routed(run: Run, length: int) -> Kernel:
    """Each query and head to 8 blocks by FlashMoBA's router, against dense causal attention."""
    batch, heads = 2, 16
    q, k, v = operands(length, heads, heads, run.dim, batch)
    method, mask = js.flashmoba(block_kv=BLOCK, top_k=8), js.masks.causal()
    plan = jax.jit(lambda q, k: method.plan((), q, k, mask=mask)[0])
    tiles = plan(q, k)
    entries = float(np.asarray(tiles.kv_num_blocks).sum())
    # a causal mask leaves half of each query's own block
    own = roofline.Problem(
        *(batch * heads, batch * heads, length, length, run.dim, run.dim),
        *(entries - batch * heads * length / 2, 1, BLOCK),
    )

    def peer(run: Run, row: dict[str, Any]) -> None:
        row["plan_ms"] = milliseconds(lambda: plan(q, k), jax.block_until_ready, run.milliseconds)
        dense = gpu_peers.jax_cudnn(q, k, v, causal=True)
        row["dense_ms"] = milliseconds(dense, jax.block_until_ready, run.milliseconds)
        for times in row["times"].values():
            if "ms" in times:
                times["over_dense"] = row["dense_ms"] / times["ms"]
                times["over_dense_with_plan"] = row["dense_ms"] / (times["ms"] + row["plan_ms"])

    return Kernel(
        (q, k, v, tiles),
        lambda name, q, k, v, tiles: js.attend(q, k, v, tiles, mask=mask, implementation=name),
        roofline.gathered_queries(own),
        roofline.forward(own).flops,
        peer,
    )


def pooled(run: Run, length: int) -> Kernel:
    """Tiles at random, and a mean key and value for each block that is left out."""
    heads, kv_heads = 16, 4
    lists = gpu.random_plan(length, heads, DENSITY)
    exact = problem(run, lists, heads, kv_heads)
    # the columns of all blocks, of which few are listed
    blocks = length // BLOCK
    means = exact._replace(
        kv_len=blocks, block_kv=blocks, tiles=heads * length / BLOCK, masked=True
    )
    work = {
        **roofline.kernels(exact),
        **{f"{name} of columns": x for name, x in roofline.kernels(means).items()},
        "merging": roofline.merging(exact, 2),
    }
    flops = roofline.forward(exact).flops + roofline.forward(means).flops

    def compute(name, q, k, v, lists):
        count = jnp.full((1, blocks, kv_heads), np.log(BLOCK), jnp.float32)
        summaries = (mean_blocks(x, BLOCK).astype(x.dtype) for x in (k, v))
        plan = js.BlockPyramid.from_pooled(lists, *summaries, count)
        return js.attend(q, k, v, plan, implementation=name)

    arrays = *operands(length, heads, kv_heads, run.dim), lists
    return Kernel(arrays, compute, work, flops, of_tiles(heads, kv_heads, length, flops))


def levels(run: Run, length: int) -> Kernel:
    """Tiles at random, as many exact as of means of two, of four and of eight keys."""
    heads, kv_heads, top_level = 16, 4, 3
    lists = gpu.random_plan(length, heads, DENSITY)
    drawn = np.random.default_rng(1).integers(0, top_level + 1, lists.kv_indices.shape)
    plan = js.BlockPyramid.from_levels(lists, jnp.asarray(drawn), top_level=top_level)
    own = problem(run, level_tiles(plan), heads, kv_heads)._replace(masked=True)
    flops = roofline.forward(own).flops
    return Kernel(
        (*operands(length, heads, kv_heads, run.dim), plan),
        lambda name, q, k, v, plan: js.attend(q, k, v, plan, implementation=name),
        roofline.kernels(own),
        flops,
        of_tiles(heads, kv_heads, length, flops),
    )


def skipping(run: Run, length: int) -> Kernel:
    """Tiles of which three of four are skipped on the way, against all of them."""
    heads = 16
    data = skipped(4.0, run.dim)(length, DENSITY)
    q, k, v = operands(length, heads, heads, run.dim)
    kept = jax.jit(lambda *x: skip(*x, None)[2])(q, k, v, data)
    own = problem(run, kept, heads, heads)
    every = problem(run, data.lists, heads, heads)

    def peer(run: Run, row: dict[str, Any]) -> None:
        row["kept"] = own.tiles / every.tiles
        for name, times in row["times"].items():
            if "ms" in times:
                whole = jax.jit(
                    lambda *x, name=name: js.attend(*x, data.lists, implementation=name)
                )
                wait = jax.block_until_ready
                all_ms = milliseconds(lambda whole=whole: whole(q, k, v), wait, run.milliseconds)
                times["all_ms"], times["of_all"] = all_ms, times["ms"] / all_ms

    work = {**roofline.kernels(own), "forward": roofline.skipping(own, every.tiles)}
    return Kernel(
        (q, k, v, data), lambda name, *x: skip(*x, name)[0], work, work["forward"].flops, peer
    )


def decoding(run: Run, length: int) -> Kernel:
    """A query of each sequence, to pages that each kv head selects, against a copy."""
    heads, kv_heads, page = 32, 8, 64
    batch, width = run.batch, length // page
    rng = np.random.default_rng(0)
    pool = operands(batch * length, heads, kv_heads, run.dim)[1:]
    k, v = (x.reshape(batch * width, page, kv_heads, run.dim) for x in pool)
    table = jnp.asarray(rng.permutation(batch * width).reshape(batch, width), jnp.int32)
    lengths = jnp.full(batch, length, jnp.int32)
    plan = random_lists(1, page, batch * kv_heads)(length, DENSITY)
    entries = plan.kv_indices[0, :, 0].reshape(batch, kv_heads, 1, -1)
    counts = jnp.full(entries.shape[:-1], entries.shape[-1])
    q = operands(batch, heads, kv_heads, run.dim)[0].reshape(batch, 1, heads, run.dim)
    pages = float(entries.size)

    def compute(name, q, k, v, table, lengths, entries, counts):
        cache = js.PagedKV.from_table(k, v, table, lengths)
        sizes = {"q_len": 1, "kv_len": cache.kv_len, "block_q": 1, "block_kv": page}
        plan = js.BlockMask.from_lists(entries, counts, **sizes)
        return js.attend_paged(q, cache, plan, implementation=name)

    selected = pages * page * 2 * run.dim * jnp.dtype(DTYPE).itemsize

    def peer(run: Run, row: dict[str, Any]) -> None:
        row["selected_mbyte"] = selected / 1e6
        row["copy_gbyte_per_second"] = copying = copy_rate(run)
        for times in row["times"].values():
            if "ms" in times:
                times["gbyte_per_second"] = selected / times["ms"] / 1e6
                times["of_copy"] = times["gbyte_per_second"] / copying

    group, lists = heads // kv_heads, batch * kv_heads
    sizes = lists, lists, group, length, run.dim, run.dim, pages, group, page
    own = roofline.Problem(*sizes)
    work = {"forward": roofline.kernels_of_short_tiles(own)["forward"]}
    arrays = q, k, v, table, lengths, entries, counts
    return Kernel(arrays, compute, work, roofline.forward(own).flops, peer, differentiable=0)


def copy_rate(run: Run) -> float:
    """Gigabytes that are read and written per second where an array is copied."""
    x = jnp.zeros(run.copied // 4, jnp.float32)
    # a copy that changes nothing would be none
    copy = jax.jit(jnp.negative)
    ms = milliseconds(lambda: copy(x), jax.block_until_ready, run.milliseconds)
    return 2 * run.copied / ms / 1e6


def groups(size: int) -> Case:
    """Groups of so many tokens, which stand anywhere."""

    def make(run: Run, length: int) -> Kernel:
        heads = 16
        plan = random_groups(length, size / length)
        q_counts, kv_counts = (
            np.diff(np.asarray(x, np.float64)) for x in (plan.q_offsets, plan.kv_offsets)
        )
        pairs = heads * float((q_counts * kv_counts).sum())
        flops = 4.0 * pairs * run.dim
        # as if groups were tiles
        sizes = heads, heads, length, length, run.dim, run.dim, pairs / size**2, size, size
        return Kernel(
            (*operands(length, heads, heads, run.dim), plan),
            lambda name, q, k, v, plan: js.attend(q, k, v, plan, implementation=name),
            roofline.kernels(roofline.Problem(*sizes, masked=True)),
            flops,
            of_tiles(heads, heads, length, flops),
        )

    return Case(f"groups of {size} tokens", make)


CASES = (
    Case(
        "gathered columns",
        partial(listed, 16, 4, random_lists(BLOCK, 1, 16), roofline.gathered_columns),
    ),
    rows(4),
    rows(16),
    tokens(1),
    tokens(8),
    Case("latents of listed tokens", latents),
    Case("routed queries", routed, lambda run: run.routed_length),
    Case("pooled columns", pooled),
    Case("levels", levels),
    Case("three of four tiles skipped", skipping),
    Case("decoding over pages", decoding),
    groups(512),
    groups(16),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="time only cases whose name has this in it")
    arguments, output = gpu.arguments_of(parser, "gpu_kin")
    run = DRY if arguments.dry_run else FULL
    record: dict[str, Any] = {"machine": gpu.machine(), "kin": []}
    for case in CASES:
        if arguments.only in case.name:
            row = {"kind": case.name, **gpu.attempt(timings, run, case)}
            record["kin"].append(row)
            print(summary(row), flush=True)
            # after every case, so that a run that is cut off leaves what it had
            output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {output}")
    return 1 if any(failed(row) for row in record["kin"]) else 0


def failed(row: dict[str, Any]) -> bool:
    """Whether a case, or one of its implementations, gave an error; being refused is none."""
    entries = [row, *row.get("times", {}).values()]
    return any("error" in entry for entry in entries) or not any("ms" in x for x in entries[1:])


def timings(run: Run, case: Case) -> dict[str, Any]:
    """One row: times of every implementation that takes the case and is right, and of its peer."""
    small = case.make(run, run.check_length)
    right = {
        name: gpu.attempt(partial(refused_or, numerics, small), name)
        for name in run.implementations
    }
    length = case.length(run)
    kernel = small if length == run.check_length else case.make(run, length)
    row: dict[str, Any] = {
        "length": length,
        "gflop": kernel.flops / 1e9,
        "roofline": gpu.expected(kernel.work),
        "times": {},
    }
    for name, found in right.items():
        timed = {}
        if "difference" in found:
            timed = gpu.attempt(partial(refused_or, times_of, run, kernel), name)
        row["times"][name] = {**found, **timed}
    kernel.peer(run, row)
    return row


def refused_or(measure: Callable[..., dict[str, Any]], *what: Any) -> dict[str, Any]:
    """What an implementation cannot do is said, and is no error."""
    try:
        return measure(*what)
    except NotImplementedError as reason:
        return {"refused": str(reason)[:300]}


def everything(kernel: Kernel, name: str) -> Callable[..., Any]:
    """The output, and its gradients where it has some."""
    if not kernel.differentiable:
        return jax.jit(lambda *arrays: ((), kernel.compute(name, *arrays)))

    def loss(*arrays):
        out = kernel.compute(name, *arrays)
        return jnp.square(out.astype(jnp.float32)).sum(), out

    return jax.jit(jax.grad(loss, argnums=tuple(range(kernel.differentiable)), has_aux=True))


def numerics(kernel: Kernel, name: str) -> dict[str, Any]:
    """By how much output and gradients differ from the reference's in f32 on the same inputs.

    Raises:
      ArithmeticError: if that is more than rounding to 16 bits.
    """
    gradients, out = everything(kernel, name)(*kernel.arrays)

    def wide(x):
        floats = isinstance(x, jax.Array) and x.dtype == jnp.dtype(DTYPE)
        return x.astype(jnp.float32) if floats else x

    with jax.default_matmul_precision("highest"):
        arrays = jax.tree.map(wide, kernel.arrays)
        want_gradients, want = everything(kernel, "reference")(*arrays)
    difference = _difference(out, want)
    of_gradients = [_difference(*pair) for pair in zip(gradients, want_gradients, strict=True)]
    limit = gpu.TOLERANCE[DTYPE]
    if not (difference < limit and all(x < 2 * limit for x in of_gradients)):
        raise ArithmeticError(f"differs by {difference:.1e}, gradients by {of_gradients}")
    return {"difference": difference, "gradients": of_gradients}


def _difference(ours: jax.Array, theirs: jax.Array) -> float:
    a, b = (np.asarray(x.astype(jnp.float32), np.float64) for x in (ours, theirs))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def times_of(run: Run, kernel: Kernel, name: str) -> dict[str, Any]:
    """Milliseconds of the output, of it with its gradients, and the rate of the former."""
    forward = jax.jit(partial(kernel.compute, name))
    ms = milliseconds(lambda: forward(*kernel.arrays), jax.block_until_ready, run.milliseconds)
    found = {"ms": ms, "tflops": kernel.flops / ms / 1e9}
    if kernel.differentiable:
        both = everything(kernel, name)
        found["forward_and_gradients_ms"] = milliseconds(
            lambda: both(*kernel.arrays), jax.block_until_ready, run.milliseconds
        )
    return found


def summary(row: dict[str, Any]) -> str:
    """One line of the log."""
    if "times" not in row:
        return f"failed: {row}"
    parts = []
    for name, times in row["times"].items():
        if "ms" not in times:
            parts.append(f"{name}: {times.get('refused') or times}")
            continue
        shares = ("of_tiles", "over_dense", "of_all", "of_copy")
        said = (f"{key} {times[key]:.2f}" for key in shares if key in times)
        parts.append(f"{name} {times['ms']:.3f} ms, {', '.join(said)}")
    at_best = [x["expected_ms"] for key, x in row["roofline"].items() if key.startswith("forward")]
    best = "" if None in at_best else f"; {sum(at_best):.3f} ms at best"
    return f"{row['kind']}, T {row['length']}: {'; '.join(parts)}{best}"


if __name__ == "__main__":
    sys.exit(main())
