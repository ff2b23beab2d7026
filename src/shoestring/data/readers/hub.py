"""Tables of pictures: Parquet files, and data sets of the Hugging Face hub or saved from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from shoestring.data.readers.base import Options, plan, to_picture
from shoestring.data.records import Picture, Rejection
from shoestring.runtime import UserError

BATCH = 64


class ParquetReader:
    """Rows of Parquet files with a picture in each; ids are file and row, as in ``train-00001/17``.

    Names of classes come from what the Hugging Face libraries write into the files.
    """

    credit = ""

    def __init__(
        self,
        path: str,
        options: Options,
        kind: str = "parquet",
        files: Sequence[Path] | None = None,
        class_names: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Read the footers of all files.

        Args:
            path: a file, or a folder that is searched to any depth.
            options: ``image``, ``captions``, ``id`` and ``numbers`` are columns; ``images`` is where pictures
                lie that a column only names.
            kind: of the source, for what the store says of itself.
            files: instead of those found.
            class_names: of columns of which the files themselves name none.

        Raises:
            UserError: if there is no file, one is damaged, or a column is missing.
        """
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise UserError(
                f"{kind}:{path} needs the package pyarrow; run: pip install 'shoestring[demo]'"
            ) from error
        self.kind, self.path, self.options = kind, path, options
        self._root = Path(path) if Path(path).is_dir() else Path(path).parent
        self._files = list(files) if files is not None else _parquet_files(Path(path))
        self._rows: list[int] = []
        for file in self._files:
            with _reading(file), parquet.ParquetFile(file) as opened:
                schema = opened.schema_arrow
                self._rows.append(opened.metadata.num_rows)
            if len(self._rows) == 1:
                names = {**(class_names or {}), **_class_names(schema.metadata)}
                self._plan = plan(str(file), schema.names, options, names)
            else:
                missing = [name for name in self._plan.columns if name not in schema.names]
                if missing:
                    raise UserError(
                        f"{file} has no column {missing[0]!r}, unlike {self._files[0]}; they must be alike"
                    )
        self.total: int | None = sum(self._rows)

    def items(self, start: int = 0) -> Iterator[Picture | Rejection]:
        """Rows in the order of the names of the files; whole row groups are passed over unread."""
        import pyarrow.parquet as parquet

        for file, rows in zip(self._files, self._rows, strict=True):
            if start >= rows:
                start -= rows
                continue
            name = file.relative_to(self._root).with_suffix("").as_posix()
            with _reading(file), parquet.ParquetFile(file) as opened:
                row, groups = 0, list(range(opened.num_row_groups))
                while groups and row + opened.metadata.row_group(groups[0]).num_rows <= start:
                    row += opened.metadata.row_group(groups.pop(0)).num_rows
                for batch in opened.iter_batches(BATCH, row_groups=groups, columns=self._plan.columns):
                    first = min(max(0, start - row), len(batch))
                    for i, record in enumerate(batch.slice(first).to_pylist(), start=row + first):
                        yield to_picture(self._plan, f"{name}/{i}", record)
                    row += len(batch)
            start = 0


