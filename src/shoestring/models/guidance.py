"""The scale of guidance as an input of distilled networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shoestring.models.layers import sinusoidal_features
from shoestring.tensors import Float


class GuidanceEmbedding(nn.Module):
    """The scale of guidance as an input: a linear map of its sinusoidal features, zero at first.

    Source: arXiv 2210.03142, section 3.1 (w-conditioning).
    """

    FEATURES = 64
    SCALE = 10.0
    """So that scales of 1 to 10 reach over many turns of the fastest features."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.map = nn.Linear(self.FEATURES, dim, bias=False)

    def forward(self, guidance_B: Float[Tensor, " B"] | None) -> Float[Tensor, "B D"]:
        """Embed the scale; without one it is 1, no guidance, for all."""
        return self.map(guidance_features(guidance_B, self.map.weight))


def guidance_features(guidance_B: Float[Tensor, " B"] | None, like: Tensor) -> Float[Tensor, "B F"]:
    """What a network sees of the scale of guidance, which is 1 where it is ``None``."""
    if guidance_B is None:
        guidance_B = torch.ones(1, device=like.device)
    features_BF = sinusoidal_features(GuidanceEmbedding.SCALE * guidance_B, GuidanceEmbedding.FEATURES)
    return features_BF.to(like.dtype)
