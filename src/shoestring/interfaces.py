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
    patchify,
    replace_tokens,
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
    """What a picture is conditioned on: a caption, a class, or (a class of -1 everywhere) nothing.

    Beside either, for super-resolution, a small picture, which the empty condition keeps.

    ``text_mask_BS`` is true at real caption tokens; ``None`` means all of them. ``class_B`` is -1 where
    there is no class. ``prepared`` is a network's own cache of everything that does not depend on the noise
    (see ``Network.prepare``).
    """

    text_BSD: Float[Tensor, "B S D"] | None = None
    text_mask_BS: Bool[Tensor, "B S"] | None = None
    class_B: Int[Tensor, " B"] | None = None
    prepared: Any = None
    image: Float[Tensor, "B C H W"] | None = None
    """Super-resolution: latents of the small picture, enlarged to the size of what is drawn."""
    guidance_B: Float[Tensor, " B"] | None = None
    """Distilled models: the scale of guidance that is asked for (``None`` = 1, none); the empty condition
    keeps it."""

    def __post_init__(self) -> None:
        assert (self.text_BSD is None) != (self.class_B is None), "either text or class"

    @staticmethod
    def nothing(count: int, device: torch.device | str = "cpu") -> Conditioning:
        """No condition at all, for ``count`` samples."""
        return Conditioning(class_B=torch.full((count,), -1, device=device))

    def __len__(self) -> int:
        return self._first.shape[0]

    @property
    def _first(self) -> Tensor:
        first = self.text_BSD if self.text_BSD is not None else self.class_B
        assert first is not None
        return first

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._first.device

    def null(self) -> Conditioning:
        """The empty condition for classifier-free guidance.

        Text: all embeddings zero (MicroDiT, released code); where captions are masked, one zero token stays
        attended, as attention over nothing is undefined. Class: -1, which a table maps to the zero vector
        (MaskDiT, released code).
        """
        if self.class_B is not None:
            none_B = torch.full_like(self.class_B, -1)
            return Conditioning(class_B=none_B, image=self.image, guidance_B=self.guidance_B)
        assert self.text_BSD is not None
        mask_BS = self.text_mask_BS
        if mask_BS is not None:
            mask_BS = torch.zeros_like(mask_BS)
            mask_BS[:, 0] = True
        zeros_BSD = torch.zeros_like(self.text_BSD)
        return Conditioning(zeros_BSD, mask_BS, image=self.image, guidance_B=self.guidance_B)

    def drop(self, dropped_B: Bool[Tensor, " B"]) -> Conditioning:
        """Replace the condition of some samples by the empty one (training with guidance in mind)."""
        null = self.null()

        def choose(mine: Tensor | None, empty: Tensor | None) -> Tensor | None:
            if mine is None or empty is None:
                return None
            return torch.where(dropped_B.view(-1, *[1] * (mine.ndim - 1)), empty, mine)

        return Conditioning(
            choose(self.text_BSD, null.text_BSD),
            choose(self.text_mask_BS, null.text_mask_BS),
            choose(self.class_B, null.class_B),
            image=self.image,
            guidance_B=self.guidance_B,
        )

    def part(self, rows: slice) -> Conditioning:
        """Some of the samples; a network's cache is not carried over."""

        def some(field: Tensor | None) -> Tensor | None:
            return None if field is None else field[rows]

        text_BSD, mask_BS, class_B = some(self.text_BSD), some(self.text_mask_BS), some(self.class_B)
        return Conditioning(
            text_BSD, mask_BS, class_B, image=some(self.image), guidance_B=some(self.guidance_B)
        )

    def cat(self, other: Conditioning) -> Conditioning:
        """Stack two batches of the same kind, captions of the same length."""

        def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.cat([a, b])

        return Conditioning(
            both(self.text_BSD, other.text_BSD),
            both(self.text_mask_BS, other.text_mask_BS),
            both(self.class_B, other.class_B),
            image=both(self.image, other.image),
            guidance_B=both(self.guidance_B, other.guidance_B),
        )


@dataclass(frozen=True)
class NetworkOutput:
    """Raw network output: tokens of the visible patches, perhaps a reconstruction of the others."""

    visible_BKG: Float[Tensor, "B K G"]
    visible_BK: Int[Tensor, "B K"] | None = None
    """Where they belong; ``None`` = all patches, in order."""
    dropped_BJG: Float[Tensor, "B J G"] | None = None
    """Patches the network did not see and predicts all the same (MaskDiT's decoder)."""
    dropped_BJ: Int[Tensor, "B J"] | None = None


