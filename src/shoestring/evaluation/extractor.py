"""What all feature extractors share: one rule for pictures, chunks of one size, an identity."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from shoestring.encoders.weights import weights_digest
from shoestring.evaluation.digests import digest_of, pictures_digest
from shoestring.evaluation.resize import RESIZES
from shoestring.interfaces import Identity
from shoestring.runtime import atomic_write
from shoestring.tensors import Float, UInt8


class Extractor(ABC):
    """A network that looks at pictures; a ``FeatureExtractor``.

    Pictures are uint8: rounded once, where they were made. Each is brought to ``side`` x ``side`` by one
    named convention, whatever its proportions.
    """

    name: str
    width: int
    side: int
    chunk = 16
    """Pictures of every forward pass; the last one is filled up."""

    def __init__(self, network: nn.Module, resize: str, device: torch.device | str = "cpu") -> None:
        """Take a network.

        Args:
            network: with its weights.
            resize: name of the convention, see :data:`shoestring.evaluation.resize.RESIZES`.
            device: where to run; features come back on the CPU.
        """
        self.resize, self.device = resize, torch.device(device)
        self._network = network.eval().requires_grad_(False).to(self.device)

    @property
    def widths(self) -> tuple[int, ...]:
        """Values a picture of each output."""
        return (self.width,)

    @cached_property
    def identity(self) -> Identity:
        """The name, and a digest of the weights and of how the network sees a picture."""
        settings = {"side": self.side, "resize": self.resize}
        return Identity(self.name, digest=weights_digest(self._network.state_dict(), settings))

    @abstractmethod
    def _scaled(self, x: Tensor) -> Tensor:
        """Values from 0 to 255 as the network was trained with."""

    @abstractmethod
    def _outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """Of one chunk of preprocessed pictures; features first."""

    def preprocess(self, pixels: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 side side"]:
        """Resize and normalise.

        Args:
            pixels: pictures of any size.

        Returns:
            The network's input.

        Raises:
            ValueError: if the pictures are not uint8 ``B 3 H W``.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pictures are {pixels.dtype} {tuple(pixels.shape)}; they must be uint8 B 3 H W")
        return self._scaled(RESIZES[self.resize](pixels.to(self.device), self.side))

    @torch.no_grad()
    def outputs(self, pictures: Iterable[Tensor]) -> tuple[Float[Tensor, "B _"], ...]:
        """All that the network gives for metrics, see the class.

        Every forward pass has the same number of pictures (the last is filled up), because convolutions
        choose another algorithm, with another rounding, for another batch size.

        Args:
            pictures: uint8 ``3 H W`` each, of any sizes, or all as one tensor; at least one.

        Returns:
            Float32, on the CPU, a row a picture.
        """
        return tuple(torch.cat(column) for column in zip(*self.pieces(pictures), strict=True))

    @torch.no_grad()
    def pieces(self, pictures: Iterable[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """As :meth:`outputs`, of a few pictures after another: what is not kept takes no memory.

        Args:
            pictures: see there.

        Yields:
            tuple[Tensor, ...]: all outputs of the next pictures.
        """
        for part in chunks(pictures, self.chunk):
            x = torch.cat([self.preprocess(picture[None]) for picture in part])
            found = self._outputs(F.pad(x, (0, 0, 0, 0, 0, 0, 0, self.chunk - len(part))))
            yield tuple(each[: len(part)].float().cpu() for each in found)

    def __call__(self, pixels: Collection[Tensor] | Tensor) -> Float[Tensor, "B F"]:
        """Features of pictures.

        Args:
            pixels: see :meth:`outputs`; none is fine.

        Returns:
            ``width`` values a picture, float32, on the CPU.
        """
        return self.outputs(pixels)[0] if len(pixels) else torch.empty(0, self.width)


def chunks(pictures: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Pictures in lists of ``size``; the last may be shorter."""
    rest = iter(pictures)
    while part := list(islice(rest, size)):
        yield part


def kept_outputs(
    extractor: Extractor,
    pictures: Iterable[Tensor],
    folder: Path,
    label: str,
) -> tuple[Tensor, ...]:
    """All outputs of an extractor, from a file if they were computed before.

    Args:
        extractor: what looks.
        pictures: at least one; gone through twice.
        folder: of the files; each is named by the extractor, the label, and a digest of network and pixels.
        label: how people call the pictures.

    Returns:
        As :meth:`Extractor.outputs`.
    """
    key = digest_of([extractor.identity.digest, pictures_digest(pictures)])[:12]
    path = folder / f"{extractor.name}-{label}-{key}.safetensors"
    if not path.exists():
        outputs = extractor.outputs(pictures)
        data = save({str(i): output.contiguous() for i, output in enumerate(outputs)})
        atomic_write(path, lambda file: file.write(data))
        return outputs
    kept = load_file(path)
    return tuple(kept[str(i)] for i in range(len(kept)))
