"""Crops of whole pictures, made small: what super-resolution is judged on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shoestring.config import SuperResConfig
from shoestring.evaluation.digests import digest_of, file_digest, pictures_digest
from shoestring.runtime import UserError, stream_seed
from shoestring.sampling.lowres import made_small
from shoestring.tensors import UInt8

KINDS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Crops(Sequence[Tensor]):
    """Square crops at random places, the same every time; uint8 ``3 side side`` each.

    Args:
        source: a folder of pictures, or pictures in memory that are as large as the crops.
        side: of the crops.
        count: how many, the pictures used about equally often. ``None`` = one of each picture.
        seed: of the places.

    Raises:
        UserError: if the folder has no picture, or one is smaller than the crops.
    """

    def __init__(self, source: Path | Tensor, side: int, count: int | None, seed: int) -> None:
        self.side, self.seed = side, seed
        self._files: list[Path] = []
        self._pictures = source if isinstance(source, Tensor) else None
        if isinstance(source, Path):
            self._files = _files(source, side)
        held = len(self._files) if self._pictures is None else len(self._pictures)
        self._total = held if count is None else count
        self.sources = held
        self._last: tuple[Path, Image.Image] | None = None
        self._low: dict[tuple[int, SuperResConfig], Tensor] = {}

    def __len__(self) -> int:
        return self._total

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._total))]
        if not 0 <= index < self._total:
            raise IndexError(index)
        source = index * self.sources // self._total  # neighbours share a picture: it is read once
        if self._pictures is not None:
            return self._pictures[source]
        picture = self._open(self._files[source])
        draw = np.random.default_rng(stream_seed(self.seed, "crop", index))
        left = int(draw.integers(picture.width - self.side + 1))
        top = int(draw.integers(picture.height - self.side + 1))
        crop = picture.crop((left, top, left + self.side, top + self.side))
        return torch.from_numpy(np.asarray(crop).copy()).permute(2, 0, 1).contiguous()

    def low(self, numbers: Sequence[int], superres: SuperResConfig) -> UInt8[Tensor, "B 3 h w"]:
        """Some crops made small.

        Args:
            numbers: which.
            superres: factor and degradation.

        Returns:
            Small pictures.
        """
        missing = [i for i in numbers if (i, superres) not in self._low]
        if missing:
            made = made_small(torch.stack([self[i] for i in missing]), superres, self.seed, missing)
            self._low |= {(i, superres): small for i, small in zip(missing, made, strict=True)}
        return torch.stack([self._low[i, superres] for i in numbers])

    def digest(self) -> str:
        """Of the whole pictures, as files or pixels."""
        if self._pictures is not None:
            return pictures_digest(self._pictures)
        return digest_of(file_digest(path) for path in self._files)

    def _open(self, path: Path) -> Image.Image:
        if self._last is None or self._last[0] != path:
            try:
                with Image.open(path) as picture:
                    self._last = path, picture.convert("RGB")
            except (OSError, SyntaxError, ValueError) as error:
                raise UserError(f"{path} cannot be read ({error}); repair or remove it") from error
        return self._last[1]


def _files(folder: Path, side: int) -> list[Path]:
    if not folder.is_dir():
        raise UserError(
            f"crops_folder: {folder} is not a folder; give the whole pictures that are cropped, such as the "
            "100 of DIV2K's validation set"
        )
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in KINDS)
    if not files:
        raise UserError(f"crops_folder: {folder} holds no picture ({', '.join(sorted(KINDS))})")
    for path in files:
        try:
            with Image.open(path) as picture:
                size = picture.size
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); repair or remove it") from error
        if min(size) < side:
            raise UserError(
                f"{path} has {size[0]} x {size[1]} pixels, and crops have {side}; take larger pictures, or "
                "leave it out"
            )
    return files
