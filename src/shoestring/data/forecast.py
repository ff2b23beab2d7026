"""What a precompute will cost, before it starts: bytes, hours, dollars."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shoestring.data.jobs import begin, existing, left
from shoestring.data.journal import work_folder
from shoestring.data.manifest import LatentsColumn
from shoestring.data.precompute import JOB, Job, describe, make_plan, plan_units, settings_of
from shoestring.data.runner import Runner
from shoestring.data.store import Store
from shoestring.data.tables import child, write_piece
from shoestring.data.units import Makers, Plan, Rows, Tools, Unit, padded_size
from shoestring.runtime import UserError, stream_seed

# Captions encoded for the estimate, chosen by length among so many.
TEXTS = 256
LENGTHS = 8192
BATCHES = 2


@dataclass(frozen=True)
class Forecast:
    """What a job will take."""

    records: int
    texts: int
    columns: tuple[tuple[str, float], ...]
    """Bytes a record of each new column; ``files`` is what Lance adds, or saves by compression."""
    bytes_total: int
    """Of all new columns."""
    bytes_left: int
    """Without what is on the disk already."""
    bytes_free: int | None
    """Where the result goes; unknown for a URL."""
    hours: float
    """Still to go, on this machine as it is now, divided by the workers."""
    cost_usd: float | None

    @property
    def bytes_per_record(self) -> float:
        """All new columns together."""
        return self.bytes_total / max(1, self.records)

    @property
    def enough(self) -> bool:
        """Whether the result fits the disk, as far as is known."""
        return self.bytes_free is None or self.bytes_left <= self.bytes_free

    def check(self, uri: str, anyway: bool = False) -> None:
        """Refuse to begin on a disk that is too small.

        Args:
            uri: where the result goes.
            anyway: begin all the same (``--yes``).

        Raises:
            UserError: if the disk is too small.
        """
        if not self.enough and not anyway:
            assert self.bytes_free is not None
            raise UserError(
                f"{uri} would need {in_words(self.bytes_left)} and {in_words(self.bytes_free)} are free; "
                "make room, choose another --out, or begin all the same with --yes"
            )

    def __str__(self) -> str:
        """Some lines for people."""
        lines = [f"{self.records:,} records, {self.texts:,} texts"]
        lines += [f"  {name}: {size:,.0f} bytes a record" for name, size in self.columns]
        lines.append(f"  together {self.bytes_per_record:,.0f} bytes a record, {in_words(self.bytes_total)}")
        if self.bytes_left < self.bytes_total:
            lines.append(f"  {in_words(self.bytes_total - self.bytes_left)} of them are there already")
        if self.bytes_free is not None:
            lines.append(f"  free on the disk: {in_words(self.bytes_free)}")
        cost = "" if self.cost_usd is None else f", ${self.cost_usd:,.2f}"
        lines.append(f"about {_time_in_words(self.hours)}{cost}")
        return "\n".join(lines)


def _time_in_words(hours: float) -> str:
    """In the unit that people would take."""
    if hours >= 1:
        return f"{hours:,.2f} hours"
    return f"{hours * 60:.0f} minutes" if hours >= 1 / 30 else f"{max(1, round(hours * 3600))} s"


def in_words(count: float) -> str:
    """Bytes in the largest unit that is not above them."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} bytes"


def forecast(
    raw: Store,
    out_uri: str,
    job: Job,
    makers: Makers,
    usd_per_hour: float | None = None,
    workers: int = 1,
    threads: int = 2,
) -> Forecast:
    """Encode a sample and scale it up.

    Args:
        raw: as for :func:`shoestring.data.precompute.prepare`.
        out_uri: the same.
        job: the same.
        makers: the same.
        usd_per_hour: price of a worker.
        workers: that share the work (``--engine ray``).
        threads: that decode pictures.

    Returns:
        The forecast; nothing is written to the stores.

    Raises:
        UserError: as ``prepare`` would.
    """
    tools = Tools(makers)
    plan = make_plan(raw, out_uri, job, describe(job, tools))
    units = plan_units(plan, raw)
    runner = Runner(plan, tools, threads)
    todo, bytes_done = _what_is_left(plan, raw, units)
    columns: dict[str, float] = {}
    total, seconds = 0.0, 0.0
    for kind, size in (("records", len(raw)), ("texts", _texts(plan, raw))):
        count = sum(1 for unit in units if unit.kind == kind)
        if not count:
            continue
        sizes, fixed, each = _sample(runner, raw, kind, size)
        sizes["files"] = sizes.pop("files") + fixed * count / size
        for name, value in sizes.items():
            columns[name] = columns.get(name, 0.0) + value * size / len(raw)
        total += sum(sizes.values()) * size
        seconds += each * sum(unit.rows for unit in todo if unit.kind == kind)
    hours = seconds / 3600 / workers
    return Forecast(
        len(raw),
        _texts(plan, raw),
        tuple(columns.items()),
        round(total),
        max(0, round(total) - bytes_done),
        _free(out_uri),
        hours,
        None if usd_per_hour is None else hours * workers * usd_per_hour,
    )


def _texts(plan: Plan, raw: Store) -> int:
    uri, version = plan.out
    return (raw if version is None else Store(uri, version)).manifest.texts


