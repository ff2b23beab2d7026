"""What a checkpoint costs the training: written beside the steps, against waiting until it is on the disk.

    python benchmarks/checkpoint_stall.py [--model tiny2] [--batch 32] [--mask 0.75] [--saves 3]

Per round: plain steps; a save that is waited for (copy, write, model files, digests, fsync, renaming); a save
beside which steps go on until it is complete. Two numbers are compared with the blocking save: for how long
the step is held (the tensors are copied), and all time that is lost until the checkpoint is complete, as
writing takes a share of the cores and of the memory's bandwidth. The bar is for the time that the step is
held.
"""

from __future__ import annotations

import os

# Before torch is imported: busy waiting collapses when anything else runs on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from shoestring.config import (
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    StageConfig,
    TokensConfig,
    TransformerConfig,
)
from shoestring.diffusion.process import EDMProcess
from shoestring.models.microdit import MicroDiT
from shoestring.runtime import Workers, default_workers, keep_freed_memory
from shoestring.training.checkpoint import Checkpoints, Counters, Trained
from shoestring.training.parallel import Parallel
from shoestring.training.saving import Saver
from shoestring.training.schedule import Position
from shoestring.training.step import Learner, TrainingBatch, train_step
from train_step import EMA_DECAY, LEARNING_RATE, MODELS, SIGMA_DATA, make_batch

BAR = 0.35
FACTS = {"sigma_data": SIGMA_DATA, "position_scale": 1.0, "resolution": 256}


def build_learner(config: TransformerConfig, workers: int, parallel: Parallel) -> Learner:
    """A network without zeros, and what trains it in bf16."""
    generator = torch.Generator().manual_seed(0)
    model = MicroDiT(config)
    model.initialize(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02, generator=generator)
    return Learner.build(
        model,
        TokensConfig(),
        EDMProcess(SIGMA_DATA),
        OptimizerConfig(),
        Workers(workers),
        parallel,
        precision=torch.bfloat16,
    )


def step_s(learner: Learner, batch: TrainingBatch, whole: int, micro_batch: int, mask: float) -> float:
    """Seconds of a training step.

    Args:
        learner: what is trained.
        batch: this process's share.
        whole: images of all processes.
        micro_batch: images at once.
        mask: share of patches dropped.

    Returns:
        Wall time.
    """
    stage = StageConfig(
        name="benchmark", nimg=1, batch=whole, lr=LEARNING_RATE, clip_norm=0.25, ema_decay=EMA_DECAY
    )
    start = time.perf_counter()
    train_step(learner, batch, micro_batch, LEARNING_RATE, mask, Position(0, stage, 0, 0, 0)).loss.item()
    return time.perf_counter() - start


class Stall:
    """A learner, its batch and its checkpoints."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        workers = options.workers or default_workers(torch.device("cpu"))
        self.parallel = Parallel(ParallelConfig(), "cpu")
        model = MODELS[options.model]()
        self.learner = build_learner(model, workers, self.parallel)
        self.batch = make_batch(model, options.batch, torch.Generator().manual_seed(1))
        stage = StageConfig(name="benchmark", nimg=1, batch=options.batch, lr=LEARNING_RATE)
        config = RunConfig(name="benchmark", model=model, stages=(stage,))
        trained = Trained(self.learner.model, self.learner.optimizers, self.learner.averages)
        self.checkpoints = Checkpoints(folder, trained, config, self.parallel)
        self.bytes = Saver(self.checkpoints, lambda *_: None).bytes
        self.mask, self.counters = options.mask, Counters()

    def step(self) -> float:
        """Seconds of a step."""
        return step_s(self.learner, self.batch, len(self.batch.x0), len(self.batch.x0), self.mask)

    def begin(self) -> Path:
        """Begin a save; the folder appears when it is complete."""
        self.counters.nimg += 1
        self.checkpoints.save(self.counters, FACTS)
        return self.checkpoints.run / "checkpoints" / f"{self.counters.nimg:09d}"

    def blocking_s(self) -> float:
        """Seconds of a save that is waited for."""
        start = time.perf_counter()
        self.begin()
        self.checkpoints.wait()
        return time.perf_counter() - start

    def beside_s(self, usual_s: float) -> tuple[float, float]:
        """Seconds that a save holds the step, and that it costs until it is complete, beside steps."""
        start = time.perf_counter()
        place = self.begin()
        held = time.perf_counter() - start
        steps = 0
        while not place.exists():
            self.step()
            steps += 1
        lost = time.perf_counter() - start - steps * usual_s
        self.checkpoints.wait()
        return held, lost


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Time checkpoints: beside the steps against blocking.")
    parser.add_argument("--model", choices=MODELS, default="tiny2")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--mask", type=float, default=0.75)
    parser.add_argument("--steps", type=int, default=3, help="plain steps of a round")
    parser.add_argument("--saves", type=int, default=3, help="rounds")
    parser.add_argument("--workers", type=int, help="threads that share a batch; default one a core")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        stall = Stall(options, folder)
        stall.step()
        rows = []
        for _ in range(options.saves):
            usual = statistics.median(stall.step() for _ in range(options.steps))
            blocking = stall.blocking_s()
            rows.append((usual, blocking, *stall.beside_s(usual)))
            print("step {:.3f} s, blocking {:.3f}, held {:.3f}, lost {:.3f}".format(*rows[-1]), flush=True)
    finally:
        shutil.rmtree(folder)
    usual, blocking, held, lost = (statistics.median(column) for column in zip(*rows, strict=True))
    verdict = "met" if held <= BAR * blocking else "missed"
    print(
        f"\n{options.model}, a checkpoint of {stall.bytes / 1e6:,.0f} MB, step of {usual:.3f} s\n"
        f"blocking save with fsync        {blocking:7.3f} s\n"
        f"beside the steps: step is held  {held:7.3f} s  {held / blocking:6.1%}  bar {BAR:.0%}: {verdict}\n"
        f"beside the steps: lost in all   {lost:7.3f} s  {lost / blocking:6.1%}"
    )


if __name__ == "__main__":
    main()
