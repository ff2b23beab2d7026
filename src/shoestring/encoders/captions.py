"""Captions of pictures by any image-to-text model of transformers: BLIP, GIT, LLaVA, Qwen-VL and so on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from shoestring.encoders.weights import DTYPES, Source, check_complete, load
from shoestring.runtime import UserError

FIELD = "--captioner"
CHAT_PROMPT = "Describe this picture in one short sentence."


class ImageToText:
    """Pictures to captions, by greedy search."""

    def __init__(
        self,
        model: str,
        device: torch.device | None = None,
        prompt: str = "",
        max_tokens: int = 40,
        dtype: str = "fp32",
        field: str = FIELD,
    ) -> None:
        """Load the weights.

        Args:
            model: folder or hub name.
            device: where it runs; the CPU by default.
            prompt: models that chat are asked this (by default for one short sentence); captions of others
                begin with it.
            max_tokens: of a caption, at most.
            dtype: of the weights, a key of ``DTYPES``.
            field: setting that names the model, for sentences.

        Raises:
            UserError: if the package or the weights are missing.
        """
        try:
            import transformers
        except ImportError as error:
            raise UserError(
                f"{field} needs the package transformers; run: pip install 'shoestring[latents]'"
            ) from error
        if max_tokens < 1:
            raise UserError(f"--max-tokens is {max_tokens}; a caption needs at least 1")
        files = "config.json, safetensors weights, preprocessor_config.json and the tokenizer's files"
        source = Source(field, model, "an image-to-text model of transformers", files)

        def read(only_local: bool) -> tuple[Any, Any]:
            loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(
                model, local_files_only=only_local, dtype=DTYPES[dtype], output_loading_info=True
            )
            network, info = loaded
            check_complete(source, info["missing_keys"])
            return network, _Processor(model, only_local)

        network, self._processor = load(source, "transformers", read)
        self._model: Any = network.to(device or "cpu").eval().requires_grad_(False)
        self._prompt, self._max_tokens = prompt, max_tokens
        commit = source.commit()
        self.origin = f"{model}{'@' + commit if commit else ''}"
        """In words, for the store: model, revision, prompt and length."""
        self.origin += f", prompt {prompt!r}" if prompt else ""
        self.origin += f", at most {max_tokens} tokens, {dtype}"

    @property
    def chats(self) -> bool:
        """Whether it answers what it is asked; others only write captions."""
        return self._processor.chats

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], prompt: str | None = None) -> list[str]:
        """A caption for each picture (RGB, of any size), or an answer to another prompt."""
        inputs, asked = self._processor.inputs(list(pictures), self._prompt if prompt is None else prompt)
        placed = {
            name: value.to(self._model.device, self._model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        ids_BS = self._model.generate(**placed, max_new_tokens=self._max_tokens, do_sample=False, num_beams=1)
        return self._processor.texts(ids_BS[:, asked:])


class _Processor:
    """Pictures to the inputs of a model and tokens to texts, for models with one processor or with two."""

    def __init__(self, model: str, only_local: bool) -> None:
        from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

        # The processors that need no torchvision.
        options = {"local_files_only": only_local, "backend": "pil"}
        try:
            self._both: Any = AutoProcessor.from_pretrained(model, **options)
        except (ValueError, OSError, KeyError):
            self._both = None
        if not hasattr(self._both, "image_processor"):
            self._both = None
            self._images: Any = AutoImageProcessor.from_pretrained(model, **options)
            self._tokens: Any = AutoTokenizer.from_pretrained(model, local_files_only=only_local)
        else:
            self._tokens = self._both.tokenizer
        self._tokens.padding_side = "left"  # what is generated follows the prompt at once
        if self._tokens.pad_token is None:
            self._tokens.pad_token = self._tokens.eos_token

    @property
    def chats(self) -> bool:
        """Whether prompts are turns of a talk."""
        return getattr(self._both, "chat_template", None) is not None

    def inputs(self, pictures: list[Image.Image], prompt: str) -> tuple[dict[str, Any], int]:
        """Inputs of ``generate``, and how many of the tokens that come back repeat the question."""
        if self._both is None:
            return dict(self._images(images=pictures, return_tensors="pt")), 0
        if not self.chats:
            texts = {"text": [prompt] * len(pictures), "padding": True} if prompt else {}
            return dict(self._both(images=pictures, return_tensors="pt", **texts)), 0
        content = [{"type": "image"}, {"type": "text", "text": prompt or CHAT_PROMPT}]
        asked = self._both.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        found = self._both(
            images=[[picture] for picture in pictures],
            text=[asked] * len(pictures),
            padding=True,
            return_tensors="pt",
        )
        return dict(found), found["input_ids"].shape[1]

    def texts(self, ids_BS: torch.Tensor) -> list[str]:
        """What a model wrote."""
        decoded: list[str] = self._tokens.batch_decode(ids_BS, skip_special_tokens=True)
        return [text.strip() for text in decoded]
