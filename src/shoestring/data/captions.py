"""Reads caption files: ``metadata.jsonl``, ``.csv`` or ``.parquet``, each row a picture and its caption."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoestring.runtime import UserError

NAME_COLUMNS = ("file_name", "image", "path")
TEXT_COLUMNS = ("caption", "text")


@dataclass(frozen=True)
class Row:
    """One row of a caption file. ``caption`` is ``None`` where the row has none."""

    name: str
    caption: str | None
    line: int


def read_rows(path: Path) -> list[Row]:
    """Read a caption file.

    Args:
        path: ends in ``.jsonl``, ``.csv`` or ``.parquet``; text is UTF-8. Columns: ``file_name`` (or
            ``image``, ``path``) and ``caption`` (or ``text``); others are ignored.

    Returns:
        The rows; ``line`` counts from 1 (csv: the header is line 1; parquet: rows).

    Raises:
        UserError: if the file cannot be read; the sentence names the line.
    """
    return [_row(path, line, record) for line, record in READERS[path.suffix.lower()](path)]


def _row(path: Path, line: int, record: dict[str, Any]) -> Row:
    name = next((record[key] for key in NAME_COLUMNS if record.get(key)), None)
    if not isinstance(name, str):
        raise UserError(
            f"{path}: line {line} names no picture; a row needs {_either(NAME_COLUMNS)} as text and "
            f"{_either(TEXT_COLUMNS)}, found {', '.join(map(str, record)) or 'nothing'}"
        )
    caption = next((record[key] for key in TEXT_COLUMNS if record.get(key) is not None), None)
    if caption is not None and not isinstance(caption, str):
        raise UserError(f"{path}: line {line}: the caption of {name} is {caption!r}; it must be text")
    return Row(name, caption, line)


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


def _jsonl(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
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


def _csv(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        _check_columns(path, list(reader.fieldnames or []))
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


def _parquet(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{path.name} needs the package pyarrow; run: pip install 'shoestring[demo]'"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            _check_columns(path, columns)
            wanted = [name for name in columns if name in NAME_COLUMNS + TEXT_COLUMNS]
            records = file.read(columns=wanted).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path} as parquet: {' '.join(str(error).split())}") from error
    yield from enumerate(records, start=1)


def _check_columns(path: Path, columns: list[str]) -> None:
    for wanted in (NAME_COLUMNS, TEXT_COLUMNS):
        if not set(wanted).intersection(columns):
            raise UserError(
                f"{path}: line 1: no column {_either(wanted)} among {', '.join(columns) or 'no columns'}"
            )


READERS: dict[str, Callable[[Path], Iterable[tuple[int, dict[str, Any]]]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}
