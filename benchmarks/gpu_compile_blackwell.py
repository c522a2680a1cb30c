"""What `gpu_compile` compiles for Blackwell: the forward pass of each case that its kernel takes.

In a process of its own, for Mosaic assembles for the first chip that a process compiles for.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

# first: it says to jax what has to be said before that is loaded
from benchmarks import gpu_compile as common  # isort: skip

import jax
from jax.experimental import topologies

from benchmarks.gpu_compile import CASES, Case
from benchmarks.gpu_compile_triton import CHIPS
from jsparse.attention import mosaic as adapter
from pallas_kernels.block_sparse_attention import mosaic_blackwell

(B200,) = (chip for chip in CHIPS if chip.capability == "10.0")


def taken(cases: Sequence[Case]) -> list[str]:
    """The names of the cases that the kernel takes."""
    return [
        case.name
        for case in cases
        if mosaic_blackwell.refusal(case.dtype, case.block_q, case.block_kv, *widths(case)) is None
    ]


def widths(case: Case) -> tuple[int, int]:
    """Those of q and v as a kernel gets them."""
    padded = (-(-n // 64) * 64 for n in (case.dim, case.v_dim))
    return next(padded), next(padded)


def compiled(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Compiles the forward pass of cases."""
    with tempfile.TemporaryDirectory(prefix="mosaic-") as folder:
        # each process counts its kernels from 0
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            yield from process.map(compile_case, names)


def compile_case(name: str) -> dict[str, Any]:
    """Compiles the forward pass of a case in this process."""
    (case,) = (case for case in CASES if case.name == name)
    device = topologies.get_topology_desc(
        platform="cuda",
        topology_name=B200.name,
        target_config=B200.description(),
        topology="1x1x1",
    ).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    attention, _, inputs = common.programs(case, sharding, adapter.BLACKWELL)
    sizes = case.block_q, case.block_kv, *widths(case)
    config = mosaic_blackwell.default_config(*sizes)
    assert config is not None
    layout = {
        "stages": config.stages,
        "smem": mosaic_blackwell.shared_memory(*sizes, config),
    }
    return common.measure(case, "forward", attention, inputs, layout, partial(gates, case))


def gates(case: Case, row: dict[str, Any]) -> list[tuple[str, bool]]:
    """What may be wrong with a kernel, and whether it is."""
    needed = row["shared_memory"] + mosaic_blackwell.RESERVED
    columns = mosaic_blackwell.tensor_memory(case.block_kv, widths(case)[1])
    return [
        ("no tcgen05.mma: products are not on the tensor cores", 0 in row["tensor_core"]),
        ("no TMA: a kernel's loads are not the copy engine's", 0 in row["bulk_copies"]),
        (f"compiled for {row['target']}, not sm_100a", row["target"] != "sm_100a"),
        (f"{needed} bytes of shared memory, of {B200.shared_memory}", needed > B200.shared_memory),
        (f"{columns} columns of tensor memory", columns > mosaic_blackwell.TENSOR_MEMORY),
    ]
