"""Scaling laws from measured points: quality over compute, with intervals.

Quality is meant so that lower is better (KID, FD, loss): q(C) = a + b C^-c with b, c > 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from shoestring.runtime import UserError, stream_seed

Array = NDArray[np.float64]
Point = tuple[float, float]
"""Compute and quality."""
LEAST_POINTS = 4
STEEPEST, FLATTEST = 3.0, 0.01
"""Exponents beyond which a curve is a step, or a line in log C."""
SEARCHED = 1.1 * FLATTEST, STEEPEST / 1.01
"""An exponent outside of these lies at an end of the search."""
LEVEL = 0.95
GRID, ZOOMS = 33, 4
"""Exponents that are tried at once, and how often the grid becomes finer."""


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
    free = max(1, count - 3)
    return math.sqrt(count / free) * t_quantile(free) / NormalDist().inv_cdf((1 + LEVEL) / 2)


def t_quantile(free: int) -> float:
    """Where Student's t distribution has (1 + 0.95) / 2 below it.

    Args:
        free: degrees of freedom, 1 or more.

    Returns:
        12.7 for one, 1.96 for very many.
    """
    x = np.concatenate([np.linspace(0, 8, 20_001), np.geomspace(8, 100, 20_001)[1:]])
    log_scale = math.lgamma((free + 1) / 2) - math.lgamma(free / 2) - math.log(free * math.pi) / 2
    density = np.exp(log_scale - (free + 1) / 2 * np.log1p(x**2 / free))
    below = 0.5 + np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(x))])
    return float(np.interp((1 + LEVEL) / 2, below, x))


def _least_squares(x: Array, q: Array, scale: float) -> PowerLaw | None:
    """Every exponent has its best a and b in closed form; the best exponent is found by zooming in."""
    around = q - q.mean()

    def linear(c: Array) -> tuple[Array, Array, Array]:
        """A, b and the squared error at some exponents."""
        powers = x[None, :] ** -c[:, None]
        centred = powers - powers.mean(axis=1, keepdims=True)
        b = centred @ around / np.square(centred).sum(axis=1)
        errors = np.square(around - b[:, None] * centred).sum(axis=1)
        return q.mean() - b * powers.mean(axis=1), b, errors

    low, high = FLATTEST, STEEPEST
    for _ in range(ZOOMS):
        grid = np.geomspace(low, high, GRID)
        best = int(np.argmin(linear(grid)[2]))
        low, high = float(grid[max(0, best - 1)]), float(grid[min(GRID - 1, best + 1)])
    c = grid[best]
    a, b, _ = linear(np.array([c]))
    return PowerLaw(float(a[0]), float(b[0]), float(c), scale) if b[0] > 0 else None


def _at_a_bound(law: PowerLaw) -> bool:
    return not SEARCHED[0] < law.c < SEARCHED[1]


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
