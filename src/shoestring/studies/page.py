"""Pieces of the report's page: tables, pictures, links, and numbers as text (nothing where there is none)."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from shoestring.runtime import UserError

Picture = Image.Image | bytes
Metrics = Mapping[str, float | None]

HERE = '<span class="here">measured here</span>'


def html_table(caption: str, head: Sequence[str], rows: Sequence[str], mark: str = HERE) -> str:
    """A table with its caption, marked as measured here or otherwise; cells are markup."""
    cells = "".join(f'<th scope="col">{name}</th>' for name in head)
    return (
        f'<div class="scroll"><table><caption>{caption} {mark}</caption><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def table_row(cells: Sequence[str]) -> str:
    """A row; the cells are markup."""
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def embedded(picture: Picture) -> tuple[str, int, int]:
    """A picture for the page: PNG, or WebP where that would be large.

    Args:
        picture: PIL image, or the bytes of a file.

    Returns:
        Data URI, width, height.

    Raises:
        UserError: if the bytes are no picture.
    """
    try:
        image = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
        image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"a picture of the report cannot be read ({error}); draw it again") from error
    kind, content = "png", io.BytesIO()
    image.save(content, "PNG", optimize=True)
    if content.tell() > 40_000:
        kind, content = "webp", io.BytesIO()
        image.save(content, "WEBP", quality=88)
    text = base64.b64encode(content.getvalue()).decode()
    return f"data:image/{kind};base64,{text}", image.width, image.height


def with_links(text: str) -> str:
    """Escaped text whose addresses are links."""
    return re.sub(r"(https?://[^\s<]+[^\s<.,;)])", r'<a href="\1">\1</a>', escape(text))


def finite(value: Any) -> bool:
    """Whether it is a number, and neither NaN nor infinite."""
    return isinstance(value, int | float) and math.isfinite(value)


def metric(metrics: Metrics, key: str) -> float | None:
    """A metric, or ``None`` where it is missing or not finite."""
    value = metrics.get(key)
    return value if value is not None and finite(value) else None


def floor_text(metrics: Metrics, key: str) -> str:
    """The cell of a distance between training and held-out pictures."""
    value = metric(metrics, key)
    return f"{short(value)} train against held-out" if value is not None else "not measured"


def short(value: float | None) -> str:
    """Three digits: 0.0123, 12.3, 1,234."""
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def whole(value: float | None) -> str:
    """A whole number: 12,345, from a million on 1.23 M."""
    if value is None:
        return ""
    return f"{value / 1e6:.3g} M" if value >= 1e6 else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share in percent, two digits below a tenth."""
    if value is None:
        return ""
    return f"{100 * value:.0f} %" if value >= 0.1 or value == 0 else f"{100 * value:.2g} %"


def with_unit(text: str, unit: str) -> str:
    """The text with its unit, if there is a text."""
    return text + unit if text else ""


def dollars(value: float) -> str:
    """Dollars and cents."""
    return f"${value:,.2f}" if value >= 0.005 else "less than $0.01"


def raw(value: float | None) -> str:
    """A metric as it stands in the complete list."""
    if not finite(value):
        return "not measured"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
