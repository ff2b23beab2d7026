"""Long jobs on a store: what is done already, how far they are, and one commit at the end."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.fs

from shoestring.data.journal import Journal, check_place, work_folder
from shoestring.data.manifest import Manifest
from shoestring.data.seals import seal_version
from shoestring.data.store import TABLES, Store, save_checksums, save_manifest
from shoestring.data.tables import (
    Piece,
    child,
    commit_append,
    commit_columns,
    commit_new,
    filesystem,
    open_table,
    rewind,
    sweep,
    table_exists,
    widened_schema,
)
from shoestring.data.units import Unit
from shoestring.runtime import UserError


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    stage: str
    """``records`` or ``texts``."""
    done: int
    """With several columns of pictures a record counts once for each."""
    total: int
    rate: float
    """A second, since the command was given."""


class Meter:
    """Counts what is done and tells the caller."""

    def __init__(
        self, total: Mapping[str, int], done: Mapping[str, int], tell: Callable[[Progress], None] | None
    ) -> None:
        """Begin to count.

        Args:
            total: stage to number.
            done: what earlier commands did.
            tell: called at each step.
        """
        self._total, self._done, self._tell = total, dict(done), tell
        self._before = dict(done)
        self._began: dict[str, float] = {}
        self._last = time.monotonic()

    def __call__(self, stage: str, count: int) -> None:
        """Something of a stage is done."""
        now = time.monotonic()
        self._began.setdefault(stage, self._last)  # when the one before it ended
        self._last = now
        self._done[stage] += count
        if self._tell is not None:
            rate = (self._done[stage] - self._before[stage]) / max(1e-9, now - self._began[stage])
            self._tell(Progress(stage, self._done[stage], self._total[stage], rate))


def existing(uri: str, journal: str) -> Store | None:
    """The store at an address, if one is complete there.

    Args:
        uri: where a job is about to write.
        journal: name of that job.

    Returns:
        The store; ``None`` if there is nothing, or what the same job left when it was killed.

    Raises:
        UserError: if there is part of a store, or the work of another job.
    """
    check_place(uri)
    if table_exists(child(uri, "manifest")):
        return Store(uri)
    folder = work_folder(uri, journal)
    others = [path.parent.name for path in folder.parent.glob("*/journal.jsonl") if path.parent != folder]
    if others:
        raise UserError(
            f"{uri} is unfinished work of another command ({others[0]}); give that command again, or choose "
            "another --out"
        )
    half = [name for name in TABLES if table_exists(child(uri, name))]
    if half and not (folder / "journal.jsonl").exists():
        raise UserError(
            f"{uri} holds {', '.join(half)} of a store, but neither its manifest nor the journal of a "
            "command that could go on; put it back from a copy, or begin anew with another --out"
        )
    return None


def finished(uri: str, job: str) -> Store | None:
    """The result of a job that makes a new store, if it was killed between its commit and its last step.

    Args:
        uri: where the job is about to write.
        job: name of the job.

    Returns:
        The store; ``None`` if the job is still to be done.

    Raises:
        UserError: if there is a store, or part of one, that the job did not make.
    """
    done = existing(uri, job)
    if done is not None and not (work_folder(uri, job) / "journal.jsonl").exists():
        raise UserError(f"{uri} holds a store already; choose another --out")
    if done is not None:
        forget(uri, job, done)
    return done


def begin(uri: str, job: str, base: Store | None, settings: dict[str, Any]) -> Journal:
    """Open the journal of a job, or go on with it.

    Args:
        uri: the store.
        job: name of the job.
        base: the version that is added to; ``None`` for a new store.
        settings: whatever decides what the job makes.

    Returns:
        The journal, with the entries that still hold: their pieces are on the disk.
    """
    version = 0 if base is None else base.version
    folder = work_folder(uri, job)
    forget(uri, job, base)
    journal = Journal(folder, {"base": version} | settings)
    journal.entries = _on_disk(uri, journal.entries)
    return journal


def forget(uri: str, job: str, base: Store | None) -> None:
    """Remove a journal that belongs to another version: its job is committed, or can no longer be."""
    folder = work_folder(uri, job)
    try:
        with (folder / "journal.jsonl").open("rb") as file:
            first = file.readline()
    except OSError:
        return
    if first.endswith(b"\n") and json.loads(first).get("base") != (0 if base is None else base.version):
        if base is not None:
            # Perhaps it was killed between its commit and the seal of that.
            seal_version(uri, base.version, base.manifest.tables)
        shutil.rmtree(folder, ignore_errors=True)


def _on_disk(uri: str, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the entries whose files are gone or short (a crash of the machine, a tidy user)."""
    files, root = filesystem(uri)
    wanted = [
        (i, f"{root}/{table_of(e['unit']['kind'])}/{file['path']}", file["bytes"])
        for i, e in enumerate(entries)
        for file in e["piece"]["files"]
    ]
    infos = files.get_file_info([path for _, path, _ in wanted])
    bad = {
        i
        for (i, _, size), info in zip(wanted, infos, strict=True)
        if info.type != pa.fs.FileType.File or info.size != size
    }
    return [e for i, e in enumerate(entries) if i not in bad]


