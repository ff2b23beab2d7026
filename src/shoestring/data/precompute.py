"""Precompute: a store with pictures becomes a store of moments, embeddings and features.

The job is cut into units (see :mod:`shoestring.data.units`), each of which is noted in a journal when it is
on the disk; all are committed at once. What a store has already is never touched: further resolutions,
encoders and teachers are new columns beside the old ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np

from shoestring import __version__
from shoestring.data.buckets import Shape, filled_buckets
from shoestring.data.caption import NAME, catch_up
from shoestring.data.jobs import (
    Change,
    Meter,
    Progress,
    begin,
    commit,
    existing,
    forget,
    left,
    pieces_of,
    tidy,
)
from shoestring.data.journal import work_folder
from shoestring.data.manifest import FeatureColumn, LatentsColumn, Manifest, TextColumn
from shoestring.data.runner import Runner
from shoestring.data.store import Store
from shoestring.data.tables import reading
from shoestring.data.units import Makers, Plan, Sums, Tools, Unit, units_of
from shoestring.interfaces import Identity
from shoestring.runtime import UserError

JOB = "prepare"


@dataclass(frozen=True)
class LatentsJob:
    """A column of moments."""

    name: str
    resolution: int
    shapes: tuple[Shape, ...]
    """Height and width in pixels; one: a square or whatever all pictures are to be cropped to. See
    :func:`shoestring.data.buckets.bucket_shapes`."""
    mirrored: bool = False
    """Also the moments of the mirrored pictures."""
    min_bucket: int = 1
    """Pictures of rarer buckets go to the nearest one that has as many."""


@dataclass(frozen=True)
class TextJob:
    """Embeddings of the captions by one encoder."""

    name: str
    positions: Literal["true", "all"] = "true"
    dtype: Literal["int8", "float16"] = "int8"


@dataclass(frozen=True)
class FeatureJob:
    """Features of the pictures by a teacher."""

    name: str
    resolution: int
    """Side of the square that the teacher sees, in pixels."""


@dataclass(frozen=True)
class Job:
    """What a store is to have in the end; what it has already stays as it is."""

    latents: tuple[LatentsJob, ...] = ()
    text: tuple[TextJob, ...] = ()
    features: tuple[FeatureJob, ...] = ()
    keep_images: bool = False
    """Whether a new store takes over the original files."""
    batch: int = 32
    """Pictures encoded at once: results may differ in rounding with it."""
    text_batch: int = 64

    def check(self) -> None:
        """Raise :class:`UserError` if the job makes no sense."""
        for kind, columns in (("resolution", self.latents), ("text", self.text), ("feature", self.features)):
            names = [column.name for column in columns]
            for name in names:
                if not re.fullmatch(NAME, name):
                    raise UserError(
                        f"{name!r} is no name for a {kind} column; take letters, digits and underscores"
                    )
                if names.count(name) > 1:
                    raise UserError(f"the {kind} column {name!r} is asked for twice; name each once")
        for field, value in (("batch", self.batch), ("text_batch", self.text_batch)):
            if value < 1:
                raise UserError(f"{field} is {value}; it must be at least 1")


class Engine(Protocol):
    """Who computes."""

    def describe(self, job: Job, makers: Makers) -> dict[str, Any]:
        """See :func:`describe`."""
        ...

    def run(
        self, plan: Plan, makers: Makers, units: Sequence[Unit], tick: Callable[[str, int], None]
    ) -> Iterator[dict[str, Any]]:
        """Entries of the journal, in any order; ``tick(stage, rows done)``."""
        ...


class Local:
    """This process: threads decode and write while the codec is at work."""

    def __init__(self, threads: int = 2) -> None:
        """Nothing is built yet.

        Args:
            threads: that decode pictures.
        """
        self.threads = threads
        self._tools: tuple[Makers, Tools] | None = None

    def tools(self, makers: Makers) -> Tools:
        """The codec and encoders, built once."""
        if self._tools is None or self._tools[0] is not makers:
            self._tools = makers, Tools(makers)
        return self._tools[1]

    def describe(self, job: Job, makers: Makers) -> dict[str, Any]:
        """See :func:`describe`."""
        return describe(job, self.tools(makers))

    def run(
        self, plan: Plan, makers: Makers, units: Sequence[Unit], tick: Callable[[str, int], None]
    ) -> Iterator[dict[str, Any]]:
        """Compute units one after another."""
        return Runner(plan, self.tools(makers), self.threads, tick).run(units)


def describe(job: Job, tools: Tools) -> dict[str, Any]:
    """What the codec, encoders and teachers of a job say of themselves, as plain values."""
    facts: dict[str, Any] = {"text": {}, "features": {}}
    if job.latents:
        codec = tools.codec
        facts["codec"] = {
            "codec": asdict(codec.identity),
            "channels": codec.channels,
            "moment_channels": codec.moment_channels,
            "downsampling": codec.downsampling,
            "dtype": str(codec.moment_dtype).removeprefix("torch."),
        }
    for text in job.text:
        encoder = tools.encoder(text.name)
        facts["text"][text.name] = {
            "encoder": asdict(encoder.identity),
            "width": encoder.width,
            "max_tokens": encoder.max_tokens,
        }
    for feature in job.features:
        extractor = tools.extractor(feature.name)
        facts["features"][feature.name] = {
            "extractor": asdict(extractor.identity),
            "width": extractor.width,
        }
    return facts


def make_plan(raw: Store, out_uri: str, job: Job, facts: Mapping[str, Any]) -> Plan:
    """What is missing of a job.

    Args:
        raw: with the pictures.
        out_uri: where the result is or will be.
        job: what is wanted.
        facts: of :func:`describe`.

    Returns:
        The plan, without the columns that are there.

    Raises:
        UserError: if a column is there but another maker made it, or the job does not fit the store.
    """
    job.check()
    out = existing(out_uri, JOB)
    if not len(raw):
        raise UserError(f"{raw.uri} holds no records; ingest pictures first")
    if out is not None and len(out) != len(raw):
        raise UserError(
            f"{out_uri} has {len(out):,} records, {raw.uri} has {len(raw):,}; name the store that it was "
            "prepared from, or another --out"
        )
    if (job.latents or job.features) and not raw.manifest.has_images:
        raise UserError(f"{raw.uri} holds no pictures; name the store that shoestring data ingest made")
    latents = tuple(_latents_columns(raw, job, facts))
    text = tuple(TextColumn(**facts["text"][t.name], **asdict(t)) for t in job.text)
    features = tuple(FeatureColumn(**facts["features"][f.name], **asdict(f)) for f in job.features)
    if out is not None:
        old = out.manifest
        latents = _missing(out_uri, "latents", latents, {c.name: c for c in old.latents})
        named = "give the new ones another --text-name"
        text = _missing(out_uri, "embeddings", text, {c.name: c for c in old.text}, named)
        features = _missing(out_uri, "features", features, {c.name: c for c in old.features})
    elif not (latents or text or features):
        raise UserError("nothing to prepare; ask for at least one resolution, text encoder or feature")
    target = (out_uri, None if out is None else out.version)
    where = (raw.uri, raw.version)
    return Plan(where, target, latents, text, features, job.batch, job.text_batch, job.keep_images)


def _latents_columns(raw: Store, job: Job, facts: Mapping[str, Any]) -> Iterator[LatentsColumn]:
    sizes = sizes_of(raw) if job.latents else None
    for wanted in job.latents:
        assert sizes is not None
        codec = facts["codec"]
        step = codec["downsampling"]
        for height, width in wanted.shapes:
            if height % step or width % step or min(height, width) < step:
                raise UserError(
                    f"a shape of {wanted.name} is {height} x {width} px; {Identity(**codec['codec'])} needs "
                    f"multiples of {step}"
                )
        shapes, counts = filled_buckets(*sizes, wanted.shapes, wanted.min_bucket)
        yield LatentsColumn(
            **codec,
            name=wanted.name,
            resolution=wanted.resolution,
            buckets=shapes,
            counts=counts,
            mirrored=wanted.mirrored,
            mean=(),
            std=(),
            sigma=0.0,
        )


def sizes_of(store: Store) -> tuple[Any, Any, Any]:
    """The different sizes of originals: widths, heights, and how many have each."""
    found: dict[int, int] = {}
    with reading(f"{store.uri}: sizes of the pictures"):
        batches = list(store.records.to_batches(columns=["width", "height"]))
    for batch in batches:
        keys = batch["width"].to_numpy().astype(np.int64) << 32 | batch["height"].to_numpy()
        for key, count in zip(*np.unique(keys, return_counts=True), strict=True):
            found[int(key)] = found.get(int(key), 0) + int(count)
    key_N = np.array(sorted(found))
    return key_N >> 32, key_N & 0xFFFFFFFF, np.array([found[int(key)] for key in key_N])


def summary(column: LatentsColumn | TextColumn | FeatureColumn) -> str:
    """A column's maker and settings in words: equal exactly where the columns would be."""
    if isinstance(column, LatentsColumn):
        shapes = " ".join(f"{width}x{height}" for height, width in column.buckets)
        mirrored = ", mirrored too" if column.mirrored else ""
        return f"{_maker(column.codec)} at {shapes}{mirrored}"
    if isinstance(column, TextColumn):
        which = "up to the true length" if column.positions == "true" else "all positions"
        return f"{_maker(column.encoder)}, {column.max_tokens} tokens, {which}, {column.dtype}"
    return f"{_maker(column.extractor)} at {column.resolution} px"


