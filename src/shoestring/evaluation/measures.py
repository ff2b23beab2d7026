"""The table of metrics: which features each needs, and the figures it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from shoestring.evaluation.distances import cmmd, frechet_distance, kernel_distance
from shoestring.evaluation.manifold import overlaps
from shoestring.evaluation.moments import Moments
from shoestring.evaluation.scores import inception_score
from shoestring.evaluation.uncertainty import at_infinity, bootstrap_interval
from shoestring.runtime import UserError

BALLS = (1, 2, 3, 5, 10)
"""Neighbours that balls reach to in the plot of precision over recall."""
SMALLEST_SUBSET = 5_000
"""Of the extrapolation to infinitely many samples, as in its source; half of all where there are fewer."""


@dataclass(frozen=True)
class Figure:
    """A number with what is known of it."""

    value: float
    low95: float | None = None
    high95: float | None = None
    spread: float | None = None
    """Standard deviation over splits or subsets."""


@dataclass(frozen=True)
class Compared:
    """What a metric looks at."""

    made: Tensor
    """Features of the samples, a row each."""
    real: Tensor | Moments | None
    """Features of real pictures, or their moments; ``None`` where nothing is compared."""
    neighbours: int = 3
    bootstrap: int = 0
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Where a metric leaves the points of a plot, by name."""


@dataclass(frozen=True)
class Measure:
    """A metric on the features of one extractor."""

    extractor: str
    compute: Callable[[Compared], dict[str, Figure]]
    output: int = 0
    """Which of the extractor's outputs it reads."""
    compares: bool = True
    """Whether it needs real pictures."""
    rows: bool = False
    """Whether it needs the features of every real picture, not only their moments."""
    moments: bool = False
    """Whether it compares means and covariances."""
    balls: bool = False
    """Whether it looks at neighbours within each set."""
    least: int = 2
    """Samples that it needs, and real pictures where it needs each."""


def _distance(name: str, distance: Callable[[Tensor, Any], float]) -> Callable[[Compared], dict[str, Figure]]:
    def compute(given: Compared) -> dict[str, Figure]:
        value, low, high = distance(given.made, given.real), None, None
        if given.bootstrap:
            low, high = bootstrap_interval(
                lambda rows: distance(rows, given.real), given.made, given.bootstrap
            )
        return {name: Figure(value, low, high)}

    return compute


def _kernel(name: str) -> Callable[[Compared], dict[str, Figure]]:
    def compute(given: Compared) -> dict[str, Figure]:
        assert given.real is not None
        assert not isinstance(given.real, Moments)
        found = kernel_distance(given.made, given.real)
        return {name: Figure(found.mean, spread=found.std)}

    return compute


def _overlap(end: str) -> Callable[[Compared], dict[str, Figure]]:
    def compute(given: Compared) -> dict[str, Figure]:
        assert given.real is not None
        assert not isinstance(given.real, Moments)
        most = min(len(given.real), len(given.made)) - 1
        several = sorted({given.neighbours, *(k for k in BALLS if k <= most)})
        found = overlaps(given.real, given.made, several)
        given.curves[f"precision_recall{end}"] = [(each.recall, each.precision) for each in found.values()]
        shown = found[given.neighbours]
        return {f"{name}{end}": Figure(value) for name, value in asdict(shown).items()}

    return compute


