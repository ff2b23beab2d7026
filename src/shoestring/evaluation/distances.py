"""Distances between two sets of features, and the interval of a share. Pure functions, float64 inside."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from shoestring.runtime import stream
from shoestring.tensors import Float


def frechet_distance(a_NF: ArrayLike | Tensor, b_MF: ArrayLike | Tensor) -> float:
    """Fréchet distance between the Gaussians that have the moments of two sets of features.

    |mean_a - mean_b|^2 + tr(cov_a) + tr(cov_b) - 2 tr((cov_a cov_b)^(1/2)), with the unbiased covariances.
    With fewer samples than features the covariances are singular, and iterating for a matrix root fails
    silently. Here no root is taken: for centred X and Y, tr((X'X Y'Y)^(1/2)) is the sum of the singular
    values of X Y', which is exact at any rank. The price is an SVD of side min(N, F).

    At small N the distance is mostly bias (two halves of one set are far apart): compare it only with
    distances at the same N.

    Args:
        a_NF: features of one set, a row a sample.
        b_MF: features of the other; M may differ from N.

    Returns:
        The distance, at least 0.

    Raises:
        ValueError: for fewer than two samples, different widths, or values that are not finite.

    Source: Heusel et al., arXiv 1706.08500, equation 6; the singular values are those of
    cov_a^(1/2) cov_b^(1/2), the form in which the distance is symmetric.
    """
    x_NF, y_MF = _pair(a_NF, b_MF)
    mean_x, mean_y = x_NF.mean(dim=0), y_MF.mean(dim=0)
    x_NF = (x_NF - mean_x) / math.sqrt(len(x_NF) - 1)
    y_MF = (y_MF - mean_y) / math.sqrt(len(y_MF) - 1)
    # X = Q R with orthonormal Q: dropping Q leaves the singular values, and R has min(N, F) rows only.
    cross = torch.linalg.svdvals(_triangle(x_NF) @ _triangle(y_MF).T).sum()
    distance = (mean_x - mean_y).square().sum() + x_NF.square().sum() + y_MF.square().sum() - 2 * cross
    return max(0.0, distance.item())


@dataclass(frozen=True)
class KernelDistance:
    """A kernel distance: the mean over random subsets, and their spread."""

    mean: float
    std: float
    """Standard deviation of the subsets' estimates; not the standard error of the mean."""


def kernel_distance(
    a_NF: ArrayLike | Tensor,
    b_MF: ArrayLike | Tensor,
    subsets: int = 100,
    subset_size: int | None = None,
    seed: int = 0,
) -> KernelDistance:
    """Kernel distance: squared maximum mean discrepancy with the kernel (x'y / F + 1)^3.

    Each estimate is unbiased at any size, so two samples of one distribution give 0 on average, and a
    little less than 0 about half of the time.

    Args:
        a_NF: features of one set, a row a sample.
        b_MF: features of the other.
        subsets: random subsets, drawn without replacement from each set.
        subset_size: samples in a subset; ``None`` takes 1000, or half of the smaller set where that is
            less (subsets as large as the set would all be the same, and their spread 0).
        seed: of the subsets.

    Returns:
        Mean and spread over the subsets.

    Raises:
        ValueError: for fewer than two samples, different widths, values that are not finite, no subset,
            or a subset size below 2 or above a set's size.

    Source: Bińkowski et al., arXiv 1801.01401, section 4 (KID, on other features).
    """
    x_NF, y_MF = _pair(a_NF, b_MF)
    smaller = min(len(x_NF), len(y_MF))
    size = max(2, min(1000, smaller // 2)) if subset_size is None else subset_size
    if not 2 <= size <= smaller:
        raise ValueError(
            f"subset_size is {size}; it must be at least 2 and at most {smaller}, the smaller set"
        )
    if subsets < 1:
        raise ValueError(f"subsets is {subsets}; it must be at least 1")
    generator = stream(seed, "kernel-distance")
    estimates = torch.stack(
        [
            _squared_mmd(
                x_NF[torch.randperm(len(x_NF), generator=generator)[:size]],
                y_MF[torch.randperm(len(y_MF), generator=generator)[:size]],
            )
            for _ in range(subsets)
        ]
    )
    return KernelDistance(mean=estimates.mean().item(), std=estimates.std(correction=0).item())


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


def finite_rows(values: ArrayLike | Tensor, name: str, least: int = 1) -> Float[Tensor, "N F"]:
    """Features as a float64 matrix on the CPU, checked.

    Args:
        values: a matrix, a row a sample.
        name: how an error calls it.
        least: rows it must have.

    Returns:
        The matrix.

    Raises:
        ValueError: if it is no matrix, has too few rows, or holds NaN or infinity.
    """
    if isinstance(values, Tensor):
        rows_NF = values.detach().to("cpu", torch.float64)
    else:
        rows_NF = torch.from_numpy(np.array(values, dtype=np.float64))
    if rows_NF.ndim != 2:
        raise ValueError(f"{name} have shape {tuple(rows_NF.shape)}; they must be a matrix, a row a sample")
    if len(rows_NF) < least:
        raise ValueError(f"{name} have {len(rows_NF)} rows; at least {least} samples are needed")
    bad = (~rows_NF.isfinite()).any(dim=1).sum().item()
    if bad:
        raise ValueError(f"{name} hold NaN or infinity in {bad} of {len(rows_NF)} rows")
    return rows_NF


def _pair(a_NF: ArrayLike | Tensor, b_MF: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
    x_NF = finite_rows(a_NF, "features of the first set", 2)
    y_MF = finite_rows(b_MF, "features of the second set", 2)
    if x_NF.shape[1] != y_MF.shape[1]:
        raise ValueError(f"features have {x_NF.shape[1]} and {y_MF.shape[1]} columns; they must agree")
    return x_NF, y_MF


def _triangle(rows_NF: Tensor) -> Tensor:
    n, f = rows_NF.shape
    return torch.linalg.qr(rows_NF, mode="r").R if n > f else rows_NF


def _squared_mmd(x_NF: Tensor, y_NF: Tensor) -> Tensor:
    """Unbiased estimate from two sets of one size: the diagonals k(x, x) and k(y, y) are left out."""
    n, f = x_NF.shape

    def kernel(u_NF: Tensor, v_NF: Tensor) -> Tensor:
        return (u_NF @ v_NF.T / f + 1) ** 3

    within = sum(k.sum() - k.diagonal().sum() for k in (kernel(x_NF, x_NF), kernel(y_NF, y_NF)))
    return within / (n * (n - 1)) - 2 * kernel(x_NF, y_NF).mean()
