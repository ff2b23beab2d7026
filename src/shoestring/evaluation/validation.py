"""Validation loss on pinned noise, one figure per noise level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoestring.diffusion.losses import denoising_loss
from shoestring.diffusion.process import Process
from shoestring.interfaces import Conditioning, Denoiser
from shoestring.runtime import stream
from shoestring.sampling.generate import Pipeline
from shoestring.tensors import Float, UInt8


def loss_of_pictures(
    pipeline: Pipeline, pictures: UInt8[Tensor, "B 3 H W"], captions: Sequence[str], at_once: int = 64
) -> dict[float, float]:
    """The validation loss of a model that was loaded, on pictures, see :func:`validation_loss`.

    Args:
        pipeline: the model.
        pictures: real ones.
        captions: of each; an unconditional model reads none.
        at_once: pictures that are encoded together.

    Returns:
        Mean loss by sigma / alpha.
    """
    codec, told = pipeline.codec, pipeline.config.model.condition != "none"
    x0 = []
    for part in pictures.split(at_once):
        moments = codec.encode(part)
        x0.append(codec.latents(moments, torch.zeros(len(part), codec.channels, *moments.shape[2:])))
    conditioning = pipeline.encode([caption if told else "" for caption in captions])
    latents = torch.cat(x0).to(pipeline.device)
    return validation_loss(pipeline.process, pipeline.denoiser, latents, conditioning, at_once)


@torch.no_grad()
def validation_loss(
    process: Process,
    denoiser: Denoiser,
    x0: Float[Tensor, "B C H W"],
    conditioning: Conditioning,
    batch: int = 64,
    first: int = 0,
) -> dict[float, float]:
    """Weighted loss over all patches at fixed noise-to-signal ratios, with the same noise every time.

    No patch is dropped, also in masked stages: figures of masked and dense training can be compared.

    Args:
        process: noise process.
        denoiser: estimates x0.
        x0: clean latents.
        conditioning: their captions.
        batch: samples at once; the result does not depend on it beyond rounding.
        first: number of the first sample, where these are a part: noise belongs to the number.

    Returns:
        Mean loss by sigma / alpha.
    """
    noise = torch.stack(
        [torch.randn(x0.shape[1:], generator=stream(0, "validation", first + i)) for i in range(len(x0))]
    ).to(x0.device)
    losses: dict[float, float] = {}
    for ratio in process.validation_sigmas():
        total = 0.0
        for i in range(0, len(x0), batch):
            part = slice(i, i + batch)
            level = process.level_at(torch.full((len(x0[part]),), ratio, device=x0.device))
            loss_B = denoising_loss(process, denoiser, x0[part], noise[part], level, conditioning.part(part))
            total += loss_B.double().sum().item()
        losses[ratio] = total / len(x0)
    return losses
