"""Super-resolution 4x: what fine-tuning a trained model gives over bicubic enlargement.

``python benchmarks/superres.py BASE`` fine-tunes a model of 32-pixel pictures to enlarge 8 pixels to
32 (``shoestring adapt superres``), then draws held-out pictures eight times each and prints, beside
bicubic enlargement: FD on EfficientNet-Lite0, PSNR, PSNR of the output made small again to the input, and
PSNR of the mean of the eight. Interrupted, the same command goes on. A grid lies in the run folder.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from shoestring.data.degradation import degrade, enlarged
from shoestring.evaluation.distances import frechet_distance
from shoestring.evaluation.features import EfficientNetLite0Features
from shoestring.evaluation.paired import psnr
from shoestring.runtime import keep_freed_memory
from shoestring.sampling.generate import batches, load_pipeline, picture_grid, save_png
from shoestring.sampling.lowres import made_small
from shoestring.training.stage_data import real_pictures

REPEATS, AT_ONCE, SHOWN = 8, 100, 10


def small_again(pictures: Tensor, factor: int) -> Tensor:
    """Bicubic, as the inputs were made."""
    return torch.stack([degrade(picture, factor, "bicubic", 0, 0) for picture in pictures])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "base", type=Path, nargs="?", default=Path("runs/demo"), help="model of 32-pixel pictures"
    )
    parser.add_argument("--nimg", type=int, default=30_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--count", type=int, default=500, help="held-out pictures")
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/superres"))
    parser.add_argument("changes", nargs="*", help="settings of the recipe")
    options = parser.parse_args()
    keep_freed_memory()
    command = [sys.executable, "-m", "shoestring.cli", "adapt", "superres", str(options.base)]
    command += ["--degradation", "bicubic", "--nimg", str(options.nimg), "--batch", str(options.batch)]
    command += ["--lr", str(options.lr), "--out", str(options.out), f"seed={options.seed}", *options.changes]
    if subprocess.run(command, check=False).returncode:
        sys.exit(1)

    pipeline = load_pipeline(options.out, torch.device("cpu"))
    superres = pipeline.config.superres
    assert superres is not None
    splits = real_pictures(pipeline.config, pipeline.config.stages[-1], pipeline.codec, options.out)
    real = splits.held_out.images[: options.count]
    low = made_small(real, superres, 0, range(len(real)))
    sampling = pipeline.config.sampling.model_copy(update={"steps": options.steps, "guidance": 1.0})
    drawn = []
    for repeat in range(REPEATS):
        parts = batches(len(real), AT_ONCE)
        drawn.append(
            torch.cat(
                [pipeline.draw([""] * len(p), repeat, p, sampling, low=low[p.start : p.stop]) for p in parts]
            )
        )
    bicubic = enlarged(low, superres.factor)
    mean = torch.stack(drawn).double().mean(dim=0).round().to(torch.uint8)

    extractor = EfficientNetLite0Features()
    wanted = extractor(splits.train.images[:5_000])
    console = Console()
    print(f"{len(real)} held-out pictures, {sampling.sampler} {sampling.steps}; measured here")
    print(f"{'':12}{'FD':>8}{'PSNR':>8}{'PSNR small again':>18}")
    for name, pictures in (("bicubic", bicubic), ("one sample", drawn[0]), (f"mean of {REPEATS}", mean)):
        distance = frechet_distance(extractor(pictures), wanted)
        again = psnr(small_again(pictures, superres.factor), low)
        again = again[again.isfinite()].mean()
        print(f"{name:12}{distance:8.1f}{psnr(pictures, real).mean():8.2f}{again:18.2f}")
    rows = [low_shown(low[:SHOWN], superres.factor), bicubic[:SHOWN], drawn[0][:SHOWN], drawn[1][:SHOWN]]
    grid = picture_grid(torch.cat([*rows, mean[:SHOWN], real[:SHOWN]]), SHOWN, 3)
    save_png(options.out / "superres.png", grid, {"rows": "input, bicubic, two samples, their mean, real"})
    console.print(
        f"rows: input, bicubic, two samples, mean of {REPEATS}, real: {options.out / 'superres.png'}"
    )


def low_shown(low: Tensor, factor: int) -> Tensor:
    """Small pictures as large as the others, without smoothing."""
    return low.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)


if __name__ == "__main__":
    main()
