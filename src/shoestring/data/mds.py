"""Folders in MDS, the format in which MicroDiT, PRX and Nitro-E keep their data: reader and writer.

A folder has shards and an ``index.json`` that describes them. A shard is: the number of samples n, n + 1
offsets from its beginning (all uint32, little-endian), its settings as JSON, the samples. A sample is: the
sizes of its values of variable size (uint32 each, in the order of the columns), then all values.

Source: the format as mosaicml-streaming 0.13 writes it. That package itself needs torchvision.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from shoestring.data.mds_values import ENCODINGS, decode, encode, size_of
from shoestring.runtime import UserError

COMPRESSIONS = {"zstd": "zstd", "gz": "gzip", "bz2": "bz2", "br": "brotli"}
SIZE_LIMIT = 1 << 26


@dataclass(frozen=True)
class _File:
    """A file that the index names."""

    path: Path
    bytes: int
    hashes: Mapping[str, str]


@dataclass(frozen=True)
class _Shard:
    """A shard as the index describes it."""

    raw: _File
    packed: _File | None
    """What was written instead, if it is compressed."""
    compression: str
    samples: int
    names: tuple[str, ...]
    encodings: tuple[str, ...]
    sizes: tuple[int | None, ...]

    @property
    def file(self) -> _File:
        """What there is to read: perhaps it was unpacked already."""
        return self.raw if self.packed is None or self.raw.path.is_file() else self.packed


class MDSFolder:
    """A folder in MDS: its samples in order, each a dictionary.

    Values: texts, numbers and JSON as Python's own, arrays as numpy's, pictures (``jpeg``, ``png`` and
    ``pil``) as the bytes of a file. Samples in order are quick; at random a compressed shard is unpacked
    whenever another one was read before.
    """

    def __init__(self, path: Path | str) -> None:
        """Read the index, or those of all folders below, and look for the shards.

        Args:
            path: a folder with ``index.json`` (whose shards may lie in folders below), or a folder of such
                folders.

        Raises:
            UserError: if there is no index, it cannot be read, shards are absent or of another size than it
                says, or a column has an encoding that is not known or not safe.
        """
        self.path = Path(path)
        self._shards = [shard for folder in _indexed(self.path) for shard in _read_index(folder)]
        if not self._shards:
            raise UserError(f"{self.path}: its index.json lists no shard; there is nothing to read")
        first = self._shards[0]
        self.columns: dict[str, str] = dict(zip(first.names, first.encodings, strict=True))
        """Name to encoding."""
        self.unchecked_hashes: tuple[str, ...] = ()
        """Kinds of hashes in the index that are not checked, as xxhash is not installed or does not know."""
        for shard in self._shards:
            _check_columns(shard, self.columns)
        _check_files(self._shards)
        used = {kind for shard in self._shards for kind in shard.file.hashes}
        self.unchecked_hashes = tuple(sorted(kind for kind in used if _hasher(kind) is None))
        self._ends = np.cumsum([shard.samples for shard in self._shards])
        self._checked: set[int] = set()
        self._current: tuple[int, _Samples] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        number, row = self._find(i)
        current = self._current
        if current is None or current[0] != number:
            current = number, _Samples(self._shards[number], check=number not in self._checked)
            self._checked.add(number)
            self._current = current
        return current[1][row]

    def name(self, i: int) -> str:
        """Where a sample is.

        Args:
            i: its number.

        Returns:
            The shard, relative to the folder, and the number in it: ``0/shard.00003.mds/5``.
        """
        number, row = self._find(i)
        return f"{self._shards[number].raw.path.relative_to(self.path).as_posix()}/{row}"

    def _find(self, i: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._ends, i, side="right"))
        return number, i - int(self._ends[number]) + self._shards[number].samples


# -- the index ---------------------------------------------------------------------------------------------


def _indexed(folder: Path) -> list[Path]:
    """The folder itself if it has an index, else all below that have one, 2 before 10."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder that holds index.json and the shards")
    if (folder / "index.json").is_file():
        return [folder]

    def natural(path: Path) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", path.relative_to(folder).as_posix())
        return [(int(part) if part.isdecimal() else 0, part) for part in parts]

    below = (index.parent for index in folder.rglob("index.json"))
    # A hidden folder is one that a writer did not finish.
    whole = (path for path in below if not any(p.startswith(".") for p in path.relative_to(folder).parts))
    found = sorted(whole, key=natural)
    if not found:
        raise UserError(f"{folder} holds no index.json, nor does a folder below it; it is no MDS folder")
    return found


def _read_index(folder: Path) -> list[_Shard]:
    path = folder / "index.json"
    try:
        index = json.loads(path.read_bytes())
        if index["version"] != 2:
            raise UserError(f"{path} is of version {index['version']!r}; only version 2 can be read")
        return [_shard(folder, values) for values in index["shards"]]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is not an index of MDS shards ({type(error).__name__}: {error}); put it back from a copy"
        ) from error


