"""The job behind ``shoestring sample``: prompts in, PNGs, a grid and perhaps an animation out."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from shoestring.config import RunConfig, SamplingConfig
from shoestring.runtime import UserError, atomic_write, say
from shoestring.sampling.generate import (
    Pipeline,
    batches,
    load_pipeline,
    picture_grid,
    save_png,
    to_pil,
)
from shoestring.sampling.samplers import lowered_order

GIF_FRAME_MS, GIF_LAST_MS = 100, 1500


@dataclass(frozen=True)
class SampleJob:
    """What to draw and where to put it; see ``shoestring sample --help``."""

    prompts: tuple[str, ...]
    prompts_file: Path | None
    num: int
    negative: str | None
    image: Path | None
    strength: float
    seed: int | None
    batch: int
    gif: bool
    out: Path

    def all_prompts(self) -> list[str]:
        """Prompts of command line and file, each ``num`` times.

        Returns:
            At least one prompt.

        Raises:
            UserError: if there is none, or the file cannot be read.
        """
        prompts = list(self.prompts)
        if self.prompts_file is not None:
            try:
                lines = self.prompts_file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"--prompts-file {self.prompts_file} cannot be read: {error}") from error
            prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise UserError(
                'no prompt: give --prompt "..." or --prompts-file FILE (--prompt "" draws freely)'
            )
        return [prompt for prompt in prompts for _ in range(self.num)]


def run_sample(
    checkpoint: Path,
    job: SampleJob,
    change: Callable[[RunConfig], RunConfig],
    device: torch.device,
    console: Console,
) -> None:
    """Draw and save.

    Args:
        checkpoint: run folder, checkpoint folder or model file.
        job: what to draw.
        change: applied to the model's configuration, e.g. overrides of its sampling settings.
        device: where to run.
        console: where a person reads.

    Raises:
        UserError: for mistakes in any of these.
    """
    prompts = job.all_prompts()
    if not 0 <= job.strength <= 1:
        raise UserError(f"--strength is {job.strength}; it must be between 0 and 1")
    seed = secrets.randbelow(2**31) if job.seed is None else job.seed
    pipeline = load_pipeline(checkpoint, device)
    sampling = change(pipeline.config).sampling
    start = None if job.image is None else _read_start(job.image, pipeline.resolution)
    _warn_cut(pipeline, prompts, console)
    warning = lowered_order(sampling)
    if warning is not None:
        say(console, warning)
    if pipeline.config.model.condition == "none" and sampling.guidance != 1 and sampling.weak == "condition":
        say(console, f"guidance {sampling.guidance:g} changes nothing: this model is unconditional")
    done: list[Tensor] = []
    frames: list[list[Tensor]] = []
    for part in track(list(batches(len(prompts), job.batch)), "Drawing", console=console, transient=True):
        steps: list[Tensor] = []
        pictures = pipeline.draw(
            [prompts[i] for i in part],
            seed,
            part,
            sampling,
            job.negative,
            start,
            job.strength,
            partial(_keep, steps) if job.gif else None,
        )
        for i, picture in zip(part, pictures, strict=True):
            save_png(
                job.out / f"{i:05d}-{_slug(prompts[i])}-seed{seed}.png",
                to_pil(picture),
                _parameters(job, prompts[i], seed, i, pipeline, sampling),
            )
        done.append(pictures)
        frames.append(steps)  # the last step's estimate is the picture
    zoom = max(1, 128 // pipeline.resolution)
    columns = min(8, len(prompts))
    grid = job.out / f"grid-seed{seed}.png"
    save_png(grid, picture_grid(torch.cat(done), columns, zoom), {"prompts": prompts, "seed": seed})
    message = f"{len(prompts)} pictures in {job.out}, all of them in {grid} (seed {seed})"
    if job.gif:
        animation = job.out / f"denoising-seed{seed}.gif"
        _save_gif(animation, [torch.cat(step) for step in zip(*frames, strict=True)], columns, zoom)
        message += f", the denoising in {animation}"
    say(console, message)


def _keep(steps: list[Tensor], _: int, pictures: Tensor) -> None:
    steps.append(pictures)


def _slug(prompt: str) -> str:
    """A prompt as part of a file name: with it and the seed, a second call does not overwrite the first."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    return "-".join(words)[:40].strip("-") or "no-words"


def _parameters(
    job: SampleJob, prompt: str, seed: int, index: int, pipeline: Pipeline, sampling: SamplingConfig
) -> dict[str, object]:
    """How a picture was made: enough to make it again."""
    more: dict[str, object] = {"negative": job.negative} if job.negative is not None else {}
    if job.image is not None:
        more |= {"image": job.image.name, "strength": job.strength}
    return {
        "prompt": prompt,
        "seed": seed,
        "index": index,
        "model": pipeline.config.name,
        "nimg": pipeline.nimg,
        **sampling.model_dump(mode="json"),
        **more,
    }


def _read_start(path: Path, resolution: int) -> Tensor:
    """The picture to begin with, cropped to the middle square at the model's resolution."""
    from shoestring.data.pixels import read_image

    if not path.is_file():
        raise UserError(f"--image {path} does not exist")
    return torch.from_numpy(read_image(path, resolution))[None]


def _warn_cut(pipeline: Pipeline, prompts: list[str], console: Console) -> None:
    """Say when a prompt has more tokens than the model reads."""
    if pipeline.text_encoder is None:
        return
    _, mask_BS = pipeline.text_encoder(prompts)
    cut = int((mask_BS.sum(1) >= pipeline.text_encoder.max_tokens).sum())
    if cut:
        console.print(
            f"{cut} of {len(prompts)} prompts fill or exceed the {pipeline.text_encoder.max_tokens} tokens "
            "that this model reads; what is beyond them was cut",
            highlight=False,
            soft_wrap=True,
        )


def _save_gif(path: Path, steps: list[Tensor], columns: int, zoom: int) -> None:
    sheets = [picture_grid(pictures, columns, zoom) for pictures in steps]
    frames = [sheet.convert("P", palette=Image.Palette.ADAPTIVE) for sheet in sheets]
    duration = [GIF_FRAME_MS] * (len(frames) - 1) + [GIF_LAST_MS]

    def write(file: IO[bytes]) -> None:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)

    atomic_write(path, write)
