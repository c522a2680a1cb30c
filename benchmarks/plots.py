"""Draws what the benchmarks wrote: an SVG beside each JSON of benchmarks/results.

    python -m benchmarks.plots                 # of every JSON that has figures to draw
    python -m benchmarks.plots some/gpu.json   # of these

Speed over density and over length from `benchmarks.gpu`; time over density, per tile and over
length from `benchmarks.attention`. Draws what is in the file and nothing else.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "jsparse", "font.size": 9, "axes.grid": True}
MARKS = "osD^v<>pX"
NAMES = {"forward": "jsparse", "flex": "torch FlexAttention", "sdpa": "torch SDPA, dense"}


class Chart(NamedTuple):
    """Lines over x: names to points."""

    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]
    log_y: bool = False
    log_x: bool = True


def charts(record: dict[str, Any]) -> list[Chart]:
    """The charts that a record of either benchmark has figures for, none for other files."""
    if "timings" in record:
        return _gpu_charts([row for row in record["timings"] if "times" in row])
    if "against_torch" in record:
        return _cpu_charts(record)
    return []


def _gpu_charts(rows: list[dict[str, Any]]) -> list[Chart]:
    rows = [row for row in rows if not row["causal"]]
    found = []
    for over, fixed in (("density", "length"), ("length", "density")):
        for those in _alike(rows, fixed, "dim", "kv_heads"):
            first = those[0]
            what = f"{first['length']} tokens" if fixed == "length" else f"density {first[fixed]:g}"
            title = f"{what}, dim {first['dim']}, {first['heads']} heads over {first['kv_heads']}"
            if len({row[over] for row in those}) > 1:
                found.append(_rates(title, over, those))
    return found


def _rates(title: str, over: str, rows: list[dict[str, Any]]) -> Chart:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: row[over]):
        gradients = {"jsparse, gradients": row.get("backward", {})}
        for name, entry in (row["times"] | gradients).items():
            if entry.get("tflops"):
                lines.setdefault(name, []).append((row[over], entry["tflops"]))
    x = "tokens" if over == "length" else over
    return Chart(title, x, "TFLOP/s on computed tiles", lines)


def _cpu_charts(record: dict[str, Any]) -> list[Chart]:
    found = []
    case = record["case"]
    # files of before there were several have one for all
    rows = [{"dtype": case.get("dtype"), **row} for row in record["against_torch"]]
    for those in _alike(rows, "dtype"):
        those.sort(key=lambda row: row["density"])
        lines = {
            label: [(row["density"], row[f"{name}_ms"]) for row in those]
            for name, label in NAMES.items()
        }
        title = (
            f"{case['length']} tokens, {case['heads']} heads of {case['dim']}, {those[0]['dtype']}"
        )
        found.append(Chart(title, "density", "ms, forward", lines, log_y=True))
    lines = {
        label: [(row["tiles"], row[f"{name}ms"]) for row in record["scaling_in_density"]]
        for name, label in (("", "jsparse"), ("line_", "a line through it"))
    }
    found.append(Chart("time over tiles", "computed tiles", "ms, forward", lines, log_x=False))
    if record["scaling_in_length"]:
        lines = {
            label: [(row["length"], row[f"{name}_ms"]) for row in record["scaling_in_length"]]
            for name, label in (("forward", "forward"), ("both", "forward and gradients"))
        }
        found.append(Chart("four tiles per row", "tokens", "ms", lines, log_y=True))
    return found


def machine(record: dict[str, Any]) -> str:
    """What the figures were measured on."""
    here = record["machine"]
    device = here.get("device") or f"{here['cpu']}, {here['cores']} cores"
    return f"{device}, jax {here['jax']}, torch {here['torch']}, {here['date'][:10]}"


def draw(record: dict[str, Any], path: Path) -> None:
    """Writes the charts of a record as one SVG."""
    # an extra, as for the report
    from matplotlib import figure, style

    shown, columns = charts(record), 3
    lines = -(-len(shown) // columns)
    with style.context(STYLE, after_reset=True):
        page = figure.Figure((4.2 * columns, 3.2 * lines + 0.4), layout="constrained")
        page.suptitle(machine(record), fontsize=10)
        grid = page.subplots(lines, columns, squeeze=False)
        for axes in grid.flat[len(shown) :]:
            axes.remove()
        for axes, chart in zip(grid.flat, shown, strict=False):
            for mark, (name, points) in zip(MARKS, chart.lines.items(), strict=False):
                axes.plot(*zip(*points, strict=True), marker=mark, label=name)
            axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
            if chart.log_x:
                axes.set_xscale("log")
                values = sorted({x for points in chart.lines.values() for x, _ in points})
                axes.set_xticks(values, [f"{x:.3g}" if x < 1 else f"{x:.0f}" for x in values])
            if chart.log_y:
                axes.set_yscale("log")
                axes.locator_params("y", subs=(1, 2, 5))
                axes.yaxis.set_major_formatter("{x:g}")
            else:
                axes.set_ylim(bottom=0)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        page.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    # matplotlib leaves blanks at the ends of lines
    text = "\n".join(line.rstrip() for line in path.read_text().splitlines())
    path.write_text(text + "\n")


def _alike(rows: list[dict[str, Any]], *fixed: str) -> list[list[dict[str, Any]]]:
    """The rows in groups that agree in some fields, in order of first appearance."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in fixed), []).append(row)
    return [*groups.values()]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="default: all of benchmarks/results")
    arguments = parser.parse_args()
    drawn = False
    for file in arguments.files or sorted(RESULTS.glob("*.json")):
        try:
            record = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            parser.error(f"{file} cannot be read ({error}); name a JSON of a benchmark")
        if charts(record):
            draw(record, file.with_suffix(".svg"))
            print(f"written: {file.with_suffix('.svg')}")
            drawn = True
        elif arguments.files:
            parser.error(
                f"{file} has no timings to draw; name a JSON of benchmarks.gpu or attention"
            )
    if not drawn:
        print("nothing to draw: run make bench or make gpu first")
    return 0


if __name__ == "__main__":
    sys.exit(main())
