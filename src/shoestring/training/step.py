"""One training step, and the random numbers it needs. The order of things stands in :func:`train_step`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from shoestring.config import (
    NoiseConfig,
    OptimizerConfig,
    ParallelConfig,
    StageConfig,
    TokensConfig,
)
from shoestring.diffusion.losses import denoising_loss
from shoestring.diffusion.process import Process
from shoestring.interfaces import Conditioning, Denoiser
from shoestring.models.network import BaseNetwork
from shoestring.runtime import Workers, stream_seed
from shoestring.tensors import visible_from_noise
from shoestring.training.averages import Averages
from shoestring.training.low_precision import LowPrecisionWeights, add_gradients
from shoestring.training.optim import Optimizers
from shoestring.training.parallel import Parallel, fill_missing_gradients, whole
from shoestring.training.schedule import Position, ema_decay


@dataclass(frozen=True)
class Draws:
    """Random numbers of a batch. Those of one sample depend on the seed and its number in the run only."""

    level_B: Tensor
    noise: Tensor
    posterior: Tensor
    mask_BL: Tensor
    drop_B: Tensor
    path_B: Tensor
    guidance_B: Tensor

    @staticmethod
    def make(
        seed: int, purpose: str, first: int, count: int, shape: tuple[int, int, int], length: int
    ) -> Draws:
        """Draw for the samples ``first`` to ``first + count`` of the stream ``purpose``.

        Args:
            seed: the run's seed.
            purpose: name of the stream.
            first: number of the first sample (images seen).
            count: batch size.
            shape: channels, height and width of the latents.
            length: patches per image.

        Returns:
            Standard normal (level, noise, posterior) and uniform (mask, drop, path, guidance) numbers, on the
            CPU.
        """
        generator = torch.Generator()
        level, noise, posterior = torch.empty(count), torch.empty(count, *shape), torch.empty(count, *shape)
        mask = torch.empty(count, length)
        drop, path, guidance = torch.empty(count), torch.empty(count), torch.empty(count)
        for i in range(count):
            generator.manual_seed(stream_seed(seed, purpose, first + i))  # the order below is for good
            level[i] = torch.randn((), generator=generator)
            torch.randn(shape, generator=generator, out=noise[i])
            torch.randn(shape, generator=generator, out=posterior[i])
            torch.rand(length, generator=generator, out=mask[i])
            drop[i] = torch.rand((), generator=generator)
            path[i] = torch.rand((), generator=generator)
            guidance[i] = torch.rand((), generator=generator)
        return Draws(level, noise, posterior, mask, drop, path, guidance)


@dataclass(frozen=True)
class TrainingBatch:
    """What a step looks at: clean latents, condition (already dropped where it is) and randomness."""

    x0: Tensor
    conditioning: Conditioning
    noise: Tensor
    level_B: Tensor
    mask_BL: Tensor
    path_dropped_B: Tensor | None = None
    guidance_B: Tensor | None = None
    """Distillation: uniform numbers that choose the scale of guidance."""

    def split(self, size: int) -> Iterator[TrainingBatch]:
        """Micro-batches in order."""
        for i in range(0, len(self.x0), size):
            part = slice(i, i + size)
            yield TrainingBatch(
                self.x0[part],
                self.conditioning.part(part),
                self.noise[part],
                self.level_B[part],
                self.mask_BL[part],
                None if self.path_dropped_B is None else self.path_dropped_B[part],
                None if self.guidance_B is None else self.guidance_B[part],
            )


class Objective(Protocol):
    """What a step makes small, instead of :func:`batch_loss`."""

    def __call__(
        self, student: Denoiser, batch: TrainingBatch, noise: NoiseConfig, mask_ratio: float
    ) -> Tensor:
        """Mean loss of a batch."""
        ...


def batch_loss(
    process: Process,
    denoiser: Denoiser,
    batch: TrainingBatch,
    noise: NoiseConfig,
    mask_ratio: float,
    tokens: TokensConfig | None = None,
) -> Tensor:
    """Mean loss of a batch.

    Args:
        process: noise process.
        denoiser: estimates x0.
        batch: samples and their random numbers.
        noise: distribution of noise levels.
        mask_ratio: share of patches dropped.
        tokens: which patches, and what becomes of the dropped ones; ``None`` = the defaults.

    Returns:
        A number.
    """
    tokens = tokens if tokens is not None else TokensConfig()
    level = process.level_from_normal(batch.level_B, noise)
    grid = (batch.x0.shape[2] // denoiser.patch_size, batch.x0.shape[3] // denoiser.patch_size)
    visible_BK = visible_from_noise(batch.mask_BL, mask_ratio, tokens.pattern, grid, tokens.block)
    return denoising_loss(
        process,
        denoiser,
        batch.x0,
        batch.noise,
        level,
        batch.conditioning,
        visible_BK,
        batch.path_dropped_B,
        tokens,
    ).mean()


@dataclass
class Learner:
    """What a step changes: weights, optimisers, averages; and those it works with."""

    model: BaseNetwork
    tokens: TokensConfig
    process: Process
    denoiser: Denoiser
    """Of the model alone, to evaluate."""
    training_denoiser: Denoiser
    """Of the model as it is spread over the ranks."""
    optimizers: Optimizers
    averages: Averages
    workers: Workers
    parallel: Parallel
    low_precision: LowPrecisionWeights | None
    """Copies of the weights that all threads share, where there are several."""
    objective: Objective | None = None
    """``None`` = :func:`batch_loss`."""
    shapes_seen: set[tuple[torch.Size, float]] = field(default_factory=set)
    """Shapes of batches and mask ratios of steps so far."""

    @staticmethod
    def build(
        network: BaseNetwork,
        tokens: TokensConfig,
        process: Process,
        optimizer: OptimizerConfig,
        workers: Workers,
        parallel: Parallel | None = None,
        precision: torch.dtype = torch.float32,
        power_ema: Sequence[float] = (),
    ) -> Learner:
        """Spread a network over the ranks and make what trains it.

        Args:
            network: on its device, its weights drawn, its blocks compiled if they are to be.
            tokens: the token method.
            process: noise process.
            optimizer: which, and its constants.
            workers: threads of this process.
            parallel: this process among others; ``None`` = it is alone.
            precision: of the products.
            power_ema: lengths of the power-function averages.

        Returns:
            At the beginning of a run.
        """
        if parallel is None:
            parallel = Parallel(ParallelConfig(), str(next(network.parameters()).device))
        spread = parallel.spread(network, precision)
        shared = precision == torch.bfloat16 and workers.count > 1
        return Learner(
            network,
            tokens,
            process,
            process.denoiser(parallel.alone(network), precision),
            process.denoiser(spread, precision),
            Optimizers(network, optimizer, workers),
            Averages(network, power_ema),
            workers,
            parallel,
            LowPrecisionWeights(network, precision) if shared else None,
        )


@dataclass(frozen=True)
class StepResult:
    """Of one step, on the device, so that nobody has to wait for it."""

    loss: Tensor
    """Mean over the whole batch."""
    norm: Tensor
    """Of the gradient, before clipping."""


def part_size(images: int, workers: int) -> int:
    """Images of one thread's part of a micro-batch; the last part may have fewer."""
    return math.ceil(images / workers)


