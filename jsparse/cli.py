"""The command line: `jsparse methods`, `jsparse compare`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jsparse import checks
from jsparse.evaluation.capture import Captured, load_captured
from jsparse.evaluation.compare import Comparison, Setting, compare, settings
from jsparse.registry import METHODS

_EXAMPLES = """examples:
  jsparse methods
  jsparse compare captured.safetensors
  jsparse compare captured.safetensors --methods xattention streaming --output report.html
  jsparse compare captured.safetensors --block 64 --repeats 5
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
    commands.add_parser("methods", help="print the registry")
    comparing = commands.add_parser(
        "compare",
        help="compare methods with dense attention on captured tensors",
        description="Compares methods with dense causal attention on q, k, v that were captured "
        "from a model: tensors layers.<n>.q [length, heads, dim], layers.<n>.k and .v [length, "
        "kv_heads, dim] in a safetensors file, as jsparse.evaluation.save_captured writes them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    comparing.add_argument("file", type=Path, help="the safetensors file")
    comparing.add_argument("--methods", nargs="+", metavar="NAME", help="default: all that apply")
    comparing.add_argument("--output", type=Path, default=Path("build/compare.html"))
    comparing.add_argument(
        "--block", type=int, help="tokens per block, for methods that have a block_size"
    )
    comparing.add_argument("--repeats", type=int, default=3, help="timed runs per layer")
    parsed = parser.parse_args(arguments)
    try:
        if parsed.command == "methods":
            _methods()
        else:
            _compare(parsed)
    except (ValueError, NotImplementedError) as error:
        print(f"jsparse: {error}", file=sys.stderr)
        sys.exit(2)


def _methods() -> None:
    table = Table()
    for name in (
        "method",
        "family",
        "what it does",
        "source",
        "causal",
        "trained",
        "controlled by",
    ):
        table.add_column(name)
    for row in METHODS:
        yes = {True: "yes", False: "no"}
        table.add_row(
            row.name,
            row.family,
            row.summary,
            f"{row.paper} ({row.year})",
            yes[row.causal],
            yes[not row.training_free],
            row.control or "",
        )
    Console().print(table)


def _compare(parsed: argparse.Namespace) -> None:
    from jsparse.evaluation.report import print_table, write_report

    checks.positive(repeats=parsed.repeats)
    if parsed.block is not None:
        checks.positive(block=parsed.block)
    which = settings(parsed.methods, block=parsed.block)
    layers = load_captured(parsed.file)
    comparison = compare_with_progress(
        layers,
        which,
        repeats=parsed.repeats,
        partial=parsed.output.with_suffix(".partial.json"),
    )
    print_table(comparison)
    q_len, heads, dim = layers[0].q.shape
    write_report(
        comparison,
        parsed.output,
        title="Sparse attention methods on captured tensors",
        source=f"{parsed.file.name}: {len(layers)} layers, {q_len} tokens, {heads} heads of {dim}.",
    )
    print(f"report: {parsed.output}")


def compare_with_progress(
    layers: list[Captured], which: list[Setting], *, score=None, repeats: int = 3, partial=None
) -> Comparison:
    """`compare` with a bar in the terminal."""
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as bar:
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
