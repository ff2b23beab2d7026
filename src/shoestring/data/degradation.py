"""From a picture to a small one such as cameras and the web make: for super-resolution.

``bicubic`` only resizes. ``realesrgan`` is the pipeline of two orders: blur, resize, noise, JPEG, all again
with milder settings, then the final size, a sinc filter and JPEG in either order. Its numbers are those that
were published.

Source: Real-ESRGAN, arXiv 2107.10833, section 3 and appendix A.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from shoestring.runtime import stream_seed
from shoestring.tensors import UInt8

Kind = Literal["bicubic", "realesrgan"]
Array = NDArray[np.float64]
RESIZES = ("area", "bilinear", "bicubic")
"""As torch's, without antialiasing, as published."""
LUMA = (0.299, 0.587, 0.114)
SINC_SHARE, FINAL_SINC_SHARE = 0.1, 0.8


@dataclass(frozen=True)
class Order:
    """Ranges of one of the two rounds."""

    blur_share: float
    """How often it blurs at all."""
    blur_sigma: tuple[float, float]
    """Pixels."""
    resize_shares: tuple[float, float, float]
    """How often up, down, not at all."""
    resize_range: tuple[float, float]
    """Factors."""
    gaussian_sigma: tuple[float, float]
    """Of 255."""
    poisson_scale: tuple[float, float]
    jpeg: tuple[float, float] = (30, 95)
    """Quality."""


FIRST = Order(1.0, (0.2, 3.0), (0.2, 0.7, 0.1), (0.15, 1.5), (1, 30), (0.05, 3))
SECOND = Order(0.8, (0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1, 25), (0.05, 2.5))
KERNEL_SHARES = {
    "isotropic": 0.45,
    "anisotropic": 0.25,
    "generalised isotropic": 0.12,
    "generalised anisotropic": 0.03,
    "plateau isotropic": 0.12,
    "plateau anisotropic": 0.03,
}
SIZES = tuple(range(7, 22, 2))
"""Sides of kernels in pixels."""
GREY_SHARE, GAUSSIAN_SHARE = 0.4, 0.5


def degrade(picture: UInt8[Tensor, "3 H W"], factor: int, kind: Kind, seed: int, number: int) -> Tensor:
    """A small picture; what happens to it depends on (seed, number) only.

    Args:
        picture: H and W are multiples of ``factor``.
        factor: how many times smaller.
        kind: ``bicubic`` or ``realesrgan``.
        seed: of all pictures.
        number: of this one.

    Returns:
        uint8 ``3 H/factor W/factor``.
    """
    height, width = picture.shape[1] // factor, picture.shape[2] // factor
    if kind == "bicubic":
        return _tensor(_image(picture).resize((width, height), Image.Resampling.BICUBIC))
    draw = np.random.default_rng(stream_seed(seed, "degradation", number))
    x = picture.permute(1, 2, 0).numpy().astype(np.float64) / 255
    x = _round(x, FIRST, x.shape[:2], draw)
    x = _round(x, SECOND, (height, width), draw)
    resize = str(draw.choice(RESIZES))
    sinc = draw.random() < FINAL_SINC_SHARE
    kernel = sinc_kernel(int(draw.choice(SIZES)), float(draw.uniform(math.pi / 3, math.pi)))
    quality = float(draw.uniform(*SECOND.jpeg))
    if draw.random() < 0.5:
        x = _resized(x, (height, width), resize)
        x = _jpeg(_filtered(x, kernel) if sinc else x, quality)
    else:
        x = _resized(_jpeg(x, quality), (height, width), resize)
        x = _filtered(x, kernel) if sinc else x
    return _tensor(_pil(x))


def _round(x: Array, order: Order, base: tuple[int, ...], draw: np.random.Generator) -> Array:
    """Blur, resize, noise, JPEG; sizes are factors of ``base``: the whole picture, then the small one."""
    if draw.random() < order.blur_share:
        x = _filtered(x, blur_kernel(order, draw))
    x = _resized(x, _size(order, base, draw), str(draw.choice(RESIZES)))
    x = _noisy(x, order, draw)
    if order is FIRST:  # the second JPEG comes with the final size
        x = _jpeg(x, float(draw.uniform(*order.jpeg)))
    return x


def _size(order: Order, base: tuple[int, ...], draw: np.random.Generator) -> tuple[int, int]:
    up, down, _ = order.resize_shares
    chance, (low, high) = draw.random(), order.resize_range
    factor = 1.0
    if chance < up:
        factor = draw.uniform(1, high)
    elif chance < up + down:
        factor = draw.uniform(low, 1)
    return max(1, round(base[0] * factor)), max(1, round(base[1] * factor))


# -- kernels ----------------------------------------------------------------------------------------------


