"""The comparison as one HTML page that needs nothing else."""

import datetime
import html
import itertools
import math
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np

from jsparse import checks
from jsparse.evaluation import figures
from jsparse.evaluation.compare import Comparison, Result
from jsparse.evaluation.table import (
    columns,
    counted,
    mean,
    of_trained_models,
    percent,
    rows,
)

# the density at which methods are shown side by side, each by its nearest setting
SHOWN_DENSITY = 0.2
_LAYERS, _HEADS = 6, 8

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --muted: #57606a; --line: #d0d7de;
  --page: #fff; --raised: #f6f8fa; --missed: #d1495b; --c0: #0072b2; --c1: #c2500a; --c2: #00805b;
  --c3: #b0518a; --c4: #8a6a00; --c5: #3a4fbf; --c6: #6b6b6b; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --muted: #9aa4af; --line: #30363d;
  --page: #0d1117; --raised: #161b22; --missed: #ff6b7d; --c0: #56b4e9; --c1: #ff8f4a;
  --c2: #3ddc97; --c3: #f29ccb; --c4: #e8c547; --c5: #94a3ff; --c6: #b0b0b0; }
  .tiles image { filter: invert(.92); } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; margin: 0 auto; max-width: 76rem;
  padding: 2rem 1.2rem 4rem; color: var(--text); background: var(--page); }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .3rem; }
