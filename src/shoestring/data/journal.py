"""What a long job has done so far: a JSON line for each finished piece of work, safe against ``kill -9``."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from shoestring.runtime import UserError

if sys.platform != "win32":
    import fcntl


PARTS = ("records", "texts", "checksums", "rejected", "manifest", "seals")
"""What lies in the folder of a store."""


def work_folder(uri: str, job: str) -> Path:
    """Where a job on a store keeps its journal: in the store, or for a URL in the user's cache.

    Args:
        uri: the store.
        job: name of the job.

    Returns:
        A local folder that may not exist yet.
    """
    if "://" not in uri:
        return Path(uri) / ".work" / job
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "shoestring" / hashlib.blake2b(uri.encode(), digest_size=8).hexdigest() / job


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first setting that differs, for a sentence that says what something was made with.

    Args:
        before: settings by name.
        now: settings by name.

    Returns:
        Such as ``with --min-side=32, now it is 64``; ``None`` if nothing differs.
    """
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old != new:
            was = f"without {key}" if old is None else f"with {key}={old!r}"
            return f"{was}, now it is {'not given' if new is None else repr(new)}"
    return None


def check_place(uri: str) -> None:
    """Refuse to begin a store among files that are none of a store's.

    Args:
        uri: where it is, or is to be.

    Raises:
        UserError: if the name is empty, or a folder without a store holds other files.
    """
    if not uri:
        raise UserError("--out is empty; name the folder or URL of a store")
    if "://" in uri or not Path(uri).is_dir() or (Path(uri) / "manifest").exists():
        return
    names = sorted(path.name for path in Path(uri).iterdir() if not path.name.startswith("."))
    others = [name for name in names if name not in PARTS]
    if others:
        raise UserError(
            f"--out is {uri!r}, a folder with other things in it ({others[0]}) and no store; name a new or "
            "an empty folder"
        )


class Journal:
    """A file of JSON lines: the job's settings, then what is done. A torn last line does not count."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Begin, or go on.

        Args:
            folder: of :func:`work_folder`.
            settings: everything that decides what the job makes (plain JSON values).

        Raises:
            UserError: if the job was begun with other settings (the sentence names one), or another process
                is at it.
        """
        self.path = folder / "journal.jsonl"
        self.entries: list[dict[str, Any]] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise UserError(
                f"cannot write to {folder} ({error.strerror}); choose a folder that can be written"
            ) from error
        self._lock(folder)
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        lines = [json.loads(line) for line in whole.splitlines()]
        if len(lines) < 2:  # nothing is done yet that other settings could spoil
            self._file.truncate(0)
            self._write(settings)
            return
        other = difference(lines[0], json.loads(json.dumps(settings)))
        if other is not None:
            self._file.close()
            raise UserError(
                f"{folder.parent.parent} was begun {other}; give the settings of the beginning, or choose "
                f"another --out (or delete {folder} to begin again)"
            )
        self.entries = lines[1:]

    def _lock(self, folder: Path) -> None:
        """Two processes at one job would remove each other's files; the lock dies with its owner."""
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise UserError(
                f"{folder.parent.parent} is being worked on by another process, which holds {self.path}; "
                "wait until it has ended, or end it"
            ) from error
        except OSError:
            pass  # a file system without locks

    def _write(self, values: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(values).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(
                f"cannot write {self.path} ({error.strerror}); make room, then give the same command"
            ) from error

    def add(self, entry: dict[str, Any]) -> None:
        """Note that something is done; it is on the disk when this returns.

        Args:
            entry: plain JSON values.
        """
        self._write(entry)
        self.entries.append(entry)

    def close(self) -> None:
        """Close the file; a journal with entries stays, one without is removed with its empty folders."""
        self._file.close()
        if self.entries:
            return
        folder = self.path.parent
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # not empty
            folder.parent.rmdir()
            folder.parent.parent.rmdir()

    def finish(self) -> None:
        """Close and remove the journal: the job is complete and committed."""
        self.close()
        shutil.rmtree(self.path.parent, ignore_errors=True)
