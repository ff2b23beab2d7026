"""The small picture that a super-resolution network looks at: made, enlarged, encoded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoestring.config import SuperResConfig
from shoestring.data.degradation import degrade, enlarged
from shoestring.interfaces import ImageCodec
from shoestring.runtime import UserError, stream
from shoestring.tensors import Float, UInt8


def made_small(
    pictures: UInt8[Tensor, "B 3 H W"], superres: SuperResConfig, seed: int, numbers: Sequence[int]
) -> UInt8[Tensor, "B 3 h w"]:
    """Pictures made small as the run asks for; what happens to one depends on (seed, its number) only.

    Args:
        pictures: whole.
        superres: factor and kind of degradation.
        seed: of all.
        numbers: of each.

    Returns:
        Small pictures.
    """
    kind, factor = superres.degradation, superres.factor
    return torch.stack([degrade(p, factor, kind, seed, n) for p, n in zip(pictures, numbers, strict=True)])


def low_latents(low: UInt8[Tensor, "B 3 h w"], factor: int, codec: ImageCodec) -> Float[Tensor, "B C H W"]:
    """Latents of small pictures, enlarged (bicubic) to the size of what is drawn.

    Args:
        low: small pictures.
        factor: of the network.
        codec: pixels to latents; the means of its posteriors are taken.

    Returns:
        What :class:`shoestring.interfaces.Conditioning` holds as ``image``.
    """
    moments = codec.encode(enlarged(low, factor))
    return codec.latents(moments, torch.zeros(len(low), codec.channels, *moments.shape[2:]))


def training_image(
    x0: Float[Tensor, "B C H W"],
    codec: ImageCodec,
    superres: SuperResConfig,
    seed: int,
    numbers: Sequence[int],
) -> Float[Tensor, "B C H W"]:
    """What a super-resolution network sees in training: pictures decoded, made small, enlarged, with noise.

    Sources are decoded, so that this works from any store of latents; pixels lose nothing by it.

    Args:
        x0: clean latents, means of their posteriors.
        codec: of the run.
        superres: of the run.
        seed: of the run.
        numbers: of the samples.

    Returns:
        As :func:`low_latents`, with Gaussian noise whose share is drawn for each sample.
    """
    small = made_small(codec.decode(x0).cpu(), superres, seed, numbers)
    latents = low_latents(small, superres.factor, codec)
    if not superres.noise:
        return latents
    noisy = []
    for latent, number in zip(latents, numbers, strict=True):
        generator = stream(seed, "low-noise", number)
        share = superres.noise * torch.rand((), generator=generator)
        noise = torch.randn(latent.shape, generator=generator).to(latent)
        noisy.append(latent + share.to(latent) * latent.std() * noise)
    return torch.stack(noisy)


def check_low(low: Tensor, side: int, factor: int, what: str = "the small picture") -> None:
    """Refuse small pictures that are not as small as they should be.

    Args:
        low: uint8 ``B 3 h w``.
        side: of what is drawn.
        factor: of the network.
        what: how a message calls them.

    Raises:
        UserError: if the sizes do not fit.
    """
    wanted = side // factor
    height, width = low.shape[2:]
    if (height, width) != (wanted, wanted):
        larger = " (it is not smaller than what the model draws)" if max(height, width) >= side else ""
        raise UserError(
            f"{what} has {width} x {height} pixels{larger}; this model draws {side} px from {wanted} px"
        )
