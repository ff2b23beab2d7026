"""The jobs behind ``shoestring advise`` and ``shoestring plan study``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from shoestring.planning.advice import Candidate, Priced, Wishes, choose
from shoestring.planning.cost import Machine
from shoestring.planning.evidence import candidates as published
from shoestring.planning.scaling import Fit, fit_power_law, iso_flop
from shoestring.runtime import UserError, say
from shoestring.studies.sampling_analysis import (
    Scale,
    at_the_end,
    best_guidance,
    best_within,
    better,
    budgets,
    most_samples,
)
from shoestring.studies.sampling_rows import METRICS, Row, read_rows

SHOWN = 8


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
    """Rows of a study; where cells were measured with several numbers of pictures, those with the most.

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
    return most_samples(rows)


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
    choice, priced = choose(_measured(rows, metric, study), wishes)
    largest = max(row.training_gflops for row in rows) * 1e9
    price = _usd_per_flop(wishes.machine)
    affordable = wishes.budget_usd / price if price else largest
    caution = "within what was measured"
    if affordable > 1.1 * largest:
        caution = _predicted(rows, metric, choice.candidate.size, affordable) + (
            f"the budget pays {affordable / largest:,.0f} times the training compute of the largest training "
            "of the study: what larger or longer trainings would reach is not measured; shoestring plan "
            "study shows the fits"
        )
    return Advised(choice, priced, caution)


def _predicted(rows: Sequence[Row], metric: str, size: str, compute: float) -> str:
    """What the fit of a network says of a longer training, where there is a fit."""
    points = training_curves([row for row in rows if row.seed == 0] or rows, metric).get(size, [])
    try:
        fit = fit_power_law(points) if points else None
    except UserError:
        return ""
    if fit is None:
        return ""
    beyond = f"{fit.extrapolates(compute):,.1f} times beyond the points"
    if fit.law.at(compute) < 0:  # neither KID nor FD can be
        return f"its fit falls below zero {beyond}, and predicts nothing there; "
    low, high = fit.interval_at(compute)
    return (
        f"predicted by its fit, {beyond}: {metric.upper()} "
        f"{fit.law.at(compute):.3g} ({low:.3g} to {high:.3g}) if {size} were trained for the whole budget; "
    )


def _usd_per_flop(machine: Machine) -> float:
    assert machine.usd_per_gpu_hour is not None
    return machine.usd_per_gpu_hour / 3600 / (machine.gpu.peak_flops * machine.mfu)


def _measured(rows: Sequence[Row], metric: str, study: Path) -> list[Candidate]:
    scale = Scale.of(rows, count_guidance=False)
    return [
        Candidate(
            size=row.model,
            recipe=_recipe_of(row, study),
            protocol=str(study),
            metric=metric.upper(),
            quality=float(getattr(row, metric)),
            claim=f"{metric.upper()} {getattr(row, metric):.4g} at {row.nimg:,} images (measured, {study})",
            full_training_flops=row.training_gflops * 1e9,
            least_share=1.0,
            evaluation_flops=row.gflops * 1e9,
            sampler=row.sampler,
            steps=row.steps,
            evaluations=row.evaluations,
            guidance=row.guidance,
            cost=scale.sampling(row),
        )
        for row in rows
    ]


