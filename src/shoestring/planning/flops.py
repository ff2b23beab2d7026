"""FLOPs of a forward pass and of a training step, in closed form.

``flops`` counts two per multiply-accumulate. Only matrix products are counted, as everybody does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from shoestring.config import ModelConfig, TokensConfig, TransformerConfig, UNetConfig
from shoestring.models.files import FAMILIES
from shoestring.models.guidance import GuidanceEmbedding
from shoestring.models.layers import attention_width, mlp_width, swiglu_width
from shoestring.models.routing import build_method
from shoestring.models.token_method import Layers, TokenMethod
from shoestring.models.transformer import has_experts
from shoestring.planning.flops_unet import Flops, unet_flops
from shoestring.tensors import gather_tokens, visible_count

Dispatch = Literal["gather", "one-hot"]


@dataclass
class _Counter:
    """The layers of a network that count instead of computing; tokens are on the meta device."""

    model: TransformerConfig
    caption: int
    length: int
    dispatch: Dispatch
    macs: float = 0.0
    constant: float = field(default=0.0)
    """Of which in products that need one gradient only: the one-hot of the released dispatch has none."""

    @property
    def depth(self) -> int:
        return self.model.depth

    def mixer(self, x_BLD: Tensor, visible_BK: Tensor | None = None) -> Tensor:
        model, mixer, before = self.model, self.model.mixer, x_BLD.shape[1]
        for i in range(mixer.depth):
            expert = has_experts(model, i, mixer=True)
            self._block(
                mixer.dim, mixer.qkv_multiplier, mixer.ffn_multiplier, model.head_dim, expert, before, True
            )
        if visible_BK is not None:
            x_BLD = gather_tokens(x_BLD, visible_BK)
        if mixer.depth and mixer.dim != model.dim:
            self.macs += (before + x_BLD.shape[1] + self.caption) * model.dim * mixer.dim
        return x_BLD

    def backbone(self, x_BKD: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        model = self.model
        qkv, ffn = model.per_block("qkv_multipliers"), model.per_block("ffn_multipliers")
        for i in range(model.depth)[first:last]:
            expert = has_experts(model, i)
            self._block(model.dim, qkv[i], ffn[i], model.head_dim, expert, x_BKD.shape[1], True)
        return x_BKD

    def decoder(self, x_BKD: Tensor, visible_BK: Tensor | None) -> Tensor:
        model, decoder = self.model, self.model.decoder
        self.macs += model.dim * 2 * model.dim + x_BKD.shape[1] * model.dim * decoder.dim
        for _ in range(decoder.depth):
            self._block(decoder.dim, 1.0, 4.0, decoder.head_dim, False, self.length, False)
        return x_BKD.new_empty(1, self.length, decoder.dim)

    def _block(
        self, dim: int, qkv: float, ffn: float, head_dim: int, expert: bool, tokens: int, captioned: bool
    ) -> None:
        model, s = self.model, self.caption
        width = attention_width(dim, qkv, head_dim)
        macs: float = 4 * tokens * dim * width + 2 * tokens * tokens * width + 6 * dim * model.dim
        if captioned and model.condition == "text":
            macs += 2 * tokens * dim * dim + 2 * s * dim * dim + 2 * tokens * s * dim
        if expert:
            count = model.experts.count
            chosen = max(1, min(tokens, int(model.experts.capacity * tokens / count)))
            hidden = mlp_width(dim, ffn, model.ffn_multiple_of)
            macs += count * tokens * dim + 2 * count * chosen * dim * hidden
            if self.dispatch == "one-hot":  # gathers and combines by products with a one-hot matrix
                macs += 2 * count * chosen * tokens * dim
                self.constant += 2 * count * chosen * tokens * dim
        elif model.kind == "maskdit":
            macs += 2 * tokens * dim * mlp_width(dim, ffn, model.ffn_multiple_of)
        else:
            macs += 3 * tokens * dim * swiglu_width(dim, ffn, model.ffn_multiple_of)
        self.macs += macs


def run_method(
    model: TransformerConfig, tokens: TokensConfig | None, layers: Layers, length: int, mask_ratio: float
) -> tuple[TokenMethod, int]:
    """Run a token method on layers that count instead of computing; its tokens are on the meta device.

    Args:
        model: the network.
        tokens: the token method; ``None`` = the default.
        layers: what counts.
        length: patches of an image.
        mask_ratio: share of patches that the reduced part of the network does not see.

    Returns:
        The method, and how many patches reach the output layer.
    """
    with torch.device("meta"):
        method = build_method(model, tokens if tokens is not None else TokensConfig())
        visible = visible_count(length, mask_ratio) if method.drops else length
        visible_BK = torch.empty(1, visible, dtype=torch.long) if visible < length else None
        out_BKD, places = method(layers, torch.empty(1, length, model.dim), visible_BK, None)
    predicted = length if places is None else places.shape[1]
    assert out_BKD.shape[1] == predicted
    return method, predicted


@lru_cache(maxsize=256)
def model_flops(
    model: ModelConfig,
    grid: tuple[int, int],
    caption_tokens: int = 0,
    mask_ratio: float = 0.0,
    tokens: TokensConfig | None = None,
    dispatch: Dispatch = "gather",
) -> Flops:
    """FLOPs that one image needs, in closed form for every layer.

    Which layer sees how many patches is not written down a second time: the token method itself runs, on
    the meta device. The backward pass costs twice the forward, except for the layers that look at
    inputs (patches, captions, time), which need no gradient of their input, and looking up a class.

    Args:
        model: the network.
        grid: rows and columns of patches.
        caption_tokens: caption length S, padding included if it is attended; ignored without captions.
        mask_ratio: share of patches that the reduced part of the network does not see.
        tokens: the token method; ``None`` = the default.
        dispatch: of experts: ours (gather), or the one-hot products of the released MicroDiT.

    Returns:
        Forward and training FLOPs.
    """
    if isinstance(model, UNetConfig):
        return unet_flops(model, grid, caption_tokens)
    length = grid[0] * grid[1]
    d, patch_values = model.dim, model.in_channels * model.patch_size**2
    image_values = model.image_channels * model.patch_size**2
    family = FAMILIES[model.kind]
    inputs: float = length * (patch_values + image_values) * d + family.time_features * d
    inputs += GuidanceEmbedding.FEATURES * d * model.guidance_input
    macs: float = d * d  # the second half of the time embedding
    s = 0
    if model.condition == "text":
        s = caption_tokens
        inputs += s * model.caption_dim * d
        macs += s * d * d + 4 * s * d * d + 2 * s * s * d + 2 * d * d
        macs += 3 * s * d * swiglu_width(d, 4.0, model.ffn_multiple_of)

    counter = _Counter(model, s, length, dispatch)
    method, predicted = run_method(model, tokens, counter, length, mask_ratio)
    last_dim = model.decoder.dim if model.decoder.depth else d
    macs += counter.macs + method.extra_macs(length)
    macs += predicted * last_dim * patch_values + 2 * d * last_dim
    training = 3 * macs - counter.constant + 2 * inputs
    return Flops(forward=2.0 * (macs + inputs), training=2.0 * training)
