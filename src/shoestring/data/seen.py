"""What ingestion remembers of the pictures that it kept: short hashes, in memory and beside the journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoestring.data.duplicates import Looks, short_digest
from shoestring.data.filters import Filters
from shoestring.runtime import UserError, atomic_write

DIGEST = 16
COLOURS = 12


@dataclass(frozen=True)
class Mark:
    """One picture."""

    id: bytes
    """Digest of its id."""
    file: bytes
    """Digest of its file."""
    look: tuple[int, bytes] | None
    """Only where look-alikes are left out."""


class Seen:
    """Marks of all kept pictures, numbered as the records, and the rows of all captions."""

    def __init__(self, filters: Filters) -> None:
        """Begin with nothing.

        Args:
            filters: which duplicates are looked for.
        """
        self._ids: dict[bytes, int] = {}
        self._files: dict[bytes, int] | None = {} if filters.equal_files else None
        self._texts: dict[bytes, int] = {}
        self.looks = None if filters.look_alikes is None else Looks(filters.look_alikes)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def texts(self) -> int:
        """Distinct captions."""
        return len(self._texts)

    def same_id(self, digest: bytes) -> int | None:
        """The record with the same id, or ``None``."""
        return self._ids.get(digest)

    def same_file(self, mark: Mark) -> int | None:
        """The record with the same file, or ``None``, also where nobody asked."""
        return None if self._files is None else self._files.get(mark.file)

    def same_look(self, mark: Mark) -> int | None:
        """The first record that looks alike, or ``None``, also where nobody asked."""
        return None if self.looks is None or mark.look is None else self.looks.near(mark.look)

    def add(self, mark: Mark) -> None:
        """A picture was kept.

        Args:
            mark: of the picture.
        """
        if self._files is not None:
            self._files.setdefault(mark.file, len(self))
        if self.looks is not None and mark.look is not None:
            self.looks.add(mark.look)
        self._ids[mark.id] = len(self)

    def rows(self, captions: Sequence[str], new: dict[bytes, str]) -> list[int]:
        """Rows of captions in the table of texts.

        Args:
            captions: of a picture.
            new: captions that get a row of their own are added here, in the order of the rows.

        Returns:
            A row each.
        """
        found = []
        for caption in captions:
            digest = short_digest(caption.encode())
            if digest not in self._texts:
                self._texts[digest] = len(self._texts)
                new[digest] = caption
            found.append(self._texts[digest])
        return found

    def remember(self, path: Path) -> None:
        """Add what :func:`save` wrote.

        Args:
            path: the file.

        Raises:
            UserError: if it cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                ids, files, texts = arrays["ids"], arrays["files"], arrays["texts"]
                bits, colours = arrays["bits"], arrays["colours"]
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(
                f"cannot read {path} ({error}), without which this job cannot go on; delete {path.parent} to "
                "begin again"
            ) from error
        for i in range(len(ids)):
            look = (int(bits[i]), colours[i].tobytes()) if len(bits) else None
            self.add(Mark(ids[i].tobytes(), files[i].tobytes(), look))
        for digest in texts:
            self._texts[digest.tobytes()] = len(self._texts)


def save(path: Path, marks: Sequence[Mark], texts: Sequence[bytes]) -> None:
    """Write what a unit adds, whole or not at all.

    Args:
        path: a new file.
        marks: of its pictures; all with a look, or none.
        texts: digests of the captions that were new.

    Raises:
        UserError: if it cannot be written.
    """
    looks = [mark.look for mark in marks if mark.look is not None]
    arrays = {
        "ids": _stack([mark.id for mark in marks], DIGEST),
        "files": _stack([mark.file for mark in marks], DIGEST),
        "texts": _stack(texts, DIGEST),
        "bits": np.array([bits for bits, _ in looks], dtype=np.uint64),
        "colours": _stack([colours for _, colours in looks], COLOURS),
    }

    def write(file: object) -> None:
        np.savez(file, allow_pickle=False, **arrays)  # type: ignore[arg-type]

    atomic_write(path, write)


def _stack(digests: Sequence[bytes], size: int) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(digests), size)