def table_of(kind: str) -> str:
    """The table that a kind of unit is of."""
    return "records" if kind == "records" else "texts"


def left(units: Sequence[Unit], entries: Sequence[dict[str, Any]]) -> list[Unit]:
    """The units that have no entry yet."""
    done = {(e["unit"]["kind"], e["unit"]["number"]) for e in entries}
    return [unit for unit in units if (unit.kind, unit.number) not in done]


def pieces_of(kind: str, entries: Sequence[dict[str, Any]]) -> list[Piece]:
    """The pieces of a kind of unit, in order."""
    by_number = {e["unit"]["number"]: e["piece"] for e in entries if e["unit"]["kind"] == kind}
    return [Piece.from_json(by_number[number]) for number in sorted(by_number)]


@dataclass(frozen=True)
class Change:
    """What happens to a table."""

    how: Literal["new", "columns", "append"]
    pieces: Sequence[Piece]
    schema: pa.Schema
    """The whole one of a new table, or the new columns."""


def commit(uri: str, base: Store | None, changes: Mapping[str, Change], manifest: Manifest) -> Store:
    """Make a new version of a store: all of it or, killed at any moment, nothing yet.

    The manifest comes last; what was committed to the tables before it is seen by nobody, and undone
    when the same command goes on.

    Args:
        uri: the store.
        base: the version that is added to.
        changes: table to change.
        manifest: of the new version; the versions of its tables are filled in here.

    Returns:
        The new version.

    Raises:
        UserError: if another command changed the store meanwhile, or the disk is full.
    """
    versions: dict[str, int] = {}
    if base is not None:
        if Store(uri).version != base.version:
            raise UserError(f"{uri} was changed by another command meanwhile; give the same command again")
        versions = dict(base.manifest.tables)  # what ingestion rejected stays with the store
        versions |= {name: rewind(child(uri, name), versions[name]).version for name in TABLES}
    for name, change in changes.items():
        address = child(uri, name)
        if change.how == "new":
            table = commit_new(address, change.schema, change.pieces)
        elif change.how == "append":
            table = commit_append(open_table(address), change.pieces)
        else:
            assert base is not None
            schema = widened_schema(base.records if name == "records" else base.texts, change.schema)
            table = commit_columns(open_table(address), change.pieces, schema)
        versions[name] = table.version
    sums = [(name, file) for name, change in changes.items() for p in change.pieces for file in p.files]
    versions["checksums"] = save_checksums(uri, sums, versions.get("checksums"))
    return save_manifest(uri, manifest.model_copy(update={"tables": versions}))


def tidy(store: Store, folder: Path) -> None:
    """After the commit: remove the journal and what killed commands left; older versions stay."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # not empty: another job is under way
        folder.parent.rmdir()
    for name in (*TABLES, "manifest"):
        sweep(child(store.uri, name))
