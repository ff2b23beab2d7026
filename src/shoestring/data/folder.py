"""The user's own pictures: a folder of image files with captions beside them or in a caption file."""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from shoestring.data.captions import DEFAULT, READERS, Columns, Row, plain, read_rows
from shoestring.data.records import Rejection
from shoestring.runtime import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
CAPTION_STEMS = ("metadata", "captions")
NO_CAPTION = "no caption"
UNUSABLE = "unusable picture"


@dataclass(frozen=True)
class Item:
    """A picture that has a caption."""

    name: str
    """Relative to the folder."""
    path: Path
    captions: tuple[str, ...]
    numbers: dict[str, float]


def collect(
    folder: Path, columns: Columns = DEFAULT, caption_file: Path | None = None
) -> tuple[list[Item], list[Rejection]]:
    """Find pictures and their captions without opening a picture.

    Args:
        folder: where the pictures are.
        columns: of caption files.
        caption_file: the only one; its names are relative to the folder, and a name without a folder may
            lie anywhere below. By default those in the folder and the texts beside the pictures.

    Returns:
        Pictures in the order of their names, and what was left out.

    Raises:
        UserError: if a caption file cannot be read.
    """
    pictures, caption_files = _walk(folder)
    found: dict[str, Item] = {}
    rejected: list[Rejection] = []
    taken: dict[str, str] = {}  # picture -> the row that names it
    below: dict[str, str] = {}
    if caption_file is not None:
        caption_files = [caption_file]
        counts = Counter(PurePosixPath(name).name for name in pictures)
        below = {PurePosixPath(name).name: name for name in pictures if counts[PurePosixPath(name).name] == 1}
    elif columns.named and not caption_files:
        raise UserError(
            f"{folder} has no column {columns.named[0]!r}, as it has no caption file; put it into "
            "metadata.jsonl, .csv or .parquet"
        )
    for file in caption_files:
        parent = (
            PurePosixPath() if caption_file else PurePosixPath(file.relative_to(folder).as_posix()).parent
        )
        shown = file.name if caption_file else file.relative_to(folder).as_posix()
        for row in read_rows(file, columns):
            where = f"{shown} line {row.line}"
            picture = _inside(parent, row.name)
            if picture is None:
                rejected.append(Rejection(where, f"{row.name} is not inside the folder", "no picture"))
                continue
            if picture not in pictures and not _is_file(folder / picture):
                picture = below.get(picture, picture)
            if picture in taken:
                reason = f"{picture} already has a caption from {taken[picture]}"
                rejected.append(Rejection(where, reason, "duplicate id"))
            elif picture not in pictures and not _is_file(folder / picture):
                rejected.append(Rejection(where, f"there is no file {picture}", "no picture"))
            else:
                taken[picture] = where
                _take(folder, picture, row, found, rejected)
    for name in sorted(pictures - taken.keys()):
        if caption_file is None:
            _take_text(folder, name, found, rejected)
        else:
            _take(folder, name, Row(name, (), 0, {}), found, rejected)
    return [found[name] for name in sorted(found)], rejected


def _walk(folder: Path) -> tuple[set[str], list[Path]]:
    """Names of the pictures, and the caption files in order."""
    pictures: set[str] = set()
    caption_files: list[Path] = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for file in sorted(name for name in files if not name.startswith(".")):
            lower = Path(file.lower())
            if lower.suffix in SUFFIXES:
                pictures.add((Path(root) / file).relative_to(folder).as_posix())
            elif lower.stem in CAPTION_STEMS and lower.suffix in READERS:
                caption_files.append(Path(root) / file)
    return pictures, caption_files


def _take_text(folder: Path, name: str, found: dict[str, Item], rejected: list[Rejection]) -> None:
    text = (folder / name).with_suffix(".txt")
    try:
        captions = (text.read_text(encoding="utf-8-sig"),) if text.is_file() else ()
    except (OSError, UnicodeDecodeError) as error:
        rejected.append(Rejection(name, f"cannot read {text.name} as UTF-8 text: {error}", NO_CAPTION))
        return
    _take(folder, name, Row(name, captions, 0, {}), found, rejected)


def _take(folder: Path, name: str, row: Row, found: dict[str, Item], rejected: list[Rejection]) -> None:
    captions = tuple(map(plain, row.captions))
    if any(captions):
        found[name] = Item(name, folder / name, captions, row.numbers)
    else:
        rejected.append(Rejection(name, "empty caption" if row.captions else "no caption", NO_CAPTION))


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
