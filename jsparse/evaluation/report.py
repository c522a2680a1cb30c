"""The comparison as one self-contained HTML page and as a table for the terminal."""

import base64
import html
import io
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jsparse import checks
from jsparse.evaluation.compare import Comparison, Result

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem;
       color: #1b1f24; background: #fff; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
p.lead { color: #444c56; max-width: 52rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #d8dee4; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; }
figcaption { color: #57606a; font-size: .9rem; max-width: 52rem; }
"""

_COLUMNS = (
    "method",
    "tiles",
    "tokens",
    "recall",
    "error",
    "cosine",
    "score",
    "ms",
    "of it plan",
    "x dense",
    "GFLOP",
    "of dense",
    "backward",
    "MB",
)


def rows(comparison: Comparison, score_name: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells of the table, dense first."""
    first = comparison.results[0]
    header = tuple(score_name if name == "score" else name for name in _COLUMNS)

    def number(x: float | None) -> str:
        return "" if x is None else f"{x:.4f}"

    table = [
        (
            "dense",
            "100.0 %",
            "100.0 %",
            "100.0 %",
            "0",
            "1",
            number(comparison.dense_score),
            f"{first.dense_seconds * 1e3:.0f}",
            "",
            "1.00",
            f"{first.dense_flops / 1e9:.1f}",
            "100 %",
            "100 %",
            f"{first.dense_bytes / 1e6:.0f}",
        )
    ]
    for result in comparison.results:
        table.append(
            (
                result.label,
                f"{100 * np.mean(result.density):.1f} %",
                f"{100 * np.mean(result.token_density):.1f} %",
                f"{100 * np.mean(result.recall):.1f} %",
                f"{np.mean(result.error):.3f}",
                f"{np.mean(result.cosine):.3f}",
                number(result.score),
                f"{result.seconds * 1e3:.0f}",
                f"{result.plan_seconds * 1e3:.0f}",
                f"{result.dense_seconds / result.seconds:.2f}",
                f"{result.flops / 1e9:.1f}",
                f"{100 * result.flops / result.dense_flops:.0f} %",
                f"{100 * result.backward_flops / result.dense_backward_flops:.0f} %",
                f"{result.bytes / 1e6:.0f}",
            )
        )
    return header, table


def print_table(comparison: Comparison, score_name: str = "score") -> None:
    """Prints the table, on one line per setting however narrow the terminal says it is."""
    header, cells = rows(comparison, score_name)
    if comparison.dense_score is None:
        drop = header.index(score_name)
        header = header[:drop] + header[drop + 1 :]
        cells = [row[:drop] + row[drop + 1 :] for row in cells]
    table = Table(title="against dense attention, all layers")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    Console(width=max(Console().width, 132)).print(table)


def write_report(
    comparison: Comparison,
    path: str | Path,
    *,
    title: str,
    source: str,
    score_name: str = "score",
) -> None:
    """Writes one HTML file that needs no other.

    Args:
      comparison: What `compare` returned.
      path: Where to write; folders are made.
      title: The page's title.
      source: One sentence on what was measured, on which model and text.
      score_name: What the score is, such as "bits/byte".
    """
    header, cells = rows(comparison, score_name)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells
    )
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=lead>{html.escape(source)} {html.escape(_summary(comparison, score_name))}</p>",
        "<h2>Density against error</h2>",
        _figure(
            _frontier(comparison, score_name),
            "Left: relative error of the attention output against the share of visible tiles that "
            "is computed, mean over layers and heads; lower left is better. Right: what the whole "
            f"model loses with the method inside, in {score_name}."
            if comparison.dense_score is not None
            else "Relative error of the attention output against the share of visible tiles that "
            "is computed, mean over layers and heads; lower left is better.",
        ),
        "<h2>Which tiles are computed</h2>",
        _figure(
            block_mask_figure(comparison),
            "One picture per head, queries downwards, keys to the right; a dark tile is computed. "
            "Each row is one setting of one method on one layer.",
        ),
        "<h2>Attention mass recalled, by layer and head</h2>",
        _figure(
            _recall(comparison),
            "The share of dense attention's probability that falls on computed pairs. One line per "
            "layer, one cell per head.",
        ),
        "<h2>All figures</h2>",
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>",
        "<p class=lead>Tiles: computed tiles over visible tiles. Tokens: attended pairs of tokens "
        "over visible pairs. Recall: mean probability of dense attention on attended pairs. Error: "
        "norm of the difference of outputs over the norm of the dense output; cosine: of the angle "
        "between the two. ms: all layers, planning included, median of repeated runs; x dense: "
        "how many times faster than dense attention by the same executor in the same run. GFLOP "
        "and MB: counted, not timed, planning included; backward: the gradients' operations as a "
        "share of dense attention's.</p>",
    ]
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>"
        f"<body>{''.join(parts)}</body></html>"
    )
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        checks.writable(path, error)


