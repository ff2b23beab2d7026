"""The page of a sampling-cost study: the paper's figures, drawn from the rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle
from pathlib import Path

from PIL import Image

from shoestring.runtime import write_text
from shoestring.studies.charts import COLORS, Line, line_chart
from shoestring.studies.page import embedded, html_table, short, table_row, whole
from shoestring.studies.report_template import PAGE
from shoestring.studies.sampling_analysis import (
    Scale,
    at_the_end,
    best_at_costs,
    best_guidance,
    best_within,
    better,
    budgets,
    first_seeds,
    front,
    guidance_shown,
    spread_of_seeds,
    training_curves,
)
from shoestring.studies.sampling_rows import METRICS, Row

NAMES = {name: name.upper() if name in ("kid", "fd", "psnr") else name.replace("_", " ") for name in METRICS}
HEAT = "37, 99, 168"
SHOWN_BUDGETS = 3


def write_report(folder: Path, rows: Sequence[Row], metric: str, count_guidance: bool, about: str) -> Path:
    """Write ``report.html`` and ``table.md`` into the study's folder.

    Args:
        folder: of the study; grids are taken from ``grids/``.
        rows: of the results file, at least one.
        metric: by which guidance is chosen and networks are compared.
        count_guidance: whether guidance's second pass counts as cost.
        about: what was run, a sentence.

    Returns:
        Path of the page.
    """
    scale = Scale.of(rows, count_guidance)
    first = first_seeds(rows)
    final = at_the_end(first)
    largest = max(rows, key=lambda row: row.gflops)
    counted = "counted" if count_guidance else "not counted: a picture with guidance takes twice as many"
    parts = [
        f'<p class="lead">{escape(about)}</p>',
        f"<p>Sampling cost = normalised cost of a network evaluation x evaluations; one evaluation of "
        f"{escape(largest.model)} ({largest.gflops:.3g} GFLOP) costs 1. Guidance's second pass is {counted}. "
        f"The best guidance is chosen by {NAMES[metric]} on the same pictures it is judged by. Charts show "
        "the first training of every network.</p>",
        sizes_table(rows, scale, metric),
    ]
    for family in dict.fromkeys(row.family for row in final):
        mine = [row for row in final if row.family == family]
        parts.append(f"<h2>{escape(family)}</h2>")
        colors = dict(zip(_by_model(mine), cycle(COLORS), strict=False))
        parts += _training_curves([row for row in first if row.family == family], metric, colors)
        parts += _cost_curves(mine, scale, metric, colors)
        parts += _guidance_maps(mine, metric)
        parts.append(winners_table(mine, scale, metric))
    parts += _samplers(final, scale, metric)
    parts += _families(final, scale, metric)
    parts += _pictures(folder, final, scale, metric)
    write_text(folder / "table.md", markdown(final, scale, metric))
    page = folder / "report.html"
    body = "\n".join(part for part in parts if part)
    write_text(page, PAGE.substitute(title="Quality per sampling cost", body=body, credit=""))
    return page


def _settings(row: Row) -> str:
    return f"{row.sampler}, {row.steps} steps, guidance {row.guidance:g}"


def sizes_table(rows: Sequence[Row], scale: Scale, metric: str) -> str:
    """A row a network: its size, its costs, and the best that it was seen to do."""
    final = at_the_end(rows)
    spread, body = spread_of_seeds(final, metric), []
    for name in dict.fromkeys(row.model for row in sorted(final, key=lambda r: (r.family, r.gflops))):
        mine = [row for row in final if row.model == name]
        best = min(first_seeds(mine), key=better(metric))
        error = f" +- {best.kid_error:.2g}" if metric == "kid" else ""
        cells = [
            name,
            whole(best.parameters),
            f"{best.gflops:.3g}",
            f"{scale.evaluation(best):.3g}",
            f"{best.training_gflops:,.0f}",
            f"{getattr(best, metric):.4g}{error}",
            _settings(best),
            f"{spread[name]:.2g}" if name in spread else "one seed",
        ]
        body.append(table_row(list(map(escape, cells))))
    head = ["network", "parameters", "GFLOP an evaluation", "cost of one", "GFLOP of training"]
    head += [f"best {NAMES[metric]}", "at", "largest difference between seeds"]
    return html_table("Networks", head, body)


def _training_curves(rows: Sequence[Row], metric: str, colors: Mapping[str, str]) -> list[str]:
    """Quality against training compute, from checkpoints that were all sampled alike."""
    curves = training_curves(rows, metric)
    if all(len(points) < 2 for points in curves.points.values()):
        return []
    lines = [
        Line(name, [(flop / 1e9, quality) for flop, quality in points], colors[name], dots=True)
        for name, points in curves.points.items()
    ]
    chart = line_chart(lines, (), "GFLOP of training", NAMES[metric], log_x=True)
    return [
        '<div class="charts"><div class="card"><h3>Quality against training compute</h3>'
        f'<p class="note">{curves.setting}</p>{chart}</div></div>'
    ]


def _by_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.gflops, row.nimg, row.steps)):
        found.setdefault(row.model, []).append(row)
    return found


def _cost_curves(rows: Sequence[Row], scale: Scale, metric: str, colors: Mapping[str, str]) -> list[str]:
    """Quality against sampling cost, a chart a sampler, a line a network."""
    charts = []
    for sampler in dict.fromkeys(row.sampler for row in rows):
        best = best_at_costs([row for row in rows if row.sampler == sampler], scale, metric)
        if len(best) < 2:
            continue
        lines = [
            Line(
                name,
                sorted((scale.sampling(r), float(getattr(r, metric))) for r in mine),
                colors[name],
                dots=True,
            )
            for name, mine in _by_model(best).items()
        ]
        chart = line_chart(lines, (), scale.axis, NAMES[metric], log_x=True)
        charts.append(
            f'<div class="card"><h3>Quality against sampling cost: {escape(sampler)}</h3>{chart}</div>'
        )
    return [f'<div class="charts">{"".join(charts)}</div>'] if charts else []


def _guidance_maps(rows: Sequence[Row], metric: str) -> list[str]:
    """Best guidance by network and steps, a table a sampler; the stronger, the darker."""
    tables = []
    for sampler in dict.fromkeys(row.sampler for row in rows):
        best = best_guidance([row for row in rows if row.sampler == sampler], metric)
        steps = sorted({row.steps for row in best})
        found = {(row.model, row.steps): row for row in best}
        high = max(row.guidance for row in best) or 1.0
        body = []
        for name in _by_model(best):
            cells = [f"<th>{escape(name)}</th>"]
            for count in steps:
                row = found.get((name, count))
                if row is None:
                    cells.append("<td></td>")
                    continue
                shade = f"background: rgba({HEAT}, {0.05 + 0.5 * row.guidance / high:.2f})"
                cells.append(f'<td style="{shade}">{guidance_shown(row, rows)}</td>')
            body.append(f"<tr>{''.join(cells)}</tr>")
        head = ["network", *(f"{count} steps" for count in steps)]
        title = f"Best guidance, {escape(sampler)} (+: the largest that was tried)"
        tables.append(html_table(title, head, body))
    return tables


def winners(rows: Sequence[Row], scale: Scale, metric: str) -> list[tuple[float, Row, Row | None]]:
    """At each cost the best row of any network, and that of the largest network that can be afforded."""
    found = []
    for cost in budgets(rows, scale):
        winner = best_within(rows, scale, metric, cost)
        if winner is None:  # a cost that was rounded down
            continue
        affordable = [row for row in rows if scale.sampling(row) <= cost * (1 + 1e-9)]
        largest = max(row.gflops for row in affordable)
        rival = best_within([row for row in affordable if row.gflops == largest], scale, metric, cost)
        found.append((cost, winner, rival))
    return found


def winners_table(rows: Sequence[Row], scale: Scale, metric: str) -> str:
    """Who is best at which sampling cost, over all samplers."""
    body = []
    for cost, winner, rival in winners(rows, scale, metric):
        cells = [f"{cost:g}", winner.model, f"{getattr(winner, metric):.4g}", _settings(winner)]
        if rival is not None:
            cells += [rival.model, f"{getattr(rival, metric):.4g}", _settings(rival)]
        body.append(table_row(list(map(escape, cells))))
    name = NAMES[metric]
    head = ["sampling cost", "best", name, "at", "largest that can be afforded", name, "at"]
    return html_table("The best network at a sampling cost", head, body) if body else ""


def _samplers(rows: Sequence[Row], scale: Scale, metric: str) -> list[str]:
    """The front of each sampler over all networks of a family."""
    charts = []
    for family in dict.fromkeys(row.family for row in rows):
        mine = [row for row in rows if row.family == family]
        names = list(dict.fromkeys(row.sampler for row in mine))
        lines = [
            Line(
                name,
                [
                    (scale.sampling(r), float(getattr(r, metric)))
                    for r in front([row for row in mine if row.sampler == name], scale, metric)
                ],
                color,
                dots=True,
            )
            for name, color in zip(names, COLORS, strict=False)
        ]
        if len(lines) > 1:
            chart = line_chart(lines, (), scale.axis, NAMES[metric], log_x=True)
            charts.append(f'<div class="card"><h3>{escape(family)}</h3>{chart}</div>')
    if not charts:
        return []
    return [f'<h2>Samplers: the front over all sizes</h2><div class="charts">{"".join(charts)}</div>']


def _families(rows: Sequence[Row], scale: Scale, metric: str) -> list[str]:
    """The fronts of the families beside one another."""
    families = list(dict.fromkeys(row.family for row in rows))
    if len(families) < 2:
        return []
    lines = [
        Line(
            family,
            [
                (scale.sampling(r), float(getattr(r, metric)))
                for r in front([row for row in rows if row.family == family], scale, metric)
            ],
            color,
            dots=True,
        )
        for family, color in zip(families, COLORS, strict=False)
    ]
    chart = line_chart(lines, (), scale.axis, NAMES[metric], log_x=True)
    return [f'<h2>Families: the front over all sizes and samplers</h2><div class="card">{chart}</div>']


def _pictures(folder: Path, rows: Sequence[Row], scale: Scale, metric: str) -> list[str]:
    """Grids of every network at some equal costs, each at its best setting."""
    parts = []
    for family in dict.fromkeys(row.family for row in rows):
        mine = [row for row in rows if row.family == family]
        costs = budgets(mine, scale)
        chosen = sorted(
            {costs[round(i * (len(costs) - 1) / SHOWN_BUDGETS)] for i in range(1, SHOWN_BUDGETS)}
            if costs
            else ()
        )
        for cost in chosen:
            title = f"{family}: pictures at a sampling cost of at most {cost:g}, the same noise"
            parts.append(f"<h2>{escape(title)}</h2>")
            for of_one in _by_model(mine).values():
                row = best_within(of_one, scale, metric, cost)
                if row is not None:
                    parts.append(_figure(folder, row, scale, metric))
    return parts


def _figure(folder: Path, row: Row, scale: Scale, metric: str) -> str:
    file = f"{row.model}-s{row.seed}-{row.nimg}-{row.sampler}-{row.steps}-{row.guidance:g}.png"
    path = folder / "grids" / file
    if not path.is_file():
        return ""
    with Image.open(path) as picture:
        source, width, _ = embedded(picture)
    quality = f"{NAMES[metric]} {short(float(getattr(row, metric)))}"
    caption = f"{row.model}: {_settings(row)}, cost {scale.sampling(row):.3g}, {quality}"
    return (
        f'<figure class="frame" style="--w:{2 * width}px"><img class="pixels" alt="" src="{source}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def markdown(rows: Sequence[Row], scale: Scale, metric: str) -> str:
    """The best guidance of every network, sampler and number of steps as a Markdown table."""
    head = ["network", "sampler", "steps", "cost", "guidance", NAMES[metric], "standard error", "FD"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in best_guidance(rows, metric):
        error = f"{row.kid_error:.4f}" if metric == "kid" and math.isfinite(row.kid_error) else ""
        cells = [
            row.model,
            row.sampler,
            str(row.steps),
            f"{scale.sampling(row):.3g}",
            guidance_shown(row, rows),
        ]
        cells += [f"{getattr(row, metric):.4f}", error, f"{row.fd:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    better_is = "higher" if METRICS[metric] else "lower"
    counted = "counted" if scale.count_guidance else "not counted"
    return "\n".join(lines) + (
        f"\n\n{NAMES[metric]}: {better_is} is better. Guidance's second pass is {counted}. "
        "A scale with + is the largest that was tried. Measured here.\n"
    )
