"""TAEF2: a tiny autoencoder for the latents of FLUX.2, read from its two safetensors files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from shoestring.encoders.autoencoders import LatentCodec
from shoestring.encoders.weights import Source
from shoestring.tensors import Float

WIDTH = 64
"""Channels of every feature map."""
LATENTS = 32
GROUPS = 4
"""Of the normalisation in ``Block.context``; the files do not tell, and other numbers cost up to 3 dB."""
LIMIT = 3.0
"""The decoder squeezes its input into (-3, 3)."""


class Block(nn.Module):
    """Three convolutions beside a skip connection.

    Blocks at the coarsest resolution first add some context: two 1 x 1 convolutions with a normalisation
    over the whole picture between them.
    """

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
        self.convolutions = nn.Sequential(
            _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH)
        )

    def forward(self, x: Float[Tensor, "B 64 h w"]) -> Float[Tensor, "B 64 h w"]:
        """Features of the same shape."""
        if self.context is not None:
            x = x + self.context(x)
        return torch.relu(x + self.convolutions(x))


class _Squeeze(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / LIMIT) * LIMIT


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _halve() -> nn.Conv2d:
    return nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1, bias=False)


def _double() -> tuple[nn.Module, nn.Module]:
    return nn.Upsample(scale_factor=2), nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)


def _blocks(count: int, has_context: bool = False) -> list[Block]:
    return [Block(has_context) for _ in range(count)]


class Taef2(nn.Module):
    """Encoder and decoder: pixels in [0, 1] to 32 channels at an eighth of the resolution, and back.

    Three times a stride of 2 down, three times nearest neighbours up, 64 channels between. The parts are in
    the order of the released files, whose names count them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            _conv(3, WIDTH),
            *_blocks(1),
            _halve(),
            *_blocks(3),
            _halve(),
            *_blocks(3),
            _halve(),
            *_blocks(3, has_context=True),
            _conv(WIDTH, LATENTS),
        )
        self.decoder = nn.Sequential(
            _Squeeze(),
            _conv(LATENTS, WIDTH),
            nn.ReLU(),
            *_blocks(3, has_context=True),
            *_double(),
            *_blocks(3),
            *_double(),
            *_blocks(3),
            *_double(),
            *_blocks(1),
            _conv(WIDTH, 3),
        )


def _our_name(name: str) -> str:
    return name.replace(".conv.", ".convolutions.").replace(".pool.", ".context.")


class Taef2Codec(LatentCodec):
    """Latents of TAEF2 as they are: mean about 0.05, standard deviation about 0.85; no posterior."""

    name = "taef2"

    def __init__(
        self, path: str, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """Load the weights.

        Args:
            path: folder with ``encoder.safetensors`` and ``decoder.safetensors``.
            device: where it runs; the CPU by default.
            dtype: precision of the network; the files hold float16.

        Raises:
            UserError: if a file is missing or holds other weights.
        """
        source = Source(
            field="data.codec_path",
            place=path,
            what="TAEF2",
            files="encoder.safetensors and decoder.safetensors in a folder of this machine",
        )
        model = Taef2()
        _fill(model.encoder, source, "encoder.safetensors")
        _fill(model.decoder, source, "decoder.safetensors")
        super().__init__(model, source, {}, LATENTS, 8, device, dtype)

    def _encode(self, scaled: Tensor) -> Tensor:
        return self._model.encoder((scaled + 1) / 2)

    def _decode(self, latents: Tensor) -> Tensor:
        return self._model.decoder(latents) * 2 - 1


def _fill(part: nn.Module, source: Source, file: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(source.place) / file
    if not path.is_file():
        raise source.mistake(f"no file {path}")
    try:
        found = {_our_name(name): tensor for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise source.mistake(f"{file} is no safetensors file: {error}") from error
    expected = part.state_dict()
    odd = sorted(
        name
        for name in expected.keys() | found.keys()
        if name not in found or name not in expected or found[name].shape != expected[name].shape
    )
    if odd:
        raise source.mistake(f"{file} has other tensors, beginning with {odd[0]}")
    part.load_state_dict(found)
