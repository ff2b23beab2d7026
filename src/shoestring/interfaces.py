"""The four seams of the system and the records that cross them.

``Denoiser``          noisy latents, noise level, conditioning, visible patches -> ``Denoised``
``ImageCodec``        pixels <-> stored moments <-> model latents
``TextEncoder``       strings -> token embeddings and their mask
``FeatureExtractor``  pixels -> features, for metrics

``models`` and ``diffusion`` do not know each other: they meet at ``Network`` (what a model offers) and
``Denoiser`` (what diffusion makes of it) in ``training/step.py`` and ``sampling/generate.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from shoestring.tensors import (
    Bool,
    Float,
    Int,
    UInt8,
    scatter_tokens,
    unpatchify,
)


@dataclass(frozen=True)
class NoiseLevel:
    """A noise level as the pair of scales in xt = alpha x0 + sigma noise, one each a sample.

    EDM has alpha 1; flow matching has alpha 1 - t and sigma t. All values are finite.
    """

    alpha_B: Float[Tensor, " B"]
    sigma_B: Float[Tensor, " B"]

    def __len__(self) -> int:
        return self.alpha_B.shape[0]

    def images(self) -> tuple[Tensor, Tensor]:
        """Both scales shaped ``B 1 1 1``, to multiply images with."""
        return self.alpha_B[:, None, None, None], self.sigma_B[:, None, None, None]


@dataclass(frozen=True)
class Conditioning:
    """What a picture is conditioned on.

    ``text_mask_BS`` is true at real caption tokens; ``None`` means all of them. ``prepared`` is a
    network's own cache of everything that does not depend on the noise (see ``Network.prepare``).
    """

    text_BSD: Float[Tensor, "B S D"]
    text_mask_BS: Bool[Tensor, "B S"] | None = None
    prepared: Any = None

    def __len__(self) -> int:
        return self.text_BSD.shape[0]

    def null(self) -> Conditioning:
        """The empty caption for classifier-free guidance: all embeddings zero (MicroDiT, released code).

        Where captions are masked, one zero token stays attended, as attention over nothing is undefined.
        """
        mask_BS = self.text_mask_BS
        if mask_BS is not None:
            mask_BS = torch.zeros_like(mask_BS)
            mask_BS[:, 0] = True
        return Conditioning(torch.zeros_like(self.text_BSD), mask_BS)

    def drop(self, dropped_B: Bool[Tensor, " B"]) -> Conditioning:
        """Replace the captions of some samples by the empty one (training with guidance in mind)."""
        null = self.null()
        text_BSD = torch.where(dropped_B[:, None, None], null.text_BSD, self.text_BSD)
        mask_BS = self.text_mask_BS
        if mask_BS is not None and null.text_mask_BS is not None:
            mask_BS = torch.where(dropped_B[:, None], null.text_mask_BS, mask_BS)
        return Conditioning(text_BSD, mask_BS)

    def part(self, rows: slice) -> Conditioning:
        """Some of the samples; a network's cache is not carried over."""
        mask_BS = self.text_mask_BS
        return Conditioning(self.text_BSD[rows], None if mask_BS is None else mask_BS[rows])

    def cat(self, other: Conditioning) -> Conditioning:
        """Stack two batches with captions of the same length."""
        mask_BS = self.text_mask_BS
        if mask_BS is not None and other.text_mask_BS is not None:
            mask_BS = torch.cat([mask_BS, other.text_mask_BS])
        return Conditioning(torch.cat([self.text_BSD, other.text_BSD]), mask_BS)


@dataclass(frozen=True)
class Denoised:
    """A denoiser's estimate of the clean image, float32, as tokens of the visible patches."""

    x0_BKG: Float[Tensor, "B K G"]
    visible_BK: Int[Tensor, "B K"] | None
    """Where the tokens belong; ``None`` = all patches, in order."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    patch_size: int

    def image(self) -> Float[Tensor, "B C H W"]:
        """The estimate as images; patches that were not visible are zero."""
        tokens = self.x0_BKG
        if self.visible_BK is not None:
            tokens = scatter_tokens(tokens, self.visible_BK, self.grid[0] * self.grid[1])
        return unpatchify(tokens, self.grid, self.patch_size)


@runtime_checkable
class Network(Protocol):
    """What a model offers: tensors in, tensors out, no noise, no loss, no random numbers."""

    patch_size: int
    in_channels: int
    caption_dim: int

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """Compute once whatever does not depend on the noise; the result holds it in ``prepared``."""
        ...

    def __call__(
        self,
        x: Float[Tensor, "B C H W"],
        time_B: Float[Tensor, " B"],
        conditioning: Conditioning,
        visible_BK: Int[Tensor, "B K"] | None = None,
    ) -> Float[Tensor, "B K G"]:
        """Raw network output for the visible patches, in the order of ``visible_BK``."""
        ...


@runtime_checkable
class Denoiser(Protocol):
    """(noisy latents, noise level, conditioning, visible patches) -> estimate of the clean latents."""

    def __call__(
        self,
        xt: Float[Tensor, "B C H W"],
        level: NoiseLevel,
        conditioning: Conditioning,
        visible_BK: Int[Tensor, "B K"] | None = None,
    ) -> Denoised:
        """Estimate x0 from xt = alpha x0 + sigma noise."""
        ...

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """See :meth:`Network.prepare`."""
        ...


@runtime_checkable
class ImageCodec(Protocol):
    """Pixels to stored moments, moments to model latents, latents to pixels."""

    name: str
    channels: int
    """Channels of the latents."""
    downsampling: int
    """Pixels per latent along one side."""

    def encode(self, pixels: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B M h w"]:
        """Moments to store: the latents, or their mean and log-variance stacked."""
        ...

    def latents(
        self, moments: Float[Tensor, "B M h w"], noise: Float[Tensor, "B C h w"]
    ) -> Float[Tensor, "B C h w"]:
        """Model latents (shifted and scaled); ``noise`` is standard normal and draws the posterior."""
        ...

    def decode(self, latents: Float[Tensor, "B C h w"]) -> UInt8[Tensor, "B 3 H W"]:
        """Pixels of model latents, rounded and clipped."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """List of strings to embeddings ``B S D`` and a boolean mask ``B S`` (true = real token)."""

    name: str
    width: int
    max_tokens: int

    def __call__(self, texts: Sequence[str]) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"]]:
        """Encode; every row is padded with zeros to ``max_tokens``, longer texts are cut."""
        ...


@runtime_checkable
class FeatureExtractor(Protocol):
    """Pixels to features, for metrics."""

    name: str
    width: int

    def __call__(self, pixels: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """Features in float32; independent of the batch a picture is in."""
        ...
