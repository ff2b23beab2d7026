"""Where a run can be looked at from elsewhere: TensorBoard, Weights & Biases, trackio.

wandb and trackio are optional packages (extra ``trackers``). Both were run offline only: wandb with
``WANDB_MODE=offline``, trackio in a local folder.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from shoestring.config import LoggingConfig, load_yaml
from shoestring.runtime import UserError
from shoestring.training.folder import remember

NAMES = "trackers.json"
"""File in the run folder with the names under which trackers know the run."""


class Tracker(Protocol):
    """Takes the rows of the log and pictures."""

    def row(self, kind: str, row: Mapping[str, Any]) -> None:
        """Show a row of the log."""

    def picture(self, name: str, nimg: int, path: Path) -> None:
        """Show a picture."""

    def close(self) -> None:
        """Write what is left."""


def numbers(kind: str, row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by name, those within a mapping too: ``train/loss_per_bin/0.1``.

    Args:
        kind: of the row; the names begin with it.
        row: of the log; ``nimg`` is the axis of the curves and is left out.

    Returns:
        Numbers by name.
    """
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found |= numbers(f"{kind}/{key}", value)
        elif isinstance(value, int | float) and key != "nimg":
            found[f"{kind}/{key}"] = value
    return found


class TensorBoard:
    """Curves, events as texts, sample grids. What came after the checkpoint that a run resumes is hidden.

    Args:
        folder: run folder.
        nimg: images seen at the start.
    """

    def __init__(self, folder: Path, nimg: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=nimg + 1)

    def row(self, kind: str, row: Mapping[str, Any]) -> None:
        """Numbers become curves, events texts."""
        for name, value in numbers(kind, row).items():
            self._writer.add_scalar(name, value, row["nimg"])
        if kind == "event":
            self._writer.add_text(f"event/{row['what']}", row["text"], row["nimg"])

    def picture(self, name: str, nimg: int, path: Path) -> None:
        """An image with a slider over images seen."""
        with Image.open(path) as picture:
            pixels = np.array(picture.convert("RGB"))
        self._writer.add_image(name, pixels, nimg, dataformats="HWC")

    def close(self) -> None:
        """Flush the file."""
        self._writer.close()


class WandB:
    """Curves and sample grids on Weights & Biases; ``WANDB_MODE=offline`` keeps them in the run folder.

    Its own step counter only grows, and a run may be rolled back: the axis is therefore a value, ``images``.

    Args:
        folder: run folder; a run that goes on there is the same run there.
        project: its project.

    Raises:
        UserError: if the package is absent or cannot start.

    Source: docs.wandb.ai, references of init, define_metric and Image.
    """

    def __init__(self, folder: Path, project: str) -> None:
        self._package: Any = importlib.import_module("wandb")
        name = _name(folder, "wandb")
        try:
            self._run = self._package.init(
                project=project,
                id=name,
                name=name,
                dir=str(folder),
                config=_settings(folder),
                resume="allow",
            )
        except self._package.errors.Error as error:
            raise UserError(
                f"logging.wandb={project}: Weights & Biases cannot start ({error}); run 'wandb login', set "
                "WANDB_MODE=offline, or leave it out with logging.wandb=null"
            ) from error
        self._run.define_metric("images")
        self._run.define_metric("*", step_metric="images")

    def row(self, kind: str, row: Mapping[str, Any]) -> None:
        """Numbers become curves; events are in ``log.jsonl`` only."""
        if found := numbers(kind, row):
            self._run.log({**found, "images": row["nimg"]})

    def picture(self, name: str, nimg: int, path: Path) -> None:
        """An image over images seen."""
        self._run.log({name: self._package.Image(str(path)), "images": nimg})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class Trackio:
    """Curves and sample grids in trackio, on this machine unless its own settings name a Space.

    Args:
        folder: run folder; a run that goes on there is the same run there.
        project: its project.

    Raises:
        UserError: if the package is absent or cannot start.

    Source: huggingface.co/docs/trackio, API reference (version 0.27).
    """

    def __init__(self, folder: Path, project: str) -> None:
        self._package: Any = importlib.import_module("trackio")
        try:
            self._run = self._package.init(
                project=project,
                name=_name(folder, "trackio"),
                config=_settings(folder),
                resume="allow",
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"logging.trackio={project}: trackio cannot start ({error}); leave it out with "
                "logging.trackio=null"
            ) from error

    def row(self, kind: str, row: Mapping[str, Any]) -> None:
        """Numbers become curves; events are in ``log.jsonl`` only."""
        if found := numbers(kind, row):
            self._run.log(found, step=row["nimg"])

    def picture(self, name: str, nimg: int, path: Path) -> None:
        """An image at a step."""
        self._run.log({name: self._package.Image(str(path))}, step=nimg)

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()


def check_trackers(logging: LoggingConfig) -> None:
    """Say that a tracker is missing before anything is computed.

    Args:
        logging: the settings.

    Raises:
        UserError: if a tracker is wanted that is not installed.
    """
    for package, project in (("wandb", logging.wandb), ("trackio", logging.trackio)):
        if project is not None and not _is_installed(package):
            raise UserError(
                f"logging.{package} is {project!r}, but the package {package} is not installed; install it "
                f"with: pip install {package}, or set logging.{package}=null"
            )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # kept from being imported
        return False


def open_trackers(folder: Path, nimg: int, logging: LoggingConfig) -> list[Tracker]:
    """The trackers that the settings ask for.

    Args:
        folder: run folder.
        nimg: images seen at the start.
        logging: the settings; TensorBoard is left out where it is not installed.

    Returns:
        Trackers, to be closed.

    Raises:
        UserError: if another one is not installed or cannot start.
    """
    check_trackers(logging)
    trackers: list[Tracker] = []
    if logging.tensorboard and importlib.util.find_spec("tensorboard") is not None:
        trackers.append(TensorBoard(folder, nimg))
    if logging.wandb is not None:
        trackers.append(WandB(folder, logging.wandb))
    if logging.trackio is not None:
        trackers.append(Trackio(folder, logging.trackio))
    return trackers


def _name(folder: Path, tracker: str) -> str:
    """Name of the run for a tracker, the same whenever the run goes on; unique, as many are called demo."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", folder.resolve().name)  # wandb allows no / # ? % : in it
    return str(remember(folder / NAMES, tracker, lambda: f"{plain}-{uuid.uuid4().hex[:8]}"))


def _settings(folder: Path) -> dict[str, Any]:
    """All settings of the run, which stand in its folder when training begins."""
    return load_yaml(folder / "config.yaml").model_dump(mode="json")
