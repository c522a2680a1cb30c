"""Times neighborhood attention on a grid of video tokens against what its tiles allow.

    python -m benchmarks.neighborhood           # a minute or two
    python -m benchmarks.neighborhood --quick   # a smaller grid, writes nothing

Dense attention is the same executor with every tile listed, of the same tokens, in the same run.
How many times faster a window is, the simulator bounds by the tiles that are left (`bound_mean`).
Plans are made in a process of their own, for their memory.
"""

import argparse
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
from benchmarks.attention import in_turn, machine, ratio, seconds
from jsparse.masks.gna import simulate

RESULTS = Path(__file__).parent / "results" / "neighborhood_cpu.json"
DIM = 64
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

    def method(self, stride: tuple[int, ...] | None) -> js.Method:
        """GNA with a stride; None is a window of all there is: every tile."""
        tiles = {"q_tile": self.tile, "kv_tile": self.tile}
        if stride is None:
            return js.gna(grid=self.grid, **tiles)
        return js.gna(grid=self.grid, window=self.window, stride=stride, **tiles)

    def simulation(self, stride: tuple[int, ...]):
        tiles = {"q_tile": self.tile, "kv_tile": self.tile}
        return simulate(self.grid, window=self.window, stride=stride, **tiles)


VIDEO = Case((30, 48, 80), (18, 24, 24), (2, 8, 8), ((1, 1, 1), (16, 8, 8)))
SMALL = Case((8, 24, 32), (4, 16, 16), (2, 8, 8), ((1, 1, 1), (2, 8, 8)))


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


def check(case: Case, got: Any, stride: tuple[int, ...], operands: list[jax.Array]) -> None:
    """Some queries agree with attention over the pairs that the mask names, or nothing is timed."""
    rng = np.random.default_rng(1)
    rows = np.sort(rng.choice(case.tokens, 64, replace=False))
    mask = js.masks.neighborhood(case.grid, window=case.window, stride=stride)
    mask = mask.flatten_batch(())
    q, k, v = (np.asarray(x[:, 0], np.float64) for x in operands)
    columns = jnp.arange(case.tokens)
    seen = np.asarray(jax.jit(lambda i: mask.visible(i[:, None], columns, None))(jnp.asarray(rows)))
    logits = np.where(seen, q[rows] @ k.T * DIM**-0.5, -np.inf)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    expected = weights @ v / weights.sum(1, keepdims=True)
    found = np.asarray(got, np.float64)[rows, 0]
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    if not error < TOLERANCE:
        raise ArithmeticError(f"stride {stride}: results differ by {error:.1e} of their norm")


def attend(case: Case, repeats: int, dense_repeats: int) -> list[dict[str, Any]]:
    """Each stride against all tiles; runs are taken in turn."""
    operands = inputs(case)

    def compiled(stride):
        method = case.method(stride)
        return jax.jit(lambda *x: js.sparse_attention(*x, method)).lower(*operands).compile()

    programs = {stride: compiled(stride) for stride in case.strides}
    for stride, program in programs.items():
        check(case, program(*operands), stride, operands)
    runs = {
        str(stride): lambda p=program: p(*operands).block_until_ready()
        for stride, program in programs.items()
    }
    dense = compiled(None)
    times: dict[str, list[float]] = {name: [] for name in (*runs, "dense")}
    for _ in range(dense_repeats):
        times["dense"].append(seconds(lambda: dense(*operands).block_until_ready()))
        for name, values in in_turn(runs, repeats).items():
            times[name].append(float(np.median(values)))
    rows = []
    for stride in case.strides:
        bound = case.simulation(stride)
        speed = ratio(times, "dense", str(stride))
        rows.append(
            {
                "stride": list(stride),
                "ms": 1e3 * float(np.median(times[str(stride)])),
                "dense_ms": 1e3 * float(np.median(times["dense"])),
                "speed_over_dense": speed,
                "bound_mean": bound.bound_mean,
                "bound_max": bound.bound_max,
                "flop_bound": bound.flop_bound,
                "share_of_bound_mean": speed / bound.bound_mean,
                "fully_block_sparse": bound.fully_block_sparse,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller grid, writes nothing")
    parser.add_argument("--repeats", type=int, default=3)
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
            "dense": "the same executor, every tile listed, all queries",
        },
        "plan": plans,
        "attend": attend(case, arguments.repeats, dense_repeats=2),
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
