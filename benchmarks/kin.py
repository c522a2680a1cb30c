"""Times kinds of attention on this CPU that come down to lists of tiles, and what they reserve.

    python -m benchmarks.kin           # some minutes
    python -m benchmarks.kin --quick   # one density, two lengths, writes nothing

Each is timed at 8192 tokens from 2 to 50 percent of all pairs, and from 2048 to 65536 tokens at 256
keys per query. Time ought to be in proportion to the work, which is what a number per computed pair
shows; memory, which XLA says without running anything, ought to grow as the tokens do. What has
parts with a softmax each, as pooled columns have, says what merging these takes. Each is checked
against the dense reference before it is timed. What an H200 would take at the very best follows
from `benchmarks.roofline`.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jsparse as js
from benchmarks import roofline
from benchmarks.attention import machine
from jsparse.evaluation.cost import tile_lists

RESULTS = Path(__file__).parent / "results" / "kin_cpu.json"
HEADS, DIM, BLOCK = 2, 64, 128
LENGTH, KEYS = 8192, 256
DENSITIES = (0.02, 0.05, 0.1, 0.25, 0.5)
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)
# half a unit of f32 for each of as many terms as the check has tokens, at random, in another order
CHECKED, TOLERANCE = 1024, 2.0**-18
GPU = roofline.DEVICES["NVIDIA H200"]


class Case(NamedTuple):
    """A kind of attention.

    Attributes:
      name: Of its rows.
      data: `data(length, density)` makes arrays, in which about that share of all pairs counts.
      plan: `plan(k, v, data)` makes the plan, inside the timed call.
    """

    name: str
    data: Callable[[int, float], Any]
    plan: Callable[[jax.Array, jax.Array, Any], Any]


def random_groups(length: int, density: float) -> jax.Array:
    """Groups of about equal size, their tokens anywhere."""
    groups = max(1, round(1 / density))
    ids = np.random.default_rng(0).permutation(np.arange(length) % groups)
    # what their number is, is static
    return js.TokenGroups.from_ids(*[jnp.asarray(ids[None, None])] * 2, groups=groups)


def random_tiles(length: int, density: float) -> js.BlockMask:
    """As many tiles in each row, chosen at random."""
    blocks = length // BLOCK
    rank = np.random.default_rng(0).random((1, HEADS, blocks, blocks)).argsort(-1).argsort(-1)
    tiles = jnp.asarray(rank < max(1, round(density * blocks)))
    return js.BlockMask.from_dense(
        tiles, q_len=length, kv_len=length, block_q=BLOCK, block_kv=BLOCK
    )


def pooled(k: jax.Array, v: jax.Array, tiles: js.BlockMask) -> js.BlockPyramid:
    """The mean of each block stands for it where it is left out."""
    means = (x.reshape(1, -1, BLOCK, HEADS, DIM).mean(2) for x in (k, v))
    count = jnp.full((1, k.shape[1] // BLOCK, HEADS), np.log(BLOCK), jnp.float32)
    return js.BlockPyramid.from_pooled(tiles, *means, count)


def random_levels(length: int, density: float) -> tuple[js.BlockMask, jax.Array]:
    """Tiles of which a quarter each is exact, halved, in four and in eight."""
    tiles = random_tiles(length, min(1.0, density / (15 / 32)))
    levels = np.random.default_rng(1).integers(0, 4, tiles.kv_indices.shape)
    return tiles, jnp.asarray(levels)


CASES = (
    Case("groups of tokens", random_groups, lambda k, v, groups: groups),
    Case("pooled columns", random_tiles, pooled),
    Case(
        "levels",
        random_levels,
        lambda k, v, data: js.BlockPyramid.from_levels(*data, top_level=3),
    ),
)


def inputs(length: int) -> list[jax.Array]:
    rng = np.random.default_rng(2)
    return [jnp.asarray(rng.normal(size=(1, length, HEADS, DIM)), jnp.float32) for _ in range(3)]


def functions(case: Case, implementation: str = "xla") -> dict[str, Callable[..., Any]]:
    """The output, and it with the gradients."""

    def forward(q, k, v, data):
        return js.attend(q, k, v, case.plan(k, v, data), implementation=implementation)

    def both(q, k, v, data):
        def loss(*operands):
            return jnp.square(forward(*operands, data)).sum()

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)

    return {"forward": forward, "forward_backward": both}


def check(case: Case) -> None:
    """Output and gradients agree with the reference, or nothing is timed."""
    operands = *inputs(CHECKED), case.data(CHECKED, 0.2)
    name = "forward_backward"
    for got, want in zip(
        *(
            jax.tree.leaves(jax.jit(functions(case, x)[name])(*operands))
            for x in ("xla", "reference")
        ),
        strict=True,
    ):
        error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
        if not error < TOLERANCE:
            raise ArithmeticError(f"{case.name}: results differ by {error:.1e} of their norm")


def measure(case: Case, length: int, density: float, repeats: int) -> dict[str, Any]:
    """One row: time, work, time per pair, and what is reserved besides inputs and results."""
    q, k, v = inputs(length)
    data = case.data(length, density)
    lists = tile_lists(case.plan(k, v, data))
    tiles = [float(x.kv_num_blocks.sum()) * HEADS / x.list_heads for x in lists]
    pairs = sum(n * x.block_q * x.block_kv for n, x in zip(tiles, lists, strict=True))
    row: dict[str, Any] = {
        "case": case.name,
        "length": length,
        "density": density,
        "computed": pairs / (HEADS * length**2),
    }
    for name, function in functions(case).items():
        run = jax.jit(function).lower(q, k, v, data).compile()
        jax.block_until_ready(run(q, k, v, data))
        times, processor = [], []
        for _ in range(repeats):
            started, used = time.perf_counter(), time.process_time()
            jax.block_until_ready(run(q, k, v, data))
            times.append(time.perf_counter() - started)
            processor.append(time.process_time() - used)
        row |= {
            f"{name}_ms": 1e3 * float(np.median(times)),
            # of all threads: what other programs take counts less
            f"{name}_processor_ms": 1e3 * float(np.median(processor)),
            f"{name}_processor_ns_per_pair": 1e9 * float(np.median(processor)) / pairs,
            f"{name}_mib": run.memory_analysis().temp_size_in_bytes / 2**20,
        }
    row["merging_processor_ms"] = merging(q, len(lists), repeats)
    row["h200_forward_bound_ms"] = sum(bound(x, n) for x, n in zip(lists, tiles, strict=True))
    sizes = HEADS, HEADS, length, length, DIM, DIM, 0
    work = roofline.merging(roofline.Problem(*sizes), len(lists))
    row["h200_merging_bound_ms"] = work.expected_ms(GPU) if len(lists) > 1 else 0.0
    return row


def merging(q: jax.Array, parts: int, repeats: int) -> float:
    """Milliseconds of all cores to merge outputs of q's shape by their log-sum-exps; 0 for one."""
    if parts == 1:
        return 0.0
    found = [(q, q[..., 0].swapaxes(1, 2))] * parts
    run = jax.jit(js.merge)
    jax.block_until_ready(run(found))
    times = []
    for _ in range(repeats):
        used = time.process_time()
        jax.block_until_ready(run(found))
        times.append(time.process_time() - used)
    return 1e3 * float(np.median(times))


