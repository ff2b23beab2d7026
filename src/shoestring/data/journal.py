"""What a long job has done so far: a JSON line for each finished piece of work, safe against ``kill -9``."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from shoestring.runtime import UserError

if sys.platform != "win32":
    import fcntl


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
        settings = json.loads(json.dumps(settings))
        if not lines:
            self._write(settings)
            return
        for key in sorted(lines[0].keys() | settings.keys()):
            if lines[0].get(key) != settings.get(key):
                self.close()
                raise UserError(
                    f"{folder.parent.parent} was begun with {key}={lines[0].get(key)!r}, now it is "
                    f"{settings.get(key)!r}; give the settings of the beginning, or choose another --out "
                    f"(or delete {folder} to begin again)"
                )
        self.entries = lines[1:]

    def _lock(self, folder: Path) -> None:
        """Two processes at one job would remove each other's files; the lock dies with its owner."""
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
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
        """Close the file; the journal stays."""
        self._file.close()

    def finish(self) -> None:
        """Close and remove the journal: the job is complete and committed."""
        self.close()
        shutil.rmtree(self.path.parent, ignore_errors=True)
