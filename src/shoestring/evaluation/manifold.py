"""Precision, recall, density, coverage: which samples lie among real pictures, and which of those they meet.

Distances are computed in blocks, so that memory grows with N and not with its square.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from shoestring.evaluation.moments import finite_rows

BLOCK_BYTES = 256e6
"""What one block of distances may take."""
EQUAL = 1e-12
"""Squared distances below this share of the squared lengths are those of equal rows."""


@dataclass(frozen=True)
class Overlap:
    """How two sets of features overlap."""

    precision: float
    """Share of samples that lie in the ball of some real picture."""
    recall: float
    """Share of real pictures that lie in the ball of some sample."""
    density: float
    """Real balls around a sample, on average, over the neighbours: about 1 where both sets are alike."""
    coverage: float
    """Share of real pictures whose ball holds a sample."""


def overlap(real_NF: ArrayLike | Tensor, made_MF: ArrayLike | Tensor, neighbours: int = 3) -> Overlap:
    """Precision, recall, density and coverage with balls that reach to the k-th neighbour in their own set.

    Args:
        real_NF: features of real pictures, a row each.
        made_MF: features of samples. The sources take as many of both.
        neighbours: k; 3 is usual for precision and recall, 5 for density and coverage.

    Returns:
        All four.

    Raises:
        ValueError: for no more samples than neighbours, different widths, or values that are not finite.

    Source: Kynkäänniemi et al., arXiv 1904.06991, equations 1 and 2 (a ball holds its surface); Naeem et al.,
    arXiv 2002.09797, equations 3 and 4 (it does not).
    """
    if neighbours < 1:
        raise ValueError(f"neighbours is {neighbours}; it must be at least 1")
    x_NF = finite_rows(real_NF, "features of real pictures", neighbours + 1)
    y_MF = finite_rows(made_MF, "features of samples", neighbours + 1)
    if x_NF.shape[1] != y_MF.shape[1]:
        raise ValueError(f"features have {x_NF.shape[1]} and {y_MF.shape[1]} columns; they must agree")
    centre_F = x_NF.mean(dim=0)  # differences of small numbers lose less
    x_NF, y_MF = x_NF - centre_F, y_MF - centre_F
    radius_N, radius_M = _radii(x_NF, neighbours), _radii(y_MF, neighbours)
    inside_M = torch.zeros(len(y_MF), dtype=torch.int64)
    strictly_inside, met, covered = 0, 0, 0
    for rows, distance_BM in _blocks(x_NF, y_MF):
        inside_M += (distance_BM <= radius_N[rows, None]).sum(dim=0)
        strictly_inside += int((distance_BM < radius_N[rows, None]).sum())
        met += int((distance_BM <= radius_M).any(dim=1).sum())
        covered += int((distance_BM.amin(dim=1) < radius_N[rows]).sum())
    return Overlap(
        precision=(inside_M > 0).double().mean().item(),
        recall=met / len(x_NF),
        density=strictly_inside / (neighbours * len(y_MF)),
        coverage=covered / len(x_NF),
    )


def _radii(x_NF: Tensor, neighbours: int) -> Tensor:
    """Squared distance of each row to its k-th neighbour, itself left out."""
    radii = []
    for rows, distance_BN in _blocks(x_NF, x_NF):
        distance_BN[torch.arange(len(distance_BN)), rows] = torch.inf
        radii.append(distance_BN.topk(neighbours, dim=1, largest=False).values[:, -1])
    return torch.cat(radii)


def _blocks(x_NF: Tensor, y_MF: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Numbers of rows of x, and their squared distances to all of y."""
    square_M = y_MF.square().sum(dim=1)
    for rows in torch.arange(len(x_NF)).split(max(1, int(BLOCK_BYTES / 8 / len(y_MF)))):
        block_BF = x_NF[rows]
        scale_BM = block_BF.square().sum(dim=1, keepdim=True) + square_M
        distance_BM = scale_BM - 2 * block_BF @ y_MF.T
        yield rows, distance_BM.masked_fill_(distance_BM < EQUAL * scale_BM, 0.0)
