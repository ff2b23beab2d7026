"""Scaling laws from measured points: quality over compute, with intervals.

Quality is meant so that lower is better (KID, FD, loss): q(C) = a + b C^-c with b, c > 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from shoestring.runtime import UserError, stream_seed

Array = NDArray[np.float64]
Point = tuple[float, float]
"""Compute and quality."""
LEAST_POINTS = 4
STEEPEST, FLATTEST = 3.0, 0.01
"""Exponents beyond which a curve is a step, or a line in log C."""
LEVEL = 0.95


@dataclass(frozen=True)
class PowerLaw:
    """q(C) = a + b (C / scale)^-c."""

    a: float
    b: float
    c: float
    scale: float
    """Compute at which b is meant: the geometric mean of the fitted points."""

    def at(self, compute: float) -> float:
        """Quality at so much compute."""
        return self.a + self.b * (compute / self.scale) ** -self.c


@dataclass(frozen=True)
class Fit:
    """A fitted law and how sure it is."""

    law: PowerLaw
    intervals: Mapping[str, tuple[float, float]]
    """Of a, b and c, 95 %, by the bootstrap."""
    draws: tuple[PowerLaw, ...]
    """Laws of resampled points."""
    low: float
    """Least compute that was measured."""
    high: float

    def interval_at(self, compute: float) -> tuple[float, float]:
        """Of the quality at so much compute, 95 %; how the points scatter around the law is not in it."""
        return _interval(np.array([law.at(compute) for law in self.draws]))

    def extrapolates(self, compute: float) -> float:
        """How many times beyond the measured range; 1 = within it."""
        return max(1.0, compute / self.high, self.low / compute)


def fit_power_law(points: Sequence[Point], rounds: int = 400, seed: int = 0) -> Fit:
    """Fit q = a + b C^-c by least squares.

    For each exponent the best a and b are a linear problem, so only c is searched. Intervals are of
    residuals that are drawn anew around the fitted curve, widened for the three fitted parameters, with the
    quantiles of Student's t instead of the normal ones.

    Args:
        points: compute (above 0) and quality, of at least four different amounts of compute.
        rounds: of the bootstrap.
        seed: of its draws.

    Returns:
        The fit.

    Raises:
        UserError: if there are too few points, or quality does not get better with compute, so that nothing
            can be fitted.
    """
    if any(not (compute > 0 and math.isfinite(compute) and math.isfinite(q)) for compute, q in points):
        raise UserError("a scaling fit needs finite figures at compute above 0")
    x, q = (np.array(values, dtype=np.float64) for values in zip(*sorted(points), strict=True))
    if len(set(x.tolist())) < LEAST_POINTS:
        raise UserError(
            f"{len(set(x.tolist()))} different amounts of compute are too few for a fit of three parameters; "
            f"measure at {LEAST_POINTS} or more (checkpoints of one training count)"
        )
    scale = float(np.exp(np.log(x).mean()))
    law = _least_squares(x / scale, q, scale)
    if law is None:
        raise UserError(
            "the fit diverges: quality does not get better with compute in these points, as q = a + b C^-c "
            "with b, c > 0 must; measure more pictures or longer trainings"
        )
    if _at_a_bound(law):
        shape = "a line in log C, without a floor in sight" if law.c < 1 else "a step"
        raise UserError(
            f"the fit diverges: these points are best described as {shape}; measure at more compute"
        )
    fitted = np.array([law.at(value) for value in x])
    spread = (q - fitted) * _widened(len(x))
    draw = np.random.default_rng(stream_seed(seed, "scaling"))
    draws = []
    for _ in range(rounds):
        again = _least_squares(x / scale, fitted + draw.choice(spread, len(x)), scale)
        if again is not None:
            draws.append(again)
    if len(draws) < rounds / 2:
        raise UserError(
            "the fit diverges: of resampled points more than half have no law; the points scatter as much as "
            "they fall, so measure more pictures or longer trainings"
        )
    intervals = {name: _interval(np.array([getattr(d, name) for d in draws])) for name in ("a", "b", "c")}
    return Fit(law, intervals, tuple(draws), float(x[0]), float(x[-1]))


def _widened(count: int) -> float:
    """Residuals of n points around a curve with three parameters are too small, and few of them too sure."""
    from scipy.stats import norm, t

    free = max(1, count - 3)
    tail = (1 + LEVEL) / 2
    return math.sqrt(count / free) * float(t.ppf(tail, free) / norm.ppf(tail))


def _least_squares(x: Array, q: Array, scale: float) -> PowerLaw | None:
    def linear(c: float) -> tuple[float, float, float]:
        """A, b and the squared error at an exponent."""
        powers = x**-c
        centred, around = powers - powers.mean(), q - q.mean()
        b = float(centred @ around / (centred @ centred))
        return float(q.mean() - b * powers.mean()), b, float(np.square(around - b * centred).sum())

    grid = np.geomspace(FLATTEST, STEEPEST, 25)
    best = int(np.argmin([linear(c)[2] for c in grid]))
    low, high = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    c = float(minimize_scalar(lambda value: linear(value)[2], bounds=(low, high), method="bounded").x)
    a, b, _ = linear(c)
    return PowerLaw(a, b, c, scale) if b > 0 else None


def _at_a_bound(law: PowerLaw) -> bool:
    return not 1.1 * FLATTEST < law.c < STEEPEST / 1.01


def _interval(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def interpolated(points: Sequence[Point], compute: float) -> float | None:
    """Quality at some compute, read off measured points on the logarithmic axis.

    Args:
        points: compute and quality.
        compute: where.

    Returns:
        ``None`` outside the measured range.
    """
    ordered = sorted(points)
    if not ordered or not ordered[0][0] <= compute * (1 + 1e-9) or not compute <= ordered[-1][0] * (1 + 1e-9):
        return None
    x = [math.log(value) for value, _ in ordered]
    return float(np.interp(math.log(compute), x, [quality for _, quality in ordered]))


def iso_flop(
    curves: Mapping[str, Sequence[Point]], budgets: Sequence[float]
) -> dict[float, dict[str, float]]:
    """Quality of every size at equal training compute, read off the curves.

    Args:
        curves: by size, compute and quality of its checkpoints.
        budgets: training compute.

    Returns:
        By budget, the sizes that were measured around it.
    """
    table: dict[float, dict[str, float]] = {}
    for budget in budgets:
        found = {name: interpolated(points, budget) for name, points in curves.items()}
        table[budget] = {name: value for name, value in found.items() if value is not None}
    return table
