"""Joins small fragments of a store: random rows of few large ones are read twice as fast."""

from __future__ import annotations

from shoestring.data.journal import work_folder
from shoestring.data.store import Store, save_checksums, save_manifest
from shoestring.data.tables import FileSum, cannot_write, child, file_sum, open_table, rewind
from shoestring.runtime import UserError

ROWS = 16_384
"""Of a joined fragment, which is also the unit in which columns are added: a compromise of both."""
PARTS = ("records", "texts")


def compact(uri: str, rows: int = ROWS, threads: int = 2) -> Store:
    """Join neighbouring fragments that are small; rows and their order stay.

    Files are compared with their checksums before they are copied, so that damage is not sealed in. Older
    versions stay until ``data clean``. Killed at any moment, the store is as it was.

    Args:
        uri: the store.
        rows: that a fragment should have.
        threads: that copy.

    Returns:
        The new version, or the store as it is if there is nothing to join.

    Raises:
        UserError: if a file is damaged, another command is not finished, or the disk is full.
    """
    store = Store(uri)
    joined = [name for name in PARTS if _has_small(store, name, rows)]
    if not joined:
        return store
    unfinished = sorted(path.parent.name for path in work_folder(uri, "*").parent.glob("*/journal.jsonl"))
    if unfinished:
        raise UserError(
            f"{uri} is unfinished work of another command ({unfinished[0]}); give that command again first"
        )
    before = store.checksums.to_table().to_pylist()
    sums = [(row["table"], FileSum(row["path"], row["bytes"], row["digest"])) for row in before]
    kept = [(name, file) for name, file in sums if name not in joined]
    versions = dict(store.manifest.tables)
    for name in joined:
        address = child(uri, name)
        _check(address, [file for table, file in sums if table == name])
        table = rewind(address, versions[name])
        try:
            table.optimize.compact_files(target_rows_per_fragment=rows, num_threads=threads)
        except OSError as error:
            raise cannot_write(address, error) from error
        table = open_table(address)
        versions[name] = table.version
        paths = [f"data/{file.path}" for part in table.get_fragments() for file in part.metadata.files]
        kept += [(name, file_sum(address, path)) for path in paths]
    rewind(child(uri, "checksums"), versions["checksums"])
    versions["checksums"] = save_checksums(uri, kept)
    return save_manifest(uri, store.manifest.model_copy(update={"tables": versions}))


def _has_small(store: Store, name: str, rows: int) -> bool:
    """Whether at least two neighbours together are not more than a fragment should have."""
    counts = [part.metadata.physical_rows for part in getattr(store, name).get_fragments()]
    return any(a + b <= rows for a, b in zip(counts, counts[1:], strict=False))


def _check(table: str, files: list[FileSum]) -> None:
    for file in files:
        try:
            same = file_sum(table, file.path) == file
        except OSError:
            same = False
        if not same:
            raise UserError(
                f"{table}/{file.path} is missing or damaged; see what else is with: shoestring data verify, "
                "and put it back from a copy"
            )
