"""Reads caption files: ``metadata.jsonl``, ``.csv`` or ``.parquet``, each row a picture and its captions."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoestring.runtime import UserError

NAME_COLUMNS = ("file_name", "image", "path")
TEXT_COLUMNS = ("caption", "text")


@dataclass(frozen=True)
class Columns:
    """Which columns of a caption file are read."""

    names: tuple[str, ...] = NAME_COLUMNS
    """Of the picture; the first that a row has."""
    texts: tuple[str, ...] = ()
    """Of captions, all of them; none named: the first of ``caption`` and ``text`` that a row has."""
    numbers: tuple[str, ...] = ()
    """To filter by."""

    @property
    def named(self) -> tuple[str, ...]:
        """Those that somebody asked for, which have to be there."""
        return (*(() if self.names == NAME_COLUMNS else self.names), *self.texts, *self.numbers)

    @property
    def wanted(self) -> set[str]:
        """All of them."""
        return {*self.names, *(self.texts or TEXT_COLUMNS), *self.numbers}


DEFAULT = Columns()


@dataclass(frozen=True)
class Row:
    """One row of a caption file. ``captions`` is empty where the row has none."""

    name: str
    captions: tuple[str, ...]
    line: int
    numbers: dict[str, float]
    """Only those that are numbers."""


def read_rows(path: Path, columns: Columns = DEFAULT) -> list[Row]:
    """Read a caption file.

    Args:
        path: ends in ``.jsonl``, ``.csv`` or ``.parquet``; text is UTF-8.
        columns: those that are read, ``file_name`` (or ``image``, ``path``) and ``caption`` (or ``text``)
            by default; others are ignored. A list of texts is several captions.

    Returns:
        The rows; ``line`` counts from 1 (csv: the header is line 1; parquet: rows).

    Raises:
        UserError: if the file cannot be read; the sentence names the line.
    """
    rows, known = [], set[str]()
    for line, record in READERS[path.suffix.lower()](path, columns):
        rows.append(_row(path, line, record, columns))
        known.update(record)
    if rows:
        check_names(path, sorted(known), (*columns.texts, *columns.numbers))
    return rows


def _row(path: Path, line: int, record: dict[str, Any], columns: Columns) -> Row:
    name = next((record[key] for key in columns.names if record.get(key)), None)
    if not isinstance(name, str):
        raise UserError(
            f"{path}: line {line} names no picture; a row needs {_either(columns.names)} as text and "
            f"{_either(columns.texts or TEXT_COLUMNS)}, found {', '.join(map(str, record)) or 'nothing'}"
        )
    values = [record[key] for key in columns.texts or TEXT_COLUMNS if record.get(key) is not None]
    captions: list[str] = []
    for value in values if columns.texts else values[:1]:
        texts = texts_of(value)
        if texts is None:
            raise UserError(f"{path}: line {line}: the caption of {name} is {value!r}; it must be text")
        captions += texts
    return Row(name, tuple(captions), line, numbers_of(record, columns.numbers))


def texts_of(value: Any) -> tuple[str, ...] | None:
    """The captions in a value: a text, or a list of texts; ``None`` where it is neither."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value):
        return tuple(value)
    return None


def numbers_of(record: dict[str, Any], names: tuple[str, ...]) -> dict[str, float]:
    """The named values of a record that are numbers, also those written as text."""
    found = {}
    for name in names:
        try:
            number = float(record[name])
        except (KeyError, TypeError, ValueError):
            continue
        if not math.isnan(number):
            found[name] = number
    return found


def plain(text: str) -> str:
    """A caption as it is kept: one line with single spaces."""
    # JSON may carry halves of surrogate pairs, which no tokenizer takes.
    return " ".join(text.encode("utf-8", "replace").decode().split())


def check_names(where: object, have: Sequence[str], names: Sequence[str]) -> None:
    """Refuse columns that do not exist.

    Args:
        where: file or folder, for the message.
        have: columns that there are.
        names: columns that were asked for.

    Raises:
        UserError: if one is missing; the sentence lists what there is.
    """
    for name in names:
        if name not in have:
            raise UserError(
                f"{where} has no column {name!r}; it has {', '.join(have) or 'no columns'}; name one of them"
            )


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(names)


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line} is not UTF-8 text; save the file as UTF-8") from error


def _jsonl(path: Path, _: Columns) -> Iterable[tuple[int, dict[str, Any]]]:
    # Not splitlines(): JSON strings may hold the other line breaks of Unicode as they are.
    for line, text in enumerate(_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {line} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise UserError(
                f'{path}: line {line} is not an object like {{"file_name": "...", "caption": "..."}}'
            )
        yield line, record


def _csv(path: Path, columns: Columns) -> Iterable[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        _check_columns(path, list(reader.fieldnames or []), columns)
        for record in reader:
            if None in record:  # too many values; without this check the caption would be cut at its comma
                raise UserError(
                    f"{path}: line {reader.line_num} has more values than the header; put captions with "
                    "commas in double quotes"
                )
            yield reader.line_num, record
    except csv.Error as error:
        # line_num is that of the last good record; a quote left open has by now eaten all that follows.
        raise UserError(f"{path}: line {reader.line_num + 1} is not CSV: {error}") from error


def _parquet(path: Path, columns: Columns) -> Iterable[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_columns(path, names, columns)
            records = file.read(columns=[name for name in names if name in columns.wanted]).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path} as parquet: {' '.join(str(error).split())}") from error
    yield from enumerate(records, start=1)


def _check_columns(path: Path, have: list[str], columns: Columns) -> None:
    for wanted in (columns.names, columns.texts or TEXT_COLUMNS):
        if not set(wanted).intersection(have):
            raise UserError(
                f"{path}: line 1: no column {_either(wanted)} among {', '.join(have) or 'no columns'}"
            )
    check_names(path, have, (*columns.texts, *columns.numbers))


READERS: dict[str, Callable[[Path, Columns], Iterable[tuple[int, dict[str, Any]]]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}
