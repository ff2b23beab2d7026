"""The page of ``shoestring compare``: everything inside, nothing loaded from outside, no script."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from shoestring.runtime import UserError, write_text
from shoestring.studies.charts import Band, line_chart
from shoestring.studies.compare import (
    MISSING,
    Axis,
    Compared,
    at_equal_budget,
    axes_of,
    decide_loss,
    differences,
    total_loss,
)
from shoestring.studies.compare_samples import Drawn, by_prompts
from shoestring.studies.page import (
    dollars,
    embedded,
    finite,
    html_table,
    percent,
    short,
    table_row,
    whole,
)
from shoestring.studies.report_template import COMPARE_STYLE, PAGE
from shoestring.studies.runs import Row
from shoestring.studies.token_curves import Point
from shoestring.studies.token_recipes import parameters
from shoestring.training.display import duration

MAX_EVENTS = 20
"""Events shown of each run, the last ones."""
SHOWN_PX = 128


def check_page(path: Path) -> None:
    """Say that a page cannot be written before anything is drawn.

    Args:
        path: of the page.

    Raises:
        UserError: if it is a folder, or in a folder that does not exist.
    """
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; give the name of a page, such as {path / 'compare.html'}")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: the folder {path.parent} does not exist; make it or choose another")


def write_page(path: Path, runs: Sequence[Compared], drawn: Sequence[Drawn]) -> None:
    """Write the page.

    Args:
        path: file to write.
        runs: to compare.
        drawn: their pictures; may be empty.

    Raises:
        UserError: if it cannot be written.
    """
    axes, found = axes_of(runs), differences([run.config for run in runs])
    apart = decide_loss(found)
    parts = [
        _intro(runs, apart),
        _totals(runs, axes),
        _budgets(runs, axes, comparable=not apart),
        _losses(runs, axes),
        _samples(drawn),
        _curves(runs, axes),
        _settings(runs, found),
        _events(runs),
    ]
    labels = [run.label for run in runs]
    title = " and ".join(filter(None, [", ".join(labels[:-1]), labels[-1]]))
    body = COMPARE_STYLE + "\n".join(part for part in parts if part)
    write_text(path, PAGE.substitute(title=escape(title), body=body, credit="Made by shoestring compare."))


def _name(run: Compared) -> str:
    """The run's label in its colour."""
    return f'<span class="run" style="--c:{run.color}">{escape(run.label)}</span>'


def _intro(runs: Sequence[Compared], incomparable: Sequence[str]) -> str:
    lines = [
        f"<li>{_name(run)} {escape(run.state)}, {run.train[-1]['nimg']:,} of {run.config.nimg:,} images, "
        f"<code>{escape(str(run.folder))}</code></li>"
        for run in runs
    ]
    warning = (
        "<p class='warn'>These runs differ in what their losses measure, so losses do not compare: "
        f"{escape(', '.join(incomparable))}.</p>"
        if incomparable
        else ""
    )
    return f'<ul class="runs">{"".join(lines)}</ul>{warning}'


def _totals(runs: Sequence[Compared], axes: Sequence[Axis]) -> str:
    flops = next((axis for axis in axes if axis.key == "flops"), None)
    quantities: list[tuple[str, Callable[[Compared], str]]] = [
        ("parameters", lambda run: whole(parameters(run.config.model, run.config.tokens))),
        ("images seen", lambda run: f"{run.train[-1]['nimg']:,}"),
        ("steps", lambda run: whole(run.train[-1].get("step"))),
        ("steps skipped", lambda run: whole(sum(row.get("skipped") or 0 for row in run.train))),
        ("time", lambda run: duration(run.train[-1].get("elapsed_s"))),
        ("cost", lambda run: dollars(run.spent["usd"][-1]) if "usd" in run.spent else "no price set"),
        ("images a second, median", lambda run: short(_median(run.train, "images_per_s"))),
        ("share of the machine's peak, median", lambda run: percent(_median(run.train, "peak_share"))),
        ("training loss, smoothed", lambda run: _loss(run.loss("images")[-1:])),
        ("validation loss", lambda run: _loss(total_loss(run, "images")[-1:])),
        ("lowest validation loss", lambda run: _lowest(total_loss(run, "images"))),
    ]
    if flops is not None:
        quantities.insert(4, (flops.label, partial(_spent, axis=flops)))
    rows = [table_row([name, *(figure(run) for run in runs)]) for name, figure in quantities]
    note = (
        "The training loss is that of the visible patches while patches are masked; the validation loss "
        "always looks at all."
    )
    table = html_table("As far as each run came, by its log", ["", *map(_name, runs)], rows, mark="")
    return f'<h2>Final numbers</h2>\n{table}<p class="note">{note}</p>'


