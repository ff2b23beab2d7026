"""MDS folders of ready latents to a store; their columns are those of :mod:`shoestring.data.mds_export`."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from shoestring import __version__
from shoestring.data.embeddings import pack
from shoestring.data.jobs import (
    Change,
    Meter,
    Progress,
    begin,
    commit,
    finished,
    pieces_of,
    tidy,
)
from shoestring.data.journal import Journal, work_folder
from shoestring.data.manifest import CaptionsColumn, LatentsColumn, Manifest, SourceFacts, TextColumn
from shoestring.data.mds import MDSFolder
from shoestring.data.mds_export import CAPTION, CAPTION_LATENTS
from shoestring.data.store import CAPTIONS, RECORDS, Store
from shoestring.data.tables import Piece, child, reading, write_piece
from shoestring.data.units import Sums
from shoestring.interfaces import Identity
from shoestring.runtime import UserError

JOB = "import-mds"


@dataclass(frozen=True)
class Declared:
    """What an MDS folder does not say of itself."""

    codec: Identity
    """What made the latents."""
    encoder: Identity | None = None
    """What made ``caption_latents``; needed where they are."""
    channels: int = 4
    """Of the latents."""
    width: int = 1024
    """Of the embeddings."""
    text_name: str = "text"
    """Name of the embeddings in the store."""
    text_dtype: Literal["int8", "float16"] = "float16"
    latents_scale: float = 1.0
    """Times this the stored values are model latents; MicroDiT's are."""
    licence: str = ""


@dataclass(frozen=True)
class _Layout:
    """The columns of the folder and those of the store."""

    declared: Declared
    latents: tuple[tuple[str, LatentsColumn], ...]
    text: TextColumn | None
    has_size: bool

    @property
    def records(self) -> pa.Schema:
        columns = [(column.column, pa.binary()) for _, column in self.latents]
        buckets = [(column.bucket_column, pa.int16()) for _, column in self.latents]
        return pa.schema([*RECORDS, ("caption_source", CAPTIONS), *columns, *buckets])

    @property
    def texts(self) -> pa.Schema:
        text = [] if self.text is None else [(name, pa.binary()) for name in self.text.columns[:-1]]
        true = [] if self.text is None else [(self.text.columns[-1], pa.int32())]
        return pa.schema([("text", pa.string()), *text, *true])


def import_mds(
    folder: Path | str,
    out: str,
    declared: Declared,
    unit_rows: int = 1024,
    progress: Callable[[Progress], None] | None = None,
) -> Store:
    """Make a store of an MDS folder of ready latents. Killed at any moment, the same call goes on.

    The latents are marked as draws. The folder does not say how long captions are, so all positions count
    as real, as MicroDiT attends to all. Equal captions are stored once, with the first one's embeddings.

    Args:
        folder: with ``latents_...`` and ``caption``, perhaps ``caption_latents``.
        out: folder or URL of the new store.
        declared: what the folder does not say.
        unit_rows: samples of a work unit.
        progress: called from time to time.

    Returns:
        The store; samples of another size or with values that are not finite are counted in its manifest.

    Raises:
        UserError: if the folder is damaged or has other columns, ``out`` is in use, or the disk is full.
    """
    done = finished(out, JOB)
    if done is not None:
        return done
    mds = MDSFolder(folder)
    layout = _layout(mds, declared)
    settings = asdict(declared) | {
        "folder": str(mds.path.resolve()),
        "samples": len(mds),
        "unit_rows": unit_rows,
    }
    journal = begin(out, JOB, None, settings)
    try:
        _units(mds, out, layout, unit_rows, journal, progress)
        store = _commit(mds, out, layout, unit_rows, journal.entries)
    finally:
        journal.close()
    tidy(store, work_folder(out, JOB))
    return store


