"""Which size to train, and how to sample it, for so many dollars and pictures.

Candidates are settings whose quality somebody measured: published ones, or rows of a study of the user's own.
Each is priced: the training that it needs, and the pictures that are to be made. Quality is compared within
one protocol only, and lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shoestring.planning.cost import Machine, dollars
from shoestring.runtime import UserError

ASSUMED_USD = {"h100": 3.75}
"""Dollars for an hour, where none are given: the account of arXiv 2407.15811 (published)."""
SAMPLING_SHARE = 0.25
"""Of the peak, while sampling; assumed."""
FREE_SAMPLING = 0.5
"""Sampling cost counts as no constraint where the pictures take at most this share of the dollars."""


@dataclass(frozen=True)
class Candidate:
    """A network and a way to sample it, of which the quality is known."""

    size: str
    recipe: str | None
    """Name of a recipe that trains it."""
    protocol: str
    """Figures are comparable within it."""
    metric: str
    quality: float | None
    """``None`` where only a comparison was published."""
    claim: str
    """What is known, and from where."""
    images_seen: int
    """In the training whose quality this is."""
    full_training_flops: float
    """Of that training."""
    least_share: float
    """Of it, below which the figures do not say anything."""
    evaluation_flops: float
    """Of one network evaluation."""
    sampler: str
    steps: int
    evaluations: int
    guidance: float | None
    cost: float
    """Sampling cost, normalised as in its source."""
    guided_calls: int = 2
    """Network calls of an evaluation with guidance; 1 of models that take the scale as an input."""
    decoder_flops: float = 0.0
    """Of the autoencoder's decoder, a picture; 0 of networks that draw pixels."""
    rank: int = 0
    """Between protocols, the highest first; 0 is taken where nothing else can be had."""
    unconstrained: bool = False
    """Whether its rank is meant where sampling cost is no constraint; elsewhere its rank is 0."""

    @property
    def picture_flops(self) -> float:
        """Of one picture: evaluations, guidance's second pass where there is one, and the decoder."""
        guided = 1 if self.guidance in (0.0, 1.0) else self.guided_calls
        return self.evaluation_flops * self.evaluations * guided + self.decoder_flops

    @property
    def setting(self) -> str:
        """For people: the network and how it is sampled."""
        return f"{self.size} with {self.sampler}, {self.steps} steps"


@dataclass(frozen=True)
class Wishes:
    """What is wanted."""

    budget_usd: float
    """For training and all pictures together."""
    images: float
    """That will be made."""
    max_latency_s: float | None
    """Of one picture on one GPU."""
    machine: Machine
    sampling_share: float = SAMPLING_SHARE
    max_cost: float | None = None
    """Sampling cost of one picture, normalised as in the evidence."""

    def __post_init__(self) -> None:
        if not 0 < self.budget_usd < math.inf:
            raise UserError(f"--budget is {self.budget_usd:g}; it must be above 0 dollars")
        if not 0 <= self.images < math.inf:
            raise UserError(f"--images is {self.images:g}; it must be 0 or more")
        if self.max_cost is not None and not self.max_cost > 0:
            raise UserError(f"--max-cost is {self.max_cost:g}; it must be above 0")
        if self.max_latency_s is not None and not self.max_latency_s > 0:
            raise UserError(f"--max-latency is {self.max_latency_s:g} s; it must be above 0")
        if not 0 < self.sampling_share <= 1:
            raise UserError(f"--sampling-mfu is {self.sampling_share:g}; it must be above 0 and at most 1")


@dataclass(frozen=True)
class Priced:
    """A candidate with its price."""

    candidate: Candidate
    training_share: float
    """Of its full training, that the budget pays beside the pictures."""
    training_usd: float
    sampling_usd: float
    """Of all pictures."""
    latency_s: float
    needed_usd: float
    """Of the pictures, and of the least share of its training that says anything."""
    problem: str | None
    """Why it cannot be had."""

    @property
    def total_usd(self) -> float:
        """Total cost of ownership."""
        return self.training_usd + self.sampling_usd

    @property
    def rank(self) -> int:
        """Of its evidence at this price."""
        free = self.sampling_usd <= FREE_SAMPLING * self.total_usd
        return 0 if self.candidate.unconstrained and not free else self.candidate.rank


def picture_seconds(candidate: Candidate, machine: Machine, sampling_share: float) -> float:
    """Seconds that a picture takes on one GPU.

    Args:
        candidate: network and sampling.
        machine: whose GPU it is.
        sampling_share: of the peak.

    Returns:
        Without the text encoder.
    """
    return candidate.picture_flops / (machine.gpu.peak_flops * sampling_share)


