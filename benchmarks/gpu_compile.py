"""Compiles every GPU kernel for its chips on a machine without a GPU, and holds it to gates.

Needs the CUDA plugin of the installed jax, and ptxas; `make gpu-compile` brings both. What kernels
are made of is compared with benchmarks/results/gpu_compile.json; --update writes that file, and
gpu_compile.md beside it.
"""

import argparse
import contextlib
import ctypes
import functools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

# all of these are read when jax or its plugin is loaded; a folder to dump to would also get what
# every pass made of a kernel, a hundred megabytes of each, which takes a third of compiling
os.environ.pop("MOSAIC_GPU_DUMP_TO", None)
os.environ["MOSAIC_GPU_DUMP_PTX"] = os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
# where a compiler prints a stack, looking up its names takes longer than all else
os.environ["LLVM_DISABLE_SYMBOLIZATION"] = "1"
os.environ["JSPARSE_TUNED"] = ""  # the shipped configurations, whatever was tuned here

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402

import jsparse as js  # noqa: E402
from benchmarks import compile_report  # noqa: E402
from jsparse.attention import mosaic as adapter  # noqa: E402
from jsparse.attention.attend import prepare  # noqa: E402
from jsparse.attention.block_sparse import block_sparse_attention, skipping_attention  # noqa: E402
from jsparse.attention.packing import Rows, pack  # noqa: E402
from pallas_kernels.block_sparse_attention import mosaic, walk  # noqa: E402

# what XLA's CUDA compiler wants to know of an H200 when none is there
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152
  shared_memory_per_core: 233472  threads_per_core_limit: 2048  core_count: 132
  fpus_per_core: 128  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535
  block_dim_limit_z: 65535  memory_bandwidth: 4800000000000  l2_cache_size: 62914560
  clock_rate_ghz: 1.98  device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536 }
