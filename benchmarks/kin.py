"""Times kinds of attention on this CPU that come down to lists of tiles, and what they reserve.

    python -m benchmarks.kin           # some minutes
    python -m benchmarks.kin --quick   # one density, two lengths, writes nothing

Each is timed from 2 to 50 percent of all pairs, at 8192 tokens or fewer where those would take
minutes, and from 2048 to 65536 tokens at as many keys per query. Time ought to be in proportion to
the work, which is what a number per computed pair shows; memory, which XLA says without running
anything, ought to grow as the tokens do. Where tiles are skipped on the way, logits of every listed
tile are computed: time ought to be a part that follows the list, and one that follows what is kept.
What has parts with a softmax each, as pooled columns have, says what merging these takes. Each is
checked against the dense reference before it is timed. What an H200 would take at the very best
follows from `benchmarks.roofline`.
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
from benchmarks.random_plans import Skipping, random_groups, random_lists, skip, skipped
from jsparse.evaluation.cost import tile_lists

RESULTS = Path(__file__).parent / "results" / "kin_cpu.json"
HEADS, DIM, BLOCK = 2, 64, 128
# tiles of keys that single queries list, and tokens where each has lists of its own
SELECTED, FEWER = 64, 4096
LENGTH, KEYS = 8192, 256
DENSITIES = (0.02, 0.05, 0.1, 0.25, 0.5)
LENGTHS = (2048, 8192, 32768, 65536)
# half a unit of f32 for each of as many terms as the check has tokens, at random, in another order
CHECKED, TOLERANCE = 1024, 2.0**-18
# what takes longer than so many seconds is timed less often
ENOUGH = 1.0
GPU = roofline.DEVICES["NVIDIA H200"]


class Case(NamedTuple):
    """A kind of attention.

    Attributes:
      name: Of its rows.
      data: `data(length, density)` makes arrays, in which about that share of all pairs counts.
      attend: `attend(q, k, v, data, implementation)` is what is timed.
      computed: `computed(q, k, v, data)` are the lists of tiles that it computes.
      work: `work(problem, lists, data)` is what a GPU has to do for one of these.
      heads: Query heads.
      kv_heads: Heads of keys and values.
      length: At which the density varies.
      keys: Per query, as the length varies.
      longest: Of the lengths.
    """

    name: str
    data: Callable[[int, float], Any]
    attend: Callable[..., jax.Array]
    computed: Callable[..., tuple[js.BlockMask, ...]]
    work: Callable[[roofline.Problem, js.BlockMask, Any], roofline.Work] = (
        lambda problem, lists, data: roofline.forward(problem)
    )
    heads: int = HEADS
    kv_heads: int = HEADS
    length: int = LENGTH
    keys: int = KEYS
    longest: int = LENGTHS[-1]

    def sizes(self) -> dict[str, list[tuple[int, float]]]:
        """Lengths and densities to time, by what varies."""
        lengths = [length for length in LENGTHS if length <= self.longest]
        return {
            "scaling_in_density": [(self.length, density) for density in DENSITIES],
            "scaling_in_length": [(length, self.keys / length) for length in lengths],
        }


def of_plan(
    name: str, data: Callable[[int, float], Any], plan: Callable[..., Any], **more: Any
) -> Case:
    """Attention to `plan(k, v, data)`, which is made inside the timed call."""

    def attend(q, k, v, data, implementation):
        return js.attend(q, k, v, plan(k, v, data), implementation=implementation)

    return Case(name, data, attend, lambda q, k, v, data: tile_lists(plan(k, v, data)), **more)


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


def work_of_columns(problem: roofline.Problem, lists: js.BlockMask, data: Any) -> roofline.Work:
    """Columns gathered one by one."""
    return roofline.gathered_columns(problem)["forward"]


def work_of_rows(problem: roofline.Problem, lists: js.BlockMask, data: Any) -> roofline.Work:
    """A group's heads as the rows of one tile."""
    group = problem.heads // lists.list_heads
    packed = problem._replace(
        heads=lists.list_heads,
        q_len=problem.q_len * group,
        tiles=problem.tiles / group,
        block_q=problem.block_q * group,
    )
    return roofline.kernels_of_short_tiles(packed)["forward"]


def work_of_skipping(
    problem: roofline.Problem, lists: js.BlockMask, data: Skipping
) -> roofline.Work:
    """Of listed tiles the logits, of kept ones the rest."""
    return roofline.skipping(problem, float(data.lists.kv_num_blocks.sum()) * HEADS)


def skipping(name: str, listed: float, **more: Any) -> Case:
    """Attention that skips all but `1 / listed` of what is listed, or of all there is."""
    return Case(
        name,
        skipped(listed, DIM),
        lambda *operands: skip(*operands)[0],
        lambda q, k, v, data: (skip(q, k, v, data, "xla")[2],),
        work=work_of_skipping,
        **more,
    )


