"""Averages of the weights, kept in float32: the classic one, and tracks of power-function averages.

A power-function average weighs the weights of image n of N by (n/N)^gamma, so that its length is a share of
the run, however long it is. From a few stored tracks an average of any length is made afterwards
(``posthoc.py``).

Source: Karras et al., arXiv 2312.02696 (EDM2), section 3 and appendix C.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from shoestring.config import LONGEST_AVERAGE, SHORTEST_AVERAGE
from shoestring.runtime import UserError
from shoestring.training.parallel import local

CLASSIC = "ema"
"""Name of the classic average's track."""


def track_name(length: float) -> str:
    """Name of the track of a power-function average, also of its file: ``power-0.05``."""
    return f"power-{length:g}"


def power_gamma(length: float) -> float:
    """The exponent of the power function whose standard deviation is a given share of the run.

    The largest root of g^3 + 7 g^2 + (16 - s^-2) g + 12 - s^-2 for the relative standard deviation s.

    Args:
        length: s (sigma_rel in the paper), e.g. 0.05; at 1/sqrt(12) = 0.2887 all weights count alike.

    Returns:
        gamma, 0 or more.

    Raises:
        UserError: if there is no such average.

    Source: arXiv 2312.02696, appendix C, from the mean and the variance of a power function.
    """
    if not SHORTEST_AVERAGE <= length <= LONGEST_AVERAGE:
        raise UserError(
            f"the length of a power-function average is {length:g}; it is the standard deviation as a share "
            f"of the run, from {SHORTEST_AVERAGE:g} to {LONGEST_AVERAGE:g}, usually 0.02 to 0.2"
        )
    inverse = length**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return max(0.0, float(roots.real.max()))


def power_decay(gamma: float, nimg: int, batch: int) -> float:
    """What a power-function average keeps of itself in a step: (1 - batch / nimg)^(gamma + 1).

    With this the average after N images is exactly the integral of its power function over the weights, each
    step's counting for the images of that step; in the first step it is a copy.

    Args:
        gamma: exponent.
        nimg: images of the run seen after the step.
        batch: images of the step.

    Returns:
        A number from 0 to 1.
    """
    return (1 - min(batch, nimg) / nimg) ** (gamma + 1)


class Averages:
    """The averages and their update; each is shared out over the ranks like the weights.

    Args:
        model: whose parameters to follow; every average starts as a copy.
        lengths: of the power-function tracks, as shares of the run.

    Raises:
        UserError: if a length is out of range.
    """

    def __init__(self, model: nn.Module, lengths: Sequence[float] = ()) -> None:
        self.model = model
        self.names = [name for name, _ in model.named_parameters()]
        self.gammas = {track_name(length): power_gamma(length) for length in lengths}
        self.tracks: dict[str, list[Tensor]] = {
            track: [p.detach().clone().float() for p in model.parameters()]
            for track in (CLASSIC, *self.gammas)
        }

    @torch.no_grad()
    def update(self, decay: float, nimg: int, batch: int) -> None:
        """Follow the weights by one step.

        Args:
            decay: of the classic average; 0 copies the weights.
            nimg: images of the run seen after the step.
            batch: images of the step.
        """
        weights = [local(p).float() for p in self.model.parameters()]
        for track, averages in self.tracks.items():
            kept = decay if track == CLASSIC else power_decay(self.gammas[track], nimg, batch)
            torch._foreach_lerp_([local(average) for average in averages], weights, 1 - kept)

    @contextmanager
    def applied(self, track: str = CLASSIC) -> Iterator[None]:
        """Inside the block the model has the averaged weights of a track."""
        trained = [p.detach().clone() for p in self.model.parameters()]
        self._write(self.tracks[track])
        try:
            yield
        finally:
            self._write(trained)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        parameters = [local(p) for p in self.model.parameters()]
        torch._foreach_copy_(parameters, [local(value) for value in values])

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors of all tracks by ``{track}.{parameter name}``; writing into them restores."""
        return {
            f"{track}.{name}": average
            for track, averages in self.tracks.items()
            for name, average in zip(self.names, averages, strict=True)
        }

    def named(self, track: str) -> dict[str, Tensor]:
        """The averaged weights of a track by parameter name."""
        return dict(zip(self.names, self.tracks[track], strict=True))
