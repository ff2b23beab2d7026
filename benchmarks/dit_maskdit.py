"""Time and memory of a training step: DiT on all patches against MaskDiT on half of them.

``python benchmarks/dit_maskdit.py`` measures B/2 at batch 16 on latents of side 32. A step of either side is
``shoestring.training.step.train_step``: forward, loss, backward, clip, fused AdamW and EMA, at the same
precision. They take turns step by step in one process, on the same batches; medians are compared. Peak
memory is that of a process of its own for each side, in which nothing else runs.

* DiT: the dense network, no decoder.
* MaskDiT: mask 0.5, decoder of 8 blocks on all patches, reconstruction term 0.1.

The published figures below the table are of XL/2 on 8 GPUs, with the official DiT and MDT in TF32.
"""

from __future__ import annotations

import os

# Before torch is imported: busy waiting collapses when anything else runs on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from shoestring.config import OptimizerConfig, StageConfig, TokensConfig, TransformerConfig
from shoestring.diffusion.process import EDMProcess
from shoestring.interfaces import Conditioning
from shoestring.models.files import FAMILIES
from shoestring.planning import measured_peak_flops, model_flops
from shoestring.recipes import maskdit
from shoestring.runtime import (
    PRECISIONS,
    Workers,
    default_workers,
    keep_freed_memory,
    pick_device,
    stream,
    write_text,
)
from shoestring.training.compiling import compile_blocks
from shoestring.training.schedule import Position
from shoestring.training.step import Learner, TrainingBatch, part_sizes, train_step
from shoestring.training.step_shapes import StepShape

SIDE = 32
SIGMA_DATA = 0.5
LEARNING_RATE = 1e-4
EMA_DECAY = 0.9999
STEPS_FOR_MEMORY = 2
Step = Callable[[TrainingBatch], float]


@dataclass(frozen=True)
class Kind:
    """One side."""

    name: str
    network: Callable[..., TransformerConfig]
    tokens: TokensConfig
    masked: bool


SIDES = {
    "dit": Kind("DiT", maskdit.dit, maskdit.DENSE, masked=False),
    "maskdit": Kind("MaskDiT", maskdit.maskdit, maskdit.MASKDIT, masked=True),
}


@dataclass(frozen=True)
class Row:
    """One line of the result."""

    side: str
    origin: str
    """``measured`` here, or ``published`` with the source."""
    model: str
    batch: int
    mask: float
    precision: str
    steps_per_s: float
    speed_ratio: float
    """Steps per second over those of DiT in the same row group."""
    peak_gb: float | None = None
    """Of the whole process (CPU) or of the device (GPU); published: GB a GPU."""
    memory_ratio: float | None = None
    gflop_per_image: float | None = None
    """Needed for forward and backward."""
    share_of_peak: float | None = None
    """FLOP/s over the best matrix product of that precision in the same run."""


PUBLISHED_SOURCE = "published: bar charts of the MaskDiT project page, read off by pixel (1 to 2 %)"
# mask, precision, then (steps per second, GB a GPU) by batch; XL/2 at 256 pixels, 8 GPUs
PUBLISHED: tuple[tuple[str, float, str, dict[int, tuple[float, float]]], ...] = (
    ("DiT", 0.0, "tf32", {256: (2.24, 39.4), 1024: (0.61, 109.0)}),
    ("MDT (published)", 0.0, "tf32", {256: (1.21, 78.2), 1024: (0.33, 255.0)}),
    ("MaskDiT", 0.5, "tf32", {256: (4.35, 28.3), 1024: (1.35, 65.0)}),
    ("MaskDiT", 0.5, "fp16", {256: (5.70, 25.8), 1024: (2.16, 49.0)}),
)
"""Bars above 80 GB a GPU are extrapolated by the authors."""


def published_rows() -> list[Row]:
    """The published figures, as ratios to the official DiT."""
    rows = []
    for batch in (256, 1024):
        speed, memory = PUBLISHED[0][3][batch]
        for name, mask, precision, figures in PUBLISHED:
            own_speed, own_memory = figures[batch]
            rows.append(
                Row(
                    side=name,
                    origin=PUBLISHED_SOURCE,
                    model="XL/2",
                    batch=batch,
                    mask=mask,
                    precision=precision,
                    steps_per_s=own_speed,
                    speed_ratio=own_speed / speed,
                    peak_gb=own_memory,
                    memory_ratio=own_memory / memory,
                )
            )
    return rows