def part_sizes(share: int, micro_batch: int, workers: int) -> set[int]:
    """Numbers of images that go through the network at once.

    Args:
        share: images of a step on this rank.
        micro_batch: images of a piece of it.
        workers: threads that share a piece.

    Returns:
        All that occur.
    """
    sizes = set()
    for piece in {min(micro_batch, share - start) for start in range(0, share, micro_batch)}:
        size = part_size(piece, workers)
        sizes |= {min(size, piece - start) for start in range(0, piece, size)}
    return sizes


def accumulate_gradient(
    learner: Learner, batch: TrainingBatch, micro_batch: int, stage: StageConfig, mask_ratio: float
) -> Tensor:
    """Forward, loss and backward: put the gradient of the whole batch into the parameters.

    Weights and optimiser stay as they are, so this may be tried again where memory runs out.

    Args:
        learner: its gradients are changed.
        batch: this rank's share.
        micro_batch: images at once; the share is cut into such pieces.
        stage: noise levels.
        mask_ratio: share of patches dropped.

    Returns:
        Mean loss of this rank's share.
    """
    parameters = [p for p in learner.model.parameters() if p.requires_grad]
    pieces = list(batch.split(micro_batch))
    total = torch.zeros((), device=batch.x0.device, dtype=batch.x0.dtype)

    def loss_of(part: TrainingBatch) -> Tensor:
        denoiser, tokens = learner.training_denoiser, learner.tokens
        if learner.objective is None:
            loss = batch_loss(learner.process, denoiser, part, stage.noise, mask_ratio, tokens)
        else:
            loss = learner.objective(denoiser, part, stage.noise, mask_ratio)
        return loss * (len(part.x0) / len(batch.x0))

    if learner.workers.count == 1:
        for i, piece in enumerate(pieces):
            with learner.parallel.backward(learner.model, last=i == len(pieces) - 1):
                loss = loss_of(piece)
                (loss + learner.parallel.touched(learner.model)).backward()
            total += loss.detach()
        fill_missing_gradients(parameters)
        return total

    low = learner.low_precision
    leaves = parameters if low is None else low.leaves

    def gradient(part: TrainingBatch) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = loss_of(part)
        # A mask token has no gradient in steps that drop nothing: zero then.
        return loss.detach(), torch.autograd.grad(loss, leaves, materialize_grads=True)

    # The first time, one part after another: a compiled block is then compiled once, not once a thread.
    shape = (batch.x0.shape, mask_ratio)
    together = shape in learner.shapes_seen
    summed: list[Tensor] | None = None
    with nullcontext() if low is None else low.used():
        for piece in pieces:
            parts = list(piece.split(part_size(len(piece.x0), learner.workers.count)))
            results = learner.workers.map(gradient, parts, together)  # summed in this order, always
            for loss, _ in results:
                total += loss
            summed = add_gradients(summed, [gradients for _, gradients in results])
    learner.shapes_seen.add(shape)
    assert summed is not None
    for parameter, value in zip(parameters, summed, strict=True):
        parameter.grad = value
    return total