p, ul, dl, figcaption { max-width: 50rem; } p { margin: .4rem 0; } li { margin: .25rem 0; }
.note, figcaption, dd, summary { color: var(--muted); font-size: .92rem; }
.findings { border-left: 3px solid var(--c0); padding: .2rem 0 .2rem 1.6rem; margin: 1.2rem 0; }
figure { margin: 0; }
.row { display: grid; gap: 1.4rem; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); }
.row > * { min-width: 0; max-width: 34rem; } .row h3 { font-size: 1rem; margin: .9rem 0 .2rem; }
svg { width: 100%; height: auto; display: block; overflow: visible; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin: .8rem 0 .4rem; }
.chart { color: var(--muted); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
.all { width: 100%; white-space: nowrap; }
th, td { padding: .32rem .45rem; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } th[title] { cursor: help; text-decoration: underline dotted; }
.all th:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
tbody th { font-weight: 400; } tr.first > * { border-top: 2px solid var(--line); }
.heat td { text-align: center; border: 2px solid var(--page); min-width: 2.4rem;
  background: color-mix(in srgb, var(--missed) calc(var(--m) * 85%), var(--raised)); }
.heat th { font-weight: 400; color: var(--muted); border: 0; text-align: center; }
dt { font-weight: 600; margin-top: .5rem; } dd { margin: 0; }
pre { background: var(--raised); padding: .8rem; overflow-x: auto; font-size: .8rem;
  line-height: 1.35; border-radius: 6px; }
"""


def write_report(
    comparison: Comparison,
    path: str | Path,
    *,
    title: str,
    source: str,
    score_name: str = "score",
    text: str = "",
) -> None:
    """Writes one HTML file that needs no other.

    Args:
      comparison: What `compare` returned.
      path: Where to write; folders are made.
      title: The page's title.
      source: A sentence or two on what was measured, on which model and text.
      score_name: What the score is, such as "bits/byte".
      text: The opening of the text that the model read, if it is known.
    """
    findings = "".join(f"<li>{html.escape(x)}</li>" for x in _findings(comparison, score_name))
    opening = (
        f"<details><summary>The text begins so</summary><pre>{html.escape(text)}</pre></details>"
        if text
        else ""
    )
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(source)}</p>{opening}",
        f"<ul class='findings'>{findings}</ul>",
        "<h2>What leaving tiles out costs, and what it saves</h2>",
        _frontier(comparison, score_name),
        "<h2>Which tiles are computed</h2>",
        _figure(
            "".join(_model_tiles(comparison, r) for r in shown_settings(comparison)),
            "Each square is one head's attention map, queries downwards, keys to the right, with "
            "the share of its visible tiles that is computed: strong tiles are computed, faint "
            "ones skipped, grey ones computed in part. Of each method the setting nearest to "
            f"{percent(SHOWN_DENSITY, 0)} density, so that all spend about the same: what differs "
            "is where.",
        ),
        "<h2>Attention recalled, head by head</h2>",
        _figure(
            "".join(_recall(r) for r in shown_settings(comparison)),
            "Percent of dense attention's probability that falls on attended pairs, layers "
            "downwards, heads to the right; the redder a cell, the more the head loses.",
        ),
        "<h2>All figures</h2>",
        _page_table(comparison, score_name),
        "<h2>How this was measured</h2>",
        f"<dl>{_conditions(comparison)}</dl>",
    ]
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    _write(path, page)


def write_tiles(comparison: Comparison, path: str | Path) -> None:
    """Writes an SVG file of tiles: a row per method, the heads of a middle and the last layer."""
    chosen = shown_settings(comparison)
    count = len(chosen[0].density)
    layers = sorted({count // 2, count - 1})
    grid = [
        (r.label, [p for n in layers for p in _panels(comparison, r, n, f"L{n} head ")])
        for r in chosen
    ]
    # dark on white, wherever it is shown
    root = "<svg xmlns='http://www.w3.org/2000/svg' style='color:#1b1f24;background:#fff'"
    _write(path, figures.tile_grid("computed tiles", grid).replace("<svg", root, 1) + "\n")


def make_room(path: str | Path) -> None:
    """Makes the folder that a file goes into, so that a wrong place is known before the work.

    Raises:
      ValueError: if the path is a folder itself, or its folder cannot be made.
    """
    checks.file_place(Path(path))
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        checks.writable(path, error)


def _write(path: str | Path, text: str) -> None:
    make_room(path)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        checks.writable(path, error)


def _is_exact(result: Result) -> bool:
    """Whether it leaves no visible pair out, up to how well pairs are counted."""
    return float(np.min(result.token_density)) > 1 - 1e-5


def shown_settings(comparison: Comparison) -> list[Result]:
    """Of each method that leaves something out, the setting nearest to `SHOWN_DENSITY`."""
    sparse = [r for r in comparison.results if not _is_exact(r)] or comparison.results
    groups = [[r for r in sparse if r.method == m] for m in dict.fromkeys(r.method for r in sparse)]
    return [min(g, key=lambda r: abs(mean(r.density) - SHOWN_DENSITY)) for g in groups]


def _findings(comparison: Comparison, score_name: str) -> list[str]:
    """What the figures say, a sentence each."""
    sparse = [r for r in comparison.results if not _is_exact(r)]
    found = []

    def speed(r: Result) -> str:
        return f"{r.dense_seconds / r.seconds:.1f} times as fast as dense attention"

    faithful = [r for r in sparse if mean(r.recall) >= 0.9]
    if faithful:
        least = min(faithful, key=lambda r: mean(r.density))
        fastest = max(faithful, key=lambda r: r.dense_seconds / r.seconds)
        it_is = "and it is" if fastest is least else f"{fastest.label} is"
        found.append(
            f"Of the settings that recall {percent(0.9, 0)} of dense attention, {least.label} "
            f"computes the fewest tiles, {percent(mean(least.density), 0)}, at an output error of "
            f"{mean(least.error):.2f}; {it_is} the fastest, {speed(fastest)}, planning included."
        )
    near = [r for r in sparse if mean(r.error) < 0.1]
    if near:
        best = min(near, key=lambda r: mean(r.density))
        found.append(
            f"For an output error below 0.1, {best.label} computes the fewest, "
            f"{percent(mean(best.density), 0)} of the tiles: {speed(best)}."
        )
    if comparison.dense_score is not None:
        loss = [(r.score - comparison.dense_score, r) for r in sparse if r.score is not None]
        close = [(gap, r) for gap, r in loss if gap < 0.01]
        if close:
            gap, best = min(close, key=lambda item: mean(item[1].density))
            change = "loses" if gap > 0 else "gains"
            found.append(
                f"Inside the model, {best.label} {change} {abs(gap):.4f} {score_name} while "
                f"computing {percent(mean(best.density), 0)} of the tiles."
            )
        better = sum(gap < -0.01 for gap, _ in loss)
        if better:
            found.append(
                f"{better} of {len(loss)} sparse settings predict better than dense attention by "
                f"over 0.01 {score_name}: at this length the model is not at its best with "
                "all pairs, so this score does not rank the methods; recall and error do."
            )
    exact = [r for r in comparison.results if _is_exact(r)]
    if exact:
        names = ", ".join(r.label for r in exact)
        worst = max(float(np.max(r.error)) for r in exact)
        found.append(
            f"{names}: at this setting nothing is left out under a causal mask. It stands here as "
            "a check, planned attention against dense attention: the output's error is "
            f"{worst:.1g}, and the time differs by what planning and chance make of it."
        )
    if not all(math.isfinite(mean(r.error)) for r in comparison.results):
        found.append("Some errors are not numbers: q, k or v hold NaN or infinity.")
    cut = [r.label for r in comparison.results if r.overflowed]
    if cut:
        found.append(
            f"Lists were too short for all that was chosen by {', '.join(cut)}: tiles are missing "
            "from those plans, and their figures are of what was left."
        )
    return found


def _figure(drawn: str, caption: str, legend: str = "") -> str:
    text = html.escape(caption)
    return f"<figure><figcaption>{text}</figcaption>{legend}<div class='row'>{drawn}</div></figure>"


def _frontier(comparison: Comparison, score_name: str) -> str:
    sparse = [r for r in comparison.results if not _is_exact(r)]
    if not sparse:
        return "<p class='note'>No setting leaves anything out.</p>"
    methods = list(dict.fromkeys(r.method for r in sparse))

    def density(r: Result) -> float:
        return 100 * mean(r.density)

    def panel(
        title: str,
        said: str,
        y_label: str,
        value: Callable[[Result], float],
        guide: Callable[[float], float] | None = None,
    ) -> str:
        points = [
            sorted(
                figures.Point(
                    density(r),
                    value(r),
                    r.label.removeprefix(m).strip(),
                    f"{r.label}: {density(r):.1f} % of the tiles, {y_label} {value(r):.3g}",
                )
                for r in sparse
                if r.method == m and math.isfinite(value(r))
            )
            for m in methods
        ]
        drawn = figures.chart(title, points, ("visible tiles computed, %", y_label), guide)
        return f"<div><h3>{title}</h3>{drawn}<p class='note'>{html.escape(said)}</p></div>"

    panels = [
        panel(
            "Error of the output",
            "How far attention's output is from dense attention's: lower is better.",
            "relative error",
            lambda r: mean(r.error),
        ),
        panel(
            "Speed",
            "Planning included, higher is better; the dashed line is what leaving tiles out would "
            "bring if all else were free.",
            "times as fast as dense",
            lambda r: r.dense_seconds / r.seconds,
            guide=lambda density: 100 / density,
        ),
    ]
    dense_score = comparison.dense_score
    if dense_score is not None:
        cost = panel(
            "Cost inside the model",
            f"What the model loses in {score_name} with the method in every layer: lower is "
            "better, below zero it gains.",
            f"{score_name} above dense",
            lambda r: (r.score or 0.0) - dense_score,
        )
        panels.insert(1, cost)
    legend = "".join(
        f"<span><b style='color:var(--c{n % figures.COLORS})'>{mark}</b> {html.escape(m)}</span>"
        for n, (m, mark) in enumerate(zip(methods, itertools.cycle(figures.MARKS.values())))
    )
    return _figure(
        "".join(panels),
        "A line is a method, a point one of its settings, marked with its value; means over layers "
        "and heads. Farther left, fewer tiles are computed.",
        f"<div class='legend'>{legend}</div>",
    )


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spread, first and last among them."""
    return sorted({round(x) for x in np.linspace(0, count - 1, min(count, most))})


def _panels(
    comparison: Comparison, result: Result, layer: int, prefix: str = "head "
) -> list[figures.Panel]:
    panels = []
    for head in _spread(comparison.heads, _HEADS):
        density, recall, error = (
            float(values[layer][head]) for values in (result.density, result.recall, result.error)
        )
        panels.append(
            figures.Panel(
                comparison.tiles[result.label][layer][head],
                f"{prefix}{head}: {percent(density, 0)}",
                f"{result.label}, layer {layer}, head {head}: computes {percent(density)} of the "
                f"visible tiles, recalls {percent(recall)}, error {error:.3f}",
            )
        )
    return panels


def _model_tiles(comparison: Comparison, result: Result) -> str:
    layers = _spread(len(result.density), _LAYERS)
    grid = [(f"layer {layer}", _panels(comparison, result, layer)) for layer in layers]
    picture = figures.tile_grid(f"computed tiles of {result.label}", grid)
    heading = f"{html.escape(result.label)}: {percent(mean(result.density), 0)} of the tiles"
    return f"<div><h3>{heading}</h3>{picture}</div>"


def _recall(result: Result) -> str:
    recall = np.asarray(result.recall)
    heads = "".join(f"<th>{head}</th>" for head in range(recall.shape[1]))
    lines = "".join(
        f"<tr><th>{layer}</th>"
        + "".join(f"<td style='--m:{1 - x:.2f}'>{100 * x:.0f}</td>" for x in line)
        + "</tr>"
        for layer, line in enumerate(recall)
    )
    return (
        f"<div><h3>{html.escape(result.label)}: {percent(recall.mean())}</h3><div class='scroll'>"
        f"<table class='heat'><tr><th></th>{heads}</tr>{lines}</table></div></div>"
    )


def _page_table(comparison: Comparison, score_name: str) -> str:
    shown = columns(comparison, score_name)
    head = "".join(
        f"<th title='{html.escape(c.meaning)}'>{html.escape(c.name)}</th>" for c in shown
    )
    lines, before = [], ""
    for result in rows(comparison):
        first = " class='first'" if before != result.method else ""
        before = result.method
        cells = "".join(f"<td>{html.escape(c.cell(result))}</td>" for c in shown)
        lines.append(f"<tr{first}><th>{html.escape(result.label)}</th>{cells}</tr>")
    meanings = "; ".join(f"<b>{html.escape(c.name)}</b>: {html.escape(c.meaning)}" for c in shown)
    return (
        f"<div class='scroll'><table class='all'><thead><tr><th>method</th>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
        f"<p class='note'>Means over layers and heads. {meanings}. "
        f"{html.escape(of_trained_models(comparison))}</p>"
    )


def _conditions(comparison: Comparison) -> str:
    device = jax.devices()[0]
    said = {
        "Times": f"Wall-clock time of compiled programs, without compilation: the median of "
        f"{counted(comparison.repeats, 'run')} per layer, summed over layers. Dense attention runs "
        "through the same js.attend on the same causal mask, before the others in the same run. "
        "Other work on the machine shows in these times; nothing else on this page depends on "
        "them.",
        "Errors and recall": "Against dense attention on the same tensors, with each layer's "
        "input as dense attention makes it: errors do not build up over layers, except in the "
        "model's own cost, where the method stands in every layer.",
        "Operations and bytes": "Counted from the plans, two operations per multiply and add.",
        "Machine": f"{_processor()}, {os.cpu_count()} cores; JAX runs on "
        f"{' '.join(dict.fromkeys((device.platform, device.device_kind)))}.",
        "Versions": ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "numpy"))
        + f", Python {platform.python_version()}; {datetime.date.today().isoformat()}.",
    }
    return "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in said.items())


def _processor() -> str:
    """The processor's name, as the system tells it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]
