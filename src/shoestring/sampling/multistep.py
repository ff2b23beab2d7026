"""Solvers that remember estimates of past steps: DPM-Solver++ of second and third order, and UniPC.

In lambda = ln(alpha / sigma) the ODE is x_t = sigma_t / sigma_s x + alpha_t integral of e^(u - h) x0(u) du,
for u from 0 to h, the length of the step; the estimates of x0 make a line or a parabola under the integral.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from shoestring.interfaces import Conditioning, Denoiser
from shoestring.sampling.solvers import Level, Noise, OnStep, estimate, kept_share
from shoestring.tensors import Float


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
        x0, _ = estimate(denoiser, x, level, conditioning)
        kept = kept_share(level, following)
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


def dpm_solver_2m_sde(
    denoiser: Denoiser,
    x: Float[Tensor, "B C H W"],
    grid: Sequence[Level],
    conditioning: Conditioning,
    on_step: OnStep | None,
    noise: Noise,
) -> Float[Tensor, "B C H W"]:
    """SDE-DPM-Solver++ (2M): second order in the estimates, fresh noise in every step but the last.

    Args:
        denoiser: estimates x0.
        x: noise scaled to ``grid[0]``.
        grid: (alpha, sigma) pairs, noisiest first, ending at (1, 0).
        conditioning: captions, best prepared.
        on_step: called after each step with its number and the current estimate of x0.
        noise: standard normal numbers of every step.

    Returns:
        Clean latents.

    Source: arXiv 2211.01095, section 5 and appendix.
    """
    before: tuple[float, Tensor] | None = None
    for i, (level, following) in enumerate(zip(grid, grid[1:], strict=False)):
        x0, _ = estimate(denoiser, x, level, conditioning)
        kept = kept_share(level, following)
        h = -math.log(kept) if kept > 0 else math.inf
        forward = x0
        if before is not None and math.isfinite(h) and math.isfinite(before[0]):
            forward = x0 + (x0 - before[1]) * (h / before[0]) / 2
        x = following[1] / level[1] * kept * x + following[0] * (1 - kept**2) * forward
        if following[1] > 0:
            x = x + following[1] * math.sqrt(1 - kept**2) * noise(i)
        before = (h, x0)
        if on_step is not None:
            on_step(i, x0)
    return x


def unipc(
    denoiser: Denoiser,
    x: Float[Tensor, "B C H W"],
    grid: Sequence[Level],
    conditioning: Conditioning,
    on_step: OnStep | None = None,
) -> Float[Tensor, "B C H W"]:
    """UniPC of second order (B(h) = e^h - 1, estimates of x0): 2M predicts, the next estimate corrects.

    The network is called once a step, at what was predicted; what is corrected goes on.

    Arguments and result as :func:`shoestring.sampling.solvers.euler`.

    Source: arXiv 2302.04867, algorithms 1 and 2.
    """
    # Of the step before: its ends, where it began, the estimate there, and how it had changed up to there.
    last: tuple[Level, Tensor, Tensor, tuple[float, Tensor] | None] | None = None
    before: tuple[float, Tensor] | None = None
    for i, (level, following) in enumerate(zip(grid, grid[1:], strict=False)):
        x0, _ = estimate(denoiser, x, level, conditioning)
        if last is not None:
            x = _corrected(*last, level, x0)
        kept = kept_share(level, following)
        h = -math.log(kept) if kept > 0 else math.inf
        usable = before if before is not None and math.isfinite(h + before[0]) else None
        gained = following[0] * (1 - kept)
        ahead = following[1] / level[1] * x + gained * x0
        if usable is not None:
            ahead = ahead + gained / 2 * (x0 - usable[1]) * (h / usable[0])
        last, before, x = (level, x, x0, usable), (h, x0), ahead
        if on_step is not None:
            on_step(i, x0)
    return x


def _corrected(
    start: Level, x: Tensor, x0: Tensor, before: tuple[float, Tensor] | None, end: Level, arrived: Tensor
) -> Tensor:
    """The step from ``start`` to ``end`` once more, with the estimate at its end."""
    kept = kept_share(start, end)
    gained = end[0] * (1 - kept)
    result = end[1] / start[1] * x + gained * x0
    change = arrived - x0
    if before is None or kept == 0:
        return result + gained / 2 * change
    h = -math.log(kept)
    ratio = -before[0] / h  # of the lengths; the past lies at negative places
    # Weights with which lines and parabolas through the three estimates are integrated as they should be.
    phi_1 = -(1 - kept)
    phi_2 = -phi_1 / h - 1
    phi_3 = -phi_2 / h - 0.5
    first, second = phi_2 / phi_1, 2 * phi_3 / phi_1
    weight_before = (first - second) / (1 - ratio)
    weight_end = first - weight_before
    slope_before = (before[1] - x0) / ratio
    return result + gained * (weight_before * slope_before + weight_end * change)
