"""Times block-sparse attention on this CPU, against torch in the same run.

    python -m benchmarks.attention                   # everything, some minutes
    python -m benchmarks.attention --dtype float32   # of one dtype, default float32 and bfloat16
    python -m benchmarks.attention --quick           # one density, no scaling runs

`python -m benchmarks.plots` draws what it wrote. Each case is checked against dense attention
before it is timed. Ratios are medians of ratios of runs taken in turn, so that a drifting machine
weighs on both sides alike.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import jsparse as js

LENGTH, HEADS, DIM, BLOCK = 8192, 4, 64, 128
# of the norm, between two results in that dtype: half a unit of f32 for each of 8192 terms, at
# random, in another order; half a unit of bf16 for probabilities, products and outputs of either
TOLERANCE = {"float32": 2.0**-17, "bfloat16": 2.0**-6}
# seconds before each run
PAUSE = 0.02
RESULTS = Path(__file__).parent / "results" / "attention_cpu.json"


def random_tiles(length: int, density: float, seed: int = 0) -> np.ndarray:
    """Tiles [heads, rows, columns]: each row the same number, chosen at random."""
    blocks = length // BLOCK
    count = max(1, round(density * blocks))
    rng = np.random.default_rng(seed)
    rank = rng.random((HEADS, blocks, blocks)).argsort(-1).argsort(-1)
    return rank < count


def plan_of(tiles: np.ndarray, length: int) -> js.BlockMask:
    return js.BlockMask.from_dense(
        jnp.asarray(tiles), q_len=length, kv_len=length, block_q=BLOCK, block_kv=BLOCK
    )


def inputs(length: int, dtype: str = "float32") -> list[np.ndarray]:
    """q, k, v and weights of the output; JAX's NumPy knows bfloat16."""
    rng = np.random.default_rng(1)
    shape = 1, length, HEADS, DIM
    return [rng.normal(size=shape).astype(np.float32).astype(jnp.dtype(dtype)) for _ in range(4)]


def same(got: Any, want: Any, dtype: str) -> None:
    """Two results in a dtype agree, or nothing is timed."""
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    if not error < TOLERANCE[dtype]:
        raise ArithmeticError(f"results in {dtype} differ by {error:.1e} of their norm")


def forward(q, k, v, plan):
    return js.attend(q, k, v, plan, implementation="xla")


