"""Line charts as inline SVG: a few kilobytes each, in the colours of the page, light or dark.

The page's style sheet gives ``--ink``, ``--muted``, ``--line``, ``--band`` and the colours of the lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 24, 26, 40
MAX_POINTS = 400
COLORS = (
    *("#2563a8", "#c2570c", "#2c8a4b", "#8b4bb3", "#b3243f", "#6b7280", "#0e8fa3", "#a8890f"),
    *("#1b1b1b", "#e08ab5", "#7fb800", "#5b3a1e"),
)
"""Of lines that must be told apart, the first ones best."""
SMOOTHING = 10
"""A smoothed line is a moving mean over a tenth of its points."""


@dataclass(frozen=True)
class Line:
    """A line of a chart."""

    label: str
    """Entry in the legend; empty = none."""
    points: Sequence[tuple[float, float]]
    color: str
    """Any CSS colour, such as ``var(--a)``."""
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Band:
    """A stretch of the x axis with a label."""

    start: float
    end: float
    label: str
    shaded: bool


def line_chart(
    lines: Sequence[Line],
    bands: Sequence[Band],
    x_label: str,
    y_label: str,
    from_zero: bool = False,
    log_x: bool = False,
) -> str:
    """Draw lines over shaded bands.

    The y axis is logarithmic where the values span more than a factor of eight.

    Args:
        lines: what to draw; points that are not finite are dropped, long lines averaged to 400 points.
        bands: stretches of the x axis.
        x_label: what x is.
        y_label: what y is, with its unit.
        from_zero: start a linear y axis at zero.
        log_x: a logarithmic x axis, on which all x are above zero.

    Returns:
        SVG markup with its legend; empty if there is no point to draw.
    """
    lines = [
        Line(line.label, points, line.color, line.faint, line.dots)
        for line in lines
        if (points := _thinned([p for p in line.points if math.isfinite(p[0]) and math.isfinite(p[1])]))
    ]
    xs = [x for line in lines for x, _ in line.points] + [edge for b in bands for edge in (b.start, b.end)]
    ys = [y for line in lines for _, y in line.points]
    if not ys:
        return ""
    logarithmic = not from_zero and min(ys) > 0 and max(ys) > 8 * min(ys)
    y_ticks = _log_ticks(min(ys), max(ys)) if logarithmic else _ticks(0 if from_zero else min(ys), max(ys))
    x_ticks = _log_ticks(min(xs), max(xs)) if log_x else _ticks(min(xs), max(xs))
    x_ticks = [x for x in x_ticks if min(xs) <= x <= max(xs)]
    warp_x: Callable[[float], float] = math.log if log_x else float
    warp: Callable[[float], float] = math.log if logarithmic else float
    across = _scale(warp_x(min(xs)), warp_x(max(xs)), LEFT, WIDTH - RIGHT)

    def px(x: float) -> float:
        return across(warp_x(x))

    py = _scale(warp(y_ticks[0]), warp(y_ticks[-1]), HEIGHT - BOTTOM, TOP)

    parts = [_band(band, px) for band in bands]
    for y in y_ticks:
        at = py(warp(y))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 7}" y="{at + 4:.1f}">{_number(y)}</text>')
    for x in x_ticks:
        parts.append(f'<text class="tick mid" x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 17}">{_number(x)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    x_label += ", logarithmic" if log_x else ""
    parts.append(f'<text class="axis mid" x="{middle}" y="{HEIGHT - 5}">{escape(x_label)}</text>')
    for line in lines:
        points = [(px(x), py(warp(y))) for x, y in line.points]
        parts.append(_path(line, points))
    name = escape(y_label + (", logarithmic" if logarithmic else ""))
    return (
        f'<div class="chart"><p class="axis-name">{name}</p>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name} over {escape(x_label)}">'
        f"{''.join(parts)}</svg>{_legend(lines)}</div>"
    )


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Moving mean of y, centred, over a fixed share of the points."""
    half = len(points) // (2 * SMOOTHING)
    return [
        (x, math.fsum(v for _, v in window) / len(window))
        for i, (x, _) in enumerate(points)
        if (window := points[max(0, i - half) : i + half + 1])
    ]


def _band(band: Band, px: Callable[[float], float]) -> str:
    left, right = px(band.start), px(band.end)
    parts = []
    if band.shaded:
        height = HEIGHT - TOP - BOTTOM
        parts.append(
            f'<rect class="band" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{height}"/>'
        )
    if right - left > 6.4 * len(band.label):  # no room: the stage is in the table all the same
        parts.append(
            f'<text class="tick mid" x="{(left + right) / 2:.1f}" y="{TOP - 9}">{escape(band.label)}</text>'
        )
    return "".join(parts)


def _path(line: Line, points: Sequence[tuple[float, float]]) -> str:
    where = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    kind = "faint" if line.faint else "strong"
    path = f'<polyline class="{kind}" style="stroke:{line.color}" points="{where}"/>'
    if line.dots or len(points) == 1:
        path += "".join(
            f'<circle style="fill:{line.color}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points
        )
    return path


def _legend(lines: Sequence[Line]) -> str:
    entries = [
        f'<li><span style="background:{line.color}"></span>{escape(line.label)}</li>'
        for line in lines
        if line.label
    ]
    return f'<ul class="legend">{"".join(entries)}</ul>' if entries else ""


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points: the means of equal stretches."""
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if size else []
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose the range."""
    if high <= low:
        pad = abs(low) / 2 or 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers (1, 2, 5 or powers of ten only) that enclose the range."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [1, 2, 5] if len(decades) <= 4 else [1]
    marks = [mark * 10.0**decade for decade in decades for mark in fine]
    first = max(i for i, mark in enumerate(marks) if mark <= low * 1.000001)
    last = min(i for i, mark in enumerate(marks) if mark >= high * 0.999999)
    return marks[first : last + 1]


def _number(value: float) -> str:
    """Short form: 1,200 becomes 1.2 k, and 0.0002 becomes 2e-4."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g} {letter}"
    if 0 < abs(value) < 0.01:
        digits, exponent = f"{value:.3e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:g}"
