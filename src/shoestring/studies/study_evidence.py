"""The rows of a sampling-cost study as evidence for advice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shoestring.planning.advice import Candidate
from shoestring.runtime import UserError
from shoestring.studies.sampling_analysis import Scale, first_seeds, most_samples
from shoestring.studies.sampling_rows import METRICS, Row, read_rows


@dataclass(frozen=True)
class Evidence:
    """Rows that can be compared."""

    rows: Sequence[Row]
    """Of all seeds, at least one; where cells were measured with several numbers of pictures, the most."""
    notes: Sequence[str]
    """What has to be known of them, a sentence each."""


def evidence_of(path: Path, metric: str) -> Evidence:
    """Read a study.

    Args:
        path: its folder or its results file (Parquet or CSV).
        metric: that is to be looked at.

    Returns:
        Its rows that have the metric.

    Raises:
        UserError: if there is none, or the metric is unknown or not lower-is-better.
    """
    lower = [name for name, higher in METRICS.items() if not higher]
    if metric not in lower:
        raise UserError(f"--metric is {metric!r}; it must be one of {', '.join(lower)}")
    file = path / "results.parquet" if path.is_dir() else path
    if not file.exists():
        raise UserError(
            f"{file} does not exist; give the folder of a shoestring study sampling, or its results file"
        )
    found = most_samples(read_rows(file))
    if not found:
        raise UserError(f"{file} has no rows yet; run shoestring study sampling first")
    rows = [row for row in found if math.isfinite(getattr(row, metric))]
    if not rows:
        raise UserError(
            f"--metric is {metric}, but no row of {file} has a finite one (only enlarged pictures have a "
            f"feature_distance); choose {' or '.join(name for name in lower if name != metric)}"
        )
    notes = []
    if len(rows) < len(found):
        notes.append(
            f"Left out: {len(found) - len(rows)} of {len(found)} rows, whose {metric.upper()} is not finite."
        )
    students = [row for row in rows if row.guided_calls == 1 or row.sampler == "consistency"]
    if students:
        names = ", ".join(dict.fromkeys(row.model for row in students))
        notes.append(
            f"Training of {names} is priced at the distillation alone: what the teachers took is not in the "
            "rows."
        )
    return Evidence(rows, notes)


def measured(rows: Sequence[Row], metric: str, study: Path) -> list[Candidate]:
    """The settings of every network's first training, each with its mean over the seeds that have it.

    A setting that only a later seed has is no candidate: one lucky draw would be chosen.

    Args:
        rows: of all seeds, the metric finite.
        metric: lower is better.
        study: where they are from.

    Returns:
        A candidate a setting, in the order of the rows.
    """
    scale = Scale.of(rows, count_guidance=False)
    seeds: dict[tuple[object, ...], dict[int, Row]] = {}
    for row in rows:
        seeds.setdefault(_setting(row), {})[row.seed] = row
    first = {_setting(row): row for row in first_seeds(rows)}
    return [_candidate(row, list(seeds[key].values()), scale, metric, study) for key, row in first.items()]


def _setting(row: Row) -> tuple[object, ...]:
    return row.family, row.model, row.nimg, row.sampler, row.steps, row.guidance


def _candidate(row: Row, alike: Sequence[Row], scale: Scale, metric: str, study: Path) -> Candidate:
    values = [float(getattr(each, metric)) for each in alike]
    quality = sum(values) / len(values)
    error = math.sqrt(sum(each.kid_error**2 for each in alike)) / len(alike)
    each_seed = ", ".join(f"{value:.4g}" for value in values)
    trainings = f"mean of {len(values)} seeds: {each_seed}" if len(values) > 1 else "one seed"
    if metric == "kid" and math.isfinite(error):
        trainings = f"standard error {error:.2g} by the drawn pictures; {trainings}"
    return Candidate(
        size=row.model,
        recipe=_recipe_of(row, study),
        protocol=str(study),
        metric=metric.upper(),
        quality=quality,
        claim=f"{metric.upper()} {quality:.4g} ({trainings}) at {row.nimg:,} images (measured, {study})",
        images_seen=row.nimg,
        full_training_flops=row.training_gflops * 1e9,
        least_share=1.0,
        evaluation_flops=row.gflops * 1e9,
        sampler=row.sampler,
        steps=row.steps,
        evaluations=row.evaluations,
        guidance=row.guidance,
        cost=scale.sampling(row),
        guided_calls=row.guided_calls,
    )


def _recipe_of(row: Row, study: Path) -> str | None:
    """The settings of a network that the study trained itself."""
    folder = study if study.is_dir() else study.parent
    path = folder / "models" / f"{row.model}-s{row.seed}" / "config.yaml"
    return str(path) if path.is_file() else None
