"""Text encoders: captions to token embeddings of about unit variance, and a mask of the real tokens."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoestring.config import DataConfig
from shoestring.encoders.towers import ClipText, MiniLMText, T5Text
from shoestring.encoders.weights import DTYPES, required
from shoestring.interfaces import Identity, WordEncoder
from shoestring.tensors import Bool, Float

__all__ = ["ENCODERS", "ClipText", "HashingText", "MiniLMText", "T5Text", "build_text_encoder"]


class HashingText:
    """Embeddings without weights: a word is a fixed random vector, the same on every machine.

    A quarter of a token's variance comes from its place in the sentence (so that "a red circle and a blue
    square" is not "a blue circle and a red square"); the rest comes in halves from the whole word and from
    its character trigrams (so that "apple" and "apples" are close).
    """

    name = "hashing"
    VERSION = 1
    """Raised when a word's vector changes."""
    padding_carries_text = False

    def __init__(self, max_tokens: int, width: int = 256) -> None:
        """Nothing to load.

        Args:
            max_tokens: tokens kept, one a word or punctuation mark.
            width: width of the embeddings.
        """
        self.max_tokens = max_tokens
        self.width = width
        made = f"{self.VERSION}/{width}".encode()
        self.identity = Identity(self.name, digest=hashlib.blake2b(made, digest_size=16).hexdigest())

    def __call__(self, texts: Sequence[str]) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"]]:
        """Encode; a text without a word is the empty caption: zeros, with one of them to attend to."""
        rows_BSD = np.zeros((len(texts), self.max_tokens, self.width), dtype=np.float32)
        mask_BS = np.zeros((len(texts), self.max_tokens), dtype=np.bool_)
        mask_BS[:, :1] = True
        for b, text in enumerate(texts):
            words = self.pieces(text)[: self.max_tokens]
            mask_BS[b, : len(words)] = True
            for s, word in enumerate(words):
                rows_BSD[b, s] = _word_vector(word, self.width) + 0.5 * _vector(f"place {s}", self.width)
        return torch.from_numpy(rows_BSD), torch.from_numpy(mask_BS)

    def pieces(self, word: str) -> list[str]:
        """Words and punctuation marks in small letters; a word is never split."""
        return re.findall(r"\w+|[^\w\s]", word.lower())

    def rare_words(self, count: int) -> list[str]:
        """Any word would do: letters of the alphabet without a vowel between them."""
        return [f"{first}k{first}" for first in "szxqvwpgdbfhjmnt"[:count]]


@lru_cache(maxsize=8192)
def _vector(feature: str, width: int) -> NDArray[np.float64]:
    digest = hashlib.blake2b(feature.encode("utf-8", "replace"), digest_size=4).digest()
    # numpy keeps the stream of RandomState frozen for good, those of its newer generators not.
    return np.random.RandomState(int.from_bytes(digest, "little")).standard_normal(width)


def _word_vector(word: str, width: int) -> NDArray[np.float64]:
    padded = f"^{word[:64]}$"
    trigrams = [padded[i : i + 3] for i in range(len(padded) - 2)]
    spelling = np.sum([_vector(f"trigram {t}", width) for t in trigrams], axis=0) / len(trigrams) ** 0.5
    vector: NDArray[np.float64] = 0.375**0.5 * (_vector(f"word {word}", width) + spelling)
    return vector


def _minilm(config: DataConfig, device: torch.device | None) -> WordEncoder:
    dtype = DTYPES[config.text_encoder_dtype]
    return MiniLMText(config.max_tokens, config.text_encoder_path, device, dtype)


def _with_weights(
    encoder: Callable[[str, int, torch.device | None, torch.dtype], WordEncoder],
) -> Builder:
    def build(config: DataConfig, device: torch.device | None) -> WordEncoder:
        reader = f"data.text_encoder={config.text_encoder}"
        place = required("data.text_encoder_path", config.text_encoder_path, reader)
        return encoder(place, config.max_tokens, device, DTYPES[config.text_encoder_dtype])

    return build


Builder = Callable[[DataConfig, torch.device | None], WordEncoder]
ENCODERS: dict[str, Builder] = {
    "hashing": lambda config, device: HashingText(config.max_tokens),
    "minilm": _minilm,
    "clip": _with_weights(ClipText),
    "t5": _with_weights(T5Text),
}


def build_text_encoder(config: DataConfig, device: torch.device | None = None) -> WordEncoder:
    """The text encoder of a run.

    Args:
        config: ``text_encoder``, its path and dtype, and ``max_tokens``.
        device: where it runs; the CPU by default.

    Returns:
        The encoder; its results are on the CPU.

    Raises:
        UserError: if weights or packages are missing.
    """
    return ENCODERS[config.text_encoder](config, device)
