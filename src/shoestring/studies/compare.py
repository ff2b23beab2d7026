"""Several runs over common axes: images, FLOPs, time and money; and what their settings differ in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from shoestring.config import RunConfig
from shoestring.runtime import UserError
from shoestring.studies.charts import COLORS, Line, smoothed
from shoestring.studies.page import finite
from shoestring.studies.runs import Row, run_settings, state_of, training_flops, works_now
from shoestring.studies.token_curves import Point, at
from shoestring.training.display import read_log, rows_of

MISSING = object()
"""Of a setting that one of the runs does not have, such as one of a third stage."""
DECIDES_LOSS = (
    "process.",
    "data.source",
    "data.path",
    "data.stores",
    "data.codec",
    "data.held_out",
    "data.split",
    "model.in_channels",
)
"""Settings that, where they differ, make losses of two runs different things."""


@dataclass(frozen=True)
class Compared:
    """A run that is compared with others."""

    label: str
    color: str
    folder: Path
    config: RunConfig
    state: str
    train: Sequence[Row]
    validation: Sequence[Row]
    evaluation: Sequence[Row]
    events: Sequence[Row]
    spent: Mapping[str, Sequence[float]]
    """By axis (``images``, ``flops``, ``s``, ``usd``) what was spent up to each training row; an axis that
    is not known throughout, or of which nothing was spent, is absent."""

    def where(self, axis: str, nimg: int) -> float:
        """What had been spent after so many images, linear between the training rows."""
        spent, images = self.spent[axis], self.spent["images"]
        return float(np.interp(nimg, [0.0, *images], [0.0, *spent]))

    def points(self, axis: str, rows: Sequence[Row], value: Callable[[Row], Any]) -> list[Point]:
        """A curve over an axis.

        Args:
            axis: see ``spent``.
            rows: of the log.
            value: of a row; what is no finite number is left out.

        Returns:
            Points; none if the axis is not known.
        """
        if axis not in self.spent:
            return []
        known = [(row["nimg"], value(row)) for row in rows]
        return [(self.where(axis, nimg), float(y)) for nimg, y in known if finite(y)]

    def loss(self, axis: str) -> list[Point]:
        """Training loss, smoothed within each stage."""
        stages = [list(rows) for _, rows in groupby(self.train, key=lambda row: row.get("stage"))]
        return [p for stage in stages for p in smoothed(self.points(axis, stage, lambda r: r.get("loss")))]


@dataclass(frozen=True)
class Axis:
    """What curves are drawn over, in a unit that suits all runs."""

    key: str
    """Of ``Compared.spent``."""
    name: str
    label: str
    per: float
    """One unit in images, FLOPs, seconds or dollars."""

    def line(self, run: Compared, points: Sequence[Point], dots: bool = False) -> Line:
        """A run's line of a chart."""
        return Line(run.label, [(x / self.per, y) for x, y in points], run.color, dots=dots)


def read_runs(folders: Sequence[Path]) -> list[Compared]:
    """Read the runs to compare.

    Args:
        folders: run folders.

    Returns:
        The runs, in the same order, each with a label and a colour of its own.

    Raises:
        UserError: if one is no run folder, was given twice or has not logged anything, or there are too many.
    """
    places = [folder.resolve() for folder in folders]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise UserError(f"{folders[i]} is given twice; name every run once")
    if len(folders) > len(COLORS):
        raise UserError(f"{len(folders)} runs are too many for one page; compare at most {len(COLORS)}")
    return [
        _read_run(folder, label, color)
        for folder, label, color in zip(folders, _labels(places), COLORS, strict=False)
    ]


def _labels(places: Sequence[Path]) -> list[str]:
    """Names of the folders, with as many folders before them as it takes to tell them apart."""
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    return ["/".join(place.parts[-depth:]) for place in places]


