"""Does a picture show what its caption says? CLIPScore, by a named CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.encoders.weights import Source, load_network, weights_digest
from shoestring.evaluation.features import HUB
from shoestring.runtime import UserError
from shoestring.tensors import Float

BATCH = 64


class ClipTexts:
    """Captions as the projections of CLIP's text tower, beside those of its vision tower.

    Source: Radford et al., arXiv 2103.00020.
    """

    def __init__(self, name: str, path: str | None = None, device: torch.device | str = "cpu") -> None:
        """Load the network.

        Args:
            name: a CLIP of :data:`shoestring.evaluation.features.HUB`.
            path: folder or hub name; ``None`` = the usual one.
            device: where to run.

        Raises:
            UserError: if package or weights are missing, or are another network's.
        """
        try:
            from transformers import CLIPTextModelWithProjection, CLIPTokenizer
        except ImportError as error:
            raise UserError(
                f"captions of {name} need the package transformers; run: pip install 'shoestring[latents]'"
            ) from error
        source = Source(
            field=f"weights of {name}",
            place=path or HUB[name][0],
            what="a CLIP",
            files="config.json, model.safetensors and the tokenizer's files",
        )

        kinds = ["clip", "clip_text_model"]
        network, self._tokenizer = load_network(source, CLIPTextModelWithProjection, kinds, CLIPTokenizer)
        self.device = torch.device(device)
        self._network: Any = network.eval().requires_grad_(False).to(self.device)
        self._longest = int(network.config.max_position_embeddings)

    @cached_property
    def digest(self) -> str:
        """Of the weights and of how they are used."""
        return weights_digest(self._network.state_dict(), {"longest": self._longest})

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "B F"]:
        """Embed captions; longer ones are cut.

        Args:
            texts: captions.

        Returns:
            Float32, on the CPU, a row a caption.
        """
        rows = []
        for first in range(0, len(texts), BATCH):
            part = list(texts[first : first + BATCH])
            tokens = self._tokenizer(
                part, padding=True, truncation=True, max_length=self._longest, return_tensors="pt"
            )
            rows.append(self._network(**tokens.to(self.device)).text_embeds.float().cpu())
        return torch.cat(rows)


def clip_scores(pictures_NF: Float[Tensor, "N F"], captions_NF: Float[Tensor, "N F"]) -> Float[Tensor, " N"]:
    """CLIPScore of each picture with its caption: 100 times the cosine, at least 0.

    Args:
        pictures_NF: projections of pictures.
        captions_NF: of their captions, row by row.

    Returns:
        A score each.

    Raises:
        ValueError: if there are not as many of both.

    Source: Hessel et al., arXiv 2104.08718, equation 1 with the weight 100 of the common implementations
    (the paper has 2.5 and cosines from 0 to 1).
    """
    if pictures_NF.shape != captions_NF.shape:
        raise ValueError(
            f"pictures have shape {tuple(pictures_NF.shape)} and captions {tuple(captions_NF.shape)}; they "
            "must agree"
        )
    cosine_N = F.cosine_similarity(pictures_NF.double(), captions_NF.double())
    return 100 * cosine_N.clamp(min=0)
