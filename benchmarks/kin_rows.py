"""Times lists of few queries on this CPU: rows of a group packed, and tiles of keys first.

    python -m benchmarks.kin_rows           # some minutes
    python -m benchmarks.kin_rows --quick   # a few cases, writes nothing

Every way computes the same lists, and is checked against the others before it is timed. Ways take
turns. `ms` is the least time on the clock, `cpu_ms` that of all cores at work, which a shared
machine disturbs less.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jsparse as js
from benchmarks.attention import machine
from jsparse.attention import kv_major, xla
from jsparse.attention.block_sparse import block_sparse_attention
from jsparse.attention.logits import LogitRule, Operands
from jsparse.attention.packing import Rows, pack, unpack
from jsparse.core.tiling import with_inverse
from jsparse.masks.powerattention import powers_of_two
from jsparse.masks.s2_attention import sharded_blocks
from jsparse.masks.streaming import sink_and_window
from jsparse.types import Mask

RESULTS = Path(__file__).parent / "results" / "kin_rows_cpu.json"
DIM = 64
# half a unit of f32 for each of some thousand terms, in another order
TOLERANCE = 2.0**-17


class Case(NamedTuple):
    """Lists of `width` tiles of `block_kv` keys, drawn for each query and list head."""

    length: int
    block_kv: int
    width: int
    heads: int = 2
    kv_heads: int = 2
    list_heads: int = 2

    def inputs(self) -> tuple[list[jax.Array], js.BlockMask]:
        rng = np.random.default_rng(0)
        heads = self.heads, self.kv_heads, self.kv_heads
        operands = [
            jnp.asarray(rng.normal(size=(1, self.length, n, DIM)), jnp.float32) for n in heads
        ]
        blocks = self.length // self.block_kv
        drawn = rng.random((512, blocks)).argsort(-1)[:, : self.width]
        lists = np.sort(drawn, -1)[rng.integers(0, len(drawn), (1, self.list_heads, self.length))]
        plan = js.BlockMask.from_lists(
            jnp.asarray(lists, jnp.int32),
            jnp.full(lists.shape[:-1], self.width),
            q_len=self.length,
            kv_len=self.length,
            block_q=1,
            block_kv=self.block_kv,
        )
        return operands, plan


LENGTHS = [Case(length, 64, 8) for length in (2048, 8192, 32768, 65536)]
DENSITIES = [Case(4096, 64, width) for width in (1, 3, 8, 16, 32)]
ROUTED = [Case(4096, block_kv, 8) for block_kv in (16, 32, 64, 128)]
INVERSES = [*LENGTHS, Case(65536, 64, 32), *DENSITIES]
PARTS = "lengths densities routed groups inverse columns".split()
GROUPS = [Case(4096, 64, 16, 8, 2, 2), Case(16384, 64, 16, 4, 1, 1)]


def ways(case: Case) -> dict[str, Callable[..., jax.Array]]:
    """How the case can be computed."""
    rule = LogitRule(case.length, case.length, DIM**-0.5, None, None)

    def way(passes, least_queries):
        def run(q, k, v, plan):
            operands, packed, own_rule = pack(Operands(q, k, v), plan, rule, Rows(least_queries))
            parts = block_sparse_attention(operands, packed, None, own_rule, passes)
            return unpack(*parts, own_rule.group)[0]

        return run

    found = {"rows": way(xla.PASSES, 0), "keys": way(kv_major.PASSES, xla.LEAST_QUERIES)}
    if case.heads > case.kv_heads:
        found["packed"] = way(xla.PASSES, xla.LEAST_QUERIES)
    return found


def timed(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Least times of calls that take turns."""
    best: dict[str, dict[str, float]] = {}
    for _ in range(repeats):
        for name, call in calls.items():
            start, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            took = {
                "ms": 1e3 * (time.perf_counter() - start),
                "cpu_ms": 1e3 * (time.process_time() - cpu),
            }
            least = best.setdefault(name, took)
            best[name] = {key: min(least[key], took[key]) for key in took}
    return best


def check(results: dict[str, Any]) -> None:
    """All ways agree, or nothing is kept."""
    first, *others = results.values()
    for other in others:
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
            error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a))
            if not error < TOLERANCE:
                raise ArithmeticError(f"results differ by {error:.1e} of their norm")


