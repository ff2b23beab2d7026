"""A run: step until done, and what happens every so often beside the steps."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from shoestring.config import RunConfig
from shoestring.encoders.image import build_codec
from shoestring.encoders.text import build_text_encoder
from shoestring.interfaces import ImageCodec, TextEncoder
from shoestring.runtime import TrainingFailed, UserError, say, write_text
from shoestring.sampling.generate import Pipeline
from shoestring.training import beside
from shoestring.training.checkpoint import Checkpoints, Counters, Trained
from shoestring.training.checks import DataWatch, never_learned
from shoestring.training.display import LiveLine, Rate, status_line
from shoestring.training.fitting import FittingSteps
from shoestring.training.folder import checkpoint_folders, claimed
from shoestring.training.guard import Guard, Verdict
from shoestring.training.launch import follow_launcher
from shoestring.training.mark import Damaged, amend_counters, aside, discard
from shoestring.training.parallel import Parallel, check_batches
from shoestring.training.quality import sample_quality
from shoestring.training.record import Record
from shoestring.training.saving import Saver, due
from shoestring.training.schedule import Position, learning_rate, position
from shoestring.training.setup import Setup, forget
from shoestring.training.signals import Signals, StopWaiting, hold_saves
from shoestring.training.stage_data import check_settings
from shoestring.training.starting import scale_of_latents
from shoestring.training.step import StepResult
from shoestring.training.stores import check_classes, check_stages
from shoestring.training.trackers import check_trackers


class Run:
    """A training run in its folder.

    Args:
        config: what to do.
        folder: run folder; a run that was interrupted there goes on.
        console: where a person reads; silent on all ranks but the first.
        parallel: this process among those of the run.

    Raises:
        UserError: if configuration, data, device, ranks or folder do not fit together.
    """

    def __init__(self, config: RunConfig, folder: Path, console: Console, parallel: Parallel) -> None:
        self.config, self.folder, self.console, self.parallel = config, folder, console, parallel
        parallel.from_first(lambda: check_batches(config, parallel.ranks))
        self.counters = Counters()
        self.record = Record(console, parallel.rank, lambda: self.counters.nimg)
        self.setup = Setup(config, folder, console, parallel)
        self.codec: ImageCodec = build_codec(config.data, parallel.device)
        self.text_encoder: TextEncoder | None = None
        if config.model.condition == "text":
            self.text_encoder = build_text_encoder(config.data, parallel.device)
        parallel.from_first(lambda: check_settings(config, self.codec, self.text_encoder))
        quiet = Console(quiet=True)
        parallel.from_first(lambda: check_stages(config, self.codec, self.text_encoder, folder, quiet))
        self.quality = sample_quality(config, parallel)
        network = self.setup.network()  # before the data: a mistake in its file is told at once
        self.data = self.setup.data(config.stages[0], self.codec, self.text_encoder)
        measure = self.data.train.sigma_data
        self.sigma_data = parallel.from_first(lambda: scale_of_latents(config, folder, measure))
        self.learner = self.setup.learner(network, self.sigma_data)
        trained = Trained(self.learner.model, self.learner.optimizers, self.learner.averages)
        self.saver = Saver(Checkpoints(folder, trained, config, parallel), self.record.event)
        self.peak_flops = self.setup.peak_flops()
        self.guard = Guard(config.guard, self.counters.guard)
        self.watch = DataWatch(self.data.source, config.guard.stall_s, self.record.say_here)
        self.signals = Signals(parallel, console, self.watch.seconds)
        self._unread: list[tuple[Position, StepResult]] = []
        self._skipped, self._norm = 0, 0.0
        self.fitting = FittingSteps(self.setup, self.learner, self.record)

    # -- the loop ------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Train to the end, or to an interruption.

        Returns:
            True when all stages are done, False after Ctrl-C or SIGTERM (a checkpoint was written).

        Raises:
            TrainingFailed: if training diverges again and again.
            UserError: if the last checkpoint cannot be written.
        """
        self._resume()
        self.parallel.from_first(lambda: self.record.open(self.folder, self.config.logging))
        self._rate = Rate(self.counters.elapsed_s)
        try:
            with self.signals, LiveLine(self.console) as line:
                while (here := position(self.config, self.counters.nimg)) is not None:
                    self._enter_stage(here)
                    if self._step(here, line):
                        self._every_so_often(here)
                    asked = self.signals.agreed()
                    if asked.stop:
                        break
                    if asked.save:
                        self._save()
                if self._unread:
                    self._heed(self._read())
                self.counters.elapsed_s = self._rate.elapsed_s
                self.saver.save_at_last(self.counters, self._facts(), self.guard.bad_since)
        finally:
            self._close()
        if here is not None:
            say(
                self.console,
                f"Stopped at image {self.counters.nimg:,}; the same command goes on from there.",
            )
        return here is None

    def _close(self) -> None:
        self.record.close()
        self.data.close()
        self.learner.workers.close()
        self.saver.checkpoints.close()

    def _resume(self) -> None:
        """Go on from the newest checkpoint that is whole; others are set aside."""
        if self.parallel.first:
            self.saver.checkpoints.tidy()
        folders = self.parallel.from_first(lambda: checkpoint_folders(self.folder))
        for folder in reversed(folders):
            try:
                self._restore(folder)
            except Damaged as error:
                if folder == folders[0]:
                    raise self.parallel.mistake(
                        f"{error}, and none before it is whole; delete {self.folder} to train anew, or "
                        "choose another folder with --out"
                    ) from error
                self._set_aside(folder, error)
                continue
            say(self.console, f"Going on from image {self.counters.nimg:,} ({folder})")
            return
        say(self.console, self.saver.forecast(self.folder))

    def _set_aside(self, folder: Path, error: Damaged) -> None:
        say(self.console, f"{error}; it is set aside as {folder.name}.damaged")
        self.parallel.from_first(partial(aside, folder))

    def _restore(self, folder: Path) -> None:
        self.counters, facts = self.saver.checkpoints.restore(folder)
        self.guard = Guard(self.config.guard, self.counters.guard)
        self.learner.model.position_scale = facts["position_scale"]

    def _enter_stage(self, here: Position) -> None:
        """Whatever a stage needs that is not there yet; cheap when nothing changes."""
        stage = here.stage
        self.guard.enter(here)
        self.learner.model.position_scale = stage.position_scale
        if not self.data.serves(stage):
            self.data.close()
            classes = self.data.classes
            self.data = self.setup.data(stage, self.codec, self.text_encoder)
            self.parallel.from_first(lambda: check_classes(stage, self.data.classes, classes))
            self.watch.source = self.data.source
        self.fitting.enter(here, self.data, self.saver.held_bytes)
        if here.done_nimg == 0 and not stage.keep_optimizer:
            forget(self.learner.optimizers)

    def _step(self, here: Position, line: LiveLine) -> bool:
        """One step; false where the guard sent the run back, or where there was no batch to wait for."""
        stage, done, parallel = here.stage, here.done_nimg, self.parallel
        lr, ratio = learning_rate(stage, done) * self.guard.lr_scale, stage.mask_ratio_at(done)
        share = (self.guard.data_shift, parallel.rank, parallel.ranks)
        try:
            with self.watch:
                batch = self.data.batch(stage, here.start_nimg, self.counters.nimg, *share)
        except StopWaiting:
            return False
        result = self.fitting.step(batch, lr, ratio, here)
        self.counters.nimg += stage.batch
        self.counters.step += 1
        self.counters.training_flops += stage.batch * self.data.flops(ratio)
        self._unread.append((here, result))
        logged = self._crossed(self.config.logging.log_nimg, stage.batch) or self._last(here)
        if not (logged or parallel.device.type == "cpu"):  # a device is not waited for
            return True
        verdict = self._read()
        row = self._row(here, lr, ratio)
        left = (self.config.nimg - self.counters.nimg) / max(row["images_per_s"], 1e-9)
        line.show(status_line(row, self.config.nimg, left))
        if logged:
            with self._rate.paused():
                load = beside.expert_load(self.learner, batch, here)
            self.record.row("train", row | ({"expert_load": load} if load else {}))
            self._rate.reset()
            self._skipped, self.watch.waited_s = 0, 0.0
        return self._heed(verdict)

    # -- the guard -----------------------------------------------------------------------------------------

    def _read(self) -> Verdict:
        """Bring the results of the steps since the last time to the host, and let the guard look at them."""
        losses = [float(result.loss) for _, result in self._unread]
        norms = [float(result.norm) for _, result in self._unread]
        broken: dict[int, list[str]] = {}
        for (here, _), loss, norm in zip(self._unread, losses, norms, strict=True):
            finite = math.isfinite(loss + norm)
            self._rate.step(here.stage.batch, loss if finite else self._rate.loss)
            if not finite:
                self._skipped += 1
                broken[here.start_nimg + here.done_nimg] = self._broken_records(here)
        self._unread.clear()
        self._norm = norms[-1]
        return self.guard.observe(self.counters.nimg, losses, norms, broken)

    def _broken_records(self, here: Position) -> list[str]:
        """The records of a step that hold NaN or infinity, of all ranks' shares."""
        parallel, nimg = self.parallel, here.start_nimg + here.done_nimg
        mine = self.data.broken(
            here.stage, here.start_nimg, nimg, self.guard.data_shift, parallel.rank, parallel.ranks
        )
        return [name for part in parallel.gathered(mine) for name in part]

    def _heed(self, verdict: Verdict) -> bool:
        """Do what the guard decides: false where the run went back, ``TrainingFailed`` where it gives up."""
        if verdict.text is not None:
            self.record.event(verdict.what or verdict.action, verdict.text)
        if verdict.action == "go":
            return True
        self.saver.finish()
        folders = self.parallel.from_first(lambda: checkpoint_folders(self.folder))
        by_nimg = {int(folder.name): folder for folder in folders}
        if verdict.action == "stop":
            place = self.guard.good_checkpoint(sorted(by_nimg))
            good = str(by_nimg[place]) if place else None  # nothing is learned at image 0
            if self.parallel.first:
                write_text(self.folder / "report-divergence.txt", self.guard.report(good))
            raise TrainingFailed(self.guard.last_words(good))
        self._go_back(by_nimg)
        return False

    def _go_back(self, by_nimg: dict[int, Path]) -> None:
        """To the newest checkpoint that is good and whole, else to the beginning; newer ones are no use."""
        guard, before = self.guard, None
        while (place := guard.good_checkpoint(sorted(by_nimg))) is not None:
            try:
                self._restore(by_nimg[place])
            except Damaged as error:
                self._set_aside(by_nimg.pop(place), error)
                continue
            before = self.counters.guard
            break
        else:
            self.setup.begin_anew(self.learner)
            self.counters = Counters(elapsed_s=self._rate.elapsed_s)
        text = guard.rolled_back(before, "the beginning" if place is None else str(by_nimg[place]))
        self.counters.guard, self.guard = guard.state, guard
        # Noted at once: killed now, the run must not go the same way again.
        if place is not None:
            self._note_state_of_guard(by_nimg[place])
        newer = [by_nimg[nimg] for nimg in sorted(by_nimg) if place is None or nimg > place]
        self.parallel.from_first(lambda: discard(newer))
        if place is None:
            self.saver.save(self.counters, self._facts())
            self.saver.finish()
        self._rate.reset()
        self.record.event("rolled-back", text)

    def _note_state_of_guard(self, folder: Path) -> None:
        """In the checkpoint that the run went back to."""
        state = asdict(self.guard.state)
        try:
            self.parallel.from_first(lambda: amend_counters(folder, guard=state))
        except UserError as error:
            self.record.event("not-saved", f"{error}; if it is interrupted now, the run diverges once more")

    def _name_dead_parameters(self, here: Position) -> None:
        """Say which parameters never had a gradient, once, a few steps in."""
        if self.counters.step != self.config.guard.dead_step:
            return
        state, tokens = self.learner.optimizers.tensors(), self.config.tokens
        sentence = never_learned(state, self.parallel.total, self.counters.step, here.stage, tokens)
        if sentence is not None:
            self.record.event("dead-parameters", sentence)

    # -- what is written down ------------------------------------------------------------------------------

    def _row(self, here: Position, lr: float, ratio: float) -> dict[str, Any]:
        rate, device = self._rate.images_per_s, self.parallel.device
        self.counters.elapsed_s = self._rate.elapsed_s
        row = {
            "nimg": self.counters.nimg,
            "step": self.counters.step,
            "stage": here.stage.name,
            "loss": self._rate.loss,
            "lr": lr,
            "mask_ratio": ratio,
            "grad_norm": self._norm,
            "images_per_s": rate,
            "peak_share": self.data.flops(ratio) * rate / self.peak_flops,
            "elapsed_s": self.counters.elapsed_s,
            "cost_usd": self.counters.elapsed_s / 3600 * self.config.logging.usd_per_hour,
            "training_flops": self.counters.training_flops,
            "data_wait_share": self.watch.waited_s / max(self._rate.stretch_s, 1e-9),
            "skipped": self._skipped,
        }
        if device.type == "cuda":
            row["memory_bytes"] = torch.cuda.max_memory_allocated(device)
        return row

    def _crossed(self, interval: int, batch: int) -> bool:
        """Whether the last step crossed a multiple of ``interval`` images."""
        return self.counters.nimg // interval > (self.counters.nimg - batch) // interval

    def _last(self, here: Position) -> bool:
        """Whether the last step was the last of its stage."""
        return here.done_nimg + here.stage.batch >= here.stage.steps * here.stage.batch

    # -- every so often ------------------------------------------------------------------------------------

    def _every_so_often(self, here: Position) -> None:
        logging, batch, last = self.config.logging, here.stage.batch, self._last(here)
        with self._rate.paused():
            self._name_dead_parameters(here)
            if last or self._crossed(logging.validate_nimg, batch):
                row = beside.validate(self.learner, self.data, logging.validation_images)
                self.record.row("validation", {"stage": here.stage.name, **row})
            if last or self._crossed(logging.sample_nimg, batch):
                self._sample()
            if self.quality is not None and (last or self._crossed(self.quality.interval, batch)):
                row = self.quality.measure(self.learner, self.data, self._pipeline())
                if row:
                    self.record.row("evaluation", {"stage": here.stage.name, **row})
                elif self.parallel.first:
                    self.record.event("no-kid", "no KID: fewer than four pictures to compare with")
            wanted, milestone = due(logging, self.counters.nimg, batch, last)
            if wanted:
                self._save(keep_forever=milestone)

    def _sample(self) -> None:
        with self.record.unless_full():
            path = beside.sample_grid(self.learner, self._pipeline(), self.data, self.folder / "progress")
            self.record.picture("samples", path)

    def _pipeline(self) -> Pipeline:
        return beside.pipeline_of(
            self.learner, self.config, self.data, self.codec, self.text_encoder, self.counters.nimg
        )

    def _facts(self) -> dict[str, Any]:
        return {
            "sigma_data": self.sigma_data,
            "position_scale": self.learner.model.position_scale,
            "resolution": self.data.resolution,
            "classes": self.data.classes,
        }

    def _save(self, keep_forever: bool = False) -> None:
        if self._unread and not self._heed(self._read()):  # the guard must have seen what is saved
            return
        self.counters.elapsed_s = self._rate.elapsed_s
        self.saver.save(self.counters, self._facts(), keep_forever, self.guard.bad_since)


def train(config: RunConfig, folder: Path, console: Console, allow_changes: bool = False) -> bool:
    """Train in a folder: start, or go on where an earlier try ended. All processes of a run call this.

    Args:
        config: what to do.
        folder: run folder.
        console: where a person reads.
        allow_changes: go on although settings that may change have changed.

    Returns:
        True when the run is complete, False after an interruption.

    Raises:
        UserError: for mistakes in configuration, data or folder.
        TrainingFailed: if training diverges and nothing helps.
    """
    hold_saves()
    check_trackers(config.logging)
    follow_launcher()
    parallel = Parallel(config.parallel, config.device)
    if not parallel.first:
        console = Console(quiet=True)
    with ExitStack() as stack:
        stack.callback(parallel.close)

        def prepare() -> None:
            stack.enter_context(claimed(folder, config, console, allow_changes))

        parallel.from_first(prepare)
        return Run(config, folder, console, parallel).train()
