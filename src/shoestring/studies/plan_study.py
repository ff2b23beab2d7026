"""The job behind ``shoestring plan study``: fits, and the best sizes for training and for sampling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from shoestring.planning.advice import Wishes
from shoestring.planning.cost import Machine
from shoestring.planning.scaling import FLATTEST, STEEPEST, Fit, fit_power_law, iso_flop
from shoestring.runtime import UserError, say
from shoestring.studies.advise import measured_candidates, results_of, usd_per_flop
from shoestring.studies.sampling_analysis import (
    Scale,
    at_the_end,
    best_guidance,
    best_within,
    better,
    budgets,
    first_seeds,
    training_curves,
)
from shoestring.studies.sampling_rows import Row


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
    rows = first_seeds(results_of(path, metric))
    curves = training_curves(rows, metric)
    _print_fits(curves, metric, console)
    _print_iso_flop(curves, metric, machine, console)
    _print_sampling(rows, metric, console)
    _print_ownership(rows, metric, machine, images, console)


def _limit(value: float) -> str:
    """A limit of an exponent; those of the search are none of the data's."""
    if value <= 1.01 * FLATTEST:
        return f"< {FLATTEST:g}"
    return f"> {STEEPEST:g}" if value >= 0.99 * STEEPEST else f"{value:.3g}"


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
        cells += [f"{law.b:.3g}", f"{law.c:.3g}", f"{_limit(sure['c'][0])} to {_limit(sure['c'][1])}"]
        beyond = 10 * fits[name].high
        low, high = fits[name].interval_at(beyond)
        told = (
            ("none: below 0", "")
            if law.at(beyond) < 0
            else (f"{law.at(beyond):.3g}", f"{low:.3g} to {high:.3g}")
        )
        table.add_row(*cells, *told)
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
    rows: Sequence[Row], metric: str, machine: Machine, images: float, console: Console
) -> None:
    """Training and N pictures together: what is best at each total."""
    if machine.usd_per_gpu_hour is None:
        say(console, "No total cost of ownership without --price.")
        return
    wishes = Wishes(1.0, images, None, machine)
    usd_per_s = machine.usd_per_gpu_hour / 3600
    table = _table(
        f"Total cost of ownership with {images:,.0f} pictures: the front (all passes counted)",
        ["dollars", "network", "images seen", "sampler", "steps", "guidance", metric.upper()],
    )
    priced = []
    for row, each in zip(rows, measured_candidates(rows, metric, Path("study")), strict=True):
        picture = each.picture_flops / (machine.gpu.peak_flops * wishes.sampling_share) * usd_per_s
        training = each.full_training_flops * usd_per_flop(machine)
        priced.append((training + images * picture, row))
    priced.sort(key=lambda pair: (pair[0], better(metric)(pair[1])))
    reached = float("inf")
    for usd, row in priced:  # of equal prices the best comes first
        if better(metric)(row) < reached:
            reached = better(metric)(row)
            cells = [f"${usd:,.4g}", row.model, f"{row.nimg:,}", row.sampler, str(row.steps)]
            table.add_row(*cells, f"{row.guidance:g}", f"{getattr(row, metric):.4g}")
    console.print(table)