def attend(case: Case, repeats: int, only: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """A row for each way, and for the output alone and all gradients."""
    operands, plan = case.inputs()
    pairs = float(plan.kv_num_blocks.sum()) * (case.heads // case.list_heads)
    rows = []
    for kind in ("forward", "gradient"):
        calls = {}
        for name, run in ways(case).items():
            if only and name not in only:
                continue
            function = run
            if kind == "gradient":
                function = jax.grad(lambda *x, run=run: run(*x).sum(), argnums=(0, 1, 2))
            compiled = jax.jit(function).lower(*operands, plan).compile()
            calls[name] = functools.partial(compiled, *operands, plan)
        check({name: call() for name, call in calls.items()})
        for name, times in timed(calls, repeats).items():
            rows.append(
                {
                    "kind": kind,
                    "way": name,
                    "chosen": _chosen(case, plan) == name,
                    **case._asdict(),
                    "density": round(pairs / (case.heads * case.length**2 / case.block_kv), 4),
                    **times,
                    "cpu_ns_per_listed": 1e6 * times["cpu_ms"] / pairs,
                }
            )
    return rows


def _chosen(case: Case, plan: js.BlockMask) -> str:
    q, k = (jnp.zeros((1, case.length, n, 1)) for n in (case.heads, case.kv_heads))
    rule = LogitRule(case.length, case.length, None, None, None)
    _, packed, rule = pack(Operands(q, k, k), plan, rule, Rows(xla.LEAST_QUERIES))
    if kv_major.pays(packed):
        return "keys"
    return "packed" if rule.group > 1 else "rows"


def inverse(cases: Sequence[Case], repeats: int) -> list[dict[str, Any]]:
    """Lists turned round, against a sort of their entries."""
    rows = []
    for case in cases:
        _, plan = case.inputs()

        def by_sort(plan):
            keys = jnp.where(plan.entries(), plan.kv_indices, plan.grid.kv_blocks)
            rows = jnp.broadcast_to(jnp.arange(plan.q_len)[:, None], keys.shape)
            flat = (x.reshape(*x.shape[:2], -1) for x in (keys, rows))
            return jax.lax.sort(tuple(flat), num_keys=1, is_stable=True)

        functions = {"ranks": js.BlockMask.inverse, "sort": by_sort}
        compiled = {name: jax.jit(run).lower(plan).compile() for name, run in functions.items()}
        calls = {name: functools.partial(run, plan) for name, run in compiled.items()}
        # lists are full, so both are the rows of all entries, by column
        if not bool((calls["ranks"]().q_indices == calls["sort"]()[1]).all()):
            raise ArithmeticError(f"lists of {case.length} queries differ, turned round")
        entries = int(plan.kv_num_blocks.sum())
        for name, times in timed(calls, repeats).items():
            mib = compiled[name].memory_analysis().temp_size_in_bytes / 2**20
            sizes = {"length": case.length, "width": case.width, "listed": entries}
            rows.append({"way": name, **sizes, **times, "mib": mib})
    return rows


def static_masks() -> dict[str, tuple[Mask, int]]:
    """Masks that name the rows of a column, with the side of their tiles."""
    spans = {"num_sink": [64] * 8, "window": [64 * (8 + 16 * head) for head in range(8)]}
    shares = {"heads": 8, "kv_heads": 8, "local_blocks": 16, "vert_stride": 8}
    masks = {
        "s2_attention": (sharded_blocks(block_size=64, **shares), 64),
        "powerattention": (powers_of_two(block_size=256, window_size=5), 128),
        "moa": (js.masks.head_windows(**spans, block_size=64, right=0), 64),
        "streaming": (sink_and_window(num_sink=4, window=1024), 128),
    }
    return {name: (mask & js.masks.causal(), block) for name, (mask, block) in masks.items()}


def columns(masks: dict[str, tuple[Mask, int]], length: int, repeats: int) -> list[dict[str, Any]]:
    """The lists of static masks, turned round and by the masks' closed forms."""
    rows = []
    for name, (mask, block) in masks.items():

        def plan(mask=mask, block=block):
            return js.block_mask(mask, length, length, block_q=block, block_kv=block)

        made = plan()

        def by_mask(made=made, mask=mask):
            return with_inverse(made, mask).turned

        calls = {"plan": plan, "ranks": made.inverse, "closed form": by_mask}
        pairs = zip(
            *(jax.tree.leaves(calls[way]()) for way in ("ranks", "closed form")), strict=True
        )
        if not all(bool((a == b).all()) for a, b in pairs):
            raise ArithmeticError(f"columns of {name} are not its lists turned round")
        listed = int(made.kv_num_blocks.sum())
        for way, times in timed(calls, repeats).items():
            rows.append({"mask": name, "way": way, "length": length, "listed": listed, **times})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few cases, writes nothing")
    parser.add_argument("--only", choices=PARTS, help="the others stay as they are in the file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    repeats, only = arguments.repeats, arguments.only
    if arguments.quick:
        parts = {"routed": [Case(1024, 64, 4)], "groups": [Case(1024, 64, 4, 8, 2, 2)]}
    else:
        parts = {"lengths": LENGTHS, "densities": DENSITIES, "routed": ROUTED, "groups": GROUPS}
    start = time.perf_counter()
    result: dict[str, Any] = json.loads(arguments.output.read_text()) if only else {}
    result["machine"] = machine()
    console = Console(width=max(Console().width, 150))

    def keep(name: str, rows: list[dict[str, Any]]) -> None:
        result[name] = rows
        table = Table(*rows[0], title=name)
        for row in rows:
            cells = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values())
            table.add_row(*cells)
        console.print(table)
        if not arguments.quick:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")

    for name, cases in parts.items():
        # which way is chosen is known from the others
        ways = ("keys",) if name in ("densities", "lengths") else ()
        if only in (None, name):
            keep(name, [row for case in cases for row in attend(case, repeats, ways)])
    inverses = [Case(1024, 64, 4)] if arguments.quick else INVERSES
    if only in (None, "inverse"):
        keep("inverse", inverse(inverses, repeats))
    if only in (None, "columns"):
        keep("columns", columns(static_masks(), 2**14 if arguments.quick else 2**19, repeats))
    console.print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
