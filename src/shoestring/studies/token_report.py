"""What the token-reduction study found: tables and curves, at equal images, FLOPs and wall time."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby
from pathlib import Path

from PIL import Image

from shoestring.runtime import write_text
from shoestring.studies.charts import Line, line_chart
from shoestring.studies.page import embedded, html_table, short, table_row, whole
from shoestring.studies.report_template import PAGE
from shoestring.studies.token_rows import Row

COLORS = (
    *("#2563a8", "#c2570c", "#2c8a4b", "#8b4bb3", "#b3243f", "#6b7280", "#0e8fa3", "#a8890f"),
    *("#1b1b1b", "#e08ab5", "#7fb800", "#5b3a1e"),
)
DENSE = "dense"
SETTINGS = ("-1024", "-flow")
"""Endings of cells that are compared with a dense cell of their own."""
MAIN_RATIOS = {"dense": 0.0, "large-patch": 0.0, "tread": 0.5}
"""Ratios drawn over a budget, where there are several; 0.75 for the others."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """KID of a cell along its training, mean over seeds."""

    cell: str
    group: str
    method: str
    ratio: float
    seeds: int
    parameters: int
    gflops_per_image: float
    s_per_image: float | None
    """Measured in turns on a quiet machine; ``None`` = not timed."""
    points: tuple[Row, ...]
    """Means over seeds, fewest images first."""
    spread: float
    """Standard deviation over seeds of the last KID; NaN for one seed."""
    diverged: int

    @property
    def last(self) -> Row:
        """The end of the training."""
        return self.points[-1]

    @property
    def setting(self) -> str:
        """What the cell must share with others to be compared: tokens and process."""
        return next((ending for ending in SETTINGS if self.cell.endswith(ending)), "")

    def over(self, axis: Callable[[Row], float | None]) -> list[Point]:
        """KID over an axis, where the axis is known."""
        return [(x, row.kid) for row in self.points if (x := axis(row)) is not None]


def images(row: Row) -> float:
    """Axis: images seen."""
    return float(row.nimg)


def gflops(row: Row) -> float:
    """Axis: training FLOPs, in units of 1e9."""
    return row.training_gflops


def at(points: Sequence[Point], x: float) -> float | None:
    """KID at a budget, between measured points: linear in the logarithms of both; never beyond them."""
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= x <= x1 and x1 > x0:
            share = math.log(x / x0) / math.log(x1 / x0)
            if min(y0, y1) <= 0:
                return y0 + share * (y1 - y0)
            return math.exp(math.log(y0) + share * math.log(y1 / y0))
    return None


def curves(rows: Sequence[Row], timings: Mapping[str, float]) -> list[Curve]:
    """Group rows by cell, mean over seeds, without guidance.

    Args:
        rows: of the results file.
        timings: seconds an image, by cell.

    Returns:
        One curve a cell with any finished measurement, in the order of the file.
    """
    found = []
    for cell in dict.fromkeys(row.cell for row in rows):
        mine = [row for row in rows if row.cell == cell]
        plain = [row for row in mine if row.status == "ok" and row.guidance == 1]
        if not plain:
            continue
        fewest, last = min(row.samples for row in plain), max(row.nimg for row in plain)
        same = [row for row in plain if row.samples == fewest]
        # Seeds that got as far as any: a mean over others would change its members along the way.
        seeds = {row.seed for row in same if row.nimg == last}
        same = sorted((row for row in same if row.seed in seeds), key=lambda row: (row.nimg, row.seed))
        points = [_mean(list(group)) for _, group in groupby(same, key=lambda row: row.nimg)]
        most = [row for row in plain if row.nimg == last and row.samples > fewest and row.seed in seeds]
        final = [row for row in same if row.nimg == last]
        if {row.seed for row in most} == seeds:
            # KID does not depend on the number of samples; FD does, so it stays that of the smaller number.
            points[-1] = replace(_mean(most), fd=points[-1].fd)
            final = most
        first = plain[0]
        found.append(
            Curve(
                cell=cell,
                group=first.group,
                method=first.method,
                ratio=first.ratio,
                seeds=len(seeds),
                parameters=first.parameters,
                gflops_per_image=first.gflops_per_image,
                s_per_image=timings.get(cell),
                points=tuple(points),
                spread=statistics.stdev(row.kid for row in final) if len(final) > 1 else math.nan,
                diverged=sum(row.status == "diverged" for row in mine),
            )
        )
    return found


def _mean(rows: list[Row]) -> Row:
    def mean(name: str) -> float:
        return statistics.fmean(getattr(row, name) for row in rows)

    return replace(
        rows[0],
        kid=mean("kid"),
        kid_spread=mean("kid_spread"),
        fd=mean("fd"),
        loss=mean("loss"),
        trained_s=mean("trained_s"),
    )


def seconds(curve: Curve) -> Callable[[Row], float | None]:
    """Axis: training seconds, from the timing in turns; unknown without one."""

    def axis(row: Row) -> float | None:
        if curve.s_per_image is None or curve.gflops_per_image == 0:
            return None
        # A tail of other steps costs time in proportion to its FLOPs.
        return curve.s_per_image * row.training_gflops / curve.gflops_per_image

    return axis


def against_dense(curve: Curve, dense: Curve | None) -> tuple[float | None, float | None]:
    """KID of the cell over that of dense at the cell's whole budget: of FLOPs, and of time."""
    if dense is None:
        return None, None
    same_flops = at(dense.over(gflops), gflops(curve.last))
    time = seconds(curve)(curve.last)
    same_time = None if time is None else at(dense.over(seconds(dense)), time)
    return tuple(  # type: ignore[return-value]
        None if other is None or other <= 0 else curve.last.kid / other for other in (same_flops, same_time)
    )


