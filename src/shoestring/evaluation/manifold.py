"""Precision, recall, density, coverage: which samples lie among real pictures, and which of those they meet.

Distances are computed in blocks, so that memory grows with N and not with its square.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    return overlaps(real_NF, made_MF, (neighbours,))[neighbours]


def overlaps(
    real_NF: ArrayLike | Tensor, made_MF: ArrayLike | Tensor, neighbours: Sequence[int]
) -> dict[int, Overlap]:
    """As :func:`overlap` for several numbers of neighbours, from one computation of all distances.

    Args:
        real_NF: features of real pictures, a row each.
        made_MF: features of samples.
        neighbours: several k.

    Returns:
        The measures by k.

    Raises:
        ValueError: for no more samples than neighbours, different widths, or values that are not finite.
    """
    if not neighbours or min(neighbours) < 1:
        raise ValueError(f"neighbours is {list(neighbours)}; each must be at least 1")
    most = max(neighbours)
    x_NF = finite_rows(real_NF, "features of real pictures", most + 1)
    y_MF = finite_rows(made_MF, "features of samples", most + 1)
    if x_NF.shape[1] != y_MF.shape[1]:
        raise ValueError(f"features have {x_NF.shape[1]} and {y_MF.shape[1]} columns; they must agree")
    centre_F = x_NF.mean(dim=0)  # differences of small numbers lose less
    x_NF, y_MF = x_NF - centre_F, y_MF - centre_F
    radii_NK, radii_MK = _radii(x_NF, most), _radii(y_MF, most)
    inside_M = {k: torch.zeros(len(y_MF), dtype=torch.bool) for k in neighbours}
    strictly_inside, met, covered = (dict.fromkeys(neighbours, 0) for _ in range(3))
    for rows, distance_BM in _blocks(x_NF, y_MF):
        nearest_B = distance_BM.amin(dim=1)
        for k in neighbours:
            radius_B, radius_M = radii_NK[rows, k - 1], radii_MK[:, k - 1]
            inside_M[k] |= (distance_BM <= radius_B[:, None]).any(dim=0)
            strictly_inside[k] += int((distance_BM < radius_B[:, None]).sum())
            met[k] += int((distance_BM <= radius_M).any(dim=1).sum())
            covered[k] += int((nearest_B < radius_B).sum())
    return {
        k: Overlap(
            precision=inside_M[k].double().mean().item(),
            recall=met[k] / len(x_NF),
            density=strictly_inside[k] / (k * len(y_MF)),
            coverage=covered[k] / len(x_NF),
        )
        for k in neighbours
    }


def _radii(x_NF: Tensor, neighbours: int) -> Tensor:
    """Squared distances of each row to its nearest neighbours, itself left out, the nearest first."""
    radii = []
    for rows, distance_BN in _blocks(x_NF, x_NF):
        distance_BN[torch.arange(len(distance_BN)), rows] = torch.inf
        radii.append(distance_BN.topk(neighbours, dim=1, largest=False).values)
    return torch.cat(radii)


def _blocks(x_NF: Tensor, y_MF: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Numbers of rows of x, and their squared distances to all of y."""
    square_M = y_MF.square().sum(dim=1)
    for rows in torch.arange(len(x_NF)).split(max(1, int(BLOCK_BYTES / 8 / len(y_MF)))):
        block_BF = x_NF[rows]
        scale_BM = block_BF.square().sum(dim=1, keepdim=True) + square_M
        distance_BM = scale_BM - 2 * block_BF @ y_MF.T
        yield rows, distance_BM.masked_fill_(distance_BM < EQUAL * scale_BM, 0.0)