def _shard(folder: Path, values: dict[str, Any]) -> _Shard:
    if values["format"] != "mds":
        raise UserError(f"{folder / 'index.json'}: shards of format {values['format']!r}; only mds is read")
    names = tuple(map(str, values["column_names"]))
    encodings = tuple(map(str, values["column_encodings"]))
    sizes = tuple(None if size is None else int(size) for size in values["column_sizes"])
    if not len(names) == len(encodings) == len(sizes) > 0:
        raise ValueError("the columns do not fit together")
    packed = None if values.get("zip_data") is None else _file(folder, values["zip_data"])
    compression = (values.get("compression") or "").partition(":")[0]
    samples = int(values["samples"])
    return _Shard(_file(folder, values["raw_data"]), packed, compression, samples, names, encodings, sizes)


def _file(folder: Path, values: dict[str, Any]) -> _File:
    name = str(values["basename"]).replace("\\", "/")
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or not parts:
        raise UserError(f"{folder / 'index.json'} names the shard {name!r}, which is not inside the folder")
    return _File(folder / name, int(values["bytes"]), dict(values["hashes"]))


def _check_columns(shard: _Shard, columns: dict[str, str]) -> None:
    path, mine = shard.raw.path, dict(zip(shard.names, shard.encodings, strict=True))
    if mine != columns:
        raise UserError(
            f"{path} has the columns {mine}, the first shard {columns}; all shards of a folder must have "
            "equal columns"
        )
    for name, encoding, size in zip(shard.names, shard.encodings, shard.sizes, strict=True):
        if encoding.partition(":")[0] == "pkl":
            raise UserError(
                f"{path}: the column {name} holds pickled objects, which could run any program when they are "
                "read; write the folder anew with another encoding"
            )
        try:
            known = size_of(encoding)
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{path}: the column {name} has the encoding {encoding!r}, which is not known; known are "
                f"{', '.join(ENCODINGS)}"
            ) from None
        if known != size:
            raise UserError(
                f"{path}: index.json gives {size} bytes a value to the column {name}, but {encoding} has "
                f"{known or 'no fixed size'}; put it back from a copy"
            )


def _check_files(shards: list[_Shard]) -> None:
    wrong = []
    for shard in shards:
        file = shard.file
        if not file.path.is_file():
            wrong.append(f"{file.path} is absent")
        elif (size := file.path.stat().st_size) != file.bytes:
            wrong.append(f"{file.path} has {size:,} bytes instead of {file.bytes:,}")
    if wrong:
        more = f" (and {len(wrong) - 1} more of {len(shards)} shards)" if len(wrong) > 1 else ""
        raise UserError(f"{wrong[0]}{more}, by its index.json; copy the folder again")


# -- shards ------------------------------------------------------------------------------------------------


class _Samples:
    """The samples of one shard."""

    def __init__(self, shard: _Shard, check: bool) -> None:
        self.shard = shard
        self.data = _content(shard, check)
        try:
            count = int(np.frombuffer(self.data[:4], "<u4")[0])
            self.offsets = np.frombuffer(self.data[4 : 8 + 4 * count], "<u4").astype(np.int64)
            whole = len(self.offsets) == count + 1 and self.offsets[-1] == len(self.data)
            sound = whole and self.offsets[0] >= 8 + 4 * count and bool((np.diff(self.offsets) >= 0).all())
        except (ValueError, IndexError):
            count, sound = 0, False
        if not sound or count != shard.samples:
            raise UserError(f"{shard.raw.path} is damaged: its offsets do not fit; copy it again")

    def __getitem__(self, row: int) -> dict[str, Any]:
        data = self.data[self.offsets[row] : self.offsets[row + 1]]
        variable = self.shard.sizes.count(None)
        told = iter(np.frombuffer(data[: 4 * variable], "<u4").tolist() if len(data) >= 4 * variable else [])
        at, sample = 4 * variable, {}
        for name, encoding, size in zip(
            self.shard.names, self.shard.encodings, self.shard.sizes, strict=True
        ):
            length = next(told, len(data) + 1) if size is None else size
            if at + length > len(data):
                raise self._damaged(row, name, "its size does not fit")
            try:
                sample[name] = decode(encoding, data[at : at + length])
            except (ValueError, TypeError, KeyError, IndexError, ArithmeticError, RecursionError) as error:
                raise self._damaged(row, name, str(error)) from error
            at += length
        if at != len(data):
            raise self._damaged(row, "", "it is longer than its values")
        return sample

    def _damaged(self, row: int, name: str, reason: str) -> UserError:
        column = f", column {name}" if name else ""
        return UserError(f"{self.shard.raw.path}: sample {row}{column} is damaged ({reason}); copy it again")