platform_name: "CUDA"  dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H200"
"""


class Case(NamedTuple):
    """One compilation: sizes, and what changes the logits."""

    name: str
    dim: int = 128
    v_dim: int = 128
    block_q: int = 128
    block_kv: int = 128
    dtype: str = "bfloat16"
    q_len: int = 8192
    heads: int = 16
    kv_heads: int = 4
    batch: int = 1
    kv_len: int | None = None  # as many as queries
    # whether the query heads of a group share their lists
    shared: bool = False
    # given arrays of the shapes in `arrays`, the keyword arguments of attention
    options: Callable[..., dict[str, Any]] = lambda: {}
    arrays: tuple[tuple[tuple[int, ...], str], ...] = ()
    # whether tiles are skipped on the way; the first of the arrays is then the threshold
    skipping: bool = False
    # whether its gradients are by the kernels of other cases
    forward_alone: bool = False
    # entries that a list can hold; as many as there are tiles of keys where it says nothing
    width: int | None = None


# of the tiles that kernels get
PACKED = Rows(walk.ROWS, 2 * walk.ROWS)
T = 8192
IDS = ((1, T), "int32")
# lists per query, shared by the query heads of a group
NSA: dict[str, Any] = {
    **{"q_len": 4096, "heads": 64, "block_q": 1, "block_kv": 64, "width": 16},
    "shared": True,
}
# a query for each of some sequences, which sees some pages of keys, up to its own length
DECODE: dict[str, Any] = {
    **{"batch": 8, "q_len": 1, "kv_len": 32768, "heads": 32, "kv_heads": 8, "block_q": 1},
    "shared": True,
    "options": lambda length: {"mask": js.masks.lengths(length, length)},
    "arrays": (((8,), "int32"),),
}
# lists per query and head, of which those that name a tile of keys are gathered
ROUTED: dict[str, Any] = {
    **{"kv_heads": 16, "block_q": 1, "block_kv": 128, "width": 8},
    "forward_alone": True,  # gradients are Triton's: "gathered queries" there
}
# thresholds of what is skipped
LIMITS = (((1, 16), "float32"),)
SKIPPING: dict[str, Any] = {"arrays": LIMITS, "skipping": True, "forward_alone": True}
CAUSAL_SKIPPING: dict[str, Any] = {**SKIPPING, "options": lambda: {"mask": js.masks.causal()}}
CASES = (
    Case("dim 64", 64, 64),
    Case("dim 64, tiles 64 x 64", 64, 64, 64, 64),
    Case("dim 64, tiles 128 x 64", 64, 64, 128, 64),
    Case("dim 128"),
    Case("dim 128, float16", dtype="float16"),
    Case("dim 128, tiles 64 x 128", block_q=64),
    Case("dim 192, v_dim 128", 192, 128),
    Case("dim 256", 256, 256),
    Case("dim 256, tiles 128 x 64", 256, 256, 128, 64),
    Case("dim 80, odd length", 80, 80, q_len=8000),
    Case("causal", options=lambda: {"mask": js.masks.causal()}),
    Case("causal, dim 64", 64, 64, options=lambda: {"mask": js.masks.causal()}),
    Case("causal, dim 192, v_dim 128", 192, 128, options=lambda: {"mask": js.masks.causal()}),
    Case("causal, dim 256", 256, 256, options=lambda: {"mask": js.masks.causal()}),
    Case(
        "causal window, sinks",
        options=lambda: {
            "mask": js.masks.causal() & (js.masks.sliding_window(left=1024) | js.masks.sinks(4))
        },
    ),
    Case(
        "segments",
        options=lambda ids: {"mask": js.masks.causal() & js.masks.segments(ids)},
        arrays=(IDS,),
    ),
    Case(
        "intervals",
        options=lambda ends: {"mask": js.masks.intervals(ends, causal=False, q_len=T)},
        arrays=(((1, 16, T, 4), "int32"),),
    ),
    Case(
        "prefix, lengths",
        options=lambda prefix, length: {
            "mask": js.masks.prefix_lm(prefix) & js.masks.lengths(length, length)
        },
        arrays=(((1,), "int32"), ((1,), "int32")),
    ),
    Case(
        "dilated, strided",
        options=lambda: {
            "mask": js.masks.dilated(stride=4, window=64)
            | (js.masks.strided(stride=64) & js.masks.causal())
        },
    ),
    Case("softcap", options=lambda: {"softcap": 30.0}),
    Case(
        "score_mod (ALiBi)",
        options=lambda slopes: {
            "mask": js.masks.causal(),
            "score_mod": lambda logit, batch, head, q, kv: logit - slopes[head] * (q - kv),
        },
        arrays=(((16,), "float32"),),
    ),
    Case(
        "bias per key, traced scale",
        options=lambda bias, scale: {"bias": bias, "scale": scale},
        arrays=(((16, 1, T), "bfloat16"), ((), "float32")),
    ),
    Case(
        "nsa, dim 64",
        64,
        64,
        **NSA,
        options=lambda: {"mask": js.masks.causal()},
    ),
    Case("nsa", **NSA, options=lambda: {"mask": js.masks.causal()}),
    Case(
        "nsa, score_mod",
        **NSA,
        options=lambda slopes: {
            "mask": js.masks.causal(),
            "score_mod": lambda logit, batch, head, q, kv: logit - slopes[head] * (q - kv),
        },
        arrays=(((64,), "float32"),),
    ),
    Case("tiles 16 x 32", block_q=16, block_kv=32, kv_heads=16, width=32),
    Case("decode, pages of 16", **DECODE, block_kv=16, width=128),
    Case("decode, pages of 64", **DECODE, block_kv=64, width=32),
    Case("routed queries", **ROUTED),
    Case("routed queries, dim 64", 64, 64, **{**ROUTED, "block_kv": 64}),
    Case("routed queries, causal", **ROUTED, options=lambda: {"mask": js.masks.causal()}),
    Case("skipping", **SKIPPING),
    Case("skipping, dim 64", 64, 64, **SKIPPING),
    Case("skipping, tiles 64 x 64", block_q=64, block_kv=64, **SKIPPING),
    Case("skipping, causal", **CAUSAL_SKIPPING),
    Case("skipping, causal, tiles 64 x 128", block_q=64, **CAUSAL_SKIPPING),
    Case("skipping, causal, dim 192, v_dim 128", 192, 128, **CAUSAL_SKIPPING),
    Case("skipping, causal, dim 256", 256, 256, **CAUSAL_SKIPPING),
    Case("skipping, causal, dim 256, tiles 128 x 64", 256, 256, block_kv=64, **CAUSAL_SKIPPING),
    Case(
        "skipping, segments, odd length",
        q_len=8000,
        options=lambda ids: {"mask": js.masks.causal() & js.masks.segments(ids)},
        arrays=(*LIMITS, ((1, 8000), "int32")),
        skipping=True,
        forward_alone=True,
    ),
    Case(
        "skipping, intervals",
        options=lambda ends: {"mask": js.masks.intervals(ends, causal=False, q_len=T)},
        arrays=(*LIMITS, ((1, 16, T, 4), "int32")),
        skipping=True,
        forward_alone=True,
    ),
    Case(
        "skipping, score_mod (ALiBi)",
        options=lambda slopes: {
            "mask": js.masks.causal(),
            "score_mod": lambda logit, batch, head, q, kv: logit - slopes[head] * (q - kv),
        },
        arrays=(*LIMITS, ((16,), "float32")),
        skipping=True,
        forward_alone=True,
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="compile only cases whose name has this in it")
    compile_report.add_arguments(parser, compile_report.RESULTS)
    arguments = parser.parse_args()
    from benchmarks import gpu_compile_blackwell as blackwell  # these import this one
    from benchmarks import gpu_compile_maps as maps
    from benchmarks import gpu_compile_paged as paged
    from benchmarks import gpu_compile_plans as plans

    # what compiles the cases for Hopper alone, each with its own
    others = {case: paged.compiled_passes for case in paged.CASES}
    others |= {case: plans.compiled_passes for case in plans.CASES}
    others |= {case: maps.compiled_passes for case in maps.CASES}
    others |= {case: maps.compiled_antidiagonals for case in maps.ANTIDIAGONALS}
    others |= {case: maps.compiled_best for case in maps.BEST}
    others |= {case: maps.compiled_windows for case in maps.WINDOWS}
    every_case = *CASES, *others
    named = {c.name for c in every_case if not arguments.only or arguments.only in c.name}
    if not named:
        parser.error(f"no case has {arguments.only!r} in its name")
    device = topologies.get_topology_desc(
        platform="cuda", topology_name="H200", target_config=H200, topology="1x1x1"
    ).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    # a log is no narrower than the table
    console = Console(width=None if sys.stdout.isatty() else 125)
    rows = []
    chosen = [case for case in CASES if case.name in named]
    for case in track(chosen, "compiling", console=console):
        rows += compiled_passes(case, sharding)
    hopper_alone = [case for case in others if case.name in named]
    for case in track(hopper_alone, "for Hopper alone", console=console):
        rows += others[case](case, sharding)
    wanted = blackwell.taken(chosen)
    rows += track(blackwell.compiled(wanted), "for Blackwell", len(wanted), console=console)
    console.print(table(rows))
    failed = [row for row in rows if row["failed"]]
    for row in failed:
        console.print(f"[red]{row['name']}, {row['pass']}: {'; '.join(row['failed'])}")
    names = None if len(named) == len(every_case) else named
    return compile_report.conclude(rows, arguments.report, names, update=arguments.update)


def programs(case: Case, sharding: Any, passes: Any) -> tuple[Callable, Callable, list]:
    """Attention of a case and its gradients, computed by `passes`, and what to lower them with."""
    kv_len = case.kv_len or case.q_len
    q_blocks, kv_blocks = -(-case.q_len // case.block_q), -(-kv_len // case.block_kv)
    lists = case.batch, case.kv_heads if case.shared else case.heads, q_blocks
    shapes = (
        ((case.batch, case.q_len, case.heads, case.dim), case.dtype),
        ((case.batch, kv_len, case.kv_heads, case.dim), case.dtype),
        ((case.batch, kv_len, case.kv_heads, case.v_dim), case.dtype),
        ((*lists, case.width or kv_blocks), "int32"),
        (lists, "int32"),
        *case.arrays,
    )
    inputs = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]

    def attention(q, k, v, kv_indices, kv_num_blocks, *arrays):
        plan = js.BlockMask(
            kv_indices,
            kv_num_blocks,
            jnp.zeros(kv_num_blocks.shape[:-1], bool),
            case.q_len,
            kv_len,
            case.block_q,
            case.block_kv,
        )
        problem = prepare(q, k, v, plan, **case.options(*arrays[case.skipping :]))
        operands, _, mask, rule, *_ = problem
        operands, plan, rule = pack(operands, plan, rule, PACKED)
        if case.skipping:
            limits = jnp.log(arrays[0])
            return skipping_attention(operands, plan, mask, limits, rule, passes)[:2]
        return block_sparse_attention(operands, plan, mask, rule, passes)

    def gradients(q, k, v, kv_indices, kv_num_blocks, *arrays):
        floats = [n for n, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating)]

        def changed(q, k, v, *values):
            mixed = list(arrays)
            for n, value in zip(floats, values, strict=True):
                mixed[n] = value
            return attention(q, k, v, kv_indices, kv_num_blocks, *mixed)

        outputs, pullback = jax.vjp(changed, q, k, v, *(arrays[n] for n in floats))
        return pullback(jax.tree.map(jnp.ones_like, outputs))

    return attention, gradients, inputs


def compiled_passes(case: Case, sharding: Any) -> Iterator[dict[str, Any]]:
    """Compiles a case, then its gradients."""
    gates = functools.partial(_skipping_gates, case) if case.skipping else _gates
    for which in passes_taken(adapter.CHIPS["9"], case):
        yield compiled_pass(adapter.CHIPS["9"], case, which, sharding, gates)


def passes_taken(chip: adapter.Chip, case: Case) -> list[str]:
    """Which passes of a case the kernels of a chip take."""
    sizes = chip.forward.height(rows_of(case)), case.block_kv, *widths(case)
    forward = chip.skipping if case.skipping else chip.forward
    if forward is None or forward.refusal(case.dtype, *sizes):
        return []
    alone = case.forward_alone or chip.backward.refusal(*sizes)
    return ["forward"] if alone else ["forward", "gradients"]


def rows_of(case: Case) -> int:
    """Rows of a tile of queries, those of a group that shares a list in one."""
    shared = case.shared and case.block_q < PACKED.enough
    return case.block_q * (case.heads // case.kv_heads if shared else 1)


def widths(case: Case) -> tuple[int, int]:
    """Those of q and v as a kernel gets them."""
    padded = (-(-n // 64) * 64 for n in (case.dim, case.v_dim))
    return next(padded), next(padded)


def compiled_pass(
    chip: adapter.Chip,
    case: Case,
    which: str,
    sharding: Any,
    gates: Callable[[dict[str, Any]], list[tuple[str, bool]]],
) -> dict[str, Any]:
    """Compiles a pass of a case by the kernels of a chip, and reads what is said of them.

    Args:
      chip: The kernels.
      case: What is compiled.
      which: "forward", or "gradients", which computes the forward pass too.
      sharding: Puts it on such a device.
      gates: What may be wrong with the chip's kernels.
    """
    layouts: list[tuple[int, int]] = []
    attention, with_gradients, inputs = programs(case, sharding, telling(chip, layouts).passes)
    function = attention if which == "forward" else with_gradients
    return measure(case, which, function, inputs, layouts, gates)


def telling(chip: adapter.Chip, layouts: list[tuple[int, int]]) -> adapter.Chip:
    """A chip of which each pass tells how it is laid out, which may depend on what changes logits.

    Args:
      chip: The kernels.
      layouts: Is given the stages and bytes of shared memory of the pass that is traced last.
    """

    def forward(kernel, q, k, v, lists, *more_and_tiles_and_config):
        *_, tiles, config = more_and_tiles_and_config
        sizes = tiles.block_q, tiles.block_kv, q.shape[3], v.shape[3]
        layouts[:] = [(config.stages, kernel.shared_memory(*sizes, config))]
        return kernel.compute(q, k, v, lists, *more_and_tiles_and_config)

    def gradients(problem, lists, inverse, tiles):
        layouts[:] = chip.backward.layouts(tiles, problem.q.shape[3], problem.v.shape[3])
        return chip.backward.gradients(problem, lists, inverse, tiles)

    def told(kernel):
        return kernel and kernel._replace(compute=functools.partial(forward, kernel))

    return chip._replace(
        forward=told(chip.forward),
        skipping=told(chip.skipping),
        backward=chip.backward._replace(gradients=gradients),
    )


def measure(
    case: Case,
    name: str,
    function: Callable,
    inputs: list,
    layouts: list[tuple[int, int]],
    gates: Callable[[dict[str, Any]], list[tuple[str, bool]]],
) -> dict[str, Any]:
    """Compiles a function of a case and reads what the compiler says of its kernels.

    Args:
      case: What is compiled.
      name: The name of the pass.
      function: Computes it.
      inputs: What it is lowered with.
      layouts: Stages and bytes of shared memory of its programs; read once all is lowered.
      gates: What may be wrong with a chip's kernels.
    """
    lowered = jax.jit(function).lower(*inputs)
    with tempfile.TemporaryFile("w+") as file:
        with _printing_to(file):
            compiled = lowered.compile()
        file.seek(0)
        kernels, reports = compile_report.printed(file.read())
    registers = [int(_first(r"Used (\d+) registers", report)) for report in reports]
    memory = compiled.memory_analysis()
    instructions = [compile_report.instructions(ptx) for ptx in kernels]
    row: dict[str, Any] = {
        "name": case.name,
        "pass": name,
        "target": " ".join(sorted({_first(r"^\.target (\S+)", ptx) for ptx in kernels})),
        "tile": f"{case.block_q}x{case.block_kv}",
        "stages": min(stages for stages, _ in layouts),
        **compile_report.made_of(instructions, registers),
        "spill_bytes": sum(int(n) for r in reports for n in re.findall(r"(\d+) bytes spill", r)),
        "serialized": sum("instructions are serialized" in report for report in reports),
        "shared_memory": max(needed for _, needed in layouts),
        "temp_bytes": memory.temp_size_in_bytes,
        "input_bytes": memory.argument_size_in_bytes,
    }
    # for the gates alone, which fail where it is too little
    in_flight = min(compile_report.exponentials_in_flight(ptx) for ptx in kernels)
    found = [*gates({**row, "in_flight": in_flight}), *_common_gates(row)]
    row["failed"] = [sentence for sentence, wrong in found if wrong]
    return row


def _gates(row: dict[str, Any]) -> list[tuple[str, bool]]:
    # a forward kernel with two tiles in flight overlaps: a thread's exponentials of 64 x 64 logits;
    # or two programs of two warpgroups share a multiprocessor, and are that to each other
    alone = max(row["registers"]) > mosaic.HALF_THE_REGISTERS
    overlaps = row["pass"] == "forward" and row["stages"] > 1 and alone
    return hopper_gates(row, overlaps)


def _skipping_gates(case: Case, row: dict[str, Any]) -> list[tuple[str, bool]]:
    # softmax while the next logits are computed, where registers hold those of two tiles: not
    # beside what an array says of each key
    return hopper_gates(row, overlaps=row["stages"] > 1 and case.arrays == LIMITS)


def hopper_gates(row: dict[str, Any], overlaps: bool) -> list[tuple[str, bool]]:
    """What may be wrong with Hopper's kernels; whether all of them overlap, is said."""
    return [
        ("no softmax while a product goes on", overlaps and row["in_flight"] < 32),
        ("no wgmma: a kernel's products are not on the tensor cores", min(row["tensor_core"]) == 0),
        ("no TMA: a kernel's loads are not the copy engine's", min(row["bulk_copies"]) == 0),
        (f"compiled for {row['target']}, not sm_90a", row["target"] != "sm_90a"),
        ("wgmma waits for wgmma: the compiler serialized a kernel's", row["serialized"] > 0),
        (
            f"{row['shared_memory']} bytes of shared memory, more than a program may have",
            row["shared_memory"] > walk.SHARED_MEMORY,
        ),
    ]


