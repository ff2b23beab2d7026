"""FLOPs of a U-Net in closed form, so that plans and advice need neither diffusers nor weights."""

from __future__ import annotations

from dataclasses import dataclass

from shoestring.config import UNetConfig
from shoestring.models.guidance import GuidanceEmbedding

CLASS_TOKENS = 2
"""Of the caption that a class is shown as."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of one image."""

    forward: float
    training: float
    """Forward and backward, recomputation not counted."""


@dataclass
class _Counter:
    """Multiply-accumulates, and those of layers that look at inputs, which need no gradient of them."""

    model: UNetConfig
    caption: int
    macs: float = 0.0
    inputs: float = 0.0

    def convolution(self, wide_in: int, wide_out: int, places: int, kernel: int = 9) -> None:
        self.macs += kernel * wide_in * wide_out * places

    def resnet(self, wide_in: int, wide_out: int, places: int) -> None:
        """Two convolutions, the time, and a way around where the width changes."""
        self.convolution(wide_in, wide_out, places)
        self.macs += 4 * self.model.channels * wide_out
        self.convolution(wide_out, wide_out, places)
        if wide_in != wide_out:
            self.convolution(wide_in, wide_out, places, kernel=1)

    def attention(self, width: int, places: int) -> None:
        """Maps in and out; in each block attention to itself and to the caption, and a gated feed-forward."""
        self.macs += 2 * width * width * places
        for _ in range(self.model.attention_depth):
            self.macs += 4 * width * width * places + 2 * places * places * width
            self.macs += 2 * width * width * places + 2 * places * self.caption * width
            keys_values = 2 * self.caption * self.model.caption_dim * width
            self.macs += keys_values
            if self.model.condition == "text":
                self.inputs += keys_values
            self.macs += 12 * width * width * places


def unet_flops(model: UNetConfig, grid: tuple[int, int], caption_tokens: int) -> Flops:
    """FLOPs that one image needs.

    Args:
        model: the network.
        grid: rows and columns after the pixel-unshuffle.
        caption_tokens: caption length S; ignored without captions.

    Returns:
        Forward and training FLOPs, equal to torch's counter.
    """
    widths, last = model.widths, len(model.widths) - 1
    sizes = [grid]
    for _ in range(last):  # a stride of two, rounded up
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    places = [rows * columns for rows, columns in sizes]
    count = _Counter(model, max(1, caption_tokens) if model.condition == "text" else CLASS_TOKENS)
    c, values = model.channels, model.in_channels * model.patch_size**2
    count.convolution(values + model.image_channels * model.patch_size**2, c, places[0])
    count.macs += 4 * c * c
    count.macs += GuidanceEmbedding.FEATURES * c * model.guidance_input
    count.inputs += count.macs
    count.macs += 16 * c * c  # the second half of the time embedding

    for i, width in enumerate(widths):
        before = widths[i - 1] if i else c
        for layer in range(model.layers):
            count.resnet(width if layer else before, width, places[i])
            if model.attention[i]:
                count.attention(width, places[i])
        if i < last:
            count.convolution(width, width, places[i + 1])
    for wide_in in (widths[-1], widths[-1]):
        count.resnet(wide_in, widths[-1], places[-1])
    count.attention(widths[-1], places[-1])
    for i in range(last, -1, -1):
        width, above = widths[i], widths[min(i + 1, last)]
        for layer in range(model.layers + 1):
            skipped = width if layer < model.layers else widths[max(i - 1, 0)]
            count.resnet((width if layer else above) + skipped, width, places[i])
            if model.attention[i]:
                count.attention(width, places[i])
        if i:
            count.convolution(width, width, places[i - 1])
    count.convolution(c, values, places[0])
    return Flops(forward=2 * count.macs, training=2 * (3 * count.macs - count.inputs))
