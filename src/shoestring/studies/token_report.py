"""What the token-reduction study found: tables and curves, at equal images, FLOPs and wall time."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from shoestring.runtime import write_text
from shoestring.studies.charts import COLORS, Line, line_chart
from shoestring.studies.page import embedded, html_table, short, table_row, whole
from shoestring.studies.report_template import PAGE
from shoestring.studies.token_curves import (
    DENSE,
    Curve,
    Point,
    against_dense,
    crossing,
    curves,
    dense_of,
    gflops,
    images,
    seconds,
)
from shoestring.studies.token_rows import Row

MAIN_RATIOS = {"dense": 0.0, "large-patch": 0.0, "tread": 0.5}
"""Ratios drawn over a budget, where there are several; 0.75 for the others."""


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
    floors = ", ".join(
        f"{name.replace('_', ' at N ').replace('kid', 'KID').replace('fd', 'FD')}: {short(v)}"
        for name, v in floor.items()
    )
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
