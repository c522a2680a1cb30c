"""Figures as SVG text: nothing to install, sharp at any size, light and dark with their page.

Colours come from the page: `currentColor`, and the classes `s0` to `s6` for series.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

COLORS = 7
_CELLS = 128
_SIDE, _GAP, _LEFT, _TOP = 100, 12, 22, 18
# axes of a chart: the box of its data inside the drawing
_X, _Y, _WIDTH, _HEIGHT = 52, 14, 316, 232


class Panel(NamedTuple):
    """Tiles of one head, with what stands above them and what pointing at them says."""

    tiles: Bool[np.ndarray, "q_blocks kv_blocks"]
    caption: str
    tooltip: str


class Point(NamedTuple):
    """A point of a chart, what stands beside it and what pointing at it says."""

    x: float
    y: float
    label: str
    tooltip: str


class Axis(NamedTuple):
    """The range of a chart's axis and where it is marked."""

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool

    @classmethod
    def over(cls, label: str, values: Iterable[float], *, log: bool = False) -> "Axis":
        """An axis a little longer than the values, marked at round numbers."""
        values = [float(x) for x in values]
        low, high = min(values), max(values)
        if log:
            low, high = low / 1.2, high * 1.2
            powers = [
                10.0**e for e in range(math.floor(math.log10(low)), 1 + math.ceil(math.log10(high)))
            ]
            for marks in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
                ticks = tuple(m * p for p in powers for m in marks if low <= m * p <= high)
                if len(ticks) > 2:
                    break
            return cls(label, low, high, ticks, log)
        span = (high - low) or 1.0
        margin = 0.04 * span if high > low else 0.5
        low, high = low - margin, high + margin
        power = 10.0 ** math.floor(math.log10(span / 4))
        step = next(m * power for m in (1, 2, 5, 10) if m * power * 5 >= span)
        counts = range(math.ceil(low / step), math.floor(high / step) + 1)
        return cls(label, low, high, tuple(round(n * step, 12) for n in counts), log)

    def place(self, value: float) -> float:
        """Where a value stands, 0 at the low end and 1 at the high one."""
        low, high, value = (
            math.log(max(x, 1e-12)) if self.log else x for x in (self.low, self.high, value)
        )
        return (value - low) / (high - low)


def chart(
    series: Mapping[str, Sequence[Point]], x: Axis, y: Axis, *, guide: Sequence[Point] = ()
) -> str:
    """Lines through marked points, a colour and a shape per series.

    Args:
      series: Points by name; a name's place in the order decides its colour and shape.
      x: The horizontal axis.
      y: The vertical axis.
      guide: A dashed line to compare with.
    """

    def at(point: Point) -> tuple[float, float]:
        return _X + _WIDTH * x.place(point.x), _Y + _HEIGHT * (1 - y.place(point.y))

    def line(points: Sequence[Point]) -> str:
        return " ".join("{:.1f},{:.1f}".format(*at(point)) for point in points)

    parts = []
    for tick in x.ticks:
        left = _X + _WIDTH * x.place(tick)
        parts.append(f"<path class='grid' d='M{left:.1f} {_Y}v{_HEIGHT}'/>")
        parts.append(_text(left, _Y + _HEIGHT + 16, f"{tick:g}", "middle"))
    for tick in y.ticks:
        top = _Y + _HEIGHT * (1 - y.place(tick))
        kind = "zero" if tick == 0 else "grid"
        parts.append(f"<path class='{kind}' d='M{_X} {top:.1f}h{_WIDTH}'/>")
        parts.append(_text(_X - 6, top + 4, f"{tick:g}", "end"))
    parts.append(_text(_X + _WIDTH / 2, _Y + _HEIGHT + 36, x.label, "middle"))
    middle = _Y + _HEIGHT / 2
    turned = f" transform='rotate(-90 12 {middle:.0f})'"
    parts.append(_text(12, middle, y.label, "middle", turned))
    if guide:
        parts.append(f"<polyline class='guide' points='{line(guide)}'/>")
    for index, points in enumerate(series.values()):
        marks = "".join(_mark(index, *at(p), p.label, p.tooltip) for p in points)
        parts.append(f"<g class='s{index % COLORS}'><polyline points='{line(points)}'/>{marks}</g>")
    height = _Y + _HEIGHT + 44
    opening = f"<svg class='chart' viewBox='0 0 {_X + _WIDTH + 42} {height}' role='img'>"
    return f"{opening}{''.join(parts)}</svg>"


