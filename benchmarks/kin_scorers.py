"""Times the scorers on this machine: sums of the attention map, antidiagonals, running top-k.

    python -m benchmarks.kin_scorers           # some minutes on two cores
    python -m benchmarks.kin_scorers --quick   # short sequences, writes nothing

Time over what is selected, under windows of several widths and at several lengths: of the map its
tiles, of the antidiagonals pairs of cells, of the running top-k tiles of scores. Where each costs
the same at all settings, time is proportional to the selected work; these figures are of processor
time, which other work on the machine does not enter. The map is compared with attention to the same
tiles in the same run. Temporary memory stands beside.
"""

import argparse
import json
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
from jsparse.attention.map_scores import map_maxima, map_sums
from jsparse.core.running_top_k import TileScores, running_top_k
from jsparse.core.tile_scores import relu_weighted, window_scores
from jsparse.core.windows import Windows
from jsparse.estimators.xattention import antidiagonal_scores
from jsparse.types import Frame, Mask, TileGrid

RESULTS = Path(__file__).parent / "results" / "kin_scorers_cpu.json"
HEADS, DIM, BLOCK = 2, 64, 128
WINDOWS, SELECTED = Windows(size=32, stride=16), 64
INDEXER_HEADS, INDEXER_DIM, INDEXER_TOP_K = 8, 32, 256
BLOCKS_TOP_K = 16


def map_dtype() -> Any:
    """What kernels take, where there may be some."""
    return jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32


