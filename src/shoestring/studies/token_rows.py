"""The results file of the token-reduction study: one line a measurement."""

from __future__ import annotations

import csv
import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from shoestring.runtime import UserError


@dataclass(frozen=True)
class Row:
    """One measured checkpoint of one cell: a line of ``results.csv``."""

    cell: str
    seed: int
    group: str
    method: str
    ratio: float
    nimg: int
    status: str = "ok"
    """``ok`` or ``diverged``."""
    guidance: float = 1.0
    parameters: int = 0
    training_gflops: float = 0.0
    """Of all images so far, forward and backward, counted."""
    gflops_per_image: float = 0.0
    """Of the next image in training, at the first stage's ratio."""
    trained_s: float = 0.0
    """Wall time of training so far, as it ran (perhaps beside other work); see ``timings.json``."""
    samples: int = 0
    kid: float = float("nan")
    kid_spread: float = float("nan")
    """Standard deviation over subsets, not the standard error."""
    fd: float = float("nan")
    loss: float = float("nan")
    """Mean over the noise levels, all patches, pinned noise."""
    loss_per_level: str = ""
    """JSON: sigma / alpha to loss."""


TYPES: dict[str, Callable[[str], Any]] = {
    f.name: {"str": str, "int": int, "float": float}[str(f.type)] for f in fields(Row)
}
FIELDS = list(TYPES)


def read_rows(path: Path) -> list[Row]:
    """Read a results file.

    Args:
        path: written by a study; may not exist.

    Returns:
        Its rows.

    Raises:
        UserError: if a line is damaged.
    """
    if not path.exists():
        return []
    rows = []
    with path.open(newline="") as file:
        for line, record in enumerate(csv.DictReader(file), start=2):
            try:
                rows.append(Row(**{name: TYPES[name](value) for name, value in record.items()}))
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{path}: line {line} is damaged ({error}); delete that line") from error
    return rows


def append_row(path: Path, row: Row) -> None:
    """Add a line at once; processes wait for one another.

    Args:
        path: the file, made if needed.
        row: the line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, FIELDS)
        if file.seek(0, os.SEEK_END) == 0:
            writer.writeheader()
        writer.writerow(asdict(row))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of the study's folder; empty if there is none.

    Args:
        path: the file.

    Returns:
        Its content.

    Raises:
        UserError: if it is damaged.
    """
    if not path.exists():
        return {}
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and give the command again") from error
    return values
