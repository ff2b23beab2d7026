"""Readers: whatever pictures and captions lie in, as a stream of pictures and of what is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from shoestring.data.captions import READERS as CAPTION_FILES
from shoestring.data.folder import CAPTION_STEMS, SUFFIXES
from shoestring.data.readers.base import ON_COMMAND_LINE, TARS, Options, Reader
from shoestring.runtime import UserError

__all__ = ["READERS", "Options", "Reader", "open_reader"]

COLUMNS = ("image", "captions", "id", "numbers")
MAX_JSON = 1 << 31


def _folder(path: str, options: Options) -> Reader:
    from shoestring.data.readers.folder import FolderReader

    return FolderReader(path, options)


def _table(path: str, options: Options) -> Reader:
    from shoestring.data.readers.folder import TableReader

    return TableReader(path, options)


def _webdataset(path: str, options: Options) -> Reader:
    from shoestring.data.readers.webdataset import WebDatasetReader

    return WebDatasetReader(path, options)


def _parquet(path: str, options: Options) -> Reader:
    from shoestring.data.readers.hub import ParquetReader

    return ParquetReader(path, options)


def _hub(path: str, options: Options) -> Reader:
    from shoestring.data.readers.hub import HubReader

    return HubReader(path, options)


def _coco(path: str, options: Options) -> Reader:
    from shoestring.data.readers.coco import CocoReader

    return CocoReader(path, options)


def _mds(path: str, options: Options) -> Reader:
    from shoestring.data.readers.mds import MDSReader

    return MDSReader(path, options)


def _openmoji(path: str, options: Options) -> Reader:
    from shoestring.data.readers.drawn import OpenMojiReader

    return OpenMojiReader(path, options)


def _shapes(path: str, options: Options) -> Reader:
    from shoestring.data.readers.drawn import ShapesReader

    return ShapesReader(path, options)


def _cifar10(path: str, options: Options) -> Reader:
    from shoestring.data.cifar10 import CLASSES, CREDIT
    from shoestring.data.readers.drawn import cifar10_files
    from shoestring.data.readers.hub import ParquetReader

    files = cifar10_files(path, options.split)
    reader = ParquetReader(path, options, "cifar10", files, {"label": CLASSES})
    reader.credit = CREDIT
    return reader


@dataclass(frozen=True)
class Kind:
    """A kind of source."""

    open: Callable[[str, Options], Reader]
    takes: tuple[str, ...]
    """The options that it has a use for."""


READERS: dict[str, Kind] = {
    "folder": Kind(_folder, ("image", "captions", "numbers")),
    "table": Kind(_table, ("image", "captions", "numbers", "images")),
    "webdataset": Kind(_webdataset, COLUMNS),
    "parquet": Kind(_parquet, (*COLUMNS, "images")),
    "hf": Kind(_hub, (*COLUMNS, "split", "images")),
    "coco": Kind(_coco, ("images",)),
    "mds": Kind(_mds, COLUMNS),
    "openmoji": Kind(_openmoji, ("side",)),
    "shapes": Kind(_shapes, ("split", "side")),
    "cifar10": Kind(_cifar10, ("split",)),
}
WITHOUT_PATH = ("openmoji", "shapes")


def open_reader(spec: str, options: Options | None = None) -> Reader:
    """Open a source of pictures.

    Args:
        spec: ``KIND:PATH`` (see ``READERS``), ``openmoji``, ``shapes``, or a path alone, which is recognised
            by what lies there.
        options: how to read it; by default the usual names of columns are tried.

    Returns:
        The reader.

    Raises:
        UserError: if the source is missing or of no known kind, or has no use for an option.
    """
    options = options or Options()
    kind, colon, path = spec.partition(":")
    if kind not in READERS or (not colon and kind not in WITHOUT_PATH):
        kind, path, options = _recognise(spec, options)
    for field in fields(Options):
        if getattr(options, field.name) != field.default and field.name not in READERS[kind].takes:
            takes = ", ".join(ON_COMMAND_LINE[name] for name in READERS[kind].takes)
            raise UserError(
                f"{spec}: {ON_COMMAND_LINE[field.name]} was given, but {kind} has no use for it; it takes "
                f"{takes}"
            )
    return READERS[kind].open(path, options)


def _recognise(spec: str, options: Options) -> tuple[str, str, Options]:
    path = Path(spec)
    if spec.split("?")[0].endswith(TARS):
        return "webdataset", spec, options
    endings = {**dict.fromkeys(CAPTION_FILES, "table"), ".parquet": "parquet", ".json": "coco"}
    if path.is_file() and path.suffix.lower() in endings:
        return endings[path.suffix.lower()], spec, options
    if spec and path.is_dir():
        return _recognise_folder(path, options)
    if not spec:
        raise UserError("the source is empty; give a folder or file of pictures, or KIND:PATH")
    kinds = ", ".join(READERS)
    if path.is_file():
        raise UserError(f"{spec} is of no known kind; give a folder, a tar, .parquet, .jsonl, .csv or .json")
    raise UserError(
        f"{spec} does not exist, and is no source like KIND:PATH of the kinds {kinds}; a data set of the "
        f"Hugging Face hub is hf:{spec}"
    )


def _recognise_folder(path: Path, options: Options) -> tuple[str, str, Options]:
    files = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    names = {file.name for file in files}
    if "index.json" in names or any((file / "index.json").is_file() for file in files):
        return "mds", str(path), options
    if names & {"dataset_info.json", "state.json", "dataset_dict.json"}:
        return "hf", str(path), options
    if any(file.suffix.lower() in SUFFIXES for file in files):
        return "folder", str(path), options
    if any(file.name.endswith(TARS) for file in files):
        return "webdataset", str(path), options
    if any(file.suffix == ".parquet" and file.stem.lower() not in CAPTION_STEMS for file in files):
        return "parquet", str(path), options
    notes = [file for file in files if file.suffix == ".json" and _is_coco(file)]
    if len(notes) == 1:
        return "coco", str(notes[0]), replace(options, images=options.images or path)
    return "folder", str(path), options


def _is_coco(file: Path) -> bool:
    from shoestring.data.readers.coco import is_coco

    try:
        return file.stat().st_size < MAX_JSON and is_coco(json.loads(file.read_bytes()))
    except (OSError, ValueError, RecursionError):
        return False
