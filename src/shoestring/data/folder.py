"""The user's own pictures: a folder of image files with captions beside them or in a caption file."""

from __future__ import annotations

import os
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from shoestring.data.captions import READERS, read_rows
from shoestring.data.pixels import Unusable, decode, fit
from shoestring.data.records import CaptionedImages, Rejection
from shoestring.runtime import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
CAPTION_STEMS = ("metadata", "captions")
MAX_SHOWN = 3


@dataclass(frozen=True)
class _Item:
    """A picture that has a caption."""

    name: str  # relative to the folder, for messages
    path: Path
    caption: str


def load(folder: Path, resolution: int) -> CaptionedImages:
    """Read all captioned pictures below a folder.

    A caption file (``metadata`` or ``captions`` with the ending .jsonl, .csv or .parquet) names pictures
    relative to where it lies, and wins over ``NAME.txt`` beside a picture. Hidden files are skipped.

    Args:
        folder: where the pictures are.
        resolution: side in pixels; the shortest side is resized to it (Lanczos), the middle is kept.

    Returns:
        The pictures in the order of their names. Every picture file and every row of a caption file is
        either a picture of the result or listed in ``rejected``.

    Raises:
        UserError: if the folder does not exist, a caption file cannot be read, or no picture is usable.
    """
    if not folder.is_dir():
        raise UserError(
            f"data.path is {str(folder)!r}, which is not a folder; give the folder of your pictures"
        )
    items, rejected = _collect(folder)
    # Memory is only taken where it is written, so the rows of pictures that turn out corrupt are free.
    images = np.empty((len(items), 3, resolution, resolution), dtype=np.uint8)
    captions: list[str] = []
    for item in items:
        try:
            images[len(captions)] = fit(decode(item.path, resolution), resolution, resolution)
            captions.append(item.caption)
        except Unusable as reason:
            rejected.append(Rejection(item.name, str(reason)))
    rejected.sort(key=lambda rejection: rejection.item)
    if not captions:
        shown = "; ".join(f"{r.item}: {r.reason}" for r in rejected[:MAX_SHOWN])
        nothing = f"no file ends in {', '.join(sorted(SUFFIXES))}"
        found = f"{len(rejected)} rejected ({shown})" if rejected else nothing
        raise UserError(
            f"data.path: no usable picture in {str(folder)!r}, {found}; a picture needs a caption in "
            "NAME.txt beside it or in metadata.jsonl, .csv or .parquet"
        )
    return CaptionedImages(torch.from_numpy(images[: len(captions)]), tuple(captions), tuple(rejected))


def _collect(folder: Path) -> tuple[list[_Item], list[Rejection]]:
    """Find pictures and their captions without opening a picture."""
    pictures: set[str] = set()
    caption_files: list[str] = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for file in sorted(name for name in files if not name.startswith(".")):
            name = (Path(root) / file).relative_to(folder).as_posix()
            lower = Path(file.lower())
            if lower.suffix in SUFFIXES:
                pictures.add(name)
            elif lower.stem in CAPTION_STEMS and lower.suffix in READERS:
                caption_files.append(name)
    found: dict[str, str] = {}  # picture -> caption
    rejected: list[Rejection] = []
    taken: dict[str, str] = {}  # picture -> the row that names it
    for file in caption_files:
        for row in read_rows(folder / file):
            where = f"{file} line {row.line}"
            picture = _inside(PurePosixPath(file).parent, row.name)
            if picture is None:
                rejected.append(Rejection(where, f"{row.name} is not inside the folder"))
            elif picture in taken:
                rejected.append(Rejection(where, f"{picture} already has a caption from {taken[picture]}"))
            elif picture not in pictures and not _is_file(folder / picture):
                rejected.append(Rejection(where, f"there is no file {picture}"))
            else:
                taken[picture] = where
                _take(picture, row.caption, found, rejected)
    for name in sorted(pictures - taken.keys()):
        text = (folder / name).with_suffix(".txt")
        try:
            caption = text.read_text(encoding="utf-8-sig") if text.is_file() else None
        except (OSError, UnicodeDecodeError) as error:
            rejected.append(Rejection(name, f"cannot read {text.name} as UTF-8 text: {error}"))
            continue
        _take(name, caption, found, rejected)
    return [_Item(name, folder / name, found[name]) for name in sorted(found)], rejected


def _take(name: str, caption: str | None, found: dict[str, str], rejected: list[Rejection]) -> None:
    # JSON may carry halves of surrogate pairs, which no tokenizer takes.
    words = " ".join((caption or "").encode("utf-8", "replace").decode().split())
    if words:
        found[name] = words
    else:
        rejected.append(Rejection(name, "no caption" if caption is None else "empty caption"))


def _inside(parent: PurePosixPath, name: str) -> str | None:
    """The name relative to the folder, or ``None`` if it leads out of it.

    Only the name is judged: links that the folder itself holds are the user's own and are followed.
    """
    path = posixpath.normpath(parent / name.replace("\\", "/"))
    outside = path == ".." or path.startswith(("/", "../")) or re.match("[A-Za-z]:", path)
    return None if outside else path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False
