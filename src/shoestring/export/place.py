"""Folders of exports: there whole or not at all, and never in the place of something else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoestring import __version__
from shoestring.runtime import UserError

MARK = "shoestring.json"
"""In every folder of ours: what it is."""
FORMAT = "shoestring-export-1"


def read_mark(folder: Path) -> dict[str, Any] | None:
    """What a folder of ours says of itself; ``None`` if it is not one."""
    try:
        found = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


@contextmanager
def whole_folder(target: Path, about: dict[str, Any]) -> Iterator[Path]:
    """A folder to write into, which appears under its name when the block ends well.

    Args:
        target: where it appears; an export of ours that is there is replaced.
        about: what it is, for its mark.

    Yields:
        Path: A temporary folder beside the target.

    Raises:
        UserError: if something else is there, or the folder cannot be written.
    """
    target = target.absolute()
    if target.exists() and read_mark(target) is None and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            f"{target} exists and is no export of shoestring, so it is not replaced; choose another --out, "
            "or move it away"
        )
    temporary, old = target.with_name(f".{target.name}.part"), target.with_name(f".{target.name}.old")
    try:
        for rest in (temporary, old):
            shutil.rmtree(rest, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        mark = {"format": FORMAT, "shoestring": __version__, **about}
        (temporary / MARK).write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")
        _flush(temporary)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {target} ({reason}); nothing was changed") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            old.rename(target)


def _flush(folder: Path) -> None:
    """Everything onto the disk before the name says that it is whole."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
