"""Encoded data in memory, and the order in which training sees it.

The place in the data is one integer, the images seen so far (nimg): epoch ``nimg // n``, place
``nimg % n`` in that epoch's own permutation. Batch size, ranks and restarts do not change the order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from shoestring.data.records import CaptionedImages
from shoestring.interfaces import ImageCodec, TextEncoder
from shoestring.runtime import stream
from shoestring.tensors import Bool, Float, Int

Progress = Callable[[int, int], object]
"""Called with (done, total), in pictures and captions together."""


@dataclass(frozen=True)
class Batch:
    """What one training step sees."""

    moments_BMhw: Float[Tensor, "B M h w"]
    text_BSD: Float[Tensor, "B S D"] | None
    """``None`` where captions were not encoded."""
    text_mask_BS: Bool[Tensor, "B S"] | None
    caption_B: Int[Tensor, " B"]
    """Which of the distinct captions."""
    index_B: Int[Tensor, " B"]
    """Rows of the data set."""


@dataclass(frozen=True)
class PreparedData:
    """Moments of all pictures and the embeddings of their distinct captions."""

    codec: ImageCodec
    moments_NMhw: Float[Tensor, "N M h w"]
    mirrored_NMhw: Float[Tensor, "N M h w"] | None
    """Moments of the mirrored pictures; ``None`` = pictures are never mirrored."""
    captions: tuple[str, ...]
    """Distinct captions, in the order of the embeddings."""
    text_USD: Float[Tensor, "U S D"] | None
    text_mask_US: Bool[Tensor, "U S"] | None
    caption_N: Int[Tensor, " N"]
    """Which caption a picture has."""

    def __len__(self) -> int:
        return len(self.moments_NMhw)

    def rows(self, index_B: Int[Tensor, " B"], mirror_B: Bool[Tensor, " B"] | None = None) -> Batch:
        """The given rows in float32, some of them mirrored."""
        moments = self.moments_NMhw[index_B]
        if mirror_B is not None and self.mirrored_NMhw is not None:
            moments = torch.where(mirror_B[:, None, None, None], self.mirrored_NMhw[index_B], moments)
        caption_B = self.caption_N[index_B]
        text_BSD = None if self.text_USD is None else self.text_USD[caption_B].float()
        mask_BS = None if self.text_mask_US is None else self.text_mask_US[caption_B]
        return Batch(moments.float(), text_BSD, mask_BS, caption_B, index_B)

    def batch(self, seed: int, first_nimg: int, count: int) -> Batch:
        """The samples number ``first_nimg`` to ``first_nimg + count - 1`` of a run.

        Args:
            seed: the run's seed.
            first_nimg: images seen before this batch.
            count: images of the batch; it may reach into following epochs.

        Returns:
            The batch; the same sample whichever batch it falls in.
        """
        places = range(first_nimg, first_nimg + count)
        index_B = torch.tensor([sample_index(seed, nimg, len(self)) for nimg in places])
        if self.mirrored_NMhw is None:
            return self.rows(index_B)
        return self.rows(index_B, torch.tensor([_is_mirrored(seed, nimg, len(self)) for nimg in places]))

    def sigma_data(self) -> float:
        """Standard deviation of the latents, over all pictures, channels and places (in float64).

        Latents that are drawn from moments are drawn once, from a fixed stream.
        """
        generator = stream(0, "sigma_data")
        count, total, squares = 0, 0.0, 0.0
        for moments in self.moments_NMhw.split(256):
            shape = (len(moments), self.codec.channels, *moments.shape[2:])
            noise = torch.randn(shape, generator=generator)
            latents = self.codec.latents(moments.float(), noise).double()
            count += latents.numel()
            total += latents.sum().item()
            squares += latents.square().sum().item()
        return float((squares / count - (total / count) ** 2) ** 0.5)


@lru_cache(maxsize=8)
def _epoch_order(seed: int, epoch: int, n: int) -> tuple[int, ...]:
    return tuple(torch.randperm(n, generator=stream(seed, "order", epoch)).tolist())


@lru_cache(maxsize=8)
def _epoch_mirrors(seed: int, epoch: int, n: int) -> tuple[bool, ...]:
    return tuple((torch.rand(n, generator=stream(seed, "mirror", epoch)) < 0.5).tolist())


def sample_index(seed: int, nimg: int, n: int) -> int:
    """The row that a run sees after ``nimg`` images.

    Args:
        seed: the run's seed.
        nimg: images seen before.
        n: rows of the data set.

    Returns:
        A row; each one once an epoch, in an order that differs by epoch and seed.
    """
    return _epoch_order(seed, nimg // n, n)[nimg % n]


def _is_mirrored(seed: int, nimg: int, n: int) -> bool:
    return _epoch_mirrors(seed, nimg // n, n)[nimg % n]


@torch.no_grad()
def prepare(
    images: CaptionedImages,
    codec: ImageCodec,
    encoder: TextEncoder | None,
    batch: int = 64,
    flip: bool = False,
    progress: Progress | None = None,
) -> PreparedData:
    """Encode pictures and captions once, before training.

    Args:
        images: at least one picture.
        codec: pictures to moments. They are stored as float32, or as float16 if the codec compresses.
        encoder: captions to embeddings, stored once each as float16; ``None`` = not wanted (classes).
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
            chunks.append(moments.to("cpu", torch.float32 if codec.downsampling == 1 else torch.float16))
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
        moments_NMhw=encode(mirror=False),
        mirrored_NMhw=encode(mirror=True) if flip else None,
        captions=captions,
        text_USD=torch.cat(texts) if texts else None,
        text_mask_US=torch.cat(masks) if masks else None,
        caption_N=torch.tensor([caption_row[caption] for caption in images.captions]),
    )
