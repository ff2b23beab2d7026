"""Objects and their colours in a picture, by transformers: what :mod:`shoestring.evaluation.geneval` judges.

The original finds objects with mmdetection's Mask2Former (Swin-S) and names colours with OpenCLIP's ViT-L/14.
These are the networks of the hub, a larger Mask2Former where nothing else is said: scores come close to
published ones, but are not those of the same code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shoestring.encoders.weights import Source, load_network, weights_digest
from shoestring.evaluation.features import CLIP
from shoestring.evaluation.geneval import CLASSES, COLOURS, THRESHOLD, Detection
from shoestring.runtime import UserError
from shoestring.sampling.generate import to_pil
from shoestring.tensors import UInt8

DETECTOR = "facebook/mask2former-swin-large-coco-instance"
COLOUR_CLASSIFIER = "openai/clip-vit-large-patch14"
OTHER_NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
"""What other lists of COCO's classes call them."""
GREY = 0x99
"""What is put in the place of pixels that do not belong to an object."""
TEMPLATES = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)


def class_names(labels: Mapping[int, str]) -> dict[int, str]:
    """GenEval's names of a detector's classes.

    Args:
        labels: of its config, by number.

    Returns:
        Those of COCO's 80 classes.

    Raises:
        ValueError: naming classes that the detector does not know.
    """
    named = {number: OTHER_NAMES.get(label.lower(), label.lower()) for number, label in labels.items()}
    unknown = [name for name in CLASSES if name not in named.values()]
    if unknown:
        raise ValueError(f"it does not know {', '.join(unknown[:3])}; it must know COCO's 80 classes")
    return {number: name for number, name in named.items() if name in CLASSES}


class Mask2FormerDetector:
    """Finds objects with their masks.

    Source: Cheng et al., arXiv 2112.01527.
    """

    def __init__(self, path: str = DETECTOR, device: torch.device | str = "cpu") -> None:
        """Load the network.

        Args:
            path: folder or hub name.
            device: where to run.

        Raises:
            UserError: if package or weights are missing, or do not know COCO's classes.
        """
        try:
            from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil
        except ImportError as error:
            raise _no_transformers("the detector") from error
        source = Source(
            field="weights of the detector",
            place=path,
            what="a Mask2Former",
            files="config.json, preprocessor_config.json and model.safetensors",
        )

        network, self._processor = load_network(
            source, Mask2FormerForUniversalSegmentation, ["mask2former"], Mask2FormerImageProcessorPil
        )
        self.device = torch.device(device)
        self._network: Any = network.eval().requires_grad_(False).to(self.device)
        try:
            self._names = class_names(network.config.id2label)
        except ValueError as error:
            raise source.mistake(str(error)) from error

    @cached_property
    def digest(self) -> str:
        """Of the weights and of how they are used."""
        return weights_digest(self._network.state_dict(), {"threshold": THRESHOLD})

    @torch.no_grad()
    def __call__(self, picture: UInt8[Tensor, "3 H W"]) -> list[Detection]:
        """The objects of a picture, with scores from ``THRESHOLD``; masks are boolean ``H W``."""
        image = Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())
        inputs = self._processor(images=[image], return_tensors="pt")
        given = {key: inputs[key].to(self.device) for key in ("pixel_values", "pixel_mask")}
        outputs = self._network(**given)
        (found,) = self._processor.post_process_instance_segmentation(
            outputs, threshold=THRESHOLD, target_sizes=[picture.shape[1:]], return_binary_maps=True
        )
        detections: list[Detection] = []
        if not found["segments_info"]:  # then there is one map of -1 in the place of masks
            return detections
        for mask_HW, segment in zip(found["segmentation"], found["segments_info"], strict=True):
            name, mask = self._names.get(segment["label_id"]), mask_HW.cpu().bool().numpy()
            if name is not None and mask.any():
                detections.append(Detection(name, float(segment["score"]), box_of(mask), mask))
        return detections