def as_it_is(k: jax.Array, v: jax.Array, plan: Any) -> Any:
    """What the data are is the plan."""
    return plan


CASES = (
    of_plan("groups of tokens", random_groups, as_it_is),
    of_plan("pooled columns", random_tiles, pooled),
    of_plan(
        "levels",
        random_levels,
        lambda k, v, data: js.BlockPyramid.from_levels(*data, top_level=3),
    ),
    of_plan("gathered columns", random_lists(BLOCK, 1, HEADS), as_it_is, work=work_of_columns),
    of_plan(
        "lists of tokens, 4 heads each",
        random_lists(1, 1, 1),
        as_it_is,
        work=work_of_rows,
        heads=4,
        kv_heads=1,
        length=2048,
        keys=64,
    ),
    *(
        of_plan(
            f"rows of {group} heads",
            random_lists(1, SELECTED, 1),
            as_it_is,
            work=work_of_rows,
            heads=group,
            kv_heads=1,
            length=FEWER,
            keys=keys,
        )
        for group, keys in ((4, KEYS), (16, KEYS // 2))
    ),
    skipping("three of four skipped", 4.0),
    # which are all there are
    skipping("skipped of all", np.inf, longest=LENGTH),
)


def inputs(case: Case, length: int) -> list[jax.Array]:
    rng = np.random.default_rng(2)
    heads = case.heads, case.kv_heads, case.kv_heads
    return [jnp.asarray(rng.normal(size=(1, length, n, DIM)), jnp.float32) for n in heads]


def functions(case: Case, implementation: str = "xla") -> dict[str, Callable[..., Any]]:
    """The output, and it with the gradients."""

    def forward(q, k, v, data):
        return case.attend(q, k, v, data, implementation)

    def both(q, k, v, data):
        def loss(*operands):
            return jnp.square(forward(*operands, data)).sum()

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)

    return {"forward": forward, "forward_backward": both}


def check(case: Case) -> None:
    """Output and gradients agree with the reference, or nothing is timed."""
    operands = *inputs(case, CHECKED), case.data(CHECKED, 0.2)
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
    q, k, v = inputs(case, length)
    data = case.data(length, density)
    lists = case.computed(q, k, v, data)
    tiles = [float(x.kv_num_blocks.sum()) * case.heads / x.list_heads for x in lists]
    pairs = sum(n * x.block_q * x.block_kv for n, x in zip(tiles, lists, strict=True))
    row: dict[str, Any] = {
        "case": case.name,
        "length": length,
        "density": density,
        "computed": pairs / (case.heads * length**2),
    }
    for name, function in functions(case).items():
        run = jax.jit(function).lower(q, k, v, data).compile()
        jax.block_until_ready(run(q, k, v, data))
        times, processor = [], []
        while len(times) < repeats and sum(times) < ENOUGH:
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
    row["h200_forward_bound_ms"] = sum(
        bound(case, x, n, data) for x, n in zip(lists, tiles, strict=True)
    )
    sizes = case.heads, case.kv_heads, length, length, DIM, DIM, 0
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


def bound(case: Case, lists: js.BlockMask, tiles: float, data: Any) -> float:
    """Milliseconds in 16 bits at the very best."""
    lengths = lists.q_len, lists.kv_len
    sizes = case.heads, case.kv_heads, *lengths, DIM, DIM, tiles, lists.block_q, lists.block_kv
    return case.work(roofline.Problem(*sizes), lists, data).expected_ms(GPU)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few sizes, writes nothing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    started = time.perf_counter()
    result: dict[str, Any] = {
        # others' programs take time of caches too, if not of processors
        "machine": machine() | {"load_before": os.getloadavg()[0]},
        "case": {"dim": DIM, "dtype": "float32", "repeats": arguments.repeats, "heads": {}},
    }
    for case in track(CASES, transient=True):
        check(case)
        result["case"]["heads"][case.name] = [case.heads, case.kv_heads]
        sizes = case.sizes()
        if arguments.quick:
            sizes = {"scaling_in_length": sizes["scaling_in_length"][:2]}
        for name, pairs in sizes.items():
            rows = [measure(case, *size, arguments.repeats) for size in pairs]
            result[name] = [*result.get(name, []), *rows]
    console = Console(width=max(Console().width, 200))
    for name in [name for name in result if name.startswith("scaling")]:
        table = Table(*result[name][0], title=name.replace("_", " "))
        for row in result[name]:
            table.add_row(*(x if isinstance(x, str) else f"{x:.4g}" for x in row.values()))
        console.print(table)
    console.print(f"{time.perf_counter() - started:.0f} s")
    if not arguments.quick:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