def make_batch(model: TransformerConfig, size: int, seed: int, device: torch.device) -> TrainingBatch:
    """Random latents, classes and draws; the same for both sides."""
    generator = stream(seed, "benchmark")

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    shape = (size, model.in_channels, SIDE, SIDE)
    patches = (SIDE // model.patch_size) ** 2
    return TrainingBatch(
        x0=SIGMA_DATA * normal(*shape),
        conditioning=Conditioning(
            class_B=torch.randint(model.classes, (size,), generator=generator).to(device)
        ),
        noise=normal(*shape),
        level_B=normal(size),
        mask_BL=torch.rand(size, patches, generator=generator).to(device),
    )


def build(options: argparse.Namespace, side: str, device: torch.device) -> Step:
    """A side's network, initialised, and its step."""
    kind = SIDES[side]
    model = kind.network(options.size, options.patch)
    network = FAMILIES[model.kind](model, kind.tokens)
    network.initialize(torch.Generator().manual_seed(0))
    network.to(device)
    process = EDMProcess(SIGMA_DATA)
    workers = Workers(options.workers if options.workers is not None else default_workers(device))
    mask_ratio = options.mask if kind.masked else 0.0
    if options.compile:
        sizes = part_sizes(options.batch, options.micro_batch or options.batch, workers.count)
        grid = (SIDE // options.patch,) * 2
        compile_blocks(network, kind.tokens, [StepShape(n, grid, mask_ratio) for n in sorted(sizes)])
    optimizer = OptimizerConfig(weight_decay=0.0)
    precision = PRECISIONS[options.precision]
    learner = Learner.build(network, kind.tokens, process, optimizer, workers, precision=precision)

    def step(batch: TrainingBatch) -> float:
        size = len(batch.x0)
        stage = StageConfig(name="benchmark", nimg=1, batch=size, lr=LEARNING_RATE, ema_decay=EMA_DECAY)
        here, micro = Position(0, stage, 0, 0, 0), options.micro_batch or size
        return train_step(learner, batch, micro, LEARNING_RATE, mask_ratio, here).loss.item()

    return step


def timed(step: Step, batch: TrainingBatch, device: torch.device) -> float:
    """Seconds of one step; it ends by reading the loss, for which a GPU has to be done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start_s = time.perf_counter()
    step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start_s


def peak_here(options: argparse.Namespace, device: torch.device) -> float:
    """Peak memory in GB of some steps of ``options.only``; to be called in a fresh process."""
    step = build(options, options.only, device)
    model = SIDES[options.only].network(options.size, options.patch)
    for i in range(STEPS_FOR_MEMORY):
        step(make_batch(model, options.batch, i, device))
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def peak_elsewhere(arguments: Sequence[str], side: str) -> float:
    """Peak memory in GB of a side, in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--only", side]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the process that measures the memory of {side} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["peak_gb"])


def measure(options: argparse.Namespace, arguments: Sequence[str], device: torch.device) -> list[Row]:
    """Run everything and print as it goes."""
    memory = {side: peak_elsewhere(arguments, side) for side in SIDES}
    print(", ".join(f"{SIDES[side].name} {gb:.2f} GB" for side, gb in memory.items()), flush=True)
    steps = {side: build(options, side, device) for side in SIDES}
    model = SIDES["dit"].network(options.size, options.patch)
    dtype = PRECISIONS[options.precision]
    peak = measured_peak_flops(device, dtype)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for i in range(options.warmup + options.steps):
        batch = make_batch(model, options.batch, i, device)
        for side in SIDES if i % 2 == 0 else reversed(SIDES):
            seconds = timed(steps[side], batch, device)
            if i >= options.warmup:
                times[side].append(seconds)
        print(".", end="", flush=True)
    print()
    # Clocks wander: the best of before and after is the peak.
    peak = max(peak, measured_peak_flops(device, dtype))
    grid = (SIDE // options.patch,) * 2
    rows = []
    for side, kind in SIDES.items():
        mask = options.mask if kind.masked else 0.0
        seconds = statistics.median(times[side])
        config = kind.network(options.size, options.patch)
        flops = model_flops(config, grid, 0, mask, kind.tokens).training
        rows.append(
            Row(
                side=kind.name,
                origin="measured",
                model=f"{options.size}/{options.patch}",
                batch=options.batch,
                mask=mask,
                precision=options.precision,
                steps_per_s=1 / seconds,
                speed_ratio=1.0,
                peak_gb=memory[side],
                memory_ratio=1.0,
                gflop_per_image=flops / 1e9,
                share_of_peak=options.batch * flops / seconds / peak,
            )
        )
    base = rows[0]
    return [
        replace(
            row,
            speed_ratio=row.steps_per_s / base.steps_per_s,
            memory_ratio=memory[side] / memory["dit"],
        )
        for side, row in zip(SIDES, rows, strict=True)
    ]


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    print("\nside              model  batch  mask  precision   steps/s    ratio   peak GB    ratio", end="")
    print("  GFLOP/image  of peak")
    origin = ""
    for row in rows:
        if row.origin != origin:
            origin = row.origin
            print(f"-- {origin}")
        line = (
            f"{row.side:<17} {row.model:<6} {row.batch:>5} {row.mask:>5} {row.precision:>10} "
            f"{row.steps_per_s:>9.3f} {row.speed_ratio:>7.2f}x"
        )
        if row.peak_gb is not None and row.memory_ratio is not None:
            line += f" {row.peak_gb:>9.2f} {row.memory_ratio:>7.2f}x"
        if row.gflop_per_image is not None and row.share_of_peak is not None:
            line += f" {row.gflop_per_image:>12.1f} {row.share_of_peak:>8.1%}"
        print(line)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description="Time and memory of a step: DiT against MaskDiT.")
    parser.add_argument("--size", choices=maskdit.SIZES, default="B")
    parser.add_argument("--patch", type=int, choices=(2, 4, 8), default=2, help="side of a patch in latents")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, help="images at once; default the whole batch")
    parser.add_argument("--mask", type=float, default=0.5, help="share of patches that MaskDiT drops")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of both sides")
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each side")
    parser.add_argument("--warmup", type=int, default=2, help="steps before, not timed")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--workers", type=int, help="threads that share a batch; default as in a run")
    parser.add_argument("--threads", type=int, help="default: as many as torch takes")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--only", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    device = pick_device(options.device)
    if options.only is not None:
        print(json.dumps({"peak_gb": peak_here(options, device)}))
        return
    rows = [*measure(options, arguments, device), *published_rows()]
    show(rows)
    if options.json is not None:
        write_text(options.json, json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
