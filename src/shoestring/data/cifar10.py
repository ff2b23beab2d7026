"""CIFAR-10 as two Parquet files: 50,000 and 10,000 photos of ten classes, 32 x 32 pixels.

The layout is that of the data set on the Hugging Face hub: picture bytes in ``image`` or ``img`` (bytes, or
a record with ``bytes``), the class in ``label``, its name in ``label_name`` where there is one.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from shoestring.data.records import CaptionedImages, Splits
from shoestring.runtime import UserError

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
FILES = ("cifar10_train.parquet", "cifar10_test.parquet")
CREDIT = "CIFAR-10: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009."


def load(folder: Path, resolution: int) -> Splits:
    """Read both files; the caption of a picture is the name of its class.

    Args:
        folder: holds ``cifar10_train.parquet`` and ``cifar10_test.parquet``.
        resolution: side in pixels; other than 32 is resized (Lanczos).

    Returns:
        Training pictures, and the test pictures as held out.

    Raises:
        UserError: if a file is missing, damaged, or not laid out as described.
    """
    train, test = (_read(folder / name, resolution) for name in FILES)
    return Splits(train, test, CREDIT)


def _read(path: Path, resolution: int) -> CaptionedImages:
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise UserError(
            f"data.path: {path} does not exist; data.source=cifar10 needs a folder with {' and '.join(FILES)}"
        )
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            picture = next((name for name in ("image", "img") if name in columns), None)
            if picture is None or "label" not in columns:
                raise UserError(
                    f"{path}: columns image (or img) and label are needed, found {', '.join(columns)}"
                )
            rows = file.read(columns=[picture, "label"]).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path} as parquet: {' '.join(str(error).split())}") from error
    if not rows:
        raise UserError(f"{path} holds no pictures; at least one row is needed")
    images = np.empty((len(rows), 3, resolution, resolution), dtype=np.uint8)
    for i, row in enumerate(rows):
        try:
            images[i] = _pixels(row[picture], resolution)
        except (OSError, TypeError, KeyError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{path}: row {i + 1} holds no picture ({error})") from error
        if not isinstance(row["label"], int) or row["label"] not in range(len(CLASSES)):
            raise UserError(f"{path}: row {i + 1} has label {row['label']}; it must be from 0 to 9")
    captions = tuple(CLASSES[row["label"]] for row in rows)
    return CaptionedImages(torch.from_numpy(images), captions)


def _pixels(stored: Any, resolution: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    data = stored["bytes"] if isinstance(stored, dict) else stored
    with Image.open(io.BytesIO(data), formats=["JPEG", "PNG"]) as picture:
        rgb = picture.convert("RGB")
    if rgb.size != (resolution, resolution):
        rgb = rgb.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return np.asarray(rgb).transpose(2, 0, 1)