def _common_gates(row: dict[str, Any]) -> list[tuple[str, bool]]:
    return [
        (f"{row['spill_bytes']} bytes of registers spilled", row["spill_bytes"] > 0),
        # padded copies, f32 outputs and lists, at most; a [q_len, kv_len] array would be far more
        (
            f"{row['temp_bytes']} bytes of temporaries for {row['input_bytes']} of inputs",
            row["temp_bytes"] > 4 * row["input_bytes"],
        ),
    ]


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    return match.group(1).rstrip(",") if match else "0"


@contextlib.contextmanager
def _printing_to(file: IO[str]) -> Iterator[None]:
    """Sends what C++ prints to a file."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(file.fileno(), 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(saved, 1)
        os.close(saved)


def table(rows: list[dict[str, Any]]) -> Table:
    """The figures, and a mark for each kernel that passed."""
    out = Table(
        title=f"block-sparse attention, jax {jax.__version__}",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    out.add_column("kernel", no_wrap=True)
    for name in (
        *("target", "pass", "tile", "kernels", "stages", "regs", "spill", "smem KB"),
        *("products", "copies", "temp MB", ""),
    ):
        out.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        out.add_row(
            row["name"],
            row["target"],
            row["pass"],
            row["tile"],
            str(len(row["registers"])),
            str(row["stages"]),
            str(max(row["registers"])),
            str(row["spill_bytes"]),
            f"{row['shared_memory'] / 1024:.0f}",
            str(min(row["tensor_core"])),
            str(min(row["bulk_copies"])),
            f"{row['temp_bytes'] / 2**20:.1f}",
            "[red]fails" if row["failed"] else "[green]ok",
        )
    return out


if __name__ == "__main__":
    sys.exit(main())
