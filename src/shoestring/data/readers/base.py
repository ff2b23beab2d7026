"""What every reader of pictures offers, and how a record of columns becomes a picture."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from shoestring.data.captions import check_names, numbers_of, texts_of
from shoestring.data.folder import NO_CAPTION
from shoestring.data.records import Picture, Rejection
from shoestring.runtime import UserError

NO_PICTURE = "no picture"
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture")
CAPTION_COLUMNS = ("caption", "captions", "text", "prompt", "label_name", "label")
TARS = (".tar", ".tar.gz", ".tgz")
ON_COMMAND_LINE = {
    "image": "--image",
    "captions": "--caption",
    "id": "--id",
    "split": "--split",
    "numbers": "--where",
    "images": "--images",
    "side": "--side",
}
"""How users give the options."""


@dataclass(frozen=True)
class Options:
    """How a source is to be read. A reader refuses those that it has no use for."""

    image: str | None = None
    """Column of the picture; by default the usual names are tried."""
    captions: tuple[str, ...] = ()
    """Columns of captions, all of them; by default the usual names are tried and the first counts."""
    id: str | None = None
    """Column of the id; by default the place in the source."""
    split: str | None = None
    """Part of the source."""
    numbers: tuple[str, ...] = ()
    """Columns to filter by."""
    images: Path | None = None
    """Folder of the pictures, where the source only names them."""
    side: int | None = None
    """Of drawn pictures, in pixels."""

    def to_json(self) -> dict[str, Any]:
        """Those that were given, as plain values, by their names on the command line."""
        given = {ON_COMMAND_LINE[name]: value for name, value in asdict(self).items() if value}
        return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


class Reader(Protocol):
    """A source of pictures, opened: what it needs is there, nothing large is read yet."""

    kind: str
    path: str
    credit: str
    """Licence, or the sentence that has to be shown; empty if the source names none."""
    options: Options

    @property
    def total(self) -> int | None:
        """Items, where the number is known beforehand."""
        ...

    def items(self, start: int = 0) -> Iterator[Picture | Rejection]:
        """Everything in the source, one by one, in the same order each time.

        Args:
            start: number of items to leave out at the beginning.

        Returns:
            Pictures and what is none.
        """
        ...


@dataclass(frozen=True)
class Plan:
    """Which columns of a source are read as what; see :func:`plan`."""

    where: str
    image: str
    captions: tuple[str, ...]
    id: str | None
    numbers: tuple[str, ...]
    images: Path | None
    class_names: Mapping[str, Sequence[str]]

    @property
    def columns(self) -> list[str]:
        """All columns that are read."""
        extra = () if self.id is None else (self.id,)
        return list(dict.fromkeys((self.image, *self.captions, *self.numbers, *extra)))


def plan(
    where: str, have: Sequence[str], options: Options, class_names: Mapping[str, Sequence[str]] | None = None
) -> Plan:
    """Choose columns.

    Args:
        where: the source, for messages.
        have: names of its columns.
        options: what the user asked for.
        class_names: names of the classes, for columns that hold their numbers.

    Returns:
        The choice.

    Raises:
        UserError: if a column that was named is missing, or none of the usual ones is there.
    """
    names = class_names or {}
    asked = [name for name in (options.image, *options.captions, options.id, *options.numbers) if name]
    check_names(where, have, asked)
    image = options.image or next((name for name in IMAGE_COLUMNS if name in have), None)
    usual = [name for name in CAPTION_COLUMNS if name in have and (name != "label" or name in names)]
    captions = options.captions or tuple(usual[:1])
    listed = ", ".join(have) or "no columns"
    if image is None:
        raise UserError(f"{where}: which column is the picture? It has {listed}; name one with --image")
    if not captions:
        raise UserError(f"{where}: which column is the caption? It has {listed}; name one with --caption")
    return Plan(where, image, captions, options.id, options.numbers, options.images, names)


def to_picture(plan: Plan, place: str, record: Mapping[str, Any]) -> Picture | Rejection:
    """A record as a picture.

    Args:
        plan: which columns are what.
        place: where the record is in the source; its id, if there is no column for that.
        record: values by column; a picture is bytes, ``{"bytes", "path"}``, or the name of a file.

    Returns:
        The picture, not decoded.

    Raises:
        UserError: if the caption column does not hold text.
    """
    name = place if plan.id is None or record.get(plan.id) is None else str(record[plan.id])
    data = _bytes(plan, record.get(plan.image))
    if isinstance(data, str):
        return Rejection(name, data, NO_PICTURE)
    captions: list[str] = []
    for column in plan.captions:
        value = record.get(column)
        if column in plan.class_names and isinstance(value, int):
            classes = plan.class_names[column]
            if not 0 <= value < len(classes):
                return Rejection(name, f"{column} is {value}, there are {len(classes)} classes", NO_CAPTION)
            value = classes[value]
        if value is None:
            continue
        texts = texts_of([text for text in value if text is not None] if isinstance(value, list) else value)
        if texts is None:
            raise UserError(
                f"{plan.where}: column {column} holds {str(value)[:60]!r} ({place}), which is no caption; "
                "name a column of text, or of lists of texts, with --caption"
            )
        captions += texts
    return Picture(name, data, tuple(captions), numbers_of(dict(record), plan.numbers))


def _bytes(plan: Plan, value: Any) -> bytes | str:
    """The file of a picture, or why there is none."""
    path = value
    if isinstance(value, Mapping):
        if value.get("bytes"):
            return bytes(value["bytes"])
        path = value.get("path")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value) or "empty"
    if not isinstance(path, str) or not path:
        return "empty" if value is None else f"column {plan.image} holds {type(value).__name__}, not a file"
    if plan.images is None:
        return f"the picture is not in the source, which only names {path}; give its folder with --images"
    return read_inside(plan.images, path)


def read_inside(folder: Path, name: str) -> bytes | str:
    """Read a file that a source names.

    Args:
        folder: where the files are.
        name: relative to it; names that lead out of it are not followed.

    Returns:
        The content, or why there is none.
    """
    path = os.path.normpath(name.replace("\\", "/"))
    if Path(path).is_absolute() or path.split("/")[0] == ".." or ":" in path.split("/")[0]:
        return f"{name} is not inside the folder"
    try:
        return (folder / path).read_bytes()
    except (OSError, ValueError) as error:
        return f"cannot read {name} ({getattr(error, 'strerror', None) or error})"
