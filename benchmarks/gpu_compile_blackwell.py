"""What `gpu_compile` compiles for Blackwell: the passes of each case that its kernels take.

In a process of its own, for Mosaic assembles for the first chip that a process compiles for.
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

# first: it says to jax what has to be said before that is loaded
from benchmarks import gpu_compile as common  # isort: skip

from benchmarks.chips import B200
from benchmarks.gpu_compile import CASES, Case
from jsparse.attention import mosaic as adapter
from pallas_kernels.block_sparse_attention import (
    mosaic_blackwell,
    mosaic_blackwell_backward,
    walk,
)

BLACKWELL = adapter.CHIPS["10"]


def taken(cases: Sequence[Case]) -> list[tuple[str, str]]:
    """The names of the cases that the kernels take, and of their passes."""
    return [(case.name, which) for case in cases for which in common.passes_taken(BLACKWELL, case)]


def compiled(wanted: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Compiles passes of cases."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        yield from process.map(compile_pass, *zip(*wanted, strict=True))


def compile_pass(name: str, which: str) -> dict[str, Any]:
    """Compiles a pass of a case in this process."""
    (case,) = (case for case in CASES if case.name == name)
    dim, v_dim = common.widths(case)
    columns = mosaic_blackwell.tensor_memory(case.block_kv, v_dim)
    if which == "gradients":
        columns = mosaic_blackwell_backward.tensor_memory((dim, v_dim))
    checked = partial(gates, columns)
    return common.compiled_pass(BLACKWELL, case, which, B200.sharding(), checked)


def gates(columns: int, row: dict[str, Any]) -> list[tuple[str, bool]]:
    """What may be wrong with kernels, and whether it is."""
    needed = row["shared_memory"] + walk.RESERVED
    return [
        ("no tcgen05.mma: products are not on the tensor cores", 0 in row["tensor_core"]),
        ("no TMA: a kernel's loads are not the copy engine's", 0 in row["bulk_copies"]),
        (f"compiled for {row['target']}, not sm_100a", row["target"] != "sm_100a"),
        (f"{needed} bytes of shared memory, of {B200.shared_memory}", needed > B200.shared_memory),
        (f"{columns} columns of tensor memory", columns > mosaic_blackwell.TENSOR_MEMORY),
    ]
