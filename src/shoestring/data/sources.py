"""The table of data sources: ``load`` turns ``DataConfig`` into training and held-out pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shoestring.config.schema import DataConfig
from shoestring.data import folder, openmoji, shapes
from shoestring.data.records import CaptionedImages, Rejection, Splits, split_by_caption
from shoestring.runtime import UserError

__all__ = ["CaptionedImages", "Rejection", "Splits", "load"]


def _openmoji(config: DataConfig, resolution: int) -> Splits:
    pictures = openmoji.load(resolution)
    return split_by_caption(pictures, config.held_out, config.max_captions, openmoji.CREDIT)


def _shapes(config: DataConfig, resolution: int) -> Splits:
    return shapes.load(resolution, config.held_out, config.max_captions)


def _folder(config: DataConfig, resolution: int) -> Splits:
    if config.path is None:
        raise UserError("data.path is not set; data.source=folder needs the folder of your pictures")
    pictures = folder.load(Path(config.path), resolution)
    return split_by_caption(pictures, config.held_out, None)


SOURCES: dict[str, Callable[[DataConfig, int], Splits]] = {
    "openmoji": _openmoji,
    "shapes": _shapes,
    "folder": _folder,
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
    if config.path is not None and config.source != "folder":
        raise UserError(
            f"data.path is {config.path!r}, but data.source={config.source} reads no folder; "
            "add data.source=folder or leave data.path out"
        )
    return SOURCES[config.source](config, resolution)
