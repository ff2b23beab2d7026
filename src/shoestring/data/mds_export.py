"""A store to an MDS folder of ready latents, as MicroDiT trains on them.

Its columns: ``caption`` (str), ``caption_latents`` (float16, all positions of the text encoder) and
``latents_256``, ``latents_512``, ... (float16, one draw of the posterior, shifted and scaled).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from shoestring.data.embeddings import unpack
from shoestring.data.jobs import Meter, Progress
from shoestring.data.manifest import CaptionsColumn, LatentsColumn, TextColumn
from shoestring.data.mds import SIZE_LIMIT, write_mds
from shoestring.data.store import Store
from shoestring.interfaces import ImageCodec
from shoestring.runtime import UserError, stream

CAPTION = "caption"
CAPTION_LATENTS = "caption_latents"
BATCH = 64


def export_mds(
    store: Store,
    folder: Path | str,
    latents: Sequence[str],
    text: str,
    codec: ImageCodec | None,
    captions: str | None = None,
    seed: int = 0,
    size_limit: int = SIZE_LIMIT,
    progress: Callable[[Progress], None] | None = None,
) -> int:
    """Write a store as an MDS folder in MicroDiT's columns; it appears whole or not at all.

    A record's first caption counts; one without any gets the empty text and embeddings of zero, MicroDiT's
    condition for no caption. The draw of the posterior depends on the seed and the record's id alone.

    Args:
        store: with embeddings of all positions.
        folder: must not exist, or be empty.
        latents: names of columns; each becomes ``latents_RESOLUTION``.
        text: name of the embeddings.
        codec: the one that made the moments; ``None`` where they are draws already.
        captions: name of the column of captions; by default the first.
        seed: of the draws.
        size_limit: bytes of a shard.
        progress: called from time to time.

    Returns:
        Number of samples.

    Raises:
        UserError: if a column is missing or cannot be written in this format, or the disk is full.
    """
    columns = [store.latents(name) for name in latents]
    for column in columns:
        _check_export(store, column, codec)
    resolutions = [column.resolution for column in columns]
    if len(set(resolutions)) < len(resolutions):
        raise UserError(
            f"two of the columns {', '.join(latents)} are of one resolution, and so would share a name; "
            "export them to folders of their own"
        )
    text_column = store.text(text)
    if text_column.positions != "all":
        raise UserError(
            f"{store.uri} stores the embeddings {text!r} up to the true length of each caption; this format "
            "needs every position: prepare them again with positions=all"
        )
    words = store.captions(captions) if captions is not None else store.manifest.captions[0]
    meter = Meter({"records": len(store)}, {"records": 0}, progress)
    samples = _samples(store, columns, text_column, words, codec, seed, meter)
    encodings = {CAPTION: "str", CAPTION_LATENTS: "bytes"} | {f"latents_{r}": "bytes" for r in resolutions}
    return write_mds(folder, encodings, samples, size_limit)


def _check_export(store: Store, column: LatentsColumn, codec: ImageCodec | None) -> None:
    if len(column.buckets) > 1:
        raise UserError(
            f"{store.uri}: the latents {column.name!r} have {len(column.buckets)} shapes; this format has "
            "room for one: prepare a column with one square resolution"
        )
    if column.sampled:
        return
    if codec is None:
        raise UserError(
            f"{store.uri}: the latents {column.name!r} are moments of {column.codec}; name this codec, which "
            "draws latents from them"
        )
    if not codec.identity.same(column.codec):
        raise UserError(
            f"{store.uri}: the latents {column.name!r} were made by {column.codec}, not by {codec.identity}; "
            "name the codec that made them"
        )


def _samples(
    store: Store,
    columns: Sequence[LatentsColumn],
    text: TextColumn,
    words: CaptionsColumn,
    codec: ImageCodec | None,
    seed: int,
    meter: Meter,
) -> Iterator[dict[str, Any]]:
    names = ["id", words.column, *(column.column for column in columns)]
    for batch in store.records.to_batches(columns=names, batch_size=BATCH, scan_in_order=True):
        samples = list(
            _captions(store, text, [row[0] if row else None for row in batch[words.column].to_pylist()])
        )
        for column in columns:
            drawn = _drawn(column, batch, codec, seed)
            for sample, values in zip(samples, drawn, strict=True):
                sample[f"latents_{column.resolution}"] = values.astype(np.float16).tobytes()
        yield from samples
        meter("records", len(samples))


def _captions(store: Store, column: TextColumn, rows: Sequence[int | None]) -> Iterator[dict[str, Any]]:
    """Caption and embeddings by rows of the texts."""
    wanted = sorted({row for row in rows if row is not None})
    found = store.texts.take(wanted, columns=["text", *column.columns])
    text_BSD = unpack(column, found)[0].astype(np.float16)
    words = dict(zip(wanted, zip(found["text"].to_pylist(), text_BSD, strict=True), strict=True))
    nothing = "", np.zeros((column.max_tokens, column.width), np.float16)
    for row in rows:
        caption, values_SD = nothing if row is None else words[row]
        yield {CAPTION: caption, CAPTION_LATENTS: values_SD.tobytes()}


def _drawn(
    column: LatentsColumn, batch: pa.RecordBatch, codec: ImageCodec | None, seed: int
) -> NDArray[np.float32]:
    """Latents of some records, ``B C h w``."""
    shape = column.shape(0)
    values = [np.frombuffer(data, column.dtype) for data in batch[column.column].to_pylist()]
    moments_BMhw = torch.from_numpy(np.stack(values).reshape(-1, *shape))
    if column.sampled:
        return moments_BMhw.float().numpy()
    assert codec is not None
    noise_BChw = torch.stack(
        [
            torch.randn(column.channels, *shape[1:], generator=stream(seed, f"export {column.name} {name}"))
            for name in batch["id"].to_pylist()
        ]
    )
    return codec.latents(moments_BMhw, noise_BChw).cpu().numpy()
