"""What compiled kernels are made of: kept as JSON and as a page, compared with what is kept.

A row is one compilation, a dict with "name", "pass" and "target" and the figures of COLUMNS. The
comparison fails on what matters: a row that appeared or vanished, spills, other instructions, other
shared memory, more registers. Another compiler may choose otherwise, so figures of other versions
are not compared; the gates of each compilation hold for every version.
"""

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

RESULTS = Path(__file__).parent / "results" / "gpu_compile.json"
REGISTER_GROWTH = 8  # registers per thread, the unit in which they are handed out
Row = dict[str, Any]


class Column(NamedTuple):
    """A figure: its key in a row, its header, and how it is written."""

    key: str
    header: str
    meaning: str = ""


COLUMNS = (
    Column("name", "case"),
    Column("pass", "pass"),
    Column("target", "target", "the architecture compiled for"),
    Column("tile", "tile", "queries x keys"),
    Column("stages", "stages", "tiles in flight, of the kernel with the fewest; Triton chooses"),
    Column("registers", "registers", "per thread, of each kernel"),
    Column("spill_bytes", "spills", "bytes, of all kernels"),
    Column("shared_memory", "shared", "bytes, of the kernel with the most"),
    Column("tensor_core", "tensor core", "matrix instructions of each kernel"),
    Column("bulk_copies", "copies", "asynchronous, of each kernel: by TMA or cp.async"),
)


class Report(NamedTuple):
    """Figures, and what they were compiled by."""

    versions: dict[str, str]
    rows: list[Row]


def add_arguments(parser: argparse.ArgumentParser, path: Path) -> None:
    """Lets the command line of a script that compiles kernels say what happens to its figures."""
    parser.add_argument(
        "--update", action="store_true", help="write what was compiled, instead of comparing it"
    )
    parser.add_argument("--report", type=Path, default=path, metavar="JSON", help="what is kept")


def conclude(
    rows: Sequence[Row],
    path: Path,
    names: Collection[str] | None = None,
    targets: Collection[str] | None = None,
    *,
    update: bool,
) -> int:
    """Compares rows with what is kept, or keeps them, and says what came of it.

    Args:
      rows: What was compiled; "failed" of each says which gates it did not pass.
      path: The kept report.
      names: The cases that were compiled; None for all there are.
      targets: The architectures that they were compiled for; None for all there are.
      update: Whether to keep the rows.

    Returns:
      The exit code, 0 if nothing is wrong.
    """
    failed = any(row["failed"] for row in rows)
    shown = [{key: value for key, value in row.items() if key != "failed"} for row in rows]
    old, new = read(path), Report(versions(), shown)
    if update:
        if failed:
            print("Nothing is written: a kernel does not pass its gates.")
            return 1
        try:
            write(path, merged(old, new, complete=names is targets is None))
        except ValueError as error:
            print(f"Nothing is written: {error}")
            return 2
        print(f"written: {path} and {path.with_suffix('.md').name}")
        return 0
    if old is None:
        print(f"There is nothing to compare with; --update writes {path}.")
        return 1
    apart = comparable(old, new)
    if apart:
        print(apart)
        return int(failed)
    found = differences(old.rows, new.rows, names, targets)
    for sentence in found:
        print(sentence)
    if found:
        print("If that is meant, keep it: run the same with --update.")
    return int(failed or bool(found))


def versions() -> dict[str, str]:
    """Of the compilers: XLA takes the first ptxas on the PATH, or else NVIDIA's package's."""
    spec = importlib.util.find_spec("nvidia")
    folders = (spec and spec.submodule_search_locations) or ()
    installed = [ptxas for folder in folders for ptxas in Path(folder).glob("*/bin/ptxas")]
    found = [ptxas for ptxas in (shutil.which("ptxas"), *installed) if ptxas]
    if not found:
        sys.exit("There is no ptxas on the PATH; install nvidia-cuda-nvcc.")
    said = subprocess.run([found[0], "--version"], capture_output=True, text=True).stdout
    number = re.search(r"V(\d[\d.]*)", said)
    return {"jax": jax.__version__, "ptxas": number.group(1) if number else "unknown"}


def read(path: Path) -> Report | None:
    """The kept report, None if there is none."""
    if not path.exists():
        return None
    whole = json.loads(path.read_text())
    return Report(whole["versions"], whole["kernels"])