def forward_backward(q, k, v, weights, plan):
    def loss(q, k, v):
        return (forward(q, k, v, plan) * weights).sum()

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turn(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Times of several functions, one run of each after the other, after a run that warms up."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            # threads of OpenMP go on spinning for a while, and would take a core from the next one
            time.sleep(PAUSE)
            times[name].append(seconds(run))
    return times


def ratio(times: dict[str, list[float]], slower: str, faster: str) -> float:
    """The median over runs of how many times longer `slower` took."""
    return float(np.median(np.array(times[slower]) / np.array(times[faster])))


def against_torch(density: float, repeats: int, dtype: str = "float32") -> dict[str, Any]:
    """One density and dtype: ours, FlexAttention on the same tiles, and torch's dense attention."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    arrays = inputs(LENGTH, dtype)
    q, k, v, weights = map(jnp.asarray, arrays)
    tiles = random_tiles(LENGTH, density)
    plan = plan_of(tiles, LENGTH)
    ours, both = jax.jit(forward), jax.jit(forward_backward)

    # on a shorter problem of the same kind, where the dense reference fits
    short = slice(0, 1024)
    few = plan_of(random_tiles(1024, max(density, 0.2)), 1024)
    exact = [x[:, short].astype(jnp.float32) for x in (q, k, v)]
    expected = js.attend(*exact, few, implementation="reference")
    same(ours(q[:, short], k[:, short], v[:, short], few), expected, dtype)

    tq, tk, tv = (
        torch.tensor(x.astype(np.float32)).to(getattr(torch, dtype)).transpose(1, 2).contiguous()
        for x in arrays[:3]
    )
    lists = torch.tensor(np.asarray(plan.kv_indices))[None]
    counts = torch.tensor(np.asarray(plan.kv_num_blocks))[None]
    columns = LENGTH // BLOCK
    lists = torch.nn.functional.pad(lists, (0, columns - lists.shape[-1]))
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts), torch.zeros_like(lists), counts, lists, BLOCK_SIZE=BLOCK
    )
    flex = torch.compile(flex_attention)
    dense = torch.nn.functional.scaled_dot_product_attention
    with torch.no_grad():
        theirs = flex(tq, tk, tv, block_mask=mask).transpose(1, 2).float().numpy()
        same(ours(q, k, v, plan), theirs, dtype)
        times = in_turn(
            {
                "forward": lambda: ours(q, k, v, plan).block_until_ready(),
                "flex": lambda: flex(tq, tk, tv, block_mask=mask),
                "sdpa": lambda: dense(tq, tk, tv),
                "both": lambda: jax.block_until_ready(both(q, k, v, weights, plan)),
            },
            repeats,
        )
    return {
        "dtype": dtype,
        "density": float(plan.density().mean()),
        **{f"{name}_ms": 1e3 * float(np.median(values)) for name, values in times.items()},
        "speed_over_flex": ratio(times, "flex", "forward"),
        "speed_over_sdpa": ratio(times, "sdpa", "forward"),
        "speed_over_sdpa_wanted": 0.9 / float(plan.density().mean()),
        "forward_backward_over_forward": ratio(times, "both", "forward"),
    }


def scaling_in_density(repeats: int) -> list[dict[str, float]]:
    """Time from 2 to 25 percent, and what a line through it says.

    Queries are read and outputs written whatever the density; the line's height at no tile is that.
    """
    q, k, v, _ = map(jnp.asarray, inputs(LENGTH))
    run = jax.jit(forward)
    plans = [plan_of(random_tiles(LENGTH, x), LENGTH) for x in (0.016, 0.03, 0.05, 0.1, 0.25)]
    times = in_turn(
        {str(i): lambda p=p: run(q, k, v, p).block_until_ready() for i, p in enumerate(plans)},
        repeats,
    )
    tiles = np.array([int(plan.kv_num_blocks.sum()) for plan in plans])
    milliseconds = 1e3 * np.array([np.median(x) for x in times.values()])
    # relative distances count
    slope, height = np.polyfit(tiles, milliseconds, 1, w=1 / milliseconds)
    return [
        {
            "density": float(plan.density().mean()),
            "tiles": int(n),
            "ms": float(ms),
            "us_per_tile": float(1e3 * ms / n),
            "line_ms": float(height + slope * n),
        }
        for plan, n, ms in zip(plans, tiles, milliseconds, strict=True)
    ]


def long(length: int, repeats: int) -> dict[str, float]:
    """Forward and backward at four tiles per row; run in a process of its own for its memory."""
    q, k, v, weights = map(jnp.asarray, inputs(length))
    plan = plan_of(random_tiles(length, 4 * BLOCK / length), length)
    ours, both = jax.jit(forward), jax.jit(forward_backward)
    times = in_turn(
        {
            "forward": lambda: ours(q, k, v, plan).block_until_ready(),
            "both": lambda: jax.block_until_ready(both(q, k, v, weights, plan)),
        },
        repeats,
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "length": length,
        **{f"{name}_ms": 1e3 * float(np.median(values)) for name, values in times.items()},
        "peak_gib": peak,
    }


def machine() -> dict[str, Any]:
    import torch

    try:
        text = Path("/proc/cpuinfo").read_text()
        model = next(
            x.split(":")[1].strip() for x in text.splitlines() if x.startswith("model name")
        )
    except (OSError, StopIteration):
        model = platform.processor()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one density, no scaling runs")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", choices=[*TOLERANCE], help="of the peers' cases; default: both")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--long", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.long:
        print(json.dumps(long(arguments.long, arguments.repeats)))
        return
    try:
        import torch  # noqa: F401
    except ImportError:
        print("The peer is missing; install it: pip install 'jsparse[bench]'", file=sys.stderr)
        sys.exit(2)

    result: dict[str, Any] = {
        "machine": machine(),
        "case": {"length": LENGTH, "heads": HEADS, "dim": DIM, "block": BLOCK},
    }
    dtypes = (arguments.dtype,) if arguments.dtype else (*TOLERANCE,)
    densities = (0.1,) if arguments.quick else (0.05, 0.1, 0.25)
    lengths = () if arguments.quick else (8192, 16384, 32768, 65536, 131072)
    with Progress(transient=True) as progress:
        bar = progress.add_task("", total=len(dtypes) * len(densities) + len(lengths) + 1)
        result["against_torch"] = []
        for dtype, density in itertools.product(dtypes, densities):
            progress.update(bar, description=f"{dtype}, density {density:.0%}")
            result["against_torch"].append(against_torch(density, arguments.repeats, dtype))
            progress.advance(bar)
        progress.update(bar, description="scaling in density")
        result["scaling_in_density"] = scaling_in_density(arguments.repeats)
        progress.advance(bar)
        result["scaling_in_length"] = []
        for length in lengths:
            progress.update(bar, description=f"{length} tokens")
            command = [sys.executable, "-m", "benchmarks.attention", "--repeats", "3"]
            command += ["--long", str(length)]
            out = subprocess.run(command, capture_output=True, text=True, check=True)
            result["scaling_in_length"].append(json.loads(out.stdout))
            progress.advance(bar)

    console = Console(width=max(Console().width, 110))
    for name in ("against_torch", "scaling_in_density", "scaling_in_length"):
        rows = result[name]
        if rows:
            table = Table(*rows[0], title=name.replace("_", " "))
            for row in rows:
                cells = (x if isinstance(x, str) else f"{x:.4g}" for x in row.values())
                table.add_row(*cells)
            console.print(table)
    if not arguments.quick:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
