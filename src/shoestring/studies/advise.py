"""The job behind ``shoestring advise``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from shoestring import recipes
from shoestring.planning.advice import Priced, Wishes, choose
from shoestring.planning.cost import dollars
from shoestring.planning.evidence import UNCONSTRAINED_RANK
from shoestring.planning.evidence import candidates as published
from shoestring.planning.scaling import fit_power_law
from shoestring.runtime import UserError, say
from shoestring.studies.plan_study import shown_range
from shoestring.studies.sampling_analysis import first_seeds, training_curves
from shoestring.studies.sampling_rows import Row
from shoestring.studies.study_evidence import evidence_of, measured

SHOWN = 8
FARTHEST = 10.0
"""So many times beyond its points a fit is used, and no farther."""


def seconds_of(text: str) -> float:
    """Seconds of ``2s``, ``500ms`` or ``1.5``.

    Args:
        text: what the user gave.

    Returns:
        Seconds.

    Raises:
        UserError: if it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s)?", text.strip())
    if found is None:
        raise UserError(f"--max-latency is {text!r}; it must be a time such as 2s or 500ms")
    return float(found[1]) / (1000 if found[2] == "ms" else 1)


@dataclass(frozen=True)
class Advised:
    """An answer."""

    choice: Priced
    priced: Sequence[Priced]
    caution: str
    """How far it goes beyond what was measured."""
    notes: Sequence[str] = ()
    """What else has to be known of the evidence."""


def advise(wishes: Wishes, study: Path | None, metric: str) -> Advised:
    """Find the best size, steps, sampler and guidance for some wishes.

    Args:
        wishes: dollars, pictures, latency, machine.
        study: folder of the user's own study; ``None`` = the published figures.
        metric: of the study.

    Returns:
        The answer.

    Raises:
        UserError: if nothing fits.
    """
    if study is None:
        choice, priced = choose(published(), wishes)
        return Advised(choice, priced, _caution_published(choice))
    evidence = evidence_of(study, metric)
    choice, priced = choose(measured(evidence.rows, metric, study), wishes)
    return Advised(choice, priced, _caution_study(evidence.rows, metric, choice, wishes), evidence.notes)


def _caution_study(rows: Sequence[Row], metric: str, choice: Priced, wishes: Wishes) -> str:
    largest = max(row.training_gflops for row in rows) * 1e9
    usd_per_flop = wishes.machine.usd(wishes.machine.hours(1.0))
    left = wishes.budget_usd - choice.sampling_usd
    affordable = left / usd_per_flop if usd_per_flop else largest
    if affordable <= 1.1 * largest:
        return "within what was measured"
    return _predicted(rows, metric, choice.candidate.size, affordable) + (
        f"what the pictures leave of the budget pays {_times(affordable / largest)} the training compute of "
        "the largest training of the study: what larger or longer trainings would reach is not measured; "
        "shoestring plan study shows the fits"
    )


def _times(factor: float) -> str:
    return f"{factor:,.1f} times" if factor < 100 else f"{factor:,.0f} times"


def _predicted(rows: Sequence[Row], metric: str, size: str, compute: float) -> str:
    """What the fit of a network says of a longer training, where there is a fit."""
    curves = training_curves(first_seeds(rows), metric)
    points = curves.points.get(size, ())
    try:
        fit = fit_power_law(points) if points else None
    except UserError:
        return ""
    if fit is None:
        return ""
    name, beyond = metric.upper(), fit.extrapolates(compute)
    what = (
        f"the fit of {size} is of {curves.setting}, where {name} is {points[-1][1]:.3g} at the end of its "
        f"first seed's training; {_times(beyond)} beyond its points it "
    )
    if beyond > FARTHEST:
        return f"{what}predicts nothing, as it is used up to {FARTHEST:g} times beyond; "
    if fit.law.at(compute) < 0:  # neither KID nor FD can be
        return f"{what}falls below zero, and predicts nothing; "
    return (
        f"{what}predicts {name} {fit.law.at(compute):.3g} ({shown_range(*fit.interval_at(compute))}) if "
        f"{size} were trained for what the pictures leave of the budget; "
    )


