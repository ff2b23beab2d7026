"""Samplers that draw noise on the way: DDIM with any share of it, and multistep consistency sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from shoestring.interfaces import Conditioning, Denoiser
from shoestring.sampling.solvers import Level, Noise, OnStep, estimate, kept_share
from shoestring.tensors import Float


def ddim(
    denoiser: Denoiser,
    x: Float[Tensor, "B C H W"],
    grid: Sequence[Level],
    conditioning: Conditioning,
    on_step: OnStep | None,
    noise: Noise,
    eta: float,
) -> Float[Tensor, "B C H W"]:
    """Each step to the next level with a part of the noise drawn anew.

    With eta 0 this is :func:`shoestring.sampling.solvers.euler`. With eta 1 it is DDPM's posterior between
    any two levels of the grid, and, as dividing by alpha shows, Euler's ancestral step of Karras et al. and
    the first-order SDE-DPM-Solver++: one sampler under three names.

    Args:
        denoiser: estimates x0.
        x: noise scaled to ``grid[0]``.
        grid: (alpha, sigma) pairs, noisiest first, ending at (1, 0).
        conditioning: captions, best prepared.
        on_step: called after each step with its number and the current estimate of x0.
        noise: standard normal numbers of every step.
        eta: 0 to 1.

    Returns:
        Clean latents.

    Source: arXiv 2010.02502, equations 12 and 16; arXiv 2006.11239, equation 7.
    """
    for i, (level, following) in enumerate(zip(grid, grid[1:], strict=False)):
        x0, eps = estimate(denoiser, x, level, conditioning)
        kept = kept_share(level, following)
        fresh = eta * following[1] * math.sqrt(1 - kept**2)
        x = following[0] * x0 + math.sqrt(following[1] ** 2 - fresh**2) * eps
        if fresh > 0:
            x = x + fresh * noise(i)
        if on_step is not None:
            on_step(i, x0)
    return x


def consistency(
    denoiser: Denoiser,
    x: Float[Tensor, "B C H W"],
    grid: Sequence[Level],
    conditioning: Conditioning,
    on_step: OnStep | None,
    noise: Noise,
) -> Float[Tensor, "B C H W"]:
    """Estimate the clean latents, add fresh noise of the next level, and so on: for distilled models.

    Arguments and result as :func:`ddim`.

    Source: arXiv 2303.01469, algorithm 1.
    """
    for i, (level, following) in enumerate(zip(grid, grid[1:], strict=False)):
        x0, _ = estimate(denoiser, x, level, conditioning)
        x = following[0] * x0
        if following[1] > 0:
            x = x + following[1] * noise(i)
        if on_step is not None:
            on_step(i, x0)
    return x
