"""Does a training step become as much shorter as its FLOPs become fewer? Dense against masked, in turns.

``python benchmarks/step_follows_flops.py`` times ``tiny2`` (deferred masking) at batch 32 without a mask and
with three quarters of the patches dropped, in turns and in one process, and compares t(0) / t(0.75) with
F(0) / F(0.75), where F is ``planning.model_flops``. Their quotient would be 1 if time followed the FLOPs;
what is lost goes into layers that count no FLOPs, smaller products and the optimiser. The bar is 0.85.

A step is that of a run: see ``train_step.py``, from which model, data and step come.
"""

from __future__ import annotations

import os

# Before torch is imported: busy waiting collapses when anything else runs on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from shoestring.planning import model_flops
from shoestring.runtime import default_workers, keep_freed_memory, write_text
from train_step import CAPTION_TOKENS, CPU, MODELS, SIDE, build_ours, make_batch, step_shapes, timed

BAR = 0.85


@dataclass(frozen=True)
class Result:
    """What was measured and counted. Seconds are medians of a step."""

    model: str
    batch: int
    mask: float
    dense_s: float
    masked_s: float
    time_ratio: float
    flops_ratio: float
    quotient: float
    """Time ratio over FLOP ratio."""
    steps: int
    workers: int
    compiled: bool


def measure(options: argparse.Namespace) -> Result:
    """Time both kinds of step in turns."""
    config = MODELS[options.model]()
    workers = options.workers if options.workers is not None else default_workers(CPU)
    shapes = step_shapes([options.batch], [0.0, options.mask], workers, SIDE // config.patch_size)
    _, step = build_ours(config, options.compile, workers, shapes)
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for i in range(options.warmup + options.steps):
        batch = make_batch(config, options.batch, generator)
        dense_s, _ = timed(step, batch, 0.0)
        masked_s, _ = timed(step, batch, options.mask)
        if i >= options.warmup:
            pairs.append((dense_s, masked_s))
            print(f"step {len(pairs)}: dense {dense_s:.3f} s, masked {masked_s:.3f} s", flush=True)
    dense_s, masked_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    grid = (SIDE // config.patch_size,) * 2
    dense, masked = (model_flops(config, grid, CAPTION_TOKENS, mask).training for mask in (0.0, options.mask))
    return Result(
        model=options.model,
        batch=options.batch,
        mask=options.mask,
        dense_s=dense_s,
        masked_s=masked_s,
        time_ratio=dense_s / masked_s,
        flops_ratio=dense / masked,
        quotient=dense_s / masked_s / (dense / masked),
        steps=options.steps,
        workers=workers,
        compiled=options.compile,
    )


def show(result: Result) -> None:
    """Print the figures."""
    seconds, met = f"{result.dense_s:.3f} s / {result.masked_s:.3f} s", result.quotient >= BAR
    print(
        f"\n{result.model}, batch {result.batch}, mask 0 against {result.mask:g}, medians of {result.steps}"
    )
    print(f"time of a step   {result.time_ratio:.3f} (measured: {seconds})")
    print(f"training FLOPs   {result.flops_ratio:.3f} (counted)")
    print(f"quotient         {result.quotient:.3f} (bar {BAR}: {'met' if met else 'missed'})")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description="Compare times and FLOPs of dense and masked steps.")
    parser.add_argument("--model", choices=MODELS, default="tiny2")
    parser.add_argument("--batch", type=int, default=32, help="batch size")
    parser.add_argument("--mask", type=float, default=0.75, help="mask ratio of the masked step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each kind")
    parser.add_argument("--warmup", type=int, default=2, help="steps before, not timed")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--workers", type=int, help="threads that share a batch; default one a core")
    parser.add_argument("--threads", type=int, help="default: as many as torch takes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    result = measure(options)
    show(result)
    if options.json is not None:
        write_text(options.json, json.dumps(asdict(result), indent=2) + "\n")


if __name__ == "__main__":
    main()
