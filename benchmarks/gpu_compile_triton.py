"""Compiles the Triton kernels for several chips on a machine without a GPU; holds them to gates.

What kernels are made of is compared with benchmarks/results/gpu_compile_triton.json; --update
writes that file, and the page beside it. Needs the CUDA plugin of the installed jax, and ptxas;
`make gpu-compile` brings both.
"""

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# first: it says to jax what has to be said before that is loaded
from benchmarks import gpu_compile as common  # isort: skip

import jax
import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jsparse as js
from benchmarks import compile_report
from benchmarks.chips import CHIPS, Chip
from benchmarks.gpu_compile import Case
from jsparse.attention.triton import PASSES
from pallas_kernels.block_sparse_attention.triton import LEAST_SIDE, WIDEST_OF_GRADIENTS
from pallas_kernels.block_sparse_attention.triton_columns import spills


# what a rule may do on registers, derivatives and all: they do not hold everything at once
def waves(table, logit, batch, head, q, kv):
    """Sines, roots and steps, and an array of what each key adds."""
    far = jnp.abs(q - kv).astype(jnp.float32)
    x = jnp.clip(jnp.sin(logit) * jnp.cos(far) + jnp.log1p(far) - jnp.exp2(-far), -9, table[kv])
    x = x + jax.lax.rsqrt(1 + x * x) + jnp.sqrt(1 + far) * jnp.sign(x)
    return x + jnp.floor(x) + jnp.ceil(x)


def powers(logit, batch, head, q, kv):
    """Exponentials and powers."""
    far = jnp.abs(q - kv).astype(jnp.float32)
    x = jnp.expm1(jnp.tanh(logit)) + jax.lax.logistic(logit) ** 3
    return x + (2 + jnp.tanh(x)) ** (1 + far / T)


