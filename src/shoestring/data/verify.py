"""Verify a store: every file against its checksum, every row against what the manifest says of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from shoestring.data.check_rows import row_problems
from shoestring.data.seals import (
    ALL_TABLES,
    PINS,
    REJECTED,
    Sealed,
    data_files,
    listing,
    read_bytes,
    read_seal,
    seals,
    versions_of,
)
from shoestring.data.store import Store, no_store
from shoestring.data.tables import FileSum, child, file_sum, open_table, reading, table_exists
from shoestring.runtime import UserError

THREADS = 4
PARTS = ("records", "texts")
Progress = Callable[[int, int], None]


@dataclass
class Findings:
    """What was found, a sentence each."""

    problems: list[str] = field(default_factory=list)
    """Damage: something is missing, altered or contradicts itself."""
    notes: list[str] = field(default_factory=list)
    """What does no harm: files of no version, jobs that did not end."""
    files: int = 0
    """Files that were compared with their checksums."""
    bytes: int = 0


@dataclass
class _Check:
    uri: str
    progress: Progress
    found: Findings = field(default_factory=Findings)
    done: dict[tuple[str, str], bool] = field(default_factory=dict)
    """Table and path of each file that was compared, and whether it is sound."""
    total: int = 0

    def problem(self, sentence: str) -> None:
        if sentence not in self.found.problems:
            self.found.problems.append(sentence)

    def files(self, sums: Sealed, needed: bool) -> bool:
        """Compare files with their sums, each only once; whether all are sound.

        Files of a version that is neither pinned nor the newest may be gone, but not altered.
        """
        new = [(table, file) for table, file in sums if (table, file.path) not in self.done]
        self.total += sum(file.bytes for _, file in new)
        with ThreadPoolExecutor(THREADS) as pool:
            for (table, file), now in zip(new, pool.map(self._sum, new), strict=True):
                self.done[table, file.path] = now == file
                self.found.files += 1
                self.found.bytes += file.bytes
                self.progress(self.found.bytes, self.total)
                if now != file and (needed or now is not None):
                    self.problem(f"{table}/{file.path} {_difference(file, now)}")
        return all(self.done[table, file.path] for table, file in sums)

    def _sum(self, item: tuple[str, FileSum]) -> FileSum | None:
        table, file = item
        try:
            return file_sum(child(self.uri, table), file.path)
        except FileNotFoundError:
            return None
        except OSError:
            return FileSum(file.path, -1, "")


def verify(uri: str, progress: Progress = lambda done, total: None) -> Findings:
    """Verify all versions of a store.

    Args:
        uri: folder or URL of a store.
        progress: called with bytes done and bytes known so far.

    Returns:
        What was found; without problems the store is whole, to the last byte.

    Raises:
        UserError: if there is no store.
    """
    if not table_exists(child(uri, "manifest")):
        raise no_store(uri)
    check = _Check(uri, progress)
    versions = versions_of(child(uri, "manifest"))
    named = seals(uri)
    newest = max([*versions, *(int(name) for name in named if name.isdecimal())], default=0)
    needed = {newest, *_pinned(check)}
    for version in sorted({*versions, *needed}, reverse=True):
        _check_version(check, version, version in needed, str(version) in named)
    _check_pins(check, PINS in named)
    _check_hints(check)
    _note_leftovers(check)
    return check.found


def _check_version(check: _Check, version: int, needed: bool, sealed: bool) -> None:
    sums = read_seal(check.uri, str(version)) if sealed else None
    if sums is None:
        state = "was altered" if sealed else "is absent"
        check.problem(
            f"seals/{version}.json {state}: Lance's own files of version {version} cannot be checked; to pin "
            "this version makes the seal anew"
        )
    elif not check.files(sums, needed):
        broken = [file.path for table, file in sums if not check.done[table, file.path]]
        if not all(path.startswith("_transactions/") for path in broken):  # those are never read
            if needed:
                check.problem(f"the rest of version {version} was not compared: its own files are damaged")
            return
    try:
        store = Store(check.uri, version)
        rows = _rows_of_checksums(store)
        parts = {name: data_files(store.records if name == "records" else store.texts) for name in PARTS}
        if table_exists(child(check.uri, REJECTED)):
            table = open_table(child(check.uri, REJECTED), store.manifest.tables.get(REJECTED))
            parts[REJECTED] = data_files(table)
    except UserError as error:
        if needed:
            check.problem(str(error))
        return
    known = {(table, file.path) for table, file in rows}
    for name, paths in parts.items():
        for path in paths:
            if (name, path) not in known:
                check.problem(f"{name}/{path} has no checksum in version {version}")
    used = {(name, path) for name, paths in parts.items() for path in paths}
    if check.files([(table, file) for table, file in rows if (table, file.path) in used], needed):
        with reading(f"version {version} of {check.uri}"):
            for sentence in row_problems(store):
                check.problem(f"version {version}: {sentence}")


def _rows_of_checksums(store: Store) -> Sealed:
    with reading(f"the checksums of version {store.version} of {store.uri}"):
        rows = store.checksums.to_table().to_pylist()
    return [(row["table"], FileSum(row["path"], row["bytes"], row["digest"])) for row in rows]


def _difference(file: FileSum, now: FileSum | None) -> str:
    if now is None:
        return "is absent"
    if now.bytes < 0:
        return "cannot be read"
    if now.bytes != file.bytes:
        return f"has {now.bytes:,} bytes instead of {file.bytes:,}"
    return "was altered: its checksum is another one"


def _pinned(check: _Check) -> list[int]:
    """Versions of the store that are pinned."""
    try:
        with reading(f"the pins of {check.uri}"):
            tags = open_table(child(check.uri, "manifest")).tags.list()
            return [int(info["version"]) for info in tags.values()]
    except UserError as error:
        check.problem(str(error))
        return []


def _check_pins(check: _Check, sealed: bool) -> None:
    found = [(table, path) for table in ALL_TABLES for path in listing(child(check.uri, table), "_refs")]
    sums = read_seal(check.uri, PINS) if sealed else None
    if sums is not None:
        check.files(sums, needed=True)
        for table, path in set(found) - {(table, file.path) for table, file in sums}:
            check.problem(f"{table}/{path} has no checksum; pin that version again")
    elif sealed or found:
        state = "was altered" if sealed else "is absent"
        check.problem(f"seals/{PINS}.json {state}: the pins cannot be checked")


def _check_hints(check: _Check) -> None:
    """Lance's hint at the newest version of a table is made anew with each; it must name that one."""
    for table in ALL_TABLES:
        uri = child(check.uri, table)
        for path in listing(uri, "_versions"):
            newest = max(versions_of(uri), default=0)
            if path.endswith(".json"):
                check.done[table, path] = read_bytes(uri, path) == f'{{"version":{newest}}}'.encode()
                if not check.done[table, path]:
                    check.problem(f"{table}/{path} was altered: it does not name version {newest}")


def _note_leftovers(check: _Check) -> None:
    jobs = {path.split("/")[1] for path in listing(check.uri, ".work")}
    for job in sorted(jobs):
        check.found.notes.append(f"the job {job} has not ended; give its command again")
    left = [
        (table, path)
        for table in ALL_TABLES
        for path in listing(child(check.uri, table), "")
        if (table, path) not in check.done
    ]
    if left:
        check.found.notes.append(
            f"{len(left)} files belong to no version or only to steps between versions (the first is "
            f"{'/'.join(left[0])}); shoestring data clean removes them"
        )
