"""A run: set up, step until done, and what happens every so often beside the steps."""

from __future__ import annotations

import platform
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from shoestring import __version__
from shoestring.config import RunConfig, StageConfig, to_yaml
from shoestring.diffusion.process import build_process
from shoestring.encoders.image import build_codec
from shoestring.encoders.text import build_text_encoder
from shoestring.evaluation.validation import validation_loss
from shoestring.interfaces import ImageCodec, TextEncoder
from shoestring.models.files import build_network
from shoestring.planning import measured_peak_flops, model_flops
from shoestring.runtime import (
    PRECISIONS,
    TrainingFailed,
    UserError,
    Workers,
    default_workers,
    pick_device,
    say,
    stream,
    write_text,
)
from shoestring.sampling.generate import Pipeline, picture_grid, save_png
from shoestring.training.checkpoint import Counters, checkpoint_folders, load_checkpoint, save_checkpoint
from shoestring.training.display import LiveLine, Rate, RunLog, status_line
from shoestring.training.ema import EMA
from shoestring.training.folder import check_same_run, locked, remember
from shoestring.training.optim import Optimizers
from shoestring.training.schedule import Position, ema_decay, learning_rate, position
from shoestring.training.stage_data import StageData, check_settings, load_stage
from shoestring.training.step import Learner, NonFiniteLoss, train_step
from shoestring.training.stores import check_stages

GRID_PICTURES = 16


