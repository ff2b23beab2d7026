"""Image codecs: plain pixels, or the latents of an autoencoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shoestring.config import DataConfig
from shoestring.encoders.autoencoders import (
    DIFFUSERS_CODECS,
    AutoencoderDCCodec,
    AutoencoderKLCodec,
    AutoencoderTinyCodec,
    LatentCodec,
    to_bytes,
)
from shoestring.encoders.taef2 import Taef2Codec
from shoestring.encoders.weights import DTYPES, required
from shoestring.interfaces import Identity, ImageCodec
from shoestring.tensors import Float, UInt8

__all__ = [
    "CODECS",
    "AutoencoderDCCodec",
    "AutoencoderKLCodec",
    "AutoencoderTinyCodec",
    "PixelCodec",
    "Taef2Codec",
    "build_codec",
]


class PixelCodec:
    """Pixels as they are: the moments are the bytes themselves, the latents are in [-1, 1]."""

    name = "pixels"
    identity = Identity("pixels")
    channels = 3
    moment_channels = 3
    moment_dtype = torch.uint8
    downsampling = 1

    def encode(self, pixels: UInt8[Tensor, "B 3 H W"]) -> UInt8[Tensor, "B 3 H W"]:
        """The pixels."""
        return pixels

    def latents(
        self, moments: UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"], noise: Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, "B 3 H W"]:
        """0..255 (bytes or floats) mapped to [-1, 1]; there is no posterior, the noise is not used."""
        return moments.float() / 127.5 - 1

    def decode(self, latents: Float[Tensor, "B 3 H W"]) -> UInt8[Tensor, "B 3 H W"]:
        """Pixels, rounded and clipped."""
        return to_bytes(latents)


Builder = Callable[[DataConfig, torch.device | None], ImageCodec]


def _with_weights(codec: Callable[[str, torch.device | None, torch.dtype], LatentCodec]) -> Builder:
    def build(config: DataConfig, device: torch.device | None) -> ImageCodec:
        place = required("data.codec_path", config.codec_path, f"data.codec={config.codec}")
        return codec(place, device, DTYPES[config.codec_dtype])

    return build


CODECS: dict[str, Builder] = {
    "pixels": lambda config, device: PixelCodec(),
    **{codec.name: _with_weights(codec) for codec in DIFFUSERS_CODECS},
    "taef2": _with_weights(Taef2Codec),
}


def build_codec(config: DataConfig, device: torch.device | None = None) -> ImageCodec:
    """The codec of a run.

    Args:
        config: ``codec``, ``codec_path`` and ``codec_dtype``.
        device: where an autoencoder runs; the CPU by default.

    Returns:
        The codec; it takes tensors on any device and answers on the same.

    Raises:
        UserError: if weights or packages are missing.
    """
    return CODECS[config.codec](config, device)
