"""Computes units: reads, decodes, encodes and writes them, all at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoestring.data.buckets import choose_buckets
from shoestring.data.manifest import FeatureColumn
from shoestring.data.pixels import Unusable, decode, fit
from shoestring.data.store import Store
from shoestring.data.tables import child, reading, widen_piece, write_piece
from shoestring.data.units import PictureColumn, Plan, Rows, Sums, Tools, Unit, ahead, embed, entry, filled_up
from shoestring.runtime import UserError, stream

Done = tuple[Unit, pa.Table, dict[str, Sums]]


@dataclass
class _Half:
    """A unit on its way: its rows, and the columns as far as they are computed."""

    unit: Unit
    rows: Rows
    source: pa.Table
    """Of the store with the pictures: ids, sizes and what a new store takes over."""
    buckets: dict[str, NDArray[np.int16]]
    values: dict[str, list[Any]]
    sums: dict[str, Sums]
    batches: int
    """Still to come."""


@dataclass
class _Part:
    """What one column makes of a batch."""

    column: PictureColumn
    number: int
    """Among the batches of the column in the unit: the key of its random numbers."""
    shape: tuple[int, int]


@dataclass
class _Batch:
    """Pictures that are decoded once, for all columns that group them alike (squares always do)."""

    half: _Half
    at: Rows
    """Places in the unit."""
    parts: list[_Part]
    """Empty: nothing to encode, the unit is only copied."""


class Runner:
    """Computes units: pictures are decoded and units written in threads while the codec is at work."""

    def __init__(
        self,
        plan: Plan,
        tools: Tools,
        threads: int,
        tick: Callable[[str, int], None] = lambda kind, rows: None,
    ) -> None:
        """Open the stores.

        Args:
            plan: what to compute.
            tools: with which.
            threads: that decode.
            tick: called with a kind of unit and how many of its rows have been done now.
        """
        self.plan, self.tools, self.threads, self.tick = plan, tools, threads, tick
        self.raw = Store(*plan.raw)
        uri, version = plan.out
        self.out = None if version is None else Store(uri, version)
        self._fragments: dict[str, list[int]] = {}
        if self.out is not None:
            for kind, table in (("records", self.out.records), ("texts", self.out.texts)):
                self._fragments[kind] = [fragment.fragment_id for fragment in table.get_fragments()]

    def run(self, units: Sequence[Unit]) -> Iterator[dict[str, Any]]:
        """Compute units and write their pieces.

        Args:
            units: of either kind.

        Yields:
            dict[str, Any]: a journal's entry for each, when its piece is on the disk.
        """
        records = self.records([unit for unit in units if unit.kind == "records"])
        texts = self.texts([unit for unit in units if unit.kind == "texts"])
        writing: Future[dict[str, Any]] | None = None
        with ThreadPoolExecutor(1) as writer:
            for done in chain(records, texts):
                if writing is not None and (writing.done() or done is not None):
                    yield writing.result()
                    writing = None
                if done is not None:
                    writing = writer.submit(self._write, *done)
            if writing is not None:
                yield writing.result()

    def _write(self, unit: Unit, rows: pa.Table, sums: dict[str, Sums]) -> dict[str, Any]:
        if self.out is None:
            piece = write_piece(child(self.plan.out[0], unit.kind), rows)
        else:
            table = self.out.records if unit.kind == "records" else self.out.texts
            piece, _ = widen_piece(table, self._fragments[unit.kind][unit.number], rows)
        return entry(unit, piece) | {"sums": {name: value.to_json() for name, value in sums.items()}}

    # -- texts ---------------------------------------------------------------------------------------------

    def texts(self, units: Sequence[Unit]) -> Iterator[Done]:
        """Rows of the table of texts, unit by unit."""
        for unit in units:
            rows = self.text_rows(_rows(unit))
            self.tick("texts", unit.rows)
            yield unit, rows, {}

    def text_rows(self, rows: Rows) -> pa.Table:
        """The new columns of some texts."""
        # A store that is widened may hold captions of its own, after those of the pictures' store.
        store = self.out or self.raw
        with reading(f"{store.uri}: texts {rows.min()} to {rows.max()}"):
            source = store.texts.take(rows.tolist(), columns=["text"])
        old = source.select(self.plan.carried("texts", self.raw))
        if not self.plan.text:
            return old
        new = embed(self.plan.text, self.tools, source["text"].to_pylist(), self.plan.text_batch)
        return pa.table([*old.columns, *new.columns], names=[*old.column_names, *new.column_names])

    # -- pictures ------------------------------------------------------------------------------------------

    def records(self, units: Sequence[Unit]) -> Iterator[Done | None]:
        """Rows of the table of records, unit by unit, and ``None`` after a batch that does not end one."""
        batches = (batch for unit in units for batch in self._batches(unit, _rows(unit)))
        for batch, pixels in ahead(batches, self._load, self.threads, 2):
            half = batch.half
            self._encode(batch, pixels)
            half.batches -= 1
            self.tick("records", len(batch.at) * max(1, len(batch.parts)))
            if half.batches == 0:
                yield half.unit, self._table(half), half.sums
            else:
                yield None

    def sample(self, rows: Rows) -> pa.Table:
        """The rows that records anywhere in the store would get."""
        unit = Unit("records", 0, 0, len(rows))
        batches = self._batches(unit, rows)
        for batch, pixels in ahead(batches, self._load, self.threads, 2):
            self._encode(batch, pixels)
        return self._table(batch.half)

    def _batches(self, unit: Unit, rows: Rows) -> Iterator[_Batch]:
        plan = self.plan
        columns = ["id", "width", "height"]
        columns += [name for name in plan.carried("records", self.raw) if name not in columns]
        source = _take(self.raw, rows, columns)
        if self.out is not None and _take(self.out, rows, ["id"])["id"] != source["id"]:
            raise UserError(
                f"{plan.out[0]} and {plan.raw[0]} do not hold the same records in the same order (records "
                f"{rows.min()} to {rows.max()}); name the store that it was prepared from, "
                "or another --out"
            )
        half = _Half(unit, rows, source, {}, {}, {}, 0)
        batches: dict[bytes, _Batch] = {}
        for column in plan.pictures:
            for number, (at, shape) in enumerate(self._groups(half, column)):
                batch = batches.setdefault(at.tobytes(), _Batch(half, at, []))
                batch.parts.append(_Part(column, number, shape))
        for column in plan.latents:
            half.sums[column.name] = Sums(column.channels)
        found = list(batches.values()) or [_Batch(half, rows, [])]
        half.batches = len(found)
        yield from found

    def _groups(self, half: _Half, column: PictureColumn) -> Iterator[tuple[Rows, tuple[int, int]]]:
        """Places of the pictures that a column encodes together, and their shape."""
        count = len(half.rows)
        half.values[column.column] = [None] * count
        if isinstance(column, FeatureColumn):
            shapes: tuple[tuple[int, int], ...] = ((column.resolution, column.resolution),)
            bucket_N = np.zeros(count, np.int16)
        else:
            shapes = column.buckets
            width_N, height_N = half.source["width"].to_numpy(), half.source["height"].to_numpy()
            bucket_N = half.buckets[column.name] = choose_buckets(width_N, height_N, shapes)
            if column.mirrored:
                half.values[column.mirror_column] = [None] * count
        for bucket, shape in enumerate(shapes):
            places = np.flatnonzero(bucket_N == bucket)
            for start in range(0, len(places), self.plan.batch):
                yield places[start : start + self.plan.batch], shape

    def _load(self, batch: _Batch) -> tuple[_Batch, list[Tensor]]:
        if not batch.parts:
            return batch, []
        source = _take(self.raw, batch.half.rows[batch.at], ["id", "width", "height", "image"])
        shapes = [part.shape for part in batch.parts]
        pixels = [np.empty((len(batch.at), 3, *shape), np.uint8) for shape in shapes]
        for i, row in enumerate(source.to_pylist()):
            # The short side of the original when it is resized to fill the largest shape.
            scale = max(max(width / row["width"], height / row["height"]) for height, width in shapes)
            smallest = int(np.ceil(scale * min(row["width"], row["height"])))
            try:
                picture = decode(row["image"], smallest)
                for filled, shape in zip(pixels, shapes, strict=True):
                    filled[i] = fit(picture, *shape)
            except Unusable as reason:
                raise UserError(
                    f"{self.raw.uri}: the picture of record {row['id']!r} {reason}; it could be read when it "
                    "came in, so the store is damaged: put it back from a copy"
                ) from reason
        return batch, [torch.from_numpy(each) for each in pixels]

    def _encode(self, batch: _Batch, pixels: Sequence[Tensor]) -> None:
        for part, each in zip(batch.parts, pixels, strict=True):
            self._encode_part(batch, part, each)

    def _encode_part(self, batch: _Batch, part: _Part, pixels: Tensor) -> None:
        half, count, column = batch.half, len(pixels), part.column
        full = filled_up(pixels, self.plan.batch)
        if isinstance(column, FeatureColumn):
            features_BF = self.tools.extractor(column.name)(full)[:count].half().cpu().numpy()
            self._keep(half, column.column, batch.at, list(features_BF), np.isfinite(features_BF).all(1))
        else:
            codec = self.tools.codec
            moments = self._moments(batch, column.column, full, count)
            if column.mirrored:
                self._moments(batch, column.mirror_column, full.flip(-1), count)
            # Of what is stored, rounded as it is.
            shape = (count, column.channels, *moments.shape[2:])
            key = f"statistics of {column.name}, unit {half.unit.start}"
            noise = torch.randn(shape, generator=stream(0, key, part.number))
            half.sums[column.name].add(codec.latents(moments.float(), noise))

    def _moments(self, batch: _Batch, name: str, full: Tensor, count: int) -> Tensor:
        moments = self.tools.codec.encode(full)[:count].to("cpu", self.tools.codec.moment_dtype)
        finite_B = np.ones(count, np.bool_)
        if moments.dtype.is_floating_point:
            finite_B = moments.isfinite().flatten(1).all(1).numpy()
        values = [row.tobytes() for row in moments.contiguous().numpy()]
        self._keep(batch.half, name, batch.at, values, finite_B)
        return moments

    def _keep(
        self, half: _Half, name: str, at: Rows, values: Sequence[Any], finite_B: NDArray[np.bool_]
    ) -> None:
        if not finite_B.all():
            record = half.source["id"][int(at[int(finite_B.argmin())])].as_py()
            raise UserError(
                f"{name} of record {record!r} is not finite in float16; run the codec in float32, or take "
                "other weights"
            )
        for place, value in zip(at, values, strict=True):
            half.values[name][place] = value

    def _table(self, half: _Half) -> pa.Table:
        schema = self.plan.fields("records")
        arrays: dict[str, Any] = {name: half.source[name] for name in self.plan.carried("records", self.raw)}
        for latents in self.plan.latents:
            half.values[latents.bucket_column] = half.buckets[latents.name].tolist()
        for feature in self.plan.features:
            flat = pa.array(np.concatenate(half.values[feature.column]))
            arrays[feature.column] = pa.FixedSizeListArray.from_arrays(flat, feature.width)
        arrays |= {f.name: pa.array(half.values[f.name], f.type) for f in schema if f.name not in arrays}
        return pa.table(arrays).select([*self.plan.carried("records", self.raw), *schema.names])


def _take(store: Store, rows: Rows, columns: Sequence[str]) -> pa.Table:
    with reading(f"{store.uri}: records {rows.min()} to {rows.max()}"):
        return store.take(rows, columns)


def _rows(unit: Unit) -> Rows:
    return np.arange(unit.start, unit.start + unit.rows)
