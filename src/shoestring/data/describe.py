"""What is in a store, in words and tables; and some of its rows to look at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from shoestring.data.manifest import LatentsColumn, TextColumn
from shoestring.data.seals import listing
from shoestring.data.store import Store
from shoestring.data.tables import child, filesystem, open_table
from shoestring.data.units import Sums
from shoestring.interfaces import ImageCodec
from shoestring.runtime import stream, stream_seed

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
BATCH = 64
# A mean may be off by this share of the deviation, and a deviation by this share of itself; in addition to
# what the choice of pictures and the draws explain (six standard errors).
TOLERANCE = 0.01
SHOWN_BUCKETS = 40


def size_text(count: float) -> str:
    """Bytes in words: ``1.5 MB``."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"


# -- info --------------------------------------------------------------------------------------------------


def info(store: Store) -> str:
    """All that a store says of itself.

    Args:
        store: its data is not read, only what is written of it.

    Returns:
        Lines of text.
    """
    manifest = store.manifest
    pinned = ", ".join(f"{name} ({version})" for name, version in pins(store).items())
    data = sum(store.checksums.to_table(columns=["bytes"])["bytes"].to_pylist())
    lines = [
        f"{store.uri}: {manifest.records:,} records, {manifest.texts:,} distinct captions, "
        f"{'with' if manifest.has_images else 'without'} the original pictures",
        f"version {store.version}, schema {manifest.schema_version}, made by shoestring {manifest.made_by}, "
        f"work units of {manifest.unit_rows:,} records",
        f"{size_text(data)} of data, {size_text(data / max(1, len(store)))} a record; "
        f"{size_text(_on_disk(store.uri))} on disk with all versions",
        f"pinned versions: {pinned or 'none'}",
        "",
        "bytes a record:",
        *_table(
            (column, f"{size:,.1f}", f"{100 * size * len(store) / max(1, data):.1f} %")
            for column, size in column_bytes(store).items()
        ),
        "",
        "sources:",
        *_sources(store),
        "",
        "captions:",
        *_table((column.name, column.origin) for column in manifest.captions),
    ]
    for latents in manifest.latents:
        lines += ["", *_latents(latents)]
    for text in manifest.text:
        which = "up to the true length" if text.positions == "true" else "all positions"
        lines += [
            "",
            f"embeddings {text.name}: {text.encoder}",
            f"  at most {text.max_tokens} tokens of {text.width} {text.dtype}, {which} stored",
        ]
    for feature in manifest.features:
        lines += [
            "",
            f"features {feature.name}: {feature.extractor} at {feature.resolution} px, {feature.width} wide",
        ]
    return "\n".join(lines)


def pins(store: Store) -> dict[str, int]:
    """Pinned versions of a store by the name of the pin."""
    tags = open_table(child(store.uri, "manifest")).tags.list()
    return {name: int(values["version"]) for name, values in sorted(tags.items())}


def column_bytes(store: Store) -> dict[str, float]:
    """Bytes on disk of each column, divided by the number of records.

    Columns of the texts are called ``texts.NAME``. What Lance adds to each file is ``(around)``.
    """
    found: dict[str, float] = {}
    files = 0
    for name in ("records", "texts"):
        table = store.records if name == "records" else store.texts
        size = {field.id: field.bytes_on_disk for field in table.stats.data_stats().fields}
        for field in table.lance_schema.fields():
            key = field.name() if name == "records" else f"texts.{field.name()}"
            found[key] = sum(size.get(part, 0) for part in _ids(field))
        files += sum(file.file_size_bytes for part in table.get_fragments() for file in part.metadata.files)
    found["(around)"] = files - sum(found.values())
    return {name: count / max(1, len(store)) for name, count in found.items()}


def _ids(field: Any) -> Iterator[int]:
    yield field.id()
    for part in field.children():
        yield from _ids(part)


def _on_disk(uri: str) -> int:
    files, root = filesystem(uri)
    infos = files.get_file_info([f"{root}/{path}" for path in listing(uri, "")])
    return sum(info.size for info in infos)


def _sources(store: Store) -> Iterator[str]:
    for source in store.manifest.sources:
        licence = f", licence {source.licence}" if source.licence else ""
        rejected = sum(source.rejected.values())
        yield (
            f"  {source.kind} {source.path}: {source.read:,} read, {source.kept:,} kept, {rejected:,} "
            f"rejected{licence}"
        )
        for reason, count in sorted(source.rejected.items(), key=lambda item: (-item[1], item[0])):
            yield f"    {count:,} x {reason}"


