"""Times neighborhood attention on a grid of video tokens against what its tiles allow.

    python -m benchmarks.neighborhood           # about a minute
    python -m benchmarks.neighborhood --quick   # a smaller grid, writes nothing

Dense attention is the same executor with every tile listed, in the same run: of some of the
queries, since all would take a minute, and its time is taken for all of them in proportion.
How many times faster a window is, the simulator bounds by the tiles that are left (`bound_mean`).
Plans are made in a process of their own, for their memory.
"""

import argparse
import functools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jsparse as js
from benchmarks.attention import machine, seconds
from jsparse.masks.gna import simulate

RESULTS = Path(__file__).parent / "results" / "neighborhood_cpu.json"
DIM = 64
# dense attention is of one in so many queries
DENSE_PART = 10
# half a unit of f32 for each of as many terms as there are tokens, at random, in another order
TOLERANCE = 2.0**-16


class Case(NamedTuple):
    """A grid, its window, and strides that are compared."""

    grid: tuple[int, ...]
    window: tuple[int, ...]
    tile: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        return int(np.prod(self.grid))

    def method(self, stride: tuple[int, ...]) -> js.Method:
        tiles = {"q_tile": self.tile, "kv_tile": self.tile}
        return js.gna(grid=self.grid, window=self.window, stride=stride, **tiles)

    def simulation(self, stride: tuple[int, ...]):
        tiles = {"q_tile": self.tile, "kv_tile": self.tile}
        return simulate(self.grid, window=self.window, stride=stride, **tiles)


VIDEO = Case((30, 48, 80), (18, 24, 24), (2, 8, 8), ((1, 1, 1), (16, 8, 8)))
SMALL = Case((8, 24, 40), (4, 8, 24), (2, 8, 8), ((1, 1, 1), (4, 8, 8)))


def inputs(case: Case) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shape = case.tokens, 1, DIM
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3)]


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def plan(case: Case, stride: tuple[int, ...]) -> dict[str, float]:
    """Time and memory of a plan alone; the first call compiles what makes it."""
    q = jnp.zeros((case.tokens, 1, 1))
    method = case.method(stride)

    def made() -> js.BlockMask:
        return jax.block_until_ready(method.plan((), q, q)[0])

    before = peak_mib()
    first = seconds(made)
    again = [seconds(made) for _ in range(5)]
    made_plan = made()
    return {
        "first_ms": 1e3 * first,
        "ms": 1e3 * float(np.median(again)),
        "peak_mib_added": peak_mib() - before,
        "listed_tiles": int(made_plan.kv_num_blocks.sum()),
        "width": made_plan.width,
    }


def check(
    case: Case, stride: tuple[int, ...] | None, operands: list[jax.Array], got: jax.Array
) -> None:
    """Some queries agree with attention over the pairs that the mask names, or nothing is kept."""
    rows = np.sort(np.random.default_rng(1).choice(len(got), 64, replace=False))
    q, k, v = (np.asarray(x[:, 0], np.float64) for x in operands)
    logits = q[rows] @ k.T * DIM**-0.5
    if stride is not None:
        mask = js.masks.neighborhood(case.grid, window=case.window, stride=stride)
        mask, columns = mask.flatten_batch(()), jnp.arange(case.tokens)
        seen = mask.visible(jnp.asarray(rows)[:, None], columns, None)
        logits = np.where(seen, logits, -np.inf)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    expected = weights @ v / weights.sum(1, keepdims=True)
    found = np.asarray(got[:, 0], np.float64)[rows]
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    if not error < TOLERANCE:
        raise ArithmeticError(f"stride {stride}: results differ by {error:.1e} of their norm")


def attend(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Each stride against all tiles, in turn; None is dense attention."""
    operands = inputs(case)

    def dense(q, k, v):
        return js.attend(q[: case.tokens // DENSE_PART], k, v)

    runs = {None: dense}
    for stride in case.strides:
        method = case.method(stride)
        runs[stride] = lambda *x, method=method: js.sparse_attention(*x, method)
    compiled = {
        stride: functools.partial(jax.jit(run).lower(*operands).compile(), *operands)
        for stride, run in runs.items()
    }
    times: dict[tuple[int, ...] | None, list[float]] = {stride: [] for stride in runs}
    for stride, run in compiled.items():
        check(case, stride, operands, run())
    for _ in range(repeats):
        for stride, run in compiled.items():
            took = seconds(lambda run=run: run().block_until_ready())
            times[stride].append(took if stride else DENSE_PART * took)
    rows = []
    for stride in case.strides:
        own, dense = times[stride], times[None]
        bound = case.simulation(stride)
        speed = float(np.median(np.array(dense) / np.array(own)))
        rows.append(
            {
                "stride": list(stride),
                "ms": 1e3 * float(np.median(own)),
                "dense_ms": 1e3 * float(np.median(dense)),
                "speed": speed,
                "bound_mean": bound.bound_mean,
                "bound_max": bound.bound_max,
                "flop_bound": bound.flop_bound,
                "speed_over_bound": speed / bound.bound_mean,
                "whole_tiles": bound.fully_block_sparse,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller grid, writes nothing")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--plan", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    case = SMALL if arguments.quick else VIDEO
    if arguments.plan is not None:
        print(json.dumps(plan(case, case.strides[arguments.plan])))
        return

    start = time.perf_counter()
    plans = []
    for number, stride in enumerate(case.strides):
        command = [sys.executable, "-m", "benchmarks.neighborhood", "--plan", str(number)]
        command += ["--quick"] if arguments.quick else []
        out = subprocess.run(command, capture_output=True, text=True, check=True)
        plans.append({"stride": list(stride), **json.loads(out.stdout)})
    result = {
        "machine": machine(),
        "case": {
            "grid": list(case.grid),
            "tokens": case.tokens,
            "window": list(case.window),
            "tile": list(case.tile),
            "heads": 1,
            "dim": DIM,
            "dtype": "float32",
            "repeats": arguments.repeats,
            "dense": f"the same executor, every tile listed: 1/{DENSE_PART} of the queries, "
            "times as many",
        },
        "plan": plans,
        "attend": attend(case, arguments.repeats),
    }
    console = Console(width=max(Console().width, 130))
    for name in ("plan", "attend"):
        table = Table(*result[name][0], title=name)
        for row in result[name]:
            cells = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values())
            table.add_row(*cells)
        console.print(table)
    console.print(f"{time.perf_counter() - start:.0f} s")
    if not arguments.quick:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
