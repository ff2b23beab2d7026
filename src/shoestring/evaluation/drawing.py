"""Pictures of many prompts as files, each by its number: it matters not when or where it was drawn."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from PIL import Image
from torch import Tensor

from shoestring.config import SamplingConfig
from shoestring.sampling.generate import PNG_KEY, Pipeline, read_pixels, save_png, to_pil
from shoestring.tensors import UInt8

PIECE = 16
"""Pictures that a thread draws at once on a CPU, whatever the number of its cores."""
PER_FOLDER = 1000
"""Files of a folder; more make some file systems slow."""


Low = Callable[[Sequence[int]], Tensor]
"""Small pictures by their numbers."""


@dataclass(frozen=True)
class Wish:
    """A picture to draw."""

    number: int
    """Of the picture; its noise and its file are named by it."""
    prompt: str
    seed: int


def wishes(prompts: Sequence[str], seeds: Sequence[int]) -> list[Wish]:
    """Every prompt with every seed, numbered; pictures of one prompt number differ by their seed only.

    Args:
        prompts: captions or classes.
        seeds: one picture of each prompt for each.

    Returns:
        Seed by seed.
    """
    return [Wish(i, prompt, seed) for seed in seeds for i, prompt in enumerate(prompts)]


def picture_file(folder: Path, wish: Wish) -> Path:
    """Where a picture is kept."""
    return folder / f"{wish.seed:02d}-{wish.number // PER_FOLDER:03d}" / f"{wish.number:06d}.png"


def draw(
    pipeline: Pipeline,
    folder: Path,
    wanted: Sequence[Wish],
    sampling: SamplingConfig,
    micro_batch: int,
    share: tuple[int, int] = (0, 1),
    on_done: Callable[[int], object] = lambda count: None,
    low: Low | None = None,
) -> None:
    """Draw pictures into PNGs with their parameters inside; those that are there already are kept.

    All pictures go through the network in batches of one size, always the same ones: products of other shapes
    round differently, and a picture must not depend on an interruption or on the number of processes.

    Args:
        pipeline: the model.
        folder: where the pictures go.
        wanted: all of them, also those of other processes.
        sampling: how.
        micro_batch: pictures at once.
        share: which process of how many this is; whole batches are shared out.
        on_done: called with the number of pictures that are there now, after each batch of this process.
        low: gives the small pictures of some numbers, of super-resolution models.

    Raises:
        UserError: if a picture cannot be written.
    """
    mine, of = share
    done = 0
    for first in range(mine * micro_batch, len(wanted), of * micro_batch):
        part = list(wanted[first : first + micro_batch])
        if not all(_is_drawn(pipeline, picture_file(folder, wish), wish, sampling) for wish in part):
            for wish, picture in zip(part, _drawn(pipeline, part, sampling, micro_batch, low), strict=True):
                save_png(picture_file(folder, wish), to_pil(picture), parameters(pipeline, wish, sampling))
        done += len(part)
        on_done(done)


def _drawn(
    pipeline: Pipeline, part: Sequence[Wish], sampling: SamplingConfig, micro_batch: int, low: Low | None
) -> list[Tensor]:
    """Pictures of one batch, filled up with its last wish; those of one seed are drawn together."""
    found: dict[int, Tensor] = {}
    for seed in dict.fromkeys(wish.seed for wish in part):
        rows = [i for i, wish in enumerate(part) if wish.seed == seed]
        filled = rows + rows[-1:] * (micro_batch - len(rows))
        prompts, numbers = [part[i].prompt for i in filled], [part[i].number for i in filled]
        piece = PIECE if pipeline.device.type == "cpu" else None
        small = None if low is None else low(numbers)
        pictures = pipeline.draw(prompts, seed, numbers, sampling, piece=piece, low=small)
        found |= dict(zip(rows, pictures, strict=False))
    return [found[i] for i in range(len(part))]


def parameters(pipeline: Pipeline, wish: Wish, sampling: SamplingConfig) -> dict[str, Any]:
    """What a picture's file says of it."""
    return {
        "prompt": wish.prompt,
        "seed": wish.seed,
        "index": wish.number,
        "nimg": pipeline.nimg,
        **sampling.model_dump(mode="json"),
    }


def _is_drawn(pipeline: Pipeline, path: Path, wish: Wish, sampling: SamplingConfig) -> bool:
    """Whether the file is the picture of this very wish."""
    try:
        with Image.open(path) as picture:
            return bool(picture.info.get(PNG_KEY) == json.dumps(parameters(pipeline, wish, sampling)))
    except (OSError, SyntaxError, ValueError):  # missing, or damaged: drawn anew
        return False


class DrawnPictures(Sequence[Tensor]):
    """Drawn pictures, uint8 ``3 H W`` each, read from their files one by one: many take no memory.

    Args:
        folder: where they are.
        wanted: which.

    Raises:
        UserError: when one is read that is missing or damaged.
    """

    def __init__(self, folder: Path, wanted: Sequence[Wish]) -> None:
        self._files = [picture_file(folder, wish) for wish in wanted]

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [read_pixels(file) for file in self._files[index]]
        return read_pixels(self._files[index])


def pictures_of(folder: Path, wanted: Sequence[Wish]) -> UInt8[Tensor, "B 3 H W"]:
    """Read drawn pictures, all at once.

    Args:
        folder: where they are.
        wanted: which.

    Returns:
        The pictures.

    Raises:
        UserError: if one is missing or damaged.
    """
    return torch.stack(list(DrawnPictures(folder, wanted)))