def _layout(mds: MDSFolder, declared: Declared) -> _Layout:
    found = {name: match for name in mds.columns if (match := re.fullmatch(r"latents_(\d+)", name))}
    if not found or mds.columns.get(CAPTION) != "str":
        raise UserError(
            f"{mds.path} has the columns {', '.join(mds.columns)}; ready latents are called latents_256 and "
            "the like and have a caption: for pictures take shoestring data ingest"
        )
    if not len(mds):
        raise UserError(f"{mds.path} holds no samples")
    first = mds[0]
    latents = tuple(
        (name, _latents_column(mds, name, int(match[1]), len(_values(first[name])), declared))
        for name, match in found.items()
    )
    text = None
    if CAPTION_LATENTS in mds.columns:
        values = len(_values(first[CAPTION_LATENTS]))
        if values % declared.width or not values:
            raise UserError(
                f"{mds.path}: {CAPTION_LATENTS} has {values:,} values a caption, which is no multiple of the "
                f"width {declared.width}; give the width of its text encoder"
            )
        if declared.encoder is None:
            raise UserError(f"{mds.path} has {CAPTION_LATENTS}; name the text encoder that made them")
        text = TextColumn(
            name=declared.text_name,
            encoder=declared.encoder,
            width=declared.width,
            max_tokens=values // declared.width,
            positions="all",
            dtype=declared.text_dtype,
        )
    return _Layout(declared, latents, text, {"width", "height"} <= mds.columns.keys())


