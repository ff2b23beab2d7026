"""Time one training step: a written-out reference against ours, alternating, in one run.

``python benchmarks/train_step.py`` measures ``tiny2`` at batch 8 and 32, mask 0 and 0.75. A step is
forward, loss, backward, clip, optimiser and EMA on 77 caption tokens.

* reference: ``reference_microdit.py``, float32, one-hot experts, fused attention, default AdamW, EMA tensor
  by tensor: the manner of the released code.
* ours: ``shoestring.training.step.train_step``, that is bf16 autocast over float32 weights, gathered experts,
  written-out attention, fused AdamW, EMA in one call, compiled blocks unless ``--no-compile``.

Peak is the best bf16 matrix product of side 2048 to 4096 in the same run with the same threads. FLOPs are
those needed (``planning.model_flops``): no recomputation, no one-hot products.
"""

from __future__ import annotations

import os

# Before torch is imported: busy waiting collapses when anything else runs on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from reference_microdit import ReferenceConfig, ReferenceMicroDiT
from shoestring.config.schema import ModelConfig, OptimizerConfig, StageConfig, TokensConfig
from shoestring.diffusion.process import EDMProcess
from shoestring.interfaces import Conditioning
from shoestring.models.microdit import MicroDiT
from shoestring.models.released import to_released
from shoestring.planning import measured_peak_flops, model_flops
from shoestring.recipes import demo, microdit
from shoestring.runtime import Workers, default_workers, keep_freed_memory, write_text
from shoestring.training.ema import EMA
from shoestring.training.optim import Optimizers
from shoestring.training.step import Learner, TrainingBatch, train_step

MODELS: dict[str, Callable[[], ModelConfig]] = {
    "tiny2": microdit.tiny2,
    "tiny2-paper": microdit.tiny2_paper,
    "demo": demo.small,
}
SIDE = 32
CAPTION_TOKENS = 77
SIGMA_DATA = 0.9
LEARNING_RATE = 1e-5
EMA_DECAY = 0.999
STAGE = StageConfig(name="benchmark", nimg=1, batch=1, lr=LEARNING_RATE, clip_norm=0.25)
CPU = torch.device("cpu")
# The reference keeps 14 GB of activations for 32 unmasked images: it takes them in two halves.
REFERENCE_TOKENS = 16 * 256
Step = Callable[[TrainingBatch, float], float]


@dataclass(frozen=True)
class Row:
    """One line of the result."""

    model: str
    batch: int
    mask: float
    reference_s: float
    ours_s: float
    ratio: float
    share_of_peak: float
    """FLOP/s of our step over the bf16 matmul peak."""
    reference_share_of_fp32: float
    """FLOP/s of the reference's step, its one-hot products included, over the fp32 matmul peak."""


def make_batch(config: ModelConfig, size: int, generator: torch.Generator) -> TrainingBatch:
    """Random latents, captions and draws."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shape = (size, config.in_channels, SIDE, SIDE)
    return TrainingBatch(
        x0=SIGMA_DATA * normal(*shape),
        conditioning=Conditioning(normal(size, CAPTION_TOKENS, config.caption_dim)),
        noise=normal(*shape),
        level_B=normal(size),
        mask_BL=torch.rand(size, (SIDE // config.patch_size) ** 2, generator=generator),
    )


def build_ours(config: ModelConfig, compile_blocks: bool, workers: int) -> tuple[MicroDiT, Step]:
    """Our network, initialised, and its step."""
    generator = torch.Generator().manual_seed(0)
    model = MicroDiT(config)
    model.initialize(generator)
    with torch.no_grad():
        for parameter in model.parameters():  # zero gates would hide a difference between the two
            if not parameter.any():
                parameter.normal_(std=0.02, generator=generator)
    process, threads = EDMProcess(SIGMA_DATA), Workers(workers)
    learner = Learner(
        model=model,
        tokens=TokensConfig(),
        process=process,
        denoiser=process.denoiser(model, torch.bfloat16),
        optimizers=Optimizers(model, OptimizerConfig(), threads),
        ema=EMA(model),
        workers=threads,
    )
    if compile_blocks:
        for block in model.all_blocks():
            # Isolated, as the limit of recompilations counts per code object and every width is one.
            block.compile(isolate_recompiles=True, dynamic=False)

    def step(batch: TrainingBatch, mask_ratio: float) -> float:
        stage = STAGE.model_copy(update={"batch": len(batch.x0)})
        return train_step(learner, batch, stage, LEARNING_RATE, mask_ratio, EMA_DECAY)[0]

    return model, step


def build_reference(config: ModelConfig, ours: MicroDiT) -> Step:
    """The reference with the weights of ours, and its step."""
    model = ReferenceMicroDiT(ReferenceConfig.like(config, SIDE))
    model.load_state_dict(to_released(ours, SIDE // config.patch_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    average = copy.deepcopy(model).requires_grad_(False)

    def step(batch: TrainingBatch, mask_ratio: float) -> float:
        size = len(batch.x0)
        visible = batch.mask_BL.shape[1] * (1 - mask_ratio)
        micro = size // 2 if size % 2 == 0 and size * visible > REFERENCE_TOKENS else size
        total = torch.zeros(())
        for part in batch.split(micro):
            loss = reference_loss(model, part, mask_ratio) * (micro / size)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), STAGE.clip_norm or 0.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for ema, parameter in zip(average.parameters(), model.parameters(), strict=True):
                ema.lerp_(parameter, 1 - EMA_DECAY)
        return total.item()

    return step


def reference_loss(model: ReferenceMicroDiT, batch: TrainingBatch, mask_ratio: float) -> torch.Tensor:
    """The reference's loss of a batch."""
    return model.loss(
        batch.x0,
        batch.conditioning.text_BSD,
        batch.level_B,
        batch.noise,
        batch.mask_BL,
        mask_ratio=mask_ratio,
        p_mean=STAGE.noise.mean,
        p_std=STAGE.noise.std,
        sigma_data=SIGMA_DATA,
    )