def _content(shard: _Shard, check: bool) -> mmap.mmap | bytes:
    """A shard, unpacked and (where asked for) compared with its hashes."""
    file = shard.file
    try:
        with file.path.open("rb") as opened:
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file.path} ({error}); copy it again") from error
    if check:
        for kind, expected in file.hashes.items():
            hasher = _hasher(kind)
            if hasher is not None and hasher(data) != expected:
                raise UserError(f"{file.path} is damaged: index.json has another {kind}; copy it again")
    return data if file is shard.raw else _unpack(data, shard)


def _unpack(data: mmap.mmap, shard: _Shard) -> bytes:
    assert shard.packed is not None
    if shard.compression not in COMPRESSIONS:
        raise UserError(
            f"{shard.packed.path} is compressed by {shard.compression}; only {', '.join(COMPRESSIONS)} are "
            "known, so unpack it first"
        )
    import pyarrow as pa

    try:
        stream = pa.CompressedInputStream(pa.BufferReader(data), COMPRESSIONS[shard.compression])
        raw: bytes = stream.read(shard.raw.bytes + 1)  # never more, whatever a compressed file pretends
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{shard.packed.path} cannot be unpacked ({error}); copy it again") from error
    if len(raw) != shard.raw.bytes:
        raise UserError(
            f"{shard.packed.path} does not unpack to the {shard.raw.bytes:,} bytes of its index: copy it"
        )
    return raw


def _hasher(kind: str) -> Callable[[Any], str] | None:
    """A function that hashes a buffer to hexadecimal, or ``None`` if this kind cannot be checked here."""
    if kind in hashlib.algorithms_guaranteed and not kind.startswith("shake"):
        return lambda data: hashlib.new(kind, data, usedforsecurity=False).hexdigest()
    try:
        import xxhash
    except ImportError:
        return None
    function: Callable[[Any], str] | None = getattr(xxhash, f"{kind}_hexdigest", None)
    return function


# -- writer ------------------------------------------------------------------------------------------------


def write_mds(
    folder: Path | str,
    columns: Mapping[str, str],
    samples: Iterable[Mapping[str, Any]],
    size_limit: int = SIZE_LIMIT,
) -> int:
    """Write a folder in MDS, uncompressed, with SHA-1 of every shard; it appears whole or not at all.

    Args:
        folder: must not exist, or be empty.
        columns: name to encoding; ``jpeg`` and ``png`` take the bytes of a file.
        samples: a value for each column, in order.
        size_limit: bytes of a shard; a larger sample gets a shard of its own.

    Returns:
        Number of samples.

    Raises:
        UserError: if the folder is in use, the disk is full, or there is no sample.
    """
    folder = Path(folder)
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists already and is not an empty folder; choose another")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); choose another folder") from error
    try:
        count = _write_shards(temporary, columns, samples, size_limit)
        temporary.chmod(folder.parent.stat().st_mode & 0o777)
        temporary.replace(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot write to {folder} ({error.strerror or error}); nothing was left behind: make room or "
            "choose another folder"
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return count


def _write_shards(
    folder: Path, columns: Mapping[str, str], samples: Iterable[Mapping[str, Any]], size_limit: int
) -> int:
    names = sorted(columns)
    encodings = [columns[name] for name in names]
    sizes = [size_of(encoding) for encoding in encodings]
    settings = {
        "column_encodings": encodings,
        "column_names": names,
        "column_sizes": sizes,
        "compression": None,
        "format": "mds",
        "hashes": ["sha1"],
        "size_limit": size_limit,
        "version": 2,
    }
    head = json.dumps(settings, sort_keys=True).encode()
    shards: list[dict[str, Any]] = []
    waiting: list[bytes] = []

    def flush() -> None:
        data = _pack_shard(head, waiting)
        name = f"shard.{len(shards):05}.mds"
        (folder / name).write_bytes(data)
        digest = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        raw = {"basename": name, "bytes": len(data), "hashes": {"sha1": digest}}
        shards.append({**settings, "raw_data": raw, "samples": len(waiting), "zip_data": None})
        waiting.clear()

    total, empty = 0, 8 + len(head)
    filled = empty
    for sample in samples:
        values = [encode(columns[name], sample[name]) for name in names]
        told = [len(value) for value, fixed in zip(values, sizes, strict=True) if fixed is None]
        data = np.array(told, "<u4").tobytes() + b"".join(values)
        if waiting and filled + len(data) + 4 > size_limit:
            flush()
            filled = empty
        waiting.append(data)
        filled += len(data) + 4
        total += 1
    if not total:
        raise UserError("there is no sample to write")
    flush()
    (folder / "index.json").write_text(json.dumps({"shards": shards, "version": 2}, sort_keys=True))
    return total


def _pack_shard(head: bytes, samples: list[bytes]) -> bytes:
    begin = 8 + 4 * len(samples) + len(head)
    offsets = list(accumulate((len(sample) for sample in samples), initial=begin))
    return np.array([len(samples), *offsets], "<u4").tobytes() + head + b"".join(samples)