def _latents(column: LatentsColumn) -> Iterator[str]:
    kind = "draws of the posterior" if column.sampled else "moments"
    yield f"latents {column.name}: {column.codec}"
    yield (
        f"  {kind} at {column.resolution} px, {column.moment_channels} channels of {column.dtype}, one for "
        f"{column.downsampling} x {column.downsampling} pixels{', mirrored too' if column.mirrored else ''}"
    )
    yield f"  model latents: {column.channels} channels, deviation of all values {column.sigma:.4f}"
    yield from _table(
        (f"channel {c}", f"mean {mean:+.4f}", f"deviation {std:.4f}")
        for c, (mean, std) in enumerate(zip(column.mean, column.std, strict=True))
    )
    yield from _buckets(column)


def _buckets(column: LatentsColumn) -> Iterator[str]:
    order = sorted(range(len(column.buckets)), key=lambda b: -column.counts[b])
    total = max(1, sum(column.counts))
    yield from _table(
        (
            f"{column.buckets[b][1]} x {column.buckets[b][0]}",
            f"{column.counts[b]:,} pictures",
            f"{100 * column.counts[b] / total:.1f} %",
        )
        for b in order[:SHOWN_BUCKETS]
    )
    if order[SHOWN_BUCKETS:]:
        rest = sum(column.counts[b] for b in order[SHOWN_BUCKETS:])
        yield f"  and {len(order) - SHOWN_BUCKETS} shapes more with {rest:,} pictures"


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows in columns, all but the first aligned to the right."""
    cells = list(rows)
    if not cells:
        return ["  none"]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        "  "
        + "  ".join(
            [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    ]


# -- stats -------------------------------------------------------------------------------------------------


def stats(store: Store, codec: ImageCodec | None = None, count: int = 2048, seed: int = 0) -> str:
    """How captions, sizes and latents are distributed.

    Args:
        store: the sizes and captions of all records are read.
        codec: the one that made the moments, to measure the latents anew; ``None`` does so only where they
            are draws already.
        count: pictures whose latents are measured.
        seed: of the choice of these and of the draws.

    Returns:
        Lines of text; where the latents measured differ from the manifest's statistics it says so.

    Raises:
        UserError: if the store is damaged.
    """
    sizes = store.records.to_table(columns=["width", "height"])
    width_N, height_N = sizes["width"].to_numpy(), sizes["height"].to_numpy()
    head = ("", "mean", *("least" if p == 0 else "most" if p == 100 else f"{p} %" for p in PERCENTILES))
    rows = [
        head,
        _row("width, px", width_N, 0),
        _row("height, px", height_N, 0),
        _row("width / height", width_N / np.maximum(1, height_N), 2),
    ]
    for captions in store.manifest.captions:
        lists = store.records.to_table(columns=[captions.column])[captions.column]
        each_N = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
        rows.append(_row(f"captions {captions.name} a record", each_N, 0))
    words = store.texts.to_table(columns=["text"])["text"]
    rows.append(_row("characters a caption", pc.utf8_length(words).to_numpy(), 0))
    cut = []
    for text in store.manifest.text:
        true_N = store.texts.to_table(columns=[text.columns[-1]])[text.columns[-1]].to_numpy()
        rows.append(_row(f"tokens a caption, {text.name}", true_N, 0))
        cut.append(_full(text, true_N))
    lines = [*_table(rows), "", *cut]
    for column in store.manifest.latents:
        lines += [
            "",
            f"latents {column.name}:",
            *_buckets(column),
            *_measured(store, column, codec, count, seed),
        ]
    return "\n".join(lines)


def _row(name: str, values: NDArray[Any], digits: int) -> tuple[str, ...]:
    if not len(values):
        return (name, *("-" for _ in range(len(PERCENTILES) + 1)))
    told = np.percentile(values, PERCENTILES)
    return (name, f"{values.mean():,.{max(1, digits)}f}", *(f"{value:,.{digits}f}" for value in told))


def _full(column: TextColumn, true_N: NDArray[np.int32]) -> str:
    share = 100 * float((true_N >= column.max_tokens).mean()) if len(true_N) else 0.0
    return f"  {share:.1f} % of the captions fill all {column.max_tokens} tokens of {column.name}"


def _measured(
    store: Store, column: LatentsColumn, codec: ImageCodec | None, count: int, seed: int
) -> Iterator[str]:
    if not column.sampled and (codec is None or not codec.identity.same(column.codec)):
        yield f"  not measured anew: that needs the codec {column.codec}"
        return
    rows = _choose(len(store), count, seed)
    sums = _sums(store, column, codec, rows, seed)
    if not sums.count:
        yield "  not measured: there is no picture"
        return
    now = sums.update(column)
    # The values of a picture belong together, those of a draw do not.
    chance = 0.0 if len(rows) == len(store) else 6 / len(rows) ** 0.5
    chance += 0.0 if column.sampled else 6 / sums.count**0.5
    wrong = []
    table: list[tuple[str, ...]] = [("", "mean", "manifest", "deviation", "manifest")]
    for c, (mean, std, told_mean, told_std) in enumerate(
        zip(now.mean, now.std, column.mean, column.std, strict=True)
    ):
        table.append(
            (f"channel {c}", *(f"{v:+.4f}" for v in (mean, told_mean)), f"{std:.4f}", f"{told_std:.4f}")
        )
        allowed = (TOLERANCE + chance) * max(std, told_std)
        # Not ">": that would be false for NaN.
        if not (abs(mean - told_mean) <= allowed and abs(std - told_std) <= allowed):
            wrong.append(str(c))
    yield f"  measured on {len(rows):,} pictures:"
    yield from _table(table)
    if wrong:
        yield (
            f"  MISMATCH in channel {', '.join(wrong)}: the manifest's statistics are not those of the "
            "latents; prepare this column anew"
        )


def _sums(
    store: Store, column: LatentsColumn, codec: ImageCodec | None, rows: NDArray[np.int64], seed: int
) -> Sums:
    several = column.bucket_column in store.records.schema.names
    names = [column.column, *([column.bucket_column] if several else [])]
    sums = Sums(column.channels)
    for start in range(0, len(rows), BATCH):
        table = store.take(rows[start : start + BATCH], names)
        bucket_B = table[names[1]].to_numpy() if several else np.zeros(table.num_rows, np.int64)
        data = table[names[0]].to_pylist()
        for bucket in np.unique(bucket_B).tolist():
            mine = [np.frombuffer(data[i], column.dtype) for i in np.flatnonzero(bucket_B == bucket)]
            shape = column.shape(bucket)
            moments_BMhw = torch.from_numpy(np.stack(mine).reshape(-1, *shape))
            if column.sampled:
                sums.add(moments_BMhw)
                continue
            assert codec is not None
            generator = stream(seed, f"stats {column.name} {bucket}", start)
            noise_BChw = torch.randn(len(mine), column.channels, *shape[1:], generator=generator)
            sums.add(codec.latents(moments_BMhw, noise_BChw).cpu())
    return sums


# -- rows to look at ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A record to look at."""

    row: int
    id: str
    captions: dict[str, tuple[str, ...]]
    """By the name of their column."""


def sample_rows(store: Store, count: int, seed: int = 0) -> list[Sample]:
    """Some records by chance, with their captions.

    Args:
        store: to choose from.
        count: at most so many.
        seed: of the choice.

    Returns:
        Different records in ascending order; the same arguments give the same.
    """
    rows = _choose(len(store), count, seed)
    columns = store.manifest.captions
    table = store.take(rows, ["id", *(column.column for column in columns)])
    lists = {column.name: table[column.column].to_pylist() for column in columns}
    wanted = sorted({text for column in lists.values() for texts in column for text in texts or ()})
    words = dict(zip(wanted, store.texts.take(wanted, columns=["text"])["text"].to_pylist(), strict=True))
    return [
        Sample(
            int(row),
            name,
            {key: tuple(words[text] for text in texts[i] or ()) for key, texts in lists.items()},
        )
        for i, (row, name) in enumerate(zip(rows, table["id"].to_pylist(), strict=True))
    ]


def _choose(length: int, count: int, seed: int) -> NDArray[np.int64]:
    if count >= length:
        return np.arange(length)
    generator = np.random.Generator(np.random.PCG64(stream_seed(seed, "sample of a store")))
    return np.sort(generator.choice(length, count, replace=False))