def arrays(*shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


class Figure(NamedTuple):
    """Medians over runs, and what is held besides inputs and results."""

    ms: float
    cpu_ms: float
    temp_mib: float


def timed(
    runs: dict[str, tuple[Callable[..., Any], list[jax.Array]]], repeats: int
) -> dict[str, Figure]:
    """Times functions, one run of each after the other, after a run that warms up."""
    compiled = {name: jax.jit(f).lower(*inputs).compile() for name, (f, inputs) in runs.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, (_, inputs) in runs.items():
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(compiled[name](*inputs))
            end = time.perf_counter(), time.process_time()
            if turn:
                times[name].append((end[0] - start[0], end[1] - start[1]))
    found = {}
    for name, own in times.items():
        wall, processor = (1e3 * float(x) for x in np.median(own, axis=0))
        held = compiled[name].memory_analysis().temp_size_in_bytes
        found[name] = Figure(wall, processor, held / 2**20)
    return found


def seen_keys(window: int | None) -> Mask:
    """Those before a query, or the nearest of them."""
    mask = js.masks.causal()
    return mask if window is None else mask & js.masks.sliding_window(left=window)


def windows(length: int) -> list[int | None]:
    """From a fiftieth of the keys to all."""
    return [*(round(length * share) for share in (0.02, 0.1, 0.25, 0.5)), None]


def of_map(length: int, window: int | None, repeats: int) -> dict[str, Any]:
    """Sums and maxima per tile, against attention to the tiles under the same mask."""
    mask = seen_keys(window)
    q, k, v = (x.astype(map_dtype()) for x in arrays(*[(length, HEADS, DIM)] * 3))
    plan = js.block_mask(mask, length, length, block_q=BLOCK, block_kv=BLOCK)
    runs: dict[str, Any] = {
        "attention": (lambda q, k, v: js.attend(q, k, v, plan, mask=mask), [q, k, v]),
        "sums": (lambda q, k: map_sums(q, k, mask=mask), [q, k]),
        "maxima": (lambda q, k: map_maxima(q, k, mask=mask), [q, k]),
    }
    found = timed(runs, repeats)
    tiles = HEADS * int(plan.kv_num_blocks.sum())
    return {
        "tokens": length,
        "window": window,
        "density": float(plan.density().mean()),
        **{f"{name}_ms": figure.ms for name, figure in found.items()},
        **{f"{name}_cpu_ms": figure.cpu_ms for name, figure in found.items()},
        "sums_cpu_us_per_tile": 1e3 * found["sums"].cpu_ms / tiles,
        "sums_over_attention": found["sums"].cpu_ms / found["attention"].cpu_ms,
        "sums_temp_mib": found["sums"].temp_mib,
    }


def of_antidiagonals(length: int, window: int | None, repeats: int) -> dict[str, Any]:
    """Block scores of XAttention at its defaults."""
    mask = seen_keys(window)
    q, k = arrays(*[(length, HEADS, DIM)] * 2)
    plan = js.block_mask(mask, length, length, block_q=BLOCK, block_kv=BLOCK)

    def scores(q, k):
        return antidiagonal_scores(q, k, stride=16, block_size=BLOCK, mask=mask)

    found = timed({"scores": (scores, [q, k])}, repeats)["scores"]
    cells = HEADS * int(plan.kv_num_blocks.sum()) * (BLOCK // 16) ** 2
    return {
        "tokens": length,
        "window": window,
        "density": float(plan.density().mean()),
        **found._asdict(),
        "cpu_ns_per_pair_of_cells": 1e6 * found.cpu_ms / cells,
    }


def of_blocks(length: int, window: int | None, repeats: int) -> dict[str, Any]:
    """Blocks per query, chosen by the probabilities of compressed keys, one kv head."""
    count = (length - WINDOWS.size) // WINDOWS.stride + 1
    q, k_windows, lse = arrays((1, length, HEADS, DIM), (1, count, 1, DIM), (1, HEADS, length))
    grid, mask = TileGrid(length, length // SELECTED, 128, 32), seen_keys(window)
    rows = js.block_mask(mask, length, length, block_q=128, block_kv=32 * SELECTED)
    tiles = js.BlockMask(rows.kv_indices, rows.kv_num_blocks, rows.overflowed, *grid)

    sizes = {"size": WINDOWS.size, "stride": WINDOWS.stride}
    seen = js.masks.whole_windows(mask, kv_len=length, **sizes)

    def chosen(q, k_windows, lse):
        options: dict[str, Any] = {"num_init": 1, "num_local": 2, "scale": DIM**-0.5}
        score = window_scores(
            q, k_windows, lse, windows=WINDOWS, block=SELECTED, mask=seen, grid=grid, **options
        )
        return running_top_k(score, BLOCKS_TOP_K, grid, tiles=tiles).indices

    inputs = [q, k_windows, lse + np.log(count)]
    case = {"chosen": "blocks of windows", "tokens": length, "window": window}
    return _of_top_k(case, tiles, chosen, inputs, BLOCKS_TOP_K, repeats)


def of_tokens(length: int, window: int | None, repeats: int) -> dict[str, Any]:
    """Tokens per query, chosen by a small indexer."""
    shapes = (length, INDEXER_HEADS, INDEXER_DIM), (length, INDEXER_HEADS), (length, INDEXER_DIM)
    grid, mask = TileGrid(length, length, 128, 1024), seen_keys(window)
    tiles = js.block_mask(mask, **grid._asdict())

    def chosen(q, weights, k):
        def score(batch, head, q_tile, kv_tile):
            start, size = q_tile * grid.block_q, grid.block_q
            queries, of_heads = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in (q, weights))
            first = kv_tile * grid.block_kv
            keys = jax.lax.dynamic_slice_in_dim(k, first, grid.block_kv)
            rows, columns = start + jnp.arange(size)[:, None], first + jnp.arange(grid.block_kv)
            visible = mask.visible(rows, columns, Frame(length, length, batch, head))
            return TileScores(relu_weighted(queries, of_heads, keys), visible)

        return running_top_k(score, INDEXER_TOP_K, grid, tiles=tiles).indices

    case = {"chosen": "tokens", "tokens": length, "window": window}
    return _of_top_k(case, tiles, chosen, arrays(*shapes), INDEXER_TOP_K, repeats)


def _of_top_k(
    case: dict[str, Any],
    tiles: js.BlockMask,
    chosen: Callable[..., Any],
    inputs: list[jax.Array],
    k: int,
    repeats: int,
) -> dict[str, Any]:
    found = timed({"chosen": (chosen, inputs)}, repeats)["chosen"]
    return {
        **case,
        "density": float(tiles.density().mean()),
        "top_k": k,
        **found._asdict(),
        "cpu_ms_per_tile": found.cpu_ms / int(tiles.kv_num_blocks.sum()),
        "scores_mib": 4 * tiles.q_len * tiles.kv_len / 2**20,
    }


def fewer(repeats: int, length: int) -> int:
    """How often to time what takes many seconds at such lengths."""
    return 1 if length > 16384 else repeats


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="short sequences, writes nothing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    start, repeats = time.perf_counter(), arguments.repeats
    lengths = (1024, 2048) if arguments.quick else (2048, 8192, 32768, 65536)
    # of cells and of wide tiles only long rows have many
    some, longer, longest = lengths[1], lengths[-2], lengths[-1]
    result = {
        "machine": machine(),
        "case": {
            "heads": HEADS,
            "dim": DIM,
            "block": BLOCK,
            "dtype": jnp.dtype(map_dtype()).name,
        },
        "map_over_density": [of_map(some, width, repeats) for width in windows(some)],
        "map_over_length": [of_map(length, 1024, repeats) for length in lengths],
        "antidiagonals_over_density": [
            of_antidiagonals(longest, width, repeats) for width in windows(longest)
        ],
        "antidiagonals_over_length": [of_antidiagonals(n, None, repeats) for n in lengths],
        "running_top_k_over_density": [
            *(of_blocks(longest, width, fewer(repeats, longest)) for width in windows(longest)),
            *(of_tokens(longer, width, fewer(repeats, longer)) for width in windows(longer)),
        ],
        "running_top_k_over_length": [
            *(of_blocks(length, None, fewer(repeats, length)) for length in lengths),
            # of 65536 tokens a run takes a minute
            *(of_tokens(length, None, fewer(repeats, length)) for length in lengths),
        ],
    }
    console = Console(width=max(Console().width, 130))
    for name, rows in list(result.items())[2:]:
        table = Table(*rows[0], title=name)
        for row in rows:
            table.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()))
        console.print(table)
    console.print(f"{time.perf_counter() - start:.0f} s")
    if not arguments.quick:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
