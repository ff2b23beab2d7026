"""The decoder of TAEF2, a tiny autoencoder for the latents of FLUX.2."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

WIDTH, LATENTS, GROUPS, LIMIT = 64, 32, 4, 3.0


def convolution(inputs: int, outputs: int) -> nn.Conv2d:
    """Three by three."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Squeeze(nn.Module):
    """Into (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        """Squeeze."""
        return torch.tanh(x / LIMIT) * LIMIT


class Block(nn.Module):
    """Three convolutions beside a skip connection; at the coarsest resolution some context first."""

    def __init__(self, has_context: bool) -> None:
        super().__init__()
        self.context: nn.Sequential | None = None
        if has_context:
            self.context = nn.Sequential(
                nn.Conv2d(WIDTH, 4 * WIDTH, 1, bias=False),
                nn.GroupNorm(GROUPS, 4 * WIDTH),
                nn.ReLU(),
                nn.Conv2d(4 * WIDTH, WIDTH, 1, bias=False),
            )
        layers = [convolution(WIDTH, WIDTH), nn.ReLU(), convolution(WIDTH, WIDTH), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers, convolution(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Features of the same shape."""
        if self.context is not None:
            x = x + self.context(x)
        return torch.relu(x + self.convolutions(x))


class ShoestringTaef2(ModelMixin, ConfigMixin):
    """Latents to pixels; there is no encoder here."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()

        def double() -> list[nn.Module]:
            return [nn.Upsample(scale_factor=2), nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)]

        self.decoder = nn.Sequential(
            *(Squeeze(), convolution(LATENTS, WIDTH), nn.ReLU(), *(Block(True) for _ in range(3))),
            *(*double(), *(Block(False) for _ in range(3))),
            *(*double(), *(Block(False) for _ in range(3))),
            *(*double(), Block(False), convolution(WIDTH, 3)),
        )

    def decode(self, latents: Tensor) -> SimpleNamespace:
        """Pixels in about [-1, 1], as ``sample``."""
        return SimpleNamespace(sample=self.decoder(latents) * 2 - 1)
