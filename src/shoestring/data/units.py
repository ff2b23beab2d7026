"""Work units of a precompute: what one of them is made of, and how it is computed.

A unit is one fragment of the records or of the texts. Within it pictures are grouped by shape and encoded in
batches of one size (the last is filled up with copies to a power of two), so that its result depends neither
on what was computed before nor on who computes it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoestring.data.embeddings import pack
from shoestring.data.manifest import FeatureColumn, LatentsColumn, TextColumn
from shoestring.data.store import Store
from shoestring.data.tables import Piece
from shoestring.interfaces import FeatureExtractor, ImageCodec, TextEncoder
from shoestring.runtime import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
Rows = NDArray[np.int64]
PictureColumn = LatentsColumn | FeatureColumn


@dataclass(frozen=True)
class Makers:
    """How to build what computes: called where and when it is needed, perhaps on another machine."""

    codec: Callable[[], ImageCodec] | None = None
    encoders: Mapping[str, Callable[[], TextEncoder]] = field(default_factory=dict)
    """By the name of the text column."""
    extractors: Mapping[str, Callable[[], FeatureExtractor]] = field(default_factory=dict)
    """By the name of the feature column."""


class Tools:
    """What the makers make, each built once and only if asked for."""

    def __init__(self, makers: Makers) -> None:
        """Nothing is built yet.

        Args:
            makers: how to.
        """
        self._makers = makers
        self._encoders: dict[str, TextEncoder] = {}
        self._extractors: dict[str, FeatureExtractor] = {}

    @cached_property
    def codec(self) -> ImageCodec:
        """The image codec."""
        assert self._makers.codec is not None, "latents need a codec"
        return self._makers.codec()

    def encoder(self, name: str) -> TextEncoder:
        """The text encoder of a column."""
        if name not in self._encoders:
            self._encoders[name] = self._makers.encoders[name]()
        return self._encoders[name]

    def extractor(self, name: str) -> FeatureExtractor:
        """The teacher of a column of features."""
        if name not in self._extractors:
            self._extractors[name] = self._makers.extractors[name]()
        return self._extractors[name]


@dataclass(frozen=True)
class Unit:
    """Consecutive rows of a table that are computed together."""

    kind: str
    """``records`` or ``texts``."""
    number: int
    start: int
    rows: int


@dataclass(frozen=True)
class Plan:
    """What is to be computed, from where, to where; plain values, so that it may travel."""

    raw: tuple[str, int]
    """Address and version of the store with the pictures."""
    out: tuple[str, int | None]
    """Address of the result, and the version that gets new columns; ``None``: a new store."""
    latents: tuple[LatentsColumn, ...]
    """Their statistics are not known yet."""
    text: tuple[TextColumn, ...]
    features: tuple[FeatureColumn, ...]
    batch: int
    text_batch: int
    keep_images: bool

    @property
    def pictures(self) -> tuple[PictureColumn, ...]:
        """The columns for which pictures are decoded."""
        return (*self.latents, *self.features)

    def fields(self, kind: str) -> pa.Schema:
        """The new columns of a table, ``records`` or ``texts``."""
        fields: list[tuple[str, pa.DataType]] = []
        if kind == "texts":
            for text in self.text:
                fields += [(name, pa.binary()) for name in text.columns[:-1]]
                fields.append((text.columns[-1], pa.int32()))
            return pa.schema(fields)
        for latents in self.latents:
            fields.append((latents.column, pa.binary()))
            if latents.mirrored:
                fields.append((latents.mirror_column, pa.binary()))
            fields.append((latents.bucket_column, pa.int16()))
        for feature in self.features:
            fields.append((feature.column, pa.list_(pa.float16(), feature.width)))
        return pa.schema(fields)

    def carried(self, kind: str, raw: Store) -> list[str]:
        """The columns that a new store takes over from the one with the pictures."""
        if self.out[1] is not None:
            return []
        if kind == "texts":
            return ["text"]
        captions = [column.column for column in raw.manifest.captions]
        return ["id", "width", "height", *captions, *(["image"] if self.keep_images else [])]

    def schema(self, kind: str, raw: Store) -> pa.Schema:
        """The whole schema of a table of a new store."""
        table = raw.records if kind == "records" else raw.texts
        old = [table.schema.field(name) for name in self.carried(kind, raw)]
        return pa.schema([*old, *self.fields(kind)])


def units_of(table: Any, kind: str) -> list[Unit]:
    """The fragments of a table as units."""
    units, start = [], 0
    for number, fragment in enumerate(table.get_fragments()):
        units.append(Unit(kind, number, start, fragment.physical_rows))
        start += fragment.physical_rows
    return units


def ahead(
    tasks: Iterator[Task], work: Callable[[Task], Result], threads: int, waiting: int = 1
) -> Iterator[Result]:
    """Work on tasks in threads while the caller is busy with earlier results.

    Args:
        tasks: taken one by one, in the caller's thread.
        work: done in a thread.
        threads: how many.
        waiting: further tasks that may be done or queued, which bounds the memory.

    Yields:
        Result: the results in the order of the tasks.
    """
    pool = ThreadPoolExecutor(threads)
    running: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            running.append(pool.submit(work, task))
            if len(running) >= threads + waiting:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def padded_size(count: int, batch: int) -> int:
    """Size of the batch that some pictures or texts are encoded in: full, or the next power of two.

    So there are few sizes, and with many buckets the last batches of each do not cost as much as full ones.
    """
    return min(batch, 1 << (count - 1).bit_length())


def filled_up(pixels: Tensor, batch: int) -> Tensor:
    """A batch of a size of :func:`padded_size`: the last picture is repeated."""
    missing = padded_size(len(pixels), batch) - len(pixels)
    return torch.cat([pixels, pixels[-1:].expand(missing, *pixels.shape[1:])]) if missing else pixels


def embed(columns: Sequence[TextColumn], tools: Tools, texts: Sequence[str], batch: int) -> pa.Table:
    """Embeddings of texts as rows of the store.

    Args:
        columns: at least one.
        tools: with the encoders.
        texts: consecutive texts of a unit.
        batch: texts encoded at once.

    Returns:
        The columns of all encoders, a row each text.

    Raises:
        UserError: if an encoder gives numbers that are not finite.
    """
    arrays: dict[str, pa.ChunkedArray] = {}
    for column in columns:
        encoder = tools.encoder(column.name)
        parts = []
        for start in range(0, len(texts), batch):
            some = list(texts[start : start + batch])
            text_BSD, mask_BS = encoder(some + some[-1:] * (padded_size(len(some), batch) - len(some)))
            text_BSD, mask_BS = text_BSD[: len(some)], mask_BS[: len(some)]
            stored_BSD = text_BSD.half() if column.dtype == "float16" else text_BSD
            bad_B = ~stored_BSD.isfinite().all(2).all(1)
            if bad_B.any():
                raise UserError(
                    f"{encoder.identity} gives numbers that are not finite for the caption "
                    f"{some[int(bad_B.nonzero()[0])][:80]!r}; run the encoder in float32 or bf16"
                )
            parts.append(pack(column, text_BSD, mask_BS))
        table = pa.concat_tables(parts)
        arrays |= {name: table[name] for name in column.columns}
    return pa.table(arrays)


class Sums:
    """Sums over the model latents of some pictures, from which means and deviations follow."""

    def __init__(self, channels: int) -> None:
        """Nothing summed yet.

        Args:
            channels: of the latents.
        """
        self.count = 0
        self.first_C = np.zeros(channels)
        self.second_C = np.zeros(channels)

    def add(self, latents: Tensor) -> None:
        """Add pictures, ``B C h w``."""
        wide = latents.double()
        self.count += wide[:, 0].numel()
        self.first_C += wide.sum((0, 2, 3)).numpy()
        self.second_C += wide.square().sum((0, 2, 3)).numpy()

    def to_json(self) -> list[Any]:
        """As plain values, exactly."""
        return [self.count, self.first_C.tolist(), self.second_C.tolist()]

    def add_json(self, values: list[Any]) -> None:
        """Add sums that were written by :meth:`to_json`."""
        self.count += values[0]
        self.first_C += np.array(values[1])
        self.second_C += np.array(values[2])

    def update(self, column: LatentsColumn) -> LatentsColumn:
        """The column with its statistics."""
        mean_C = self.first_C / self.count
        std_C = np.sqrt(np.maximum(self.second_C / self.count - mean_C**2, 0))
        whole = np.sqrt(max(self.second_C.mean() / self.count - mean_C.mean() ** 2, 0))
        return column.model_copy(
            update={"mean": tuple(mean_C.tolist()), "std": tuple(std_C.tolist()), "sigma": float(whole)}
        )


def entry(unit: Unit, piece: Piece) -> dict[str, Any]:
    """The journal's line for a finished unit."""
    return {"unit": asdict(unit), "piece": piece.to_json()}