def _caution_published(choice: Priced) -> str:
    found = choice.candidate
    words = [
        "figures are of COCO-2014 after training on 600 M internal pairs: expect the order of the sizes, not "
        "the numbers"
    ]
    if choice.training_share < 1:
        words.append(
            f"the budget pays {choice.training_share:.0%} of the published 500,000 steps, and the figures "
            f"are of all ({1 / choice.training_share:.1f} times beyond; trends are parallel from 40 % on)"
        )
    if found.rank == 1:
        words.append("that 83M is best at cost 3 was published without a figure")
    if choice.rank == UNCONSTRAINED_RANK:
        words.append(
            "the pictures are at most half of the dollars, which is taken here as no constraint on sampling "
            "cost, where the paper finds larger sizes better"
        )
    words.append("figures of other protocols in the list are not comparable with this one")
    words.append("the recipe's optimiser, schedule and encoders are our choice, as the paper does not say")
    return "; ".join(words)


def print_advice(advised: Advised, wishes: Wishes, assumed: bool, console: Console) -> None:
    """Say it.

    Args:
        advised: the answer.
        wishes: what was asked for.
        assumed: whether the price of the GPU is an assumption.
        console: where a person reads.
    """
    choice, machine = advised.choice, wishes.machine
    found = choice.candidate
    guidance = "the best of a sweep (1.5 to 8)" if found.guidance is None else f"{found.guidance:g}"
    say(console, f"Train {found.size}" + (f" with the recipe {found.recipe}." if found.recipe else "."))
    if found.recipe is not None and (part := _part(choice, found.recipe)):
        say(console, part)
    say(console, f"Sample with {found.sampler}, {found.steps} steps, guidance {guidance}.")
    say(console, f"Evidence: {found.claim}.")
    for note in advised.notes:
        say(console, note)
    price = f"{machine.usd_per_gpu_hour:g} dollars an hour"
    counted = (
        "autoencoder's decoder included, text encoder not" if found.decoder_flops else "the network alone"
    )
    say(
        console,
        f"Predicted on {machine.count} x {machine.gpu.title} at {price}"
        f"{' (assumed; give --price)' if assumed else ''}: training {dollars(choice.training_usd)} "
        f"({machine.hours(choice.training_share * found.full_training_flops):,.3g} hours, "
        f"{choice.training_share:.0%} of the training that the figures are of, {machine.mfu:.0%} of the "
        f"peak), {wishes.images:,.0f} pictures {dollars(choice.sampling_usd)}, {choice.latency_s:.3g} s a "
        f"picture on one GPU ({wishes.sampling_share:.0%} of the peak; {counted}), together "
        f"{dollars(choice.total_usd)}.",
    )
    say(console, f"Beyond the evidence: {advised.caution}.")
    if len(advised.priced) > 1:
        console.print(_others(advised))


def _part(choice: Priced, recipe: str) -> str | None:
    """How to train what the budget pays, or what the figure is of, where that is not the whole recipe."""
    config = recipes.resolve(recipe, [])
    batch = config.stages[0].batch
    images = max(1, int(choice.training_share * choice.candidate.images_seen) // batch) * batch
    if images >= config.nimg:
        return None
    share = f"{images:,} of its {config.nimg:,} images"
    if len(config.stages) > 1:
        return f"End it after {share}: the others are not in this price."
    return f"Change it by stages.0.nimg={images}: {share} are in this price."


def _others(advised: Advised) -> Table:
    table = Table(title="Others", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    metric = advised.choice.candidate.metric
    names = ["size", "images seen", "sampler", "steps", "guidance", "cost", metric, "protocol"]
    names += ["training", "pictures", "s each", ""]
    rows = [_cells(each) for each in advised.priced]
    same = {name for name, *cells in zip(names, *rows, strict=True) if len(set(cells)) == 1}
    dropped = same & {"images seen", "sampler", "protocol", ""}  # they tell no rows apart
    kept = [i for i, name in enumerate(names) if name not in dropped]
    for i in kept:
        left = names[i] in ("size", "sampler", "protocol", "")
        table.add_column(names[i], justify="left" if left else "right")
    for cells in rows[1 : 1 + SHOWN]:
        table.add_row(*(cells[i] for i in kept))
    return table


def _cells(each: Priced) -> list[str]:
    other = each.candidate
    return [
        other.size,
        f"{other.images_seen:,}",
        other.sampler,
        str(other.steps),
        "best" if other.guidance is None else f"{other.guidance:g}",
        f"{other.cost:.3g}",
        "" if other.quality is None else f"{other.quality:.4g}",
        other.protocol,
        dollars(each.training_usd),
        dollars(each.sampling_usd),
        f"{each.latency_s:.3g}",
        each.problem or "",
    ]