def _recipe_of(row: Row, study: Path) -> str | None:
    """The settings of a network that the study trained itself."""
    path = study / "models" / f"{row.model}-s{row.seed}" / "config.yaml"
    return str(path) if path.is_file() else None


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
    if found.rank == 3:
        words.append("at this budget the paper calls sampling cost no constraint, where larger sizes win")
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
    say(console, f"Sample with {found.sampler}, {found.steps} steps, guidance {guidance}.")
    say(console, f"Evidence: {found.claim}.")
    price = f"{machine.usd_per_gpu_hour:g} dollars an hour"
    say(
        console,
        f"Predicted on {machine.count} x {machine.gpu.title} at {price}"
        f"{' (assumed; give --price)' if assumed else ''}: training ${choice.training_usd:,.2f} "
        f"({machine.hours(choice.training_share * found.full_training_flops):,.1f} hours, "
        f"{choice.training_share:.0%} of the full training, {machine.mfu:.0%} of the peak), "
        f"{wishes.images:,.0f} pictures ${choice.sampling_usd:,.2f}, {choice.latency_s:.3g} s a picture on "
        f"one GPU ({wishes.sampling_share:.0%} of the peak), together ${choice.total_usd:,.2f}.",
    )
    say(console, f"Beyond the evidence: {advised.caution}.")
    table = Table(title="Others", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in (
        "size",
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
        table.add_column(name, justify="left" if name in ("size", "protocol", "") else "right")
    for each in advised.priced[1 : 1 + SHOWN]:
        other = each.candidate
        table.add_row(
            other.size,
            str(other.steps),
            "best" if other.guidance is None else f"{other.guidance:g}",
            f"{other.cost:.3g}",
            "" if other.quality is None else f"{other.quality:.4g}",
            other.protocol,
            f"${each.training_usd:,.2f}",
            f"${each.sampling_usd:,.2f}",
            f"{each.latency_s:.3g}",
            each.problem or "",
        )
    console.print(table)


# -- what a study says ------------------------------------------------------------------------------------


def plan_study(path: Path, metric: str, machine: Machine, images: float, console: Console) -> None:
    """Print the fits of a study, the best sizes for budgets of training and of sampling, and for both.

    Args:
        path: folder or results file of the study.
        metric: which quality; lower is better.
        machine: for dollars.
        images: pictures that will be made.
        console: where a person reads.

    Raises:
        UserError: if there are no rows.
    """
    found = results_of(path, metric)
    rows = [row for row in found if row.seed == 0] or found
    curves = training_curves(rows, metric)
    _print_fits(curves, metric, console)
    _print_iso_flop(curves, metric, machine, console)
    _print_sampling(rows, metric, console)
    _print_ownership(rows, metric, machine, images, console)


def training_curves(rows: Sequence[Row], metric: str) -> dict[str, list[tuple[float, float]]]:
    """Training compute (FLOP) and quality of the checkpoints of every network that were sampled alike."""
    settings: dict[tuple[object, ...], set[tuple[str, int]]] = {}
    for row in rows:
        key = row.sampler, row.steps, row.guidance
        settings.setdefault(key, set()).add((row.model, row.nimg))
    chosen = max(settings, key=lambda key: len(settings[key]))
    found: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda r: (r.family, r.gflops, r.nimg)):
        if (row.sampler, row.steps, row.guidance) == chosen:
            found.setdefault(row.model, []).append((row.training_gflops * 1e9, float(getattr(row, metric))))
    return found


def _table(title: str, names: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i == 0 else "right")
    return table


def _print_fits(curves: dict[str, list[tuple[float, float]]], metric: str, console: Console) -> None:
    table = _table(
        f"{metric.upper()} = a + b C^-c over training compute, 95 % (measured here, beyond predicted)",
        ["network", "points", "a", "interval", "b", "c", "interval", "at 10 x the compute", "interval"],
    )
    fits: dict[str, Fit] = {}
    problems: dict[str, list[str]] = {}
    for name, points in curves.items():
        try:
            fits[name] = fit_power_law(points)
        except UserError as error:
            problems.setdefault(str(error), []).append(name)
            continue
        law, sure = fits[name].law, fits[name].intervals
        cells = [name, str(len(points)), f"{law.a:.3g}", f"{sure['a'][0]:.3g} to {sure['a'][1]:.3g}"]
        cells += [f"{law.b:.3g}", f"{law.c:.3g}", f"{sure['c'][0]:.3g} to {sure['c'][1]:.3g}"]
        beyond = 10 * fits[name].high
        low, high = fits[name].interval_at(beyond)
        table.add_row(*cells, f"{law.at(beyond):.3g}", f"{low:.3g} to {high:.3g}")
    if fits:
        console.print(table)
    for problem, names in problems.items():
        say(console, f"No fit for {', '.join(names)}: {problem}")
    if len(curves) < 2:
        say(console, "The study has one size only: there is nothing to choose from, and no fit over sizes.")


def _print_iso_flop(
    curves: dict[str, list[tuple[float, float]]], metric: str, machine: Machine, console: Console
) -> None:
    if len(curves) < 2:
        return
    lows = sorted(points[0][0] for points in curves.values())
    highs = sorted(points[-1][0] for points in curves.values())
    low, high = lows[1], highs[-2]
    if high <= low:
        return
    table = _table(
        "The best size for a training budget, read off the curves",
        ["FLOP", "dollars", "best", metric.upper(), "others"],
    )
    for budget, found in iso_flop(curves, [low * (high / low) ** (i / 4) for i in range(5)]).items():
        if len(found) < 2:
            continue
        ordered = sorted(found, key=lambda name: found[name])
        usd = machine.usd(machine.hours(budget))
        others = ", ".join(f"{name} {found[name]:.3g}" for name in ordered[1:])
        cells = [
            f"{budget:.2e}",
            "" if usd is None else f"${usd:,.4g}",
            ordered[0],
            f"{found[ordered[0]]:.4g}",
        ]
        table.add_row(*cells, others)
    if table.row_count:
        console.print(table)


def _print_sampling(rows: Sequence[Row], metric: str, console: Console) -> None:
    scale = Scale.of(rows, count_guidance=False)
    best = best_guidance(at_the_end(rows), metric)
    table = _table(
        "The best network for a sampling cost",
        ["cost", "network", "sampler", "steps", "guidance", metric.upper()],
    )
    for cost in budgets(best, scale):
        row = best_within(best, scale, metric, cost)
        if row is not None:
            cells = [f"{cost:g}", row.model, row.sampler, str(row.steps), f"{row.guidance:g}"]
            table.add_row(*cells, f"{getattr(row, metric):.4g}")
    if table.row_count:
        console.print(table)


def _print_ownership(
    rows: Sequence[Row], metric: str, machine: Machine, images: float, console: Console
) -> None:
    """Training and N pictures together: what is best at each total."""
    if machine.usd_per_gpu_hour is None:
        say(console, "No total cost of ownership without --price.")
        return
    wishes = Wishes(1.0, images, None, machine)
    usd_per_s = machine.usd_per_gpu_hour / 3600
    table = _table(
        f"Total cost of ownership with {images:,.0f} pictures: the front",
        ["dollars", "network", "images seen", "sampler", "steps", "guidance", metric.upper()],
    )
    priced = []
    for row, each in zip(rows, _measured(rows, metric, Path("study")), strict=True):
        picture = each.picture_flops / (machine.gpu.peak_flops * wishes.sampling_share) * usd_per_s
        training = each.full_training_flops * _usd_per_flop(machine)
        priced.append((training + images * picture, row))
    priced.sort(key=lambda pair: (pair[0], better(metric)(pair[1])))
    reached = float("inf")
    for usd, row in priced:  # of equal prices the best comes first
        if better(metric)(row) < reached:
            reached = better(metric)(row)
            cells = [f"${usd:,.4g}", row.model, f"{row.nimg:,}", row.sampler, str(row.steps)]
            table.add_row(*cells, f"{row.guidance:g}", f"{getattr(row, metric):.4g}")
    console.print(table)
