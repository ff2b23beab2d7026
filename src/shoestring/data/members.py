"""Which rows of which stores a run trains on, and how they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shoestring.data.cache import BlockCache
from shoestring.data.embeddings import flat, unpack
from shoestring.data.manifest import CaptionsColumn, LatentsColumn, TextColumn
from shoestring.data.records import share_of
from shoestring.data.store import Store
from shoestring.data.tables import reading
from shoestring.runtime import UserError

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Member:
    """A store as a part of the training data: its columns, and the rows that are used.

    Args:
        store: at a fixed version.
        latents: the moments.
        text: the embeddings; ``None`` where captions are not read.
        captions: their columns; a sample is given one of all.
        rows: numbers of the records by bucket, ascending.
        cache: reads by blocks; ``None`` reads the store itself.
    """

    store: Store
    latents: LatentsColumn
    text: TextColumn | None
    captions: tuple[CaptionsColumn, ...]
    rows: tuple[Rows, ...]
    cache: BlockCache | None = None

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.rows)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Whatever fails here, also in a thread that works ahead, is a sentence."""
        advice = f"to find what is damaged: shoestring data verify {self.store.uri}"
        with reading(f"records of {self.store.uri}", advice=advice):
            yield

    def _take(self, table: Any, rows: Rows, columns: Sequence[str]) -> tuple[pa.Table, Rows]:
        """Each of some rows once, in ascending order, and which of them each place is."""
        unique, back = np.unique(rows, return_inverse=True)
        with self._reading():
            if self.cache is not None:
                return self.cache.take(table, unique, columns, self.store.digest), back
            return table.take(unique.tolist(), columns=list(columns)), back

    def read(
        self, bucket: int, places: Rows, choice: Rows, mirror: NDArray[np.bool_] | None
    ) -> tuple[NDArray[Any], Rows]:
        """Moments and captions of some samples.

        Args:
            bucket: they are all of.
            places: within ``rows[bucket]``.
            choice: a non-negative number each, which decides the caption.
            mirror: samples to mirror; ``None`` = none.

        Returns:
            Moments ``B M h w`` as stored, and the rows of the texts (-1 where there is no caption).
        """
        names = [column.column for column in self.captions]
        columns = [self.latents.column, *names]
        if mirror is not None and self.latents.mirrored:
            columns.append(self.latents.mirror_column)
        table, back = self._take(self.store.records, self.rows[bucket][places], columns)
        shape = self.latents.shape(bucket)
        moments = self._values(table[self.latents.column], shape)[back]  # memory of our own
        if mirror is not None and self.latents.mirrored:
            moments[mirror] = self._values(table[self.latents.mirror_column], shape)[back[mirror]]
        elif mirror is not None and self.latents.downsampling == 1:
            moments[mirror] = moments[mirror][..., ::-1]
        return moments, _choose([table[name].take(pa.array(back)) for name in names], choice)

    def first_captions(self, bucket: int, places: Rows) -> list[str]:
        """The first captions of some samples, without their pictures; see :meth:`read`."""
        names = [column.column for column in self.captions]
        table, back = self._take(self.store.records, self.rows[bucket][places], names)
        lists = [table[name].take(pa.array(back)) for name in names]
        return self.words(_choose(lists, np.zeros(len(places), np.int64)))

    def name(self, bucket: int, place: int) -> str:
        """What a person calls a sample: the id of its record, and the store."""
        table, _ = self._take(self.store.records, self.rows[bucket][[place]], ["id"])
        return f"record {table['id'][0].as_py()} of {self.store.uri}"

    def _values(self, column: pa.ChunkedArray, shape: tuple[int, int, int]) -> NDArray[Any]:
        """Binary values of one length as one array, without a copy."""
        with self._reading():
            values, first = flat(column, np.dtype(self.latents.dtype).type)
        size = int(np.prod(shape))
        if (np.diff(first) != size).any():
            raise UserError(
                f"{self.store.uri}: moments in {self.latents.column} do not have the {size:,} values of "
                f"their bucket; check it with: shoestring data verify {self.store.uri}"
            )
        return values.reshape(-1, *shape)

    def embeddings(self, texts: Rows) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Embeddings of rows of the texts, float32 ``B S D``, and the mask of real tokens."""
        assert self.text is not None
        table, back = self._take(self.store.texts, texts, self.text.columns)
        with self._reading():
            return unpack(self.text, table, back)

    def words(self, texts: Rows) -> list[str]:
        """The captions themselves, by rows of the texts; -1 is the empty one."""
        table, back = self._take(self.store.texts, texts[texts >= 0], ["text"])
        words = iter(table["text"].take(pa.array(back)).to_pylist())
        return [next(words) if row >= 0 else "" for row in texts.tolist()]

    @cached_property
    def key(self) -> str:
        """What the order of its samples depends on: contents and selection, not where the store lies."""
        digest = hashlib.blake2b(self.store.digest.encode(), digest_size=16)
        digest.update(self.latents.name.encode())
        for rows in self.rows:
            digest.update(len(rows).to_bytes(8, "little") + np.ascontiguousarray(rows).tobytes())
        return digest.hexdigest()


def _choose(columns: Sequence[pa.ChunkedArray], choice: Rows) -> Rows:
    """One caption of each record: number ``choice`` modulo how many there are; -1 where there is none."""
    lists = []
    for column in columns:
        array = column.combine_chunks()
        array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
        offsets = array.offsets.to_numpy()
        values = array.values.to_numpy()
        counts = np.diff(offsets)
        if array.null_count:
            counts = np.where(array.is_valid().to_numpy(zero_copy_only=False), counts, 0)
        lists.append((offsets[:-1], counts, values))
    total = np.sum([counts for _, counts, _ in lists], axis=0)
    left = choice % np.maximum(total, 1)
    chosen = np.full(len(choice), -1, dtype=np.int64)
    for starts, counts, values in lists:
        mine = (left >= 0) & (left < counts)
        chosen[mine] = values[(starts + left)[mine]]
        left = np.where(mine, -1, left - counts)
    return chosen


def choose_rows(
    store: Store, latents: LatentsColumn, captions: Sequence[CaptionsColumn], held_out: float, split: str
) -> tuple[tuple[Rows, ...], tuple[Rows, ...]]:
    """Training and held-out rows of a store, by bucket.

    By ``captions`` a record is held out when its first caption's hash is below the share, so that no
    caption is on both sides; by ``pictures`` when its id's hash is.

    Args:
        store: whose.
        latents: decides the buckets.
        captions: the columns that are used; records without any caption stay in.
        held_out: share, 0 to 1.
        split: ``captions`` or ``pictures``.

    Returns:
        Rows for training and held-out rows, a tuple over the buckets each.

    Raises:
        UserError: if nothing is left to train on.
    """
    held = np.zeros(len(store), dtype=bool)
    if held_out > 0 and split == "pictures":
        ids = store.column("records", "id").to_pylist()
        held = np.array([share_of(name, "held-out") < held_out for name in ids], dtype=bool)
    elif held_out > 0:
        words = store.column("texts", "text").to_pylist()
        share = np.array([share_of(word, "held-out") for word in words])
        first = _choose(
            [store.column("records", column.column) for column in captions], np.zeros(len(store), np.int64)
        )
        used = np.unique(first[first >= 0])
        limit = held_out
        if len(used) > 1:  # each side gets at least one
            limit = min(max(held_out, np.nextafter(share[used].min(), 1)), share[used].max())
        held = (first >= 0) & (share[first] < limit) if len(used) else held
    if held.all():
        raise UserError(
            f"data.held_out is {held_out}, which leaves no record of {store.uri} to train on; lower it"
        )
    bucket = np.zeros(len(store), np.int64)
    if len(latents.buckets) > 1:
        bucket = store.column("records", latents.bucket_column).to_numpy().astype(np.int64)

    def sides(chosen: NDArray[np.bool_]) -> tuple[Rows, ...]:
        return tuple(np.flatnonzero(chosen & (bucket == b)) for b in range(len(latents.buckets)))

    return sides(~held), sides(held)