def _maker(identity: Identity) -> str:
    """Name and digest: where the weights lay does not matter (see ``Identity.same``)."""
    return f"{identity.name} ({identity.digest[:16]})" if identity.digest else identity.name


def _missing(
    uri: str,
    kind: str,
    wanted: Sequence[Any],
    have: Mapping[str, Any],
    advice: str = "ask for the same",
) -> tuple[Any, ...]:
    for column in wanted:
        old = have.get(column.name)
        if old is not None and summary(old) != summary(column):
            raise UserError(
                f"{uri} has {kind} {column.name!r} of {summary(old)}; asked for is {summary(column)}; "
                f"{advice}, or choose another --out"
            )
    return tuple(column for column in wanted if column.name not in have)


def settings_of(plan: Plan, raw: Store) -> dict[str, Any]:
    """What decides the result of a plan: a killed job goes on only if it is the same."""
    settings: dict[str, Any] = {
        "source": raw.digest,
        "--batch": plan.batch,
        "text_batch": plan.text_batch,
        "--keep-images": plan.keep_images,
    }
    settings |= {f"latents {c.name}": summary(c) for c in plan.latents}
    settings |= {f"text {c.name}": summary(c) for c in plan.text}
    return settings | {f"feature {c.name}": summary(c) for c in plan.features}


