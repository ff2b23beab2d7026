"""What training asks of its data, and the small kind of it: encoded data in memory.

The large kind is :class:`shoestring.data.store_rows.StoreData`; both follow the order of
:mod:`shoestring.data.order`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from shoestring.data.order import Order, StoreRows, batch_number
from shoestring.data.permutation import scatter_bits
from shoestring.data.records import CaptionedImages
from shoestring.interfaces import ImageCodec, TextEncoder
from shoestring.runtime import stream, stream_seed
from shoestring.tensors import Bool, Float, Int, UInt8

Progress = Callable[[int, int], object]
"""Called with (done, total), in pictures and captions together."""
ALL = "all"


@dataclass(frozen=True)
class Batch:
    """What one training step sees."""

    moments_BMhw: Float[Tensor, "B M h w"] | UInt8[Tensor, "B M h w"]
    """As stored; the codec makes latents of them."""
    text_BSD: Float[Tensor, "B S D"] | None
    """``None`` where captions were not encoded."""
    text_mask_BS: Bool[Tensor, "B S"] | None
    class_B: Int[Tensor, " B"] | None = None
    """Number of the caption among all by the alphabet; -1 where there is none; ``None`` = not known."""

    def __len__(self) -> int:
        return len(self.moments_BMhw)


class TrainingData(Protocol):
    """What training asks of its data."""

    @property
    def codec(self) -> ImageCodec:
        """Makes latents of the moments."""
        ...

    @property
    def captions(self) -> tuple[str, ...]:
        """Distinct captions: all of them where they are classes, else perhaps only the first."""
        ...

    @property
    def longest_caption(self) -> int:
        """Most tokens of a caption; 0 where captions were not encoded."""
        ...

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """Height and width of the pictures, of each shape that a batch may have."""
        ...

    def __len__(self) -> int: ...

    def batch(self, first_nimg: int, nimg: int, count: int, rank: int = 0, ranks: int = 1) -> Batch:
        """A batch of a stage, or the share of one rank.

        Args:
            first_nimg: images of the run before the stage.
            nimg: images of the run before this batch.
            count: batch size of the stage, over all ranks.
            rank: whose share.
            ranks: how many share; the shares one after another are the batch.

        Returns:
            The batch: a function of these numbers, the data and the seed alone.
        """
        ...

    def name(self, first_nimg: int, nimg: int, count: int, place: int) -> str:
        """What a person calls a sample.

        Args:
            first_nimg: of its batch, as are the next two; see :meth:`batch`.
            nimg: see :meth:`batch`.
            count: see :meth:`batch`.
            place: in the whole batch.

        Returns:
            E.g. ``record r000031 of /data/store``.
        """
        ...

    def some(self, count: int) -> Batch:
        """The first rows as they are, for validation; fewer than ``count`` if there are fewer."""
        ...

    def sigma_data(self) -> float:
        """Standard deviation of the latents."""
        ...

    def close(self) -> None:
        """Stop whatever works ahead."""
        ...


def is_mirrored(
    seed: int, sample_B: np.ndarray[Any, np.dtype[np.int64]]
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which samples of a run are mirrored: half of them, by their numbers."""
    return scatter_bits(sample_B, stream_seed(seed, "mirror")) >> np.uint64(63) == 1


