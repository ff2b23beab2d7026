"""Is a sample a training picture again, and do the samples of one prompt differ?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from shoestring.evaluation.moments import finite_rows

BLOCK = 1024
"""Samples compared at once."""


@dataclass(frozen=True)
class Nearest:
    """The training picture nearest to each sample."""

    index_N: Tensor
    """Its number."""
    cosine_N: Tensor
    """Of the features; 1 for a copy."""


def nearest_training(samples_NF: ArrayLike | Tensor, training_MF: ArrayLike | Tensor) -> Nearest:
    """The nearest training picture of every sample, by the cosine of features.

    Args:
        samples_NF: features of samples.
        training_MF: features of training pictures.

    Returns:
        Number and cosine of each.

    Raises:
        ValueError: for no pictures, different widths, or values that are not finite.
    """
    x_NF, y_MF = finite_rows(samples_NF, "features of samples"), finite_rows(training_MF, "training features")
    if x_NF.shape[1] != y_MF.shape[1]:
        raise ValueError(f"features have {x_NF.shape[1]} and {y_MF.shape[1]} columns; they must agree")
    x_NF, y_MF = F.normalize(x_NF, dim=1), F.normalize(y_MF, dim=1)
    found = [(block @ y_MF.T).max(dim=1) for block in x_NF.split(BLOCK)]
    return Nearest(torch.cat([each.indices for each in found]), torch.cat([each.values for each in found]))


def diversity(features_NF: ArrayLike | Tensor, prompts_N: Sequence[object]) -> float:
    """How far apart samples of one prompt are: 1 less the mean cosine over pairs, then over prompts.

    Args:
        features_NF: of samples.
        prompts_N: what each was drawn for; prompts with one sample do not count.

    Returns:
        0 where all samples of a prompt are alike.

    Raises:
        ValueError: if no prompt has two samples, or lengths differ.
    """
    rows_NF = F.normalize(finite_rows(features_NF, "features"), dim=1)
    if len(prompts_N) != len(rows_NF):
        raise ValueError(f"there are {len(prompts_N)} prompts for {len(rows_NF)} samples; each needs one")
    groups: dict[object, list[int]] = {}
    for i, prompt in enumerate(prompts_N):
        groups.setdefault(prompt, []).append(i)
    apart = []
    for rows in groups.values():
        if len(rows) > 1:
            together = rows_NF[rows]
            pairs = len(rows) * (len(rows) - 1)
            # The sum over all pairs is the square of the sum, less those of samples with themselves.
            total = together.sum(dim=0).square().sum() - together.square().sum()
            apart.append(1 - total.item() / pairs)
    if not apart:
        raise ValueError("no prompt has two samples, so nothing is known of their diversity; add seeds")
    return sum(apart) / len(apart)