@dataclass(frozen=True)
class Denoised:
    """A denoiser's estimate of the clean image, float32, as tokens of the visible patches."""

    x0_BKG: Float[Tensor, "B K G"]
    visible_BK: Int[Tensor, "B K"] | None
    """Where the tokens belong; ``None`` = all patches, in order."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    patch_size: int
    dropped_x0_BJG: Float[Tensor, "B J G"] | None = None
    """The estimate at patches that were not seen, from networks that reconstruct them."""
    dropped_BJ: Int[Tensor, "B J"] | None = None

    @staticmethod
    def whole(x0: Float[Tensor, "B C H W"], patch_size: int) -> Denoised:
        """An estimate of all patches, from images."""
        grid = (x0.shape[2] // patch_size, x0.shape[3] // patch_size)
        return Denoised(patchify(x0, patch_size), None, grid, patch_size)

    def image(self) -> Float[Tensor, "B C H W"]:
        """The estimate as images; patches neither visible nor reconstructed are zero."""
        tokens = self.x0_BKG
        if self.visible_BK is not None:
            tokens = scatter_tokens(tokens, self.visible_BK, self.grid[0] * self.grid[1])
        if self.dropped_x0_BJG is not None and self.dropped_BJ is not None:
            tokens = replace_tokens(tokens, self.dropped_BJ, self.dropped_x0_BJG)
        return unpatchify(tokens, self.grid, self.patch_size)


@runtime_checkable
class Network(Protocol):
    """What a model offers: tensors in, tensors out, no noise, no loss, no random numbers."""

    patch_size: int
    in_channels: int
    predicts_all: bool
    """Whether every patch is predicted also when some are dropped (token routing, decoders)."""
    guidance_input: bool
    """Whether the scale of guidance is an input (``Conditioning.guidance_B``)."""

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """Compute once whatever does not depend on the noise; the result holds it in ``prepared``."""
        ...

    def __call__(
        self,
        x: Float[Tensor, "B C H W"],
        time_B: Float[Tensor, " B"],
        conditioning: Conditioning,
        visible_BK: Int[Tensor, "B K"] | None = None,
        path_dropped_B: Bool[Tensor, " B"] | None = None,
    ) -> NetworkOutput:
        """Raw network output.

        ``visible_BK`` are the patches that the reduced part of the network sees (``None`` = all), and
        ``path_dropped_B`` the samples for which that part is left out altogether (SPRINT).
        """
        ...


@runtime_checkable
class Denoiser(Protocol):
    """(noisy latents, noise level, conditioning, visible patches) -> estimate of the clean latents."""

    @property
    def predicts_all(self) -> bool:
        """See :class:`Network`."""
        ...

    @property
    def patch_size(self) -> int:
        """Side of a patch in latents."""
        ...

    @property
    def guidance_input(self) -> bool:
        """See :class:`Network`."""
        ...

    def __call__(
        self,
        xt: Float[Tensor, "B C H W"],
        level: NoiseLevel,
        conditioning: Conditioning,
        visible_BK: Int[Tensor, "B K"] | None = None,
        path_dropped_B: Bool[Tensor, " B"] | None = None,
    ) -> Denoised:
        """Estimate x0 from xt = alpha x0 + sigma noise."""
        ...

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """See :meth:`Network.prepare`."""
        ...


@dataclass(frozen=True)
class Identity:
    """Which weights made something that is stored: what two runs must share to share a store."""

    name: str
    """Kind: ``pixels``, ``autoencoder-kl``, ``clip``, ..."""
    source: str = ""
    """Hub name or folder that the weights came from; empty = there are none."""
    revision: str = ""
    """Commit of the hub, where it is known."""
    digest: str = ""
    """Hash of weights and settings that change the result (hexadecimal); empty = there are none, or what was
    stored is an import that does not say."""

    def same(self, other: Identity) -> bool:
        """Whether both make the same results, wherever their weights lay, as far as is known."""
        return self.name == other.name and (self.digest == other.digest or "" in (self.digest, other.digest))

    def __str__(self) -> str:
        where = f" from {self.source}" if self.source else ""
        return f"{self.name}{where}{f' ({self.digest[:8]})' if self.digest else ''}"


@runtime_checkable
class ImageCodec(Protocol):
    """Pixels to stored moments, moments to model latents, latents to pixels."""

    name: str
    channels: int
    """Channels of the latents."""
    moment_channels: int
    """Channels of the moments: as many, or twice as many where they hold mean and log-variance."""
    moment_dtype: torch.dtype
    """How moments are stored: float16, or uint8 where they are pixels."""
    downsampling: int
    """Pixels per latent along one side."""

    @property
    def identity(self) -> Identity:
        """What made the moments."""
        ...

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
    padding_carries_text: bool
    """Whether positions after the caption hold some of its content (causal towers, as CLIP's)."""
    width: int
    max_tokens: int

    @property
    def identity(self) -> Identity:
        """What made the embeddings."""
        ...

    def __call__(self, texts: Sequence[str]) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"]]:
        """Encode; every row is padded with zeros to ``max_tokens``, longer texts are cut."""
        ...


class WordEncoder(TextEncoder, Protocol):
    """A text encoder that tells how it reads a word."""

    def pieces(self, word: str) -> list[str]:
        """What the encoder reads a word as: one piece, itself, where it knows the word whole."""
        ...

    def rare_words(self, count: int) -> list[str]:
        """Words that mean nothing much and are one piece each, the rarest first: names for a new subject."""
        ...


@runtime_checkable
class FeatureExtractor(Protocol):
    """Pixels to features, for metrics and as a teacher."""

    name: str
    width: int

    @property
    def identity(self) -> Identity:
        """What made the features."""
        ...

    def __call__(self, pixels: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """Features in float32; independent of the batch a picture is in."""
        ...
