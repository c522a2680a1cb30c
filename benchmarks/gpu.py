"""Numerics, then timings, of the GPU kernels on this machine's GPU; peers in the same run.

    python3 -m benchmarks.gpu              # all of it; writes benchmarks/results/gpu_<device>.json
    python3 -m benchmarks.gpu --numerics   # only whether the kernels are right
    python3 -m benchmarks.gpu --dry-run    # tiny sizes on any machine, to try the script itself

Needs no network and no installation: run it at the root of the repository. torch is a peer where
it is installed. A case is timed only after its output agreed with the reference; beside each time
stands what the roofline expects at best. `python -m benchmarks.plots` draws what it wrote.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# torch wants memory of the same card
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

import jsparse as js
from benchmarks import gpu_peers, gpu_scorers, roofline
from jsparse.attention.tuning import milliseconds
from pallas_kernels import configurations

# fraction of the output's norm: bf16 probabilities and output, 2^-9 each, and what sums to it
TOLERANCE = {"bfloat16": 2.0**-7, "float16": 2.0**-10}


BACKWARD = "jsparse, forward and gradients"


class Sizes(NamedTuple):
    """Of one timed problem."""

    length: int
    heads: int
    kv_heads: int
    dim: int
    density: float
    causal: bool = False


class Run(NamedTuple):
    """What the command line chose."""

    implementation: str
    check_length: int
    sizes: tuple[Sizes, ...]
    milliseconds: float
    scorers: tuple[gpu_scorers.Sizes, ...]


FULL = Run(
    "mosaic",
    2048,
    tuple(
        Sizes(length, 16, kv_heads, dim, density)
        for length in (8192, 32768)
        for dim, kv_heads in ((128, 16), (64, 16), (128, 4))
        for density in (1.0, 0.5, 0.25, 0.1, 0.05)
    )
    + tuple(
        Sizes(length, 16, 16, 128, density)
        for length in (16384, 65536)
        for density in (1.0, 0.25, 0.1)
    )
    + tuple(Sizes(length, 16, 16, 128, 1.0, causal=True) for length in (8192, 32768)),
    200.0,
    gpu_scorers.FULL,
)
DRY = Run(
    "xla",
    256,
    (Sizes(256, 2, 1, 64, 1.0), Sizes(256, 2, 1, 64, 0.5), Sizes(256, 2, 2, 64, 1.0, causal=True)),
    20.0,
    gpu_scorers.DRY,
)


def arguments_of(parser: argparse.ArgumentParser, name: str) -> tuple[argparse.Namespace, Path]:
    """What was asked for on the command line, and the JSON's path, whose folder is made."""
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, any machine")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu" and not arguments.dry_run:
        parser.error(
            f"jax finds no GPU here (its backend is {jax.default_backend()}); "
            "--dry-run tries the script without one"
        )
    device = jax.devices()[0].device_kind.replace(" ", "_").lower()
    output = arguments.output or Path(
        f"build/{name}_dry_run.json"
        if arguments.dry_run
        else f"benchmarks/results/{name}_{device}.json"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    return arguments, output


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--numerics", action="store_true", help="do not time anything")
    arguments, output = arguments_of(parser, "gpu")
    run = DRY if arguments.dry_run else FULL
    record: dict[str, Any] = {"machine": machine(), "numerics": [], "timings": [], "scorers": []}

    def save() -> None:
        # after every case, so that a run that is cut off leaves what it had
        output.write_text(json.dumps(record, indent=1) + "\n")

    for name, case in numeric_cases(run.check_length).items():
        record["numerics"].append({"case": name, **attempt(lambda c=case: numerics(run, c))})
        print(json.dumps(record["numerics"][-1]), flush=True)
        save()
    wrong = [row for row in record["numerics"] if row.get("error") or not row["right"]]
    if not arguments.numerics:
        for sizes in run.sizes:
            row = {**sizes._asdict(), **attempt(lambda s=sizes: timings(run, s))}
            record["timings"].append(row)
            record["crossovers"] = crossovers(record["timings"])
            print(summary(row), flush=True)
            save()
        for scorer, sizes in itertools.product(gpu_scorers.SCORERS, run.scorers):
            how = run.implementation, run.milliseconds
            row = attempt(gpu_scorers.timings, scorer, sizes, *how)
            record["scorers"].append(row)
            print(gpu_scorers.summary(row) if "ms" in row else f"failed: {row}", flush=True)
            save()
    for row in record.get("crossovers", []):
        print(
            f"T {row['length']} d {row['dim']} kv {row['kv_heads']}: selecting and computing tiles "
            f"beats cuDNN's {row['dense_ms']:.3f} ms below density {row['density']:.2f}"
        )
    print(f"{len(record['numerics']) - len(wrong)} of {len(record['numerics'])} cases right")
    print(f"written: {output}")
    timed = record["timings"] + record["scorers"]
    return 1 if wrong or any("error" in row for row in timed) else 0


def attempt(measure: Callable[..., dict[str, Any]], *what: Any) -> dict[str, Any]:
    """One failing case must not cost the others their time on the machine."""
    try:
        return measure(*what)
    except ImportError as error:
        return {"missing": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def machine() -> dict[str, Any]:
    """What a figure cannot be read without."""
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm"
    try:
        nvidia = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True
        ).stdout.strip()
    except OSError:
        nvidia = "nvidia-smi not found"
    try:
        import torch

        torch_version = torch.__version__
    except ImportError:
        torch_version = "not installed"
    tuned = configurations.place()
    return {
        "device": jax.devices()[0].device_kind,
        "configurations": str(tuned) if tuned and tuned.exists() else "shipped",
        "nvidia_smi": nvidia,
        "jax": jax.__version__,
        "torch": torch_version,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def numeric_cases(length: int) -> dict[str, dict[str, Any]]:
    """Keyword arguments of attention, and sizes, by name."""
    rng = np.random.default_rng(0)
    ids = jnp.asarray(np.sort(rng.integers(0, 4, (1, length)), axis=1), jnp.int32)
    slopes = jnp.asarray(2.0 ** -np.arange(1, 5), jnp.float32)
    ends = jnp.asarray(rng.integers(0, length + 1, (1, 4, length, 4)), jnp.int32)
    bias = jnp.asarray(rng.normal(size=(4, 1, length)), jnp.bfloat16)
    causal = js.masks.causal()
    return {
        "plain": {},
        "float16": {"dtype": "float16"},
        "dim 64": {"dim": 64, "v_dim": 64},
        "dim 192, v_dim 128": {"dim": 192},
        "dim 256": {"dim": 256, "v_dim": 256, "block_kv": 64},
        "tiles 64 x 64": {"block_q": 64, "block_kv": 64},
        "odd length": {"odd": 37},
        "dim 80": {"dim": 80, "v_dim": 80},
        "causal": {"mask": causal},
        "window, sinks": {
            "mask": causal & (js.masks.sliding_window(left=200) | js.masks.sinks(4)),
            "sinks": jnp.asarray([0.0, 1.0, -1.0, 2.0]),
        },
        "segments": {"mask": causal & js.masks.segments(ids)},
        "intervals": {"mask": js.masks.intervals(ends, causal=False, q_len=length)},
        "softcap": {"softcap": 10.0},
        "ALiBi": {
            "mask": causal,
            "score_mod": lambda logit, batch, head, q, kv: logit - slopes[head] * (q - kv),
        },
        "bias per key, traced scale": {"bias": bias, "scale": jnp.asarray(0.05)},
    }


def problem(
    length: int, heads: int, kv_heads: int, dim: int, v_dim: int, dtype: str, seed: int = 0
) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, v_dim))
    return tuple(
        jax.random.normal(key, (1, length, *shape), jnp.dtype(dtype))
        for key, shape in zip(keys, shapes, strict=True)
    )


