"""One training step, and the random numbers it needs. The order of things stands in :func:`train_step`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shoestring.config.schema import NoiseConfig, StageConfig, TokensConfig
from shoestring.diffusion.losses import denoising_loss
from shoestring.diffusion.process import Process
from shoestring.interfaces import Conditioning, Denoiser
from shoestring.models.transformer import DiffusionTransformer
from shoestring.runtime import Workers, stream_seed
from shoestring.tensors import visible_from_noise
from shoestring.training.ema import EMA
from shoestring.training.optim import Optimizers


@dataclass(frozen=True)
class Draws:
    """Random numbers of a batch. Those of one sample depend on the seed and its number in the run only."""

    level_B: Tensor
    noise: Tensor
    posterior: Tensor
    mask_BL: Tensor
    drop_B: Tensor
    path_B: Tensor

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
            Standard normal (level, noise, posterior) and uniform (mask, drop, path) numbers, on the CPU.
        """
        generator = torch.Generator()
        level, noise, posterior = torch.empty(count), torch.empty(count, *shape), torch.empty(count, *shape)
        mask, drop, path = torch.empty(count, length), torch.empty(count), torch.empty(count)
        for i in range(count):
            generator.manual_seed(stream_seed(seed, purpose, first + i))
            level[i] = torch.randn((), generator=generator)
            torch.randn(shape, generator=generator, out=noise[i])
            torch.randn(shape, generator=generator, out=posterior[i])
            torch.rand(length, generator=generator, out=mask[i])
            drop[i] = torch.rand((), generator=generator)
            path[i] = torch.rand((), generator=generator)
        return Draws(level, noise, posterior, mask, drop, path)


@dataclass(frozen=True)
class TrainingBatch:
    """What a step looks at: clean latents, condition (already dropped where it is) and randomness."""

    x0: Tensor
    conditioning: Conditioning
    noise: Tensor
    level_B: Tensor
    mask_BL: Tensor
    path_dropped_B: Tensor | None = None

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
            )


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
    """What a step changes: weights, optimisers, average."""

    model: DiffusionTransformer
    tokens: TokensConfig
    process: Process
    denoiser: Denoiser
    optimizers: Optimizers
    ema: EMA
    workers: Workers
    shapes_seen: set[tuple[int, float]] = field(default_factory=set)
    """Batch sizes and mask ratios of steps so far."""


class NonFiniteLoss(ArithmeticError):
    """The loss or the gradient is NaN or infinite; the weights were not touched."""


def _accumulate(learner: Learner, batch: TrainingBatch, stage: StageConfig, mask_ratio: float) -> Tensor:
    """Put the gradient of the batch into the parameters; returns its mean loss."""
    parameters = list(learner.model.parameters())
    total = torch.zeros((), device=batch.x0.device)
    summed: list[Tensor] | None = None

    def gradient(part: TrainingBatch) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = batch_loss(learner.process, learner.denoiser, part, stage.noise, mask_ratio, learner.tokens)
        loss = loss * (len(part.x0) / len(batch.x0))
        # A mask token has no gradient in steps that drop nothing: zero then.
        return loss.detach(), torch.autograd.grad(loss, parameters, materialize_grads=True)

    # The first time, one part after another: a compiled block is then compiled once, not once a thread.
    shape = (len(batch.x0), mask_ratio)
    together = shape in learner.shapes_seen
    for micro in batch.split(stage.micro_batch or len(batch.x0)):
        parts = list(micro.split(math.ceil(len(micro.x0) / learner.workers.count)))
        for loss, gradients in learner.workers.map(gradient, parts, together):  # summed in this order, always
            total += loss
            summed = list(gradients) if summed is None else list(torch._foreach_add(summed, list(gradients)))
    learner.shapes_seen.add(shape)
    assert summed is not None
    for parameter, value in zip(parameters, summed, strict=True):
        parameter.grad = value
    return total


def train_step(
    learner: Learner, batch: TrainingBatch, stage: StageConfig, lr: float, mask_ratio: float, ema_decay: float
) -> tuple[float, float]:
    """Forward, loss, backward, clip, update, average.

    Args:
        learner: changed in place.
        batch: the whole batch; it is cut into ``stage.micro_batch`` pieces.
        stage: noise levels, micro-batch, clipping.
        lr: learning rate of this step.
        mask_ratio: share of patches dropped.
        ema_decay: of the weight average.

    Returns:
        The loss and the gradient norm before clipping.

    Raises:
        NonFiniteLoss: before anything is updated.
    """
    loss = _accumulate(learner, batch, stage, mask_ratio)
    limit = float("inf") if stage.clip_norm is None else stage.clip_norm
    norm = nn.utils.clip_grad_norm_(learner.model.parameters(), limit)
    if not (loss + norm).isfinite():
        learner.optimizers.zero_grad()
        raise NonFiniteLoss(f"the loss is {loss.item()}, the gradient norm {norm.item()}")
    learner.optimizers.set_lr(lr)
    learner.optimizers.step()
    learner.ema.update(ema_decay)
    return loss.item(), norm.item()
