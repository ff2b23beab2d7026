"""Folders in MDS with pictures and captions, as MicroDiT, PRX and Nitro-E write them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from shoestring.data.mds import MDSFolder
from shoestring.data.readers.base import IMAGE_COLUMNS, Options, plan, to_picture
from shoestring.data.records import Picture, Rejection
from shoestring.runtime import UserError

ENCODED = ("jpeg", "png", "pil", "bytes")


class MDSReader:
    """The samples in order; ids are shard and number, as in ``0/shard.00003.mds/5``."""

    kind = "mds"
    credit = ""

    def __init__(self, path: str, options: Options) -> None:
        """Read the index and look for the shards.

        Args:
            path: the folder.
            options: ``image``, ``captions``, ``id`` and ``numbers`` are columns. By default the caption is
                the first text column whose name begins with ``caption``, or one of the usual names.

        Raises:
            UserError: if the folder is damaged, a column is missing, or there are latents but no pictures.
        """
        self.path, self.options = path, options
        self._folder = MDSFolder(Path(path))
        columns = self._folder.columns
        latents = [name for name in columns if "latents" in name]
        if latents and options.image is None and not set(IMAGE_COLUMNS) & set(columns):
            raise UserError(
                f"{path} holds latents ({', '.join(latents)}) and no pictures; make a store of it with: "
                "shoestring data import-mds"
            )
        texts = [name for name, kind in columns.items() if name.startswith("caption") and kind == "str"]
        self._plan = plan(
            path, list(columns), replace(options, captions=options.captions or tuple(texts[:1]))
        )
        kind = columns[self._plan.image]
        if kind.partition(":")[0] not in ENCODED:
            raise UserError(f"{path}: the column {self._plan.image} holds {kind}, not pictures; name another")
        self.total: int | None = len(self._folder)

    def items(self, start: int = 0) -> Iterator[Picture | Rejection]:
        """In the order of the shards."""
        for i in range(start, len(self._folder)):
            yield to_picture(self._plan, self._folder.name(i), self._folder[i])