def random_plan(
    length: int, heads: int, density: float, block_q: int = 128, block_kv: int = 128
) -> js.BlockMask:
    """Each row of tiles the same number of tiles, at random, the first among them."""
    rng = np.random.default_rng(0)
    rows, columns = -(-length // block_q), -(-length // block_kv)
    rank = rng.random((heads, rows, columns)).argsort(-1).argsort(-1)
    return js.BlockMask.from_dense(
        jnp.asarray(rank < max(1, round(density * columns))),
        q_len=length,
        kv_len=length,
        block_q=block_q,
        block_kv=block_kv,
    )


def numerics(run: Run, case: dict[str, Any]) -> dict[str, Any]:
    """The kernel against the reference in f32 on the same rounded inputs, twice."""
    case = dict(case)
    length = run.check_length - case.pop("odd", 0)
    dtype, dim = case.pop("dtype", "bfloat16"), case.pop("dim", 128)
    v_dim = case.pop("v_dim", 128)
    tiles = {name: case.pop(name, 128) for name in ("block_q", "block_kv")}
    q, k, v = problem(length, 4, 2, dim, v_dim, dtype)
    plan = random_plan(length, 4, 0.5, **tiles)

    def attention(implementation, q, k, v):
        return js.attend(q, k, v, plan, return_lse=True, implementation=implementation, **case)

    weights = jax.random.normal(jax.random.key(9), (*q.shape[:-1], v_dim), jnp.float32)

    def everything(implementation):
        def loss(q, k, v):
            out, lse = attention(implementation, q, k, v)
            seen = jnp.where(jnp.isneginf(lse), 0.0, lse)
            return (out.astype(jnp.float32) * weights).sum() + seen.sum(), (out, lse)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))

    kernel = everything(run.implementation)
    gradients, (out, lse) = jax.block_until_ready(kernel(q, k, v))
    gradients_again, (again, _) = jax.block_until_ready(kernel(q, k, v))
    with jax.default_matmul_precision("highest"):
        f32 = [x.astype(jnp.float32) for x in (q, k, v)]
        want_gradients, (want, want_lse) = everything("reference")(*f32)
    relative = [
        float(jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) / jnp.linalg.norm(b.ravel()))
        for a, b in zip(gradients, want_gradients, strict=True)
    ]
    equal = zip(gradients, gradients_again, strict=True)
    same_gradients = all(bool((a == b).all()) for a, b in equal)
    out, lse, again, want, want_lse = (
        np.asarray(x, np.float64) for x in (out, lse, again, want, want_lse)
    )
    error = float(np.linalg.norm(out - want) / np.linalg.norm(want))
    seen = np.isfinite(want_lse)
    lse_error = float(np.abs(lse[seen] - want_lse[seen]).max())
    same = bool((out == again).all()) and same_gradients
    right = (
        max(relative) < 2 * TOLERANCE[dtype]
        and error < TOLERANCE[dtype]
        and lse_error < 1e-3
        and same
    )
    right &= bool((np.isneginf(lse) == np.isneginf(want_lse)).all())
    return {
        "error": None,
        "right": bool(right),
        "relative": error,
        "lse": lse_error,
        "gradients": relative,
        "same": same,
    }


