"""Lance tables, written piece by piece and committed at once.

A piece is one fragment of a table: any process may write it, and nobody sees it before the commit. Lance
keeps no checksums of its data and reads a flipped byte back silently, so every piece carries those of its
files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

os.environ.setdefault("LANCE_LOG", "error")  # it warns of tables that are about to be made

import lance
import pyarrow as pa
import pyarrow.fs
from lance.fragment import FragmentMetadata, write_fragments

from shoestring.runtime import UserError

CHUNK = 1 << 22


@dataclass(frozen=True)
class FileSum:
    """A data file and what it must hold."""

    path: str
    """Relative to the table."""
    bytes: int
    digest: str
    """BLAKE2b of 16 bytes, hexadecimal."""


@dataclass(frozen=True)
class Piece:
    """A fragment that was written and is not yet part of its table."""

    fragment: str
    """Lance's metadata of it, JSON."""
    rows: int
    files: tuple[FileSum, ...]
    """The data files that this piece added."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Piece:
        """Back from :meth:`to_json`."""
        files = tuple(FileSum(**file) for file in values["files"])
        return Piece(values["fragment"], values["rows"], files)


def child(uri: str, name: str) -> str:
    """The address of something below a folder or URL."""
    return f"{uri.rstrip('/')}/{name}"


def filesystem(uri: str) -> tuple[pa.fs.FileSystem, str]:
    """Whatever holds a path or URL, and the path in it.

    Args:
        uri: local path, ``s3://``, ``gs://``, ``hf://`` and whatever else pyarrow or fsspec know.

    Returns:
        The file system and the path.

    Raises:
        UserError: if the address is of an unknown kind.
    """
    if "://" not in uri:
        return pa.fs.LocalFileSystem(), os.path.abspath(uri)  # noqa: PTH100 (a string is wanted)
    try:
        return pa.fs.FileSystem.from_uri(uri)
    except OSError as error:  # of S3 the region is asked for
        raise UserError(
            f"{uri} cannot be reached ({str(error).splitlines()[0][:200]}); check address, network and login"
        ) from error
    except pa.ArrowInvalid:
        import fsspec

        try:
            handler, path = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise UserError(
                f"{uri} cannot be opened ({error}); give a folder or a URL like s3://..."
            ) from error
        return pa.fs.PyFileSystem(pa.fs.FSSpecHandler(handler)), path


def exists(uri: str) -> bool:
    """Whether there is a file or a folder."""
    files, path = filesystem(uri)
    return bool(files.get_file_info(path).type != pa.fs.FileType.NotFound)


def file_sum(table_uri: str, path: str) -> FileSum:
    """Read a file of a table from beginning to end.

    Args:
        table_uri: the table.
        path: relative to it.

    Returns:
        Its size and digest.

    Raises:
        OSError: if it is not there or cannot be read.
    """
    files, root = filesystem(table_uri)
    digest, size = hashlib.blake2b(digest_size=16), 0
    with files.open_input_stream(f"{root}/{path}") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileSum(path, size, digest.hexdigest())


def table_exists(uri: str) -> bool:
    """Whether a table was committed here."""
    return exists(child(uri, "_versions"))


def open_table(uri: str, version: int | None = None) -> lance.LanceDataset:
    """Open a table.

    Args:
        uri: folder or URL.
        version: as it was then; the newest by default.

    Returns:
        The table; reads see this version whatever others commit.

    Raises:
        UserError: if it is missing or damaged.
    """
    with reading(uri if version is None else f"{uri} at version {version}", "opened"):
        return lance.dataset(uri, version=version)


@contextmanager
def reading(
    what: str, done: str = "read", advice: str = "put it back from a copy, or make the store anew"
) -> Iterator[None]:
    """Say in a sentence what Lance does on damaged files; some make it panic, which is no Exception."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, (ValueError, OSError, RuntimeError, LookupError)) and not _panic(error):
            raise
        reason = str(error).strip().split("\n")[0].split(", /")[0][:300]
        raise UserError(f"{what} cannot be {done} ({reason}); {advice}") from error


def _panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"


def rewind(uri: str, version: int) -> lance.LanceDataset:
    """Open a table to write on from a version: what was committed after it is undone.

    A store's manifest is committed last. A job that was killed before left versions of the tables that
    no manifest names; to commit upon them would double their rows.

    Args:
        uri: the table.
        version: that the manifest names.

    Returns:
        The table, at its newest version, with the contents of that one.
    """
    table = open_table(uri, version)
    if table.latest_version != version:
        table.restore()
        table = open_table(uri)
    return table


def _piece(uri: str, metadata: FragmentMetadata, known: set[str]) -> Piece:
    paths = [f"data/{file.path}" for file in metadata.files]
    files = tuple(file_sum(uri, path) for path in paths if path not in known)
    return Piece(json.dumps(metadata.to_json()), metadata.physical_rows, files)


