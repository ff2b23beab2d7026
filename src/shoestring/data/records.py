"""The records every source returns, and the split of captions into trained and held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from shoestring.runtime import UserError
from shoestring.tensors import UInt8


@dataclass(frozen=True)
class Rejection:
    """A picture or a line of a caption file that was left out, and why."""

    item: str
    reason: str
    kind: str = "left out"
    """The reason in two or three words, to count by."""


@dataclass(frozen=True)
class Picture:
    """A picture as a reader finds it: not decoded, captions as they are."""

    id: str
    data: bytes
    """The file."""
    captions: tuple[str, ...]
    columns: dict[str, float]
    """Numbers to filter by; a value that is missing or no number is left out."""


@dataclass(frozen=True)
class CaptionedImages:
    """Square RGB pictures with one caption each, and what was left out on the way."""

    images: UInt8[Tensor, "N 3 R R"]
    captions: tuple[str, ...]
    rejected: tuple[Rejection, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.images) == len(self.captions), (len(self.images), len(self.captions))

    def __len__(self) -> int:
        return len(self.captions)

    def select(self, indices: Sequence[int]) -> CaptionedImages:
        """The pictures at ``indices``, in that order, without the list of rejections."""
        return CaptionedImages(self.images[list(indices)], tuple(self.captions[i] for i in indices))


@dataclass(frozen=True)
class Splits:
    """Training and held-out pictures; they share no caption. ``held_out`` may be empty, ``train`` never.

    All rejections of a source are listed in ``train.rejected``. ``credit`` is the sentence that a report
    has to show for pictures made by others (empty: none is needed).
    """

    train: CaptionedImages
    held_out: CaptionedImages
    credit: str = ""


def share_of(text: str, purpose: str) -> float:
    """A number in [0, 1) that depends on (text, purpose) alone, the same on every machine and version."""
    digest = hashlib.blake2b(f"{purpose}/{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def split_by_caption(
    pictures: CaptionedImages, held_out: float, max_captions: int | None, credit: str = ""
) -> Splits:
    """Split by a hash of the caption, so that a caption stays on its side when pictures come or go.

    As soon as there are two captions and ``held_out`` is above zero, each side gets at least one.

    Args:
        pictures: at least one picture.
        held_out: share of the captions to hold out, 0 to 1.
        max_captions: number of training captions kept, chosen by a second hash; ``None`` keeps all.
        credit: passed on.

    Returns:
        The two sides; pictures keep their order.

    Raises:
        UserError: if there is no picture at all.
    """
    if not pictures.captions:
        raise UserError("data: there is no usable picture; at least one with a caption is needed")
    by_share = sorted(set(pictures.captions), key=lambda caption: (share_of(caption, "held-out"), caption))
    count = sum(share_of(caption, "held-out") < held_out for caption in by_share)
    if held_out > 0 and len(by_share) > 1:
        count = max(count, 1)
    count = min(count, len(by_share) - 1)
    held = set(by_share[:count])
    train = sorted(by_share[count:], key=lambda caption: (share_of(caption, "keep"), caption))
    kept = set(train[:max_captions])
    rows = range(len(pictures))
    chosen = pictures.select([i for i in rows if pictures.captions[i] in kept])
    return Splits(
        CaptionedImages(chosen.images, chosen.captions, pictures.rejected),
        pictures.select([i for i in rows if pictures.captions[i] in held]),
        credit,
    )
