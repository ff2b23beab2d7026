"""The token-reduction study: ``shoestring study tokens``. Trains the cells, measures them, keeps the rows.

Every cell is an ordinary run in its own folder: it can be interrupted and goes on; cells may run in any
order and in several processes at once (each takes the next one that is free). Every measured checkpoint is
a row that is written at once to one file, ``results.csv``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from shoestring.config import RunConfig, SamplingConfig
from shoestring.data.sources import Splits, load
from shoestring.evaluation.distances import frechet_distance, kernel_distance
from shoestring.evaluation.drawing import pictures_of, wishes
from shoestring.evaluation.extractor import kept_outputs
from shoestring.evaluation.features import EfficientNetLite0Features
from shoestring.evaluation.validation import loss_of_pictures
from shoestring.planning import model_flops
from shoestring.runtime import (
    TrainingFailed,
    UserError,
    pick_device,
    say,
    stream,
    write_text,
)
from shoestring.sampling.generate import Pipeline, load_pipeline, picture_grid, save_png
from shoestring.sampling.samplers import SAMPLERS
from shoestring.studies.evaluate import draw_shown
from shoestring.studies.token_cells import Cell, configure
from shoestring.studies.token_recipes import MEASURED, Preset, base_recipe, parameters, training_flops
from shoestring.studies.token_rows import Row, append_row, read_json, read_rows
from shoestring.training.display import read_log
from shoestring.training.folder import Busy, check_same_run, checkpoint_folders, locked
from shoestring.training.loop import train
from shoestring.training.schedule import position

SAMPLE_SEED = 1
DRAW_BATCH = 25
GRID_PICTURES = 20


@dataclass
class Study:
    """Folder, settings and cells of one study.

    Args:
        preset: size.
        folder: holds everything.
        data_path: pictures, for presets that need them.
        nimg: images of one training.
        console: where a person reads.
    """

    preset: Preset
    folder: Path
    data_path: str | None
    nimg: int
    console: Console
    _splits: dict[int, Splits] = field(default_factory=dict)

    def config(self, cell: Cell) -> RunConfig:
        """The recipe of a cell."""
        base = base_recipe(self.preset, self.data_path, self.preset.rounded(self.nimg * cell.share))
        return configure(cell, base)

    def known_nimg(self) -> int | None:
        """Images of one training in a study that was begun, else ``None``."""
        return read_json(self.folder / "study.json").get("nimg")

    def check_same(self) -> None:
        """Refuse to go on with other settings.

        Raises:
            UserError: naming what changed.
        """
        settings = {**asdict(self.preset), "nimg": self.nimg}
        path = self.folder / "study.json"
        before = read_json(path)
        if not before:
            write_text(path, json.dumps(settings, indent=1) + "\n")
            return
        for key in sorted(before.keys() | settings.keys()):
            if before.get(key) != settings.get(key):
                raise UserError(
                    f"{self.folder} holds a study with {key}={before.get(key)!r}, this one has "
                    f"{settings.get(key)!r}; choose another folder with --out, or delete that one"
                )

    # -- measuring -----------------------------------------------------------------------------------------

    def splits(self, config: RunConfig) -> Splits:
        """The pictures, loaded once."""
        resolution = config.stages[0].resolution
        if resolution not in self._splits:
            self._splits[resolution] = load(config.data, resolution)
        return self._splits[resolution]

    @cached_property
    def extractor(self) -> EfficientNetLite0Features:
        """Features of pictures."""
        return EfficientNetLite0Features()

    def reference(self, config: RunConfig) -> Tensor:
        """Features of the held-out pictures, computed once."""
        return self._features("held-out", self.splits(config).held_out.images)

    def _features(self, label: str, images: Tensor) -> Tensor:
        return kept_outputs(self.extractor, images, self.folder / "features", label)[0]

    def floor(self, config: RunConfig) -> dict[str, float]:
        """Training pictures against held-out ones: what a perfect model would get."""
        images = self.splits(config).train.images
        order = torch.randperm(len(images), generator=stream(0, "floor"))
        count = min(self.preset.many_samples, len(images))
        made, held = self._features("training", images[order[:count]]), self.reference(config)
        values: dict[str, float] = {}
        for n in sorted({min(count, self.preset.samples), count}):
            values[f"kid_{n}"] = kernel_distance(made[:n], held).mean
            values[f"fd_{n}"] = frechet_distance(made[:n], held)
        return values

    def measure(
        self, cell: Cell, config: RunConfig, checkpoint: Path, guidance: float, counts: Sequence[int]
    ) -> list[Row]:
        """Draw from a checkpoint and compare with held-out pictures; pictures are kept until the rows are.

        Args:
            cell: which.
            config: its recipe.
            checkpoint: folder of the checkpoint.
            guidance: classifier-free guidance.
            counts: numbers of pictures; the largest is drawn, smaller ones are its beginning.

        Returns:
            A row for each number.
        """
        pipeline = load_pipeline(checkpoint, pick_device("auto"))
        try:
            # Set here and not in the recipe: the settings of a measurement are the study's.
            sampling = config.sampling.model_copy(update={"guidance": guidance})
            pictures = self._draw(pipeline, sampling, max(counts), self._drawn(cell, checkpoint, guidance))
            losses = self._losses(pipeline, config)
        finally:
            pipeline.workers.close()
        made = self.extractor(pictures)
        reference = self.reference(config)
        nimg = int(checkpoint.name)
        last = nimg >= config.nimg
        if last and guidance == 1 and cell.seed == 0:
            grid = picture_grid(pictures[:GRID_PICTURES], 10, 2)
            save_png(self.folder / "samples" / f"{cell.name}.png", grid, {"cell": cell.name, "nimg": nimg})
        row = Row(
            cell=cell.name,
            seed=cell.seed,
            group=cell.group,
            method=cell.method,
            ratio=cell.ratio,
            nimg=nimg,
            guidance=guidance,
            parameters=parameters(config.model, config.tokens),
            training_gflops=flops_so_far(config, nimg) / 1e9,
            gflops_per_image=training_flops(config, config.stages[0]) / 1e9,
            trained_s=_trained_s(checkpoint.parent.parent, nimg),
            loss=sum(losses.values()) / len(losses),
            loss_per_level=json.dumps({f"{ratio:g}": round(loss, 6) for ratio, loss in losses.items()}),
        )
        rows = []
        for count in counts:
            kid = kernel_distance(made[:count], reference)
            fd = frechet_distance(made[:count], reference)
            rows.append(replace(row, samples=count, kid=kid.mean, kid_spread=kid.std, fd=fd))
        return rows

    def _draw(self, pipeline: Pipeline, sampling: SamplingConfig, count: int, folder: Path) -> Tensor:
        names = pipeline.classes or ("",)
        wanted = wishes([names[i % len(names)] for i in range(count)], (SAMPLE_SEED,))
        draw_shown(pipeline, folder, wanted, sampling, DRAW_BATCH, self.console)
        return pictures_of(folder, wanted)

    def _drawn(self, cell: Cell, checkpoint: Path, guidance: float) -> Path:
        """Where the pictures of a measurement are while it goes on."""
        return self._folder(cell) / "drawn" / f"{checkpoint.name}-{guidance:g}"

    def _losses(self, pipeline: Pipeline, config: RunConfig) -> dict[float, float]:
        held = self.splits(config).held_out
        count = self.preset.validation_images
        return loss_of_pictures(pipeline, held.images[:count], held.captions[:count])

    # -- running -------------------------------------------------------------------------------------------

    def run(self, cells: Sequence[Cell]) -> bool:
        """Train and measure all cells that are not done; those another process works on are left to it.

        Args:
            cells: in this order.

        Returns:
            False after an interruption.
        """
        for i, cell in enumerate(cells):
            if self._is_done(cell):
                check_same_run(self._folder(cell), self.config(cell))
                continue
            say(self.console, f"[{i + 1}/{len(cells)}] {cell.key}")
            try:
                with locked(self.folder / "locks" / cell.key):
                    if not self._run_cell(cell):
                        return False
            except Busy:
                say(self.console, f"{cell.key}: another process works on it")
        return True

    def _run_cell(self, cell: Cell) -> bool:
        config = self.config(cell)
        folder = self._folder(cell)
        diverged = False
        try:
            if not train(config, folder, self.console):
                return False
        except TrainingFailed as error:
            say(self.console, f"{cell.key} diverged: {error}")
            diverged = True
        have = {(row.nimg, row.guidance, row.samples) for row in self.rows() if _same(row, cell)}
        for checkpoint, guidance, wanted in self._wanted(cell, config):
            nimg = int(checkpoint.name)
            counts = [count for count in wanted if (nimg, guidance, count) not in have]
            for row in self.measure(cell, config, checkpoint, guidance, counts) if counts else []:
                append_row(self.results, row)
                say(
                    self.console,
                    f"{cell.key} at {nimg:,} images, guidance {guidance:g}: KID {row.kid:.4f}, "
                    f"FD {row.fd:.1f}, loss {row.loss:.4f}",
                )
            shutil.rmtree(self._drawn(cell, checkpoint, guidance), ignore_errors=True)
        if diverged:
            nimg = max((int(f.name) for f in checkpoint_folders(folder)), default=0)
            append_row(
                self.results,
                Row(cell.name, cell.seed, cell.group, cell.method, cell.ratio, nimg, status="diverged"),
            )
        return True

    def _wanted(self, cell: Cell, config: RunConfig) -> Iterator[tuple[Path, float, list[int]]]:
        """Checkpoint, guidance and numbers of pictures of every measurement, as far as training came."""
        by_nimg = {int(folder.name): folder for folder in checkpoint_folders(self._folder(cell))}
        few = self.preset.samples
        for nimg in measured_at(config):
            if nimg in by_nimg:
                many = nimg == config.nimg and self._has_many(cell)
                yield by_nimg[nimg], 1.0, [few, self.preset.many_samples] if many else [few]
        if config.nimg in by_nimg:
            for guidance in cell.guidance:
                yield by_nimg[config.nimg], guidance, [few]

    def _folder(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.key

    def _is_done(self, cell: Cell) -> bool:
        mine = [row for row in self.rows() if _same(row, cell)]
        if any(row.status == "diverged" for row in mine):
            return True
        return len({(row.nimg, row.guidance, row.samples) for row in mine}) >= self.rows_of(cell)

    def rows_of(self, cell: Cell) -> int:
        """How many measurements a cell has."""
        return len(MEASURED) + self._has_many(cell) + len(cell.guidance)

    def _has_many(self, cell: Cell) -> bool:
        return cell.many and self.preset.many_samples > self.preset.samples

    def drawing_flops(self, cell: Cell, config: RunConfig) -> float:
        """FLOPs of all pictures that are drawn for a cell's measurements."""
        many = self.preset.many_samples if self._has_many(cell) else self.preset.samples
        pictures = self.preset.samples * (len(MEASURED) - 1 + 2 * len(cell.guidance)) + many
        calls = SAMPLERS[config.sampling.sampler].calls(config.sampling.steps)
        side = config.stages[0].resolution // config.model.patch_size
        one = model_flops(config.model, (side, side), config.data.max_tokens, 0.0, config.tokens)
        return pictures * calls * one.forward

    # -- the results file ----------------------------------------------------------------------------------

    @property
    def results(self) -> Path:
        """All rows of all cells."""
        return self.folder / "results.csv"

    def rows(self) -> list[Row]:
        """What is there."""
        return read_rows(self.results)


def _same(row: Row, cell: Cell) -> bool:
    return row.cell == cell.name and row.seed == cell.seed


def measured_at(config: RunConfig) -> list[int]:
    """Images seen at the measured checkpoints."""
    return [round(config.nimg * share) for share in MEASURED]


def flops_so_far(config: RunConfig, nimg: int) -> float:
    """Training FLOPs of a run's first images, along its mask schedule."""
    total, seen = 0.0, 0
    while seen < nimg and (here := position(config, seen)) is not None:
        ratio = here.stage.mask_ratio_at(here.done_nimg)
        total += here.stage.batch * training_flops(config, here.stage, ratio)
        seen += here.stage.batch
    return total


def _trained_s(run: Path, nimg: int) -> float:
    rows = [row for row in read_log(run) if row["kind"] == "train" and row["nimg"] <= nimg]
    return max((float(row["elapsed_s"]) for row in rows), default=0.0)