def _latents_column(
    mds: MDSFolder, name: str, resolution: int, values: int, declared: Declared
) -> LatentsColumn:
    side = math.isqrt(values // declared.channels)
    if side * side * declared.channels != values or not side or resolution % side:
        raise UserError(
            f"{mds.path}: {name} has {values:,} values a picture, which are no square of {declared.channels} "
            f"channels that divides {resolution} pixels; give the number of channels of its codec"
        )
    return LatentsColumn(
        name=str(resolution),
        codec=declared.codec,
        resolution=resolution,
        buckets=((resolution, resolution),),
        counts=(0,),
        channels=declared.channels,
        moment_channels=declared.channels,
        downsampling=resolution // side,
        dtype="float16",
        sampled=True,
        mean=(),
        std=(),
        sigma=0.0,
    )


def _values(value: Any) -> NDArray[np.float16]:
    """A value of MDS, bytes or an array, as flat float16."""
    if isinstance(value, bytes):
        return np.frombuffer(value[: len(value) // 2 * 2], "<f2")
    return np.asarray(value).astype(np.float16).ravel()


def _units(
    mds: MDSFolder,
    out: str,
    layout: _Layout,
    unit_rows: int,
    journal: Journal,
    progress: Callable[[Progress], None] | None,
) -> None:
    done = {(entry["unit"]["kind"], entry["unit"]["number"]): entry for entry in journal.entries}
    rows_done = sum(entry["unit"]["rows"] for (kind, _), entry in done.items() if kind == "records")
    meter = Meter({"records": len(mds)}, {"records": rows_done}, progress)
    row_of: dict[str, int] = {}
    for number, start in enumerate(range(0, len(mds), unit_rows)):
        records, texts = done.get(("records", number)), done.get(("texts", number))
        if records is not None and (texts is not None or not records["texts"]):
            if texts is not None:
                for word in _words(out, Piece.from_json(texts["piece"])):
                    row_of[word] = len(row_of)
            continue
        unit = {"number": number, "start": start, "rows": min(unit_rows, len(mds) - start)}
        record_rows, text_rows, sums, rejected = _read_unit(mds, layout, start, unit["rows"], row_of)
        if text_rows.num_rows and texts is None:
            piece = write_piece(child(out, "texts"), text_rows)
            journal.add({"unit": {"kind": "texts"} | unit, "piece": piece.to_json()})
        if records is None:
            piece = Piece("", 0, ())
            if record_rows.num_rows:
                piece = write_piece(child(out, "records"), record_rows)
            facts = {"texts": text_rows.num_rows, "sums": sums, "rejected": rejected}
            journal.add({"unit": {"kind": "records"} | unit, "piece": piece.to_json()} | facts)
            meter("records", unit["rows"])


def _words(out: str, piece: Piece) -> list[str]:
    """The texts of a piece that is not committed yet."""
    from lance.file import LanceFileReader

    (file,) = piece.files
    address = child(child(out, "texts"), file.path)
    with reading(address):
        words: list[str] = (
            LanceFileReader(address, columns=["text"]).read_all().to_table()["text"].to_pylist()
        )
    return words


def _read_unit(
    mds: MDSFolder, layout: _Layout, start: int, rows: int, row_of: dict[str, int]
) -> tuple[pa.Table, pa.Table, dict[str, Any], dict[str, int]]:
    """Records, new texts, sums of the latents by column, and why samples were left out."""
    records: list[dict[str, Any]] = []
    words: list[str] = []
    embeddings: list[NDArray[np.float16]] = []
    rejected: Counter[str] = Counter()
    side = max(column.resolution for _, column in layout.latents)
    for i in range(start, start + rows):
        sample = mds[i]
        reason = _unusable(sample, layout)
        if reason is not None:
            rejected[reason] += 1
            continue
        caption = sample[CAPTION]
        if caption not in row_of:
            row_of[caption] = len(row_of)
            words.append(caption)
            if layout.text is not None:
                embeddings.append(_values(sample[CAPTION_LATENTS]))
        record = {
            "id": f"{mds.path.resolve().name}/{mds.name(i)}",
            "width": sample["width"] if layout.has_size else side,
            "height": sample["height"] if layout.has_size else side,
            "caption_source": [row_of[caption]],
        }
        for name, column in layout.latents:
            scaled = _values(sample[name]).astype(np.float32) * layout.declared.latents_scale
            record |= {column.column: scaled.astype(np.float16).tobytes(), column.bucket_column: 0}
        records.append(record)
    table = pa.Table.from_pylist(records, schema=layout.records)
    sums = {}
    for _, column in layout.latents:
        summed = Sums(column.channels)
        if records:
            stacked = np.stack([np.frombuffer(record[column.column], np.float16) for record in records])
            summed.add(torch.from_numpy(stacked.reshape(-1, *column.shape(0))))
        sums[column.name] = summed.to_json()
    return table, _text_rows(layout, words, embeddings), sums, dict(rejected)


def _unusable(sample: dict[str, Any], layout: _Layout) -> str | None:
    """Why a sample cannot be taken."""
    expected = {name: math.prod(column.shape(0)) for name, column in layout.latents}
    if layout.text is not None:
        expected[CAPTION_LATENTS] = layout.text.max_tokens * layout.text.width
    for name, count in expected.items():
        values = _values(sample[name])
        if len(values) != count:
            return f"{name} has another size than in the first sample"
        scale = layout.declared.latents_scale if name != CAPTION_LATENTS else 1.0
        if not np.isfinite((values.astype(np.float32) * scale).astype(np.float16)).all():
            return f"{name} holds numbers that are not finite"
    return None


def _text_rows(layout: _Layout, words: list[str], embeddings: list[NDArray[np.float16]]) -> pa.Table:
    column = layout.text
    if column is None or not words:
        return pa.Table.from_pylist([{"text": word} for word in words], schema=layout.texts)
    text_BSD = torch.from_numpy(np.stack(embeddings).reshape(len(words), column.max_tokens, column.width))
    packed = pack(column, text_BSD, torch.ones(text_BSD.shape[:2], dtype=torch.bool))
    return pa.table([pa.array(words, pa.string()), *packed.columns], schema=layout.texts)


def _commit(
    mds: MDSFolder, out: str, layout: _Layout, unit_rows: int, entries: list[dict[str, Any]]
) -> Store:
    pieces = {kind: [p for p in pieces_of(kind, entries) if p.rows] for kind in ("records", "texts")}
    kept = sum(piece.rows for piece in pieces["records"])
    rejected: Counter[str] = Counter()
    sums = {column.name: Sums(column.channels) for _, column in layout.latents}
    for entry in sorted(entries, key=lambda entry: int(entry["unit"]["number"])):
        rejected.update(entry.get("rejected", {}))
        for name, values in entry.get("sums", {}).items():
            sums[name].add_json(values)
    if not kept:
        reason, _ = rejected.most_common(1)[0]
        raise UserError(f"{mds.path}: none of {len(mds):,} samples can be taken; most often {reason}")
    latents = (sums[column.name].update(column) for _, column in layout.latents)
    source = SourceFacts(
        kind="mds",
        path=str(mds.path.resolve()),
        licence=layout.declared.licence,
        read=len(mds),
        kept=kept,
        rejected=dict(rejected),
    )
    manifest = Manifest(
        made_by=__version__,
        records=kept,
        texts=sum(piece.rows for piece in pieces["texts"]),
        unit_rows=unit_rows,
        has_images=False,
        sources=(source,),
        captions=(CaptionsColumn(name="source", origin="the source"),),
        latents=tuple(column.model_copy(update={"counts": (kept,)}) for column in latents),
        text=() if layout.text is None else (layout.text,),
    )
    changes = {
        "records": Change("new", pieces["records"], layout.records),
        "texts": Change("new", pieces["texts"], layout.texts),
    }
    return commit(out, None, changes, manifest)