def _read_run(folder: Path, label: str, color: str) -> Compared:
    config, log = run_settings(folder), read_log(folder)
    train = rows_of(log, "train")
    if not train:
        raise UserError(
            f"{folder} has no training row in log.jsonl yet; the first comes after "
            f"{config.logging.log_nimg:,} images (logging.log_nimg): compare it then, or leave it out"
        )
    spent: dict[str, list[float | None]] = {
        "images": [float(row["nimg"]) for row in train],
        "flops": training_flops(folder, train),
        "s": [row.get("elapsed_s") for row in train],
        "usd": [row.get("cost_usd") for row in train],
    }
    known = {axis: [v for v in values if v is not None] for axis, values in spent.items()}
    return Compared(
        label=label,
        color=color,
        folder=folder,
        config=config,
        state=state_of(config, train[-1]["nimg"], works_now(folder)),
        train=train,
        validation=rows_of(log, "validation"),
        evaluation=rows_of(log, "evaluation"),
        events=[row for row in log if row["kind"] == "event"],
        spent={axis: v for axis, v in known.items() if len(v) == len(train) and v[-1] > 0},
    )


def axes_of(runs: Sequence[Compared]) -> list[Axis]:
    """The axes that are known of at least one run, each in a unit for the largest."""
    most = {
        key: max((run.spent[key][-1] for run in runs if key in run.spent), default=0.0)
        for key in ("images", "flops", "s", "usd")
    }
    prefix, per = next(
        ((p, v) for p, v in (("E", 1e18), ("P", 1e15), ("T", 1e12)) if most["flops"] >= v), ("G", 1e9)
    )
    time, per_time = ("hours", 3600.0) if most["s"] >= 3600 else ("minutes", 60.0)
    every = [
        Axis("images", "images", "images seen", 1.0),
        Axis("flops", "FLOPs", f"training {prefix}FLOP", per),
        Axis("s", time, f"{time} of training", per_time),
        Axis("usd", "dollars", "dollars", 1.0),
    ]
    return [axis for axis in every if most[axis.key] > 0]


def total_loss(run: Compared, axis: str) -> list[Point]:
    """Validation loss over an axis."""
    return run.points(axis, run.validation, lambda row: row.get("loss"))


def at_equal_budget(runs: Sequence[Compared], axis: Axis) -> tuple[float, list[float | None]] | None:
    """Validation losses at the largest budget that every run has reached.

    Args:
        runs: to compare.
        axis: kind of budget.

    Returns:
        The budget and the loss of each run (``None`` where it was not validated early enough); ``None`` if
        the axis or the loss of a run is not known.
    """
    curves = [total_loss(run, axis.key) for run in runs]
    if not all(curves):
        return None
    budget = min(points[-1][0] for points in curves)
    return budget, [p[-1][1] if p[-1][0] == budget else at(p, budget) for p in curves]


def differences(configs: Sequence[RunConfig]) -> list[tuple[str, list[Any]]]:
    """Settings that differ.

    Args:
        configs: of the runs.

    Returns:
        Dotted key and the value in each run, :data:`MISSING` where a run has no such setting.
    """
    return list(_differences("", [config.model_dump(mode="json") for config in configs]))


def _differences(path: str, values: Sequence[Any]) -> Iterator[tuple[str, list[Any]]]:
    if all(value == values[0] for value in values):
        return
    parts = [_parts(value) for value in values]
    if not any(parts):
        yield path, list(values)
        return
    for key in dict.fromkeys(key for part in parts for key in part):
        yield from _differences(f"{path}.{key}" if path else key, [p.get(key, MISSING) for p in parts])


def _parts(value: Any) -> dict[str, Any]:
    """What a section or a list of sections consists of; nothing of other values."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {str(i): part for i, part in enumerate(value)}
    return value if isinstance(value, dict) else {}


def decide_loss(found: Sequence[tuple[str, list[Any]]]) -> list[str]:
    """Those of the differing settings that make the losses incomparable."""
    return [key for key, _ in found if key.startswith(DECIDES_LOSS) or key.endswith(".resolution")]