class _reading:  # noqa: N801 (reads as a verb where it is used)
    """Errors of pyarrow on a file as a sentence."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        import pyarrow

        if isinstance(error, (pyarrow.ArrowException, OSError)):
            raise UserError(
                f"cannot read {self._file} as parquet: {' '.join(str(error).split())}; copy it again"
            ) from error


def _parquet_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(
        file
        for file in path.rglob("*.parquet")
        if not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise UserError(f"{path} is no file that ends in .parquet, nor a folder with some")
    return files


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Names of classes by column, from the notes that Hugging Face's libraries add to a schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: [str(each) for each in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and isinstance(feature.get("names"), list)
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


class HubReader:
    """A data set of the hub, streamed, or a folder that ``save_to_disk`` wrote; ids are split and row."""

    kind = "hf"
    credit = ""

    def __init__(self, path: str, options: Options) -> None:
        """Open it; for the hub this needs a network.

        Args:
            path: ``owner/name``, ``owner/name:configuration``, or a saved folder.
            options: columns as for :class:`ParquetReader`; ``split``: one, or several joined by ``+``.

        Raises:
            UserError: if it cannot be reached or read, or has no such split or column.
        """
        try:
            import datasets
            import huggingface_hub
        except ImportError as error:
            raise UserError(
                f"hf:{path} needs the package {error.name}; run: pip install 'shoestring[hub]', or download "
                "the data set's Parquet files and give their folder"
            ) from error
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()
        huggingface_hub.logging.set_verbosity_error()
        self.path, self.options = path, options
        found = _load_saved(path) if Path(path).is_dir() else _load_hub(path)
        self._data: dict[str, Any] = {}
        for split, data in _choose(path, found, options.split).items():
            features: dict[str, Any] = data.features or dict.fromkeys(next(iter(data), {}))
            names = {key: list(value.names) for key, value in features.items() if hasattr(value, "names")}
            self._plan = plan(f"hf:{path}", list(features), options, names)
            # Bytes as they are: decoding here would be thrown away, and would fail on a broken picture.
            if isinstance(features[self._plan.image], datasets.Image):
                data = data.cast_column(self._plan.image, datasets.Image(decode=False))
            self._data[split] = data.select_columns(self._plan.columns)
        counts = [_count(split, data) for split, data in self._data.items()]
        self.total: int | None = None if None in counts else sum(count or 0 for count in counts)

    def items(self, start: int = 0) -> Iterator[Picture | Rejection]:
        """Rows in the order of the data set."""
        first, *others = self._data.items()
        # One split can pass over rows unread; of several, those before the start are read.
        rows = islice(
            chain(self._rows(*first, 0 if others else start), *(self._rows(*part) for part in others)),
            start if others else 0,
            None,
        )
        try:
            for place, record in rows:
                yield to_picture(self._plan, place, record)
        except UserError:
            raise
        except Exception as error:  # whatever the network, the file system or a decompressor raise
            raise UserError(
                f"hf:{self.path} cannot be read on ({_short(error)}); give the same command to go on"
            ) from error

    def _rows(self, split: str, data: Any, start: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if not hasattr(data, "select"):
            rest = data.skip(start)
        else:
            rest = data.select(range(start, len(data))) if start < len(data) else ()
        for i, record in enumerate(rest, start=start):
            yield f"{split}/{i}", record


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _load_saved(path: str) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(path)
    except Exception as error:  # FileNotFoundError, and what pyarrow raises on damaged files
        raise UserError(
            f"{path} is no folder that datasets' save_to_disk wrote, or is damaged ({_short(error)})"
        ) from error


def _load_hub(path: str) -> Any:
    import datasets

    name, _, configuration = path.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, streaming=True)
    except Exception as error:  # the library raises of every kind: network, names, formats
        raise UserError(
            f"hf:{path} cannot be opened ({_short(error)}); check the name (owner/name on huggingface.co), "
            "the network and, for a set behind a licence, your login"
        ) from error


def _choose(path: str, found: Any, split: str | None) -> dict[str, Any]:
    """The splits that are wanted."""
    splits = dict(found) if isinstance(found, dict) else {str(found.split or "all"): found}
    if split is None and len(splits) == 1:
        return splits
    names = [] if split is None else split.split("+")
    unknown = [name for name in names if name not in splits]
    if not names or unknown:
        what = f"no split {unknown[0]!r}" if unknown else "several splits"
        raise UserError(f"hf:{path} has {what}; choose with --split from {', '.join(splits)} (joined by +)")
    return {name: splits[name] for name in names}


def _count(split: str, data: Any) -> int | None:
    if hasattr(data, "__len__"):
        return len(data)
    known = (data.info.splits or {}).get(split)
    return None if known is None else known.num_examples