def box_of(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[float, float, float, float]:
    """The box around the pixels of a mask that has some: left, top, right, bottom."""
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def cut_out(picture: UInt8[Tensor, "3 H W"], detection: Detection) -> UInt8[Tensor, "1 3 h w"]:
    """An object on grey, cut to its box.

    Args:
        picture: it is on.
        detection: with box, and mask where there is one.

    Returns:
        A picture.
    """
    height, width = picture.shape[1:]
    left, top, right, bottom = (round(side) for side in detection.box)
    left, top = min(max(0, left), width - 1), min(max(0, top), height - 1)
    seen = picture
    if detection.mask is not None:
        mask = torch.from_numpy(np.asarray(detection.mask)).to(picture.device)
        seen = torch.where(mask, picture, torch.full_like(picture, GREY))
    return seen[:, top : max(top + 1, bottom), left : max(left + 1, right)][None]


def middle_square(pixels: UInt8[Tensor, "1 3 H W"], side: int) -> UInt8[Tensor, "3 side side"]:
    """The shorter side to ``side`` by Pillow's bicubic filter, then the middle, as OpenCLIP sees pictures.

    Args:
        pixels: of one picture.
        side: of the result.

    Returns:
        Pixels.
    """
    picture = to_pil(pixels[0])
    scale = side / min(picture.size)
    # The longer side is cut off and not rounded, as in torchvision.
    size = (max(side, int(picture.width * scale)), max(side, int(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = round((picture.width - side) / 2), round((picture.height - side) / 2)
    picture = picture.crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


class ClipColours:
    """Names the colours of objects: those whose descriptions are most like them.

    Source: Radford et al., arXiv 2103.00020, for classes by description; GenEval's released code for these.
    """

    def __init__(self, path: str = COLOUR_CLASSIFIER, device: torch.device | str = "cpu") -> None:
        """Load the network.

        Args:
            path: folder or hub name.
            device: where to run.

        Raises:
            UserError: if package or weights are missing.
        """
        try:
            from transformers import CLIPModel, CLIPTokenizer
        except ImportError as error:
            raise _no_transformers("the classifier of colours") from error
        source = Source(
            field="weights of the classifier of colours",
            place=path,
            what="a CLIP",
            files="config.json, model.safetensors and the tokenizer's files",
        )

        network, self._tokenizer = load_network(source, CLIPModel, ["clip"], CLIPTokenizer)
        self.device = torch.device(device)
        self._network: Any = network.eval().requires_grad_(False).to(self.device)
        self._side = int(network.config.vision_config.image_size)
        self._described: dict[str, Tensor] = {}

    @cached_property
    def digest(self) -> str:
        """Of the weights and of how they are used."""
        return weights_digest(self._network.state_dict(), {"side": self._side})

    def __call__(self, picture: UInt8[Tensor, "3 H W"], detections: Sequence[Detection]) -> list[str]:
        """The colour of each object.

        Args:
            picture: they are on.
            detections: of one class.

        Returns:
            One of ``COLOURS`` each.
        """
        if not detections:
            return []
        mean, std = (255 * torch.tensor(values)[:, None, None] for values in CLIP)
        crops = [middle_square(cut_out(picture, each).cpu(), self._side) for each in detections]
        x = (torch.stack(crops).float() - mean) / std
        with torch.no_grad():
            seen_BF = _features(self._network.get_image_features(pixel_values=x.to(self.device)))
        likeness_BC = torch.nn.functional.normalize(seen_BF, dim=1) @ self._colours_of(detections[0].name).T
        return [COLOURS[i] for i in likeness_BC.argmax(dim=1).tolist()]

    def _colours_of(self, name: str) -> Tensor:
        """A direction for each colour of a class: the mean of those of its descriptions."""
        if name not in self._described:
            rows = []
            for colour in COLOURS:
                texts = [template.format(colour=colour, name=name) for template in TEMPLATES]
                tokens = self._tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
                with torch.no_grad():
                    told_TF = _features(self._network.get_text_features(**tokens))
                rows.append(torch.nn.functional.normalize(told_TF, dim=1).mean(dim=0))
            self._described[name] = torch.nn.functional.normalize(torch.stack(rows), dim=1)
        return self._described[name]


def _features(output: Any) -> Tensor:
    """Projected features, whether transformers wraps them or not."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _no_transformers(what: str) -> UserError:
    return UserError(f"{what} needs the package transformers; run: pip install 'shoestring[latents]'")
