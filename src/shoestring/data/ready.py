"""Stores of ready latents: draws that somebody else made, not moments."""

from __future__ import annotations

import torch
from torch import Tensor

from shoestring.data.manifest import LatentsColumn
from shoestring.interfaces import Identity, ImageCodec
from shoestring.tensors import Float, UInt8


class ReadyLatents:
    """A codec whose stored values are model latents already; it decodes, and encodes nothing.

    Args:
        codec: made the latents.
    """

    moment_dtype = torch.float16

    def __init__(self, codec: ImageCodec) -> None:
        self._codec = codec
        self.name, self.channels, self.downsampling = codec.name, codec.channels, codec.downsampling
        self.moment_channels = codec.channels

    @property
    def identity(self) -> Identity:
        """Of the codec."""
        return self._codec.identity

    def encode(self, pixels: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B M h w"]:
        """Not to be asked for: new pictures are encoded to moments."""
        raise AssertionError("ready latents are not encoded anew")

    def latents(
        self, moments: Float[Tensor, "B C h w"], noise: Float[Tensor, "B C h w"]
    ) -> Float[Tensor, "B C h w"]:
        """What is stored; there is no posterior to draw from, the noise is not used."""
        return moments.float()

    def decode(self, latents: Float[Tensor, "B C h w"]) -> UInt8[Tensor, "B 3 H W"]:
        """As the codec does."""
        return self._codec.decode(latents)


def codec_for(column: LatentsColumn, codec: ImageCodec) -> ImageCodec:
    """What reads a column of latents.

    Args:
        column: of a store.
        codec: that made it.

    Returns:
        The codec, or around it one that takes what is stored for latents.
    """
    return ReadyLatents(codec) if column.sampled else codec
