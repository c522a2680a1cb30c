"""Curves of training runs: kept as JSON, drawn together, and held against dense attention.

python -m examples.curves     # redraws examples/trained_sparse
"""

import argparse
import json
from pathlib import Path
from typing import Any

from jsparse import checks

FOLDER = Path(__file__).parent / "trained_sparse"
RUNS, AGAIN = "<!-- runs -->", "<!-- seed 1 -->"
STAGES, RECALL = "<!-- stages -->", "<!-- recall -->"
_RECALLS = "recall", "recall_without_choice"
# what a run says of itself once it is over, and what it gathers on the way
_FOUND = {
    *("questions", *_RECALLS),
    *("curve", "curve_dense", "density", "held_out_bits_per_byte"),
    *("held_out_bits_per_byte_dense", "measured", "seconds"),
}
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "jsparse", "font.size": 9}
_MARKS = "osD^v<>pX"


def write(path: Path, record: dict[str, Any]) -> None:
    """Writes a record in one go: a run that is killed meanwhile leaves the one before."""
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(record, indent=1) + "\n")
    aside.replace(path)


def earlier(path: Path, record: dict[str, Any], done: int) -> list[dict[str, Any]]:
    """The points of the run that `record` goes on with, up to the steps that were saved.

    Raises:
      ValueError: if the file's run had other settings, or is not there.
    """
    if not path.exists():
        raise ValueError(
            f"{done} steps of this run are saved, but {path} is gone; pass the folder that has it "
            "as --output, or begin again with --fresh."
        )
    found = json.loads(path.read_text())
    # as they are read back
    for name, value in json.loads(json.dumps(record)).items():
        if name not in _FOUND | {"jax"} and found.get(name) != value:
            raise ValueError(
                f"{path} was begun with {name}={found.get(name)}, not {value}; go on with that, or "
                "begin again with --fresh."
            )
    return [point for point in found["curve"] if point["step"] <= done]


def runs(folder: Path) -> dict[str, dict[str, Any]]:
    """The runs of a folder that are over, dense attention first."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    over = {name: record for name, record in found.items() if "density" in record}
    return dict(sorted(over.items(), key=lambda item: item[0] != "dense"))


def table(found: dict[str, dict[str, Any]]) -> str:
    """A line per run: what it computes, what it costs, and how far that is from dense."""
    if not found:
        return "No run is over yet."
    lines = [
        "| run | steps | tiles | pairs | bits per byte | dense | gap |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, record in found.items():
        bits, dense = last(record), dense_of(record, found)
        gap = "" if dense is None else f"{bits / dense - 1:+.1%}"
        dense = "" if dense is None else f"{dense:.3f}"
        shares = record["density"]
        lines.append(
            f"| {name} | {record['steps']} | {shares['tiles']:.1%} | {shares['pairs']:.1%} | "
            f"{bits:.3f} | {dense} | {gap} |"
        )
    return "\n".join(lines)


def last(record: dict[str, Any]) -> float:
    """Held-out bits per byte in the end, at the longest context."""
    return record["held_out_bits_per_byte"][max(record["held_out_bits_per_byte"], key=int)]


def dense_of(record: dict[str, Any], found: dict[str, dict[str, Any]]) -> float | None:
    """The same of dense attention: the model that was distilled, or the run of equal steps."""
    if record["distilled"]:
        return record["held_out_bits_per_byte_dense"]
    dense = found.get("dense")
    if dense is None or any(dense[x] != record[x] for x in ("steps", "phases", "rate", "seed")):
        return None
    return last(dense)


def section(found: dict[str, dict[str, Any]]) -> str:
    """The table of the runs and, where there are some, their picture."""
    picture = "\n\n![Held-out bits per byte over steps](curves.svg)" if found else ""
    return table(found) + picture


def stages_table(record: dict[str, Any]) -> str:
    """A line for each number of blocks that the first stage of `hisa` may leave."""
    lines = [
        "| blocks | tokens in them | chosen by both | attention on two stages' | on one stage's |",
        "|---|" + "---|" * 4,
    ]
    for blocks, shares in record["measured"].items():
        means = (f"{sum(x) / len(x):.1%}" for x in shares.values())
        tokens = int(blocks) * record["arguments"]["block_kv"]
        lines.append(f"| {blocks} | {tokens} | {' | '.join(means)} |")
    return "\n".join(lines)


def recall_table(found: dict[str, dict[str, Any]]) -> str:
    """A line per method of `examples.associative_recall`: least and most of the runs it has."""
    lines = ["| method | runs | tiles | pairs | recall | own blocks alone |", "|---|" + "---|" * 5]
    for name in dict.fromkeys(record["method"] for record in found.values()):
        records = [record for record in found.values() if record["method"] == name]
        of_runs = [
            *([record["density"][what] for record in records] for what in ("tiles", "pairs")),
            *([r[what] for r in records if what in r] for what in _RECALLS),
        ]
        shown = [name, str(len(records)), *(_from_to(shares) for shares in of_runs)]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def _from_to(shares: list[float]) -> str:
    ends = dict.fromkeys(f"{end(shares):.1%}" for end in (min, max) if shares)
    return " to ".join(ends)


def between(text: str, marker: str) -> str:
    """What a page has between two marks."""
    return text.split(marker)[1].strip()


def draw(folder: Path) -> None:
    """Draws the runs of a folder that are over, and writes their tables into its page."""
    found = runs(folder)
    if found:
        _draw(found, folder / "curves.svg")
    page = folder / "README.md"
    if page.exists():
        text = page.read_text()
        tables = {
            RUNS: section(found),
            AGAIN: table(runs(folder / "seed-1")),
            STAGES: stages_table(found["hisa"]),
            RECALL: recall_table(runs(folder / "recall")),
        }
        for marker, written in tables.items():
            before, _, after = text.split(marker)
            text = f"{before}{marker}\n{written}\n{marker}{after}"
        page.write_text(text)


def _draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    checks.drawing_library()
    from matplotlib import figure, style

    kinds = {
        "trained from the first step": {n: r for n, r in found.items() if not r["distilled"]},
        "gates of a trained model": {n: r for n, r in found.items() if r["distilled"]},
    }
    kinds = {title: those for title, those in kinds.items() if those}
    with style.context(_STYLE, after_reset=True):
        page = figure.Figure((5.0 * len(kinds), 3.6), layout="constrained")
        for axes, (title, those) in zip(
            page.subplots(1, len(kinds), squeeze=False).flat, kinds.items(), strict=True
        ):
            for mark, (name, record) in zip(_MARKS, those.items(), strict=False):
                points = [(p["step"], p["held_out_bits_per_byte"]) for p in record["curve"]]
                label = f"{name}, {record['density']['pairs']:.0%} of the pairs"
                axes.plot(*zip(*points, strict=True), marker=mark, label=label)
                if record["distilled"]:
                    axes.axhline(
                        record["curve_dense"], color="#7a8694", linestyle=":", label="dense"
                    )
            axes.set(title=title, xlabel="steps", ylabel="held-out bits per byte at 4096")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        page.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    # matplotlib leaves blanks at the ends of lines
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="curves", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, metavar="FOLDER")
    folder = parser.parse_args().folder
    draw(folder)
    print(table(runs(folder)), recall_table(runs(folder / "recall")), sep="\n\n")


if __name__ == "__main__":
    main()
