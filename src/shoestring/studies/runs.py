"""What can be read off a run folder from outside, whether a process works in it or not."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoestring import __version__
from shoestring.config import RunConfig, load_yaml
from shoestring.runtime import UserError

Row = Mapping[str, Any]


def _machine(folder: Path) -> dict[str, Any]:
    """What the run remembers of its machine; nothing where that cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        values = json.loads((folder / "machine.json").read_text())
        return values if isinstance(values, dict) else {}
    return {}


def run_settings(folder: Path) -> RunConfig:
    """The settings of a run.

    Args:
        folder: what the user gave.

    Returns:
        Its settings.

    Raises:
        UserError: if it is no run folder, or its settings cannot be read by this version.
    """
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "missing"
        raise UserError(f"{folder} is {kind}; give a run folder that shoestring train made, as runs/demo")
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a run folder: it holds no config.yaml; give one that shoestring train made"
        )
    try:
        return load_yaml(path)
    except UserError as error:
        written = _machine(folder).get("shoestring", __version__)
        if written == __version__:
            raise
        raise UserError(
            f"{error}; the run was trained by shoestring {written} and this is {__version__}, which may not "
            "know all of its settings: use that version"
        ) from error


def works_now(folder: Path) -> bool:
    """Whether a process holds the lock of the run folder at this moment."""
    try:
        with (folder / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # never trained here, or a file system without locks
        return False
    return False


def state_of(config: RunConfig, nimg: int, working: bool) -> str:
    """In words what a run is doing.

    Args:
        config: its settings.
        nimg: images seen by its log.
        working: whether a process works in its folder.

    Returns:
        training now, finished, not begun, or stopped.
    """
    if working:
        return "training now"
    if nimg >= config.nimg:
        return "finished"
    return "stopped" if nimg else "not begun"


def training_flops(folder: Path, train: Sequence[Row]) -> list[float | None]:
    """Training FLOPs so far at each row.

    Rows of runs that did not write them yet: those of an image are the share of peak times the machine's
    peak over the rate.

    Args:
        folder: of the run.
        train: its training rows.

    Returns:
        As many figures; ``None`` where they are not known.
    """
    peaks = [value for key, value in _machine(folder).items() if key.startswith("matmul_flops_")]
    found: list[float | None] = []
    total: float | None = 0.0
    before = 0
    for row in train:
        share, rate = row.get("peak_share"), row.get("images_per_s")
        if row.get("training_flops") is not None:
            total = float(row["training_flops"])
        elif total is not None and len(peaks) == 1 and share and rate:
            total += (row["nimg"] - before) * share * peaks[0] / rate
        else:
            total = None
        found.append(total)
        before = row["nimg"]
    return found
