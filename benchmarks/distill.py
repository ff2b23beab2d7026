"""Four steps of a student against four steps of its teacher, for the demo's kind of model.

``python benchmarks/distill.py runs/demo`` distils the run (``shoestring adapt distill``, some seeds), then
draws the training captions with every student and, undistilled, with several samplers, scales of guidance and
grids of noise levels at the same number of steps, and with the teacher at 18. It prints KID and retrieval,
mean and spread over seeds, and what the teacher needs to be as good. Interrupted, the same command goes on.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shoestring.config import SamplingConfig
from shoestring.evaluation.distances import KernelReference
from shoestring.evaluation.features import EfficientNetLite0Features
from shoestring.evaluation.retrieval import retrieval
from shoestring.runtime import keep_freed_memory
from shoestring.sampling.generate import Pipeline, batches, load_pipeline
from shoestring.training.stage_data import real_pictures

AT_ONCE, PIECE = 100, 50
NOISE_SEEDS = (1, 2)
TEACHERS = 18
TABLE = (80.0, 4.0, 0.8, 0.15, 0.1)
"""Four noise-to-signal ratios found for the demo model, and one that counts as zero (EXPERIMENTS.md)."""


@dataclass(frozen=True)
class Figures:
    """Of one way of drawing, one value a noise seed."""

    kid: tuple[float, ...]
    top5: tuple[float, ...]


class Measure:
    """Draws the training captions and measures.

    Args:
        pipeline: whose data are looked at.
        count: captions.
        folder: where the data are kept.
    """

    def __init__(self, pipeline: Pipeline, count: int, folder: Path) -> None:
        splits = real_pictures(pipeline.config, pipeline.config.stages[-1], pipeline.codec, folder)
        self.captions = list(splits.train.captions)[:count]
        number = {caption: i for i, caption in enumerate(dict.fromkeys(self.captions))}
        self.numbers = [number[caption] for caption in self.captions]
        self.extractor = EfficientNetLite0Features()
        self.features = self.extractor(splits.train.images[:count])
        self.reference = KernelReference(self.features)

    def __call__(self, pipeline: Pipeline, sampling: SamplingConfig) -> Figures:
        """Draw and compare."""
        kids, top5s = [], []
        for seed in NOISE_SEEDS:
            parts = batches(len(self.captions), AT_ONCE)
            drawn = [
                pipeline.draw([self.captions[i] for i in part], seed, part, sampling, piece=PIECE)
                for part in parts
            ]
            made = self.extractor(torch.cat(drawn))
            kids.append(self.reference.compare(made).value)
            found = retrieval(made, self.numbers, self.features, self.numbers, near_copies=0)
            top5s.append(found.top5)
        return Figures(tuple(kids), tuple(top5s))


def shown(name: str, figures: Sequence[Figures]) -> str:
    """A line of the table: mean and largest difference over all seeds."""
    kids = [value for each in figures for value in each.kid]
    tops = [value for each in figures for value in each.top5]
    return (
        f"{name:58} KID {statistics.mean(kids):.4f} ({max(kids) - min(kids):.4f})   top-5 "
        f"{statistics.mean(tops):.3f} ({max(tops) - min(tops):.3f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("teacher", type=Path, nargs="?", default=Path("runs/demo"))
    parser.add_argument("--method", default="progressive", choices=("consistency", "codi", "progressive"))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--first-steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--nimg", type=int, default=38_400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--captions", type=int, default=420)
    parser.add_argument("--out", type=Path, default=Path("runs/distill"))
    parser.add_argument("changes", nargs="*", help="settings of the recipe")
    options = parser.parse_args()
    keep_freed_memory()
    for seed in range(options.seeds):
        command = [sys.executable, "-m", "shoestring.cli", "adapt", "distill", str(options.teacher)]
        command += ["--method", options.method, "--steps", str(options.steps), "--nimg", str(options.nimg)]
        command += ["--batch", str(options.batch), "--lr", str(options.lr), f"seed={seed}"]
        if options.method != "codi":
            command += ["--guidance", str(options.guidance)]
        if options.method == "progressive":
            command += ["--first-steps", str(options.first_steps)]
        table = ",".join(map(str, TABLE))
        command += ["sampling.spacing=table", f"sampling.sigmas=[{table}]", *options.changes]
        command += ["--out", str(options.out / f"{options.method}-{seed}")]
        if subprocess.run(command, check=False).returncode:
            sys.exit(1)

    device = torch.device("cpu")
    teacher = load_pipeline(options.teacher, device)
    measure = Measure(teacher, options.captions, options.out)
    print(f"{len(measure.captions)} captions, noise seeds {NOISE_SEEDS}; mean (largest difference)")
    students = []
    for seed in range(options.seeds):
        student = load_pipeline(options.out / f"{options.method}-{seed}", device)
        students.append(measure(student, student.config.sampling))
    print(shown(f"{options.method}, {options.steps} steps, {options.seeds} students", students), flush=True)
    # The half of the steps with guidance's two passes cost what the student's steps cost.
    for steps in dict.fromkeys((options.steps, max(1, options.steps // 2))):
        for spacing, sigmas in (("auto", None), ("table", TABLE)):
            for sampler in ("ddim", "dpmpp-2m"):
                for guidance in (1.0, 1.5, 2.0, 3.0):
                    sampling = SamplingConfig(
                        sampler=sampler, steps=steps, guidance=guidance, spacing=spacing, sigmas=sigmas
                    )
                    grid = "EDM's levels" if sigmas is None else "the table"
                    name = f"undistilled, {sampler} {steps}, guidance {guidance:g}, {grid}"
                    print(shown(name, [measure(teacher, sampling)]), flush=True)
    for steps in (options.steps, 8, 12, TEACHERS):
        sampling = SamplingConfig(sampler="ddim", steps=steps, guidance=options.guidance)
        name = f"teacher, ddim {steps}, guidance {options.guidance:g}, EDM's levels"
        print(shown(name, [measure(teacher, sampling)]), flush=True)


if __name__ == "__main__":
    main()