def _summary(comparison: Comparison, score_name: str) -> str:
    """Key findings in a sentence or two, from the figures."""
    sparse = [r for r in comparison.results if np.mean(r.density) < 0.9]
    if not sparse:
        return ""
    near = [r for r in sparse if np.mean(r.error) < 0.1]
    fastest = max(sparse, key=lambda r: r.dense_seconds / r.seconds)
    text = (
        f"The fastest setting, {fastest.label}, takes "
        f"{fastest.seconds / fastest.dense_seconds:.0%} of dense attention's time at an output "
        f"error of {np.mean(fastest.error):.2f}."
    )
    if near:
        best = min(near, key=lambda r: float(np.mean(r.density)))
        text += (
            f" The sparsest with an output error below 0.1 is {best.label}: it computes "
            f"{np.mean(best.density):.0%} of the visible tiles."
        )
    if comparison.dense_score is not None:
        loss = [(r.score - comparison.dense_score, r) for r in sparse if r.score is not None]
        close = [(np.mean(r.density), r, gap) for gap, r in loss if gap < 0.01]
        if close:
            density, result, gap = min(close, key=lambda item: item[0])
            change = "loses" if gap > 0 else "gains"
            text += (
                f" Inside the model, {result.label} {change} {abs(gap):.4f} {score_name} while "
                f"computing {density:.0%} of the tiles."
            )
        better = sum(gap < -0.01 for gap, _ in loss)
        if better:
            text += (
                f" {better} of {len(loss)} sparse settings predict better than dense attention by "
                f"over 0.01 {score_name}: at this length the model is not at its best with "
                "all pairs, so this score does not rank the methods; recall and error do."
            )
    return text


def _figure(figure: Any, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, bbox_inches="tight")
    data = base64.b64encode(buffer.getvalue()).decode()
    alt = html.escape(caption)
    return (
        f"<figure><img alt='{alt}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{alt}</figcaption></figure>"
    )


def _by_method(comparison: Comparison) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in comparison.results:
        groups.setdefault(result.method, []).append(result)
    return groups


def _frontier(comparison: Comparison, score_name: str) -> Any:
    from matplotlib.figure import Figure

    has_score = comparison.dense_score is not None
    figure = Figure(figsize=(11 if has_score else 6, 4.2), layout="constrained")
    panels = figure.subplots(1, 2 if has_score else 1, squeeze=False)[0]
    for name, results in _by_method(comparison).items():
        results = sorted(results, key=lambda r: np.mean(r.density))
        density = [100 * np.mean(r.density) for r in results]
        panels[0].plot(density, [np.mean(r.error) for r in results], "o-", label=name)
        if has_score:
            gaps = [(r.score or 0.0) - (comparison.dense_score or 0.0) for r in results]
            panels[1].plot(density, gaps, "o-", label=name)
    panels[0].set_ylabel("relative output error")
    if has_score:
        panels[1].set_ylabel(f"{score_name} above dense")
        panels[1].axhline(0, color="0.7", linewidth=1, zorder=0)
    for panel in panels:
        panel.set_xlabel("visible tiles computed, %")
        panel.set_xlim(0, 103)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    return figure


def block_mask_figure(comparison: Comparison, *, layers: int = 2) -> Any:
    """Pictures of the tiles: a row per method and layer, a column per head."""
    from matplotlib.figure import Figure

    chosen = []
    for results in _by_method(comparison).values():
        result = results[len(results) // 2]
        count = len(comparison.tiles[result.label])
        for layer in sorted({count // 3, count - 1})[:layers]:
            chosen.append((result, layer))
    heads = min(comparison.heads, 8)
    figure = Figure(figsize=(1.7 * heads + 1.6, 1.75 * len(chosen)), layout="constrained")
    axes = figure.subplots(len(chosen), heads, squeeze=False)
    for row, (result, layer) in zip(axes, chosen, strict=True):
        for head, panel in enumerate(row):
            tiles = comparison.tiles[result.label][layer][head]
            panel.imshow(~tiles, cmap="gray", vmin=-0.3, vmax=1, interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
            density = np.mean(result.density[layer][head])
            panel.set_title(f"head {head}: {100 * density:.0f} %", fontsize=8)
        row[0].set_ylabel(f"{result.label}\nlayer {layer}", fontsize=8)
    return figure


def _recall(comparison: Comparison) -> Any:
    from matplotlib.figure import Figure

    chosen = [results[len(results) // 2] for results in _by_method(comparison).values()]
    figure = Figure(figsize=(2.6 * len(chosen) + 1, 3.2), layout="constrained")
    axes = figure.subplots(1, len(chosen), squeeze=False)[0]
    image: Any = None
    for panel, result in zip(axes, chosen, strict=True):
        recall = 100 * np.asarray(result.recall)
        image = panel.imshow(recall, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        for (layer, head), value in np.ndenumerate(recall):
            color = "white" if value < 60 else "black"
            panel.text(head, layer, f"{value:.0f}", ha="center", va="center", color=color, size=8)
        panel.set_title(result.label, fontsize=10)
        panel.set_xlabel("head")
        panel.set_xticks(range(recall.shape[1]))
        panel.set_yticks(range(recall.shape[0]))
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(axes), label="recall, %", shrink=0.9)
    return figure