def timings(run: Run, sizes: Sizes) -> dict[str, Any]:
    """Milliseconds of ours and of each peer that can do the same here."""
    q, k, v = problem(sizes.length, sizes.heads, sizes.kv_heads, sizes.dim, sizes.dim, "bfloat16")
    mask = js.masks.causal() if sizes.causal else None
    if sizes.causal:
        build = jax.jit(lambda: js.block_mask(mask, sizes.length, sizes.length))
        plan = build()
    else:
        # tiles at random are timed; what it costs to select as many is that of the plain baseline
        method = js.mean_pooled(density=sizes.density)
        select = jax.jit(lambda q, k: method.plan((), q, k)[0])
        build = lambda: select(q, k)  # noqa: E731
        plan = random_plan(sizes.length, sizes.heads, sizes.density)
    tiles = float(np.asarray(plan.kv_num_blocks).sum())
    tiles *= sizes.heads / plan.kv_num_blocks.shape[-2]
    work = roofline.kernels(
        roofline.Problem(
            *(sizes.heads, sizes.kv_heads, sizes.length, sizes.length, sizes.dim, sizes.dim, tiles),
            *(plan.block_q, plan.block_kv),
            masked=sizes.causal,
        )
    )
    flops = work["forward"].flops
    row: dict[str, Any] = {"tiles": tiles, "gflop": flops / 1e9, "roofline": expected(work)}

    ours = jax.jit(
        lambda q, k, v, plan: js.attend(q, k, v, plan, mask=mask, implementation=run.implementation)
    )
    both = jax.jit(
        jax.grad(
            lambda q, k, v, plan: ours(q, k, v, plan).astype(jnp.float32).sum(), argnums=(0, 1, 2)
        )
    )
    runs = {"jsparse": lambda: ours(q, k, v, plan), BACKWARD: lambda: both(q, k, v, plan)}
    result = np.asarray(ours(q, k, v, plan), np.float32)
    row["plan_ms"] = milliseconds(build, jax.block_until_ready, run.milliseconds)
    inverse = jax.jit(lambda plan: plan.inverse())
    row["inverse_ms"] = milliseconds(lambda: inverse(plan), jax.block_until_ready, run.milliseconds)
    lists, rows = plan.kv_num_blocks.size // plan.grid.q_blocks, plan.grid.q_blocks
    turned = roofline.inverse_lists(lists, rows, plan.width, plan.grid.kv_blocks)
    row["inverse_roofline"] = expected({"inverse": turned})["inverse"]
    times: dict[str, Any] = {}
    for name, call in runs.items():
        times[name] = attempt(
            lambda c=call: {"ms": milliseconds(c, jax.block_until_ready, run.milliseconds)}
        )
    if sizes.density == 1.0:
        for name, prepare in gpu_peers.DENSE.items():
            times[name] = attempt(
                lambda p=prepare: dense_time(run, p(q, k, v, causal=sizes.causal), result)
            )
    times |= torch_times(run, sizes, plan, (q, k, v), result)
    row["times"] = times
    best = {name: kernel["expected_ms"] for name, kernel in row["roofline"].items()}
    for name, entry in times.items():
        if "ms" not in entry:
            continue
        if name != BACKWARD:
            # a dense peer computes every tile; its rate is given on those
            entry["tflops"] = flops / entry["ms"] / 1e9
        if None not in best.values():
            entry["expected_ms"] = sum(best.values()) if name == BACKWARD else best["forward"]
    if "ms" in times["jsparse"] and "ms" in times[BACKWARD]:
        alone = times[BACKWARD]["ms"] - times["jsparse"]["ms"]
        # by the usual count: five products where the forward pass has two
        row["backward"] = {"ms": alone, "tflops": 2.5 * flops / alone / 1e9 if alone > 0 else None}
    return row