def _free(uri: str) -> int | None:
    if "://" in uri:
        return None
    folder = Path(uri).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _what_is_left(plan: Plan, raw: Store, units: list[Unit]) -> tuple[list[Unit], int]:
    """The units that no earlier command did, and the bytes of those that it did."""
    if not (work_folder(plan.out[0], JOB) / "journal.jsonl").exists() or not units:
        return units, 0
    journal = begin(plan.out[0], JOB, existing(plan.out[0], JOB), settings_of(plan, raw))
    journal.close()
    done = sum(file["bytes"] for e in journal.entries for file in e["piece"]["files"])
    return left(units, journal.entries), done


def _sample(runner: Runner, raw: Store, kind: str, size: int) -> tuple[dict[str, float], float, float]:
    """Bytes a row by column, bytes a fragment, and seconds a row."""
    plan = runner.plan
    rows = _spread(size, BATCHES * plan.batch) if kind == "records" else _by_length(runner, size)
    # The first batch is not timed: there are weights to load and kernels to choose.
    _computed(runner, kind, rows[: 1 if kind == "records" else plan.text_batch])
    began = time.monotonic()
    table = _computed(runner, kind, rows)
    seconds = (time.monotonic() - began) / len(rows)
    if kind == "records" and plan.pictures:
        seconds *= _padding(plan, raw, size) / _padding_of_sample(plan, table)
    sizes = {name: table[name].nbytes / len(rows) for name in table.column_names}
    rest, fixed = _overhead(table)
    if kind == "records":
        for column in plan.latents:
            exact = _moment_bytes(column)
            sizes |= dict.fromkeys(_moment_names(column), exact)
        if "image" in sizes:
            sizes["image"] = _stored_bytes(raw, "image") / size
    return sizes | {"files": rest}, fixed, seconds


def _padding(plan: Plan, raw: Store, size: int) -> float:
    """How many pictures are encoded for each that there is: the last batches of a unit are filled up."""
    units = size / raw.manifest.unit_rows
    encoded = 0.0
    for column in plan.pictures:
        counts = column.counts if isinstance(column, LatentsColumn) else (size,)
        for count in counts:
            each = min(count / units, count)
            rest = round(each % plan.batch)
            encoded += (each - rest + (padded_size(rest, plan.batch) if rest else 0)) * count / each
    return encoded / size


def _padding_of_sample(plan: Plan, table: pa.Table) -> float:
    """The same of a sample, which with many buckets is larger."""
    encoded = 0
    for column in plan.pictures:
        buckets = np.zeros(len(table), np.int64)
        if isinstance(column, LatentsColumn):
            buckets = table[column.bucket_column].to_numpy()
        for count in np.unique(buckets, return_counts=True)[1].tolist():
            full, rest = divmod(count, plan.batch)
            encoded += full * plan.batch + (padded_size(rest, plan.batch) if rest else 0)
    return encoded / len(table)


def _moment_names(column: LatentsColumn) -> list[str]:
    return [column.column, *([column.mirror_column] if column.mirrored else [])]


def _moment_bytes(column: LatentsColumn) -> float:
    """Of a record, on average over the buckets: what a sample's mixture of shapes would blur."""
    each = [np.prod(column.shape(b)) * np.dtype(column.dtype).itemsize for b in range(len(column.buckets))]
    return float(np.dot(each, column.counts) / sum(column.counts)) + 4


def _stored_bytes(store: Store, name: str) -> int:
    table = store.records
    number = table.lance_schema.field(name).id()
    return int(sum(f.bytes_on_disk for f in table.stats.data_stats().fields if f.id == number))


def _spread(size: int, count: int) -> Rows:
    """Rows at equal distances."""
    return np.unique(np.linspace(0, size - 1, min(size, count)).astype(np.int64))


def _by_length(runner: Runner, size: int) -> Rows:
    """Texts at equal distances among many, in the order of their lengths.

    The number of tokens follows the length, so that the mean over so few is near that of all.
    """
    draw = np.random.RandomState(stream_seed(0, "forecast") % 2**32)
    rows = np.arange(size) if size <= LENGTHS else np.unique(draw.randint(0, size, LENGTHS))
    store = runner.out or runner.raw
    texts: Sequence[str] = store.texts.take(rows.tolist(), columns=["text"])["text"].to_pylist()
    order = np.argsort([len(text) for text in texts], kind="stable")
    count = min(len(rows), TEXTS)
    middles = ((np.arange(count) + 0.5) * len(rows) / count).astype(np.int64)
    return np.sort(rows[order[middles]])


def _computed(runner: Runner, kind: str, rows: Rows) -> Any:
    if kind == "texts":
        return runner.text_rows(rows)
    return runner.sample(rows)


def _overhead(table: pa.Table) -> tuple[float, float]:
    """What Lance adds: bytes a row and bytes a fragment, from two fragments of different sizes."""

    def added(rows: int) -> float:
        part = table.slice(0, rows).combine_chunks()
        with tempfile.TemporaryDirectory() as folder:
            piece = write_piece(child(folder, "table"), part)
        return sum(file.bytes for file in piece.files) - sum(part[name].nbytes for name in part.column_names)

    whole = table.num_rows
    half = whole // 2
    if half == 0:
        return 0.0, added(whole)
    each = (added(whole) - added(half)) / (whole - half)
    return each, added(whole) - each * whole
