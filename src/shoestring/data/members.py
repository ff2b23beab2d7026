"""Which rows of which stores a run trains on, and how they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shoestring.data.cache import BlockCache
from shoestring.data.embeddings import unpack
from shoestring.data.manifest import CaptionsColumn, LatentsColumn, TextColumn
from shoestring.data.records import share_of
from shoestring.data.store import Store
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

    def _take(self, table: Any, rows: Rows, columns: Sequence[str]) -> pa.Table:
        """Rows in the order asked for; each is read once."""
        unique, back = np.unique(rows, return_inverse=True)
        if self.cache is not None:
            found = self.cache.take(table, unique, columns)
        else:
            found = table.take(unique.tolist(), columns=list(columns))
        return (
            found if len(unique) == len(rows) and (back[1:] > back[:-1]).all() else found.take(pa.array(back))
        )

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
        rows = self.rows[bucket][places]
        columns = [self.latents.column, *(column.column for column in self.captions)]
        if mirror is not None and self.latents.mirrored:
            columns.append(self.latents.mirror_column)
        table = self._take(self.store.records, rows, columns)
        shape = self.latents.shape(bucket)
        moments = self._values(table[self.latents.column], shape)
        if mirror is not None and self.latents.mirrored:
            mirrored = self._values(table[self.latents.mirror_column], shape)
            moments = np.where(mirror[:, None, None, None], mirrored, moments)
        elif mirror is not None and self.latents.downsampling == 1:
            moments = np.where(mirror[:, None, None, None], moments[..., ::-1], moments)
        return moments, _choose([table[column.column] for column in self.captions], choice)

    def _values(self, column: pa.ChunkedArray, shape: tuple[int, int, int]) -> NDArray[Any]:
        """Binary values of one length as one array, without a copy for each."""
        array = column.combine_chunks()
        array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
        dtype = np.dtype(self.latents.dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        buffers = array.buffers()
        if pa.types.is_fixed_size_binary(array.type):
            start, total = array.offset * size, len(array) * size
        else:
            kind = np.int64 if pa.types.is_large_binary(array.type) else np.int32
            at = np.frombuffer(buffers[1], kind)[array.offset : array.offset + len(array) + 1]
            start, total = int(at[0]), int(at[-1] - at[0])
        if total != len(array) * size:
            raise UserError(
                f"{self.store.uri}: moments in {self.latents.column} have not the {size} bytes of their "
                f"bucket; "
                f"check it with: shoestring data verify {self.store.uri}"
            )
        data = np.frombuffer(buffers[-1], dtype, count=total // dtype.itemsize, offset=start)
        return data.reshape(len(array), *shape)

    def embeddings(self, texts: Rows) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Embeddings of rows of the texts, float32 ``B S D``, and the mask of real tokens."""
        assert self.text is not None
        unique, back = np.unique(texts, return_inverse=True)
        text_BSD, mask_BS = unpack(self.text, self._take(self.store.texts, unique, self.text.columns))
        if len(unique) == len(texts) and (back[1:] > back[:-1]).all():
            return text_BSD, mask_BS
        return text_BSD[back], mask_BS[back]

    def words(self, texts: Rows) -> list[str]:
        """The captions themselves, by rows of the texts; -1 is the empty one."""
        known: Rows = np.unique(texts[texts >= 0])
        found = dict(
            zip(
                known.tolist(), self._take(self.store.texts, known, ["text"])["text"].to_pylist(), strict=True
            )
        )
        return [found.get(row, "") for row in texts.tolist()]

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
        held = np.array(
            [share_of(key, "held-out") < held_out for key in _column(store, "id").to_pylist()], dtype=bool
        )
    elif held_out > 0:
        words = store.texts.to_table(columns=["text"])["text"].to_pylist()
        share = np.array([share_of(word, "held-out") for word in words])
        first = _choose(
            [_column(store, column.column) for column in captions], np.zeros(len(store), np.int64)
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
        bucket = _column(store, latents.bucket_column).to_numpy().astype(np.int64)

    def sides(chosen: NDArray[np.bool_]) -> tuple[Rows, ...]:
        return tuple(np.flatnonzero(chosen & (bucket == b)) for b in range(len(latents.buckets)))

    return sides(~held), sides(held)


def _column(store: Store, name: str) -> pa.ChunkedArray:
    return store.records.to_table(columns=[name])[name]
