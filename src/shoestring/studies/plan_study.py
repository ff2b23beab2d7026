"""The job behind ``shoestring plan study``: fits, the best sizes, and total cost of ownership."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from shoestring.planning.advice import SAMPLING_SHARE, Candidate, picture_seconds
from shoestring.planning.cost import Machine, dollars
from shoestring.planning.scaling import FLATTEST, SEARCHED, STEEPEST, fit_power_law, iso_flop
from shoestring.runtime import UserError, say
from shoestring.studies.sampling_analysis import (
    Curves,
    Scale,
    at_the_end,
    best_guidance,
    best_within,
    budgets,
    first_seeds,
    training_curves,
)
from shoestring.studies.sampling_rows import Row
from shoestring.studies.study_evidence import evidence_of, measured


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
    evidence = evidence_of(path, metric)
    rows = first_seeds(evidence.rows)
    curves = training_curves(rows, metric)
    _print_fits(curves, metric, console)
    _print_iso_flop(curves.points, metric, machine, console)
    _print_sampling(rows, metric, console)
    _print_ownership(measured(rows, metric, path), metric, machine, images, console)
    for note in evidence.notes:
        say(console, note)
    if len(rows) < len(evidence.rows):
        say(
            console,
            "Tables are of every network's first seed; shoestring advise takes the mean of the seeds.",
        )


def _table(title: str, names: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i == 0 else "right")
    return table


def _print_fits(curves: Curves, metric: str, console: Console) -> None:
    table = _table(
        f"{metric.upper()} = a + b C^-c over training compute, 95 % (measured here, beyond predicted; "
        f"{curves.setting})",
        ["network", "points", "a", "interval", "b", "c", "interval", "at 10 x the compute", "interval"],
    )
    problems: dict[str, list[str]] = {}
    for name, points in curves.points.items():
        try:
            fit = fit_power_law(points)
        except UserError as error:
            problems.setdefault(str(error), []).append(name)
            continue
        law, sure = fit.law, fit.intervals
        cells = [name, str(len(points)), f"{law.a:.3g}", f"{sure['a'][0]:.3g} to {sure['a'][1]:.3g}"]
        cells += [f"{law.b:.3g}", f"{law.c:.3g}", shown_exponents(*sure["c"])]
        beyond = 10 * fit.high
        at = law.at(beyond)
        table.add_row(
            *cells, "none (below 0)" if at < 0 else f"{at:.3g}", shown_range(*fit.interval_at(beyond))
        )
    if table.row_count:
        console.print(table)
    for problem, names in problems.items():
        say(console, f"No fit for {', '.join(names)}: {problem}")
    if len(curves.points) < 2:
        say(console, "The study has one size only: there is nothing to choose from, and no fit over sizes.")


def shown_exponents(low: float, high: float) -> str:
    """Limits of c for people; at the ends of what is searched they are no limits.

    Args:
        low: of the interval.
        high: of the interval.

    Returns:
        Such as 0.31 to 0.62, or < 0.01 to > 3.
    """
    flat, steep = low < SEARCHED[0], high > SEARCHED[1]
    return f"{f'< {FLATTEST:g}' if flat else f'{low:.3g}'} to {f'> {STEEPEST:g}' if steep else f'{high:.3g}'}"


def shown_range(low: float, high: float) -> str:
    """An interval of a figure that cannot be below zero, for people.

    Args:
        low: of the interval.
        high: of the interval.

    Returns:
        Such as 0.1 to 0.2, below 0 to 0.2, or below 0.
    """
    if high < 0:
        return "below 0"
    return f"{'below 0' if low < 0 else f'{low:.3g}'} to {high:.3g}"


def _print_iso_flop(
    curves: Mapping[str, Sequence[tuple[float, float]]], metric: str, machine: Machine, console: Console
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
            "" if usd is None else dollars(usd),
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
        "The best network for a sampling cost (guidance's second pass not counted)",
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
    candidates: Sequence[Candidate], metric: str, machine: Machine, images: float, console: Console
) -> None:
    """Training and N pictures together: what is best at each total."""
    usd_per_hour = machine.usd_per_gpu_hour
    if usd_per_hour is None:
        say(console, "No total cost of ownership without --price.")
        return
    table = _table(
        f"Total cost of ownership with {images:,.0f} pictures (guidance's second pass counted): the front",
        ["dollars", "network", "images seen", "sampler", "steps", "guidance", metric.upper()],
    )
    priced = []
    for each in candidates:
        training = machine.usd(machine.hours(each.full_training_flops))
        assert training is not None
        assert each.quality is not None
        hours = images * picture_seconds(each, machine, SAMPLING_SHARE) / 3600
        priced.append((training + hours * usd_per_hour, each.quality, each))
    reached = float("inf")
    for usd, quality, each in sorted(priced, key=lambda one: one[:2]):  # of equal prices the best comes first
        if quality < reached:
            reached = quality
            cells = [dollars(usd), each.size, f"{each.images_seen:,}", each.sampler, str(each.steps)]
            table.add_row(*cells, f"{each.guidance:g}", f"{quality:.4g}")
    console.print(table)
