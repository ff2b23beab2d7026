"""Latents of diffusers' autoencoders, and what codecs with weights have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.encoders.weights import Source, check_complete, check_finite, load
from shoestring.interfaces import Identity
from shoestring.runtime import UserError
from shoestring.tensors import Float, UInt8


def to_bytes(values: Tensor) -> Tensor:
    """[-1, 1] to 0..255, rounded and clipped."""
    return ((values.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class LatentCodec(ABC):
    """A codec with weights, which run in one precision on one device; results are float32.

    Model latents are (latents - shift) * scale, by channel or alike for all.
    """

    name: str
    moment_dtype = torch.float16

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        settings: Mapping[str, Any],
        channels: int,
        downsampling: int,
        device: torch.device | None,
        dtype: torch.dtype,
    ) -> None:
        """Put the network where it runs.

        Args:
            model: the network.
            source: where its weights came from.
            settings: the config of the weights: shape of the network, scale and shift.
            channels: of the latents.
            downsampling: pixels per latent along one side.
            device: where the network runs; the CPU by default.
            dtype: precision of the network.
        """
        self._device = torch.device(device or "cpu")
        self._dtype = dtype
        self._model: Any = model.to(self._device, dtype).eval().requires_grad_(False)
        self._source = source
        self._settings = dict(settings)
        self.channels = channels
        self.moment_channels = channels
        self.downsampling = downsampling
        self._shift_C11, self._scale_C11 = _statistics(settings)

    @cached_property
    def identity(self) -> Identity:
        """Which weights, in which precision, with which scale; hashed when first asked for."""
        settings = {**self._settings, "dtype": str(self._dtype)}
        return self._source.identity(self.name, self._model.state_dict(), settings)

    @property
    def network(self) -> Any:
        """The network itself, to be saved elsewhere."""
        return self._model

    @property
    def shift_and_scale(self) -> tuple[list[float], list[float]]:
        """Of model latents, (latents - shift) * scale: one value, or one a channel."""
        return self._shift_C11.flatten().tolist(), self._scale_C11.flatten().tolist()

    @torch.no_grad()
    def encode(self, pixels: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B M h w"]:
        """Moments, unscaled.

        Args:
            pixels: sides must be multiples of ``downsampling``.

        Returns:
            Moments in float32, on the device of ``pixels``.

        Raises:
            UserError: if a side does not fit, or half precision overflows.
        """
        height, width = pixels.shape[2:]
        if height % self.downsampling or width % self.downsampling:
            raise UserError(
                f"resolution: pictures are {width} x {height}; data.codec={self.name} needs multiples of "
                f"{self.downsampling}"
            )
        scaled = (pixels.to(self._device).float() / 127.5 - 1).to(self._dtype)
        moments = self._encode(scaled)
        check_finite(moments, "data.codec_dtype", self._dtype)
        return moments.to(pixels.device, torch.float32)

    def latents(
        self, moments: Float[Tensor, "B M h w"], noise: Float[Tensor, "B C h w"]
    ) -> Float[Tensor, "B C h w"]:
        """Shifted and scaled moments; without a posterior to draw from the noise is not used."""
        return self._normalise(moments)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C h w"]) -> UInt8[Tensor, "B 3 H W"]:
        """Pixels of model latents, rounded and clipped, on the device of ``latents``."""
        unscaled = latents.float() / self._scale_C11.to(latents.device) + self._shift_C11.to(latents.device)
        decoded = self._decode(unscaled.to(self._device, self._dtype))
        check_finite(decoded, "data.codec_dtype", self._dtype)
        return to_bytes(decoded).to(latents.device)

    def _normalise(self, latents: Tensor) -> Tensor:
        return (latents.float() - self._shift_C11.to(latents.device)) * self._scale_C11.to(latents.device)

    @abstractmethod
    def _encode(self, scaled: Tensor) -> Tensor:
        """Moments of pixels in [-1, 1]."""

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor:
        """Pixels in about [-1, 1] of unscaled latents."""


def _statistics(settings: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Shift and scale, by channel where the config has ``latents_mean`` and ``latents_std``.

    Source: Rombach et al., arXiv 2112.10752, section 3.1 and appendix G (scale); the shift is that of
    16-channel autoencoders. The statistics by channel take the place of the shift and divide the scale.
    """
    scale = settings.get("scaling_factor")
    shift = settings.get("shift_factor")
    mean, std = settings.get("latents_mean"), settings.get("latents_std")
    shift_C11 = torch.tensor(mean if mean is not None else [shift or 0.0]).float().view(-1, 1, 1)
    std_C11 = torch.tensor(std if std is not None else [1.0]).float().view(-1, 1, 1)
    return shift_C11, (1.0 if scale is None else scale) / std_C11


