"""A store: records, their captions, and the columns that were computed from them.

Four Lance tables in one folder or below one URL:

``records``    ``id``, ``width`` and ``height`` of the original, ``caption_*``, perhaps ``image`` (the
               original file), ``moments_*`` and others that :mod:`shoestring.data.manifest` describes
``texts``      every distinct caption once: ``text`` and its embeddings
``checksums``  of every data file
``manifest``   one row; its version is the version of the store and names those of the other tables

Beside them lie the seals (:mod:`shoestring.data.seals`), checksums of the files that are Lance's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from shoestring.data.manifest import (
    SCHEMA_VERSION,
    CaptionsColumn,
    FeatureColumn,
    LatentsColumn,
    Manifest,
    TextColumn,
)
from shoestring.data.seals import PINS, remove_seals, seal_pins, seal_version, seals
from shoestring.data.tables import (
    FileSum,
    child,
    clean,
    commit_append,
    commit_new,
    open_table,
    reading,
    rewind,
    table_exists,
    write_piece,
)
from shoestring.runtime import UserError

MANIFEST = pa.schema([("json", pa.large_string())])
CHECKSUMS = pa.schema(
    [("table", pa.string()), ("path", pa.string()), ("bytes", pa.int64()), ("digest", pa.string())]
)
RECORDS = [("id", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
CAPTIONS = pa.list_(pa.int32())
TABLES = ("records", "texts", "checksums")
_NEWEST = "newest-while-cleaning"


class Store:
    """A store at one version: what others commit later is not seen."""

    def __init__(self, uri: str, version: int | None = None) -> None:
        """Open.

        Args:
            uri: folder or URL (``s3://``, ``gs://``, ``az://``, ``hf://``).
            version: as it was then; the newest by default.

        Raises:
            UserError: if there is no store, or it is damaged or of a newer kind.
        """
        self.uri = uri
        if not table_exists(child(uri, "manifest")):
            raise no_store(uri)
        table = open_table(child(uri, "manifest"), version)
        self.version: int = table.version
        with reading(f"{uri}: its manifest"):
            text = table.to_table()["json"][0].as_py()
        try:
            self.manifest = Manifest.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(
                f"{uri}: its manifest does not fit this version of shoestring, which writes schema "
                f"{SCHEMA_VERSION} ({where}: {first['msg']}); open it with the version that made it"
            ) from error

    def __len__(self) -> int:
        return self.manifest.records

    def _table(self, name: str) -> Any:
        table = open_table(child(self.uri, name), self.manifest.tables[name])
        rows = {"records": self.manifest.records, "texts": self.manifest.texts}.get(name)
        if rows is not None and table.count_rows() != rows:
            raise UserError(
                f"{self.uri}: the table {name} has {table.count_rows():,} rows, its manifest says {rows:,}; "
                "put the store back from a copy, or make it anew"
            )
        return table

    @cached_property
    def records(self) -> Any:
        """The records, a ``lance.LanceDataset``."""
        return self._table("records")

    @cached_property
    def texts(self) -> Any:
        """The distinct captions, a ``lance.LanceDataset``."""
        return self._table("texts")

    @cached_property
    def checksums(self) -> Any:
        """Of all data files, a ``lance.LanceDataset``."""
        return self._table("checksums")

    @cached_property
    def digest(self) -> str:
        """A hash of the contents, by the checksums: equal where stores hold equal files in equal order."""
        with reading(f"the checksums of {self.uri}"):
            rows = self.checksums.to_table(columns=["table", "digest"]).to_pylist()
        text = "".join(f"{row['table']} {row['digest']}\n" for row in rows)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def take(self, rows: Sequence[int] | np.ndarray[Any, Any], columns: Sequence[str]) -> pa.Table:
        """Records by number, in the order asked for.

        Args:
            rows: numbers from 0; may repeat.
            columns: names.

        Returns:
            One row each.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        assert len(wanted) == 0 or (wanted.min() >= 0 and wanted.max() < len(self)), "row out of range"
        return self.records.take(wanted.tolist(), columns=list(columns))

    def column(self, table: str, name: str) -> pa.ChunkedArray:
        """A whole column.

        Args:
            table: ``records`` or ``texts``.
            name: of the column.

        Returns:
            One value a row.

        Raises:
            UserError: if it cannot be read.
        """
        advice = f"to find what is damaged: shoestring data verify {self.uri}"
        with reading(f"{name} of {self.uri}", advice=advice):
            return getattr(self, table).to_table(columns=[name])[name]

    # -- columns by name -----------------------------------------------------------------------------------

    def latents(self, name: str) -> LatentsColumn:
        """A column of moments.

        Args:
            name: as in the manifest.

        Returns:
            Its description.

        Raises:
            UserError: if there is none of that name.
        """
        return _named(self.uri, "latents", self.manifest.latents, name, "prepare with another --resolution")

    def text(self, name: str) -> TextColumn:
        """Columns of embeddings; see :meth:`latents`."""
        return _named(self.uri, "embeddings", self.manifest.text, name, "prepare with another --text-encoder")

    def feature(self, name: str) -> FeatureColumn:
        """A column of features; see :meth:`latents`."""
        return _named(self.uri, "features", self.manifest.features, name, "prepare with --feature")

    def captions(self, name: str) -> CaptionsColumn:
        """A column of captions; see :meth:`latents`."""
        return _named(self.uri, "captions", self.manifest.captions, name, "add them with data caption")

    # -- versions ------------------------------------------------------------------------------------------

    def pin(self, name: str) -> None:
        """Keep this version when old ones are cleaned away.

        Args:
            name: of the pin (letters, digits, dots, dashes); pinning again under the same name moves it.
        """
        if str(self.version) not in seals(self.uri):  # its writer was killed at the very end
            seal_version(self.uri, self.version, self.manifest.tables)
        for table in (
            self.records,
            self.texts,
            self.checksums,
            open_table(child(self.uri, "manifest"), self.version),
        ):
            if name in table.tags.list():
                table.tags.update(name, table.version)
            else:
                table.tags.create(name, table.version)
        seal_pins(self.uri)

    def unpin(self, name: str) -> None:
        """Give a pin up; see :meth:`pin`.

        Args:
            name: of the pin.
        """
        for table in (*TABLES, "manifest"):
            tags = open_table(child(self.uri, table)).tags
            if name in tags.list():
                tags.delete(name)
        seal_pins(self.uri)

    def clean(self) -> int:
        """Remove versions that are neither pinned nor the newest; only while nobody writes.

        Returns:
            Bytes freed.
        """
        newest = Store(self.uri)
        # A table may have a newer version than the manifest names, of a job that did not end: without this
        # pin its older one, which is the store's, would be removed.
        newest.pin(_NEWEST)
        kept = {info["version"] for info in open_table(child(self.uri, "manifest")).tags.list().values()}
        remove_seals(self.uri, (name for name in seals(self.uri) if name != PINS and int(name) not in kept))
        freed = sum(clean(child(self.uri, name)) for name in (*TABLES, "manifest"))
        newest.unpin(_NEWEST)
        return freed


def no_store(uri: str) -> UserError:
    """The sentence for a place without the manifest of a store."""
    half = [name for name in TABLES if table_exists(child(uri, name))]
    if half:
        return UserError(
            f"{uri} holds the tables {', '.join(half)} of a store but no manifest: it is incomplete; "
            "give the command that began it again, or put the folder back from a copy"
        )
    return UserError(
        f"{uri} is not a store; make one with: shoestring data ingest PICTURES --out RAW, then "
        "shoestring data prepare RAW --out STORE"
    )


def _named(uri: str, kind: str, columns: Iterable[Any], name: str, advice: str) -> Any:
    by_name = {column.name: column for column in columns}
    if name not in by_name:
        have = ", ".join(by_name) or "none"
        raise UserError(f"{uri} has no {kind} {name!r}; it has {have}; {advice}")
    return by_name[name]


def save_manifest(uri: str, manifest: Manifest) -> Store:
    """Commit a new version of a store; the tables it names must be committed already.

    Args:
        uri: the store.
        manifest: with ``tables`` filled in.

    Returns:
        The store at that version.
    """
    rows = pa.table({"json": [manifest.model_dump_json(indent=1)]}, schema=MANIFEST)
    table = child(uri, "manifest")
    commit_new(table, MANIFEST, [write_piece(table, rows)])
    store = Store(uri)
    seal_version(uri, store.version, store.manifest.tables)
    return store


def save_checksums(uri: str, sums: Sequence[tuple[str, FileSum]], before: int | None = None) -> int:
    """Add checksums to a store.

    Args:
        uri: the store.
        sums: (table, file) in the order of the data.
        before: version to add to; ``None`` begins anew.

    Returns:
        The version of the table of checksums.
    """
    table = child(uri, "checksums")
    if not sums and before is not None:
        return before
    columns = {
        "table": [name for name, _ in sums],
        "path": [file.path for _, file in sums],
        "bytes": [file.bytes for _, file in sums],
        "digest": [file.digest for _, file in sums],
    }
    pieces = [write_piece(table, pa.table(columns, schema=CHECKSUMS))] if sums else []
    if before is None:
        return int(commit_new(table, CHECKSUMS, pieces).version)
    return int(commit_append(rewind(table, before), pieces).version)
