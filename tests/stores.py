"""Small stores for tests, written row by row without an encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from shoestring.data.embeddings import pack
from shoestring.data.manifest import CaptionsColumn, LatentsColumn, Manifest, SourceFacts, TextColumn
from shoestring.data.store import CAPTIONS, RECORDS, Store, save_checksums, save_manifest
from shoestring.data.tables import child, commit_new, write_piece
from shoestring.interfaces import Identity

BUCKETS = ((16, 16), (24, 8), (8, 24))


def moments_of(row: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Moments that tell which row they are of: the first value is the row's number."""
    values = np.random.RandomState(row).standard_normal(shape).astype(np.float16)
    values[0, 0, 0] = row
    return values


def make_store(
    folder: Path,
    rows: int = 50,
    unit_rows: int = 16,
    buckets: tuple[tuple[int, int], ...] = BUCKETS[:1],
    captions_each: int = 1,
    positions: str = "true",
    dtype: str = "int8",
    first: int = 0,
    distinct_texts: int | None = None,
) -> Store:
    """A store of ``rows`` records whose moments and captions follow from their numbers.

    Record i has id ``r00000i`` (from ``first``), bucket i modulo the number of buckets, moments
    :func:`moments_of`, ``captions_each`` captions ``caption t`` with t = i * captions_each + j (modulo
    ``distinct_texts``), whose embeddings have 2 + t % 5 true tokens of width 8.
    """
    uri = str(folder)
    latents = LatentsColumn(
        name="16",
        codec=Identity("test"),
        resolution=16,
        buckets=buckets,
        counts=tuple(len(range(b, rows, len(buckets))) for b in range(len(buckets))),
        channels=2,
        moment_channels=4,
        downsampling=4,
        dtype="float16",
        mean=(0.0, 0.0),
        std=(1.0, 1.0),
        sigma=1.0,
    )
    text = TextColumn(
        name="t", encoder=Identity("test"), width=8, max_tokens=7, positions=positions, dtype=dtype
    )
    count = min(rows * captions_each, distinct_texts or rows * captions_each)
    schema = pa.schema(
        [
            *RECORDS,
            ("caption_source", CAPTIONS),
            (latents.column, pa.binary()),
            (latents.bucket_column, pa.int16()),
        ]
    )
    pieces = []
    for start in range(0, rows, unit_rows):
        part = range(start, min(rows, start + unit_rows))
        columns = {
            "id": [f"r{first + i:06}" for i in part],
            "width": [buckets[i % len(buckets)][1] for i in part],
            "height": [buckets[i % len(buckets)][0] for i in part],
            "caption_source": [[(i * captions_each + j) % count for j in range(captions_each)] for i in part],
            latents.column: [moments_of(first + i, latents.shape(i % len(buckets))).tobytes() for i in part],
            latents.bucket_column: [i % len(buckets) for i in part],
        }
        pieces.append(write_piece(child(uri, "records"), pa.table(columns, schema=schema)))
    records = commit_new(child(uri, "records"), schema, pieces)
    true_B = [2 + t % 5 for t in range(count)]
    text_BSD = torch.from_numpy(
        np.random.RandomState(first).standard_normal((count, 7, 8)).astype(np.float32)
    )
    mask_BS = torch.arange(7)[None] < torch.tensor(true_B)[:, None]
    encoded = pack(text, text_BSD, mask_BS)
    texts_table = pa.table(
        [pa.array([f"caption {first + t}" for t in range(count)], pa.string()), *encoded.columns],
        names=["text", *encoded.column_names],
    )
    text_pieces = [write_piece(child(uri, "texts"), texts_table)] if count else []
    texts = commit_new(child(uri, "texts"), texts_table.schema, text_pieces)
    written = (("records", pieces), ("texts", text_pieces))
    sums = [(table, file) for table, parts in written for piece in parts for file in piece.files]
    manifest = Manifest(
        made_by="test",
        records=rows,
        texts=count,
        unit_rows=unit_rows,
        has_images=False,
        sources=(SourceFacts(kind="test", path="", read=rows, kept=rows),),
        captions=(CaptionsColumn(name="source", origin="test"),),
        latents=(latents,),
        text=(text,),
        tables={"records": records.version, "texts": texts.version, "checksums": save_checksums(uri, sums)},
    )
    return save_manifest(uri, manifest)
