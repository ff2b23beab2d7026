"""Picture files to pixels: every mark of cameras and odd format handled in one place."""

from __future__ import annotations

import io
import math
import warnings
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from shoestring.runtime import UserError

# Readers of Pillow that are safe on a stranger's file (EPS, for one, would start a program).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
MIN_SIDE = 8
MAX_ASPECT = 8.0


class Unusable(Exception):
    """Why a file cannot be used as a picture."""


@cache
def _formats() -> tuple[str, ...]:
    """The formats that this build of Pillow can read."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def read_image(path: Path, resolution: int) -> NDArray[np.uint8]:
    """Read one picture as a square on white: the middle, at the given resolution.

    Args:
        path: the file.
        resolution: side of the result.

    Returns:
        ``(3, resolution, resolution)``.

    Raises:
        UserError: if the file is not a usable picture.
    """
    try:
        return fit(decode(path, resolution), resolution, resolution)
    except Unusable as reason:
        raise UserError(f"{path}: {reason}") from reason


def decode(source: Path | bytes, smallest: int | None = None) -> Image.Image:
    """Decode a picture to RGB on white.

    Orientation marks of cameras are obeyed, 16-bit greys are scaled to 8, CMYK becomes RGB, of an
    animation the first frame counts.

    Args:
        source: a file, or its content.
        smallest: the short side that is needed: large JPEGs are decoded at reduced size, at least twice that.

    Returns:
        The picture.

    Raises:
        Unusable: if it is not a usable picture, with the reason.
    """
    try:
        with warnings.catch_warnings():
            # Between one and two times Pillow's limit it warns (a large photo), above it raises.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # broken EXIF and the like
            opened = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(opened, formats=_formats()) as file:
                width, height = file.size
                if min(width, height) < MIN_SIDE:
                    raise Unusable(f"{width} x {height} pixels; each side must have at least {MIN_SIDE}")
                if max(width, height) > MAX_ASPECT * min(width, height):
                    raise Unusable(
                        f"{width} x {height} pixels; the long side may be {MAX_ASPECT:g} times the short"
                    )
                if smallest is not None:
                    enough = 2 * smallest / min(width, height)
                    file.draft(None, (math.ceil(width * enough), math.ceil(height * enough)))
                ImageOps.exif_transpose(file, in_place=True)
                return _rgb(file)
    except Unusable:
        raise
    except Image.DecompressionBombError as error:
        raise Unusable("more pixels than a photo has (a decompression bomb?)") from error
    except Exception as error:  # Pillow's readers fail on broken files with almost any exception
        raise Unusable(f"cannot be read as a picture ({type(error).__name__})") from error


def fit(picture: Image.Image, height: int, width: int, exact: bool = False) -> NDArray[np.uint8]:
    """Resize (Lanczos) and crop to the middle, so that the picture fills the wanted shape.

    Args:
        picture: RGB.
        height: of the result.
        width: of the result.
        exact: never shrink large pictures in two steps, which is faster and hardly differs.

    Returns:
        ``(3, height, width)``.
    """
    scale = min(picture.width / width, picture.height / height)  # pixels of the picture per result pixel
    across, down = scale * width, scale * height
    left, top = (picture.width - across) / 2, (picture.height - down) / 2
    fitted = picture.resize(
        (width, height),
        Image.Resampling.LANCZOS,
        box=(left, top, left + across, top + down),
        reducing_gap=None if exact else 3.0,
    )
    return np.array(np.asarray(fitted).transpose(2, 0, 1))


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        # convert("L") would clip at 255 instead of scaling.
        grey = (np.asarray(picture).astype(np.uint32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise Unusable(f"{picture.mode}-mode pixels (32 bits) have no known white; save it with 8 or 16 bits")
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return picture.convert("RGB")