def reference_flops(config: ModelConfig, mask_ratio: float) -> float:
    """Training FLOPs per image that the reference executes, counted on the meta device."""
    with torch.device("meta"):
        model = ReferenceMicroDiT(ReferenceConfig.like(config, SIDE))
    batch = make_batch(config, 1, torch.Generator())
    meta = TrainingBatch(
        batch.x0.to("meta"),
        Conditioning(batch.conditioning.text_BSD.to("meta")),
        batch.noise.to("meta"),
        batch.level_B.to("meta"),
        batch.mask_BL.to("meta"),
    )
    with FlopCounterMode(display=False) as counter:
        reference_loss(model, meta, mask_ratio).backward()
    return float(counter.get_total_flops())


def timed(step: Step, batch: TrainingBatch, mask_ratio: float) -> tuple[float, float]:
    """Seconds and loss of one step."""
    start_s = time.perf_counter()
    loss = step(batch, mask_ratio)
    return time.perf_counter() - start_s, loss


def measure(options: argparse.Namespace) -> list[Row]:
    """Run everything and print as it goes."""
    config = MODELS[options.model]()
    workers = options.workers  # a run chooses likewise
    if workers is None:
        workers = default_workers(CPU)
    ours, our_step = build_ours(config, options.compile, workers)
    reference_step = build_reference(config, ours)
    generator = torch.Generator().manual_seed(1)
    peak_bf16 = measured_peak_flops(CPU, torch.bfloat16)
    peak_fp32 = measured_peak_flops(CPU, torch.float32)
    times: dict[tuple[int, float], tuple[float, float]] = {}
    for size in options.batch:
        for mask_ratio in options.mask:
            pairs = []
            for i in range(options.warmup + options.steps):
                batch = make_batch(config, size, generator)
                reference_s, reference_value = timed(reference_step, batch, mask_ratio)
                ours_s, our_value = timed(our_step, batch, mask_ratio)
                if not abs(our_value - reference_value) <= 0.03 * reference_value:
                    raise SystemExit(
                        f"the two losses differ: reference {reference_value:.5f}, ours {our_value:.5f}"
                    )
                if i >= options.warmup:
                    pairs.append((reference_s, ours_s))
            medians = tuple(statistics.median(column) for column in zip(*pairs, strict=True))
            times[size, mask_ratio] = medians
            print(
                f"batch {size}, mask {mask_ratio}: reference {medians[0]:.3f} s, ours {medians[1]:.3f} s",
                flush=True,
            )
    # Clocks wander: the best of before and after is the peak.
    peak_bf16 = max(peak_bf16, measured_peak_flops(CPU, torch.bfloat16))
    peak_fp32 = max(peak_fp32, measured_peak_flops(CPU, torch.float32))
    print(
        f"\nmatmul peak with {torch.get_num_threads()} threads: "
        f"bf16 {peak_bf16 / 1e9:.0f} GFLOP/s, fp32 {peak_fp32 / 1e9:.0f} GFLOP/s"
    )
    grid = (SIDE // config.patch_size,) * 2
    rows = []
    for (size, mask_ratio), (reference_s, ours_s) in times.items():
        needed = size * model_flops(config, grid, CAPTION_TOKENS, mask_ratio).training
        executed = size * reference_flops(config, mask_ratio)
        rows.append(
            Row(
                model=options.model,
                batch=size,
                mask=mask_ratio,
                reference_s=reference_s,
                ours_s=ours_s,
                ratio=reference_s / ours_s,
                share_of_peak=needed / ours_s / peak_bf16,
                reference_share_of_fp32=executed / reference_s / peak_fp32,
            )
        )
    return rows


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    print("\nmodel        batch  mask  reference      ours   ratio   share of bf16   reference's")
    print("                          (median s) (median s)         matmul peak     share of fp32")
    for row in rows:
        print(
            f"{row.model:<12} {row.batch:>5} {row.mask:>5} {row.reference_s:>10.3f} {row.ours_s:>10.3f} "
            f"{row.ratio:>6.2f}x {row.share_of_peak:>10.1%} {row.reference_share_of_fp32:>17.1%}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description="Time a training step: reference against ours.")
    parser.add_argument("--model", choices=MODELS, default="tiny2")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32], help="batch sizes")
    parser.add_argument("--mask", type=float, nargs="+", default=[0.0, 0.75], help="mask ratios")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--warmup", type=int, default=2, help="steps before, not timed")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--workers", type=int, help="ours: threads that share a batch; default one a core")
    parser.add_argument("--threads", type=int, help="default: as many as torch takes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    rows = measure(options)
    show(rows)
    if options.json is not None:
        write_text(options.json, json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