def write_piece(uri: str, rows: pa.Table) -> Piece:
    """Write rows as a fragment of a table that may not exist yet.

    Args:
        uri: the table.
        rows: at least one; they stay one fragment.

    Returns:
        The piece, for :func:`commit_new` or :func:`commit_append`.

    Raises:
        UserError: if the disk is full or the folder cannot be written.
    """
    assert rows.num_rows > 0
    try:
        (metadata,) = write_fragments(rows, uri, schema=rows.schema, max_rows_per_file=rows.num_rows)
        return _piece(uri, metadata, set())
    except OSError as error:
        raise cannot_write(uri, error) from error


def widen_piece(table: lance.LanceDataset, fragment: int, columns: pa.Table) -> tuple[Piece, Any]:
    """Write further columns of one fragment beside its old ones.

    Args:
        table: the table as it is.
        fragment: number of the fragment.
        columns: new columns only, with as many rows as the fragment.

    Returns:
        The piece and the schema for :func:`commit_columns`.

    Raises:
        UserError: if the disk is full or the folder cannot be written.
    """
    old = table.get_fragment(fragment)
    assert old is not None
    known = {f"data/{file.path}" for file in old.metadata.files}
    try:
        metadata, schema = old.merge_columns(columns.to_reader())
        return _piece(table.uri, metadata, known), schema
    except OSError as error:
        raise cannot_write(table.uri, error) from error


def widened_schema(table: lance.LanceDataset, columns: pa.Schema) -> Any:
    """The schema that :func:`widen_piece` would give for columns, for those who resume a job.

    Args:
        table: the version that the pieces were widened from.
        columns: new columns.

    Returns:
        For :func:`commit_columns`.
    """
    fragment = table.get_fragments()[0]
    nothing = pa.table([pa.nulls(fragment.physical_rows, field.type) for field in columns], schema=columns)
    return widen_piece(table, fragment.fragment_id, nothing)[1]


def cannot_write(uri: str, error: OSError) -> UserError:
    """The sentence for a failed write."""
    reason = str(error).strip().split("\n")[0].split(", /")[0][:300]
    return UserError(
        f"cannot write to {uri} ({reason}); make room or choose another folder, then give the same command"
    )


def _fragments(pieces: Sequence[Piece]) -> list[FragmentMetadata]:
    return [FragmentMetadata.from_json(piece.fragment) for piece in pieces]


def commit_new(uri: str, schema: pa.Schema, pieces: Sequence[Piece]) -> lance.LanceDataset:
    """Make pieces, in this order, the whole table; its older versions stay.

    Args:
        uri: the table.
        schema: of all pieces.
        pieces: written by :func:`write_piece`; none make an empty table.

    Returns:
        The table.
    """
    return _commit(uri, lance.LanceOperation.Overwrite(schema, _fragments(pieces)), None)


def commit_append(table: lance.LanceDataset, pieces: Sequence[Piece]) -> lance.LanceDataset:
    """Add pieces, in this order, at the end of a table.

    Args:
        table: as it is.
        pieces: written by :func:`write_piece`.

    Returns:
        The table.
    """
    return _commit(table.uri, lance.LanceOperation.Append(_fragments(pieces)), table.version)


def commit_columns(table: lance.LanceDataset, pieces: Sequence[Piece], schema: Any) -> lance.LanceDataset:
    """Make widened fragments the table.

    Args:
        table: the version that they were widened from.
        pieces: of :func:`widen_piece`, every fragment once.
        schema: as it gave it.

    Returns:
        The table.
    """
    return _commit(table.uri, lance.LanceOperation.Merge(_fragments(pieces), schema), table.version)


def _commit(uri: str, operation: Any, read_version: int | None) -> lance.LanceDataset:
    try:
        return lance.LanceDataset.commit(uri, operation, read_version=read_version)
    except OSError as error:
        raise cannot_write(uri, error) from error


def clean(uri: str) -> int:
    """Remove what no tagged version and not the newest one needs; only while nobody writes.

    Args:
        uri: the table.

    Returns:
        Bytes freed.
    """
    stats = open_table(uri).cleanup_old_versions(
        older_than=timedelta(0), delete_unverified=True, error_if_tagged_old_versions=False
    )
    return int(stats.bytes_removed)


def sweep(uri: str) -> int:
    """Remove files that are part of no version, left by jobs that were killed; only while nobody writes.

    Args:
        uri: the table; all its versions stay.

    Returns:
        Bytes freed.
    """
    stats = open_table(uri).cleanup_old_versions(
        older_than=timedelta(days=36500), delete_unverified=True, error_if_tagged_old_versions=False
    )
    return int(stats.bytes_removed)