def crossing(curve: Curve, dense: Curve, axis: str) -> float | None:
    """The budget at which the two curves cross, if they do between measured points.

    Args:
        curve: of a method.
        dense: to compare with.
        axis: ``images``, ``flops`` or ``time``.

    Returns:
        The smallest budget at which the order changes.
    """
    ours, theirs = (
        c.over({"images": images, "flops": gflops, "time": seconds(c)}[axis]) for c in (curve, dense)
    )
    if not ours or not theirs:
        return None
    low, high = max(ours[0][0], theirs[0][0]), min(ours[-1][0], theirs[-1][0])
    if low >= high:
        return None
    grid = [low * (high / low) ** (i / 200) for i in range(201)]
    differences = [(x, at(ours, x), at(theirs, x)) for x in grid]
    signs = [(x, a > b) for x, a, b in differences if a is not None and b is not None]
    for (_, before), (x, after) in zip(signs, signs[1:], strict=False):
        if before != after:
            return x
    return None


HEAD = (
    "cell",
    "seeds",
    "parameters",
    "GFLOP an image, training",
    "ms an image",
    "images",
    "KID",
    "spread over seeds",
    "rank",
    "FD",
    "loss",
    "KID / dense, equal FLOPs",
    "KID / dense, equal time",
)


def dense_of(curve: Curve, found: Sequence[Curve]) -> Curve | None:
    """The dense cell of the same setting."""
    return next((c for c in found if c.cell == DENSE + curve.setting), None)


def _ranks(found: Sequence[Curve]) -> dict[str, int]:
    """Places by KID among the cells of one group and setting that saw equally many images."""
    ranks: dict[str, int] = {}
    kinds = {(c.group, c.setting, c.last.nimg) for c in found}
    for kind in kinds:
        same = sorted(
            (c for c in found if (c.group, c.setting, c.last.nimg) == kind), key=lambda c: c.last.kid
        )
        ranks |= {c.cell: i + 1 for i, c in enumerate(same)}
    return ranks


def table(found: Sequence[Curve]) -> list[list[str]]:
    """The main table as text; ranks are within the group and setting."""
    rank = _ranks(found)
    rows = []
    for c in found:
        dense = dense_of(c, found)
        flops, time = (None, None) if dense is c else against_dense(c, dense)
        rows.append(
            [
                c.cell + (f" ({c.diverged} diverged)" if c.diverged else ""),
                str(c.seeds),
                whole(c.parameters),
                short(c.gflops_per_image),
                "" if c.s_per_image is None else f"{1000 * c.s_per_image:.2f}",
                f"{c.last.nimg:,}",
                short(c.last.kid),
                "" if math.isnan(c.spread) else short(c.spread),
                str(rank[c.cell]),
                short(c.last.fd),
                # Flow weighs errors otherwise: its loss compares with nothing here.
                "" if c.setting == "-flow" else short(c.last.loss),
                "" if flops is None else f"{flops:.2f}",
                "" if time is None else f"{time:.2f}",
            ]
        )
    return rows


