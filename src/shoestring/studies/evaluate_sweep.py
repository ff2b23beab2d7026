"""Guidance, steps, sampler and average of one model from the same noise: table, heat maps, best settings."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from rich.console import Console

from shoestring.config import apply_overrides
from shoestring.evaluation.digests import digest_of
from shoestring.evaluation.measures import HIGHER_IS_BETTER
from shoestring.evaluation.protocol import Protocol
from shoestring.runtime import UserError, say, write_text
from shoestring.studies.evaluate import Evaluation
from shoestring.studies.evaluate_figures import evaluate
from shoestring.studies.page import html_table, table_row
from shoestring.studies.report_template import PAGE

AXES = {
    "guidance": "sampling.guidance",
    "steps": "sampling.steps",
    "sampler": "sampling.sampler",
    "weights": "weights",
}
"""What a sweep goes over, and the setting of the protocol that it changes."""
CARD = "card.json"
"""In the run folder: the best settings of each sweep."""
COLOUR = "37, 99, 168"


@dataclass(frozen=True)
class Point:
    """One combination."""

    settings: dict[str, str]
    figures: dict[str, float]


def sweep(
    checkpoint: Path,
    protocol: Protocol,
    axes: Mapping[str, Sequence[str]],
    out: Path | None,
    device: torch.device,
    console: Console,
) -> tuple[Path, list[Point]]:
    """Evaluate every combination; interrupted, the same call goes on.

    Args:
        checkpoint: run folder, checkpoint folder or model file.
        protocol: what is drawn and measured.
        axes: values by name of the axis; the others stay as in the protocol.
        out: folder for everything.
        device: where to run.
        console: where a person reads.

    Returns:
        Folder with ``sweep.csv`` and ``sweep.html``, and the points.

    Raises:
        UserError: if there is nothing to vary, or a value does not fit.
    """
    axes = {name: values for name, values in axes.items() if values}
    if not axes:
        raise UserError(f"a sweep needs values of at least one of {', '.join('--' + name for name in AXES)}")
    if "weights" in axes and checkpoint.is_file():
        raise UserError(
            f"--weights needs a run or checkpoint folder to choose from; {checkpoint} is one file"
        )
    first = Evaluation(checkpoint, protocol, out, device, console)
    base = protocol.model_copy(update={"sampling": first.sampling})
    points = []
    combinations = list(itertools.product(*axes.values()))
    chosen = [dict(zip(axes, values, strict=True)) for values in combinations]
    changed = [
        apply_overrides(base, [f"{AXES[name]}={value}" for name, value in settings.items()])
        for settings in chosen
    ]
    for i, (settings, each) in enumerate(zip(chosen, changed, strict=True)):
        words = ", ".join(f"{name} {value}" for name, value in settings.items())
        say(console, f"[{i + 1}/{len(chosen)}] {words}")
        result = evaluate(Evaluation(checkpoint, each, out, device, console), console)
        points.append(Point(settings, {name: figure.value for name, figure in result.figures.items()}))
    words = json.dumps([axes, base.model_dump(mode="json"), first.model["digest"]], sort_keys=True)
    folder = first.folder.parent / f"sweep-{protocol.name}-{digest_of([words])[:8]}"
    write_text(folder / "sweep.csv", _csv(points))
    write_text(folder / "sweep.html", _page(first, points))
    _write_card(first, points)
    return folder, points


def best(points: Sequence[Point], figure: str) -> Point:
    """The best point by a figure; of equals the first.

    Args:
        points: all with that figure.
        figure: its name.

    Returns:
        One of them.
    """
    sign = -1 if figure.startswith(HIGHER_IS_BETTER) else 1
    return min(points, key=lambda point: sign * point.figures[figure])


def _judged(points: Sequence[Point]) -> list[str]:
    """Figures by which a best point can be chosen: those that vary, floors and chances left out."""
    names = points[0].figures
    return [name for name in names if len({point.figures[name] for point in points}) > 1]


def _csv(points: Sequence[Point]) -> str:
    rows = [point.settings | point.figures for point in points]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write_card(evaluation: Evaluation, points: Sequence[Point]) -> None:
    """The best settings by each figure, beside what was written there before."""
    path = evaluation.run / CARD
    card = json.loads(path.read_text()) if path.exists() else {}
    by_axes = card.setdefault(evaluation.protocol.name, {})
    by_axes[", ".join(points[0].settings)] = {
        "model": evaluation.model,
        "pictures": len(evaluation.asked.wanted),
        "best": {
            name: {**(found := best(points, name)).settings, "value": found.figures[name]}
            for name in _judged(points)
        },
    }
    write_text(path, json.dumps(card, indent=1) + "\n")


def _page(evaluation: Evaluation, points: Sequence[Point]) -> str:
    names = _judged(points)
    axes = list(points[0].settings)
    parts = [
        f'<p class="lead">{escape(evaluation.config.name)}, protocol {escape(evaluation.protocol.name)}, '
        f"{len(evaluation.asked.wanted):,} pictures a point, all from the same noise.</p>"
    ]
    rows = []
    for name in names:
        found = best(points, name)
        words = ", ".join(f"{axis} {value}" for axis, value in found.settings.items())
        rows.append(table_row([escape(name), f"{found.figures[name]:.4g}", escape(words)]))
    parts.append(html_table("Best settings", ["figure", "value", "settings"], rows))
    for name in names:
        parts.append(_heat_map(points, name, axes))
    body = "\n".join(parts)
    return PAGE.substitute(title="Sweep", body=body, credit="Made by shoestring eval sweep.")


def _heat_map(points: Sequence[Point], name: str, axes: Sequence[str]) -> str:
    """The first axis down, all others across; the better, the darker."""
    down, across = axes[0], axes[1:]
    rows_of = list(dict.fromkeys(point.settings[down] for point in points))
    columns = list(dict.fromkeys(tuple(point.settings[axis] for axis in across) for point in points))
    values = {
        (point.settings[down], tuple(point.settings[axis] for axis in across)): point.figures[name]
        for point in points
    }
    low, high = min(values.values()), max(values.values())
    higher = name.startswith(HIGHER_IS_BETTER)
    rows = []
    for row in rows_of:
        cells = [f"<th>{escape(down)} {escape(row)}</th>"]
        for column in columns:
            value = values[row, column]
            share = (value - low) / (high - low)
            share = share if higher else 1 - share
            style = f"background: rgba({COLOUR}, {0.05 + 0.55 * share:.2f})"
            cells.append(f'<td style="{style}">{value:.4g}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = [", ".join(f"{a} {v}" for a, v in zip(across, column, strict=True)) for column in columns]
    better = "higher is better" if higher else "lower is better"
    return html_table(f"{escape(name)} ({better})", ["", *map(escape, heads)], rows)
