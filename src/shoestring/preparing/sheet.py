"""``shoestring data sample``: pictures of a store with their captions, to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from shoestring.data.describe import Sample, sample_rows
from shoestring.data.manifest import LatentsColumn
from shoestring.data.pixels import decode
from shoestring.data.ready import codec_for
from shoestring.data.store import Store
from shoestring.interfaces import ImageCodec
from shoestring.runtime import UserError, atomic_write
from shoestring.sampling.generate import to_pil

SIDE = 192
LINES = 3
MARGIN = 8


def draw_sheet(
    store: Store, out: Path, count: int, seed: int, codec: ImageCodec | None, latents: str | None = None
) -> list[Sample]:
    """Write a PNG of some records: decoded latents, or the original files, with a caption below each.

    Args:
        store: whose.
        out: the file.
        count: pictures.
        seed: of the choice.
        codec: decodes the latents; ``None`` shows the original files.
        latents: which column; by default the one of the largest resolution.

    Returns:
        The records that are shown, in order.

    Raises:
        UserError: if the store holds neither, or the file cannot be written.
    """
    samples = sample_rows(store, count, seed)
    rows = [sample.row for sample in samples]
    if codec is not None:
        columns = store.manifest.latents
        column = store.latents(latents) if latents else max(columns, key=lambda c: c.resolution)
        pictures = _decoded(store, column, codec, rows)
    elif store.manifest.has_images:
        files = store.take(rows, ["image"])["image"].to_pylist()
        pictures = [decode(file) for file in files]
    else:
        raise UserError(f"{store.uri} holds neither latents nor pictures; there is nothing to look at")
    sheet = _sheet(pictures, [_caption(sample) for sample in samples])
    atomic_write(out, lambda file: sheet.save(file, format="PNG"))
    return samples


def _decoded(
    store: Store, column: LatentsColumn, codec: ImageCodec, rows: Sequence[int]
) -> list[Image.Image]:
    """The means of the moments, decoded one by one, as shapes may differ."""
    wanted = [column.column] + ([column.bucket_column] if len(column.buckets) > 1 else [])
    table = store.take(rows, wanted)
    buckets = table[column.bucket_column].to_pylist() if len(wanted) > 1 else [0] * len(rows)
    codec, pictures = codec_for(column, codec), []
    for data, bucket in zip(table[column.column].to_pylist(), buckets, strict=True):
        shape = column.shape(bucket)
        moments = np.frombuffer(data, np.dtype(column.dtype)).reshape(1, *shape)
        noise = torch.zeros(1, column.channels, *shape[1:])
        pixels = codec.decode(codec.latents(torch.from_numpy(moments.copy()), noise)).cpu()
        pictures.append(to_pil(pixels[0]))
    return pictures


def _caption(sample: Sample) -> str:
    """One caption, with its origin where there are several."""
    given = {name: texts[0] for name, texts in sample.captions.items() if texts}
    if len(given) > 1:
        return " | ".join(f"{name}: {text}" for name, text in given.items())
    return next(iter(given.values()), "(no caption)")


def _sheet(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    columns = min(len(pictures), max(1, round(math.sqrt(1.6 * len(pictures)))))
    lines = -(-len(pictures) // columns)
    font = ImageFont.load_default(11)
    line = 14
    cell = (SIDE + MARGIN, SIDE + LINES * line + 2 * MARGIN)
    sheet = Image.new("RGB", (columns * cell[0] + MARGIN, lines * cell[1] + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = MARGIN + i % columns * cell[0], MARGIN + i // columns * cell[1]
        scale = SIDE / max(picture.size)
        how = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
        shown = picture.resize(
            (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), how
        )
        sheet.paste(shown, (left + (SIDE - shown.width) // 2, top + (SIDE - shown.height) // 2))
        for n, text in enumerate(_wrapped(caption, draw, font)):
            draw.text((left, top + SIDE + 4 + n * line), text, "black", font)
    return sheet


def _wrapped(
    text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[str]:
    """At most ``LINES`` lines as wide as a picture; the last one may end in dots."""
    lines: list[str] = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= SIDE or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    cut = [_cut(line, draw, font) for line in lines[:LINES]]
    if len(lines) > LINES:
        cut[-1] = _cut(f"{cut[-1]} ...", draw, font)
    return cut


def _cut(line: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if draw.textlength(line, font) <= SIDE:
        return line
    while line and draw.textlength(f"{line}...", font) > SIDE:
        line = line[:-1]
    return f"{line.rstrip(' .')}..."