@dataclass(frozen=True)
class PreparedData:
    """Moments of all pictures and the embeddings of their distinct captions."""

    codec: ImageCodec
    seed: int
    """Of the order."""
    moments_NMhw: Tensor
    mirrored_NMhw: Tensor | None
    """Moments of the mirrored pictures; ``None`` = pictures are never mirrored."""
    captions: tuple[str, ...]
    """Distinct captions, in the order of the embeddings."""
    text_USD: Float[Tensor, "U S D"] | None
    text_mask_US: Bool[Tensor, "U S"] | None
    caption_N: Int[Tensor, " N"]
    """Which caption a picture has."""

    def __len__(self) -> int:
        return len(self.moments_NMhw)

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """Of all pictures."""
        factor = self.codec.downsampling
        return ((self.moments_NMhw.shape[2] * factor, self.moments_NMhw.shape[3] * factor),)

    @cached_property
    def longest_caption(self) -> int:
        """Most tokens of a caption."""
        return 0 if self.text_mask_US is None else int(self.text_mask_US.sum(1).max())

    @cached_property
    def _classes(self) -> Int[Tensor, " U"]:
        rank = {caption: i for i, caption in enumerate(sorted(self.captions))}
        return torch.tensor([rank[caption] for caption in self.captions])

    def rows(self, index_B: Int[Tensor, " B"], mirror_B: Bool[Tensor, " B"] | None = None) -> Batch:
        """The given rows, some of them mirrored."""
        moments = self.moments_NMhw[index_B]
        if mirror_B is not None and self.mirrored_NMhw is not None:
            moments = torch.where(mirror_B[:, None, None, None], self.mirrored_NMhw[index_B], moments)
        caption_B = self.caption_N[index_B]
        text_BSD = None if self.text_USD is None else self.text_USD[caption_B].float()
        mask_BS = None if self.text_mask_US is None else self.text_mask_US[caption_B]
        return Batch(moments, text_BSD, mask_BS, self._classes[caption_B])

    def batch(self, first_nimg: int, nimg: int, count: int, rank: int = 0, ranks: int = 1) -> Batch:
        """See :meth:`TrainingData.batch`; the batch may reach into the next epoch."""
        order = Order([StoreRows("memory", {ALL: len(self)})], self.seed, count)
        slots = order.batch(batch_number(first_nimg, nimg, count)).part(rank, ranks)
        mirror_B = torch.from_numpy(is_mirrored(self.seed, slots.sample_B))
        return self.rows(torch.from_numpy(slots.row_B), mirror_B)

    def name(self, first_nimg: int, nimg: int, count: int, place: int) -> str:
        """See :meth:`TrainingData.name`."""
        order = Order([StoreRows("memory", {ALL: len(self)})], self.seed, count)
        row = int(order.batch(batch_number(first_nimg, nimg, count)).row_B[place])
        return f"picture {row:,} ({self.captions[int(self.caption_N[row])]!r})"

    def some(self, count: int) -> Batch:
        """See :meth:`TrainingData.some`."""
        return self.rows(torch.arange(min(count, len(self))))

    def close(self) -> None:
        """Nothing works ahead."""

    def sigma_data(self) -> float:
        """Standard deviation of the latents, over all pictures, channels and places (in float64).

        Latents that are drawn from moments are drawn once, from a fixed stream.
        """
        generator = stream(0, "sigma_data")
        count, total, squares = 0, 0.0, 0.0
        for moments in self.moments_NMhw.split(256):
            shape = (len(moments), self.codec.channels, *moments.shape[2:])
            noise = torch.randn(shape, generator=generator)
            latents = self.codec.latents(moments, noise).double()
            count += latents.numel()
            total += latents.sum().item()
            squares += latents.square().sum().item()
        return float((squares / count - (total / count) ** 2) ** 0.5)


@torch.no_grad()
def prepare(
    images: CaptionedImages,
    codec: ImageCodec,
    encoder: TextEncoder | None,
    seed: int = 0,
    batch: int = 64,
    flip: bool = False,
    progress: Progress | None = None,
) -> PreparedData:
    """Encode pictures and captions once, before training.

    Args:
        images: at least one picture.
        codec: pictures to moments, which are stored as its ``moment_dtype``.
        encoder: captions to embeddings, stored once each as float16; ``None`` = not wanted (classes).
        seed: of the order.
        batch: pictures or captions encoded at a time.
        flip: encode the mirrored pictures too, and mirror half of the samples (``data.flip``).
        progress: called after each of those batches.

    Returns:
        The encoded data, on the CPU.
    """
    assert len(images) > 0
    captions = tuple(dict.fromkeys(images.captions))
    caption_row = {caption: row for row, caption in enumerate(captions)}
    total = len(images) * (1 + flip) + len(captions)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    def encode(mirror: bool) -> Tensor:
        chunks = []
        for pixels in images.images.split(batch):
            moments = codec.encode(pixels.flip(-1) if mirror else pixels)
            chunks.append(moments.to("cpu", codec.moment_dtype))
            advance(len(pixels))
        return torch.cat(chunks)

    texts, masks = [], []
    for start in range(0, len(captions) if encoder is not None else 0, batch):
        assert encoder is not None
        text_BSD, mask_BS = encoder(captions[start : start + batch])
        texts.append(text_BSD.to("cpu", torch.float16))
        masks.append(mask_BS.cpu())
        advance(len(text_BSD))
    return PreparedData(
        codec=codec,
        seed=seed,
        moments_NMhw=encode(mirror=False),
        mirrored_NMhw=encode(mirror=True) if flip else None,
        captions=captions,
        text_USD=torch.cat(texts) if texts else None,
        text_mask_US=torch.cat(masks) if masks else None,
        caption_N=torch.tensor([caption_row[caption] for caption in images.captions]),
    )
