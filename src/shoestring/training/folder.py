"""The run folder: one run each, used by one process at a time, and what is remembered in it."""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoestring.config import RunConfig, load_yaml
from shoestring.runtime import UserError, write_text

MAY_CHANGE = {"device", "logging", "sampling"}
"""Settings that may differ when a run goes on: they do not change what is learned."""
PLACES = re.compile(r"data\.(path|cache|cache_gb|stores\.\d+\.path)")
"""These may too: data may be moved, and what lies there is compared with what the run began with."""


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


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        items = {str(i): v for i, v in enumerate(value)}.items()
    else:
        return {path: value}
    return {k: v for key, part in items for k, v in _flat(part, f"{path}.{key}" if path else key).items()}


def check_same_run(folder: Path, config: RunConfig) -> None:
    """Refuse to go on in the folder of a run with other settings.

    Args:
        folder: may not exist yet.
        config: of the run that wants to use it.

    Raises:
        UserError: naming the first setting that differs.
    """
    if not (folder / "config.yaml").exists() or not (folder / "checkpoints").exists():
        return
    there, here = _flat(load_yaml(folder / "config.yaml").model_dump()), _flat(config.model_dump())
    for key in sorted(there.keys() | here.keys()):
        if key.split(".")[0] in MAY_CHANGE or PLACES.fullmatch(key):
            continue
        if there.get(key) != here.get(key):
            raise UserError(
                f"{folder} holds a run with {key}={there.get(key)!r}, this one has {here.get(key)!r}; choose "
                "another folder with --out, or delete that one"
            )


def remember(path: Path, key: str, compute: Callable[[], Any]) -> Any:
    """A value that is computed once for a run folder and read back afterwards.

    Args:
        path: JSON file of all such values.
        key: name of the value.
        compute: gives it if it is not there; the result must be JSON.

    Returns:
        The value.
    """
    values: dict[str, Any] = {}
    if path.exists():
        try:
            values = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is damaged ({error}); delete it and start again") from error
    if key not in values:
        values[key] = compute()
        write_text(path, json.dumps(values, indent=1) + "\n")
    return values[key]
