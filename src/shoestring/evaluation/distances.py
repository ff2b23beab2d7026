"""Distances between two sets of features: Fréchet, kernel, CMMD. Pure functions, float64 inside."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from shoestring.evaluation.moments import Moments, finite_rows
from shoestring.runtime import stream

Features = ArrayLike | Tensor | Moments
CMMD_WIDTH, CMMD_SCALE = 10.0, 1000.0
BLOCK = 1024
"""Rows of a distance matrix that are there at once."""


def frechet_distance(a: Features, b: Features) -> float:
    """Fréchet distance between the Gaussians that have the moments of two sets of features.

    |mean_a - mean_b|^2 + tr(cov_a) + tr(cov_b) - 2 tr((cov_a cov_b)^(1/2)), with the unbiased covariances.
    With fewer samples than features the covariances are singular, and iterating for a matrix root fails
    silently. Here no root is taken: with cov_a = R'R and cov_b = S'S, tr((cov_a cov_b)^(1/2)) is the sum of
    the singular values of R S', which is exact at any rank. The price is an SVD of side min(N, F).

    At small N the distance is mostly bias (two halves of one set are far apart): compare it only with
    distances at the same N, or see :func:`shoestring.evaluation.uncertainty.at_infinity`.

    Args:
        a: features of one set, a row a sample, or their moments.
        b: those of the other; the numbers of samples may differ.

    Returns:
        The distance, at least 0. On the features of the ADM suite's Inception it is the FID, on its spatial
        features the sFID; on others it must not be called so.

    Raises:
        ValueError: for fewer than two samples, different widths, or values that are not finite.

    Source: Heusel et al., arXiv 1706.08500, equation 6; the singular values are those of
    cov_a^(1/2) cov_b^(1/2), the form in which the distance is symmetric.
    """
    (mean_x, root_x), (mean_y, root_y) = _mean_and_root(a, "first"), _mean_and_root(b, "second")
    _check_widths(root_x, root_y)
    cross = torch.linalg.svdvals(root_x @ root_y.T).sum()
    distance = (mean_x - mean_y).square().sum() + root_x.square().sum() + root_y.square().sum() - 2 * cross
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


@dataclass(frozen=True)
class KernelEstimate:
    """A kernel distance of whole sets."""

    value: float
    standard_error: float
    """By the choice of the drawn pictures; the reference is the same for all it is compared with."""


class KernelReference:
    """A reference that many sets are compared with by the kernel of :func:`kernel_distance`.

    Sets are taken whole, and the reference's mean kernel with itself is computed once.

    Args:
        features_MF: of the reference, a row a sample.

    Raises:
        ValueError: for fewer than two samples or values that are not finite.
    """

    def __init__(self, features_MF: ArrayLike | Tensor) -> None:
        self.features_MF = finite_rows(features_MF, "features of the reference", 2)
        self._own = _mean_of_others(self.features_MF).mean()

    def compare(self, a_NF: ArrayLike | Tensor) -> KernelEstimate:
        """The unbiased distance and its standard error.

        Args:
            a_NF: features of the other set.

        Returns:
            Both.

        Raises:
            ValueError: for fewer than three samples, another width, or values that are not finite.
        """
        x_NF = finite_rows(a_NF, "features of the set", 3)
        _check_widths(x_NF, self.features_MF)
        own_N = _mean_of_others(x_NF)
        cross_N = torch.cat([_kernel(part, self.features_MF).mean(dim=1) for part in x_NF.split(BLOCK)])
        value = own_N.mean() + self._own - 2 * cross_N.mean()
        # Leading term of a U-statistic's variance: what each sample adds, twice (Hoeffding 1948).
        added_N = 2 * (own_N - cross_N)
        return KernelEstimate(value.item(), (added_N.std() / math.sqrt(len(x_NF))).item())


def _kernel(u_NF: Tensor, v_MF: Tensor) -> Tensor:
    return (u_NF @ v_MF.T / u_NF.shape[1] + 1) ** 3


def _mean_of_others(x_NF: Tensor) -> Tensor:
    """Mean kernel of each sample with all others."""
    sums = [_kernel(part, x_NF).sum(dim=1) for part in x_NF.split(BLOCK)]
    itself = (x_NF.square().sum(dim=1) / x_NF.shape[1] + 1) ** 3
    return (torch.cat(sums) - itself) / (len(x_NF) - 1)


def cmmd(a_NF: ArrayLike | Tensor, b_MF: ArrayLike | Tensor) -> float:
    """Maximum mean discrepancy of CLIP embeddings with a Gaussian kernel, times 1000, as released.

    exp(-|x - y|^2 / (2 10^2)) on embeddings of length 1. The released code takes the means over all pairs,
    those of a sample with itself too, where the paper's estimator leaves these out; so does this.

    Args:
        a_NF: embeddings of one set (the paper: CLIP ViT-L/14-336), a row a sample; made length 1 here.
        b_MF: those of the other.

    Returns:
        The distance; 0 for equal sets.

    Raises:
        ValueError: for fewer than two samples, different widths, or values that are not finite.

    Source: Jayasumana et al., arXiv 2401.09603, section 4.
    """
    x_NF, y_MF = (F.normalize(rows, dim=1) for rows in _pair(a_NF, b_MF))

    def mean(u_NF: Tensor, v_MF: Tensor) -> float:
        total = 0.0
        for block in u_NF.split(BLOCK):
            squared = (2 - 2 * block @ v_MF.T).clamp(min=0)
            total += torch.exp(-squared / (2 * CMMD_WIDTH**2)).sum().item()
        return total / (len(u_NF) * len(v_MF))

    return CMMD_SCALE * (mean(x_NF, x_NF) + mean(y_MF, y_MF) - 2 * mean(x_NF, y_MF))


def _pair(a_NF: ArrayLike | Tensor, b_MF: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
    x_NF = finite_rows(a_NF, "features of the first set", 2)
    y_MF = finite_rows(b_MF, "features of the second set", 2)
    _check_widths(x_NF, y_MF)
    return x_NF, y_MF


def _check_widths(x_NF: Tensor, y_MF: Tensor) -> None:
    if x_NF.shape[1] != y_MF.shape[1]:
        raise ValueError(f"features have {x_NF.shape[1]} and {y_MF.shape[1]} columns; they must agree")


def _mean_and_root(features: Features, which: str) -> tuple[Tensor, Tensor]:
    """The mean, and a matrix R with R'R = covariance and at most F rows."""
    if isinstance(features, Moments):
        return features.mean_F, features.root()
    rows_NF = finite_rows(features, f"features of the {which} set", 2)
    mean_F = rows_NF.mean(dim=0)
    return mean_F, _triangle((rows_NF - mean_F) / math.sqrt(len(rows_NF) - 1))


def _triangle(rows_NF: Tensor) -> Tensor:
    """X = Q R with orthonormal Q: R has min(N, F) rows, and R'R = X'X."""
    n, f = rows_NF.shape
    return torch.linalg.qr(rows_NF, mode="r").R if n > f else rows_NF


def _squared_mmd(x_NF: Tensor, y_NF: Tensor) -> Tensor:
    """Unbiased estimate from two sets of one size: the diagonals k(x, x) and k(y, y) are left out."""
    n = len(x_NF)
    within = sum(k.sum() - k.diagonal().sum() for k in (_kernel(x_NF, x_NF), _kernel(y_NF, y_NF)))
    return within / (n * (n - 1)) - 2 * _kernel(x_NF, y_NF).mean()
