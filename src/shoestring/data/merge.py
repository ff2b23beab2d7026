"""Several stores of equal columns to one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shoestring import __version__
from shoestring.data.jobs import Change, Meter, Progress, begin, commit, finished, pieces_of, tidy
from shoestring.data.journal import Journal, work_folder
from shoestring.data.manifest import CaptionsColumn, LatentsColumn, Manifest, SourceFacts
from shoestring.data.precompute import summary
from shoestring.data.store import Store
from shoestring.data.tables import child, write_piece
from shoestring.data.units import Sums
from shoestring.runtime import UserError

JOB = "merge"


def merge(
    stores: Sequence[Store],
    out: str,
    duplicates: Literal["refuse", "suffix"] = "refuse",
    progress: Callable[[Progress], None] | None = None,
) -> Store:
    """Join stores, one after another. Killed at any moment, the same call goes on.

    Equal captions are stored once, with the embeddings of the first. The statistics of the latents are those
    of all pictures together.

    Args:
        stores: two or more, with equal columns by the same codec and encoders.
        out: folder or URL of the new store.
        duplicates: what to do with an id that occurred before: refuse, or give it an ending (``-2``).
        progress: called from time to time.

    Returns:
        The new store.

    Raises:
        UserError: if the stores do not fit each other, ids repeat, ``out`` is in use, or the disk is full.
    """
    done = finished(out, JOB)
    if done is not None:
        return done
    if not stores or not any(map(len, stores)):
        raise UserError("there is nothing to merge; name stores that hold records")
    for store in stores[1:]:
        _check_equal(stores[0], store)
    names = _new_ids(stores, duplicates)
    manifest = _manifest(stores)
    journal = begin(out, JOB, None, {"stores": [s.digest for s in stores], "duplicates": duplicates})
    try:
        row_of, texts = _texts(stores, out, journal)
        _records(stores, out, journal, row_of, names, progress)
        changes = {
            "records": Change("new", pieces_of("records", journal.entries), stores[0].records.schema),
            "texts": Change("new", pieces_of("texts", journal.entries), stores[0].texts.schema),
        }
        store = commit(out, None, changes, manifest.model_copy(update={"texts": texts}))
    finally:
        journal.close()
    tidy(store, work_folder(out, JOB))
    return store


# -- do they fit -------------------------------------------------------------------------------------------


def _check_equal(first: Store, other: Store) -> None:
    """The sentence names both stores and what differs."""
    for kind, described in (("latents", _latents), ("embeddings", _text), ("features", _features)):
        mine, theirs = described(first.manifest), described(other.manifest)
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                raise _unequal(first, other, f"{kind} {name!r}", mine.get(name), theirs.get(name))
    facts = {
        "captions": lambda store: " and ".join(sorted(column.name for column in store.manifest.captions)),
        "original pictures": lambda store: "kept" if store.manifest.has_images else "not kept",
        "the table of records": lambda store: _types(store.records.schema),
        "the table of texts": lambda store: _types(store.texts.schema),
    }
    for what, told in facts.items():
        if told(first) != told(other):
            raise _unequal(first, other, what, told(first), told(other))


def _unequal(first: Store, other: Store, what: str, mine: str | None, theirs: str | None) -> UserError:
    return UserError(
        f"{first.uri} and {other.uri} cannot be merged: {what} is {mine or 'absent'} in the first, "
        f"{theirs or 'absent'} in the second; prepare both alike"
    )


def _latents(manifest: Manifest) -> dict[str, str]:
    told = {}
    for column in manifest.latents:
        drawn = ", drawn already" if column.sampled else ""
        stored = f"{column.moment_channels} channels of {column.dtype}"
        told[column.name] = f"{summary(column)}, {stored}{drawn}"
    return told


def _text(manifest: Manifest) -> dict[str, str]:
    return {column.name: f"{summary(column)}, {column.width} wide" for column in manifest.text}


def _features(manifest: Manifest) -> dict[str, str]:
    return {column.name: f"{summary(column)}, {column.width} wide" for column in manifest.features}


def _types(schema: pa.Schema) -> str:
    return ", ".join(sorted(f"{field.name} {field.type}" for field in schema))


def _new_ids(stores: Sequence[Store], duplicates: str) -> dict[tuple[int, int], str]:
    """New names of ids that occurred before, by number of the store and the record."""
    columns = [store.records.to_table(columns=["id"])["id"].combine_chunks() for store in stores]
    together = pa.chunked_array(columns, pa.string())
    if pc.count_distinct(together).as_py() == len(together):
        return {}
    counts = pc.value_counts(together)
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if duplicates == "refuse":
        raise UserError(
            f"{len(twice):,} ids occur more than once in {', '.join(store.uri for store in stores)}, e.g. "
            f"{twice[0].as_py()!r}; give the later ones an ending with --duplicates suffix"
        )
    taken, seen, names = set(together.to_pylist()), set(), {}
    for number, column in enumerate(columns):
        for row in np.flatnonzero(pc.is_in(column, value_set=twice).to_numpy(zero_copy_only=False)).tolist():
            name = column[row].as_py()
            if name in seen:
                ending = 2
                while f"{name}-{ending}" in taken:
                    ending += 1
                names[number, row] = f"{name}-{ending}"
                taken.add(names[number, row])
            seen.add(name)
    return names


# -- tables ------------------------------------------------------------------------------------------------


def _fragments(stores: Sequence[Store], table: str) -> Iterator[tuple[int, int, int, Any]]:
    """Number of the unit, of the store, first row in the store, fragment."""
    number = 0
    for which, store in enumerate(stores):
        start = 0
        for fragment in (store.records if table == "records" else store.texts).get_fragments():
            yield number, which, start, fragment
            number, start = number + 1, start + fragment.count_rows()


def _done(journal: Journal, kind: str) -> dict[int, int]:
    """Units that are written, and their rows."""
    units = (entry["unit"] for entry in journal.entries if entry["unit"]["kind"] == kind)
    return {int(unit["number"]): int(unit["rows"]) for unit in units}


def _texts(stores: Sequence[Store], out: str, journal: Journal) -> tuple[list[NDArray[np.int32]], int]:
    """Write every distinct text once; the new row of each row of each store, and their number."""
    row_of: dict[str, int] = {}
    rows: list[list[int]] = [[] for _ in stores]
    done = _done(journal, "texts")
    schema = stores[0].texts.schema
    for number, which, start, fragment in _fragments(stores, "texts"):
        words = fragment.to_table(columns=["text"])["text"].to_pylist()
        fresh = []
        for i, word in enumerate(words):
            if word not in row_of:
                row_of[word] = len(row_of)
                fresh.append(i)
            rows[which].append(row_of[word])
        if fresh and number not in done:
            table = fragment.to_table().take(pa.array(fresh)).select(schema.names).cast(schema)
            piece = write_piece(child(out, "texts"), table)
            unit = {"kind": "texts", "number": number, "start": start, "rows": len(fresh)}
            journal.add({"unit": unit, "piece": piece.to_json()})
    return [np.array(part, dtype=np.int32) for part in rows], len(row_of)


def _records(
    stores: Sequence[Store],
    out: str,
    journal: Journal,
    row_of: Sequence[NDArray[np.int32]],
    names: dict[tuple[int, int], str],
    progress: Callable[[Progress], None] | None,
) -> None:
    done = _done(journal, "records")
    meter = Meter({"records": sum(map(len, stores))}, {"records": sum(done.values())}, progress)
    schema = stores[0].records.schema
    captions = [column.column for column in stores[0].manifest.captions]
    for number, which, start, fragment in _fragments(stores, "records"):
        if number in done:
            continue
        table = fragment.to_table().select(schema.names).cast(schema)
        for name in captions:
            column = table[name].combine_chunks()
            moved = _moved(column, row_of[which]).cast(schema.field(name).type)
            table = table.set_column(schema.get_field_index(name), schema.field(name), moved)
        ids = [names.get((which, start + i), name) for i, name in enumerate(table["id"].to_pylist())]
        table = table.set_column(schema.get_field_index("id"), schema.field("id"), pa.array(ids, pa.string()))
        unit = {"kind": "records", "number": number, "start": start, "rows": table.num_rows}
        journal.add({"unit": unit, "piece": write_piece(child(out, "records"), table).to_json()})
        meter("records", table.num_rows)


def _moved(lists: Any, row_of: NDArray[np.int32]) -> Any:
    """Lists of rows of the old texts as rows of the new ones."""
    values = lists.flatten().to_numpy(zero_copy_only=False)
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(row_of[values]))


# -- the manifest ------------------------------------------------------------------------------------------


def _manifest(stores: Sequence[Store]) -> Manifest:
    first = stores[0].manifest
    return first.model_copy(
        update={
            "made_by": __version__,
            "records": sum(map(len, stores)),
            "unit_rows": max(store.manifest.unit_rows for store in stores),
            "sources": _sources([source for store in stores for source in store.manifest.sources]),
            "captions": tuple(_origins(column, stores) for column in first.captions),
            "latents": tuple(
                joined_statistics([store.latents(column.name) for store in stores])
                for column in first.latents
            ),
            "tables": {},
        }
    )


def _sources(sources: Sequence[SourceFacts]) -> tuple[SourceFacts, ...]:
    """Those of one place are one."""
    places: dict[tuple[str, str, str], SourceFacts] = {}
    for source in sources:
        key = source.kind, source.path, source.licence
        old = places.get(key)
        if old is not None:
            source = old.model_copy(
                update={
                    "read": old.read + source.read,
                    "kept": old.kept + source.kept,
                    "rejected": dict(Counter(old.rejected) + Counter(source.rejected)),
                }
            )
        places[key] = source
    return tuple(places.values())


def _origins(column: CaptionsColumn, stores: Sequence[Store]) -> CaptionsColumn:
    origins = dict.fromkeys(store.captions(column.name).origin for store in stores)
    return column.model_copy(update={"origin": "; ".join(origins)})


def joined_statistics(columns: Sequence[LatentsColumn]) -> LatentsColumn:
    """The first column with the counts, means and deviations of the pictures of all.

    Args:
        columns: equal but for their statistics.

    Returns:
        Exactly what the pictures together would give, up to rounding.
    """
    sums = Sums(columns[0].channels)
    for column in columns:
        sizes = [(h // column.downsampling) * (w // column.downsampling) for h, w in column.buckets]
        values = sum(count * size for count, size in zip(column.counts, sizes, strict=True))
        mean_C, std_C = np.array(column.mean), np.array(column.std)
        if values:
            sums.add_json([values, (values * mean_C).tolist(), (values * (std_C**2 + mean_C**2)).tolist()])
    counts = tuple(map(sum, zip(*(column.counts for column in columns), strict=True)))
    return sums.update(columns[0]).model_copy(update={"counts": counts})
