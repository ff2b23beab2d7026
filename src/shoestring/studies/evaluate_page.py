"""The page of an evaluation: figures with their intervals, what they depend on, and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

from shoestring.evaluation.drawing import Wish, pictures_of
from shoestring.evaluation.measures import MEASURES, Figure
from shoestring.evaluation.result import Result
from shoestring.runtime import write_text
from shoestring.sampling.generate import picture_grid
from shoestring.studies.charts import Line, line_chart
from shoestring.studies.evaluate import Evaluation
from shoestring.studies.page import embedded, html_table, table_row
from shoestring.studies.report_template import PAGE

SHOWN, COLUMNS, EXTREME = 40, 8, 16
_PICTURE = Template('<p><img src="$uri" width="$width" height="$height" alt="$alt" class="grid"></p>')


def write_page(evaluation: Evaluation, result: Result) -> Path:
    """Write ``report.html``.

    Args:
        evaluation: what was done.
        result: of it.

    Returns:
        The page.

    Raises:
        UserError: if it cannot be written.
    """
    name, model = result.protocol.name, result.model
    parts = [
        f'<p class="lead">{escape(str(model["name"]))} after {model["images_seen"]:,} images, evaluated by '
        f"the protocol {escape(name)} on {result.facts['pictures']:,} pictures.</p>",
        *(f'<p class="note">{escape(warning)}</p>' for warning in result.warnings),
        _figures(result),
        _plots(result),
        _pictures(evaluation),
        _extremes(evaluation, result),
        _neighbours(evaluation, result),
        _facts(result),
    ]
    page = evaluation.folder / "report.html"
    text = PAGE.substitute(
        title=escape(f"{model['name']}: {name}"), body="\n".join(parts), credit="Made by shoestring eval."
    )
    write_text(page, text)
    return page


def _figures(result: Result) -> str:
    rows = [table_row([escape(name), *_cells(figure)]) for name, figure in result.figures.items()]
    return html_table("Figures", ["figure", "value", "95 % interval", "spread"], rows)


def _cells(figure: Figure) -> list[str]:
    interval = "" if figure.low95 is None else f"{figure.low95:.4g} to {figure.high95:.4g}"
    return [f"{figure.value:.4g}", interval, "" if figure.spread is None else f"{figure.spread:.2g}"]


def _plots(result: Result) -> str:
    charts = []
    for name, points in result.curves.items():
        if name == "loss":
            shown = [(math.log10(level), loss) for level, loss in points]
            line = Line("", shown, "var(--a)", dots=True)
            words = "On held-out pictures, all patches, noise that is always the same."
            charts.append(("Loss by noise level", line_chart([line], [], "log10 of sigma", "loss"), words))
        else:
            extractor = "inception" if name == "precision_recall" else "efficientnet-lite0"
            line = Line("", sorted(points), "var(--a)", dots=True)
            words = (
                f"On features of {extractor}; each point has balls that reach to another neighbour, from the "
                "1st to the 10th as far as there are so many. Wider balls raise both."
            )
            chart = line_chart([line], [], "recall", "precision", from_zero=True)
            charts.append(("Precision over recall", chart, words))
    cards = "".join(
        f'<div class="card"><h3>{title}</h3>{chart}<p class="note">{words}</p></div>'
        for title, chart, words in charts
    )
    return f'<div class="charts">{cards}</div>' if cards else ""


def _read(evaluation: Evaluation, wanted: Sequence[Wish]) -> Tensor:
    return pictures_of(evaluation.pictures, wanted)


def _grid(pictures: Tensor, columns: int, label: str) -> str:
    zoom = max(1, 64 // pictures.shape[-1])
    uri, width, height = embedded(picture_grid(pictures, columns, zoom))
    return _PICTURE.substitute(uri=uri, width=width, height=height, alt=escape(label))


def _prompts(wanted: Sequence[Wish]) -> str:
    items = "".join(f"<li>{escape(wish.prompt) or '(no prompt)'}</li>" for wish in wanted)
    return f"<details><summary>Their prompts, row by row</summary><ol>{items}</ol></details>"


def _pictures(evaluation: Evaluation) -> str:
    """Some of all, evenly."""
    wanted = evaluation.asked.wanted
    some = wanted[:: max(1, len(wanted) // SHOWN)][:SHOWN]
    grid = _grid(_read(evaluation, some), COLUMNS, "pictures of the protocol")
    return f"<h2>Pictures</h2>{grid}{_prompts(some)}"


def _extremes(evaluation: Evaluation, result: Result) -> str:
    """The best and the worst by each score of single pictures."""
    parts, wanted = [], evaluation.asked.wanted
    for name, scores in result.scores.items():
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        for title, chosen in (("Highest", order[:EXTREME]), ("Lowest", order[::-1][:EXTREME])):
            some = [wanted[i] for i in chosen]
            values = f"from {scores[chosen[0]]:.3g} to {scores[chosen[-1]]:.3g}"
            grid = _grid(_read(evaluation, some), COLUMNS, f"{title} {name}")
            parts.append(f"<h2>{title} {escape(name)}, {values}</h2>{grid}{_prompts(some)}")
    return "".join(parts)


def _neighbours(evaluation: Evaluation, result: Result) -> str:
    """Samples, and below each the training picture that is nearest to it."""
    if not result.nearest:
        return ""
    wanted, training = evaluation.asked.wanted, evaluation.splits().train.images
    step = max(1, len(wanted) // COLUMNS)
    chosen = list(range(0, len(wanted), step))[:COLUMNS]
    made = _read(evaluation, [wanted[i] for i in chosen])
    near = training[[result.nearest[i] for i in chosen]]
    if near.shape[1:] != made.shape[1:]:
        return ""
    return (
        "<h2>Nearest training pictures</h2><p>Above samples, below each the training picture whose features "
        f"are nearest.</p>{_grid(torch.cat([made, near]), len(chosen), 'samples and their nearest')}"
    )


def _facts(result: Result) -> str:
    """All that a figure depends on, as it stands in the JSON."""
    sections = {
        "protocol": result.protocol.model_dump(mode="json"),
        "facts": result.facts,
        "model": result.model,
        "made": result.made,
    }
    used = {MEASURES[name].extractor for name in result.protocol.metrics if name in MEASURES}
    words = f" Features: {', '.join(sorted(used))}." if used else ""
    rows = [
        table_row([escape(section), f"<code>{escape(name)}</code>", escape(value)])
        for section, values in sections.items()
        for name, value in _flat(values)
    ]
    table = html_table("Settings", ["of", "setting", "value"], rows, mark="")
    return (
        f"<h2>How</h2><p>All settings and facts, as in result.json.{words}</p>"
        f'<div class="facts">{table}</div>'
    )


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", "" if value is None else str(value)
