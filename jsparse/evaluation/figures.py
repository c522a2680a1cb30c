"""Figures by matplotlib, as SVG text that follows the page it stands in, light or dark."""

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Float, Shaped

from jsparse import checks

# matplotlib's shapes of points, as letters for a legend; they tell series apart where colours fail
MARKS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼"}
COLORS = 7
_SERIES = [f"#0101{n:02x}" for n in range(COLORS)]
# what matplotlib writes, and what stands for it in a page
_IN_PAGE = {"#000000": "currentColor", "'DejaVu Sans'": "system-ui, sans-serif"}
_IN_PAGE |= {color: f"var(--c{n})" for n, color in enumerate(_SERIES)}
_STYLE = {"svg.fonttype": "none", "font.family": "DejaVu Sans", "text.parse_math": False}
_TOOLTIP = "tooltip: "
Guide = Callable[[float], float] | None


class Panel(NamedTuple):
    """How much of each tile of one head is computed, a caption, and what pointing at it says."""

    tiles: Shaped[np.ndarray, "q_blocks kv_blocks"]
    caption: str
    tooltip: str


class Point(NamedTuple):
    """A point of a chart, what stands beside it and what pointing at it says."""

    x: float
    y: float
    label: str
    tooltip: str


def chart(
    name: str, series: Sequence[Sequence[Point]], labels: tuple[str, str], guide: Guide = None
) -> str:
    """Draws a line per series over log x; y holds zero, or is log too beside a dashed guide."""
    with _figure(name, 342.0, 242.0) as figure:
        axes = figure.add_axes((0.127, 0.15, 0.77, 0.82), xlabel=labels[0], ylabel=labels[1])
        axes.set(xscale="log", yscale="log" if guide else "linear", xmargin=0.08, frame_on=False)
        # the wide clear edge makes a small point easy to hit
        easy = {"markeredgewidth": 12, "markeredgecolor": "#00000000"}
        beside = {"xytext": (5, 3), "textcoords": "offset points", "size": 8.75}
        for index, points in enumerate(series):
            color, mark = _SERIES[index % COLORS], [*MARKS][index % len(MARKS)]
            axes.plot([p.x for p in points], [p.y for p in points], color=color)
            for x, y, label, tooltip in points:
                axes.plot(x, y, mark, color=color, gid=_TOOLTIP + tooltip, **easy)
                axes.annotate(label, (x, y), color=color, **beside)
        if guide:
            ends = axes.set_xlim(axes.get_xlim())
            axes.plot(ends, [guide(x) for x in ends], "k--", linewidth=1)
        else:
            axes.axhline(color="k", linewidth=0.8)
            axes.locator_params("y", nbins=5)
        axes.locator_params("both" if guide else "x", subs=(1, 2, 5))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.tick_params(length=0)
        axes.grid(color="k", alpha=0.25)
        return _svg(figure, "chart")


def tile_grid(name: str, rows: Sequence[tuple[str, Sequence[Panel]]]) -> str:
    """Draws tiles in rows with a label each: a dark tile is computed, a pale one skipped."""
    # lengths in sides of a picture
    columns, left, top, gap = len(rows[0][1]), 0.22, 0.18, 0.12
    width, height = left + columns * (1 + gap), len(rows) * (top + 1 + gap)
    with _figure(name, 90 * width, 90 * height) as figure:
        edges = left / width, gap / height, 1 - gap / width, 1 - top / height
        figure.subplots_adjust(*edges, wspace=gap, hspace=gap + top)
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for line, (label, panels) in zip(grid, rows, strict=True):
            line[0].set_ylabel(label)
            for axes, panel in zip(line, panels, strict=True):
                axes.set(xticks=[], yticks=[], gid=_TOOLTIP + panel.tooltip)
                axes.set_title(panel.caption, size=10, loc="left", pad=4)
                axes.spines[:].set_linewidth(0.3)
                axes.imshow(_pixels(panel.tiles), interpolation="none", aspect="auto")
        return _svg(figure, "tiles")


def _pixels(tiles: Shaped[np.ndarray, "q_blocks kv_blocks"]) -> Float[np.ndarray, "rows columns 4"]:
    """Black where computed, faint where only visible; at most 128 each way, grey between."""
    step = -(-max(tiles.shape) // 128)
    padded = np.pad(1.0 * tiles, [(0, -n % step) for n in tiles.shape], constant_values=np.nan)
    rows, columns = (n // step for n in padded.shape)
    computed = np.nanmean(padded.reshape(rows, step, columns, step), axis=(1, 3))
    shades = np.maximum(np.ceil(4 * computed) / 4, 0.09 * np.tri(rows, columns, columns - rows))
    return np.dstack([np.zeros((rows, columns, 3)), shades])


@contextlib.contextmanager
def _figure(name: str, width: float, height: float) -> Iterator[Any]:
    """Makes a figure in the page's style, lengths in points; a page has each name once."""
    checks.drawing_library()
    # an extra: what draws nothing does without
    from matplotlib import figure, style

    with style.context(_STYLE | {"svg.hashsalt": name}, after_reset=True):
        yield figure.Figure((width / 72, height / 72), label=name)


def _svg(figure: Any, kind: str) -> str:
    """Writes the figure for a page: its colours and font, tooltips, and ids that it has once."""
    file = io.StringIO()
    unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=unsaid)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"|xlink:', "", file.getvalue())
    for written, shown in _IN_PAGE.items():
        text = text.replace(written, shown)
    root = ElementTree.fromstring(text)
    referred = set(re.findall(r"#(\w+)", text))
    for element in root.iter():
        name = element.attrib.pop("id", "")
        if name in referred:
            element.set("id", name)
        elif name.startswith(_TOOLTIP):
            element.insert(0, ElementTree.Element("title"))
            element[0].text = name.removeprefix(_TOOLTIP)
    # black text is written without a colour
    root.attrib |= {"class": kind, "role": "img", "fill": "currentColor"}
    root.set("aria-label", figure.get_label())
    return ElementTree.tostring(root, encoding="unicode")
