"""Which size to train, and how to sample it, for so many dollars and pictures.

Candidates are settings whose quality somebody measured: published ones, or rows of a study of the user's own.
Each is priced: the training that it needs, and the pictures that are to be made. Quality is compared within
one protocol only, and lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shoestring.planning.cost import Machine
from shoestring.runtime import UserError

ASSUMED_USD = {"h100": 3.75}
"""Dollars for an hour, where none are given: the account of arXiv 2407.15811 (published)."""
SAMPLING_SHARE = 0.25
"""Of the peak, while sampling; assumed."""


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
    full_training_flops: float
    """Of the training whose quality this is."""
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
    rank: int = 0
    """Between protocols: the highest that can be had is taken."""
    unconstrained: bool = False
    """Whether its rank is for those whom sampling costs little: 0 where pictures cost more than training."""
    guided_calls: int = 2
    """Network calls of an evaluation with guidance; 1 of models that take the scale as an input."""
    decoder_flops: float = 0.0
    """Of the autoencoder's decoder, once a picture."""
    nimg: int = 0
    """Images of the training whose quality this is."""
    whole: bool = True
    """Whether the recipe ends there."""

    @property
    def picture_flops(self) -> float:
        """Of one picture, guidance's second pass and the decoder counted; not the text encoder."""
        guided = 1 if self.guidance in (0.0, 1.0) else self.guided_calls
        return self.evaluation_flops * self.evaluations * guided + self.decoder_flops


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
    problem: str | None
    """Why it cannot be had."""

    @property
    def total_usd(self) -> float:
        """Total cost of ownership."""
        return self.training_usd + self.sampling_usd

    @property
    def rank(self) -> int:
        """Of its evidence, for these wishes."""
        dear = self.candidate.unconstrained and self.sampling_usd > self.training_usd
        return 0 if dear else self.candidate.rank


def dollars(usd: float) -> str:
    """An amount to read: cents from a dollar on, three digits below."""
    return f"${usd:,.2f}" if usd >= 1 or usd == 0 else f"${usd:.3g}"


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
    latency_s = candidate.picture_flops / (machine.gpu.peak_flops * wishes.sampling_share)
    sampling = wishes.images * latency_s * usd_per_s
    full = machine.usd(machine.hours(candidate.full_training_flops))
    assert full is not None
    share = max(0.0, min(1.0, (wishes.budget_usd - sampling) / full)) if full else 1.0
    problem = None
    if wishes.max_latency_s is not None and latency_s > wishes.max_latency_s:
        problem = f"a picture takes {latency_s:.3g} s"
    elif wishes.max_cost is not None and candidate.cost > wishes.max_cost * (1 + 1e-9):
        problem = f"a picture costs {candidate.cost:.3g}"
    elif sampling >= wishes.budget_usd:
        problem = f"the pictures alone cost {dollars(sampling)}"
    elif share < candidate.least_share:
        needed = candidate.least_share * full + sampling
        problem = f"needs {dollars(needed)}: the budget pays {share:.0%} of its training"
    return Priced(candidate, share, share * full, sampling, latency_s, problem)


def choose(candidates: Sequence[Candidate], wishes: Wishes) -> tuple[Priced, list[Priced]]:
    """The best that fits.

    Args:
        candidates: all that is known.
        wishes: dollars, pictures, latency.

    Returns:
        The choice, and everything priced: what fits first, the best first.

    Raises:
        UserError: if nothing fits; what the cheapest would need is said.
    """
    priced = [price(candidate, wishes) for candidate in candidates]
    if all(each.problem for each in priced):
        raise UserError(_nothing_fits(priced, wishes))
    worst = float("inf")

    def order(each: Priced) -> tuple[bool, int, bool, float, float]:
        quality = each.candidate.quality
        value = worst if quality is None else quality
        partial = each.training_share < 1  # its figure is of a whole training
        return each.problem is not None, -each.rank, partial, value, each.total_usd

    priced.sort(key=order)
    return priced[0], priced


def _nothing_fits(priced: Sequence[Priced], wishes: Wishes) -> str:
    """Which wish excludes all that the others leave, what comes nearest to it, and what to change."""
    left = list(priced)
    if wishes.max_latency_s is not None:
        near = min(left, key=lambda each: each.latency_s)
        if near.latency_s > wishes.max_latency_s:
            return (
                f"--max-latency {wishes.max_latency_s:g} s is too short for every setting: the fastest, "
                f"{_setting(near)}, takes {near.latency_s:.3g} s a picture; allow more, or take a faster GPU"
            )
        left = [each for each in left if each.latency_s <= wishes.max_latency_s]
    if wishes.max_cost is not None:
        near = min(left, key=lambda each: each.candidate.cost)
        if near.candidate.cost > wishes.max_cost * (1 + 1e-9):
            return (
                f"--max-cost {wishes.max_cost:g} is too low for every setting: the cheapest, "
                f"{_setting(near)}, costs {near.candidate.cost:.3g} a picture; raise --max-cost"
                + (" or --max-latency" if len(left) < len(priced) else "")
            )
        left = [each for each in left if each.candidate.cost <= wishes.max_cost * (1 + 1e-9)]
    needed = {id(each): _needed(each, wishes) for each in left}
    near = min(left, key=lambda each: needed[id(each)])
    bounds = {"--max-latency": wishes.max_latency_s, "--max-cost": wishes.max_cost}
    others = [name for name, bound in bounds.items() if bound is not None]
    return (
        f"--budget {wishes.budget_usd:g} is too small for every setting"
        f"{' that is left' if len(left) < len(priced) else ''}: {_setting(near)} needs "
        f"{dollars(needed[id(near)])}; raise the budget, make fewer images, or take cheaper GPUs"
        + (f", or raise {' or '.join(others)}" if others and len(left) < len(priced) else "")
    )


def _setting(each: Priced) -> str:
    found = each.candidate
    return f"{found.size} with {found.steps} steps of {found.sampler}"


def _needed(each: Priced, wishes: Wishes) -> float:
    """Dollars for the least training that says something, and for all pictures."""
    machine = wishes.machine
    full = machine.usd(machine.hours(each.candidate.full_training_flops))
    assert full is not None
    return each.candidate.least_share * full + each.sampling_usd