def blur_kernel(order: Order, draw: np.random.Generator) -> Array:
    """A blur as one of the rounds has it: a sinc filter, or one of six kinds of bell.

    Args:
        order: its range of widths.
        draw: where the numbers come from.

    Returns:
        A square of odd side that sums to 1.
    """
    side = int(draw.choice(SIZES))
    if draw.random() < SINC_SHARE:
        return sinc_kernel(side, float(draw.uniform(math.pi / 3 if side < 13 else math.pi / 5, math.pi)))
    kind = str(draw.choice(list(KERNEL_SHARES), p=list(KERNEL_SHARES.values())))
    sigmas = draw.uniform(*order.blur_sigma, size=2)
    angle = float(draw.uniform(-math.pi, math.pi))
    if kind.endswith(" isotropic") or kind == "isotropic":
        sigmas, angle = np.array([sigmas[0], sigmas[0]]), 0.0
    shape = 1.0
    if kind.startswith("generalised"):
        shape = float(draw.uniform(0.5, 1) if draw.random() < 0.5 else draw.uniform(1, 4))
    elif kind.startswith("plateau"):
        shape = 1.0 if draw.random() < 0.5 else float(draw.uniform(1, 2))
    return bell_kernel(side, (float(sigmas[0]), float(sigmas[1])), angle, shape, kind.startswith("plateau"))


def bell_kernel(
    side: int, sigmas: tuple[float, float], angle: float, shape: float, plateau: bool = False
) -> Array:
    """A generalised Gaussian exp(-(r^2)^shape / 2), or a plateau 1 / (1 + (r^2)^shape).

    Args:
        side: odd.
        sigmas: along its two axes, pixels.
        angle: of the first axis.
        shape: 1 = the Gaussian.
        plateau: the second form.

    Returns:
        A square that sums to 1.

    Source: arXiv 2107.10833, section 3.1.
    """
    places = np.arange(side) - side // 2
    xs, ys = np.meshgrid(places, places)
    along = math.cos(angle) * xs + math.sin(angle) * ys
    across = -math.sin(angle) * xs + math.cos(angle) * ys
    squared = (along / sigmas[0]) ** 2 + (across / sigmas[1]) ** 2
    values = 1 / (1 + squared**shape) if plateau else np.exp(-0.5 * squared**shape)
    return np.asarray(values / values.sum())


def sinc_kernel(side: int, cutoff: float) -> Array:
    """An ideal low-pass filter in two dimensions, cut off: it rings, as sharpened and compressed pictures do.

    Args:
        side: odd.
        cutoff: radians a pixel.

    Returns:
        A square that sums to 1.

    Source: arXiv 2107.10833, equation 6: cutoff J1(cutoff r) / (2 pi r).
    """
    places = torch.arange(side, dtype=torch.float64) - side // 2
    radius = (places[:, None] ** 2 + places[None, :] ** 2).sqrt()
    safe = radius.clamp(min=1e-9)
    values = cutoff * torch.special.bessel_j1(cutoff * safe) / (2 * math.pi * safe)
    values[side // 2, side // 2] = cutoff**2 / (4 * math.pi)
    return np.asarray((values / values.sum()).numpy())


# -- operations -------------------------------------------------------------------------------------------


def _filtered(x: Array, kernel: Array) -> Array:
    """Convolved with a symmetric kernel, edges repeated."""
    half = kernel.shape[0] // 2
    planes = torch.from_numpy(x).permute(2, 0, 1)[:, None]
    planes = F.pad(planes, (half, half, half, half), mode="replicate")
    out = F.conv2d(planes, torch.from_numpy(kernel)[None, None])
    return np.asarray(out[:, 0].permute(1, 2, 0).numpy())


def _resized(x: Array, size: tuple[int, int], mode: str) -> Array:
    """To (height, width)."""
    planes = F.interpolate(torch.from_numpy(x).permute(2, 0, 1)[None], size, mode=mode)
    return np.asarray(planes[0].permute(1, 2, 0).numpy())


def _noisy(x: Array, order: Order, draw: np.random.Generator) -> Array:
    grey = draw.random() < GREY_SHARE
    if draw.random() < GAUSSIAN_SHARE:
        sigma = float(draw.uniform(*order.gaussian_sigma)) / 255
        noise = draw.standard_normal((*x.shape[:2], 1 if grey else 3)) * sigma
        return np.clip(x + noise, 0, 1)
    scale = float(draw.uniform(*order.poisson_scale))
    clean = np.clip(x, 0, 1)
    if grey:
        clean = (clean * np.array(LUMA)).sum(axis=2, keepdims=True)
    # So many photons as grey levels; the noise is scaled, the picture is not.
    counts = 2.0 ** math.ceil(math.log2(max(2, len(np.unique(np.round(clean * 255))))))
    noise = (draw.poisson(clean * counts) / counts - clean) * scale
    return np.clip(x + noise, 0, 1)


def _jpeg(x: Array, quality: float) -> Array:
    file = io.BytesIO()
    _pil(x).save(file, "JPEG", quality=round(quality))
    return np.asarray(Image.open(file), dtype=np.float64) / 255


def _pil(x: Array) -> Image.Image:
    return Image.fromarray(np.round(np.clip(x, 0, 1) * 255).astype(np.uint8))


def _image(picture: Tensor) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()


def enlarged(pictures: UInt8[Tensor, "B 3 h w"], factor: int) -> UInt8[Tensor, "B 3 H W"]:
    """Pictures by bicubic interpolation: what a network begins with, and what it is compared with."""
    size = (pictures.shape[3] * factor, pictures.shape[2] * factor)
    return torch.stack(
        [_tensor(_image(picture).resize(size, Image.Resampling.BICUBIC)) for picture in pictures]
    )
