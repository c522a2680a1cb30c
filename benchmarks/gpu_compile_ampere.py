"""Compiles the Mosaic kernels for GPUs of compute capability 8 without one; holds them to gates.

Needs jax 0.11 or newer with its CUDA plugin, and ptxas; `make gpu-compile` brings them. What
kernels are made of is compared with benchmarks/results/gpu_compile_ampere.json; --update writes
that file, and its page beside it.
"""

import argparse
import itertools
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

# first: it says to jax what has to be said before that is loaded
from benchmarks import gpu_compile as common  # isort: skip

import jax
from rich.console import Console
from rich.progress import track

from benchmarks import compile_report
from benchmarks.chips import A100, L4, Chip
from benchmarks.gpu_compile import CASES, passes_taken
from jsparse.attention import mosaic as adapter
from pallas_kernels.block_sparse_attention import mosaic_ampere

RESULTS = compile_report.RESULTS.with_name("gpu_compile_ampere.json")
KERNELS = adapter.CHIPS["8"]
# a kernel of each kind; what else differs between the chips is how much shared memory there is
USUAL = frozenset({"dim 64", "dim 128", "dim 256, tiles 128 x 64", "causal", "score_mod (ALiBi)"})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="compile only cases whose name has this in it")
    compile_report.add_arguments(parser, RESULTS)
    arguments = parser.parse_args()
    if jax.__version_info__ < (0, 11):
        parser.error(f"kernels for these chips need jax 0.11 or newer; this is {jax.__version__}")
    chosen = [case for case in CASES if not arguments.only or arguments.only in case.name]
    if not chosen:
        parser.error(f"no case has {arguments.only!r} in its name")
    console = Console(width=None if sys.stdout.isatty() else 125)
    rows = []
    for chip, cases in ((A100, chosen), (L4, [case for case in chosen if case.name in USUAL])):
        wanted = [(case.name, which) for case in cases for which in passes_taken(KERNELS, case)]
        if not wanted:
            continue
        # a process of its own: Mosaic assembles for the first chip that a process compiles for
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            compiled = process.map(compile_pass, *zip(*wanted, strict=True), itertools.repeat(chip))
            about = f"compiling for {chip.name}"
            rows += track(compiled, about, total=len(wanted), console=console)
    console.print(common.table(rows))
    for row in rows:
        if row["failed"]:
            about = f"{row['name']}, {row['pass']} ({row['target']})"
            console.print(f"[red]{about}: {'; '.join(row['failed'])}")
    names = {case.name for case in chosen} if arguments.only else None
    return compile_report.conclude(rows, arguments.report, names, update=arguments.update)


def compile_pass(name: str, which: str, chip: Chip) -> dict[str, Any]:
    """Compiles a pass of a case for a chip."""
    (case,) = (case for case in CASES if case.name == name)
    with chip.lowering():
        checked = partial(gates, chip)
        return common.compiled_pass(KERNELS, case, which, chip.sharding(), checked)


def gates(chip: Chip, row: dict[str, Any]) -> list[tuple[str, bool]]:
    """What may be wrong with a kernel for a chip, and whether it is."""
    target = f"sm_{chip.capability.replace('.', '')}"
    needed = row["shared_memory"] + mosaic_ampere.RESERVED
    return [
        ("no mma.sync: a kernel's products are not on the tensor cores", 0 in row["tensor_core"]),
        ("no cp.async: a kernel's loads are not asynchronous", 0 in row["bulk_copies"]),
        (f"compiled for {row['target']}, not {target}", row["target"] != target),
        (f"{needed} bytes of shared memory, of {chip.shared_memory}", needed > chip.shared_memory),
    ]


if __name__ == "__main__":
    sys.exit(main())