def dense_time(run: Run, call: Callable[[], Any], result: np.ndarray) -> dict[str, Any]:
    """The time of a dense peer whose output is ours."""
    same_output("the peer", np.asarray(call(), np.float32), result)
    return {"ms": milliseconds(call, jax.block_until_ready, run.milliseconds)}


def same_output(peer: str, theirs: np.ndarray, ours: np.ndarray) -> float:
    """By how much two bf16 outputs differ; refuses to go on where they are not the same."""
    error = float(np.linalg.norm(theirs - ours) / np.linalg.norm(theirs))
    if not error < 2 * TOLERANCE["bfloat16"]:
        raise ArithmeticError(f"ours and {peer} differ by {error:.2e} of the norm")
    return error


def crossovers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Up to which density selecting and computing tiles takes less time than cuDNN's dense.

    Between two measured densities the time is taken to be linear. 0 where even the lowest measured
    density takes longer, 1 where full density takes less.

    Args:
      rows: Timings of all densities, some of them failed.
    """
    groups: dict[tuple, dict[float, dict[str, Any]]] = {}
    for row in rows:
        if "times" in row and not row["causal"]:
            sizes = row["length"], row["dim"], row["heads"], row["kv_heads"]
            groups.setdefault(sizes, {})[row["density"]] = row
    found = []
    for (length, dim, heads, kv_heads), by_density in groups.items():
        dense = [
            entry["ms"]
            for name, entry in by_density.get(1.0, {}).get("times", {}).items()
            if "cudnn" in name and "ms" in entry
        ]
        points = [
            (density, row["times"]["jsparse"]["ms"] + row["plan_ms"])
            for density, row in sorted(by_density.items())
            if "ms" in row["times"]["jsparse"]
        ]
        if not dense or len(points) < 2:
            continue
        limit = min(dense)
        density = 1.0 if points[-1][1] <= limit else 0.0
        for (low, quick), (high, slow) in itertools.pairwise(points):
            if quick <= limit < slow:
                density = low + (high - low) * (limit - quick) / (slow - quick)
        found.append(
            {"length": length, "dim": dim, "heads": heads, "kv_heads": kv_heads}
            | {"dense_ms": limit, "density": density}
        )
    return found


def expected(work: dict[str, roofline.Work]) -> dict[str, dict[str, Any]]:
    """Each kernel's operations, bytes and best time; None where the device is not known."""
    device = roofline.DEVICES.get(jax.devices()[0].device_kind)
    return {
        name: {
            "gflop": kernel.flops / 1e9,
            "mbyte": kernel.bytes / 1e6,
            "expected_ms": device and kernel.expected_ms(device),
            "bound": device and kernel.bound(device),
        }
        for name, kernel in work.items()
    }


