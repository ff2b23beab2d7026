"""Scores of one set of pictures that need no reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from shoestring.evaluation.moments import finite_rows


@dataclass(frozen=True)
class InceptionScore:
    """Mean and standard deviation over the splits."""

    mean: float
    std: float


def inception_score(logits_NC: ArrayLike | Tensor, splits: int = 10) -> InceptionScore:
    """exp of the mean divergence of the classes of a picture from those of all; 1 is the worst.

    Args:
        logits_NC: of a classifier, a row a picture; ADM's come without the last layer's bias.
        splits: consecutive parts that are scored apart. With fewer pictures a part, the score is lower.

    Returns:
        The score.

    Raises:
        ValueError: for fewer pictures than splits, or values that are not finite.

    Source: Salimans et al., arXiv 1606.03498, section 4.
    """
    if splits < 1:
        raise ValueError(f"splits is {splits}; it must be at least 1")
    log_p_NC = finite_rows(logits_NC, "logits", splits).log_softmax(dim=1)
    scores = []
    for i in range(splits):
        part_NC = log_p_NC[i * len(log_p_NC) // splits : (i + 1) * len(log_p_NC) // splits]
        p_NC = part_NC.exp()
        log_mean_C = part_NC.logsumexp(dim=0) - math.log(len(part_NC))
        divergence_N = (p_NC * (part_NC - log_mean_C)).sum(dim=1)
        scores.append(divergence_N.mean().exp())
    found = torch.stack(scores)
    return InceptionScore(found.mean().item(), found.std(correction=0).item())