def _at_infinity(name: str) -> Callable[[Compared], dict[str, Figure]]:
    def compute(given: Compared) -> dict[str, Figure]:
        assert given.real is not None
        least = min(SMALLEST_SUBSET, len(given.made) // 2)
        return {name: Figure(at_infinity(given.made, given.real, least))}

    return compute


def _inception_score(given: Compared) -> dict[str, Figure]:
    found = inception_score(given.made)
    return {"inception_score": Figure(found.mean, spread=found.std)}


MEASURES: Mapping[str, Measure] = {
    "fid": Measure("inception", _distance("fid", frechet_distance), moments=True),
    "sfid": Measure("inception", _distance("sfid", frechet_distance), output=1, moments=True),
    "is": Measure("inception", _inception_score, output=2, compares=False, least=10),
    "precision-recall": Measure("inception", _overlap(""), rows=True, balls=True),
    "kid": Measure("inception", _kernel("kid"), rows=True),
    "fid-infinity": Measure("inception", _at_infinity("fid_infinity"), moments=True, least=50),
    "clip-fid": Measure("clip-vitb32", _distance("clip_fid", frechet_distance), moments=True),
    "fdd": Measure("dinov2-vitl14", _distance("fdd", frechet_distance), moments=True),
    "kdd": Measure("dinov2-vitl14", _kernel("kdd"), rows=True),
    "fdd-vitb14": Measure("dinov2-vitb14", _distance("fdd_vitb14", frechet_distance), moments=True),
    "kdd-vitb14": Measure("dinov2-vitb14", _kernel("kdd_vitb14"), rows=True),
    "cmmd": Measure("clip-vitl14-336", _distance("cmmd", cmmd), rows=True),
    "fd-efflite0": Measure("efficientnet-lite0", _distance("fd_efflite0", frechet_distance), moments=True),
    "kid-efflite0": Measure("efficientnet-lite0", _kernel("kid_efflite0"), rows=True),
    "precision-recall-efflite0": Measure("efficientnet-lite0", _overlap("_efflite0"), rows=True, balls=True),
    "fd-efflite0-infinity": Measure(
        "efficientnet-lite0", _at_infinity("fd_efflite0_infinity"), moments=True, least=50
    ),
}
"""Metrics of the features of samples. Alignment with prompts is measured elsewhere."""


HIGHER_IS_BETTER = (
    "inception_score",
    "precision",
    "recall",
    "density",
    "coverage",
    "clip_score",
    "retrieval",
    "geneval",
    "shapeeval",
    "questions",
    "diversity",
)
"""Beginnings of the names of figures that are better when they are higher; of others, lower is better."""


class TooFew(UserError):
    """A metric cannot be computed from so few pictures; others can."""


def check_enough(
    metric: str, count: int, real: int | None, neighbours: int = 3, only_moments: bool = False
) -> None:
    """Refuse a metric that what is there does not suffice for.

    Args:
        metric: a key of ``MEASURES``.
        count: samples.
        real: real pictures; ``None`` where nothing is compared, or only their moments are known.
        neighbours: that balls reach to.
        only_moments: of the real pictures only moments are known.

    Raises:
        TooFew: saying what is needed, and which metrics can be computed.
    """

    def least(measure: Measure) -> int:
        return max(measure.least, neighbours + 1) if measure.balls else measure.least

    def possible(measure: Measure) -> bool:
        enough = real is None or not measure.rows or real >= least(measure)
        return count >= least(measure) and enough and not (measure.rows and only_moments)

    measure = MEASURES[metric]
    if possible(measure):
        return
    others = ", ".join(name for name, each in MEASURES.items() if possible(each)) or "none"
    if measure.rows and only_moments:
        raise TooFew(
            f"metric {metric} needs the features of every real picture, the reference holds only their mean "
            f"and covariance; take a reference of pictures, or metrics among {others}"
        )
    kind, there = ("", count) if count < least(measure) else ("real ", real)
    raise TooFew(
        f"metric {metric} needs at least {least(measure)} {kind}pictures, there are {there}; with these can "
        f"be computed: {others}"
    )


def check_not_degenerate(features_NF: Tensor, what: str) -> str | None:
    """A sentence on samples of which a distance says little.

    Args:
        features_NF: a row a picture.
        what: how the sentence calls them.

    Returns:
        That all are one picture, or how many are copies of others; ``None`` if neither.
    """
    distinct = len(torch.unique(features_NF, dim=0))
    if distinct == 1:
        return f"all {len(features_NF)} {what} are one and the same picture"
    if distinct < len(features_NF):
        return f"{len(features_NF) - distinct} of {len(features_NF)} {what} are exact copies of others"
    return None