def key(index: int) -> str:
    """The mark of a series, for its legend."""
    return (
        f"<svg class='key s{index % COLORS}' viewBox='0 0 28 14' width='28' height='14' "
        f"aria-hidden='true'><path d='M1 7h26'/>{_mark(index, 14, 7)}</svg>"
    )


def tile_grid(rows: Sequence[tuple[str, Sequence[Panel]]]) -> str:
    """Pictures of tiles in rows with a label each: a dark tile is computed, a pale one skipped.

    Where there are more tiles than can be told apart a cell stands for several, its shade for how
    many of them are computed.
    """
    parts = []
    columns = max(len(panels) for _, panels in rows)
    for row, (label, panels) in enumerate(rows):
        top = _TOP + row * (_SIDE + _GAP + _TOP)
        turned = f" transform='rotate(-90 12 {top + _SIDE / 2:.0f})'"
        parts.append(_text(12, top + _SIDE / 2, label, "middle", turned))
        for column, panel in enumerate(panels):
            left = _LEFT + column * (_SIDE + _GAP)
            parts.append(
                f"<g transform='translate({left} {top})'><title>{html.escape(panel.tooltip)}"
                f"</title>{_text(0, -5, panel.caption)}{_tiles(panel.tiles)}</g>"
            )
    width = _LEFT + columns * (_SIDE + _GAP) - _GAP + 1
    height = len(rows) * (_SIDE + _GAP + _TOP) - _GAP + 1
    return f"<svg class='tiles' viewBox='0 0 {width} {height}' role='img'>{''.join(parts)}</svg>"


def standalone(svg: str, style: str) -> str:
    """An SVG file of its own, dark on white, out of one that was drawn for a page."""
    width, height = svg.split("viewBox='0 0 ")[1].split("'")[0].split()
    root = (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' "
        "style='color:#1b1f24;background:#fff'"
    )
    return svg.replace("<svg", root, 1).replace(">", f"><style>{style}</style>", 1) + "\n"


def _text(x: float | int, y: float | int, text: str, anchor: str = "start", more: str = "") -> str:
    place = f"x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'"
    return f"<text {place}{more}>{html.escape(text)}</text>"


def _mark(index: int, x: float | int, y: float | int, label: str = "", tooltip: str = "") -> str:
    """A point of a series: shapes tell series apart where colours do not."""
    shapes = (
        "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
        "M-3.7 -3.7h7.4v7.4h-7.4z",
        "M0 -5l5 8.5h-10z",
        "M0 -5.2l5.2 5.2l-5.2 5.2l-5.2 -5.2z",
        "M0 5l5 -8.5h-10z",
    )
    title = f"<title>{html.escape(tooltip)}</title>" if tooltip else ""
    text = _text(7, -5, label) if label else ""
    # the wide clear stroke makes a small point easy to hit
    return (
        f"<g class='mark' transform='translate({x:.1f} {y:.1f})'>{title}"
        f"<path d='{shapes[index % len(shapes)]}'/>{text}</g>"
    )


def _tiles(tiles: Bool[np.ndarray, "q_blocks kv_blocks"]) -> str:
    """One head's tiles over the triangle of those that causal attention sees, a path per shade."""
    step = -(-max(tiles.shape) // _CELLS)
    rows, columns = (-(-n // step) for n in tiles.shape)
    padded = np.full((rows * step, columns * step), np.nan, np.float32)
    padded[: tiles.shape[0], : tiles.shape[1]] = tiles
    shades = np.ceil(np.nanmean(padded.reshape(rows, step, columns, step), axis=(1, 3)) * 4)
    ahead = columns - rows
    corners = f"0,{max(-ahead, 0)} 0,0 {max(ahead, 0)},0 {columns},{rows} 0,{rows}"
    paths = []
    for shade in range(1, 5):
        edges = np.diff(np.pad(shades == shade, ((0, 0), (1, 1))).astype(np.int8))
        starts, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
        if len(starts):
            runs = zip(starts.tolist(), ends[:, 1].tolist(), strict=True)
            drawn = "".join(f"M{column} {row}h{end - column}" for (row, column), end in runs)
            paths.append(f"<path class='tile' opacity='{shade / 4:g}' d='{drawn}'/>")
    return (
        f"<g transform='scale({_SIDE / columns:.5g} {_SIDE / rows:.5g})'>"
        f"<polygon class='seen' points='{corners}'/>"
        f"<g transform='translate(0 .5)'>{''.join(paths)}</g></g>"
        f"<path class='frame' d='M0 0h{_SIDE}v{_SIDE}h-{_SIDE}z'/>"
    )
