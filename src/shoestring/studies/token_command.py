"""The job behind ``shoestring study tokens``: plan, time, run, report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from shoestring.config import to_yaml
from shoestring.runtime import UserError, say
from shoestring.studies.token_cells import Cell, choose_cells
from shoestring.studies.token_recipes import PRESETS, training_flops
from shoestring.studies.token_reduction import Study, flops_so_far
from shoestring.studies.token_report import write_report
from shoestring.studies.token_timing import read_timings, time_recipes, write_timings
from shoestring.training.display import duration

LEAST_TRAINING_SHARE = 0.2
"""Of a budget, however much the drawing takes."""
CELL_OVERHEAD_S = 9.0
"""Of a cell: reading pictures, features, checkpoints; about so much with 128 small pictures."""


@dataclass(frozen=True)
class TokensJob:
    """What to do; see ``shoestring study tokens --help``."""

    preset: str
    data: str | None
    cells: tuple[str, ...]
    budget: str | None
    nimg: int | None
    plan: bool
    time: bool
    show: str | None
    out: Path
    usd_per_hour: float


def budget_seconds(text: str) -> float:
    """Seconds of ``90s``, ``5m`` or ``1.5h``.

    Args:
        text: what the user gave.

    Returns:
        Seconds.

    Raises:
        UserError: if it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    if found is None or float(found[1]) == 0:
        raise UserError(f"--budget is {text!r}; it must be a time such as 90s, 5m or 1.5h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def run_tokens(job: TokensJob, console: Console) -> bool:
    """Do the job.

    Args:
        job: what to do.
        console: where a person reads.

    Returns:
        False after an interruption.

    Raises:
        UserError: for mistakes in any setting.
    """
    if job.preset not in PRESETS:
        raise UserError(f"--preset is {job.preset!r}; it must be one of {', '.join(PRESETS)}")
    preset = PRESETS[job.preset]
    if preset.source == "cifar10" and job.data is None:
        raise UserError(
            f"--data is not set; --preset {preset.name} needs the folder of cifar10_train.parquet and "
            "cifar10_test.parquet (--preset tiny needs no data)"
        )
    if job.nimg is not None and job.budget is not None:
        raise UserError("--nimg and --budget both say how long to train; give one of them")
    if preset.source != "cifar10" and job.data is not None:
        raise UserError(
            f"--data is {job.data!r}, but --preset {preset.name} makes its own pictures; leave it out"
        )
    cells = choose_cells(preset, job.cells)
    study = Study(preset, job.out, job.data, preset.rounded(job.nimg or preset.nimg), console)
    if job.show is not None:
        return _show(study, job.show, cells)
    timings = read_timings(job.out)
    if job.budget is not None:
        # A study that goes on keeps its length: the clock would give another one every time.
        seconds, known = budget_seconds(job.budget), study.known_nimg()
        if known is None:
            times = _coarse_times(study, cells, console)
            known = _affordable(study, cells, times, seconds)
            if not job.plan:
                timings = times | timings
                write_timings(job.out, timings)
        else:
            say(console, f"The study in {job.out} goes on with its {known:,} images a cell.")
        study = Study(preset, job.out, job.data, known, console)
    if job.time:
        timings = _time(study, cells, timings)
    with console.status("Timing a step for the plan"):
        s_per_flop = _seconds_per_flop(study, cells[0])
    print_plan(study, cells, timings, s_per_flop, job.usd_per_hour)
    if job.plan:
        return True
    study.check_same()
    _ = study.extractor  # a missing package shows now, and not after the first training
    finished = study.run(cells)
    rows = study.rows()
    if any(row.status == "ok" for row in rows):
        about = (
            f"Preset {preset.name}: {study.nimg:,} images a cell, batch {preset.batch}, {preset.samples:,} "
            f"samples a measurement ({preset.many_samples:,} at the end of cells with several seeds), "
            f"Heun with {preset.sampling_steps} noise levels. Measured here."
        )
        if preset.name == "tiny":
            about += (
                " So few images show how the method runs and which way its loss falls, no more: trust the "
                "losses before the KID."
            )
        config = study.config(cells[0])
        page = write_report(job.out, rows, timings, study.floor(config), about)
        say(console, f"{len(rows)} rows in {study.results}; tables and curves: {page}")
    return finished


def _show(study: Study, wanted: str, cells: Sequence[Cell]) -> bool:
    cell = next((c for c in cells if wanted in (c.name, c.key)), None)
    if cell is None:
        raise UserError(f"--show: there is no cell {wanted!r}; see --plan for their names")
    print(to_yaml(study.config(cell), f"Cell {cell.key} of the token-reduction study."))
    return True


def _distinct(cells: Sequence[Cell]) -> list[Cell]:
    """One cell of every name."""
    return list({cell.name: cell for cell in cells}.values())


def _time(study: Study, cells: Sequence[Cell], known: dict[str, float]) -> dict[str, float]:
    # All compiled alike, also those whose changing ratios are trained uncompiled.
    compiled = {"compile": study.preset.compile}
    missing = {
        c.name: study.config(c).model_copy(update=compiled) for c in _distinct(cells) if c.name not in known
    }
    if missing:
        with study.console.status(f"Timing {len(missing)} recipes in turns; leave the machine alone"):
            known = known | time_recipes(missing, rounds=7)
        write_timings(study.folder, known)
    return known


def _coarse_times(study: Study, cells: Sequence[Cell], console: Console) -> dict[str, float]:
    """Seconds an image from a few steps of every method."""
    with console.status("Timing a few steps of every method"):
        return time_recipes({c.name: study.config(c) for c in _distinct(cells)}, rounds=3, warmup=1)


def _affordable(study: Study, cells: Sequence[Cell], times: dict[str, float], budget_s: float) -> int:
    """Images a cell that fit into a budget."""
    first = study.config(cells[0])
    s_per_flop = times[cells[0].name] / training_flops(first, first.stages[0])
    drawing_s = s_per_flop * sum(study.drawing_flops(c, study.config(c)) for c in cells)
    left_s = budget_s - drawing_s - CELL_OVERHEAD_S * len(cells)
    per_image = sum(times[c.name] * c.share for c in cells)
    return study.preset.rounded(max(left_s, LEAST_TRAINING_SHARE * budget_s) / per_image)


def _seconds_per_flop(study: Study, cell: Cell) -> float:
    """A rate for predictions: of a few steps of one cell, not compiled."""
    config = study.config(cell).model_copy(update={"compile": False})
    (seconds,) = time_recipes({cell.name: config}, rounds=2, warmup=1).values()
    return seconds / training_flops(config, config.stages[0])


def print_plan(
    study: Study,
    cells: Sequence[Cell],
    timings: dict[str, float],
    s_per_flop: float,
    usd_per_hour: float,
) -> None:
    """Cells, hours and dollars, all predicted.

    Args:
        study: where rows are.
        cells: of the plan.
        timings: seconds an image by cell, where they were taken.
        s_per_flop: for the other cells, and for drawing.
        usd_per_hour: price of the machine.
    """
    table = Table(title="Plan", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("cell", "images", "TFLOP", "training", "drawing", "cost", "rows"):
        table.add_column(name, justify="left" if name == "cell" else "right", no_wrap=True)
    training_s, drawing_s, total_flops = 0.0, 0.0, 0.0
    done = study.rows()
    for cell in cells:
        config = study.config(cell)
        flops = flops_so_far(config, config.nimg)
        s_here = s_per_flop
        if cell.name in timings:
            s_here = timings[cell.name] / training_flops(config, config.stages[0])
        drawing = s_per_flop * study.drawing_flops(cell, config)
        training_s, drawing_s = training_s + s_here * flops, drawing_s + drawing
        total_flops += flops
        rows = sum(row.cell == cell.name and row.seed == cell.seed for row in done)
        table.add_row(
            cell.key,
            f"{config.nimg:,}",
            f"{flops / 1e12:.2f}",
            duration(s_here * flops),
            duration(drawing),
            f"${(s_here * flops + drawing) / 3600 * usd_per_hour:.2f}",
            f"{rows}/{study.rows_of(cell)}",
        )
    study.console.print(table)
    total_s = training_s + drawing_s
    basis = "timings in turns" if timings else "a step just timed"
    say(
        study.console,
        f"{len(cells)} cells, {total_flops / 1e12:,.1f} TFLOP of training: {duration(training_s)}, and "
        f"{duration(drawing_s)} of drawing, together ${total_s / 3600 * usd_per_hour:.2f} at "
        f"{usd_per_hour:g} an hour (predicted from {basis})",
    )
