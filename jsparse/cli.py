"""The command line: `jsparse methods`, `jsparse compare`."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jsparse import checks
from jsparse.evaluation.capture import Captured, load_captured
from jsparse.evaluation.compare import Comparison, Setting, compare, settings
from jsparse.evaluation.report import make_room, write_report
from jsparse.evaluation.table import counted, print_first_that_fits, print_table
from jsparse.registry import METHODS

_EXAMPLES = """examples:
  jsparse methods
  jsparse compare captured.safetensors
  jsparse compare captured.safetensors --methods xattention streaming --output page.html
  jsparse compare captured.safetensors --block 64 --repeats 5
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
    parsed = parser.parse_args(arguments)
    with one_line_errors("jsparse"):
        if parsed.command == "methods":
            _methods()
        else:
            _compare(parsed)


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
