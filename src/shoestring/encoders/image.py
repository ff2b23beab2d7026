"""Image codecs: plain pixels, or the latents of a diffusers ``AutoencoderKL``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoestring.config.schema import DataConfig
from shoestring.interfaces import ImageCodec
from shoestring.runtime import UserError
from shoestring.tensors import Float, UInt8


class PixelCodec:
    """Pixels as they are, 0..255 mapped to [-1, 1]."""

    name = "pixels"
    channels = 3
    downsampling = 1

    def encode(self, pixels: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Pixels in [-1, 1]."""
        return pixels.float() / 127.5 - 1

    def latents(
        self, moments: Float[Tensor, "B 3 H W"], noise: Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, "B 3 H W"]:
        """The moments themselves: there is no posterior to draw from, the noise is not used."""
        return moments

    def decode(self, latents: Float[Tensor, "B 3 H W"]) -> UInt8[Tensor, "B 3 H W"]:
        """Pixels, rounded and clipped."""
        return _to_bytes(latents)


class AutoencoderKLCodec:
    """A variational autoencoder of the Stable Diffusion kind, with the statistics of its config.

    Runs in float32 (SDXL's overflows in float16).
    """

    name = "autoencoder-kl"

    def __init__(self, path: str, device: torch.device | None = None) -> None:
        """Load the weights.

        Args:
            path: folder or hub name of an autoencoder, or of a pipeline with one in ``vae/``.
            device: where it runs; the CPU by default.

        Raises:
            UserError: if diffusers is missing or the weights cannot be loaded.
        """
        self._model = _load_autoencoder(path).to(device or "cpu").eval().requires_grad_(False)
        config = self._model.config
        self.channels: int = config.latent_channels
        self.downsampling: int = 2 ** (len(config.block_out_channels) - 1)
        self._scale: float = config.scaling_factor
        self._shift: float = config.shift_factor or 0.0

    @torch.no_grad()
    def encode(self, pixels: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B M h w"]:
        """Mean and log-variance of the latents, stacked.

        Args:
            pixels: sides must be multiples of ``downsampling``.

        Returns:
            Unscaled moments, on the device of ``pixels``.

        Raises:
            UserError: if a side does not fit.
        """
        height, width = pixels.shape[2:]
        if height % self.downsampling or width % self.downsampling:
            raise UserError(
                f"resolution: pictures are {width} x {height}; data.codec=autoencoder-kl needs multiples of "
                f"{self.downsampling}"
            )
        scaled = pixels.to(self._model.device).float() / 127.5 - 1
        return self._model.encode(scaled).latent_dist.parameters.to(pixels.device)

    def latents(
        self, moments: Float[Tensor, "B M h w"], noise: Float[Tensor, "B C h w"]
    ) -> Float[Tensor, "B C h w"]:
        """A draw from the posterior: scale * (mean + std * noise - shift).

        Source: Rombach et al., arXiv 2112.10752, section 3.1 and appendix G (scaling); the shift is that
        of 16-channel autoencoders, zero elsewhere.
        """
        mean, log_variance = moments.float().chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(-30, 20))
        return self._scale * (mean + std * noise - self._shift)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C h w"]) -> UInt8[Tensor, "B 3 H W"]:
        """Pixels of model latents, rounded and clipped, on the device of ``latents``."""
        unscaled = latents.to(self._model.device).float() / self._scale + self._shift
        return _to_bytes(self._model.decode(unscaled).sample).to(latents.device)


def _to_bytes(values: Tensor) -> Tensor:
    return ((values.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _load_autoencoder(path: str) -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(
            "data.codec=autoencoder-kl needs the package diffusers; run: pip install 'shoestring[latents]'"
        ) from error
    local = Path(path).exists()
    # A bare autoencoder, or a whole pipeline; of a hub name one cannot see which.
    subfolders = [None, "vae"] if not local or (Path(path) / "vae").is_dir() else [None]
    failure: Exception | None = None
    for subfolder in subfolders:
        try:
            return AutoencoderKL.from_pretrained(
                path, subfolder=subfolder, use_safetensors=True, local_files_only=local
            )
        except (OSError, ValueError) as error:
            failure = failure or error
    raise UserError(
        f"data.codec_path is {path!r}: cannot load an autoencoder from it ({_first_line(failure)}); give a "
        "folder with config.json and safetensors weights of a diffusers AutoencoderKL, or its hub name"
    ) from failure


def _first_line(error: Exception | None) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def _autoencoder_kl(config: DataConfig, device: torch.device | None) -> ImageCodec:
    if config.codec_path is None:
        raise UserError(
            "data.codec_path is not set; data.codec=autoencoder-kl needs the folder or hub name of them"
        )
    return AutoencoderKLCodec(config.codec_path, device)


CODECS: dict[str, Callable[[DataConfig, torch.device | None], ImageCodec]] = {
    "pixels": lambda config, device: PixelCodec(),
    "autoencoder-kl": _autoencoder_kl,
}


def build_codec(config: DataConfig, device: torch.device | None = None) -> ImageCodec:
    """The codec of a run.

    Args:
        config: ``codec`` and ``codec_path``.
        device: where an autoencoder runs; the CPU by default.

    Returns:
        The codec; it takes tensors on any device and answers on the same.

    Raises:
        UserError: if weights or packages are missing.
    """
    return CODECS[config.codec](config, device)
