"""Ingestion: a reader's pictures, filtered, into a new store of original files and captions.

A unit is a number of kept pictures: one fragment of the records, one of the captions first seen in it, one
of what was rejected on the way. The journal notes a unit when all three are written, so a job that is killed
goes on after its last whole unit. Nobody sees anything before the end, when all is committed.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

import shoestring
from shoestring.data.duplicates import short_digest
from shoestring.data.filters import Examined, Filters, examine, summary
from shoestring.data.journal import Journal, check_place, difference, work_folder
from shoestring.data.manifest import CaptionsColumn, Manifest, SourceFacts
from shoestring.data.readers.base import Reader
from shoestring.data.records import Picture, Rejection
from shoestring.data.seen import Mark, Seen, save
from shoestring.data.store import CAPTIONS, RECORDS, TABLES, Store, save_checksums, save_manifest
from shoestring.data.tables import Piece, child, clean, commit_new, open_table, table_exists, write_piece
from shoestring.runtime import UserError

JOB = "ingest"
SCHEMA = pa.schema([*RECORDS, ("caption_source", CAPTIONS), ("image", pa.large_binary())])
TEXTS = pa.schema([("text", pa.string())])
REJECTED = pa.schema([("item", pa.string()), ("kind", pa.string()), ("reason", pa.string())])
SETTINGS = b"shoestring.ingest"
LOOKAHEAD = 32
MAX_SHOWN = 3

Progress = Callable[[int, int, int | None], None]


def ingest(
    reader: Reader,
    out: str,
    filters: Filters | None = None,
    unit_rows: int = 1024,
    licence: str = "",
    threads: int = 2,
    progress: Progress | None = None,
) -> Store:
    """Make a store of pictures; the same command goes on where it was interrupted.

    Files are kept byte for byte. What the source holds is either a record of the store or a row of its table
    ``rejected`` (see :func:`rejections`).

    Args:
        reader: of :func:`shoestring.data.readers.open_reader`, whose option ``numbers`` names (at least)
            ``filters.numbers``.
        out: folder or URL of the store.
        filters: what to keep; by default every usable picture with a caption.
        unit_rows: records of a fragment.
        licence: of the pictures; by default what the reader knows.
        threads: that decode pictures.
        progress: called with items done, records kept, and items in all (``None``: not known).

    Returns:
        The store. If it was complete already, nothing is read; see :func:`complete`.

    Raises:
        UserError: if the store cannot be written, was made with other settings, or nothing is kept.
    """
    filters = filters or Filters()
    assert set(filters.numbers) <= set(reader.options.numbers), "the reader must deliver filters.numbers"
    settings = _settings(reader, filters, unit_rows, licence)
    done = complete(reader, out, filters, unit_rows, licence)
    folder = work_folder(out, JOB)
    if done is not None:
        if folder.exists():  # killed after the last commit
            _tidy(done, folder)
        return done
    if not (folder / "journal.jsonl").exists() and any(table_exists(child(out, name)) for name in TABLES):
        return Store(out)  # says what is wrong with it
    journal = Journal(folder, settings)
    try:
        job = _Job(reader, out, filters, unit_rows, journal)
        job.run(threads, progress)
        if not job.kept:
            _nothing(reader, job, journal)
        store = job.commit(licence or reader.credit, settings)
    finally:
        journal.close()
    _tidy(store, folder)
    return store


def complete(
    reader: Reader, out: str, filters: Filters | None = None, unit_rows: int = 1024, licence: str = ""
) -> Store | None:
    """The store, if this command has made it already.

    Args:
        reader: as for :func:`ingest`.
        out: as for :func:`ingest`.
        filters: as for :func:`ingest`.
        unit_rows: as for :func:`ingest`.
        licence: as for :func:`ingest`.

    Returns:
        The store, or ``None`` if there is none yet.

    Raises:
        UserError: if another command made the store that is there.
    """
    check_place(out)
    if not table_exists(child(out, "manifest")):
        return None
    store = Store(out)
    table = _rejected(store)
    metadata = {} if table is None else table.schema.metadata or {}
    made = json.loads(metadata.get(SETTINGS, b"null"))
    if made is None:
        raise UserError(f"{out} is a store that was not made by data ingest; choose another --out")
    wanted = json.loads(json.dumps(_settings(reader, filters or Filters(), unit_rows, licence)))
    other = difference(made, wanted)
    if other is not None:
        raise UserError(f"{out} is a complete store that was made {other}; choose another --out")
    return store


def rejections(store: Store) -> pa.Table:
    """What ingestion left out.

    Args:
        store: made by :func:`ingest`.

    Returns:
        ``item``, ``kind``, ``reason``. A kind that begins with ``caption: `` is of one caption of a picture
        that was kept with its others; all other rows are counted in the manifest.

    Raises:
        UserError: if the store has no such table.
    """
    table = _rejected(store)
    if table is None:
        raise UserError(f"{store.uri} keeps no list of what was rejected; name one that data ingest made")
    return table.to_table()


def _rejected(store: Store) -> Any:
    """The table of what was rejected, or ``None``."""
    version = store.manifest.tables.get("rejected")
    return None if version is None else open_table(child(store.uri, "rejected"), version)


def _settings(reader: Reader, filters: Filters, unit_rows: int, licence: str) -> dict[str, Any]:
    return {
        "source": reader.kind,
        "path": reader.path,
        "unit_rows": unit_rows,
        "--licence": licence or None,
        "items": reader.total,
        **reader.options.to_json(),
        **filters.to_json(),
    }


def _tidy(store: Store, folder: Path) -> None:
    """Remove files of interrupted runs, and the journal."""
    store.clean()
    clean(child(store.uri, "rejected"))
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent.is_dir() and not any(folder.parent.iterdir()):
        folder.parent.rmdir()


def _nothing(reader: Reader, job: _Job, journal: Journal) -> None:
    journal.finish()
    examples = "; ".join(f"{item}: {reason}" for item, reason in job.first)
    raise UserError(
        f"{reader.kind}:{reader.path}: no picture was kept of {job.read:,} items "
        f"({summary(job.counts)}{'; ' + examples if examples else ''})"
    )


@dataclass
class _Candidate:
    """An item on its way: some pictures are decoded ahead."""

    item: Picture | Rejection
    captions: list[str] = field(default_factory=list)
    misfits: list[Rejection] = field(default_factory=list)
    """Captions that do not fit."""
    examined: Future[Examined | Rejection] | None = None
    """``None`` where the item is rejected whatever the file shows."""

    @property
    def name(self) -> str:
        return self.item.id if isinstance(self.item, Picture) else self.item.item


@dataclass
class _Unit:
    """What the next entry of the journal is made of."""

    pictures: list[tuple[Picture, list[str], Examined]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)


class _Job:
    """One run of ingestion, from where the journal ends."""

    def __init__(self, reader: Reader, out: str, filters: Filters, unit_rows: int, journal: Journal) -> None:
        self.reader, self.out, self.filters, self.unit_rows = reader, out, filters, unit_rows
        self.journal = journal
        self.seen = Seen(filters)
        self.read = self.kept = 0
        self.counts: Counter[str] = Counter()
        self.first: list[tuple[str, str]] = []
        self._last = ""
        for number, entry in enumerate(journal.entries):
            self.seen.remember(self._marks(number))
            self.read, self.kept, self._last = entry["items"], entry["kept"], entry["last"]
            self.counts = Counter(entry["counts"])
            self.first = [(item, reason) for item, reason in entry["first"]]

    # -- reading and judging -------------------------------------------------------------------------------

    def run(self, threads: int, progress: Progress | None) -> None:
        """Read to the end of the source, unit by unit."""
        unit = _Unit()
        with ThreadPoolExecutor(threads) as pool:
            try:
                for candidate in self._candidates(pool):
                    self._judge(unit, candidate)
                    self.read += 1
                    self._last = candidate.name
                    if progress is not None:
                        progress(self.read, self.kept, self.reader.total)
                    if len(unit.pictures) == self.unit_rows:
                        self._write(unit)
                        unit = _Unit()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if unit.pictures or unit.rejected:
            self._write(unit)

    def _items(self) -> Iterator[Picture | Rejection]:
        """What was not read yet; whether the source is still the same is seen by the item before."""
        if not self.read:
            yield from self.reader.items()
            return
        rest = iter(self.reader.items(self.read - 1))
        before = next(rest, None)
        found = "nothing" if before is None else _Candidate(before).name
        if found != self._last:
            raise UserError(
                f"{self.reader.kind}:{self.reader.path} has changed since this job began: item {self.read} "
                f"was {self._last!r}, now it is {found!r}; put it back, or delete "
                f"{self.journal.path.parent} and begin again"
            )
        yield from rest

    def _candidates(self, pool: ThreadPoolExecutor) -> Iterator[_Candidate]:
        """Items in order."""
        ahead: deque[_Candidate] = deque()
        for item in self._items():
            candidate = _Candidate(item)
            if isinstance(item, Picture):
                candidate.captions, candidate.misfits = self.filters.captions(item)
                if candidate.captions and self.filters.threshold(item) is None:
                    candidate.examined = pool.submit(examine, item.data, self.seen.looks is not None)
            ahead.append(candidate)
            if len(ahead) == LOOKAHEAD:
                yield ahead.popleft()
        yield from ahead

    def _judge(self, unit: _Unit, candidate: _Candidate) -> None:
        """Keep an item, or reject it for the first reason there is."""
        item = candidate.item
        if isinstance(item, Rejection):
            return self._reject(unit, item)
        if not candidate.captions:
            return self._reject(unit, candidate.misfits[-1])
        if (low := self.filters.threshold(item)) is not None:
            return self._reject(unit, low)
        assert candidate.examined is not None
        examined = candidate.examined.result()
        name = short_digest(item.id.encode("utf-8", "surrogatepass"))
        if (twin := self.seen.same_id(name)) is not None:
            return self._reject(unit, Rejection(item.id, f"record {twin} has this id", "duplicate id"))
        if isinstance(examined, Rejection):
            return self._reject(unit, replace(examined, item=item.id))
        mark = Mark(name, examined.digest, examined.look)
        if (rejection := self._twin_or_size(item.id, mark, examined)) is not None:
            return self._reject(unit, rejection)
        unit.rejected += candidate.misfits
        unit.pictures.append((item, candidate.captions, examined))
        unit.marks.append(mark)
        self.seen.add(mark)
        self.kept += 1
        return None

    def _twin_or_size(self, name: str, mark: Mark, examined: Examined) -> Rejection | None:
        if (twin := self.seen.same_file(mark)) is not None:
            return Rejection(name, f"the same file as record {twin}", "duplicate file")
        if (rejection := self.filters.size(name, examined.width, examined.height)) is not None:
            return rejection
        if (twin := self.seen.same_look(mark)) is not None:
            return Rejection(name, f"looks like record {twin}", "look-alike")
        return None

    def _reject(self, unit: _Unit, rejection: Rejection) -> None:
        unit.rejected.append(rejection)
        self.counts[rejection.kind] += 1
        if len(self.first) < MAX_SHOWN:
            self.first.append((rejection.item, rejection.reason))

    # -- writing -------------------------------------------------------------------------------------------

    def _write(self, unit: _Unit) -> None:
        """Write a unit: data first, then what is remembered of it, then the journal's entry."""
        new: dict[bytes, str] = {}
        records = {
            "id": [picture.id for picture, _, _ in unit.pictures],
            "width": [examined.width for _, _, examined in unit.pictures],
            "height": [examined.height for _, _, examined in unit.pictures],
            "caption_source": [self.seen.rows(captions, new) for _, captions, _ in unit.pictures],
            "image": [picture.data for picture, _, _ in unit.pictures],
        }
        rejected = {
            name: [getattr(rejection, name) for rejection in unit.rejected] for name in REJECTED.names
        }
        entry = {
            "items": self.read,
            "kept": self.kept,
            "counts": dict(self.counts),
            "first": self.first,
            "last": self._last,
            "records": self._piece("records", records, SCHEMA),
            "texts": self._piece("texts", {"text": list(new.values())}, TEXTS),
            "rejected": self._piece("rejected", rejected, REJECTED),
        }
        save(self._marks(len(self.journal.entries)), unit.marks, list(new))
        self.journal.add(entry)

    def _piece(self, name: str, columns: dict[str, Any], schema: pa.Schema) -> dict[str, Any] | None:
        rows = pa.table(columns, schema=schema)
        return write_piece(child(self.out, name), rows).to_json() if rows.num_rows else None

    def _marks(self, number: int) -> Path:
        return self.journal.path.with_name(f"unit-{number:06}.npz")

    # -- the end -------------------------------------------------------------------------------------------

    def commit(self, licence: str, settings: dict[str, Any]) -> Store:
        """Make all units a store."""
        assert self.read == self.kept + sum(self.counts.values()), (self.read, self.kept, self.counts)
        pieces = {
            name: [Piece.from_json(entry[name]) for entry in self.journal.entries if entry[name] is not None]
            for name in ("records", "texts", "rejected")
        }
        assert self.kept == sum(piece.rows for piece in pieces["records"])
        assert self.seen.texts == sum(piece.rows for piece in pieces["texts"])
        noted = REJECTED.with_metadata({SETTINGS: json.dumps(settings).encode()})
        schemas = {"records": SCHEMA, "texts": TEXTS, "rejected": noted}
        tables = {
            name: commit_new(child(self.out, name), schemas[name], pieces[name]).version for name in pieces
        }
        sums = [(name, file) for name in pieces for piece in pieces[name] for file in piece.files]
        tables["checksums"] = save_checksums(self.out, sums)
        facts = SourceFacts(
            kind=self.reader.kind,
            path=self.reader.path,
            licence=licence,
            read=self.read,
            kept=self.kept,
            rejected=dict(self.counts.most_common()),
        )
        manifest = Manifest(
            made_by=shoestring.__version__,
            records=self.kept,
            texts=self.seen.texts,
            unit_rows=self.unit_rows,
            has_images=True,
            sources=(facts,),
            captions=(CaptionsColumn(name="source", origin=f"the source ({self.reader.kind})"),),
            tables=tables,
        )
        return save_manifest(self.out, manifest)
