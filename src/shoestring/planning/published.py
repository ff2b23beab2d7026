"""What others reported of runs that are recipes here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shoestring import recipes
from shoestring.config import RunConfig


@dataclass(frozen=True)
class PublishedTime:
    """A run on some machines."""

    gpus: int
    days: tuple[float, ...]
    """Of each stage."""
    total_days: float
    """As reported, which is not quite the sum."""
    utilisation: float
    """Share of the peak, one for all stages, that explains the days from the published FLOPs (computed)."""


@dataclass(frozen=True)
class PublishedRun:
    """A run as it was reported."""

    source: str
    gflop: tuple[float, ...]
    """Training GFLOP of one image of each stage."""
    times: Mapping[str, PublishedTime]
    """By short name of the GPU."""
    priced: str
    """The GPU of the prices."""
    usd_per_gpu_hour: float
    usd: tuple[float, ...]
    total_usd: float
    comparisons: tuple[str, ...]
    """Sentences, figures as they were reported."""


_MICRODIT = PublishedRun(
    source="Stretching Each Dollar, arXiv 2407.15811, table 2 and abstract",
    gflop=(),
    times={
        "h100": PublishedTime(8, (1.11, 0.38, 0.88, 0.26), 2.6, 0.192),
        "a100": PublishedTime(8, (2.77, 0.94, 2.18, 0.65), 6.6, 0.245),
    },
    priced="h100",
    usd_per_gpu_hour=3.75,
    usd=(800, 271, 630, 189),
    total_usd=1890,
    comparisons=(
        "14x cheaper than the cheapest approach before ($28,400; 37.6 days on 8 H100: PixArt-alpha)",
        "19x less compute than Würstchen",
        "118x cheaper than Stable Diffusion",
    ),
)
_RUNS = {"microdit-xl2": _MICRODIT}


def published_run(config: RunConfig) -> PublishedRun | None:
    """The report of a run.

    Args:
        config: a recipe, perhaps changed.

    Returns:
        What was reported, or ``None`` if nothing was, or of other stages than these.
    """
    found, gflop = _RUNS.get(config.name), recipes.published_gflop(config)
    if found is None:
        return None
    stages = [(stage.name, stage.nimg) for stage in config.stages]
    if stages != [(stage.name, stage.nimg) for stage in recipes.get(config.name).stages]:
        return None
    if len(gflop) < len(stages):
        return None
    values = tuple(gflop[name] for name, _ in stages)
    return PublishedRun(**vars(found) | {"gflop": values})
