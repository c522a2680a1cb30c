"""Times methods that are trained, output and gradients, at a fixed budget over the length.

    python -m benchmarks.trainable           # some minutes
    python -m benchmarks.trainable --quick   # two short lengths, writes nothing

Each query attends to as many keys at every length. What grows faster than the length is choosing
them, which looks at all that stands for blocks: it is timed by itself as well, and `nsa`'s windows,
which it attends to besides, are in that. `rest` is what is left of the gradients without choosing.
Clusters of the routing transformer are of one size, so there are more in longer texts. Each method
is checked against `reference` at the first length. Gradients of `hisa` are those of its indexer as
well, by its own loss over the tokens that it chose; the loss of `seerattention`'s gates, of which
the targets are dense attention, is not in its row. `ms` is the least time on the clock, `cpu_ms`
that of all cores at work; `exponent` is of the length, since the one before; the whole from the
first to the last stands in the summary.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Callable
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
from jsparse.learned.hisa import index_loss

RESULTS = Path(__file__).parent / "results" / "trainable_cpu.json"
LENGTHS = (2048, 4096, 8192, 16384, 32768)
QUICK = (512, 1024)
HEADS, KV_HEADS, DIM, FEATURES = 4, 2, 64, 256
MASK = js.masks.causal()
INDEXER = {"index_heads": 4, "index_dim": 32, "rotary_dim": 16}


class Case(NamedTuple):
    """A method for each length, the longest length that it is tried at, and a loss of its own.

    `loss(info, q, k, plan, mask=)` is what a part of the method learns by that no gradient reaches
    through the output.
    """

    method: Callable[[int], js.Method] | None
    longest: int = LENGTHS[-1]
    loss: Callable[..., jax.Array] | None = None


def loss_of_indexer(info: Any, q: jax.Array, k: jax.Array, plan: Any, *, mask: Any) -> jax.Array:
    """Of the tokens that were chosen, which is how it learns while attention is sparse."""
    return index_loss(info.indexed, q, k, plan, mask=mask)


def cases(budget: int) -> dict[str, Case]:
    """Methods that choose so many keys per query, dense attention as far as it is bearable."""
    blocks = budget // 64
    nsa = js.nsa(block_kv=64, top_k=blocks, window=budget // 2)
    flashmoba = js.flashmoba(block_kv=64, top_k=blocks)
    hisa = js.hisa(top_k=budget, block_kv=64, block_top_k=2 * blocks, **INDEXER)
    # density is of causal tiles, of which a row has half as many as there are
    gates = {"block_size": 64, "gate_dim": 32, "dense_rows": 0}
    return {
        "dense": Case(None, 8192),
        "nsa": Case(lambda length: nsa),
        "flashmoba": Case(lambda length: flashmoba),
        "hisa": Case(lambda length: hisa, loss=loss_of_indexer),
        "seerattention": Case(
            lambda length: js.seerattention(density=min(1.0, 2 * budget / length), **gates)
        ),
        "routing_transformer": Case(
            lambda length: js.routing_transformer(clusters=length // budget, window=budget)
        ),
    }


def call_of(case: Case, length: int, *, kind: str, implementation: str):
    """The compiled call, with its inputs."""
    rng = np.random.default_rng(0)
    shapes = [(length, n, DIM) for n in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    x = jnp.asarray(rng.normal(size=(length, FEATURES)), jnp.float32)
    method = None if case.method is None else case.method(length)
    params: Any = ()
    if method is not None:
        sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "dim": DIM, "features": FEATURES}
        params = method.init(jax.random.key(0), **sizes)

    def run(params, q, k, v, x):
        if method is None:
            return js.attend(q, k, v, mask=MASK, implementation=implementation)
        given = {"params": params, "x": x, "mask": MASK, "implementation": implementation}
        return js.sparse_attention(q, k, v, method, **given)

    def choose(params, q, k, v, x):
        return method.plan(params, q, k, v=v, x=x, mask=MASK)[0]

    def learn(params, q, k, v, x):
        if method is None or case.loss is None:
            return jnp.square(run(params, q, k, v, x)).sum()
        plan, info = method.plan(params, q, k, v=v, x=x, mask=MASK)
        out = js.attend(q, k, v, plan, mask=MASK, implementation=implementation)
        return jnp.square(out).sum() + case.loss(info, q, k, plan, mask=MASK)

    functions = {
        "choice": choose,
        "forward": run,
        "gradient": jax.grad(learn, argnums=(0, 1, 2, 3)),
    }
    given = params, q, k, v, x
    return functools.partial(jax.jit(functions[kind]).lower(*given).compile(), *given)


def exponent(before: dict[str, Any], after: dict[str, Any]) -> float:
    """Of the length, in the processor time of two rows."""
    growth = after["cpu_ms"] / before["cpu_ms"]
    return math.log(growth) / math.log(after["length"] / before["length"])


def measure(name: str, case: Case, lengths: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    """A row for each length: of choosing, of the output alone, of all gradients, of the rest."""
    rows: list[dict[str, Any]] = []
    for kind in ("choice", "forward", "gradient"):
        if kind == "choice" and case.method is None:
            continue
        before: dict[str, Any] | None = None
        for length in lengths:
            if length > case.longest:
                break
            call = call_of(case, length, kind=kind, implementation="xla")
            if length == lengths[0] and kind != "choice":
                first = call_of(case, length, kind=kind, implementation="reference")
                check({"reference": not_zero(first()), "xla": not_zero(call())})
            before = row_of(name, kind, length, timed({name: call}, repeats)[name], before)
            rows.append(before)
    choices = {row["length"]: row for row in rows if row["kind"] == "choice"}
    before = None
    for row in [row for row in rows if row["kind"] == "gradient" and choices]:
        less = choices[row["length"]]
        times = {key: row[key] - less[key] for key in ("ms", "cpu_ms")}
        before = row_of(name, "rest", row["length"], times, before)
        rows.append(before)
    return rows


def row_of(
    name: str, kind: str, length: int, times: dict[str, float], before: dict[str, Any] | None
) -> dict[str, Any]:
    """Times with what they are of, and their growth since the row before."""
    row = {"method": name, "kind": kind, "length": length, **times}
    row["cpu_us_per_token"] = 1e3 * times["cpu_ms"] / length
    row["exponent"] = None if before is None else exponent(before, row)
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The exponent of the length from the first to the last, by kind."""
    kinds = dict.fromkeys(row["kind"] for row in rows)
    ends = {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
    return {kind: exponent(those[0], those[-1]) for kind, those in ends.items()}


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
    result: dict[str, Any] = {"machine": machine(), "budget": budget, "exponents": {}, "rows": []}
    for name, case in cases(budget).items():
        rows = measure(name, case, lengths, arguments.repeats)
        result["rows"] += rows
        result["exponents"][name] = summary(rows)
        table = Table(*rows[0], title=f"{name}, {budget} keys per query")
        for row in rows:
            cells = (f"{x:.4g}" if isinstance(x, float) else str(x or "") for x in row.values())
            table.add_row(*cells)
        console.print(table)
        exponents = ", ".join(f"{kind} {x:.2f}" for kind, x in result["exponents"][name].items())
        console.print(f"{name}: time goes with the length to the power of: {exponents}")
        if not arguments.quick:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
