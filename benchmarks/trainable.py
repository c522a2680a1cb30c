"""Times methods that are trained, output and gradients, at a fixed budget over the length.

    python -m benchmarks.trainable           # some minutes
    python -m benchmarks.trainable --quick   # two short lengths, writes nothing

Each query has the same budget at every length, choosing included: what grows faster than the length
is the looking at what stands for blocks, `nsa`'s windows above all. Each method is checked against
`reference` at the first length. `ms` is the least time on the clock, `cpu_ms` that of all cores at
work; `exponent` is of the length, since the one before.
"""

import argparse
import functools
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jsparse as js
from benchmarks.attention import machine
from benchmarks.kin_rows import check, timed

RESULTS = Path(__file__).parent / "results" / "trainable_cpu.json"
LENGTHS = (2048, 4096, 8192, 16384, 32768)
QUICK = (512, 1024)
HEADS, KV_HEADS, DIM, FEATURES = 4, 2, 64, 256
MASK = js.masks.causal()
INDEXER = {"index_heads": 4, "index_dim": 32, "rotary_dim": 16}


class Case(NamedTuple):
    """A method of a budget, and the longest length that it is tried at."""

    method: js.Method | None
    longest: int = LENGTHS[-1]


def cases(budget: int) -> dict[str, Case]:
    """Methods that choose so many keys per query, dense attention as far as it is bearable."""
    return {
        "dense": Case(None, 8192),
        "nsa": Case(js.nsa(block_kv=64, top_k=budget // 64, window=budget // 2)),
        "flashmoba": Case(js.flashmoba(block_kv=64, top_k=budget // 64)),
        "hisa": Case(js.hisa(top_k=budget, block_kv=64, block_top_k=budget // 32, **INDEXER)),
    }


def call_of(method: js.Method | None, length: int, *, gradient: bool, implementation: str):
    """The compiled call, with its inputs."""
    rng = np.random.default_rng(0)
    shapes = [(length, n, DIM) for n in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    x = jnp.asarray(rng.normal(size=(length, FEATURES)), jnp.float32)
    params: Any = ()
    if method is not None:
        sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "dim": DIM, "features": FEATURES}
        params = method.init(jax.random.key(0), **sizes)

    def run(params, q, k, v, x):
        if method is None:
            return js.attend(q, k, v, mask=MASK, implementation=implementation)
        given = {"params": params, "x": x, "mask": MASK, "implementation": implementation}
        return js.sparse_attention(q, k, v, method, **given)

    function = run
    if gradient:
        function = jax.grad(lambda *given: jnp.square(run(*given)).sum(), argnums=(0, 1, 2, 3))
    given = params, q, k, v, x
    return functools.partial(jax.jit(function).lower(*given).compile(), *given)


def measure(name: str, case: Case, lengths: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    """A row for each length, and for the output alone and all gradients."""
    rows: list[dict[str, Any]] = []
    for gradient in (False, True):
        options = {"gradient": gradient}
        first = call_of(case.method, lengths[0], **options, implementation="reference")
        before: dict[str, Any] | None = None
        for length in lengths:
            if length > case.longest:
                break
            call = call_of(case.method, length, **options, implementation="xla")
            if length == lengths[0]:
                check({"reference": not_zero(first()), "xla": not_zero(call())})
            times = timed({name: call}, repeats)[name]
            row = {
                **{"method": name, "kind": "gradient" if gradient else "forward"},
                **{"length": length, **times, "cpu_us_per_token": 1e3 * times["cpu_ms"] / length},
                "exponent": None,
            }
            if before is not None:
                growth = row["cpu_ms"] / before["cpu_ms"]
                row["exponent"] = math.log(growth) / math.log(length / before["length"])
            rows.append(row)
            before = row
    return rows


def not_zero(found: Any) -> list[jax.Array]:
    """The arrays with something in them: what only chooses has no gradient."""
    return [x for x in jax.tree.leaves(found) if x.any()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="short lengths, writes nothing")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    lengths, budget = (QUICK, 256) if arguments.quick else (LENGTHS, 512)
    console, start = Console(), time.perf_counter()
    result: dict[str, Any] = {"machine": machine(), "budget": budget, "rows": []}
    for name, case in cases(budget).items():
        rows = measure(name, case, lengths, arguments.repeats)
        result["rows"] += rows
        table = Table(*rows[0], title=f"{name}, {budget} keys per query")
        for row in rows:
            cells = (f"{x:.4g}" if isinstance(x, float) else str(x or "") for x in row.values())
            table.add_row(*cells)
        console.print(table)
        if not arguments.quick:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
