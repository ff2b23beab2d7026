"""A step that does not fit into memory is repeated with fewer images at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from run_folders import TINY, config_of
from shoestring.config import ParallelConfig
from shoestring.runtime import OutOfMemory, UserError
from shoestring.training.folder import MACHINE
from shoestring.training.loop import Run
from shoestring.training.parallel import Parallel

SHORT = (
    TINY.replace("resolution: 8", "resolution: 24")
    .replace("nimg: 600", "nimg: 40")
    .replace("nimg: 400", "nimg: 20")
).replace("source: shapes", "source: shapes, max_captions: 20")


class SmallDevice:
    """A denoiser on a device that holds a few images."""

    def __init__(self, denoiser: Any, images: int) -> None:
        self.denoiser, self.images, self.largest = denoiser, images, 0
        self.patch_size, self.predicts_all = denoiser.patch_size, denoiser.predicts_all
        self.guidance_input = denoiser.guidance_input

    def prepare(self, conditioning: Any) -> Any:
        return self.denoiser.prepare(conditioning)

    def __call__(self, xt: torch.Tensor, *others: Any) -> Any:
        if len(xt) > self.images:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")
        self.largest = max(self.largest, len(xt))
        return self.denoiser(xt, *others)


def run_of(folder: Path) -> Run:
    return Run(config_of(SHORT), folder, Console(quiet=True), Parallel(ParallelConfig(), "cpu"))


def test_half_as_many_images_and_again_half(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    share = run.config.stages[0].batch
    workers = run.learner.workers.count
    small = SmallDevice(run.learner.training_denoiser, max(1, share // 2 // 2 // workers))
    run.learner.training_denoiser = small
    assert run.train()
    noted = json.loads((tmp_path / MACHINE).read_text())
    chosen = [value for key, value in noted.items() if key.startswith("micro_batch_")]
    assert min(chosen) == share // 2 // 2
    assert 0 < small.largest <= small.images
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    said = [row["text"] for row in events if row.get("what") == "out-of-memory"]
    assert said[0] == f"out of memory with {share} images at once; going on with {share // 2}"
    assert len(said) >= 2


def test_not_even_one_image(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    run.learner.training_denoiser = SmallDevice(run.learner.training_denoiser, 0)
    with pytest.raises(UserError, match="not even one image fits"):
        run.train()


def test_an_update_is_not_repeated(tmp_path: Path) -> None:
    """Part of the weights may have changed already: the run goes on from its checkpoint, in a new process."""
    run = run_of(tmp_path)
    share, updates = run.config.stages[0].batch, run.learner.averages.update

    def update(decay: float, nimg: int, batch: int) -> None:
        if nimg > 2 * share:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")
        updates(decay, nimg, batch)

    run.learner.averages.update = update  # type: ignore[method-assign]
    with pytest.raises(OutOfMemory, match=f"updated the weights.*{share} images at once.*last checkpoint"):
        run.train()
    assert run_of(tmp_path).train()
    noted = json.loads((tmp_path / MACHINE).read_text())
    assert share // 2 in [value for key, value in noted.items() if key.startswith("micro_batch_")]
