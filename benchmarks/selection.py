"""Times what choosing costs: each estimator's plan, against dense causal attention in the same run.

    python -m benchmarks.selection           # some minutes
    python -m benchmarks.selection --quick   # fewer tokens, writes nothing

Of the registry's causal estimators that need no training. Dense attention is the executor under the
causal mask: of one row of tiles in some, evenly spread, since all would take a minute; its time is
taken for all tiles in proportion. Processor time, which other work on the machine does not enter,
stands beside; FLOPs are the accountant's, which counts hidden pieces of the map as if computed.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jsparse as js
from benchmarks.attention import machine
from benchmarks.kin_scorers import timed
from jsparse.evaluation.cost import attend_cost, plan_cost
from jsparse.registry import METHODS, Row

RESULTS = Path(__file__).parent / "results" / "selection_cpu.json"
LENGTHS = 8192, 32768
HEADS, DIM, BLOCK = 2, 64, 128
# dense attention is of so many rows of tiles
DENSE_ROWS = 16
# of the time of dense attention that choosing may take, at the greater length
BOUND = 0.1


def estimators() -> list[Row]:
    """Causal, training-free, and choosing by q and k before attending.

    What decides while it attends costs nothing apart from that.
    """
    chosen = (r for r in METHODS if r.family == "estimators" and r.causal and r.training_free)
    return [r for r in chosen if not r.by_running_maximum]


def inputs(length: int) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(length, HEADS, DIM)), jnp.float32) for _ in range(3)]


def dense_rows(length: int) -> tuple[js.BlockMask, float]:
    """The causal tiles of some rows, from the middle of as many equal parts, and their share."""
    plan = js.block_mask(js.masks.causal(), length, length, block_q=BLOCK, block_kv=BLOCK)
    rows = plan.grid.q_blocks
    part = max(1, rows // DENSE_ROWS)
    tiles = plan.to_dense() & (jnp.arange(rows) % part == part // 2)[:, None]
    taken = js.BlockMask.from_dense(tiles, **plan.grid._asdict())
    return taken, float(taken.kv_num_blocks.sum()) / float(plan.kv_num_blocks.sum())


def measure(length: int, repeats: int) -> list[dict[str, Any]]:
    """Each estimator's plan and dense attention, in turn."""
    operands, mask = inputs(length), js.masks.causal()
    q, k, _ = operands
    some, share = dense_rows(length)
    whole = js.block_mask(mask, length, length, block_q=BLOCK, block_kv=BLOCK)
    sizes = {"heads": HEADS, "kv_heads": HEADS, "dim": DIM, "v_dim": DIM}
    dense_flops = attend_cost(whole, **sizes).flops

    def dense(q, k, v):
        return js.attend(q, k, v, some, mask=mask)

    runs: dict[str, Any] = {"dense": (dense, operands)}
    for row in estimators():
        method = row.factory()
        runs[row.name] = (
            lambda q, k, method=method: method.plan((), q, k, mask=mask)[0],
            [q, k],
        )
    figures = timed(runs, repeats)
    all_rows = figures.pop("dense")
    dense_ms, dense_cpu_ms = all_rows.ms / share, all_rows.cpu_ms / share
    rows = []
    for name, own in figures.items():
        cost = plan_cost(runs[name][0], q, k)
        rows.append(
            {
                "tokens": length,
                "method": name,
                "plan_ms": own.ms,
                "plan_cpu_ms": own.cpu_ms,
                "dense_ms": dense_ms,
                "dense_cpu_ms": dense_cpu_ms,
                "time_share": own.ms / dense_ms,
                "cpu_share": own.cpu_ms / dense_cpu_ms,
                "flop_share": cost.flops / dense_flops,
                "plan_gflop": cost.flops / 1e9,
                "plan_temp_mib": own.temp_mib,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer tokens, writes nothing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    start = time.perf_counter()
    lengths = (2048,) if arguments.quick else LENGTHS
    result = {
        "machine": machine(),
        "case": {
            "heads": HEADS,
            "dim": DIM,
            "dtype": "float32",
            "settings": "each method's defaults",
            "repeats": arguments.repeats,
            "dense": f"the same executor, causal, tiles of {BLOCK} x {BLOCK}: {DENSE_ROWS} rows of "
            "tiles, times as many",
        },
        "selection": [row for length in lengths for row in measure(length, arguments.repeats)],
    }
    console = Console(width=max(Console().width, 120))
    table = Table(*result["selection"][0], title="what choosing costs")
    for row in result["selection"]:
        table.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()))
    console.print(table)
    slow = [
        f"{row['method']} ({row['time_share']:.1%})"
        for row in result["selection"]
        if row["tokens"] == lengths[-1] and row["time_share"] > BOUND
    ]
    console.print(f"more than {BOUND:.0%} at {lengths[-1]} tokens: {', '.join(slow) or 'none'}")
    console.print(f"{time.perf_counter() - start:.0f} s")
    if not arguments.quick:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
