"""How pictures are brought to the size that a network looks at; each convention gives other distances."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from shoestring.tensors import Float, UInt8


def tensorflow_bilinear(pixels: UInt8[Tensor, "B 3 H W"], side: int) -> Float[Tensor, "B 3 side side"]:
    """Bilinear as in TensorFlow 1, inside the original Inception graph: corners at 0, no antialiasing.

    The value at place i is read at i * H / side, so that the picture is shifted by up to half a pixel, and
    details are skipped where it becomes smaller. FID of the ADM suite and of most papers.

    Args:
        pixels: pictures.
        side: of the result.

    Returns:
        Values from 0 to 255.
    """
    x = pixels.float()
    for dim in (2, 3):
        size = x.shape[dim]
        place = torch.arange(side, dtype=torch.float32, device=x.device) * (size / side)
        low = place.floor().long()
        high = (low + 1).clamp(max=size - 1)
        share = (place - low).reshape([side if i == dim else 1 for i in range(4)])
        first, second = x.index_select(dim, low), x.index_select(dim, high)
        x = first + (second - first) * share
    return x


def pillow_bicubic(pixels: UInt8[Tensor, "B 3 H W"], side: int) -> Float[Tensor, "B 3 side side"]:
    """Bicubic with antialiasing by Pillow, each channel in floating point, cut to the range, not rounded.

    That of clean-fid.

    Args:
        pixels: pictures.
        side: of the result.

    Returns:
        Values from 0 to 255.
    """
    if pixels.shape[2:] == (side, side):
        return pixels.float()

    def resized(channel_HW: Tensor) -> np.ndarray:
        picture = Image.fromarray(channel_HW.cpu().numpy().astype(np.float32), mode="F")
        return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC)).clip(0, 255)

    channels = [resized(channel) for channel in pixels.flatten(0, 1)]
    return torch.from_numpy(np.stack(channels)).unflatten(0, (len(pixels), 3)).to(pixels.device)


def torch_bicubic(pixels: UInt8[Tensor, "B 3 H W"], side: int) -> Float[Tensor, "B 3 side side"]:
    """Bicubic with antialiasing by torch, cut to the range of pictures: nearly Pillow's, and fast.

    Args:
        pixels: pictures.
        side: of the result.

    Returns:
        Values from 0 to 255.
    """
    x = pixels.float()
    if x.shape[2:] != (side, side):
        x = F.interpolate(x, (side, side), mode="bicubic", align_corners=False, antialias=True)
    return x.clamp(0, 255)  # bicubic weights overshoot at edges


RESIZES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "tensorflow-bilinear": tensorflow_bilinear,
    "pillow-bicubic": pillow_bicubic,
    "torch-bicubic": torch_bicubic,
}
