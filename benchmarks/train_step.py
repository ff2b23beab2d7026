"""Time one training step: a written-out reference against ours, alternating, in one run.

``python benchmarks/train_step.py`` measures ``tiny2`` at batch 8 and 32, mask 0 and 0.75. A step is
forward, loss, backward, clip, optimiser and EMA on 77 caption tokens.

* reference: ``reference_microdit.py``, float32, one-hot experts, fused attention, default AdamW, EMA tensor
  by tensor: the manner of the released code.
* ours: ``shoestring.training.step.train_step``, that is bf16 autocast over float32 weights, gathered experts,
  attention in the form that was timed to be fastest, fused AdamW, EMA in one call, compiled blocks unless
  ``--no-compile``. With ``--captions 20`` ours sees captions of such a mean length, masked and padded to a
  multiple of 8; the reference, as released, always all 77 tokens.

``--device cuda`` times ours alone, for ``tiny2`` and ``xl2`` at both masks: images/s, share of the peak, peak
memory. Without such a device the same table says what was not measured.

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
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from reference_microdit import ReferenceConfig, ReferenceMicroDiT
from shoestring.config import OptimizerConfig, StageConfig, TokensConfig, TransformerConfig
from shoestring.diffusion.process import EDMProcess
from shoestring.interfaces import Conditioning
from shoestring.models.microdit import MicroDiT
from shoestring.models.released import to_released
from shoestring.planning import measured_peak_flops, model_flops
from shoestring.recipes import demo, microdit
from shoestring.runtime import Workers, default_workers, keep_freed_memory, write_text
from shoestring.training.compiling import compile_blocks
from shoestring.training.schedule import Position
from shoestring.training.step import Learner, TrainingBatch, train_step
from shoestring.training.step_shapes import StepShape, padded_length
from shoestring.training.timed_attention import choose_attention

MODELS: dict[str, Callable[[], TransformerConfig]] = {
    "tiny2": microdit.tiny2,
    "tiny2-paper": microdit.tiny2_paper,
    "xl2": microdit.xl2,
    "demo": demo.small,
}
SIDE = 32
CAPTION_TOKENS = 77
SIGMA_DATA = 0.9
LEARNING_RATE = 1e-5
EMA_DECAY = 0.999
STAGE = StageConfig(
    name="benchmark", nimg=1, batch=1, lr=LEARNING_RATE, clip_norm=0.25, ema_decay=EMA_DECAY, ema_rampup=None
)
CPU = torch.device("cpu")
# The reference keeps 14 GB of activations for 32 unmasked images: it takes them in two halves.
REFERENCE_TOKENS = 16 * 256
BARS = {
    ("tiny2", 32, 0.75, None): (3.6, 0.66),
    ("tiny2", 32, 0.75, 20): (4.0, 0.0),
    ("tiny2", 32, 0.0, None): (0.0, 0.66),
}
"""Model, batch, mask, captions: the least ratio and share of the peak; 0 = none is set."""
Step = Callable[[TrainingBatch, float], float]


@dataclass(frozen=True)
class Row:
    """One line of the result."""

    model: str
    batch: int
    mask: float
    captions: int | None
    """Mean length for ours; ``None`` = 77, as for the reference."""
    reference_s: float
    ours_s: float
    ratio: float
    share_of_peak: float
    """FLOP/s of our step over the bf16 matmul peak."""
    reference_share_of_fp32: float
    """FLOP/s of the reference's step, its one-hot products included, over the fp32 matmul peak."""