def _spent(run: Compared, axis: Axis) -> str:
    return _amount(run.spent[axis.key][-1] / axis.per) if axis.key in run.spent else "not known"


def _lowest(points: Sequence[Point]) -> str:
    nimg, loss = min(points, key=lambda p: p[1], default=(None, None))
    return "" if loss is None else f"{loss:.4f} at {nimg:,.0f} images"


def _median(rows: Sequence[Row], key: str) -> float | None:
    values = [row[key] for row in rows if finite(row.get(key))]
    return median(values) if values else None


def _loss(points: Sequence[Point]) -> str:
    return "".join(f"{loss:.4f}" for _, loss in points)


def _budgets(runs: Sequence[Compared], axes: Sequence[Axis], comparable: bool) -> str:
    rows = []
    for axis in axes:
        found = at_equal_budget(runs, axis)
        if found is not None and len(runs) > 1:
            budget, losses = found
            known = [loss for loss in losses if loss is not None]
            cells = [f"{_amount(budget / axis.per)} {axis.label}"]
            for loss in losses:
                text = "" if loss is None else f"{loss:.4f}"
                best = comparable and loss is not None and loss == min(known)
                cells.append(f"<b>{text}</b>" if best else text)
            rows.append(table_row(cells))
    if not rows:
        return ""
    head = ["the largest budget that all reached", *map(_name, runs)]
    note = "Between two validations the loss is interpolated, linear in the logarithms" + (
        "; the lowest is bold." if comparable else "."
    )
    return html_table("Validation loss at equal budgets", head, rows, mark="") + f'<p class="note">{note}</p>'


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class _Chart:
    """A chart with a line a run, over any axis."""

    title: str
    y_label: str
    points: Callable[[Compared, str], list[Point]]
    dots: bool = False
    from_zero: bool = False

    def card(self, runs: Sequence[Compared], axis: Axis, title: str = "") -> str:
        """The chart as markup; empty if there is nothing to draw. All charts of an axis have one scale."""
        lines = [axis.line(run, self.points(run, axis.key), self.dots) for run in runs]
        most = max(run.spent[axis.key][-1] for run in runs if axis.key in run.spent)
        whole_axis = Band(0.0, most / axis.per, "", shaded=False)
        chart = line_chart(lines, [whole_axis], axis.label, self.y_label, self.from_zero)
        return f'<div class="card"><h3>{escape(title or self.title)}</h3>{chart}</div>' if chart else ""


def _losses(runs: Sequence[Compared], axes: Sequence[Axis]) -> str:
    """The loss over every axis at once: what was bought with images, FLOPs, hours and dollars."""
    chart = _Chart("Training loss", "training loss, smoothed", Compared.loss)
    if any(run.validation for run in runs):
        chart = _Chart("Validation loss", "validation loss", total_loss, dots=True)
    cards = [chart.card(runs, axis, f"Over {axis.name}") for axis in axes]
    if any(run.evaluation for run in runs):
        quality = _Chart("KID", "KID of samples while training", _quality, dots=True)
        cards += [quality.card(runs, axis, f"KID over {axis.name}") for axis in axes]
    priceless = [run.label for run in runs if "usd" not in run.spent]
    note = (
        f'<p class="note">No price was set (logging.usd_per_hour) in: {escape(", ".join(priceless))}.</p>'
        if priceless
        else ""
    )
    return f'<h2>Loss against what it took</h2>\n<div class="charts">{"".join(cards)}</div>{note}'


def _quality(run: Compared, axis: str) -> list[Point]:
    return run.points(axis, run.evaluation, lambda row: row.get("kid_efflite0"))


def _logged(kind: str, key: str, level: str | None = None) -> Callable[[Compared, str], list[Point]]:
    """A curve of a value of the rows, or of one within a mapping of the rows."""

    def value(row: Row) -> Any:
        return row.get(key) if level is None else (row.get(key) or {}).get(level)

    return lambda run, axis: run.points(axis, run.train if kind == "train" else run.validation, value)


def _levels(runs: Sequence[Compared], kind: str, key: str, title: str) -> list[_Chart]:
    """A chart a noise level."""
    every = [row for run in runs for row in (run.train if kind == "train" else run.validation)]
    levels = sorted({level for row in every for level in row.get(key) or {}}, key=float)
    return [
        _Chart(f"{title} at σ {float(v):.3g}", "loss", _logged(kind, key, v), dots=kind == "validation")
        for v in levels
    ]


