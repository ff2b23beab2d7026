"""DPM-Solver++ in single steps: groups of two or three levels, each step from the group's start."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from shoestring.interfaces import Conditioning, Denoiser
from shoestring.sampling.solvers import Level, OnStep, estimate, kept_share
from shoestring.tensors import Float


def group_lengths(steps: int, order: int) -> list[int]:
    """How the steps of a grid are grouped: full groups, a shorter one, and the last step alone.

    Args:
        steps: of the grid.
        order: length of a full group.

    Returns:
        Lengths that sum to the steps.
    """
    full, rest = divmod(steps - 1, order)
    return [order] * full + ([rest] if rest else []) + [1]


def _singlestep(
    denoiser: Denoiser,
    x: Tensor,
    grid: Sequence[Level],
    conditioning: Conditioning,
    on_step: OnStep | None,
    order: int,
) -> Tensor:
    first = 0
    for length in group_lengths(len(grid) - 1, order):
        start, begun, found = grid[first], x, list[Tensor]()
        for i in range(first, first + length):
            x0, _ = estimate(denoiser, x, grid[i], conditioning)
            found.append(x0)
            x = _update(begun, start, grid[i], grid[i + 1], found)
            if on_step is not None:
                on_step(i, x0)
        first += length
    return x


def _update(x: Tensor, start: Level, middle: Level, end: Level, found: Sequence[Tensor]) -> Tensor:
    """From the group's start to ``end``, with the estimates at the start and in the middle."""
    kept = kept_share(start, end)
    gained = end[0] * (1 - kept)
    result = end[1] / start[1] * x + gained * found[0]
    if len(found) == 1 or kept == 0:  # steps of infinite length are of first order
        return result
    h, kept_middle = -math.log(kept), kept_share(start, middle)
    slope = (found[-1] - found[0]) * (h / -math.log(kept_middle))
    if len(found) == 2:
        return result + gained / 2 * slope
    return result + end[0] * (1 - (1 - kept) / h) * slope


def dpm_solver_2s(
    denoiser: Denoiser,
    x: Float[Tensor, "B C H W"],
    grid: Sequence[Level],
    conditioning: Conditioning,
    on_step: OnStep | None = None,
) -> Float[Tensor, "B C H W"]:
    """DPM-Solver++ (2S): second order, in groups of two steps; one network call a level of the grid.

    Arguments and result as :func:`shoestring.sampling.solvers.euler`.

    Source: arXiv 2211.01095, algorithm 1.
    """
    return _singlestep(denoiser, x, grid, conditioning, on_step, order=2)


def dpm_solver_3s(
    denoiser: Denoiser,
    x: Float[Tensor, "B C H W"],
    grid: Sequence[Level],
    conditioning: Conditioning,
    on_step: OnStep | None = None,
) -> Float[Tensor, "B C H W"]:
    """DPM-Solver (3S) for estimates of x0: groups of three steps; third order where these are even in lambda.

    Arguments and result as :func:`shoestring.sampling.solvers.euler`.

    Source: arXiv 2206.00927, algorithm 2, with the exponentials of arXiv 2211.01095.
    """
    return _singlestep(denoiser, x, grid, conditioning, on_step, order=3)
