"""Further captions for a store: written by a model, or taken over from the store it was prepared from.

Several columns of captions stand side by side, each with its origin. Texts that are new are added behind the
present ones, with the embeddings of every encoder that the store has: no caption is ever without.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from PIL import Image

from shoestring import __version__
from shoestring.data.jobs import Change, Meter, Progress, begin, commit, forget, left, pieces_of, tidy
from shoestring.data.journal import Journal, work_folder
from shoestring.data.manifest import CaptionsColumn
from shoestring.data.pixels import Unusable, decode
from shoestring.data.store import CAPTIONS, Store
from shoestring.data.tables import child, reading, widen_piece, write_piece
from shoestring.data.units import Makers, Tools, Unit, ahead, embed, entry, units_of
from shoestring.interfaces import TextEncoder
from shoestring.runtime import UserError

JOB = "caption"
CATCH_UP = "prepare-captions"
NAME = r"[A-Za-z0-9_]+"
"""Of a column of captions or embeddings."""

Captioner = Callable[[list[Image.Image]], list[str]]


def caption(
    store: Store,
    make: Callable[[], Captioner],
    name: str,
    origin: str,
    batch: int = 8,
    encoders: Mapping[str, Callable[[], TextEncoder]] | None = None,
    text_batch: int = 64,
    threads: int = 2,
    progress: Callable[[Progress], None] | None = None,
) -> Store:
    """Write a caption for every picture of a store. Killed at any moment, the same call goes on.

    Args:
        store: with pictures.
        make: builds the model; called when it is needed.
        name: of the column.
        origin: in words: which model, of which revision, with which prompt.
        batch: pictures at once, always as many.
        encoders: makers of the encoders whose embeddings the store has, by the names of the columns.
        text_batch: texts embedded at once.
        threads: that decode pictures.
        progress: called from time to time.

    Returns:
        The store with the column ``caption_NAME``; where the model wrote nothing the caption is empty.

    Raises:
        UserError: if the store has no pictures, or captions of that name from elsewhere, or an encoder is
            not given.
    """
    check_captions(store, name)
    for old in store.manifest.captions:
        if old.name == name:
            if old.origin != origin:
                raise UserError(
                    f"{store.uri} has captions {name!r} of {old.origin}; give those of {origin} another name"
                )
            forget(store.uri, JOB, store)
            return store
    tools = Tools(Makers(encoders=encoders or {}))
    _check_encoders(store, encoders or {}, tools)
    settings = {"source": store.digest, "name": name, "origin": origin, "batch": batch}
    journal = begin(store.uri, JOB, store, settings | {"text_batch": text_batch})
    try:
        units = units_of(store.records, "pictures")
        todo = left(units, journal.entries)
        count = len(store) - sum(unit.rows for unit in todo)
        meter = Meter({"records": len(store)}, {"records": count}, progress)
        for found in _write_captions(store, make, todo, batch, threads, meter):
            journal.add(found)
        by_unit = {e["unit"]["number"]: e["captions"] for e in journal.entries if "captions" in e}
        known = {text: row for row, text in enumerate(_texts(store))}
        new: list[str] = []
        rows: list[list[list[int]]] = []
        for number in range(len(units)):
            for text in by_unit[number]:
                if text not in known:
                    known[text] = len(known)
                    new.append(text)
            rows.append([[known[text]] for text in by_unit[number]])
        column = CaptionsColumn(name=name, origin=origin)
        done = _add(
            store,
            {column: lambda unit: rows[unit.number]},
            len(new),
            lambda start, stop: new[start:stop],
            tools,
            text_batch,
            journal,
        )
    finally:
        journal.close()
    tidy(done, work_folder(store.uri, JOB))
    return done


def check_captions(store: Store, name: str) -> None:
    """Say what is wrong with captions to come before a model is loaded.

    Args:
        store: that is to get them.
        name: of them.

    Raises:
        UserError: if it is no name, or the store has no pictures.
    """
    if not re.fullmatch(NAME, name):
        raise UserError(f"--name is {name!r}; take letters, digits and underscores")
    if not store.manifest.has_images:
        raise UserError(f"{store.uri} holds no pictures; caption the store that shoestring data ingest made")


def _texts(store: Store) -> Iterator[str]:
    with reading(f"{store.uri}: texts"):
        for part in store.texts.to_batches(columns=["text"]):
            yield from part["text"].to_pylist()


def _check_encoders(store: Store, encoders: Mapping[str, Any], tools: Tools) -> None:
    for column in store.manifest.text:
        if column.name not in encoders:
            raise UserError(
                f"{store.uri} has embeddings {column.name!r} of {column.encoder}, which the new captions "
                "need too; name that encoder as well"
            )
        encoder = tools.encoder(column.name)
        if not encoder.identity.same(column.encoder) or encoder.max_tokens != column.max_tokens:
            raise UserError(
                f"{store.uri} has embeddings {column.name!r} of {column.encoder} with {column.max_tokens} "
                f"tokens; given is {encoder.identity} with {encoder.max_tokens}; new captions need the same"
            )


def _write_captions(
    store: Store,
    make: Callable[[], Captioner],
    units: Sequence[Unit],
    batch: int,
    threads: int,
    tick: Callable[[str, int], None],
) -> Iterator[dict[str, Any]]:
    parts = (
        (unit, range(start, min(start + batch, unit.start + unit.rows)))
        for unit in units
        for start in range(unit.start, unit.start + unit.rows, batch)
    )
    captioner = make() if units else None
    written: list[str] = []
    for unit, pictures in ahead(parts, lambda part: (part[0], _pictures(store, part[1])), threads):
        assert captioner is not None
        texts = captioner(pictures + pictures[-1:] * (batch - len(pictures)))
        # JSON may carry halves of surrogate pairs, which no tokenizer takes.
        written += [
            " ".join(text.encode("utf-8", "replace").decode().split()) for text in texts[: len(pictures)]
        ]
        tick("records", len(pictures))
        if len(written) == unit.rows:
            nothing = {"fragment": "", "rows": 0, "files": []}
            where = {"kind": unit.kind, "number": unit.number, "start": unit.start, "rows": unit.rows}
            yield {"unit": where, "piece": nothing, "captions": written}
            written = []


def _pictures(store: Store, rows: range) -> list[Image.Image]:
    found = []
    with reading(f"{store.uri}: records {rows.start} to {rows.stop - 1}"):
        table = store.take(rows, ["id", "image"])
    for row in table.to_pylist():
        try:
            found.append(decode(row["image"]))
        except Unusable as reason:
            raise UserError(
                f"{store.uri}: the picture of record {row['id']!r} {reason}; it could be read when it came "
                "in, so the store is damaged: put it back from a copy"
            ) from reason
    return found


def catch_up(
    raw: Store, out: Store, encoders: Mapping[str, Callable[[], TextEncoder]], text_batch: int
) -> Store:
    """Take over captions that the store with the pictures has got since.

    Args:
        raw: the store that the other was prepared from.
        out: with the same records.
        encoders: makers of its encoders.
        text_batch: texts embedded at once.

    Returns:
        The new version of the other store; the same, if nothing was new.

    Raises:
        UserError: if the captions of the two do not go together, or an encoder is not given.
    """
    have = {column.name for column in out.manifest.captions}
    columns = [column for column in raw.manifest.captions if column.name not in have]
    if not columns:
        forget(out.uri, CATCH_UP, out)
        return out
    common = min(raw.manifest.texts, out.manifest.texts)
    for mine, theirs in zip(_texts(out), _texts(raw), strict=False):
        if mine != theirs:
            raise UserError(
                f"{out.uri} and {raw.uri} hold different texts, so captions {columns[0].name!r} cannot be "
                "taken over; prepare into another --out"
            )
    count = raw.manifest.texts - common
    if count and out.manifest.texts > common:
        raise UserError(f"{out.uri} has texts of its own; prepare into another --out")
    tools = Tools(Makers(encoders=encoders))
    if count:
        _check_encoders(out, encoders, tools)
    journal = begin(out.uri, CATCH_UP, out, {"source": raw.digest, "text_batch": text_batch})

    def rows_of(column: CaptionsColumn) -> Callable[[Unit], list[list[int]]]:
        def rows(unit: Unit) -> list[list[int]]:
            table = raw.take(range(unit.start, unit.start + unit.rows), [column.column])
            return list(table[column.column].to_pylist())

        return rows

    def texts(start: int, stop: int) -> list[str]:
        found = raw.texts.take(list(range(common + start, common + stop)), columns=["text"])
        return list(found["text"].to_pylist())

    try:
        done = _add(
            out, {column: rows_of(column) for column in columns}, count, texts, tools, text_batch, journal
        )
    finally:
        journal.close()
    tidy(done, work_folder(out.uri, CATCH_UP))
    return done


def _add(
    store: Store,
    columns: Mapping[CaptionsColumn, Callable[[Unit], list[list[int]]]],
    count: int,
    texts: Callable[[int, int], list[str]],
    tools: Tools,
    text_batch: int,
    journal: Journal,
) -> Store:
    """Add columns of captions and ``count`` new texts, unit by unit, and commit both."""
    size = store.manifest.unit_rows
    starts = enumerate(range(0, count, size))
    new = [Unit("new texts", number, start, min(size, count - start)) for number, start in starts]
    for unit in left(new, journal.entries):
        some = texts(unit.start, unit.start + unit.rows)
        journal.add(
            entry(unit, write_piece(child(store.uri, "texts"), _text_rows(store, tools, some, text_batch)))
        )
    fields = pa.schema([(column.column, CAPTIONS) for column in columns])
    fragments = [fragment.fragment_id for fragment in store.records.get_fragments()]
    for unit in left(units_of(store.records, "records"), journal.entries):
        table = pa.table([pa.array(rows(unit), CAPTIONS) for rows in columns.values()], schema=fields)
        journal.add(entry(unit, widen_piece(store.records, fragments[unit.number], table)[0]))
    changes = {"records": Change("columns", pieces_of("records", journal.entries), fields)}
    if new:
        changes["texts"] = Change("append", pieces_of("new texts", journal.entries), store.texts.schema)
    manifest = store.manifest.model_copy(
        update={
            "made_by": __version__,
            "captions": (*store.manifest.captions, *columns),
            "texts": store.manifest.texts + count,
        }
    )
    return commit(store.uri, store, changes, manifest)


def _text_rows(store: Store, tools: Tools, texts: list[str], text_batch: int) -> pa.Table:
    """Texts with all embeddings, in the columns' order of the table."""
    rows = pa.table({"text": texts})
    if store.manifest.text:
        embedded = embed(store.manifest.text, tools, texts, text_batch)
        rows = pa.table([rows["text"], *embedded.columns], names=["text", *embedded.column_names])
    return rows.select(store.texts.schema.names).cast(store.texts.schema)