def write(path: Path, report: Report) -> None:
    """Writes the JSON, and the page beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"versions": report.versions, "kernels": report.rows}
    path.write_text(json.dumps(whole, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(report))


def identity(row: Row) -> tuple[str, ...]:
    """What a row is compared under."""
    return tuple(str(row[key]) for key in ("name", "pass", "target"))


def merged(old: Report | None, new: Report, *, complete: bool) -> Report:
    """What is kept after an update: all that is new, and of the old what was not compiled again.

    Args:
      old: What is kept so far.
      new: What was compiled.
      complete: Whether every case was, so that what is missing has vanished.

    Raises:
      ValueError: if old and new figures of different versions would stand side by side.
    """
    if complete or old is None:
        return new
    if old.versions != new.versions:
        raise ValueError(
            f"the kept figures are of {_listed(old.versions)}, these of {_listed(new.versions)}; "
            "update all cases at once, without --only."
        )
    again = {identity(row): row for row in new.rows}
    known = [identity(row) for row in old.rows]
    rows = [again.get(identity(row), row) for row in old.rows]
    return Report(new.versions, rows + [r for r in new.rows if identity(r) not in known])


def comparable(old: Report, new: Report) -> str | None:
    """Why figures are not compared, or None if they are."""
    if old.versions == new.versions:
        return None
    return (
        f"The kept figures are of {_listed(old.versions)}, these of {_listed(new.versions)}: only "
        "the gates count."
    )


def differences(
    old: Sequence[Row],
    new: Sequence[Row],
    names: Collection[str] | None = None,
    targets: Collection[str] | None = None,
) -> list[str]:
    """A sentence for each difference that matters.

    Args:
      old: The kept rows.
      new: The rows compiled now.
      names: The cases that were compiled, so that others are not missed; None for all.
      targets: The architectures that they were compiled for, likewise.
    """
    again = [row for row in old if names is None or row["name"] in names]
    again = [row for row in again if targets is None or row["target"] in targets]
    before = {identity(row): row for row in again}
    after = {identity(row): row for row in new}
    found = [f"{_title(key)} is kept, but was not compiled." for key in before if key not in after]
    found += [f"{_title(key)} is new." for key in after if key not in before]
    for key in before:
        if key in after:
            found += [f"{_title(key)}: {what}" for what in _changes(before[key], after[key])]
    return found


def _changes(old: Row, new: Row) -> list[str]:
    changes = []
    if new["spill_bytes"] > old["spill_bytes"]:
        changes.append(f"{new['spill_bytes']} bytes spilled, before {old['spill_bytes']}.")
    for key, what in (
        ("shared_memory", "bytes of shared memory"),
        ("tensor_core", "matrix instructions"),
        ("bulk_copies", "asynchronous copies"),
    ):
        if new[key] != old[key]:
            changes.append(f"{_shown(new[key])} {what}, before {_shown(old[key])}.")
    grown = len(new["registers"]) == len(old["registers"]) and any(
        after > before + REGISTER_GROWTH
        for before, after in zip(old["registers"], new["registers"], strict=True)
    )
    if grown:
        changes.append(f"{_shown(new['registers'])} registers, before {_shown(old['registers'])}.")
    return changes


def page(report: Report) -> str:
    """The figures as a page of Markdown."""
    lines = [
        "# GPU kernels, compiled without a GPU",
        "",
        f"By {_listed(report.versions)}; `make gpu-compile` compiles them again and compares,",
        "`make gpu-compile UPDATE=1` writes this page. No figure here is a speed.",
        "",
        *(f"* {column.header}: {column.meaning}" for column in COLUMNS if column.meaning),
        "",
        "| " + " | ".join(column.header for column in COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in report.rows:
        figures = (_shown(row.get(column.key, "")) for column in COLUMNS)
        lines.append("| " + " | ".join(figures) + " |")
    return "\n".join(lines) + "\n"


def printed(text: str) -> tuple[list[str], list[str]]:
    """The PTX of each kernel, and what ptxas says of it, as Mosaic prints them: in turn."""
    found = []
    for kernel in text.split("// Generated by LLVM NVPTX Back-End")[1:]:
        ptx, said, report = kernel.partition("\nptxas ")
        found.append((ptx, said + report))
    if not found or any(report.count("ptxas info    : Used ") != 1 for _, report in found):
        sys.exit("Kernels were not printed, each with what ptxas says of it; is it installed?")
    kernels, reports = zip(*found, strict=True)
    return list(kernels), list(reports)


def instructions(ptx: str) -> tuple[int, int]:
    """How many matrix instructions, and how many asynchronous copies, a kernel has."""
    products = r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)"
    copies = r"\bcp\.async\.(?:bulk\.tensor|c[ag])"
    return len(re.findall(products, ptx)), len(re.findall(copies, ptx))


def made_of(instructions: Sequence[tuple[int, int]], registers: Sequence[int]) -> Row:
    """The figures of each kernel, in an order of their own: compilers run several at a time.

    Args:
      instructions: Of each kernel, its matrix instructions and asynchronous copies.
      registers: Of each kernel, per thread.
    """
    kernels = sorted(
        (*counts, count) for counts, count in zip(instructions, registers, strict=True)
    )
    columns = "tensor_core", "bulk_copies", "registers"
    return {key: [kernel[n] for kernel in kernels] for n, key in enumerate(columns)}


def exponentials_in_flight(ptx: str) -> int:
    """How many exponentials stand where wgmma products were started and not yet waited for."""
    running = found = 0
    steps = r"wgmma\.commit_group|wgmma\.wait_group\S*\s+(\d+)|\bex2\."
    for step in re.finditer(steps, ptx):
        if step.group(1) is not None:
            running = min(running, int(step.group(1)))
        elif step.group().startswith("wgmma"):
            running += 1
        else:
            found += running > 0
    return found


def _title(key: tuple[str, ...]) -> str:
    return f"{key[0]}, {key[1]} ({key[2]})"


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