class Run:
    """A training run in its folder.

    Args:
        config: what to do.
        folder: run folder; a run that was interrupted there goes on.
        console: where a person reads.

    Raises:
        UserError: if configuration, data, device or folder do not fit together.
    """

    def __init__(self, config: RunConfig, folder: Path, console: Console) -> None:
        self.config, self.folder, self.console = config, folder, console
        self.device = pick_device(config.device)
        self.counters = Counters()
        self.codec: ImageCodec = build_codec(config.data, self.device)
        self.text_encoder: TextEncoder | None = None
        if config.model.condition == "text":
            self.text_encoder = build_text_encoder(config.data, self.device)
        check_settings(config, self.codec, self.text_encoder)
        check_stages(config, self.codec, self.text_encoder, folder, Console(quiet=True))
        self.data = self._load_data(config.stages[0])
        self.sigma_data = config.process.sigma_data or self.data.train.sigma_data()
        network = build_network(config, stream(config.seed, "init")).to(self.device)
        if config.compile:
            for block in network.all_blocks():
                block.compile(dynamic=False, isolate_recompiles=True)
        process = build_process(config.process, self.sigma_data)
        denoiser = process.denoiser(network, PRECISIONS[config.precision])
        # Part of what determines the bits of a run, so it is kept with it.
        count = remember(
            folder / "machine.json",
            f"workers_{self.device.type}",
            lambda: default_workers(self.device),
        )
        workers = Workers(count)
        optimizers = Optimizers(network, config.optimizer, workers)
        self.learner = Learner(network, config.tokens, process, denoiser, optimizers, EMA(network), workers)
        self.peak_flops = self._peak_flops()
        self.stopped = False

    def _load_data(self, stage: StageConfig) -> StageData:
        return load_stage(
            self.config, stage, self.codec, self.text_encoder, self.device, self.folder, self.console
        )

    def _peak_flops(self) -> float:
        """The machine's matmul peak: measured once, kept in the run folder."""
        dtype = PRECISIONS[self.config.precision]
        with self.console.status("Measuring the machine"):
            return remember(
                self.folder / "machine.json",
                f"matmul_flops_{self.config.precision}_{self.device.type}",
                lambda: measured_peak_flops(self.device, dtype),
            )

    # -- the loop ------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Train to the end, or to an interruption.

        Returns:
            True when all stages are done, False after Ctrl-C or SIGTERM (a checkpoint was written).

        Raises:
            TrainingFailed: on a NaN or infinite loss.
        """
        self._resume()
        self.log = RunLog(self.folder, self.counters.nimg, self.config.logging.tensorboard)
        self._rate = Rate(self.counters.elapsed_s)
        try:
            with self._signals(), LiveLine(self.console) as line:
                while (here := position(self.config, self.counters.nimg)) is not None and not self.stopped:
                    self._enter_stage(here)
                    self._step(here, line)
                    self._every_so_often(here)
            if self.stopped:
                self._save()
                say(
                    self.console,
                    f"Stopped at image {self.counters.nimg:,}; the same command goes on from there.",
                )
        finally:
            self.log.close()
            self.data.close()
            self.learner.workers.close()
        return not self.stopped

    def _resume(self) -> None:
        folders = checkpoint_folders(self.folder)
        for folder in reversed(folders):
            try:
                self.counters, facts = load_checkpoint(folder, self.learner)
            except UserError as error:
                if folder == folders[0]:
                    raise
                say(self.console, f"{error}; it is set aside as {folder.name}.damaged")
                folder.rename(folder.with_name(f"{folder.name}.damaged"))
                continue
            self.learner.model.position_scale = facts.position_scale
            say(self.console, f"Going on from image {self.counters.nimg:,} ({folder})")
            return

    def _enter_stage(self, here: Position) -> None:
        """Whatever a stage needs that is not there yet; cheap when nothing changes."""
        stage = here.stage
        self.learner.model.position_scale = stage.position_scale
        if stage.resolution != self.data.resolution:
            self.data.close()
            self.data = self._load_data(stage)
        if here.done_nimg == 0 and not stage.keep_optimizer:
            self.learner.optimizers = Optimizers(
                self.learner.model, self.config.optimizer, self.learner.workers
            )

    def _step(self, here: Position, line: LiveLine) -> None:
        stage, done = here.stage, here.done_nimg
        lr, ratio = learning_rate(stage, done), stage.mask_ratio_at(done)
        try:
            loss, norm = train_step(
                self.learner,
                self.data.batch(stage, self.counters.nimg - done, self.counters.nimg),
                stage,
                lr,
                ratio,
                ema_decay(here),
            )
        except NonFiniteLoss as error:
            kept = checkpoint_folders(self.folder)
            raise TrainingFailed(
                f"training stopped at image {self.counters.nimg:,} (stage {stage.name!r}): {error}; "
                + (f"the last good checkpoint is {kept[-1]}; " if kept else "no checkpoint was written yet; ")
                + f"start again in another folder (--out) with a lower stages.{here.index}.lr or clip_norm"
            ) from error
        self.counters.nimg += stage.batch
        self.counters.step += 1
        self._rate.step(stage.batch, loss)
        row = self._row(here, lr, ratio, norm)
        left = (self.config.nimg - self.counters.nimg) / max(row["images_per_s"], 1e-9)
        line.show(status_line(row, self.config.nimg, left))
        if self._crossed(self.config.logging.log_nimg, stage.batch) or self._last(here):
            self.log.write("train", row)
            self._rate.reset()

    def _row(self, here: Position, lr: float, ratio: float, norm: float) -> dict[str, Any]:
        shape, model = self.data.latent_shape, self.config.model
        grid = (shape[1] // model.patch_size, shape[2] // model.patch_size)
        captions = self.config.data.max_tokens
        if model.mask_captions:
            captions = self.data.train.longest_caption or captions
        per_image = model_flops(model, grid, captions, ratio, self.config.tokens).training
        flops = per_image * self._rate.images_per_s
        self.counters.elapsed_s = self._rate.elapsed_s
        return {
            "nimg": self.counters.nimg,
            "step": self.counters.step,
            "stage": here.stage.name,
            "loss": self._rate.loss,
            "lr": lr,
            "mask_ratio": ratio,
            "grad_norm": norm,
            "images_per_s": self._rate.images_per_s,
            "peak_share": flops / self.peak_flops,
            "elapsed_s": self.counters.elapsed_s,
            "cost_usd": self.counters.elapsed_s / 3600 * self.config.logging.usd_per_hour,
        }

    def _crossed(self, interval: int, batch: int) -> bool:
        """Whether the last step crossed a multiple of ``interval`` images."""
        return self.counters.nimg // interval > (self.counters.nimg - batch) // interval

    def _last(self, here: Position) -> bool:
        """Whether the last step was the last of its stage."""
        return here.done_nimg + here.stage.batch >= here.stage.steps * here.stage.batch

    def _every_so_often(self, here: Position) -> None:
        logging, batch, last = self.config.logging, here.stage.batch, self._last(here)
        with self._rate.paused():
            if last or self._crossed(logging.validate_nimg, batch):
                self._validate(here)
            if last or self._crossed(logging.sample_nimg, batch):
                self._sample()
            if last or self._crossed(logging.checkpoint_nimg, batch):
                self._save()

    # -- beside the steps ----------------------------------------------------------------------------------

    def _save(self) -> None:
        self.counters.elapsed_s = self._rate.elapsed_s
        facts = {
            "sigma_data": self.sigma_data,
            "position_scale": self.learner.model.position_scale,
            "resolution": self.data.resolution,
            "classes": self.data.classes,
        }
        save_checkpoint(self.folder, self.learner, self.counters, self.config, facts)

    def _validate(self, here: Position) -> None:
        x0, conditioning, held_out = self.data.held_out_batch(self.config.logging.validation_images)
        with self.learner.ema.applied():
            losses = validation_loss(self.learner.process, self.learner.denoiser, x0, conditioning)
        self.log.write(
            "validation",
            {
                "nimg": self.counters.nimg,
                "stage": here.stage.name,
                "held_out": held_out,
                "loss": sum(losses.values()) / len(losses),
                "loss_per_level": {f"{ratio:g}": loss for ratio, loss in losses.items()},
            },
        )

    def grid_prompts(self) -> list[str]:
        """Captions of the sample grids: as configured, else from the data, a quarter of them held out."""
        if self.config.logging.prompts:
            return list(self.config.logging.prompts)
        if self.config.model.condition != "text":
            names = self.data.classes or ("",)
            return [names[i % len(names)] for i in range(GRID_PICTURES)]
        held = list(self.data.held_out.captions) if self.data.held_out is not None else []
        held = held[: GRID_PICTURES // 4]
        prompts = list(self.data.train.captions[: GRID_PICTURES - len(held)]) + held
        return prompts or [""] * GRID_PICTURES  # pictures need have no captions

    def pipeline(self, nimg: int) -> Pipeline:
        """The current weights as something to draw with."""
        return Pipeline(
            self.config,
            self.learner.denoiser,
            self.learner.process,
            self.codec,
            self.text_encoder,
            self.device,
            self.data.resolution,
            nimg,
            self.learner.workers,
            self.data.classes,
        )

    def _sample(self) -> None:
        prompts = self.grid_prompts()
        with self.learner.ema.applied():
            pictures = self.pipeline(self.counters.nimg).draw(
                prompts, self.config.seed, range(len(prompts)), self.config.sampling
            )
        zoom = max(1, 64 // self.data.resolution)
        save_png(
            self.folder / "progress" / f"{self.counters.nimg:09d}.png",
            picture_grid(pictures, columns=8, zoom=zoom),
            {"nimg": self.counters.nimg, "prompts": prompts, "seed": self.config.seed},
        )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the current step; a second one ends it at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stopped = True
            self.console.print("Stopping after this step and saving; once more to stop at once.")

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train(config: RunConfig, folder: Path, console: Console) -> bool:
    """Train in a folder: start, or go on where an earlier try ended.

    Args:
        config: what to do.
        folder: run folder.
        console: where a person reads.

    Returns:
        True when the run is complete, False after an interruption.

    Raises:
        UserError: for mistakes in configuration, data or folder.
        TrainingFailed: on a NaN or infinite loss.
    """
    check_same_run(folder, config)
    with locked(folder):
        write_text(folder / "config.yaml", to_yaml(config))
        facts = {"shoestring": __version__, "torch": torch.__version__, "python": platform.python_version()}
        for name, version in facts.items():
            remember(folder / "machine.json", name, partial(str, version))
        return Run(config, folder, console).train()
