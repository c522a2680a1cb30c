"""Times a step of decoding over a paged cache on this CPU, over what it selects and what there is.

    python -m benchmarks.kin_paged           # some minutes, 5 GiB
    python -m benchmarks.kin_paged --quick   # few sizes, writes nothing

Each kv head selects its own pages: from 2 to 50 percent of 16384 tokens, and 1024 tokens of 2048 to
65536. Time ought to be in proportion to the keys that are selected, whatever there are. Uneven
sequences, and as many keys in even ones, read every page: time ought to be that of the sum, not of
the longest. Memory is what XLA reserves besides inputs and results. Each case is checked against
attention to the same keys in one piece before it is timed. An H200 at the very best reads what is
selected once; that follows from `benchmarks.roofline`.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jsparse as js
from benchmarks import roofline
from benchmarks.attention import machine

RESULTS = Path(__file__).parent / "results" / "kin_paged_cpu.json"
BATCH, HEADS, KV_HEADS, DIM = 8, 16, 4, 128
PAGES = (16, 64)
LENGTH, SELECTED = 16384, 1024
DENSITIES = (0.02, 0.05, 0.1, 0.25, 0.5)
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)
# the longest has most of what there is; and the same sum shared out evenly
UNEVEN = (16384, 4096, 1024, 1024, 512, 512, 256, 256)
CHECKED = 512
# half a unit of f32 for each of some hundred terms, in another order
TOLERANCE = 2.0**-18
GPU = roofline.DEVICES["NVIDIA H200"]


def filled(page_size: int, max_len: int, lengths: tuple[int, ...]) -> js.PagedKV:
    """A cache whose pages stand anywhere in the pool."""
    rng = np.random.default_rng(0)
    width = max_len // page_size
    shape = BATCH * width, page_size, KV_HEADS, DIM
    k, v = (rng.standard_normal(shape, np.float32) for _ in range(2))
    table = rng.permutation(BATCH * width).reshape(BATCH, width)
    return js.PagedKV.from_table(*map(jnp.asarray, (k, v, table, np.array(lengths))))


def drawn(cache: js.PagedKV, density: float) -> js.BlockMask:
    """As many pages for each kv head of each sequence, at random."""
    width = cache.table_width
    count = max(1, round(density * width))
    rank = np.random.default_rng(1).random((BATCH, KV_HEADS, 1, width)).argsort(-1)
    lists = jnp.asarray(np.sort(rank[..., :count], -1), jnp.int32)
    sizes = {"q_len": 1, "kv_len": cache.kv_len, "block_q": 1, "block_kv": cache.page_size}
    return js.BlockMask.from_lists(lists, jnp.full(lists.shape[:-1], count), **sizes)


def queries() -> jax.Array:
    rng = np.random.default_rng(2)
    return jnp.asarray(rng.standard_normal((BATCH, 1, HEADS, DIM), np.float32))


def attend(q: jax.Array, cache: js.PagedKV, plan: js.BlockMask | None) -> jax.Array:
    return js.attend_paged(q, cache, plan, implementation="xla")


def check(page_size: int) -> None:
    """The result is that of attention in one piece, or nothing is timed."""
    lengths = np.arange(1, BATCH + 1) * CHECKED // BATCH
    cache = filled(page_size, CHECKED, tuple(lengths))
    plan = drawn(cache, 0.5)
    k, v = (x[cache.page_table].reshape(BATCH, -1, *x.shape[2:]) for x in (cache.k, cache.v))
    mask = js.masks.causal(offset=cache.lengths - 1)
    want = js.attend(queries(), k, v, plan, mask=mask, implementation="reference")
    error = float(jnp.linalg.norm(jax.jit(attend)(queries(), cache, plan) - want))
    if not error < TOLERANCE * float(jnp.linalg.norm(want)):
        raise ArithmeticError(f"pages of {page_size}: results differ by {error:.1e}")


def measure(
    page_size: int, max_len: int, lengths: tuple[int, ...], density: float | None, repeats: int
) -> dict[str, Any]:
    """One row: time of all cores, time per selected key, and what is reserved."""
    cache = filled(page_size, max_len, lengths)
    plan = None if density is None else drawn(cache, density)
    pages = KV_HEADS * float(cache.page_counts().sum())
    pages = pages if plan is None else float(plan.kv_num_blocks.sum())
    run = jax.jit(attend).lower(queries(), cache, plan).compile()
    jax.block_until_ready(run(queries(), cache, plan))
    times, processor = [], []
    for _ in range(repeats):
        started, used = time.perf_counter(), time.process_time()
        jax.block_until_ready(run(queries(), cache, plan))
        times.append(time.perf_counter() - started)
        processor.append(time.process_time() - used)
    return {
        "page_size": page_size,
        "max_len": max_len,
        "longest": max(lengths),
        "tokens": sum(lengths),
        "selected_keys": pages * page_size,
        "ms": 1e3 * float(np.median(times)),
        # of all threads: what other programs take counts less
        "processor_ms": 1e3 * float(np.median(processor)),
        "processor_ns_per_key": 1e9 * float(np.median(processor)) / (pages * page_size),
        "mib": run.memory_analysis().temp_size_in_bytes / 2**20,
        "h200_bound_us": 1e3 * work(pages, page_size, max_len).expected_ms(GPU),
    }


def work(pages: float, page_size: int, max_len: int) -> roofline.Work:
    """What a step takes in 16 bits: the heads of a group are the rows of one tile."""
    lists, group = BATCH * KV_HEADS, HEADS // KV_HEADS
    sizes = lists, lists, group, max_len, DIM, DIM, pages, group, page_size
    return roofline.forward(roofline.Problem(*sizes))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few sizes, writes nothing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    even = (sum(UNEVEN) // BATCH,) * BATCH
    parts: dict[str, list[tuple[int, tuple[int, ...], float | None]]] = {
        "over_density": [(LENGTH, (LENGTH,) * BATCH, density) for density in DENSITIES],
        "over_length": [(n, (n,) * BATCH, SELECTED / n) for n in LENGTHS],
        "uneven": [(LENGTH, even, None), (LENGTH, UNEVEN, None)],
    }
    if arguments.quick:
        parts = {name: rows[:2] for name, rows in parts.items()}
    result: dict[str, Any] = {
        # others' programs take time of caches too, if not of processors
        "machine": machine() | {"load_before": os.getloadavg()[0]},
        "case": {
            "batch": BATCH,
            "heads": HEADS,
            "kv_heads": KV_HEADS,
            "dim": DIM,
            "dtype": "float32",
            "repeats": arguments.repeats,
        },
        **{name: [] for name in parts},
    }
    for page_size in track(PAGES, transient=True):
        check(page_size)
        for name, rows in parts.items():
            result[name] += [measure(page_size, *row, arguments.repeats) for row in rows]
    console = Console(width=max(Console().width, 160))
    for name in parts:
        table = Table(*result[name][0], title=name.replace("_", " "))
        for row in result[name]:
            table.add_row(*(f"{x:.4g}" for x in row.values()))
        console.print(table)
    if not arguments.quick:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