def price(candidate: Candidate, wishes: Wishes) -> Priced:
    """What a candidate costs, and whether it fits.

    Args:
        candidate: network and sampling.
        wishes: dollars, pictures, latency.

    Returns:
        With as much of its training as the budget pays, at most all of it.
    """
    machine = wishes.machine
    assert machine.usd_per_gpu_hour is not None
    usd_per_s = machine.usd_per_gpu_hour / 3600
    latency_s = picture_seconds(candidate, machine, wishes.sampling_share)
    sampling = wishes.images * latency_s * usd_per_s
    full = machine.usd(machine.hours(candidate.full_training_flops))
    assert full is not None
    share = max(0.0, min(1.0, (wishes.budget_usd - sampling) / full)) if full else 1.0
    needed = candidate.least_share * full + sampling
    problem = None
    if wishes.max_latency_s is not None and latency_s > wishes.max_latency_s:
        problem = f"a picture takes {latency_s:.3g} s"
    elif wishes.max_cost is not None and candidate.cost > wishes.max_cost * (1 + 1e-9):
        problem = f"a picture costs {candidate.cost:.3g}"
    elif sampling >= wishes.budget_usd:
        problem = f"the pictures alone cost {dollars(sampling)}"
    elif share < candidate.least_share:
        problem = f"needs {dollars(needed)}: the budget pays {share:.0%} of its training"
    return Priced(candidate, share, share * full, sampling, latency_s, needed, problem)


def choose(candidates: Sequence[Candidate], wishes: Wishes) -> tuple[Priced, list[Priced]]:
    """The best that fits.

    Whatever has no rank comes last. Of the others whole trainings come before parts of larger ones, and of
    parts that of the smallest training; then the higher rank, the better figure, the lower price.

    Args:
        candidates: all that is known.
        wishes: dollars, pictures, latency.

    Returns:
        The choice, and everything priced: what fits first, the best first.

    Raises:
        UserError: if nothing fits; the option that excludes everything is named, and what comes nearest.
    """
    priced = [price(candidate, wishes) for candidate in candidates]
    if all(each.problem for each in priced):
        raise UserError(_nothing_fits(priced, wishes))

    def order(each: Priced) -> tuple[bool, bool, float, int, float, float]:
        quality = each.candidate.quality
        value = math.inf if quality is None else quality
        # Figures are of whole trainings.
        partial = each.candidate.full_training_flops if each.training_share < 1 else 0.0
        return each.problem is not None, each.rank == 0, partial, -each.rank, value, each.total_usd

    priced.sort(key=order)
    return priced[0], priced


def _nothing_fits(priced: Sequence[Priced], wishes: Wishes) -> str:
    """Which option excludes what the ones before it left, and the nearest of these."""
    left, options, within = list(priced), list[str](), ""
    if wishes.max_latency_s is not None:
        near = min(left, key=lambda each: each.latency_s)
        left = [each for each in left if each.latency_s <= wishes.max_latency_s]
        if not left:
            return (
                f"--max-latency is {wishes.max_latency_s:g} s, but the fastest setting, "
                f"{near.candidate.setting}, takes {near.latency_s:.3g} s a picture; raise --max-latency, or "
                "take a faster GPU"
            )
        options.append("--max-latency")
        within = f" within --max-latency {wishes.max_latency_s:g} s"
    if wishes.max_cost is not None:
        near = min(left, key=lambda each: each.candidate.cost)
        left = [each for each in left if each.candidate.cost <= wishes.max_cost * (1 + 1e-9)]
        if not left:
            return (
                f"--max-cost is {wishes.max_cost:g}, but the cheapest setting{within}, "
                f"{near.candidate.setting}, costs {near.candidate.cost:.3g} a picture; raise "
                f"{' or '.join(['--max-cost', *options])}"
            )
        options.append("--max-cost")
        within += f"{' and' if within else ' within'} --max-cost {wishes.max_cost:g}"
    near = min(left, key=lambda each: each.needed_usd)
    fewer = "make fewer images, " if near.sampling_usd else ""
    return (
        f"--budget {wishes.budget_usd:g} is too small for every size{within}: {near.candidate.size} needs "
        f"{dollars(near.needed_usd)}, {dollars(near.sampling_usd)} of it for the pictures; raise "
        f"{' or '.join(['--budget', *options])}, {fewer}or take cheaper GPUs"
    )