def torch_times(run, sizes: Sizes, plan: js.BlockMask, arrays, result) -> dict[str, Any]:
    """FlexAttention on the same tiles, and torch's own dense attention, where torch is."""
    try:
        import torch
        from torch.nn.attention.flex_attention import BlockMask, flex_attention
    except ImportError:
        return {}
    place = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (
        torch.tensor(np.asarray(x.astype(jnp.float32)), device=place)
        .to(torch.bfloat16)
        .transpose(1, 2)
        .contiguous()
        for x in arrays
    )

    def wait(_):
        if place == "cuda":
            torch.cuda.synchronize()

    def flex() -> dict[str, Any]:
        counts = torch.tensor(np.asarray(plan.kv_num_blocks), device=place)
        lists = torch.tensor(np.asarray(plan.kv_indices), device=place)
        while counts.ndim < 3:
            counts, lists = counts[None], lists[None]
        missing = -(-sizes.length // plan.block_kv) - lists.shape[-1]
        lists = torch.nn.functional.pad(lists, (0, missing))
        empty = torch.zeros_like(counts), torch.zeros_like(lists)
        if sizes.causal:
            mask = BlockMask.from_kv_blocks(
                counts, lists, BLOCK_SIZE=128, mask_mod=lambda b, h, i, j: i >= j
            )
        else:
            mask = BlockMask.from_kv_blocks(*empty, counts, lists, BLOCK_SIZE=128)
        compiled = torch.compile(flex_attention)
        grouped = sizes.heads != sizes.kv_heads
        call = lambda: compiled(q, k, v, block_mask=mask, enable_gqa=grouped)  # noqa: E731
        theirs = call().transpose(1, 2).float().cpu().numpy()
        error = same_output("FlexAttention", theirs, result)
        return {"ms": milliseconds(call, wait, run.milliseconds), "difference": error}

    def dense() -> dict[str, Any]:
        call = lambda: torch.nn.functional.scaled_dot_product_attention(  # noqa: E731
            q, k, v, is_causal=sizes.causal, enable_gqa=sizes.heads != sizes.kv_heads
        )
        return {"ms": milliseconds(call, wait, run.milliseconds)}

    def cudnn() -> dict[str, Any]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return dense()

    with torch.no_grad():
        out = {"torch flex": attempt(flex)}
        if sizes.density == 1.0:
            out["torch sdpa"] = attempt(dense)
            if place == "cuda":
                out["torch cudnn"] = attempt(cudnn)
        return out


def summary(row: dict[str, Any]) -> str:
    """One line of the log."""
    if "times" not in row:
        return f"failed: {row}"
    parts = [
        f"{name} {entry['ms']:.3f} ms"
        + (f" of {entry['expected_ms']:.3f} at best" if "expected_ms" in entry else "")
        + (f" ({entry['tflops']:.0f} TFLOP/s)" if "tflops" in entry else "")
        if "ms" in entry
        else f"{name} failed"
        for name, entry in row["times"].items()
        if "missing" not in entry
    ]
    kind = "causal" if row["causal"] else f"{row['density']:.0%}"
    return f"T {row['length']} d {row['dim']} kv {row['kv_heads']} {kind}: " + ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
