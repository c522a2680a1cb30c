"""The command line: `jsparse methods`, `jsparse compare`, `jsparse plan`, `jsparse tune`."""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jsparse import checks
from jsparse.attention import tuning
from jsparse.evaluation.capture import Captured, Profiled, load_captured, load_profiled
from jsparse.evaluation.compare import Comparison, Setting, compare, settings
from jsparse.evaluation.report import make_room, write_report
from jsparse.evaluation.table import counted, print_first_that_fits, print_table
from jsparse.planning import SEARCHES, kept_mass, near_outputs, save_table
from jsparse.planning.table import Choice
from jsparse.planning.table import Table as HeadTable
from jsparse.registry import METHODS
from pallas_kernels import configurations

_EXAMPLES = """examples:
  jsparse methods
  jsparse compare captured.safetensors
  jsparse compare captured.safetensors --methods xattention streaming --output page.html
  jsparse compare captured.safetensors --block 64 --repeats 5
  jsparse plan captured.safetensors --method minference --budget 0.3 --output plan.json
  jsparse plan captured.safetensors --method xattention --coverage 0.9 --output plan.json
  jsparse plan 2k.safetensors 4k.safetensors --held-out 6k.safetensors --method moa --density 0.3
  jsparse plan captured.safetensors --method blasst --target-sparsity 0.5 --output plan.json
  jsparse tune --dims 128 --tiles 128x128 64x128 --length 32768
"""


_CAPTURED = """Compares methods with dense causal attention on q, k, v captured from a model, and
writes one HTML page with the figures and pictures of them.

The file holds tensors layers.<n>.q [length, heads, dim], layers.<n>.k and
layers.<n>.v [length, kv_heads, dim], positions applied. For a model built on
jsparse.nn two calls make it:

  from jsparse.evaluation import capture, save_captured
  save_captured(capture(model, tokens), "captured.safetensors")

Stopped with Ctrl-C, the same command goes on where it was.
"""


_PLANNED = """Searches the settings that suit each head of a model, on q, k, v captured from it (see
jsparse compare --help), and writes them as a table of JSON:

  minference   the pattern that keeps most of dense attention, among those that cost no more than
               the budget
  xattention   the threshold at which the blocks that hold most of dense attention are taken
  moa          the span, by the length of the text, whose loss is least within a density of all
               heads; of several files, made of texts of one length or more and for the choice of
               another, which hold also layers.<n>.d_out, the gradient of the model's loss by each
               layer's attention (save_captured(profile(model, loss, tokens), FILE) makes them)
  blasst       how the threshold goes with length and with the share of tiles that is skipped

In Python, jsparse.planning.methods_of(load_table("plan.json")) makes a method for each layer, and
jsparse.nn.with_methods puts these into a model.

Stopped with Ctrl-C, the same command goes on where it was.
"""


