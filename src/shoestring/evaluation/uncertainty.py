"""How sure a figure is: intervals of shares, the bootstrap, and Fréchet distances without their bias."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from shoestring.evaluation.distances import Features, frechet_distance
from shoestring.evaluation.moments import finite_rows
from shoestring.runtime import stream


def wilson_interval(successes: float, n: float, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a share; sensible at 0 and 1 and at small n, unlike p +- 2 se.

    Args:
        successes: how often it happened, 0 to n; a sum of shares is allowed.
        n: number of independent trials.
        z: normal quantile; 1.96 is for 95 %.

    Returns:
        Lower and upper end, within [0, 1].

    Raises:
        ValueError: if n is not positive or the successes are outside 0 to n.

    Source: Wilson 1927, J. Am. Stat. Assoc. 22, 209.
    """
    if not (n > 0 and 0 <= successes <= n):
        raise ValueError(f"{successes} successes of {n}: n must be positive and successes between 0 and n")
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def bootstrap_interval(
    statistic: Callable[[Tensor], float],
    rows_NF: ArrayLike | Tensor,
    rounds: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap interval of a statistic of a set of samples.

    The statistic of samples drawn with replacement spreads around its mean as the one of all does around the
    truth. That mean itself lies too high for distances, as a sample that is drawn twice makes a set look
    poorer; so only the spread is taken.

    Args:
        statistic: of features, a row a sample.
        rows_NF: all samples.
        rounds: how often to draw.
        level: share of such intervals that hold the truth.
        seed: of the draws.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: for fewer than two samples or rounds, or a level outside (0, 1).

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 10 and 13.
    """
    rows_NF = finite_rows(rows_NF, "samples", 2)
    if rounds < 2 or not 0 < level < 1:
        raise ValueError(f"rounds is {rounds} and level {level}; at least 2, and between 0 and 1, are needed")
    generator, n = stream(seed, "bootstrap"), len(rows_NF)
    drawn = [statistic(rows_NF[torch.randint(n, (n,), generator=generator)]) for _ in range(rounds)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]) - np.mean(drawn)
    whole = statistic(rows_NF)
    return whole + float(low), whole + float(high)


def at_infinity(
    features_NF: ArrayLike | Tensor, reference: Features, least: int, points: int = 15, seed: int = 0
) -> float:
    """Fréchet distance as it would be with infinitely many samples: a line through those of fewer.

    The bias of the distance falls as 1 / N, so the distances of subsets of several sizes lie on a line over
    1 / N, whose value at 0 is taken.

    Args:
        features_NF: of the samples.
        reference: what they are compared with, usually of many pictures.
        least: size of the smallest subset; the source has 5,000.
        points: sizes, evenly spaced up to all samples.
        seed: of the subsets.

    Returns:
        The distance; it may be below 0 by chance.

    Raises:
        ValueError: for fewer than two sizes, or subsets that are not smaller than the set.

    Source: Chong and Forsyth, arXiv 1911.07023, section 4.
    """
    rows_NF = finite_rows(features_NF, "samples", 2)
    if points < 2 or not 2 <= least < len(rows_NF):
        raise ValueError(
            f"points is {points} and least {least}; at least 2 points, and 2 to {len(rows_NF) - 1} are needed"
        )
    generator = stream(seed, "at-infinity")
    sizes = np.linspace(least, len(rows_NF), points).round().astype(int)
    distances = [
        frechet_distance(rows_NF[torch.randperm(len(rows_NF), generator=generator)[:size]], reference)
        for size in sizes
    ]
    _, value = np.polyfit(1 / sizes, distances, 1)
    return float(value)
