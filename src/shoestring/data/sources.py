"""The table of data sources: ``load`` turns ``DataConfig`` into training and held-out pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shoestring.config import DataConfig
from shoestring.data import cifar10, openmoji, shapes
from shoestring.data.records import CaptionedImages, Rejection, Splits, split_by_caption
from shoestring.runtime import UserError

__all__ = ["CaptionedImages", "Rejection", "Splits", "load"]


def _openmoji(config: DataConfig, resolution: int) -> Splits:
    if config.split == "pictures":
        raise UserError(
            "data.split is pictures, but in openmoji every picture has a caption of its own; use captions"
        )
    pictures = openmoji.load(resolution)
    return split_by_caption(pictures, config.held_out, config.max_captions, openmoji.CREDIT)


def _shapes(config: DataConfig, resolution: int) -> Splits:
    if config.split == "pictures":
        raise UserError("data.split is pictures, but shapes hold out combinations; use captions")
    return shapes.load(resolution, config.held_out, config.max_captions)


def _cifar10(config: DataConfig, resolution: int) -> Splits:
    if config.path is None:
        raise UserError(
            f"data.path is not set; data.source=cifar10 needs the folder of {' and '.join(cifar10.FILES)}"
        )
    return cifar10.load(Path(config.path), resolution)


SOURCES: dict[str, Callable[[DataConfig, int], Splits]] = {
    "openmoji": _openmoji,
    "shapes": _shapes,
    "cifar10": _cifar10,
}


def load(config: DataConfig, resolution: int) -> Splits:
    """Load the pictures of a run into memory.

    Args:
        config: which source, and how to split it.
        resolution: side of the square pictures in pixels.

    Returns:
        Training and held-out pictures; the same arguments give the same pictures in the same order.

    Raises:
        UserError: if the source holds no usable picture, or a setting does not fit the source.
    """
    if config.path is not None and config.source != "cifar10":
        raise UserError(
            f"data.path is {config.path!r}, but data.source={config.source} reads no folder; "
            "add data.source=folder or leave data.path out"
        )
    return SOURCES[config.source](config, resolution)
