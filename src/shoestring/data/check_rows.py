"""Whether the rows of a store are what its manifest says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shoestring.data.manifest import CaptionsColumn, FeatureColumn, LatentsColumn, TextColumn
from shoestring.data.store import Store

BATCH = 1024
SHOWN = 3


def row_problems(store: Store) -> Iterator[str]:
    """A sentence for each contradiction between tables and manifest; the files must be sound."""
    manifest = store.manifest
    for source in manifest.sources:
        if source.read != source.kept + sum(source.rejected.values()):
            yield (
                f"the source {source.path or source.kind} has {source.read:,} records read, but "
                f"{source.kept:,} kept and {sum(source.rejected.values()):,} rejected"
            )
    kept = sum(source.kept for source in manifest.sources)
    if kept != manifest.records:
        yield f"its sources kept {kept:,} records, but it holds {manifest.records:,}"
    yield from _repeated(store.records, "id", "records")
    yield from _repeated(store.texts, "text", "texts")
    if manifest.has_images:
        yield from _empty(store.records, "image")
    for captions in manifest.captions:
        yield from _captions(store, captions)
    for latents in manifest.latents:
        yield from _latents(store, latents)
    for text in manifest.text:
        yield from _texts(store, text)
    for feature in manifest.features:
        yield from _features(store, feature)


def _repeated(table: Any, column: str, name: str) -> Iterator[str]:
    values = table.to_table(columns=[column])[column]
    if values.null_count:
        yield f"{values.null_count:,} {name} have no {column}"
    if pc.count_distinct(values).as_py() < len(values) - values.null_count:
        counts = pc.value_counts(values)
        twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        shown = ", ".join(repr(value.as_py()) for value in twice[:SHOWN])
        yield f"{len(twice):,} values of {column} occur more than once in the {name}, e.g. {shown}"


def _empty(table: Any, column: str) -> Iterator[str]:
    missing = table.count_rows(filter=f"`{column}` IS NULL")
    if missing:
        yield f"{missing:,} rows have no {column}"


def _captions(store: Store, column: CaptionsColumn) -> Iterator[str]:
    wrong = 0
    for batch in store.records.to_batches(columns=[column.column]):
        rows = batch.column(0).flatten()
        wrong += rows.null_count
        values = rows.drop_null().to_numpy(zero_copy_only=False)
        wrong += int(((values < 0) | (values >= store.manifest.texts)).sum())
    if wrong:
        yield f"{wrong:,} entries of {column.column} point to no text"


def _lengths(values: Any) -> Any:
    """Bytes of each value of a binary column; -1 where there is none."""
    return pc.fill_null(pc.binary_length(values), -1).to_numpy(zero_copy_only=False)


def _latents(store: Store, column: LatentsColumn) -> Iterator[str]:
    size = np.dtype(column.dtype).itemsize
    expected = np.array([size * int(np.prod(column.shape(b))) for b in range(len(column.buckets))])
    names = [column.column, *([column.mirror_column] if column.mirrored else [])]
    several = [column.bucket_column] if column.bucket_column in store.records.schema.names else []
    if len(column.buckets) > 1 and not several:
        yield f"{column.column} has {len(column.buckets)} buckets but no column {column.bucket_column}"
        return
    counts: Counter[int] = Counter()
    wrong = 0
    for batch in store.records.to_batches(columns=names + several, batch_size=BATCH):
        bucket_B = np.zeros(len(batch), np.int64)
        if several:
            bucket_B = pc.fill_null(batch.column(several[0]), -1).to_numpy(zero_copy_only=False)
        counts.update(bucket_B.tolist())
        known_B = (bucket_B >= 0) & (bucket_B < len(expected))
        for name in names:
            length_B = _lengths(batch.column(name))
            wrong += int((~known_B | (length_B != expected[np.where(known_B, bucket_B, 0)])).sum())
    if wrong:
        yield f"{wrong:,} values of {' or '.join(names)} do not have the bytes of their bucket"
    found = tuple(counts[bucket] for bucket in range(len(expected)))
    if found != column.counts:
        yield f"the buckets of {column.column} hold {found} pictures, the manifest says {column.counts}"


def _texts(store: Store, column: TextColumn) -> Iterator[str]:
    item = 1 if column.dtype == "int8" else 2
    wrong = 0
    for batch in store.texts.to_batches(columns=column.columns, batch_size=BATCH):
        true_B = pc.fill_null(batch.column(column.columns[-1]), -1).to_numpy(zero_copy_only=False)
        stored_B = true_B if column.positions == "true" else np.full(len(true_B), column.max_tokens)
        bad_B = (true_B < 0) | (true_B > column.max_tokens)
        bad_B |= _lengths(batch.column(column.columns[0])) != stored_B * column.width * item
        if column.dtype == "int8":
            bad_B |= _lengths(batch.column(column.columns[1])) != stored_B * 2
        wrong += int(bad_B.sum())
    if wrong:
        yield f"{wrong:,} embeddings {column.name} do not have the bytes of their tokens"


def _features(store: Store, column: FeatureColumn) -> Iterator[str]:
    wrong = 0
    for batch in store.records.to_batches(columns=[column.column], batch_size=BATCH):
        values = batch.column(0)
        wrong += values.null_count
        if pa.types.is_binary(values.type):
            wrong += int((_lengths(values.drop_null()) != 2 * column.width).sum())
    if wrong:
        yield f"{wrong:,} values of {column.column} do not have the bytes of {column.width} float16"
