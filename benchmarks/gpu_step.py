"""The rows of ``train_step.py --device cuda``: ours alone, on one GPU."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoestring.interfaces import Conditioning
from shoestring.planning import measured_peak_flops, model_flops
from shoestring.training.step import TrainingBatch
from train_step import CAPTION_TOKENS, MODELS, SIDE, build_ours, make_batch, step_shapes, timed

GPU_BATCH = {"tiny2": 256, "xl2": 256}
"""Images at once at mask 0.75."""


@dataclass(frozen=True)
class GPURow:
    """Ours on a GPU; ``None`` = not measured."""

    model: str
    batch: int
    mask: float
    images_per_s: float | None = None
    share_of_peak: float | None = None
    """FLOPs needed per second over the best bf16 matrix product there, in the same run."""
    memory_gb: float | None = None
    device: str | None = None


def measure_gpu(options: argparse.Namespace) -> list[GPURow]:
    """Ours alone, on one GPU."""
    if not torch.cuda.is_available():
        return [GPURow(name, GPU_BATCH[name], mask) for name in options.model for mask in options.mask]
    device, rows = torch.device("cuda"), []
    peak = measured_peak_flops(device, torch.bfloat16, sizes=(4096, 8192, 16384))
    for name in options.model:
        config = MODELS[name]()
        for mask in options.mask:
            size, side = GPU_BATCH[name], SIDE // config.patch_size
            # At mask 0 the activations of all tokens must fit: a quarter of the images at once.
            size = size if mask else size // 4
            shapes = step_shapes([size], [mask], 1, side)
            _, step = build_ours(config, options.compile, 1, shapes, device)
            batch = on(make_batch(config, size, torch.Generator().manual_seed(1)), device)
            torch.cuda.reset_peak_memory_stats()
            seconds = [timed(step, batch, mask)[0] for _ in range(options.warmup + options.steps)]
            median_s = statistics.median(seconds[options.warmup :])
            flops = size * model_flops(config, (side, side), CAPTION_TOKENS, mask).training
            memory_gb = torch.cuda.max_memory_allocated() / 1e9
            place = torch.cuda.get_device_name()
            rows.append(GPURow(name, size, mask, size / median_s, flops / median_s / peak, memory_gb, place))
            del step
            torch.cuda.empty_cache()
    return rows


def on(batch: TrainingBatch, device: torch.device) -> TrainingBatch:
    """The batch on a device."""
    text_BSD = batch.conditioning.text_BSD
    assert text_BSD is not None
    tensors = {name: getattr(batch, name).to(device) for name in ("x0", "noise", "level_B", "mask_BL")}
    return TrainingBatch(conditioning=Conditioning(text_BSD.to(device)), **tensors)


def show_gpu(rows: Sequence[GPURow]) -> None:
    """Print the table of a GPU."""
    print("\nmodel        batch  mask   images/s   share of peak   peak memory   device")
    for row in rows:
        figures = "not measured (no CUDA device here)"
        if row.images_per_s is not None and row.share_of_peak is not None and row.memory_gb is not None:
            figures = f"{row.images_per_s:>8.1f} {row.share_of_peak:>15.1%} {row.memory_gb:>10.1f} GB"
            figures += f"   {row.device}"
        print(f"{row.model:<12} {row.batch:>5} {row.mask:>5}   {figures}")