def _curves(runs: Sequence[Compared], axes: Sequence[Axis]) -> str:
    """Every curve over the axis that the reader chooses."""
    charts = [
        _Chart("Training loss", "loss, smoothed", Compared.loss),
        *_levels(runs, "validation", "loss_per_level", "Validation loss"),
        *_levels(runs, "train", "loss_per_bin", "Training loss"),
    ]
    for title, label, key, from_zero in (
        ("Throughput", "images a second", "images_per_s", True),
        ("Share of the machine's peak", "share of matmul peak", "peak_share", True),
        ("Learning rate", "learning rate", "lr", True),
        ("Gradient norm", "norm before clipping", "grad_norm", False),
    ):
        charts.append(_Chart(title, label, _logged("train", key), from_zero=from_zero))
    cards = [
        f'<div class="by by-{axis.key}">{card}</div>'
        for chart in charts
        for axis in axes
        if (card := chart.card(runs, axis))
    ]
    inputs = "".join(
        f'<input type="radio" name="axis" id="axis-{axis.key}"{" checked" if i == 0 else ""}>'
        f'<label for="axis-{axis.key}">{axis.name}</label>'
        for i, axis in enumerate(axes)
    )
    return (
        f'<h2>Every curve</h2>\n<div class="axes"><span>over</span>{inputs}'
        f'<div class="charts">{"".join(cards)}</div></div>'
    )


def _samples(drawn: Sequence[Drawn]) -> str:
    if not drawn:
        return ""
    groups = by_prompts(drawn)
    failed = [
        f'<p class="warn">No pictures of {_name(each.run)}: {escape(each.note)}</p>'
        for each in drawn
        if not each.pictures
    ]
    same = len({each.noise for group in groups for each in group}) == 1
    note = (
        "All began from the same noise, column by column."
        if same
        else "Runs with latents of one shape began from the same noise, column by column; the shapes differ."
    )
    tables = "".join(map(_gallery, groups))
    words = (
        f"<p>From the averaged weights of each run's newest checkpoint, not picked, each with the sampling "
        f"settings of its run. {note}</p>"
        if groups
        else ""
    )
    return f"<h2>Samples side by side</h2>\n{words}{''.join(failed)}{tables}"


def _gallery(group: Sequence[Drawn]) -> str:
    """A row a run, a column a prompt."""
    head = "".join(
        f'<th scope="col">{escape(prompt) or "<i>no words</i>"}</th>' for prompt in group[0].prompts
    )
    rows = []
    for each in group:
        cells = "".join(f"<td>{_picture(picture, each.run.label)}</td>" for picture in each.pictures)
        rows.append(
            f'<tr><th scope="row">{_name(each.run)}<br><span>{escape(each.note)}</span></th>{cells}</tr>'
        )
    return (
        f'<div class="scroll"><table class="gallery"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _picture(picture: Any, label: str) -> str:
    source, width, _ = embedded(picture)
    crisp = ' class="pixels"' if width < SHOWN_PX else ""
    return f'<img{crisp} src="{source}" alt="drawn by {escape(label)}">'


def _settings(runs: Sequence[Compared], found: Sequence[tuple[str, list[Any]]]) -> str:
    if len(runs) == 1:
        return ""
    if not found:
        return "<h2>Settings that differ</h2>\n<p>None: all runs have the same settings.</p>"
    rows = [
        table_row([f"<code>{escape(key)}</code>", *(escape(_setting(value)) for value in values)])
        for key, values in found
    ]
    table = html_table("All others are the same", ["setting", *map(_name, runs)], rows, mark="")
    return f'<h2>Settings that differ</h2>\n<div class="settings">{table}</div>'


def _setting(value: Any) -> str:
    if value is MISSING:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _events(runs: Sequence[Compared]) -> str:
    rows, more = [], []
    for run in runs:
        for row in run.events[-MAX_EVENTS:]:
            cells = (str(row.get("what", "")), str(row.get("text", "")))
            rows.append(table_row([_name(run), f"{row['nimg']:,}", *map(escape, cells)]))
        if len(run.events) > MAX_EVENTS:
            more.append(f"{run.label}: the last {MAX_EVENTS} of {len(run.events)}")
    if not rows:
        return ""
    note = f'<p class="note">{escape("; ".join(more))}</p>' if more else ""
    table = html_table("From log.jsonl", ("run", "images", "event", ""), rows, mark="")
    return f'<h2>Events</h2>\n<div class="events">{table}</div>{note}'
