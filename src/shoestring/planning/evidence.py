"""What the LDM scaling study published of quality at a sampling cost, as candidates for advice.

Table 1: every size at DDIM's 50 steps and guidance 7.5. Section on sampling efficiency: at costs 6 and 12 the
145M before the 866M, guidance chosen for each; at cost 3 the 83M is the best. Figures of costs 6 and 12 were
read off a plot.

Source: Bigger is not Always Better, arXiv 2404.01367.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from shoestring import recipes
from shoestring.planning.advice import Candidate
from shoestring.planning.flops import model_flops
from shoestring.recipes.ldm import FAMILY, STEPS

ALIGNED_STEPS = 200_000
"""Training steps after which the trends of the sizes are parallel; with fewer, nothing is said."""
UNCONSTRAINED = 50.0
"""Sampling cost of the 866M at 50 steps: from here on the paper calls cost no constraint, and larger wins."""
UNCONSTRAINED_RANK = 3
LATENTS = (64, 64)
DECODER_FLOPS = 2.5145e12
"""Of one picture: the decoder of Stable Diffusion's autoencoder, 64 x 64 x 4 to 512 pixels; counted."""
PAPER = "published, arXiv 2404.01367"


@dataclass(frozen=True)
class Comparison:
    """A published point of quality at a sampling cost, with the best guidance."""

    cost: float
    size: str
    steps: int
    fid: float | None


COMPARISONS = (
    Comparison(3, "83m", 23, None),
    Comparison(6, "145m", 30, 19.0),
    Comparison(6, "866m", 6, 26.0),
    Comparison(12, "145m", 60, 17.0),
    Comparison(12, "866m", 12, 20.0),
)


@cache
def candidates() -> tuple[Candidate, ...]:
    """All published settings of the family.

    Returns:
        The comparisons at equal cost rank above table 1, except where sampling cost is no constraint.
    """
    found = []
    for size, member in FAMILY.items():
        cost = member.cost * 50
        claim = f"FID {member.fid:.2f} at 50 steps, guidance 7.5 (table 1, {PAPER})"
        rank = UNCONSTRAINED_RANK if cost >= UNCONSTRAINED else 0
        found.append(_candidate(size, 50, 7.5, "table 1", member.fid, claim, cost, rank))
    for point in COMPARISONS:
        if point.fid is None:
            claim = f"the best of all sizes at sampling cost {point.cost:g} (section 3.2, {PAPER}; no figure)"
            found.append(_candidate(point.size, point.steps, None, "cost 3", None, claim, point.cost, 1))
        else:
            claim = f"FID about {point.fid:g} at sampling cost {point.cost:g} (read off a plot, {PAPER})"
            best = "equal cost, best guidance"
            found.append(_candidate(point.size, point.steps, None, best, point.fid, claim, point.cost, 2))
    return tuple(found)


def _candidate(
    size: str,
    steps: int,
    guidance: float | None,
    protocol: str,
    fid: float | None,
    claim: str,
    cost: float,
    rank: int,
) -> Candidate:
    config = recipes.get(f"ldm-{size}")
    counted = model_flops(config.model, LATENTS, config.data.max_tokens, 0.0, config.tokens)
    return Candidate(
        size=size.upper(),
        recipe=f"ldm-{size}",
        protocol=protocol,
        metric="FID",
        quality=fid,
        claim=claim,
        images_seen=config.nimg,
        full_training_flops=counted.training * config.nimg,
        least_share=ALIGNED_STEPS / STEPS,
        evaluation_flops=counted.forward,
        sampler="ddim",
        steps=steps,
        evaluations=steps,
        guidance=guidance,
        cost=cost,
        decoder_flops=DECODER_FLOPS,
        rank=rank,
        unconstrained=rank == UNCONSTRAINED_RANK,
    )