CROSSING_HEAD = ("cell", "images", "training GFLOP", "training seconds")


def crossings(found: Sequence[Curve]) -> list[list[str]]:
    """The budgets at which curves cross that of dense between measured points; cells without any left out."""
    rows = []
    for c in found:
        dense = dense_of(c, found)
        if dense is None or dense is c:
            continue
        at_budget = [crossing(c, dense, axis) for axis in ("images", "flops", "time")]
        if any(value is not None for value in at_budget):
            rows.append([c.cell, *("" if value is None else whole(value) for value in at_budget)])
    return rows


def diverged(rows: Sequence[Row]) -> str:
    """A sentence that names the cells whose loss became infinite; empty if there is none."""
    names = [f"{row.cell}-s{row.seed} after {row.nimg:,} images" for row in rows if row.status == "diverged"]
    return f"Diverged: {', '.join(names)}." if names else ""


def markdown(rows: Sequence[Row], timings: Mapping[str, float]) -> str:
    """The main table for the docs."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(row) + " |" for row in table(curves(rows, timings))]
    return "\n".join([*lines, "", diverged(rows)]).rstrip() + "\n"


def _chart(found: Sequence[Curve], axis: str, x_label: str) -> str:
    lines = []
    for i, c in enumerate(found):
        pick = {"images": images, "flops": gflops, "time": seconds(c)}[axis]
        lines.append(Line(c.cell, c.over(pick), COLORS[i % len(COLORS)], dots=True))
    return line_chart(lines, (), x_label, "KID (EfficientNet-Lite0)")


def _by_ratio(found: Sequence[Curve]) -> str:
    """KID over the share dropped; deferred begins at dense, which is the same network."""
    lines = []
    core = [c for c in found if c.group == "core" and "tail" not in c.cell]
    dense = next((c for c in core if c.cell == DENSE), None)
    for i, method in enumerate(dict.fromkeys(c.method for c in core if c.ratio)):
        points = sorted((c.ratio, c.last.kid) for c in core if c.method == method)
        if dense is not None and method == "deferred":
            points = [(0.0, dense.last.kid), *points]
        lines.append(Line(method, points, COLORS[i % len(COLORS)], dots=True))
    return line_chart(lines, (), "share of tokens dropped", "KID at equal images")


def _one_ratio(found: Sequence[Curve]) -> list[Curve]:
    """Of each method one ratio: the main one, or the only one there is."""
    chosen = []
    for method in dict.fromkeys(c.method for c in found):
        mine = [c for c in found if c.method == method]
        main = [c for c in mine if c.ratio == MAIN_RATIOS.get(method, 0.75)]
        chosen += main or mine
    return chosen


def charts(found: Sequence[Curve]) -> dict[str, str]:
    """SVG charts by title; those with nothing to show are left out."""
    core = _one_ratio([c for c in found if c.group == "core"])
    plain = [c for c in core if "tail" not in c.cell]
    tails = [c for c in found if c.cell == DENSE or ("-0.75" in c.cell and c.group in ("core", "tuning"))]
    tails = [c for c in tails if c.method in ("dense", "deferred", "naive", "sprint")]
    long = [c for c in found if c.group == "long"]
    made = {"Quality against the share of tokens dropped": _by_ratio(found)}
    axes = (("images", "images"), ("flops", "training GFLOP"), ("time", "seconds of training"))
    for axis, label in axes:
        made[f"Quality against {label}"] = _chart(plain, axis, label)
    losses = [
        Line(c.cell, [(gflops(r), r.loss) for r in c.points], COLORS[i % len(COLORS)], dots=True)
        for i, c in enumerate(plain)
    ]
    label = "loss on all patches, pinned noise"
    made["Loss against training GFLOP"] = line_chart(losses, (), "training GFLOP", label)
    made["Dropped, then dense"] = _chart(tails, "flops", "training GFLOP")
    for axis, label in axes:
        made[f"1,024 tokens: quality against {label}"] = _chart(long, axis, label)
    return {title: svg for title, svg in made.items() if "<circle" in svg}


def best_guidance(rows: Sequence[Row]) -> dict[str, list[Point]]:
    """The best scale of guidance by the share of images trained unmasked at the end, in per cent.

    Args:
        rows: of the results file.

    Returns:
        Points for tails at a ratio of zero and along a cosine; the cell without a tail begins both.
    """
    found: dict[str, list[Point]] = {"tail": [], "cosine": []}
    for cell in dict.fromkeys(row.cell for row in rows if row.guidance != 1):
        named = re.fullmatch(r".*?(?:-(tail|cosine)([\d.]+))?", cell)
        assert named is not None
        mine = [row for row in rows if row.cell == cell and row.status == "ok"]
        last = max(row.nimg for row in mine)
        best = min((row for row in mine if row.nimg == last), key=lambda row: row.kid)
        for kind in ("tail", "cosine") if named[1] is None else (named[1],):
            found[kind].append((float(named[2] or 0), best.guidance))
    return {kind: sorted(points) for kind, points in found.items()}


def guidance_table(rows: Sequence[Row]) -> list[list[str]]:
    """KID by cell and guidance, for cells measured at more than one scale."""
    last = [r for r in rows if r.status == "ok"]
    scales = sorted({r.guidance for r in last})
    body = []
    for cell in dict.fromkeys(r.cell for r in last if r.guidance != 1):
        mine = {r.guidance: r for r in sorted(last, key=lambda r: r.nimg) if r.cell == cell}
        best = min(mine.values(), key=lambda r: r.kid)
        cells = [short(mine[s].kid) if s in mine else "" for s in scales]
        body.append([cell, *cells, f"{best.guidance:g}"])
    return [["cell", *(f"guidance {s:g}" for s in scales), "best"], *body] if body else []


def write_report(
    folder: Path, rows: Sequence[Row], timings: Mapping[str, float], floor: Mapping[str, float], about: str
) -> Path:
    """Write ``report.html`` and ``table.md`` into the study's folder.

    Args:
        folder: of the study; sample grids are taken from ``samples/``.
        rows: of the results file.
        timings: seconds an image, by cell.
        floor: distances between training and held-out pictures.
        about: what was run, a sentence.

    Returns:
        Path of the page.
    """
    found = curves(rows, timings)
    write_text(folder / "table.md", markdown(rows, timings))
    floors = ", ".join(f"{name.replace('_', ' at N ').upper()}: {short(v)}" for name, v in floor.items())
    parts = [
        f'<p class="lead">{escape(about)}</p>',
        f"<p>Floor, training against held-out pictures: {escape(floors)}. KID is unbiased; FD is biased by N "
        "and only comparable at equal N. Ratios to dense below 1 mean that the method is ahead at the same "
        "budget; where dense was not measured at so small a budget there is none.</p>",
        html_table(
            "At the end of each training", HEAD, [table_row(list(map(escape, r))) for r in table(found)]
        ),
    ]
    if diverged(rows):
        parts.append(f"<p>{escape(diverged(rows))}</p>")
    crossed = [table_row(list(map(escape, row))) for row in crossings(found)]
    if crossed:
        caption = "Budgets at which the curve of a cell crosses that of dense"
        parts.append(html_table(caption, CROSSING_HEAD, crossed))
    for title, svg in charts(found).items():
        parts.append(f'<h2>{escape(title)}</h2><div class="card">{svg}</div>')
    guided = guidance_table(rows)
    if guided:
        lines = [
            Line(label, points, color, dots=True)
            for (label, points), color in zip(best_guidance(rows).items(), COLORS, strict=False)
            if len(points) > 1
        ]
        if lines:
            chart = line_chart(
                lines, (), "per cent of the images trained unmasked at the end", "best guidance"
            )
            parts.append(f'<h2>Guidance and unmask tuning</h2><div class="card">{chart}</div>')
        body = [table_row(list(map(escape, row))) for row in guided[1:]]
        parts.append(html_table("KID by guidance scale", guided[0], body))
    pictures = sorted((folder / "samples").glob("*.png"))
    if pictures:
        parts.append("<h2>Samples from the same noise</h2>")
    for path in pictures:
        with Image.open(path) as picture:
            source, width, _ = embedded(picture)
        parts.append(
            f'<figure class="frame" style="--w:{width}px"><img class="pixels" alt="" src="{source}">'
            f"<figcaption>{escape(path.stem)}</figcaption></figure>"
        )
    page = folder / "report.html"
    body_text = "\n".join(parts)
    write_text(page, PAGE.substitute(title="Token reduction at equal compute", body=body_text, credit=""))
    return page