def plan_units(plan: Plan, raw: Store) -> list[Unit]:
    """All units of a plan."""
    uri, version = plan.out
    store = raw if version is None else Store(uri, version)
    new = version is None
    units = units_of(store.records, "records") if new or plan.pictures else []
    return units + (units_of(store.texts, "texts") if new or plan.text else [])


def prepare(
    raw: Store,
    out_uri: str,
    job: Job,
    makers: Makers,
    engine: Engine | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Store:
    """Compute what a store lacks of a job. Killed at any moment, the same call goes on.

    Args:
        raw: with pictures and captions; may be the result itself, which then gets its columns.
        out_uri: folder or URL of the result; a new store, or one prepared from the same records.
        job: what the result is to have.
        makers: of the codec, encoders and teachers that the job names.
        engine: who computes; by default this process.
        progress: called from time to time.

    Returns:
        The new version of the result (the old one, if nothing was missing).

    Raises:
        UserError: if the stores do not fit the job or each other, or the disk is full.
    """
    engine = engine or Local()
    job.check()
    facts = engine.describe(job, makers)
    make_plan(raw, out_uri, job, facts)  # all that is wrong with the job is said before anything is written
    out = existing(out_uri, JOB)
    if out is not None and out.uri != raw.uri:
        catch_up(raw, out, makers.encoders, job.text_batch)
    plan = make_plan(raw, out_uri, job, facts)
    out = existing(out_uri, JOB)
    if out is not None and not (plan.pictures or plan.text):
        forget(out_uri, JOB, out)
        return out
    journal = begin(out_uri, JOB, out, settings_of(plan, raw))
    try:
        units = plan_units(plan, raw)
        todo = left(units, journal.entries)
        each = {"records": max(1, len(plan.pictures)), "texts": 1}
        meter = Meter(_count(units, each), _count(_without(units, todo), each), progress)
        for entry in engine.run(plan, makers, todo, meter):
            journal.add(entry)
        store = commit(
            out_uri, out, _changes(plan, raw, journal.entries), _manifest(plan, raw, out, journal.entries)
        )
    finally:
        journal.close()
    tidy(store, work_folder(out_uri, JOB))
    return store


def _without(units: Sequence[Unit], todo: Sequence[Unit]) -> list[Unit]:
    missing = set(todo)
    return [unit for unit in units if unit not in missing]


def _count(units: Sequence[Unit], each: Mapping[str, int]) -> dict[str, int]:
    return {kind: sum(u.rows for u in units if u.kind == kind) * times for kind, times in each.items()}


def _changes(plan: Plan, raw: Store, entries: Sequence[dict[str, Any]]) -> dict[str, Change]:
    changes = {}
    for kind in ("records", "texts"):
        pieces = pieces_of(kind, entries)
        if plan.out[1] is None:
            changes[kind] = Change("new", pieces, plan.schema(kind, raw))
        elif pieces:
            changes[kind] = Change("columns", pieces, plan.fields(kind))
    return changes


def _manifest(plan: Plan, raw: Store, out: Store | None, entries: Sequence[dict[str, Any]]) -> Manifest:
    sums = {column.name: Sums(column.channels) for column in plan.latents}
    # In the order of the units, whoever was first: sums of floats depend on it.
    for entry in sorted(entries, key=lambda e: e["unit"]["number"]):
        for name, values in entry["sums"].items():
            sums[name].add_json(values)
    latents = tuple(sums[column.name].update(column) for column in plan.latents)
    if out is None:
        old = raw.manifest.model_copy(
            update={"latents": (), "text": (), "features": (), "has_images": plan.keep_images}
        )
    else:
        old = out.manifest
    return old.model_copy(
        update={
            "made_by": __version__,
            "latents": old.latents + latents,
            "text": old.text + plan.text,
            "features": old.features + plan.features,
        }
    )
