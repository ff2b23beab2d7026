"""Training data out of one or several stores: batches in the order of :mod:`shoestring.data.order`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoestring.data.loader import Batch, is_mirrored
from shoestring.data.members import Member, Rows
from shoestring.data.order import Order, Slots, StoreRows, batch_number
from shoestring.data.permutation import scatter_bits
from shoestring.data.prefetch import Prefetcher
from shoestring.data.records import CaptionedImages
from shoestring.interfaces import ImageCodec
from shoestring.runtime import stream_seed

CAPTIONS = 1024


@dataclass(frozen=True)
class Mixing:
    """How samples are chosen; all of it decides what a run sees."""

    seed: int = 0
    weights: tuple[float, ...] = ()
    """One a store; none = as many as its rows."""
    repeats: bool = False
    """Weights are views of each record per epoch instead of shares of the samples."""
    window: int | None = None
    """Blocks shuffled together."""
    flip: bool = False
    """Mirror half of the samples."""


@dataclass
class StoreData:
    """Rows of stores as training or held-out data.

    Args:
        members: stores with equal buckets and codec; with ``captions``, encoder.
        codec: of the moments.
        mixing: how samples are chosen.
        classes: the captions that are classes, by number; ``None`` where captions are no classes.
    """

    members: tuple[Member, ...]
    codec: ImageCodec
    mixing: Mixing
    classes: tuple[str, ...] | None = None
    _prefetcher: Prefetcher[tuple[int, int, int, int], Batch] | None = field(
        default=None, init=False, repr=False
    )
    _order: Order | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return sum(len(member) for member in self.members)

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """Height and width of the pictures of each bucket."""
        return self.members[0].latents.buckets

    def order(self, batch: int) -> Order:
        """The order at a batch size.

        Args:
            batch: samples.

        Returns:
            The order.

        Raises:
            UserError: if a weight, a store or a bucket does not fit.
        """
        order = self._order  # threads may ask for different batch sizes where a stage begins
        if order is None or order.batch_size != batch:
            mixing = self.mixing
            stores = [
                StoreRows(
                    member.key,
                    {_label(shape): len(rows) for shape, rows in zip(self.buckets, member.rows, strict=True)},
                    window=mixing.window,
                )
                for member in self.members
            ]
            weights = mixing.weights or None
            choice = {"repeats": weights} if mixing.repeats else {"weights": weights}
            self._order = order = Order(stores, mixing.seed, batch, **choice)
        return order

    def batch(self, first_nimg: int, nimg: int, count: int, rank: int = 0, ranks: int = 1) -> Batch:
        """A batch of a stage, or the share of one rank; the next ones are prepared meanwhile.

        Args:
            first_nimg: images of the run before the stage.
            nimg: images of the run before this batch.
            count: batch size of the stage, over all ranks.
            rank: whose share.
            ranks: how many share.

        Returns:
            The batch.
        """
        order = self.order(count)
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(
                lambda key: self.read(self.order(key[1]).batch(key[0]).part(key[2], key[3])), _next
            )
        return self._prefetcher.get((batch_number(first_nimg, nimg, order.batch_size), count, rank, ranks))

    def name(self, first_nimg: int, nimg: int, count: int, place: int) -> str:
        """See :meth:`shoestring.data.loader.TrainingData.name`."""
        order = self.order(count)
        slots = order.batch(batch_number(first_nimg, nimg, order.batch_size))
        bucket = [_label(shape) for shape in self.buckets].index(slots.bucket)
        return self.members[int(slots.store_B[place])].name(bucket, int(slots.row_B[place]))

    def close(self) -> None:
        """Stop preparing batches."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def read(self, slots: Slots) -> Batch:
        """Read samples.

        Args:
            slots: of an order, or a part of them.

        Returns:
            The samples. Which caption and whether mirrored depends on the seed and the number of the sample.
        """
        seed = self.mixing.seed
        choice_B = (scatter_bits(slots.sample_B, stream_seed(seed, "caption")) >> np.uint64(1)).astype(
            np.int64
        )
        mirror_B = is_mirrored(seed, slots.sample_B) if self.mixing.flip else None
        bucket = [_label(shape) for shape in self.buckets].index(slots.bucket)
        return self._read(bucket, slots.store_B, slots.row_B, choice_B, mirror_B)

    def some(self, count: int) -> Batch:
        """The first rows of the fullest bucket as they are, with their first captions."""
        bucket, store_B, row_B = self._first(count)
        return self._read(bucket, store_B, row_B, np.zeros(len(row_B), np.int64), None)

    def _first(self, count: int | None) -> tuple[int, Rows, Rows]:
        sizes = [sum(len(member.rows[b]) for member in self.members) for b in range(len(self.buckets))]
        bucket = int(np.argmax(sizes))
        counts = [len(member.rows[bucket]) for member in self.members]
        store_B = np.repeat(np.arange(len(counts)), counts)[:count]
        return bucket, store_B, np.concatenate([np.arange(n) for n in counts])[:count]

    def _read(
        self, bucket: int, store_B: Rows, row_B: Rows, choice_B: Rows, mirror_B: NDArray[np.bool_] | None
    ) -> Batch:
        parts = []
        for i, member in enumerate(self.members):
            mine = np.flatnonzero(store_B == i)
            if len(mine):
                mirror = None if mirror_B is None else mirror_B[mine]
                moments, texts = member.read(bucket, row_B[mine], choice_B[mine], mirror)
                parts.append((mine, moments, *self._captions(i, texts)))
        moments_BMhw = _joined([(mine, moments) for mine, moments, *_ in parts])
        class_B = None
        if self.classes is not None:
            class_B = _joined([(mine, number) for mine, _, number, *_ in parts])
        if self.members[0].text is None:
            return Batch(moments_BMhw, None, None, class_B)
        text_BSD = _joined([(mine, text) for mine, _, _, text, _ in parts])
        return Batch(moments_BMhw, text_BSD, _joined([(part[0], part[4]) for part in parts]), class_B)

    def _captions(self, store: int, texts: Rows) -> tuple[Any, Any, Any]:
        """Class numbers, embeddings and mask, as far as they are wanted."""
        member = self.members[store]
        number = None if self.classes is None else self._class_of_text[store][texts]
        if member.text is None:
            return number, None, None
        given = np.flatnonzero(texts >= 0)
        if len(given) == len(texts):
            return number, *member.embeddings(texts)
        # No caption is as the empty condition: zeros, with one position to attend to.
        found_BSD, found_BS = member.embeddings(texts[given])
        text_BSD = np.zeros((len(texts), *found_BSD.shape[1:]), np.float32)
        mask_BS = np.tile(np.arange(found_BS.shape[1]) == 0, (len(texts), 1))
        text_BSD[given], mask_BS[given] = found_BSD, found_BS
        return number, text_BSD, mask_BS

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """Distinct captions: where they are classes all, by the alphabet; else those of some rows."""
        if self.classes is not None:
            return distinct_captions(self.members)
        bucket, store_B, row_B = self._first(CAPTIONS)
        words: list[str] = []
        for i, member in enumerate(self.members):
            places = row_B[store_B == i]
            if len(places):
                words += member.first_captions(bucket, places)
        return tuple(dict.fromkeys(word for word in words if word))

    @cached_property
    def _class_of_text(self) -> list[Rows]:
        """Number of the class by row of the texts; the last entry, for no caption, is -1."""
        number = {word: i for i, word in enumerate(self.classes or ())}
        return [
            np.array([number.get(word, -1) for word in all_texts(member)] + [-1]) for member in self.members
        ]

    @property
    def longest_caption(self) -> int:
        """Positions that a caption can have."""
        text = self.members[0].text
        return 0 if text is None else text.max_tokens

    def sigma_data(self) -> float:
        """Standard deviation of the latents by the stores' statistics, weighted by rows."""
        rows = [len(member) for member in self.members]
        squares = sum(n * member.latents.sigma**2 for n, member in zip(rows, self.members, strict=True))
        return float((squares / sum(rows)) ** 0.5)

    def pictures(self, count: int) -> CaptionedImages:
        """Pictures of the fullest bucket, decoded, with their first captions.

        Args:
            count: at most so many; of more a sample that is the same every time, in their order.

        Returns:
            The pictures.
        """
        bucket, store_B, row_B = self._first(None)
        if len(row_B) > count:
            draw = np.random.default_rng(stream_seed(0, "pictures"))
            chosen = np.sort(draw.choice(len(row_B), count, replace=False))
            store_B, row_B = store_B[chosen], row_B[chosen]
        height, width = self.buckets[bucket]
        images = [torch.empty(0, 3, height, width, dtype=torch.uint8)]
        words: list[str] = []
        for i, member in enumerate(self.members):
            places = row_B[store_B == i]
            for part in np.array_split(places, max(1, len(places) // 64)) if len(places) else []:
                moments, texts = member.read(bucket, part, np.zeros(len(part), np.int64), None)
                moments_BMhw = torch.from_numpy(moments)
                shape = (len(part), self.codec.channels, *moments.shape[2:])
                images.append(self.codec.decode(self.codec.latents(moments_BMhw, torch.zeros(shape))).cpu())
                words += member.words(texts)
        return CaptionedImages(torch.cat(images), tuple(words))


def all_texts(member: Member) -> list[str]:
    """All distinct captions of a store, used or not."""
    words: list[str] = member.store.column("texts", "text").to_pylist()
    return words


def distinct_captions(members: Sequence[Member]) -> tuple[str, ...]:
    """All captions that the rows of some stores have, by the alphabet.

    Args:
        members: whose.

    Returns:
        The captions.
    """
    found: set[str] = set()
    for member in members:
        rows = pa.array(np.concatenate(member.rows))
        lists = [member.store.column("records", column.column).take(rows) for column in member.captions]
        used = {row for each in lists for row in pc.list_flatten(each).unique().to_pylist()}
        words = all_texts(member)
        found |= {words[row] for row in used}
    return tuple(sorted(found))


def _next(key: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    return key[0] + 1, *key[1:]


def _label(shape: tuple[int, int]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _joined(parts: Sequence[tuple[Rows, NDArray[Any]]]) -> Tensor:
    """A batch of its parts: the places of each and its values, which may have other lengths (padded by 0)."""
    if len(parts) == 1:
        return torch.from_numpy(parts[0][1])
    count = sum(len(mine) for mine, _ in parts)
    shape = np.max([values.shape[1:] for _, values in parts], axis=0).astype(int).tolist()
    joined = np.zeros((count, *shape), parts[0][1].dtype)
    for mine, values in parts:
        if values.ndim > 1:
            joined[mine, : values.shape[1]] = values
        else:
            joined[mine] = values
    return torch.from_numpy(joined)
