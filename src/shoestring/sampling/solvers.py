"""What all samplers share, and the solvers of the probability-flow ODE that need no memory of past steps.

With x0 and eps = (x - alpha x0) / sigma the ODE reads dx = x0 d(alpha) + eps d(sigma). For EDM (alpha = 1)
this is dx / d(sigma) = eps, for flow matching dx / dt = eps - x0: one solver serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shoestring.interfaces import Conditioning, Denoiser, NoiseLevel
from shoestring.tensors import Float

Level = tuple[float, float]
OnStep = Callable[[int, Tensor], None]
Noise = Callable[[int], Tensor]
"""Standard normal numbers like x for a step, by its number."""


def estimate(
    denoiser: Denoiser, x: Float[Tensor, "B C H W"], level: Level, conditioning: Conditioning
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
    """Call the network.

    Args:
        denoiser: estimates x0.
        x: noisy latents.
        level: their alpha and sigma.
        conditioning: captions.

    Returns:
        The estimates of x0 and of the noise in ``x``.
    """
    alpha, sigma = (torch.full((x.shape[0],), v, dtype=x.dtype, device=x.device) for v in level)
    x0 = denoiser(x, NoiseLevel(alpha, sigma), conditioning).image()
    return x0, (x - level[0] * x0) / level[1]


def _integrate(
    denoiser: Denoiser,
    x: Tensor,
    grid: Sequence[Level],
    conditioning: Conditioning,
    on_step: OnStep | None,
    second_order: bool,
) -> Tensor:
    for i, (level, following) in enumerate(zip(grid, grid[1:], strict=False)):
        d_alpha, d_sigma = following[0] - level[0], following[1] - level[1]
        x0, eps = estimate(denoiser, x, level, conditioning)
        ahead = x + d_alpha * x0 + d_sigma * eps
        if second_order and following[1] > 0:
            x0_ahead, eps_ahead = estimate(denoiser, ahead, following, conditioning)
            ahead = x + d_alpha * (x0 + x0_ahead) / 2 + d_sigma * (eps + eps_ahead) / 2
        x = ahead
        if on_step is not None:
            on_step(i, x0)
    return x


def euler(
    denoiser: Denoiser,
    x: Float[Tensor, "B C H W"],
    grid: Sequence[Level],
    conditioning: Conditioning,
    on_step: OnStep | None = None,
) -> Float[Tensor, "B C H W"]:
    """First-order solver (DDIM): one network call a step.

    Args:
        denoiser: estimates x0.
        x: noise scaled to ``grid[0]``.
        grid: (alpha, sigma) pairs, noisiest first, ending at (1, 0).
        conditioning: captions, best prepared.
        on_step: called after each step with its number and the current estimate of x0.

    Returns:
        Clean latents.

    Source: arXiv 2010.02502; arXiv 2206.00364, algorithm 1 without correction.
    """
    return _integrate(denoiser, x, grid, conditioning, on_step, second_order=False)


def heun(
    denoiser: Denoiser,
    x: Float[Tensor, "B C H W"],
    grid: Sequence[Level],
    conditioning: Conditioning,
    on_step: OnStep | None = None,
) -> Float[Tensor, "B C H W"]:
    """Second-order solver: Euler, then the trapezoid rule, except into sigma 0. 2 N - 1 calls.

    Arguments and result as :func:`euler`.

    Source: EDM, arXiv 2206.00364, algorithm 1, deterministic.
    """
    return _integrate(denoiser, x, grid, conditioning, on_step, second_order=True)


def kept_share(level: Level, following: Level) -> float:
    """The share of x that a step keeps beside its scale: e^-h for a step of h in lambda = ln(alpha / sigma).

    Args:
        level: alpha and sigma before the step.
        following: after it.

    Returns:
        The ratio of the two noise-to-signal ratios; 0 from pure noise, and into sigma 0.
    """
    return level[0] * following[1] / (following[0] * level[1])