def choices(x, batch, head, q, kv):
    """Conditions, and what has no derivative."""
    far = jnp.abs(q - kv).astype(jnp.float32)
    x = jnp.where((q % 7 < kv // 3) ^ (head == 1) | ~(x > 1), x, jnp.maximum(jnp.exp(-x), far))
    return x + jax.lax.stop_gradient(jnp.log(1 + x * x)) / (1 + far)


def tokens_of(group: int, kv_heads: int = 4) -> dict[str, Any]:
    """Lists of tokens for each query and group of so many heads, as a causal selection makes."""
    return {
        **{"block_q": 1, "block_kv": 1, "heads": group * kv_heads, "kv_heads": kv_heads},
        **{"q_len": T, "width": 512, "shared": True},
        "options": lambda: {"mask": js.masks.causal()},
    }


T = 4096
PAIRS = (1, T, T)
SHARED = frozenset({"causal", "segments", "score_mod (ALiBi)", "bias per key, traced scale"})
CASES = (
    *(Case(f"dim {dim}", dim, dim) for dim in (16, 64, 128, 256)),
    *(Case(f"dim {dim}, f32", dim, dim, dtype="float32") for dim in (64, 128, 256)),
    Case("dim 128, float16", dtype="float16"),
    Case("dim 192, v_dim 128", 192, 128),
    Case("dim 64, tiles 16 x 16", 64, 64, 16, 16, q_len=T),
    Case("dim 128, tiles 64 x 32", 128, 128, 64, 32),
    Case(
        "causal, tiles 24 x 64, filled up",
        block_q=24,
        block_kv=64,
        options=lambda: {"mask": js.masks.causal()},
    ),
    *(case for case in common.CASES if case.name in SHARED),
    Case(
        "causal, f32",
        dtype="float32",
        options=lambda: {"mask": js.masks.causal()},
    ),
    Case(
        "softcap, score_mod, dim 64",
        64,
        64,
        options=lambda slopes: {
            "mask": js.masks.causal(),
            "softcap": 30.0,
            "score_mod": lambda logit, batch, head, q, kv: logit - slopes[head] * (q - kv),
        },
        arrays=(((16,), "float32"),),
    ),
    *(
        Case(
            f"skipping, {name}",
            dim,
            dim,
            *tile,
            dtype=dtype,
            options=options,
            arrays=(((1, 16), "float32"),),
            skipping=True,
        )
        for name, dim, tile, dtype, options in (
            ("dim 64", 64, (128, 64), "bfloat16", lambda: {}),
            ("causal", 128, (128, 64), "bfloat16", lambda: {"mask": js.masks.causal()}),
            ("causal, dim 256", 256, (64, 32), "bfloat16", lambda: {"mask": js.masks.causal()}),
            ("causal, f32", 128, (64, 32), "float32", lambda: {"mask": js.masks.causal()}),
        )
    ),
    *(
        Case(f"{what}, {name}", dim, dim, *tile, dtype=dtype, options=options, width=width)
        for what, tile, width in (
            ("gathered queries", (1, 64), 8),
            ("gathered columns", (128, 1), 256),
        )
        for name, dim, dtype, options in (
            ("dim 64", 64, "bfloat16", lambda: {}),
            ("dim 128", 128, "bfloat16", lambda: {}),
            ("causal", 128, "bfloat16", lambda: {"mask": js.masks.causal()}),
            ("dim 256", 256, "bfloat16", lambda: {}),
            ("f32", 64, "float32", lambda: {}),
            ("causal, f32", 128, "float32", lambda: {"mask": js.masks.causal()}),
            ("dim 256, f32", 256, "float32", lambda: {}),
        )
    ),
    *(
        Case(f"tokens of {group} heads, {name}", dim, dim, dtype=dtype, **tokens_of(group))
        for group in (1, 3, 8, 16)
        for name, dim, dtype in (
            ("dim 64", 64, "bfloat16"),
            ("dim 128", 128, "bfloat16"),
            ("dim 256", 256, "bfloat16"),
            ("f32, dim 64", 64, "float32"),
            ("f32", 128, "float32"),
            ("f32, dim 256", 256, "float32"),
        )
    ),
    *(
        Case(f"latents, {heads} heads, {name}", 576, v_dim, **tokens_of(heads, 1))
        for heads in (3, 16, 128)
        for name, v_dim in (("v_dim 512", 512), ("v_dim 576", 576))
    ),
    Case("latents, no mask", 576, 512, **tokens_of(16, 1) | {"options": lambda: {}}),
    Case("gathered queries, tiles of 4 x 128", 128, 128, 4, 128, kv_heads=16, width=8),
    Case("gathered columns, tiles of 64 x 8", 128, 128, 64, 8, width=64),
    Case(
        "operations: waves",
        *(16, 16, 16, 16),  # sines alone fill hundreds of lines
        options=lambda table: {"score_mod": functools.partial(waves, table)},
        arrays=(((T,), "float32"),),
        q_len=T,
    ),
    *(
        Case(
            f"operations: {rule.__name__}",
            *(16, 16, 32, 32),
            options=lambda rule=rule: {"score_mod": rule},
            q_len=T,
        )
        for rule in (powers, choices)
    ),
    Case(
        "dense mask",
        q_len=T,
        options=lambda pairs: {"mask": js.masks.dense(pairs)},
        arrays=(((1, *PAIRS), "bool"),),
    ),
    Case(
        "bias of all pairs",
        q_len=T,
        options=lambda bias: {"bias": bias},
        arrays=((PAIRS, "bfloat16"),),
    ),
)
# a kernel of each kind on every chip; the others cost minutes
USUAL = frozenset(
    {"dim 64", "dim 128, f32", "causal", "segments", "softcap, score_mod, dim 64", "dense mask"}
    | {"skipping, causal", "gathered queries, causal", "gathered columns, causal"}
)


RESULTS = compile_report.RESULTS.with_name("gpu_compile_triton.json")
FORWARD = frozenset({"forward", "skipping", "gathered_forward"})
# the kernels that add up what others computed
SUMS = frozenset({"add_entries"})


def kernels_of(case: Case, name: str) -> int:
    """How many Triton kernels a pass of a case has."""
    if name == "gradients" and (
        max(case.dim, case.v_dim) > WIDEST_OF_GRADIENTS
        or (
            case.block_kv < LEAST_SIDE
            and spills(case.dtype, common.rows_of(case), case.dim, case.v_dim)
        )
    ):
        return 0  # they are XLA's
    # what gathered columns give to each key is added up by a kernel of its own
    return 1 if name == "forward" else 3 + (case.block_kv < LEAST_SIDE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="compile every case; takes minutes")
    parser.add_argument("--only", default="", help="compile only cases whose name has this in it")
    parser.add_argument("--chip", default="", help="compile only for this compute capability")
    compile_report.add_arguments(parser, RESULTS)
    arguments = parser.parse_args()
    chosen = [
        (chip, case)
        for chip in CHIPS
        for case in CASES
        if arguments.only in case.name and arguments.chip in ("", chip.capability)
        if arguments.all or arguments.only or case.name in USUAL
    ]
    if not chosen:
        parser.error("no case has such a name, or there is no such chip")
    console = Console(width=None if sys.stdout.isatty() else 125)
    rows = []
    for chip, case in track(chosen, "compiling", console=console):
        rows += compiled_passes(case, chip)
    console.print(table(rows))
    for row in rows:
        if row["failed"]:
            about = f"{row['target']}, {row['name']}, {row['pass']}"
            console.print(f"[red]{about}: {'; '.join(row['failed'])}", highlight=False)
    names = None if arguments.all and not arguments.only else {case.name for _, case in chosen}
    targets = {row["target"] for row in rows} if arguments.chip else None
    return compile_report.conclude(rows, arguments.report, names, targets, update=arguments.update)


def compiled_passes(case: Case, chip: Chip) -> Iterator[dict[str, Any]]:
    """Compiles a case, then its gradients."""
    attention, gradients, inputs = common.programs(case, chip.sharding(), PASSES)
    gathered = min(case.block_q, case.block_kv) < LEAST_SIDE
    # a tile of so few rows is read whole before anything is computed
    at_once = "d_entries" if common.rows_of(case) <= LEAST_SIDE else None
    for name, function in (("forward", attention), ("gradients", gradients)):
        if not kernels_of(case, name):
            continue
        rows = list(measure(function, inputs, chip, gathered=gathered, at_once=at_once))
        for row in rows:
            # the gradients compute the forward pass again; one report of that is enough
            if name == "forward" or row["pass"] not in FORWARD:
                yield {"name": case.name, "tile": f"{case.block_q}x{case.block_kv}", **row}
        if len(rows) != (wanted := kernels_of(case, name)):
            sys.exit(f"{case.name}, {name}: {len(rows)} kernels, not {wanted}, were dumped.")


def measure(
    function: Callable, inputs: list, chip: Chip, *, gathered: bool, at_once: str | None
) -> Iterator[dict[str, Any]]:
    """Compiles a function and reads what the compilers say of each Triton kernel in it."""
    with tempfile.TemporaryDirectory(prefix="triton-") as folder:
        # the second, or versions from 0.11 on leave no .ptx
        options = {"xla_dump_to": folder, "xla_dump_emitter_re": ".*"}
        with chip.lowering():
            compiled = jax.jit(function).lower(*inputs).compile(compiler_options=options)
        memory = compiled.memory_analysis()
        (thunks,) = (path.read_text() for path in Path(folder).glob("*.thunk_sequence.txt"))
        for path in Path(folder).glob("*.ptx"):
            ptx = path.read_text()
            if "_kernel(" not in ptx:
                continue
            target = _found(r"^\.target (\w+)", ptx)
            for kernel in re.findall(r"\.entry (\w+)_kernel\(", ptx):
                body = ptx.split(f".entry {kernel}_kernel(")[1].split(".entry ")[0]
                said = _assembled(path, target, f"{kernel}_kernel")
                asked = _found(rf"{kernel}_kernel .*shared_memory: (\d+)", thunks)
                row = {
                    "pass": kernel,
                    "target": target,
                    "warps": int(_found(r"\.(?:req|max)ntid (\d+)", body)) // 32,
                    "registers": [int(_found(r"Used (\d+) registers", said))],
                    "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
                    "shared_memory": int(asked),
                    "tensor_core": [len(re.findall(chip.product, body))],
                    "bulk_copies": [len(re.findall(r"cp\.async\.c[ag]", body))],
                    "temp_bytes": memory.temp_size_in_bytes,
                    "input_bytes": memory.argument_size_in_bytes,
                }
                waits = kernel in SUMS or kernel == at_once
                gates = _gates(row, chip, gathered=gathered, waits=waits)
                row["failed"] = [sentence for sentence, wrong in gates if wrong]
                yield row


def _assembled(ptx: Path, target: str, kernel: str) -> str:
    """What ptxas says of one of the kernels in a file."""
    command = [_ptxas(), f"-arch={target}", "-v", str(ptx), "-o", os.devnull]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return report.split(f"entry function '{kernel}'")[1].split("entry function")[0]


def _gates(
    row: dict[str, Any], chip: Chip, *, gathered: bool, waits: bool
) -> list[tuple[str, bool]]:
    major, minor = chip.capability.split(".")
    computes = row["pass"] not in SUMS
    return [
        ("no product is on the tensor cores", computes and 0 in row["tensor_core"]),
        ("no load is asynchronous", not waits and 0 in row["bulk_copies"]),
        (f"compiled for {row['target']}", not row["target"].startswith(f"sm_{major}{minor}")),
        (f"{row['spill_bytes']} bytes of registers spilled", row["spill_bytes"] > 0),
        # padded copies, f32 outputs and lists, at most; and what entries of a span are given
        (
            f"{row['temp_bytes']} bytes of temporaries for {row['input_bytes']} of inputs",
            row["temp_bytes"] > (8 if gathered else 4) * row["input_bytes"],
        ),
    ]


def _ptxas() -> str:
    packages = [path for path in map(Path, sys.path) if path.name == "site-packages"]
    found = [str(p) for path in packages for p in path.glob("nvidia/*/bin/ptxas")]
    # one that came with this plugin reads what it writes; an older one may not
    program = next(iter(found), None) or shutil.which("ptxas")
    return program or sys.exit("There is no ptxas; install nvidia-cuda-nvcc.")


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    return match.group(1) if match else sys.exit(f"The compiler did not say {pattern!r}.")


def table(rows: list[dict[str, Any]]) -> Table:
    """The figures, and a mark for each kernel that passed."""
    out = Table(
        title=f"block-sparse attention, Triton, jax {jax.__version__}",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    out.add_column("kernel", no_wrap=True)
    for name in (
        "",
        "chip",
        "warps",
        "spill",
        "smem KB",
        "regs",
        "products",
        "copies",
        "temp MB",
        "",
    ):
        out.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        out.add_row(
            row["name"],
            row["pass"],
            row["target"],
            *(str(row[name]) for name in ("warps", "spill_bytes")),
            f"{row['shared_memory'] / 1024:.0f}",
            *(str(row[name][0]) for name in ("registers", "tensor_core", "bulk_copies")),
            f"{row['temp_bytes'] / 2**20:.1f}",
            "[red]fails" if row["failed"] else "[green]ok",
        )
    return out


if __name__ == "__main__":
    sys.exit(main())
