"""The run folder: one run each, used by one process at a time, and what is remembered in it."""

from __future__ import annotations

import fcntl
import json
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from shoestring import __version__
from shoestring.config import RunConfig, load_yaml, to_yaml
from shoestring.runtime import UserError, say, write_text
from shoestring.training.schedule import position

MACHINE = "machine.json"
"""What was found out about the machine or chosen by it, and the versions."""
FREE = ("device", "logging", "sampling", "parallel", "guard.stall_s")
"""Settings that may differ when a run goes on: they do not change what is learned."""
PLACES = re.compile(r"initial_weights|data\.(path|cache|cache_gb)|(data|stages\.\d+)\.stores\.\d+\.path")
"""These may too: data may be moved, and what lies there is compared with what the run began with; initial
weights are in the checkpoints."""
WITH_CONSENT = re.compile(
    r"precision|compile|guard\..*|data\.(caption_drop|text_encoder_dtype|codec_dtype)"
    r"|optimizer\.(?!kind|mup).*|stages\.\d+\.(?!batch|resolution|name|stores).*"
)
"""Settings that may be changed knowingly (``--allow-changes``): the checkpoint still fits, but from there on
the run is another one. Of stages that are over nothing may change."""


class Busy(UserError):
    """Another process works in the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system frees it when the process ends, however it ends.

    Args:
        folder: made if needed.

    Raises:
        Busy: if another process holds it.
        UserError: if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise UserError(
            f"cannot use {folder} as run folder: {error.strerror}; choose another with --out"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Busy(
                f"another run is working in {folder}; wait for it or choose another folder with --out"
            ) from error
        yield


def checkpoint_folders(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = (p for p in (run / "checkpoints").glob("*") if p.name.isdigit() and p.is_dir())
    return sorted(folders, key=lambda folder: int(folder.name))


@contextmanager
def claimed(folder: Path, config: RunConfig, console: Console, allow_changes: bool) -> Iterator[None]:
    """Hold a run folder, with the run's settings and versions written into it.

    Args:
        folder: made if needed.
        config: of the run.
        console: where a person reads.
        allow_changes: see :func:`check_same_run`.

    Raises:
        UserError: if the folder is of another run, in use or not writable.
    """
    with locked(folder):
        for change in check_same_run(folder, config, allow_changes):
            say(console, f"Changed: {change}")
        write_text(folder / "config.yaml", to_yaml(config))
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        for name, version in ({"shoestring": __version__} | versions).items():
            remember(folder / MACHINE, name, partial(str, version))
        yield


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        items = {str(i): v for i, v in enumerate(value)}.items()
    else:
        return {path: value}
    return {k: v for key, part in items for k, v in _flat(part, f"{path}.{key}" if path else key).items()}


def check_same_run(folder: Path, config: RunConfig, allow_changes: bool = False) -> list[str]:
    """Refuse to go on in the folder of a run with other settings.

    Args:
        folder: may not exist yet.
        config: of the run that wants to use it.
        allow_changes: accept those that the checkpoint can live with.

    Returns:
        What has changed and is accepted, for people to read.

    Raises:
        UserError: listing the settings that differ.
    """
    if not (folder / "config.yaml").exists() or not (folder / "checkpoints").exists():
        return []
    before = load_yaml(folder / "config.yaml")
    there, here = _flat(before.model_dump()), _flat(config.model_dump())
    over = _finished_stages(folder, before)
    accepted: list[str] = []
    refused: list[str] = []
    for key in sorted(there.keys() | here.keys()):
        free = any(key == name or key.startswith(f"{name}.") for name in FREE)
        if there.get(key) == here.get(key) or free or PLACES.fullmatch(key):
            continue
        index = int(key.split(".")[1]) if key.startswith("stages.") else None
        possible = WITH_CONSENT.fullmatch(key) is not None
        if index is not None:
            possible = index >= over and (possible or index >= len(before.stages))
        finished = " (a stage that is over)" if index is not None and index < over else ""
        change = f"{key} from {there.get(key)!r} to {here.get(key)!r}{finished}"
        (accepted if possible else refused).append(change)
    if refused:
        raise UserError(
            f"{folder} holds a run with other settings: {_listed(refused)}; these cannot change in the "
            "middle, choose another folder with --out, or delete that one"
        )
    if accepted and not allow_changes:
        raise UserError(
            f"{folder} holds a run with other settings: {_listed(accepted)}; go on with these by "
            "--allow-changes, or choose another folder with --out"
        )
    return accepted


def _listed(changes: list[str]) -> str:
    shown = 6
    more = f" and {len(changes) - shown} more" if len(changes) > shown else ""
    return ", ".join(changes[:shown]) + more


def _finished_stages(folder: Path, config: RunConfig) -> int:
    """Stages that a run has behind it."""
    here = position(config, max((int(path.name) for path in checkpoint_folders(folder)), default=0))
    return len(config.stages) if here is None else here.index


def remember(path: Path, key: str, compute: Callable[[], Any], anew: bool = False) -> Any:
    """A value that is computed once for a run folder and read back afterwards.

    Args:
        path: JSON file of all such values.
        key: name of the value.
        compute: gives it if it is not there; the result must be JSON.
        anew: compute it although it is there.

    Returns:
        The value.
    """
    values: dict[str, Any] = {}
    if path.exists():
        try:
            values = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is damaged ({error}); delete it and start again") from error
    if anew or key not in values:
        values[key] = compute()
        write_text(path, json.dumps(values, indent=1) + "\n")
    return values[key]
