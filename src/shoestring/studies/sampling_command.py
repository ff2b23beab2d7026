"""The job behind ``shoestring study sampling``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from shoestring.runtime import UserError, say
from shoestring.sampling.samplers import SAMPLERS
from shoestring.studies.sampling_analysis import most_samples
from shoestring.studies.sampling_cost import Plan, Study
from shoestring.studies.sampling_models import Model
from shoestring.studies.sampling_recipes import PRESETS, Preset
from shoestring.studies.sampling_report import write_report
from shoestring.studies.sampling_rows import METRICS, Row, write_csv
from shoestring.studies.token_rows import read_json

MOST_STEPS = 10_000


@dataclass(frozen=True)
class SamplingJob:
    """What to do; see ``shoestring study sampling --help``."""

    preset: str
    data: str | None
    models: tuple[Path, ...]
    only: tuple[str, ...]
    samplers: tuple[str, ...]
    steps: tuple[int, ...]
    guidance: tuple[float, ...]
    samples: int | None
    metric: str
    full: bool
    count_guidance: bool
    any_data: bool
    train_only: bool
    report_only: bool
    out: Path


def run_sampling(job: SamplingJob, console: Console) -> bool:
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
    _check(job, preset)
    plan = Plan(
        samplers=job.samplers or preset.samplers,
        steps=tuple(sorted(set(job.steps or preset.steps))),
        guidance=tuple(sorted(set(job.guidance or preset.guidance))),
        samples=job.samples or preset.samples,
        metric=job.metric,
        full=job.full,
    )
    study = Study(preset, plan, job.out, job.data, job.models, job.any_data, console)
    if not job.report_only:
        study.models = _chosen(study.models, job.only)
        study.check_same()
        _ = study.pictures.extractor  # a missing package shows now, and not after the first training
        if not study.run(job.train_only):
            return False
    every = most_samples(study.rows())
    if not every:
        if job.report_only:
            raise UserError(f"{study.results} does not exist; run the study first, without --report-only")
        say(console, f"{study.results} has no rows yet, so there is nothing to draw")
        return True
    write_csv(study.results.with_suffix(".csv"), every)
    rows = [row for row in every if math.isfinite(getattr(row, job.metric))]
    if not rows:
        raise UserError(f"--metric is {job.metric}, and no row of {study.results} has it; choose kid or fd")
    rows = [row for row in rows if not job.report_only or _asked_for(row, job)]
    if not rows:
        raise UserError(
            f"{study.results} has no row of the networks, samplers, steps and scales of guidance that were "
            "asked for; leave out --only, --sampler, --steps or --guidance"
        )
    page = write_report(job.out, rows, job.metric, job.count_guidance, _about(job.out, rows))
    say(console, f"{len(every)} rows in {study.results} and beside it as CSV; tables and figures: {page}")
    return True


def _asked_for(row: Row, job: SamplingJob) -> bool:
    """Whether a page that is only drawn anew shall show a row."""
    return (
        (not job.only or row.model in job.only or row.family in job.only)
        and (not job.samplers or row.sampler in job.samplers)
        and (not job.steps or row.steps in job.steps)
        and (not job.guidance or row.guidance in job.guidance)
    )


def _about(folder: Path, rows: Sequence[Row]) -> str:
    """What was run, for the head of the page."""
    fewest, most = min(row.samples for row in rows), max(row.samples for row in rows)
    about = (
        f"{len({(row.model, row.seed) for row in rows})} trainings of up to {max(r.nimg for r in rows):,} "
        f"images, {most:,} pictures a cell. Measured here."
    )
    if fewest < most:
        about += f" Some cells have only {fewest:,}: FD falls with the number, KID does not."
    if read_json(folder / "study.json").get("name") == "tiny":
        about += " So few images show how the study runs, no more."
    return about


def _check(job: SamplingJob, preset: Preset) -> None:
    if preset.source == "cifar10" and job.data is None and not job.models and not job.report_only:
        raise UserError(
            f"--data is not set; --preset {preset.name} needs the folder of cifar10_train.parquet and "
            "cifar10_test.parquet (--preset tiny and --preset shapes need no data)"
        )
    if job.metric not in METRICS:
        raise UserError(f"--metric is {job.metric!r}; it must be one of {', '.join(METRICS)}")
    if job.metric == "accuracy" and preset.source != "shapes":
        raise UserError(
            "--metric is accuracy, which only pictures of shapes have; use --preset shapes or kid"
        )
    for sampler in job.samplers:
        if sampler not in SAMPLERS:
            raise UserError(f"--sampler is {sampler!r}; it must be one of {', '.join(SAMPLERS)}")
    for count in job.steps:
        if not 1 <= count <= MOST_STEPS:
            raise UserError(f"--steps is {count}; it must be from 1 to {MOST_STEPS:,}")
    for scale in job.guidance:
        if not 0 <= scale < math.inf:
            raise UserError(f"--guidance is {scale:g}; it must be 0 or more (1 = off)")
    least = 16  # fewer than a neighbourhood and its errors can be taken from
    if job.samples is not None and job.samples < least:
        raise UserError(f"--samples is {job.samples}; a cell needs {least} pictures or more")


def _chosen(models: Sequence[Model], only: Sequence[str]) -> list[Model]:
    known = list(dict.fromkeys(name for model in models for name in (model.family, model.name)))
    for name in only:
        if name not in known:
            raise UserError(f"--only: {name!r} is unknown; choose from {', '.join(known)}")
    return [model for model in models if not only or model.family in only or model.name in only]