def make_batch(
    config: TransformerConfig, size: int, generator: torch.Generator, captions: int | None = None
) -> TrainingBatch:
    """Random latents, captions and draws; the masks of captions hide what lies beyond their lengths."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shape = (size, config.in_channels, SIDE, SIDE)
    seen = None
    if captions is not None:  # evenly from few tokens to as many above the mean
        few = max(1, captions // 5)
        length_B1 = torch.randint(few, 2 * captions - few + 1, (size, 1), generator=generator)
        seen = torch.arange(CAPTION_TOKENS) < length_B1
    return TrainingBatch(
        x0=SIGMA_DATA * normal(*shape),
        conditioning=Conditioning(normal(size, CAPTION_TOKENS, config.caption_dim), seen),
        noise=normal(*shape),
        level_B=normal(size),
        mask_BL=torch.rand(size, (SIDE // config.patch_size) ** 2, generator=generator),
    )


def true_length(batch: TrainingBatch) -> TrainingBatch:
    """The batch as a compiled run sees it: captions cut to a multiple of 8, if they have masks at all."""
    text_BSD, mask_BS = batch.conditioning.text_BSD, batch.conditioning.text_mask_BS
    if mask_BS is None or text_BSD is None:
        return batch
    length = padded_length(int(mask_BS.sum(1).max()), CAPTION_TOKENS)
    return replace(batch, conditioning=Conditioning(text_BSD[:, :length], mask_BS[:, :length]))


def step_shapes(
    sizes: Sequence[int], masks: Sequence[float], workers: int, side: int, captions: int | None = None
) -> list[StepShape]:
    """Shapes of the steps to come; ``side`` is that of the grid of patches."""
    lengths = [CAPTION_TOKENS]
    if captions is not None:
        lengths = sorted({padded_length(n, CAPTION_TOKENS) for n in range(1, 2 * captions)})
    parts = {part for size in sizes for part in (math.ceil(size / workers), size % math.ceil(size / workers))}
    return [
        StepShape(part, (side, side), mask, length)
        for part in sorted(parts - {0})
        for mask in masks
        for length in lengths
    ]


def build_ours(
    config: TransformerConfig,
    compile_them: bool,
    workers: int,
    shapes: Sequence[StepShape],
    device: torch.device = CPU,
) -> tuple[MicroDiT, Step]:
    """Our network, initialised, and its step."""
    generator = torch.Generator().manual_seed(0)
    model = MicroDiT(config)
    model.initialize(generator)
    with torch.no_grad():
        for parameter in model.parameters():  # zero gates would hide a difference between the two
            if not parameter.any():
                parameter.normal_(std=0.02, generator=generator)
    model.to(device)
    threads, tokens, precision = Workers(workers), TokensConfig(), torch.bfloat16
    if device.type == "cpu":
        model.use_attention(choose_attention(config, tokens, shapes, precision, threads))
    if compile_them:
        compile_blocks(model, tokens, shapes)
    learner = Learner.build(
        model, tokens, EDMProcess(SIGMA_DATA), OptimizerConfig(), threads, precision=precision
    )

    def step(batch: TrainingBatch, mask_ratio: float) -> float:
        size = len(batch.x0)
        here = Position(0, STAGE.model_copy(update={"batch": size}), 0, 0, 0)
        return train_step(learner, batch, size, LEARNING_RATE, mask_ratio, here).loss.item()

    return model, step


def build_reference(config: TransformerConfig, ours: MicroDiT) -> Step:
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
    assert batch.conditioning.text_BSD is not None
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


def reference_flops(config: TransformerConfig, mask_ratio: float) -> float:
    """Training FLOPs per image that the reference executes, counted on the meta device."""
    with torch.device("meta"):
        model = ReferenceMicroDiT(ReferenceConfig.like(config, SIDE))
    batch = make_batch(config, 1, torch.Generator())
    assert batch.conditioning.text_BSD is not None
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
    (name,) = options.model
    config = MODELS[name]().model_copy(update={"mask_captions": options.captions is not None})
    workers = options.workers  # a run chooses likewise
    if workers is None:
        workers = default_workers(CPU)
    shapes = step_shapes(options.batch, options.mask, workers, SIDE // config.patch_size, options.captions)
    ours, our_step = build_ours(config, options.compile, workers, shapes)
    reference_step = build_reference(config, ours)
    generator = torch.Generator().manual_seed(1)
    peak_bf16 = measured_peak_flops(CPU, torch.bfloat16)
    peak_fp32 = measured_peak_flops(CPU, torch.float32)
    times: dict[tuple[int, float], tuple[float, float]] = {}
    lengths: dict[tuple[int, float], int] = {}
    for size in options.batch:
        for mask_ratio in options.mask:
            pairs, seen = [], []
            for i in range(options.warmup + options.steps):
                batch = make_batch(config, size, generator, options.captions)
                cut = true_length(batch)
                reference_s, reference_value = timed(reference_step, batch, mask_ratio)
                ours_s, our_value = timed(our_step, cut, mask_ratio)
                # With masked captions the two compute different things.
                if (
                    options.captions is None
                    and not abs(our_value - reference_value) <= 0.03 * reference_value
                ):
                    raise SystemExit(
                        f"the two losses differ: reference {reference_value:.5f}, ours {our_value:.5f}"
                    )
                if i >= options.warmup:
                    pairs.append((reference_s, ours_s))
                    assert cut.conditioning.text_BSD is not None
                    seen.append(cut.conditioning.text_BSD.shape[1])
            medians = tuple(statistics.median(column) for column in zip(*pairs, strict=True))
            times[size, mask_ratio], lengths[size, mask_ratio] = medians, statistics.median_low(seen)
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
        needed = size * model_flops(config, grid, lengths[size, mask_ratio], mask_ratio).training
        executed = size * reference_flops(config, mask_ratio)
        rows.append(
            Row(
                model=name,
                batch=size,
                mask=mask_ratio,
                captions=options.captions,
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


def bars(rows: Sequence[Row]) -> None:
    """Say which of the goals were met; the rows of a disturbed machine meet none."""
    for row in rows:
        ratio, share = BARS.get((row.model, row.batch, row.mask, row.captions), (0.0, 0.0))
        for name, value, bar in (("ratio", row.ratio, ratio), ("share of peak", row.share_of_peak, share)):
            if bar:
                verdict = "met" if value >= bar else "missed"
                print(f"batch {row.batch}, mask {row.mask}: {name} {value:.2f}, bar {bar:g}: {verdict}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    import gpu_step  # which imports from this file

    parser = argparse.ArgumentParser(description="Time a training step: reference against ours.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=MODELS, nargs="+", help="cpu: tiny2; cuda: tiny2 xl2")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32], help="batch sizes")
    parser.add_argument("--mask", type=float, nargs="+", default=[0.0, 0.75], help="mask ratios")
    parser.add_argument(
        "--captions", type=int, help="mean length of captions for ours; default: all 77 tokens"
    )
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
    options.model = options.model or (["tiny2"] if options.device == "cpu" else list(gpu_step.GPU_BATCH))
    rows: Sequence[Row | gpu_step.GPURow]
    if options.device == "cuda":
        unknown = set(options.model) - gpu_step.GPU_BATCH.keys()
        if unknown or options.captions is not None:
            parser.error(
                f"--device cuda knows the models {', '.join(gpu_step.GPU_BATCH)}, and captions of 77 tokens"
            )
        rows = gpu_rows = gpu_step.measure_gpu(options)
        gpu_step.show_gpu(gpu_rows)
    else:
        if len(options.model) > 1:
            parser.error("one --model at a time on the CPU")
        rows = cpu_rows = measure(options)
        show(cpu_rows)
        bars(cpu_rows)
    if options.json is not None:
        write_text(options.json, json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
