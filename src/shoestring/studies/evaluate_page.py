"""The page of an evaluation: figures with their intervals, what they depend on, and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import torch

from shoestring.evaluation.drawing import Wish, picture_file
from shoestring.evaluation.measures import MEASURES, Figure
from shoestring.evaluation.result import Result
from shoestring.runtime import write_text
from shoestring.sampling.generate import picture_grid, read_pixels
from shoestring.studies.page import embedded, html_table, table_row
from shoestring.studies.report_template import PAGE

SHOWN, COLUMNS = 40, 8
_PICTURE = Template('<p><img src="$uri" width="$width" height="$height" alt="$alt" class="grid"></p>')


def write_page(folder: Path, result: Result, wanted: Sequence[Wish]) -> Path:
    """Write ``report.html``.

    Args:
        folder: of the evaluation.
        result: of it.
        wanted: its pictures.

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
        _pictures(folder, wanted),
        _facts(result),
    ]
    page = folder / "report.html"
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


def _pictures(folder: Path, wanted: Sequence[Wish]) -> str:
    step = max(1, len(wanted) // SHOWN)
    some = list(wanted[::step])[:SHOWN]
    pictures = torch.stack([read_pixels(picture_file(folder / "pictures", wish)) for wish in some])
    zoom = max(1, 64 // pictures.shape[-1])
    uri, width, height = embedded(picture_grid(pictures, COLUMNS, zoom))
    prompts = "".join(f"<li>{escape(wish.prompt) or '(no prompt)'}</li>" for wish in some)
    picture = _PICTURE.substitute(uri=uri, width=width, height=height, alt="pictures of the protocol")
    return (
        f"<h2>Pictures</h2>{picture}<details><summary>Their prompts, row by row</summary>"
        f"<ol>{prompts}</ol></details>"
    )


def _facts(result: Result) -> str:
    """All that a figure depends on, as it stands in the JSON."""
    sections = {
        "protocol": result.protocol.model_dump(mode="json"),
        "what figures depend on": result.facts,
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
    return f"<h2>How</h2><p>All settings and facts, as in result.json.{words}</p>" + html_table(
        "Settings", ["of", "setting", "value"], rows, mark=""
    )


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", "" if value is None else str(value)