class _DiffusersCodec(LatentCodec):
    """An autoencoder in the format of diffusers, by the name of its class there."""

    class_name: str
    block_channels: str
    """Setting that lists the widths of the resolutions."""

    def __init__(
        self, path: str, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """Load the weights.

        Args:
            path: folder or hub name of an autoencoder, or of a pipeline with one in ``vae/``.
            device: where it runs; the CPU by default.
            dtype: precision of the network.

        Raises:
            UserError: if diffusers is missing, the weights cannot be loaded, or must not run in float16.
        """
        source = Source(
            field="data.codec_path",
            place=path,
            what=f"a diffusers {self.class_name}",
            files="config.json and diffusion_pytorch_model.safetensors, at the top or in vae/",
        )
        model = self._load(source)
        config = {key: value for key, value in model.config.items() if not key.startswith("_")}
        if dtype == torch.float16 and config.get("force_upcast"):
            raise UserError(
                f"data.codec_dtype is fp16, but the config of {path} says force_upcast, as its values "
                "overflow in fp16; set data.codec_dtype=bf16 or fp32"
            )
        super().__init__(
            model,
            source,
            config,
            channels=config["latent_channels"],
            downsampling=2 ** (len(config[self.block_channels]) - 1),
            device=device,
            dtype=dtype,
        )

    def _load(self, source: Source) -> Any:
        try:
            import diffusers
        except ImportError as error:
            raise UserError(
                f"data.codec={self.name} needs the package diffusers; run: pip install 'shoestring[latents]'"
            ) from error
        model_class: Any = getattr(diffusers, self.class_name)

        def loader(only_local: bool) -> Any:
            subfolder = self._subfolder(source, model_class, only_local)
            model, info = model_class.from_pretrained(
                source.place,
                subfolder=subfolder,
                use_safetensors=True,
                local_files_only=only_local,
                output_loading_info=True,
            )
            check_complete(source, info["missing_keys"])
            return model

        return load(source, "diffusers", loader)

    def _subfolder(self, source: Source, model_class: Any, only_local: bool) -> str | None:
        """Where the config is: of a bare autoencoder or of a pipeline, which a name does not tell."""
        failure: OSError | None = None
        for subfolder in (None, "vae"):
            try:
                config = model_class.load_config(
                    source.place, subfolder=subfolder, local_files_only=only_local
                )
            except OSError as error:
                failure = failure or error
                continue
            found = config.get("_class_name")
            if found != self.class_name:
                reader = {c.class_name: c.name for c in DIFFUSERS_CODECS}.get(found)
                advice = f", which data.codec={reader} reads" if reader is not None else ""
                raise source.mistake(f"its config.json is of {found or 'another format'}{advice}")
            return subfolder
        assert failure is not None
        raise failure


class AutoencoderKLCodec(_DiffusersCodec):
    """A variational autoencoder of the Stable Diffusion kind: SD 1 and 2, SDXL, SD 3, FLUX.1.

    Those of 16 channels have a shift and no quant convolutions. SDXL's overflows in float16: refused.
    """

    name = "autoencoder-kl"
    class_name = "AutoencoderKL"
    block_channels = "block_out_channels"

    def __init__(
        self, path: str, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(path, device, dtype)
        self.moment_channels = 2 * self.channels

    def latents(
        self, moments: Float[Tensor, "B M h w"], noise: Float[Tensor, "B C h w"]
    ) -> Float[Tensor, "B C h w"]:
        """A draw from the posterior: scale * (mean + std * noise - shift).

        Source: Rombach et al., arXiv 2112.10752, section 3.1 and appendix G.
        """
        mean, log_variance = moments.float().chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(-30, 20))
        return self._normalise(mean + std * noise)

    def _encode(self, scaled: Tensor) -> Tensor:
        return self._model.encode(scaled).latent_dist.parameters

    def _decode(self, latents: Tensor) -> Tensor:
        return self._model.decode(latents).sample


class AutoencoderDCCodec(_DiffusersCodec):
    """A deep-compression autoencoder, 32 pixels per latent (f32) and more; it has no posterior.

    Source: Chen et al., arXiv 2410.10733.
    """

    name = "autoencoder-dc"
    class_name = "AutoencoderDC"
    block_channels = "encoder_block_out_channels"

    def _encode(self, scaled: Tensor) -> Tensor:
        return self._model.encode(scaled).latent

    def _decode(self, latents: Tensor) -> Tensor:
        return self._model.decode(latents).sample


class AutoencoderTinyCodec(_DiffusersCodec):
    """A distilled autoencoder of the TAESD family, whose latents are those of the large one, scaled."""

    name = "autoencoder-tiny"
    class_name = "AutoencoderTiny"
    block_channels = "encoder_block_out_channels"

    def _encode(self, scaled: Tensor) -> Tensor:
        return self._model.encode(scaled).latents

    def _decode(self, latents: Tensor) -> Tensor:
        return self._model.decode(latents).sample


DIFFUSERS_CODECS: tuple[type[_DiffusersCodec], ...] = (
    AutoencoderKLCodec,
    AutoencoderDCCodec,
    AutoencoderTinyCodec,
)
