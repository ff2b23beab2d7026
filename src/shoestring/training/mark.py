"""``complete.json``: a checkpoint that has it is whole, and by it one sees whether a checkpoint still is."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shoestring import __version__
from shoestring.runtime import UserError, write_text

FORMAT = 2
MARK = "complete.json"
CHUNK = 1 << 20


class Damaged(UserError):
    """A checkpoint is not what was written; another one may be whole."""


def write_mark(folder: Path, facts: dict[str, Any]) -> None:
    """Declare a checkpoint complete.

    Args:
        folder: of the checkpoint, all its files written.
        facts: what to note; ``files`` holds the :func:`fingerprint` of each by its name.
    """
    versions = {"shoestring": __version__, "torch": torch.__version__}
    _write(folder, {"format": FORMAT, "versions": versions, **facts})


def amend_counters(folder: Path, **changed: Any) -> None:
    """Note in a checkpoint what has to be known when a run goes on from it, such as that it went back there.

    Args:
        folder: of a checkpoint that is whole.
        **changed: counters with their new values.

    Raises:
        UserError: if it cannot be written; the mark is as it was.
    """
    mark = read_mark(folder)
    _write(folder, mark | {"counters": mark["counters"] | changed})


def _write(folder: Path, mark: dict[str, Any]) -> None:
    write_text(folder / MARK, json.dumps(mark | {"digest": _digest(mark)}, indent=1) + "\n")


def read_mark(folder: Path) -> dict[str, Any]:
    """What ``complete.json`` says.

    Args:
        folder: of a checkpoint.

    Returns:
        Its content.

    Raises:
        Damaged: if it is missing or is not what was written.
        UserError: if it was written by another version.
    """
    try:
        mark: dict[str, Any] = json.loads((folder / MARK).read_text())
        version, digest = int(mark["format"]), mark["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"checkpoint {folder} is damaged ({MARK} is not what was written)") from error
    except OSError as error:
        if not (folder / "state.pt").exists():
            raise Damaged(f"checkpoint {folder} is damaged ({MARK}: {error.strerror})") from error
        raise _other_version(folder, 1, None) from error
    if digest != _digest(mark):
        raise Damaged(f"checkpoint {folder} is damaged ({MARK} is not what was written)")
    if version != FORMAT:
        raise _other_version(folder, version, mark.get("versions", {}).get("shoestring"))
    return mark


def mark_or_damage(folder: Path) -> dict[str, Any] | Damaged:
    """What ``complete.json`` says, or what is wrong with it; see :func:`read_mark`."""
    try:
        return read_mark(folder)
    except Damaged as error:
        return error


def kept_forever(folder: Path) -> bool:
    """Whether a checkpoint is one that is kept for good; a damaged one is not."""
    mark = mark_or_damage(folder)
    return not isinstance(mark, Damaged) and bool(mark["keep_forever"])


def fingerprint(file: Path) -> dict[str, Any]:
    """Size and checksum of a file."""
    crc, size, chunk = 0, 0, memoryview(bytearray(CHUNK))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(chunk):
            # Twice as fast as a cryptographic digest, which nobody needs here: disks make mistakes, no plans.
            crc, size = zlib.crc32(chunk[:count], crc), size + count
    return {"bytes": size, "crc32": f"{crc:08x}"}


def problem(file: Path, written: dict[str, Any]) -> str | None:
    """What is wrong with a file.

    Args:
        file: of a checkpoint.
        written: its fingerprint when it was written.

    Returns:
        A few words, or ``None`` if it is as it was.
    """
    try:
        return None if fingerprint(file) == written else f"{file.name} is not what was written"
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name}: {error.strerror}"


def aside(folder: Path) -> None:
    """Put a damaged checkpoint aside, so that it is not tried again."""
    damaged = folder.with_name(f"{folder.name}.damaged")
    shutil.rmtree(damaged, ignore_errors=True)
    folder.rename(damaged)


def _digest(mark: dict[str, Any]) -> str:
    """Of all that a mark says beside its digest: the counters must be right too."""
    said = json.dumps({key: value for key, value in mark.items() if key != "digest"}, sort_keys=True)
    return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()


def _other_version(folder: Path, version: int, writer: str | None) -> UserError:
    by = "an earlier shoestring" if writer is None else f"shoestring {writer}"
    return UserError(
        f"checkpoint {folder} has format {version}, written by {by}; this one ({__version__}) reads format "
        f"{FORMAT}: go on with that version, or train anew in another folder (--out)"
    )


def discard(folders: Sequence[Path]) -> None:
    """Put the newest of some checkpoints of a diverged run aside, to be looked at, and delete the others.

    Args:
        folders: oldest first.
    """
    for folder in folders:
        last = folder.with_name(f"{folder.name}.diverged")
        shutil.rmtree(last, ignore_errors=True)
        folder.rename(last)
        if folder != folders[-1]:
            shutil.rmtree(last, ignore_errors=True)
