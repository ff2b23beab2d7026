"""Solvers of the probability-flow ODE on any grid of noise levels.

With x0 and eps = (x - alpha x0) / sigma the ODE reads dx = x0 d(alpha) + eps d(sigma). For EDM (alpha = 1)
this is dx / d(sigma) = eps, for flow matching dx / dt = eps - x0: one solver serves both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shoestring.interfaces import Conditioning, Denoiser, NoiseLevel
from shoestring.tensors import Float

Level = tuple[float, float]
OnStep = Callable[[int, Tensor], None]


def _estimate(
    denoiser: Denoiser, x: Tensor, level: Level, conditioning: Conditioning
) -> tuple[Tensor, Tensor]:
    """The estimates of x0 and of the noise in ``x``."""
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
        x0, eps = _estimate(denoiser, x, level, conditioning)
        ahead = x + d_alpha * x0 + d_sigma * eps
        if second_order and following[1] > 0:
            x0_ahead, eps_ahead = _estimate(denoiser, ahead, following, conditioning)
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


def _remaining(level: Level, following: Level) -> float:
    """e^-h for a step of h in lambda = ln(alpha / sigma): the share of x that is kept; 0 from pure noise."""
    return level[0] * following[1] / (following[0] * level[1])


def _multistep(
    denoiser: Denoiser,
    x: Tensor,
    grid: Sequence[Level],
    conditioning: Conditioning,
    on_step: OnStep | None,
    order: int,
) -> Tensor:
    """DPM-Solver++ with the estimates of x0 of the steps before: a call a step, whatever the order.

    Near the ends fewer estimates serve: as long as there are not enough of them, after a step of infinite
    length in lambda (from pure noise), and into sigma 0, which is one too.
    """
    before: list[tuple[float, Tensor]] = []  # length of the step from it, and the estimate; the newest first
    for i, (level, following) in enumerate(zip(grid, grid[1:], strict=False)):
        x0, _ = _estimate(denoiser, x, level, conditioning)
        kept = _remaining(level, following)
        h = -math.log(kept) if kept > 0 else math.inf
        usable = [] if math.isinf(h) else before[: order - 1]
        if any(math.isinf(length) for length, _ in usable):
            usable = usable[: next(k for k, (length, _) in enumerate(usable) if math.isinf(length))]
        gained = following[0] * (1 - kept)
        ahead = following[1] / level[1] * x + gained * x0
        if usable:
            # Differences of the estimates in lambda, in units of this step.
            ratio, slope = usable[0][0] / h, (x0 - usable[0][1]) * (h / usable[0][0])
            if len(usable) == 1:
                ahead = ahead + gained / 2 * slope
            else:
                ratio_before = usable[1][0] / h
                slope_before = (usable[0][1] - usable[1][1]) / ratio_before
                bend = (slope - slope_before) / (ratio + ratio_before)
                slope = slope + ratio * bend
                # Integrals of e^(u - h) u / h and of e^(u - h) (u / h)^2 for u from 0 to h.
                of_slope, of_bend = 1 - (1 - kept) / h, 1 - 2 / h + 2 * (1 - kept) / h**2
                ahead = ahead + following[0] * (of_slope * slope + of_bend * bend)
        before = [(h, x0), *before[:1]]
        x = ahead
        if on_step is not None:
            on_step(i, x0)
    return x


def dpm_solver_2m(
    denoiser: Denoiser,
    x: Float[Tensor, "B C H W"],
    grid: Sequence[Level],
    conditioning: Conditioning,
    on_step: OnStep | None = None,
) -> Float[Tensor, "B C H W"]:
    """DPM-Solver++ (2M): second order, one network call a step.

    Arguments and result as :func:`euler`.

    Source: arXiv 2211.01095, algorithm 2.
    """
    return _multistep(denoiser, x, grid, conditioning, on_step, order=2)


def dpm_solver_3m(
    denoiser: Denoiser,
    x: Float[Tensor, "B C H W"],
    grid: Sequence[Level],
    conditioning: Conditioning,
    on_step: OnStep | None = None,
) -> Float[Tensor, "B C H W"]:
    """DPM-Solver++ (3M): third order, one network call a step.

    The estimates of three steps make a parabola in lambda, which is integrated exactly. Common
    implementations (diffusers, k-diffusion) take half of its quadratic part, with which the order is two.

    Arguments and result as :func:`euler`.

    Source: arXiv 2211.01095, section 4.2 and appendix B.
    """
    return _multistep(denoiser, x, grid, conditioning, on_step, order=3)


SOLVERS = {"heun": heun, "euler": euler, "dpmpp-2m": dpm_solver_2m, "dpmpp-3m": dpm_solver_3m}


def network_calls(sampler: str, steps: int) -> int:
    """Network evaluations of one picture, guidance not counted.

    Args:
        sampler: a key of ``SOLVERS``.
        steps: noise levels.

    Returns:
        How many.
    """
    return 2 * steps - 1 if sampler == "heun" else steps
