"""What `gpu_compile` compiles for Blackwell: the passes of each case that its kernels take.

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

from benchmarks.chips import B200
from benchmarks.gpu_compile import CASES, Case
from jsparse.attention import mosaic as adapter
from pallas_kernels.block_sparse_attention import (
    mosaic_blackwell,
    mosaic_blackwell_backward,
    walk,
)


def taken(cases: Sequence[Case]) -> list[tuple[str, str]]:
    """The names of the cases that the kernels take, and of their passes."""
    found = []
    for case in cases:
        sizes = case.block_q, case.block_kv, *widths(case)
        if mosaic_blackwell.refusal(case.dtype, *sizes) is None:
            found.append((case.name, "forward"))
            if mosaic_blackwell_backward.refusal(*sizes) is None:
                found.append((case.name, "gradients"))
    return found


def widths(case: Case) -> tuple[int, int]:
    """Those of q and v as a kernel gets them."""
    padded = (-(-n // 64) * 64 for n in (case.dim, case.v_dim))
    return next(padded), next(padded)


def compiled(wanted: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Compiles passes of cases."""
    with tempfile.TemporaryDirectory(prefix="mosaic-") as folder:
        # each process counts its kernels from 0
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            yield from process.map(compile_pass, *zip(*wanted, strict=True))


def compile_pass(name: str, which: str) -> dict[str, Any]:
    """Compiles a pass of a case in this process."""
    (case,) = (case for case in CASES if case.name == name)
    device = topologies.get_topology_desc(
        platform="cuda",
        topology_name=B200.name,
        target_config=B200.description(),
        topology="1x1x1",
    ).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    attention, gradients, inputs = common.programs(case, sharding, adapter.BLACKWELL)
    function = attention if which == "forward" else gradients
    layout, columns = asked(case, which)
    return common.measure(case, which, function, inputs, layout, partial(gates, columns))


def asked(case: Case, which: str) -> tuple[dict[str, int], int]:
    """Tiles in flight and shared memory of a pass, and its columns of tensor memory."""
    dim, v_dim = widths(case)
    sizes = case.block_q, case.block_kv, dim, v_dim
    if which == "forward":
        config = mosaic_blackwell.default_config(*sizes)
        assert config is not None
        needed = mosaic_blackwell.shared_memory(*sizes, config)
        columns = mosaic_blackwell.tensor_memory(case.block_kv, v_dim)
    else:
        config = mosaic_blackwell_backward.default_config(dim, v_dim)
        assert config is not None
        needed = mosaic_blackwell_backward.shared_memory(dim, v_dim, config)
        columns = mosaic_blackwell_backward.tensor_memory((dim, v_dim))
    return {"stages": config.stages, "smem": needed}, columns


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
