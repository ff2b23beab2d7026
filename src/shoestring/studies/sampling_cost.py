"""The sampling-cost study: ``shoestring study sampling``. Trains networks, or takes some, and measures them.

Every cell (network, sampler, steps, guidance) draws the same pictures from the same noise and is a row that
is written at once; interrupted, the same command goes on, and no cell is computed twice. Several processes
share the networks: each takes the next one that is free.

Source: Bigger is not Always Better, arXiv 2404.01367.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from torch import Tensor

from shoestring.config import CODEC_DOWNSAMPLING, RunConfig, SamplingConfig
from shoestring.evaluation.digests import file_digest
from shoestring.models.files import find_model, read_header
from shoestring.planning import model_flops
from shoestring.runtime import TrainingFailed, UserError, pick_device, say, write_text
from shoestring.sampling.generate import (
    Pipeline,
    load_pipeline,
    picture_grid,
    save_png,
)
from shoestring.sampling.samplers import SAMPLERS, lowered_order
from shoestring.studies.sampling_models import Model, given_data, given_models, trained_flops
from shoestring.studies.sampling_pictures import Pictures
from shoestring.studies.sampling_recipes import MEASURED, Preset, Training, recipe, trainings
from shoestring.studies.sampling_rows import METRICS, Row, append_row, read_rows
from shoestring.studies.sampling_search import coarse_to_fine
from shoestring.studies.token_recipes import parameters
from shoestring.studies.token_rows import read_json
from shoestring.training.display import duration
from shoestring.training.folder import Busy, check_same_run, checkpoint_folders, locked
from shoestring.training.loop import train

SHOWN = 20
CURVE_SAMPLING = SamplingConfig(sampler="ddim", steps=20, guidance=4.0)
"""With which checkpoints on the way are measured, for quality against training compute; one of the grid."""


@dataclass(frozen=True)
class Plan:
    """What is measured of every network."""

    samplers: tuple[str, ...]
    steps: tuple[int, ...]
    guidance: tuple[float, ...]
    samples: int
    metric: str
    """By which the best guidance is found."""
    full: bool
    """All scales of guidance, instead of coarse to fine."""


class Study:
    """A study in its folder.

    Args:
        preset: of the trainings.
        plan: what is measured.
        folder: holds everything.
        data_path: pictures, for presets that need them.
        models: given networks; empty = those of the preset are trained.
        any_data: allow given networks that were trained on different data, in this command and before.
        console: where a person reads.

    Raises:
        UserError: if given networks do not exist or do not belong together.
    """

    def __init__(
        self,
        preset: Preset,
        plan: Plan,
        folder: Path,
        data_path: str | None,
        models: Sequence[Path],
        any_data: bool,
        console: Console,
    ) -> None:
        self.preset, self.plan, self.folder, self.data_path = preset, plan, folder, data_path
        self.console, self.any_data = console, any_data
        self.pictures = Pictures(folder, plan.samples, console)
        self.models = [
            Model(t.size.name, t.size.family, t.seed, folder / "models" / t.key, t) for t in trainings(preset)
        ]
        if models:
            self.models = given_models(models, any_data, max(plan.steps))

    @property
    def results(self) -> Path:
        """All rows."""
        return self.folder / "results.parquet"

    def rows(self) -> list[Row]:
        """What is there."""
        return read_rows(self.results)

    def check_same(self) -> None:
        """Refuse to go on with other trainings, data or noise.

        Raises:
            UserError: naming what changed.
        """
        given = any(model.training is None for model in self.models)
        settings: dict[str, object] = {"given": True} if given else asdict(self.preset)
        if given and not self.any_data:  # all the same within a command
            settings["data"] = given_data(self.models[0].folder)
        for measured in ("samplers", "steps", "guidance", "samples", "sizes", "seeds"):  # may grow
            settings.pop(measured, None)
        path = self.folder / "study.json"
        before = read_json(path)
        if not before:
            write_text(path, json.dumps(settings, indent=1) + "\n")
            return
        if given and self.any_data:
            before.pop("data", None)
        for key in sorted(before.keys() | settings.keys()):
            if before.get(key) != json.loads(json.dumps(settings.get(key))):
                told = " or give --any-data" if key == "data" and given else " or delete that one"
                raise UserError(
                    f"{self.folder} holds a study with {key}={before.get(key)!r}, this one has "
                    f"{settings.get(key)!r}; choose another folder with --out,{told}"
                )

    # -- running -------------------------------------------------------------------------------------------

    def run(self, train_only: bool = False) -> bool:
        """Train and measure all networks; those another process works on are left to it.

        Args:
            train_only: measure nothing.

        Returns:
            False after an interruption.
        """
        for i, model in enumerate(self.models):
            say(self.console, f"[{i + 1}/{len(self.models)}] {model.name}, seed {model.seed}")
            try:
                with locked(self.folder / "locks" / f"{model.name}-s{model.seed}"):
                    if model.training is not None and not self._train(model):
                        return False
                    if not train_only and not self._measure(model):
                        return False
            except Busy:
                say(self.console, f"{model.name}, seed {model.seed}: another process works on it")
        return True

    def config(self, training: Training) -> RunConfig:
        """The recipe of a training."""
        return recipe(self.preset, training, self.data_path, self.preset.nimg)

    def _train(self, model: Model) -> bool:
        assert model.training is not None
        config = self.config(model.training)
        done = [int(folder.name) for folder in checkpoint_folders(model.folder)]
        if done and max(done) >= config.nimg:
            check_same_run(model.folder, config)
            return True
        try:
            return train(config, model.folder, self.console)
        except TrainingFailed as error:  # what it reached is measured all the same
            say(self.console, f"{model.name}, seed {model.seed} diverged: {error}")
            return True

    def _measure(self, model: Model) -> bool:
        have = {row.cell: row for row in self.rows()}
        if model.training is not None and not checkpoint_folders(model.folder):
            return True  # it diverged before the first checkpoint
        try:
            for checkpoint, sampling in self._on_the_way(model):
                self._cell(model, checkpoint, sampling, have)
            checkpoint = find_model(model.folder)
            for sampler in self.plan.samplers:
                for steps in self.plan.steps:
                    self._search(model, checkpoint, sampler, steps, have)
        except KeyboardInterrupt:
            say(self.console, "Interrupted; the same command goes on.")
            return False
        finally:
            self._close()
        return True

    def _on_the_way(self, model: Model) -> Iterator[tuple[Path, SamplingConfig]]:
        """Checkpoints of a training, for quality against training compute."""
        if model.training is not None:
            nimg = self.config(model.training).nimg
        elif model.on_the_way:
            config = read_header(find_model(model.folder)).config
            nimg, own = config.nimg, config.sampling
        else:
            return
        wanted = {round(nimg * share) for share in MEASURED}
        for folder in checkpoint_folders(model.folder):
            if int(folder.name) in wanted:
                yield find_model(folder), CURVE_SAMPLING if model.training is not None else own

    def _search(
        self, model: Model, checkpoint: Path, sampler: str, steps: int, have: dict[tuple[object, ...], Row]
    ) -> None:
        sign = -1 if METRICS[self.plan.metric] else 1

        def value(guidance: float) -> float:
            changes = {"sampler": sampler, "steps": steps, "guidance": guidance}
            found = float(
                getattr(
                    self._cell(model, checkpoint, base.model_copy(update=changes), have), self.plan.metric
                )
            )
            if not math.isfinite(found):
                raise UserError(
                    f"--metric is {self.plan.metric}, and {model.name} has none (only pictures of shapes, "
                    "drawn from captions, have an accuracy, only enlarged ones a psnr and a "
                    "feature_distance); choose kid or fd"
                )
            return sign * found

        said = lowered_order(SamplingConfig(sampler=sampler, steps=steps))
        if said is not None:
            say(self.console, said)
        scales = self.plan.guidance
        config = self._pipeline(checkpoint).config
        base = SamplingConfig() if config.distill is None else config.sampling  # a student has its own grid
        folded = config.distill is not None and config.sampling.guidance == 1
        if config.model.condition == "none" or config.superres is not None or folded:
            if scales != (1.0,):
                what = "has guidance folded in" if folded else "is unconditional"
                what = "enlarges pictures" if config.superres is not None else what
                say(self.console, f"{model.name} {what}: guidance has nothing to leave out, 1 is used")
            scales = (1.0,)
        if self.plan.full:
            for scale in scales:
                value(scale)
        else:
            coarse_to_fine(scales, value)

    # -- a cell --------------------------------------------------------------------------------------------

    def _cell(
        self, model: Model, checkpoint: Path, sampling: SamplingConfig, have: dict[tuple[object, ...], Row]
    ) -> Row:
        """The row of a cell, measured unless it is there."""
        pipeline = self._pipeline(checkpoint)
        blank = self._described(model, checkpoint, pipeline, sampling)
        if blank.cell in have:
            return have[blank.cell]
        started = time.perf_counter()
        pictures = self.pictures.draw(pipeline, sampling)
        seconds = time.perf_counter() - started
        figures = self.pictures.figures(pipeline, pictures)
        row = Row(**{**asdict(blank), **figures, "seconds": seconds})
        append_row(self.results, row)
        have[row.cell] = row
        self._keep_grid(row, pictures)
        shown = f", accuracy {row.accuracy:.3f}" if math.isfinite(row.accuracy) else ""
        say(
            self.console,
            f"{row.model} s{row.seed} at {row.nimg:,} images, {row.sampler} {row.steps}, guidance "
            f"{row.guidance:g}: KID {row.kid:.4f} +- {row.kid_error:.4f}, FD {row.fd:.1f}{shown}, "
            f"{duration(seconds)}",
        )
        return row

    def _described(self, model: Model, checkpoint: Path, pipeline: Pipeline, sampling: SamplingConfig) -> Row:
        config = pipeline.config
        side = pipeline.resolution // CODEC_DOWNSAMPLING[config.data.codec] // config.model.patch_size
        captions = config.data.max_tokens if config.model.condition == "text" else 0
        flops = model_flops(config.model, (side, side), captions, 0.0, config.tokens)
        return Row(
            model=model.name,
            family=model.family,
            seed=model.seed,
            parameters=parameters(config.model, config.tokens),
            nimg=pipeline.nimg,
            training_gflops=trained_flops(config, pipeline.nimg) / 1e9,
            gflops=flops.forward / 1e9,
            sampler=sampling.sampler,
            steps=sampling.steps,
            guidance=sampling.guidance,
            evaluations=SAMPLERS[sampling.sampler].calls(sampling.steps),
            samples=self.plan.samples,
            kid=math.nan,
            kid_error=math.nan,
            fd=math.nan,
            precision=math.nan,
            recall=math.nan,
            guided_calls=1 if config.model.guidance_input else 2,
            digest=file_digest(checkpoint)[:12],
        )

    def _keep_grid(self, row: Row, pictures: Tensor) -> None:
        """The first pictures, to be looked at beside those of other networks at equal cost."""
        name = f"{row.model}-s{row.seed}-{row.nimg}-{row.sampler}-{row.steps}-{row.guidance:g}.png"
        grid = picture_grid(pictures[:SHOWN], 10, 2)
        save_png(self.folder / "grids" / name, grid, asdict(row))

    # -- what is kept open ---------------------------------------------------------------------------------

    _open: tuple[Path, Pipeline] | None = None

    def _pipeline(self, checkpoint: Path) -> Pipeline:
        if self._open is None or self._open[0] != checkpoint:
            self._close()
            self._open = checkpoint, load_pipeline(checkpoint, pick_device("auto"))
        return self._open[1]

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].workers.close()
            self._open = None
