"""Pictures in a folder: captions beside them, in caption files, or in one table of any name."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from shoestring.data.captions import NAME_COLUMNS, READERS, Columns
from shoestring.data.folder import Item, collect
from shoestring.data.readers.base import NO_PICTURE, Options, read_inside
from shoestring.data.records import Picture, Rejection
from shoestring.runtime import UserError


class FolderReader:
    """A folder of image files; see :func:`shoestring.data.folder.collect`. The ids are their names."""

    kind = "folder"
    credit = ""
    folder: Path
    table: Path | None

    def __init__(self, path: str, options: Options) -> None:
        """Look for the folder.

        Args:
            path: the folder.
            options: ``image``, ``captions`` and ``numbers`` are columns of its caption files.

        Raises:
            UserError: if there is no such folder.
        """
        self.path, self.options = path, options
        self.folder, self.table = Path(path), None
        _check_folder(self.folder)

    @cached_property
    def _found(self) -> tuple[list[Item], list[Rejection]]:
        names = (self.options.image,) if self.options.image else NAME_COLUMNS
        columns = Columns(names, self.options.captions, self.options.numbers)
        items, rejected = collect(self.folder, columns, self.table)
        if not items and not rejected:
            raise UserError(
                f"{self.path}: there is no picture in it; give a folder of image files, or name the kind of "
                "the source before the path, as in webdataset:PATH"
            )
        return items, rejected

    @property
    def total(self) -> int | None:
        """Pictures, and rows of caption files that are none."""
        items, rejected = self._found
        return len(items) + len(rejected)

    def items(self, start: int = 0) -> Iterator[Picture | Rejection]:
        """First what has no caption, then the pictures by name."""
        items, rejected = self._found
        yield from rejected[start:]
        for item in items[max(0, start - len(rejected)) :]:
            data = read_inside(self.folder, item.name)
            if isinstance(data, str):
                yield Rejection(item.name, data, NO_PICTURE)
            else:
                yield Picture(item.name, data, item.captions, item.numbers)


class TableReader(FolderReader):
    """A caption file of any name, and the folder of the pictures that it names."""

    kind = "table"

    def __init__(self, path: str, options: Options) -> None:
        """Look for both.

        Args:
            path: ends in .jsonl, .csv or .parquet.
            options: see :class:`FolderReader`; ``images`` is the folder, by default that of the file.

        Raises:
            UserError: if one is missing.
        """
        self.path, self.options, self.table = path, options, Path(path)
        if self.table.suffix.lower() not in READERS or not self.table.is_file():
            raise UserError(f"{path} is not a caption file; give one that ends in {', '.join(READERS)}")
        self.folder = options.images or self.table.parent
        _check_folder(self.folder, "--images")


def _check_folder(folder: Path, option: str = "") -> None:
    if not folder.is_dir():
        given = f"{option} is {str(folder)!r}, which" if option else str(folder)
        raise UserError(f"{given} is not a folder; give the folder of your pictures")
