"""How near pictures are to those they should be, one by one: PSNR, SSIM, and a distance of features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.tensors import Float, UInt8

WINDOW, WINDOW_SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def psnr(made: UInt8[Tensor, "B 3 H W"], real: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio of every picture: 10 log10 255^2 / mean squared error over RGB.

    Args:
        made: drawn pictures.
        real: what they should be.

    Returns:
        Decibels; infinite where both are the same.
    """
    error_B = (made.double() - real.double()).square().flatten(1).mean(dim=1)
    return 10 * (255.0**2 / error_B).log10()


def ssim(made: UInt8[Tensor, "B 3 H W"], real: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Structural similarity of every picture, mean over RGB and over the places where the window fits.

    Args:
        made: drawn pictures, 11 pixels a side or more.
        real: what they should be.

    Returns:
        At most 1.

    Source: Wang et al. 2004, doi 10.1109/TIP.2003.819861: Gaussian window of 11 pixels, sigma 1.5.
    """
    places = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    bell = torch.exp(-(places**2) / (2 * WINDOW_SIGMA**2))
    bell = bell / bell.sum()
    kernel = (bell[:, None] * bell[None, :]).expand(3, 1, WINDOW, WINDOW)

    def blurred(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, groups=3)

    x, y = made.double(), real.double()
    mean_x, mean_y = blurred(x), blurred(y)
    variance_x = blurred(x * x) - mean_x**2
    variance_y = blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    a, b = (K1 * 255) ** 2, (K2 * 255) ** 2
    similar = (2 * mean_x * mean_y + a) * (2 * covariance + b)
    return (similar / ((mean_x**2 + mean_y**2 + a) * (variance_x + variance_y + b))).flatten(1).mean(dim=1)


def feature_distance(made_NF: Float[Tensor, "N F"], real_NF: Float[Tensor, "N F"]) -> Float[Tensor, " N"]:
    """1 - cosine of the features of each pair. This is not LPIPS, and must not be called so.

    Args:
        made_NF: of drawn pictures.
        real_NF: of what they should be, in the same order.

    Returns:
        0 (the same) to 2.
    """
    return 1 - F.cosine_similarity(made_NF.double(), real_NF.double(), dim=1)
