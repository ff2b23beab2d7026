"""Pictures of several runs from the same noise, for the same words or classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console

from shoestring.runtime import UserError, say
from shoestring.sampling.generate import PNG_KEY, Pipeline, load_pipeline, to_pil
from shoestring.studies.compare import Compared

PICTURES = 8
SEED = 0


@dataclass(frozen=True)
class Drawn:
    """Pictures of one run."""

    run: Compared
    prompts: tuple[str, ...]
    pictures: tuple[Image.Image, ...]
    """As many as prompts, or none."""
    noise: tuple[int, ...]
    """Shape of the noise; pictures of equal shape began from equal noise."""
    note: str
    """How they were drawn, or why there are none."""


def draw_samples(
    runs: Sequence[Compared], prompts: Sequence[str], device: torch.device, console: Console
) -> list[Drawn]:
    """Draw from the averages of each run's newest checkpoint, each run with its own sampling settings.

    Args:
        runs: to compare.
        prompts: captions for runs that know captions; empty = those of the first such run's grids.
        device: where to draw.
        console: where a person reads.

    Returns:
        One entry a run; a run whose checkpoint cannot be read has a sentence instead of pictures.
    """
    captions = list(prompts) or _captions(runs)
    drawn = []
    for run in runs:
        try:
            drawn.append(_draw(run, captions, device))
        except UserError as error:
            say(console, f"no pictures of {run.label}: {error}")
            drawn.append(Drawn(run, (), (), (), str(error)))
    return drawn


def _draw(run: Compared, captions: Sequence[str], device: torch.device) -> Drawn:
    pipeline = load_pipeline(run.folder, device)
    try:
        wanted = _wanted(pipeline, captions)
        sampling = pipeline.config.sampling
        pictures = pipeline.draw(wanted, SEED, range(len(wanted)), sampling)
    finally:
        pipeline.workers.close()
    note = (
        f"{pipeline.nimg:,} images seen, {pipeline.resolution} px, {sampling.sampler}, "
        f"{sampling.steps} steps, guidance {sampling.guidance:g}"
    )
    side = pipeline.resolution // pipeline.codec.downsampling
    shape = (pipeline.codec.channels, side, side)
    return Drawn(run, tuple(wanted), tuple(to_pil(picture) for picture in pictures), shape, note)


def _wanted(pipeline: Pipeline, captions: Sequence[str]) -> list[str]:
    """What to ask a model for: the captions, its first classes, or nothing."""
    model = pipeline.config.model
    if model.condition == "text":
        return list(captions)
    if model.condition == "none":
        return [""] * PICTURES
    names = pipeline.classes or tuple(map(str, range(model.classes)))
    return [names[i % len(names)] for i in range(PICTURES)]


def _captions(runs: Sequence[Compared]) -> list[str]:
    """Captions of the first run that has any in its settings or its grids; else no words."""
    for run in runs:
        if run.config.model.condition == "text":
            found = list(run.config.logging.prompts) or _grid_captions(run.folder)
            if found:
                step = max(1, len(found) // PICTURES)
                return found[::step][:PICTURES]
    return [""] * PICTURES


def _grid_captions(folder: Path) -> list[str]:
    """Captions of the newest sample grid, which stand in its file."""
    for path in sorted((folder / "progress").glob("*.png"), reverse=True):
        try:
            with Image.open(path) as picture:
                found = json.loads(picture.info.get(PNG_KEY, "{}")).get("prompts", [])
        except (OSError, SyntaxError, ValueError):  # being written, or damaged: the one before will do
            continue
        return [str(prompt) for prompt in found]
    return []


def by_prompts(drawn: Sequence[Drawn]) -> list[list[Drawn]]:
    """Runs that drew the same together, in order; those without pictures are left out."""
    groups: dict[tuple[str, ...], list[Drawn]] = {}
    for each in drawn:
        if each.pictures:
            groups.setdefault(each.prompts, []).append(each)
    return list(groups.values())
