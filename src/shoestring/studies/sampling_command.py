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
from shoestring.studies.sampling_rows import METRICS, write_csv

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
    study.models = _chosen(study.models, job.only)
    if not job.report_only:
        study.check_same()
        _ = study.pictures.extractor  # a missing package shows now, and not after the first training
        if not study.run(job.train_only):
            return False
    rows = most_samples(study.rows())
    if not rows:
        say(console, f"{study.results} has no rows yet, so there is nothing to draw")
        return True
    trained = max(row.nimg for row in rows)
    about = (
        f"{len({(row.model, row.seed) for row in rows})} trainings of up to {trained:,} images, "
        f"{rows[0].samples:,} pictures a cell. Measured here."
    )
    if preset.name == "tiny" and not job.models:
        about += " So few images show how the study runs, no more."
    if not any(math.isfinite(getattr(row, job.metric)) for row in rows):
        raise UserError(f"--metric is {job.metric}, and no row of {study.results} has it; choose kid or fd")
    page = write_report(job.out, rows, job.metric, job.count_guidance, about)
    write_csv(study.results.with_suffix(".csv"), rows)
    say(console, f"{len(rows)} rows in {study.results} and beside it as CSV; tables and figures: {page}")
    return True


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
