"""The job behind ``shoestring advise``."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from shoestring.planning.advice import Candidate, Priced, Wishes, choose, dollars
from shoestring.planning.cost import Machine
from shoestring.planning.evidence import candidates as published
from shoestring.planning.scaling import fit_power_law
from shoestring.runtime import UserError, say
from shoestring.studies.sampling_analysis import (
    Scale,
    at_the_end,
    curve_setting,
    first_seeds,
    most_samples,
    training_curves,
)
from shoestring.studies.sampling_rows import METRICS, Row, read_rows

SHOWN = 8
MOST_BEYOND = 10.0
"""Times the measured compute up to which a fit is asked for a prediction."""


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


def results_of(path: Path, metric: str) -> list[Row]:
    """Rows of a study that have the metric; of a cell those with the most pictures.

    Args:
        path: its folder or its results file (Parquet or CSV).
        metric: that is to be looked at.

    Returns:
        At least one.

    Raises:
        UserError: if there is none, or the metric is unknown or not lower-is-better.
    """
    if metric not in METRICS or METRICS[metric]:
        lower = [name for name, higher in METRICS.items() if not higher]
        raise UserError(f"--metric is {metric!r}; it must be one of {', '.join(lower)}")
    file = path / "results.parquet" if path.is_dir() else path
    if not file.exists():
        raise UserError(
            f"{file} does not exist; give the folder of a shoestring study sampling, or its results file"
        )
    rows = read_rows(file)
    if not rows:
        raise UserError(f"{file} has no rows yet; run shoestring study sampling first")
    measured = [row for row in most_samples(rows) if math.isfinite(getattr(row, metric))]
    if not measured:
        raise UserError(f"--metric is {metric}, and no row of {file} has it; choose kid or fd")
    return measured


# -- advice -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Advised:
    """An answer."""

    choice: Priced
    priced: Sequence[Priced]
    caution: str
    """How far it goes beyond what was measured."""


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
    rows = results_of(study, metric)
    choice, priced = choose(measured_candidates(rows, metric, study), wishes)
    largest = max(row.training_gflops for row in rows) * 1e9
    price = usd_per_flop(wishes.machine)
    affordable = (wishes.budget_usd - choice.sampling_usd) / price if price else largest
    caution = "within what was measured"
    if affordable > 1.1 * largest:
        caution = _predicted(rows, metric, choice.candidate.size, affordable) + (
            f"what the pictures leave of the budget pays {affordable / largest:,.3g} times the training "
            "compute of the largest training of the study: what larger or longer trainings would reach is "
            "not measured; shoestring plan study shows the fits"
        )
    if any(row.guided_calls == 1 for row in rows):
        caution += "; of distilled networks only the distillation is priced, not their teacher's training"
    return Advised(choice, priced, caution)


def _predicted(rows: Sequence[Row], metric: str, size: str, compute: float) -> str:
    """What the fit of a network says of a longer training, where there is a fit."""
    first = first_seeds(rows)
    points = training_curves(first, metric).get(size, [])
    try:
        fit = fit_power_law(points) if points else None
    except UserError:
        return ""
    if fit is None:
        return ""
    beyond = f"{fit.extrapolates(compute):,.3g} times beyond the points"
    if fit.extrapolates(compute) > MOST_BEYOND:
        return f"{beyond} of its training curve nothing is predicted; "
    if fit.law.at(compute) < 0:  # neither KID nor FD can be
        return f"its fit falls below zero {beyond}, and predicts nothing there; "
    low, high = fit.interval_at(compute)
    sampler, steps, guidance = curve_setting(first)
    return (
        f"predicted by the fit of its training curve (at {sampler}, {steps} steps, guidance {guidance:g}, "
        f"where it ends at {points[-1][1]:.3g}), {beyond}: {metric.upper()} {fit.law.at(compute):.3g} "
        f"({low:.3g} to {high:.3g}) if {size} were trained for all that; "
    )


def usd_per_flop(machine: Machine) -> float:
    """Dollars of training, at the share of the peak that is assumed."""
    assert machine.usd_per_gpu_hour is not None
    return machine.usd_per_gpu_hour / 3600 / (machine.gpu.peak_flops * machine.mfu)


def measured_candidates(rows: Sequence[Row], metric: str, study: Path) -> list[Candidate]:
    """Rows as candidates for advice.

    Args:
        rows: of a study, all seeds.
        metric: which is the quality; lower is better.
        study: its folder or results file.

    Returns:
        One a setting of every network's first training, at the mean over the trainings that have it.
    """
    scale = Scale.of(rows, count_guidance=False)
    seeds: dict[tuple[object, ...], list[float]] = {}
    for row in rows:
        seeds.setdefault(_setting_of(row), []).append(float(getattr(row, metric)))
    final = {row.cell for row in at_the_end(rows)}
    return [
        Candidate(
            size=row.model,
            recipe=_recipe_of(row, study),
            protocol=str(study),
            metric=metric.upper(),
            quality=statistics.fmean(seeds[_setting_of(row)]),
            claim=_claim(row, seeds[_setting_of(row)], metric, study),
            full_training_flops=row.training_gflops * 1e9,
            least_share=1.0,
            evaluation_flops=row.gflops * 1e9,
            sampler=row.sampler,
            steps=row.steps,
            evaluations=row.evaluations,
            guidance=row.guidance,
            cost=scale.sampling(row),
            guided_calls=row.guided_calls,
            nimg=row.nimg,
            whole=row.cell in final,
        )
        for row in first_seeds(rows)
    ]


def _setting_of(row: Row) -> tuple[object, ...]:
    return row.model, row.nimg, row.sampler, row.steps, row.guidance


def _claim(row: Row, values: Sequence[float], metric: str, study: Path) -> str:
    """What was measured, of how many trainings, and how sure it is."""
    error = f" +- {row.kid_error:.2g}" if metric == "kid" else ""
    of = f"seed {row.seed}"
    if len(values) > 1:
        of = f"mean of {len(values)} trainings: {', '.join(f'{value:.4g}' for value in values)}"
    return (
        f"{metric.upper()} {statistics.fmean(values):.4g}{error} at {row.nimg:,} images "
        f"({of}; measured, {study})"
    )


def _recipe_of(row: Row, study: Path) -> str | None:
    """The settings of a network that the study trained itself."""
    folder = study if study.is_dir() else study.parent
    path = folder / "models" / f"{row.model}-s{row.seed}" / "config.yaml"
    return str(path) if path.is_file() else None


def _caution_published(choice: Priced) -> str:
    words = [
        "figures are of COCO-2014 after training on 600 M internal pairs: expect the order of the sizes, not "
        "the numbers"
    ]
    if choice.training_share < 1:
        words.append(
            f"the budget pays {choice.training_share:.0%} of the published 500,000 steps, and the figures "
            f"are of all ({1 / choice.training_share:.1f} times beyond; trends are parallel from 40 % on)"
        )
    if choice.rank == 1:
        words.append("that 83M is best at cost 3 was published without a figure")
    if choice.rank == 3:
        words.append("at this budget the paper calls sampling cost no constraint, where larger sizes win")
    words.append("figures of other protocols in the list are not comparable with this one")
    words.append("pictures are priced with the autoencoder's decoder and without the text encoder")
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
    recipe = ""
    if found.recipe:
        recipe = f" with the recipe {found.recipe}"
        if choice.training_share < 1 or not found.whole:
            recipe += f" and stages.0.nimg={int(choice.training_share * found.nimg)}"
    say(console, f"Train {found.size}{recipe}.")
    say(console, f"Sample with {found.sampler}, {found.steps} steps, guidance {guidance}.")
    say(console, f"Evidence: {found.claim}.")
    price = f"{machine.usd_per_gpu_hour:g} dollars an hour"
    say(
        console,
        f"Predicted on {machine.count} x {machine.gpu.title} at {price}"
        f"{' (assumed; give --price)' if assumed else ''}: training {dollars(choice.training_usd)} "
        f"({machine.hours(choice.training_share * found.full_training_flops):,.1f} hours, "
        f"{choice.training_share:.0%} of the full training, {machine.mfu:.0%} of the peak), "
        f"{wishes.images:,.0f} pictures {dollars(choice.sampling_usd)}, {choice.latency_s:.3g} s a picture "
        f"on one GPU ({wishes.sampling_share:.0%} of the peak), together {dollars(choice.total_usd)}.",
    )
    say(console, f"Beyond the evidence: {advised.caution}.")
    table = Table(title="Others", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in (
        "size",
        "images seen",
        "sampler",
        "steps",
        "guidance",
        "cost",
        found.metric,
        "protocol",
        "training",
        "pictures",
        "s each",
        "",
    ):
        table.add_column(name, justify="left" if name in ("size", "sampler", "protocol", "") else "right")
    for each in advised.priced[1 : 1 + SHOWN]:
        other = each.candidate
        table.add_row(
            other.size,
            f"{other.nimg:,}",
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
        )
    console.print(table)