_MARGIN = f"{configurations.MARGIN:.0%}"
_TUNED = f"""Times configurations of the attention kernels on this GPU (pipeline depth, registers,
keys per product) and keeps the fastest of each kernel in a file, which jsparse reads from
then on. Results of any configuration are the same up to rounding.

A configuration is timed only after its result agreed with that of the shipped default, and
taken if it saves {_MARGIN} of the default's time; one that fails is reported and passed over.
What is chosen by: kernel, device, dtype, dim and tile.

The file is the one that {configurations.VARIABLE} names, or jsparse/tuned.json in your cache
directory. Stopped with Ctrl-C, the same command goes on where it was.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; a wrong call prints one line and exits with 2."""
    parser = argparse.ArgumentParser(
        prog="jsparse",
        description="Sparse attention in JAX.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("methods", help="print the methods, their sources and controls")
    comparing = commands.add_parser(
        "compare",
        help="compare methods with dense attention on captured tensors",
        description=_CAPTURED,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    comparing.add_argument("file", type=Path, help="the safetensors file")
    comparing.add_argument(
        "--methods", nargs="+", metavar="NAME", help="default: all causal ones without training"
    )
    comparing.add_argument(
        "--output",
        type=Path,
        metavar="PAGE",
        default=Path("build/compare.html"),
        help="default: %(default)s",
    )
    comparing.add_argument(
        "--block",
        type=int,
        metavar="TOKENS",
        help="tokens per block, for methods that have a block_size; default: the method's own",
    )
    comparing.add_argument(
        "--repeats",
        type=int,
        metavar="RUNS",
        default=3,
        help="timed runs per layer; default: %(default)s",
    )
    _add_plan(commands)
    _add_tune(commands)
    parsed = parser.parse_args(arguments)
    run = {"methods": lambda parsed: _methods(), "compare": _compare}
    run |= {"plan": _plan, "tune": _tune}
    with one_line_errors("jsparse"):
        run[parsed.command](parsed)


# what each search can be told; the score by the function that it names
_SCORES = {"mass": kept_mass, "outputs": near_outputs}
_SEARCH_OPTIONS = {
    "minference": ("budget", "start", "score", "block"),
    "moa": ("held_out", "density", "extended", "interval", "share_in_group", "block"),
    "xattention": ("coverage", "stride", "block"),
    "blasst": ("target_sparsity", "block"),
}


def _one_text(parsed: argparse.Namespace) -> list[Captured]:
    checks.one_text(parsed.method, parsed.files)
    return load_captured(parsed.files[0])


def _texts(parsed: argparse.Namespace) -> list[list[Profiled]]:
    checks.texts_held_out(parsed.held_out)
    return [load_profiled(file) for file in parsed.files]


# what each search is made on
_READERS = {"blasst": _one_text, "minference": _one_text, "moa": _texts, "xattention": _one_text}


def _add_plan(commands: Any) -> None:
    planned = commands.add_parser(
        "plan",
        help="search settings for each head of a model on captured tensors",
        description=_PLANNED,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    planned.add_argument(
        "files", type=Path, nargs="+", metavar="file", help="the safetensors file; of moa several"
    )
    planned.add_argument(
        "--method", choices=[*SEARCHES], default="minference", help="default: %(default)s"
    )
    planned.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        default=Path("build/plan.json"),
        help="default: %(default)s",
    )
    planned.add_argument("--source", metavar="NAME", help="of the model; default: the file's name")
    planned.add_argument(
        "--block", type=int, metavar="TOKENS", help="tokens per block; default: the method's own"
    )
    own = planned.add_argument_group("minference")
    own.add_argument(
        "--budget",
        type=float,
        metavar="SHARE",
        help="most operations of a head, over those of dense attention; default: 0.25",
    )
    own.add_argument(
        "--start", type=int, metavar="TOKENS", help="first query that is scored; default: 2500"
    )
    own.add_argument(
        "--score",
        choices=[*_SCORES],
        help="dense attention's mass kept, or outputs that stay as they were; default: mass",
    )
    own = planned.add_argument_group("xattention")
    own.add_argument(
        "--coverage",
        type=float,
        metavar="SHARE",
        help="of dense attention's mass, in the blocks that are to be taken; default: 0.9",
    )
    own.add_argument(
        "--stride", type=int, metavar="TOKENS", help="of a cell; default: the method's own"
    )
    own = planned.add_argument_group("blasst")
    own.add_argument(
        "--target-sparsity",
        type=float,
        metavar="SHARE",
        help="of the tiles, to be skipped; default: 0.5",
    )

    own = planned.add_argument_group("moa")
    own.add_argument(
        "--held-out",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="texts of a length that the others do not have, which decide among the plans found",
    )
    own.add_argument(
        "--density",
        type=float,
        metavar="SHARE",
        help="most tokens that heads keep, of the length, mean over heads; default: 0.5",
    )
    own.add_argument(
        "--extended",
        type=int,
        metavar="TOKENS",
        help="a length at which this holds too; default: twice the longest of the files",
    )
    own.add_argument(
        "--interval",
        type=int,
        metavar="TOKENS",
        help="between the offsets that spans may have; default: 1024",
    )
    own.add_argument(
        "--share-in-group",
        action="store_const",
        const=True,
        help="one rule for the query heads that share a kv head",
    )


def _plan(parsed: argparse.Namespace) -> None:
    every = dict.fromkeys(name for names in _SEARCH_OPTIONS.values() for name in names)
    given = {name: value for name in every if (value := getattr(parsed, name)) is not None}
    checks.search_options(parsed.method, given, _SEARCH_OPTIONS[parsed.method])
    if "score" in given:
        given["score"] = _SCORES[given["score"]]
    if "block" in given:
        given["block_size"] = given.pop("block")
    make_room(parsed.output)
    captured = _READERS[parsed.method](parsed)
    if "held_out" in given:
        given["held_out"] = [load_profiled(file) for file in given["held_out"]]
    with Progress(*_COLUMNS) as bar:
        task = bar.add_task("", total=None)
        started = False

        def progress(label: str, steps: int) -> None:
            nonlocal started
            bar.update(task, description=label, total=steps, advance=1 if started else 0)
            started = True

        table = SEARCHES[parsed.method](
            captured,
            source=parsed.source or ", ".join(file.name for file in parsed.files),
            progress=progress,
            partial=parsed.output.with_suffix(".partial.json"),
            **given,
        )
        bar.update(task, advance=1)
    save_table(table, parsed.output)
    _print_choices(table)
    print(f"plan: {parsed.output}")


def _print_choices(table: HeadTable) -> None:
    shown = Table(box=box.SIMPLE_HEAD, caption=_CHOICES, caption_justify="left")
    for name in ("layer", "score", "cost"):
        shown.add_column(name, no_wrap=True, justify="right")
    shown.add_column("heads", overflow="fold")
    for number, layer in enumerate(table.layers):
        scores = [choice.score for choice in layer if choice.score is not None]
        costs = [choice.cost for choice in layer if choice.cost is not None]
        means = (f"{sum(x) / len(x):.3f}" if x else "-" for x in (scores, costs))
        shown.add_row(str(number), *means, ", ".join(map(_value, layer)))
    print_first_that_fits(shown)
    budget = table.provenance.search.get("budget")
    if budget is not None:
        over = sum(choice.cost > budget for layer in table.layers for choice in layer)
        if over:
            print(f"{counted(over, 'head')} above the budget {budget:g}: no candidate is cheaper")


def _value(choice: Choice) -> str:
    if not dataclasses.is_dataclass(choice.value):
        return f"{choice.value:.2f}"
    values = dataclasses.astuple(choice.value)  # type: ignore[arg-type]
    sizes = " ".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in values)
    return f"{type(choice.value).__name__} {sizes}"


_CHOICES = (
    "score: share of dense attention's mass, outputs, or influence on the loss, kept; cost: "
    "operations over those of dense attention; means over heads."
)


def _add_tune(commands: Any) -> None:
    tuned = commands.add_parser(
        "tune",
        help="time configurations of the GPU kernels on this machine, keep the fastest",
        description=_TUNED,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes = tuning.Sizes()
    for name, default, meaning, metavar, more in (
        ("--dims", ["64", "128"], "widths of q and k, and of v", "DIM[xV_DIM]", _SEVERAL),
        ("--tiles", ["128x128"], "queries and keys per tile", "QxKV", _SEVERAL),
        ("--heads", sizes.heads, "query heads", "N", {"type": int}),
        ("--kv-heads", sizes.kv_heads, "heads of k and v", "N", {"type": int}),
        ("--length", sizes.length, "tokens", "TOKENS", {"type": int}),
        ("--density", sizes.density, "share of the tiles computed", "SHARE", {"type": float}),
    ):
        shown = " ".join(default) if isinstance(default, list) else default
        if isinstance(default, list):
            default = [*map(_two_numbers, default)]
        tuned.add_argument(
            name, default=default, metavar=metavar, help=f"{meaning}; default: {shown}", **more
        )
    tuned.add_argument(
        "--dtypes",
        nargs="+",
        choices=[*tuning.TOLERANCE],
        default=["bfloat16"],
        help="default: bfloat16",
    )
    tuned.add_argument("--output", type=Path, metavar="FILE", help="keep the results elsewhere")
    tuned.add_argument("--again", action="store_true", help="time also what the file has already")
    tuned.add_argument(
        "--dry-run",
        action="store_true",
        help="go through the motions on any machine, at tiny sizes, in JAX's interpreter; "
        "writes nothing unless --output names a file",
    )


def _two_numbers(text: str) -> tuple[int, int]:
    first, _, second = text.partition("x")
    if not (first.isdecimal() and (second or first).isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write one like 128 or 128x64")
    return int(first), int(second or first)


_SEVERAL = {"nargs": "+", "type": _two_numbers}


def _tune(parsed: argparse.Namespace) -> None:
    if parsed.dry_run:
        path, effort, sizes, shapes = (
            parsed.output,
            tuning.DRY,
            tuning.DRY_SIZES,
            [tuning.DRY_SHAPE],
        )
    else:
        tuning.device_check()
        path, effort = parsed.output or configurations.place(), tuning.FULL
        checks.tuned_place(path, configurations.VARIABLE)
        sizes = tuning.Sizes(parsed.heads, parsed.kv_heads, parsed.length, parsed.density)
        shapes = [
            tuning.Shape(dtype, *dims, *tile)
            for dtype in parsed.dtypes
            for dims in parsed.dims
            for tile in parsed.tiles
        ]
    jobs = tuning.jobs(shapes, sizes, effort)
    timings: list[tuning.Timing] = []
    with Progress(*_COLUMNS, transient=True) as bar:
        task = bar.add_task("", total=sum(len(job.candidates) for job in jobs))
        for job in jobs:
            bar.update(task, description=job.key.operation)
            for timing in tuning.tune([job], path, again=parsed.again, effort=effort):
                timings.append(timing)
                bar.update(task, advance=1)
    _print_timings(timings, "JAX's interpreter: no measure of speed" if parsed.dry_run else "")
    if path is not None:
        print(f"kept: {path}")
        if path != configurations.place():
            print(f"to use it: export {configurations.VARIABLE}={path}")


def _print_timings(timings: Sequence[tuning.Timing], caption: str) -> None:
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    for name in ("kernel", "dtype", "dim", "tile", "default ms", "best ms"):
        table.add_column(name, no_wrap=True)
    table.add_column("best configuration", overflow="fold", min_width=22)
    for entry in {timing.entry.key: timing.entry for timing in timings}.values():
        key, default = entry.key, entry.candidates[0]
        best = entry.best() or default
        changed = {
            name: value
            for name, value in best["config"].items()
            if default["config"].get(name) != value
        }
        table.add_row(
            _kernel(key),
            key.dtype,
            f"{key.dim}" if key.dim == key.v_dim else f"{key.dim}x{key.v_dim}",
            f"{key.block_q}x{key.block_kv}",
            *(f"{row['ms']:.3f}" if "ms" in row else "-" for row in (default, best)),
            ", ".join(f"{name}={value}" for name, value in changed.items()) or "the default",
        )
    print_first_that_fits(table)
    for timing in timings:
        if timing.failed:
            print(f"failed: {_kernel(timing.entry.key)}, {timing.config}: {timing.failed}")
    again = sum(timing.kept for timing in timings)
    if again:
        print(f"{again} of {len(timings)} were timed before; --again times them anew")


def _kernel(key: configurations.Key) -> str:
    return f"{key.operation}, masked" if key.masked else key.operation


# of a bar in the terminal
_COLUMNS = (
    TextColumn("{task.description:<18}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
)


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Makes a wrong call one line and exit code 2, and being stopped one line and 130."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            f"{program}: stopped; what was finished is kept, the same command goes on from there.",
            file=sys.stderr,
        )
        sys.exit(130)


def _methods() -> None:
    def table(*shown: str) -> Table:
        made = Table(box=box.SIMPLE_HEAD)
        for name in shown:
            made.add_column(name, no_wrap=name != "what it does")
        for row in METHODS:
            cells = {
                "method": row.name,
                "family": row.family,
                "what it does": row.summary,
                "source": row.paper,
                "year": str(row.year),
                "causal": "yes" if row.causal else "no",
                "trained": "no" if row.training_free else "yes",
                "controlled by": row.control or "",
            }
            made.add_row(*(cells[name] for name in shown))
        return made

    brief = "method", "what it does", "source", "controlled by"
    more = "method", "family", "what it does", "source", "year", "causal", "trained"
    print_first_that_fits(table(*more, "controlled by"), table(*brief))


def _compare(parsed: argparse.Namespace) -> None:
    checks.positive(repeats=parsed.repeats)
    if parsed.block is not None:
        checks.positive(block=parsed.block)
    checks.drawing_library()
    make_room(parsed.output)
    which = settings(parsed.methods, block=parsed.block)
    layers = load_captured(parsed.file)
    comparison = compare_with_progress(
        layers,
        which,
        repeats=parsed.repeats,
        partial=parsed.output.with_suffix(".partial.json"),
    )
    print_table(comparison)
    (q_len, heads, dim), kv_heads = layers[0].q.shape, layers[0].k.shape[1]
    shape = f"{counted(heads, 'query head')} over {counted(kv_heads, 'kv head')} of {dim}"
    write_report(
        comparison,
        parsed.output,
        title="Sparse attention methods on captured tensors",
        source=f"{parsed.file.name}: {counted(len(layers), 'layer')}, {q_len} tokens, "
        f"{shape}, {layers[0].q.dtype}.",
    )
    print(f"report: {parsed.output}")


def compare_with_progress(
    layers: list[Captured], which: list[Setting], *, score=None, repeats: int = 3, partial=None
) -> Comparison:
    """`compare` with a bar in the terminal."""
    with Progress(*_COLUMNS) as bar:
        task = bar.add_task("", total=len(which) + 1)
        started = False

        def progress(label: str) -> None:
            nonlocal started
            bar.update(task, description=label, advance=1 if started else 0)
            started = True

        comparison = compare(
            layers, which=which, score=score, progress=progress, repeats=repeats, partial=partial
        )
        bar.update(task, advance=1)
    return comparison