def bound(lists: js.BlockMask, tiles: float) -> float:
    """Milliseconds in 16 bits at the very best."""
    sizes = HEADS, HEADS, lists.q_len, lists.kv_len, DIM, DIM, tiles, lists.block_q, lists.block_kv
    return roofline.forward(roofline.Problem(*sizes)).expected_ms(GPU)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few sizes, writes nothing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    sizes = {
        "scaling_in_density": [(LENGTH, density) for density in DENSITIES],
        "scaling_in_length": [(length, KEYS / length) for length in LENGTHS],
    }
    if arguments.quick:
        sizes = {"scaling_in_length": [(length, KEYS / length) for length in LENGTHS[:2]]}
    result: dict[str, Any] = {
        # others' programs take time of caches too, if not of processors
        "machine": machine() | {"load_before": os.getloadavg()[0]},
        "case": {"heads": HEADS, "dim": DIM, "dtype": "float32", "repeats": arguments.repeats},
        **{name: [] for name in sizes},
    }
    for case in track(CASES, transient=True):
        check(case)
        for name, pairs in sizes.items():
            result[name] += [measure(case, *size, arguments.repeats) for size in pairs]
    console = Console(width=max(Console().width, 200))
    for name in sizes:
        table = Table(*result[name][0], title=name.replace("_", " "))
        for row in result[name]:
            table.add_row(*(x if isinstance(x, str) else f"{x:.4g}" for x in row.values()))
        console.print(table)
    if not arguments.quick:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
