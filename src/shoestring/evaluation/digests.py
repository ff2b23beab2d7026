"""Hashes by which a result names what it depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor


def digest_of(texts: Iterable[str]) -> str:
    """Of texts, one after another."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(text.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def pictures_digest(pictures: Iterable[Tensor]) -> str:
    """Of the pixels of pictures on the CPU, one after another."""
    digest = hashlib.blake2b(digest_size=16)
    for picture in pictures:
        digest.update(picture.contiguous().numpy().tobytes())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