def update(learner: Learner, loss: Tensor, lr: float, here: Position) -> StepResult:
    """Clip, update, average: what follows once the gradient is there; all ranks together.

    Args:
        learner: changed in place.
        loss: of this rank.
        lr: learning rate of this step.
        here: where in the run: clipping, averages.

    Returns:
        The loss and the gradient norm.
    """
    stage = here.stage
    loss = learner.parallel.mean(loss)
    limit = float("inf") if stage.clip_norm is None else stage.clip_norm
    norm = whole(nn.utils.clip_grad_norm_(learner.model.parameters(), limit))
    failed = (~(loss + norm).isfinite()).float()
    learner.optimizers.set_lr(lr)
    learner.optimizers.step(failed)
    seen = here.start_nimg + here.done_nimg + stage.batch
    learner.averages.update(ema_decay(here), seen, stage.batch)
    return StepResult(loss, norm)


def train_step(
    learner: Learner, batch: TrainingBatch, micro_batch: int, lr: float, mask_ratio: float, here: Position
) -> StepResult:
    """Forward, loss, backward, clip, update, average; all ranks together, each with its share of the batch.

    Where the loss or the gradient is not finite, weights and optimiser stay as they are; the result tells.
    Nothing here waits for the device.

    Args:
        learner: changed in place.
        batch: this rank's share.
        micro_batch: images at once; the share is cut into such pieces.
        lr: learning rate of this step.
        mask_ratio: share of patches dropped.
        here: where in the run: noise levels, clipping, averages.

    Returns:
        The loss and the gradient norm.
    """
    loss = accumulate_gradient(learner, batch, micro_batch, here.stage, mask_ratio)
    return update(learner, loss, lr, here)
