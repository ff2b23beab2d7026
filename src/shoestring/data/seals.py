"""Seals: checksums of the files that Lance keeps for itself, which it reads back without a check of its own.

The table of checksums knows the data of a store. A seal of a version of the store, ``seals/N.json``, knows
the rest: of each table the description and the transaction of its version, and the data of the tables of
checksums and of the manifest. ``seals/pins.json`` knows the files of all pins.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import astuple

import pyarrow.fs

from shoestring.data.tables import FileSum, cannot_write, child, file_sum, filesystem, open_table

FOLDER = "seals"
PINS = "pins"
REJECTED = "rejected"
"""What ingestion left out; only stores that it made have this table."""
ALL_TABLES = ("records", "texts", REJECTED, "checksums", "manifest")
Sealed = list[tuple[str, FileSum]]


def listing(uri: str, folder: str) -> list[str]:
    """The files below a folder.

    Args:
        uri: a store or a table.
        folder: in it; may be missing.

    Returns:
        Paths relative to ``uri``, sorted.
    """
    files, root = filesystem(uri)
    selector = pyarrow.fs.FileSelector(f"{root}/{folder}".rstrip("/"), allow_not_found=True, recursive=True)
    found = files.get_file_info(selector)
    return sorted(info.path[len(root) + 1 :] for info in found if info.type == pyarrow.fs.FileType.File)


def read_bytes(uri: str, path: str) -> bytes:
    """A small file of a store or table; ``path`` is relative to it."""
    files, root = filesystem(uri)
    with files.open_input_stream(f"{root}/{path}") as file:
        content: bytes = file.read()
    return content


def versions_of(table_uri: str) -> dict[int, str]:
    """Versions of a table, by the names of their files: those of Lance count down from 2**64 - 1."""
    found: dict[int, str] = {}
    for path in listing(table_uri, "_versions"):
        stem = path.removeprefix("_versions/").removesuffix(".manifest")
        if path.endswith(".manifest") and stem.isdecimal():
            number = int(stem)
            found[number if number < 1 << 63 else (1 << 64) - 1 - number] = path
    return dict(sorted(found.items()))


def seal_version(uri: str, version: int, tables: Mapping[str, int]) -> None:
    """Seal a version of a store that was just committed.

    Args:
        uri: the store.
        version: of its manifest.
        tables: versions of the other tables, as the manifest names them.

    Raises:
        UserError: if the disk is full or the folder cannot be written.
    """
    sums: Sealed = []
    for table, number in {**tables, "manifest": version}.items():
        table_uri = child(uri, table)
        sums += [(table, file_sum(table_uri, path)) for path in _own_files(table_uri, table, number)]
    _write(uri, str(version), sums)


def _own_files(table_uri: str, table: str, version: int) -> list[str]:
    dataset = open_table(table_uri, version)
    paths = [versions_of(table_uri)[version]]
    transaction = dataset.read_transaction(version)
    if transaction is not None:
        path = f"_transactions/{transaction.read_version}-{transaction.uuid}.txn"
        paths += [path] if path in listing(table_uri, "_transactions") else []
    if table in ("checksums", "manifest"):
        paths += data_files(dataset)
    return paths


def data_files(dataset: object) -> list[str]:
    """The data files of a table (``lance.LanceDataset``), relative to it."""
    fragments = dataset.get_fragments()  # type: ignore[attr-defined]
    return [f"data/{file.path}" for fragment in fragments for file in fragment.metadata.files]


def seal_pins(uri: str) -> None:
    """Seal the files of all pins of a store."""
    found = [(table, path) for table in ALL_TABLES for path in listing(child(uri, table), "_refs")]
    _write(uri, PINS, [(table, file_sum(child(uri, table), path)) for table, path in found])


def seals(uri: str) -> list[str]:
    """Names of the seals of a store: numbers of versions, and perhaps ``pins``."""
    return [path.removeprefix(f"{FOLDER}/").removesuffix(".json") for path in listing(uri, FOLDER)]


def remove_seals(uri: str, names: Iterable[str]) -> None:
    """Remove seals of versions that are about to be removed."""
    files, root = filesystem(uri)
    for name in names:
        files.delete_file(f"{root}/{FOLDER}/{name}.json")


def _text(sums: Sealed) -> bytes:
    rows = json.dumps([[table, *astuple(file)] for table, file in sums], indent=0).encode()
    return hashlib.blake2b(rows, digest_size=16).hexdigest().encode() + b"\n" + rows + b"\n"


def _write(uri: str, name: str, sums: Sealed) -> None:
    files, root = filesystem(uri)
    try:
        files.create_dir(f"{root}/{FOLDER}")
        # A torn seal is found by its digest, and the next one of this version replaces it.
        with files.open_output_stream(f"{root}/{FOLDER}/{name}.json") as file:
            file.write(_text(sums))
    except OSError as error:
        raise cannot_write(uri, error) from error


def read_seal(uri: str, name: str) -> Sealed | None:
    """Read a seal.

    Args:
        uri: the store.
        name: of :func:`seals`.

    Returns:
        (table, file) of all it knows; ``None`` if the seal itself was altered.
    """
    try:
        content = read_bytes(uri, f"{FOLDER}/{name}.json")
        rows = json.loads(content.partition(b"\n")[2])
        sums = [(str(table), FileSum(path, size, digest)) for table, path, size, digest in rows]
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return sums if _text(sums) == content else None
