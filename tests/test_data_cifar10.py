"""CIFAR-10 from Parquet files: small ones written here, and the real ones where they are at hand."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shoestring.config import DataConfig
from shoestring.data.cifar10 import CLASSES, FILES
from shoestring.data.sources import load
from shoestring.runtime import UserError

pyarrow = pytest.importorskip("pyarrow", reason="Parquet files are read with pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

COLOURS = [(20 * i, 255 - 20 * i, 7 * i) for i in range(10)]


def png(colour: tuple[int, int, int], side: int = 32, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, kind)
    return buffer.getvalue()


def write(path: Path, columns: dict[str, list[Any]], labels: str = "int16") -> None:
    arrays = {
        name: pyarrow.array(values, labels) if name == "label" else pyarrow.array(values)
        for name, values in columns.items()
    }
    parquet.write_table(pyarrow.table(arrays), path)


def ten(picture: str = "image", record: bool = False) -> dict[str, list[Any]]:
    pictures: list[Any] = [png(colour) for colour in COLOURS]
    if record:
        pictures = [{"bytes": data, "path": None} for data in pictures]
    return {picture: pictures, "label": list(range(10)), "label_name": list(CLASSES)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / FILES[0], ten())
    write(tmp_path / FILES[1], {name: values[:4] for name, values in ten().items()})
    return tmp_path


def source(folder: Path, **changes: Any) -> DataConfig:
    return DataConfig(source="cifar10", path=str(folder), **changes)


def test_pictures_and_the_names_of_their_classes(folder):
    splits = load(source(folder), 32)
    assert splits.train.captions == CLASSES
    assert splits.held_out.captions == CLASSES[:4]
    assert splits.train.images.shape == (10, 3, 32, 32)
    assert splits.train.images[:, :, 5, 9].tolist() == [list(colour) for colour in COLOURS]
    assert torch.equal(splits.held_out.images, splits.train.images[:4])
    assert splits.train.rejected == ()
    assert "Krizhevsky" in splits.credit


@pytest.mark.parametrize(("picture", "record"), [("img", False), ("image", True), ("img", True)])
def test_layouts_of_the_hub(tmp_path, picture, record):
    for name in FILES:
        write(tmp_path / name, ten(picture, record))
    splits = load(source(tmp_path), 32)
    assert splits.train.images[3, :, 0, 0].tolist() == list(COLOURS[3])


def test_rows_and_columns_are_not_swapped(tmp_path):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[2, 7] = (9, 8, 7)  # row 2, column 7
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    for name in FILES:
        write(tmp_path / name, {"image": [buffer.getvalue()], "label": [1]})
    assert load(source(tmp_path), 32).train.images[0, :, 2, 7].tolist() == [9, 8, 7]


def test_another_resolution_and_grey_pictures(folder):
    assert load(source(folder), 16).train.images.shape == (10, 3, 16, 16)
    grey = io.BytesIO()
    Image.new("L", (32, 32), 77).save(grey, "JPEG")
    write(folder / FILES[0], {"image": [grey.getvalue()], "label": [0]})
    assert load(source(folder), 32).train.images.unique().tolist() == [77]


def spoil(path: Path, how: str) -> None:
    columns = ten()
    if how == "cut":
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif how == "holes":
        data = bytearray(path.read_bytes())
        data[20:300] = bytes(280)
        path.write_bytes(data)
    elif how == "text":
        path.write_text("not a parquet file at all")
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "no label":
        write(path, {"image": columns["image"]})
    elif how == "no picture":
        write(path, {"picture": columns["image"], "label": columns["label"]})
    elif how == "no rows":
        write(path, {"image": pyarrow.array([], "binary"), "label": []})
    elif how == "label 10":
        write(path, columns | {"label": [0, 10] + [0] * 8})
    elif how == "null label":
        write(path, columns | {"label": [None] * 10})
    elif how == "float label":
        write(path, columns | {"label": [1.0] * 10}, "float64")
    elif how == "text picture":
        write(path, columns | {"image": ["airplane"] * 10})
    elif how == "null picture":
        write(path, columns | {"image": [png(COLOURS[0]), None] + columns["image"][2:]})
    elif how == "cut picture":
        write(path, columns | {"image": [columns["image"][0][:50]] * 10})
    elif how == "empty record":
        write(path, columns | {"image": [{"path": "x.png"}] * 10})


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("cut", "cannot read .* as parquet"),
        ("holes", "cannot read .* as parquet|holds no picture"),
        ("text", "cannot read .* as parquet"),
        ("folder", "does not exist"),
        ("no label", r"columns image \(or img\) and label are needed, found image$"),
        ("no picture", "are needed, found picture, label"),
        ("no rows", "holds no pictures"),
        ("label 10", "row 2 has label 10; it must be from 0 to 9"),
        ("null label", "row 1 has label None"),
        ("float label", r"row 1 has label 1\.0"),
        ("text picture", "row 1 holds no picture"),
        ("null picture", "row 2 holds no picture"),
        ("cut picture", "row 1 holds no picture"),
        ("empty record", "row 1 holds no picture"),
    ],
)
def test_damaged_files_are_named(folder, which, how, expected):
    path = folder / FILES[which]
    spoil(path, how)
    with pytest.raises(UserError, match=expected) as error:
        load(source(folder), 32)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_missing_is_said(folder, tmp_path):
    with pytest.raises(UserError, match=r"data\.path is not set; data\.source=cifar10 needs the folder of"):
        load(DataConfig(source="cifar10"), 32)
    with pytest.raises(UserError, match=r"nowhere.* does not exist; data\.source=cifar10 needs a"):
        load(source(tmp_path / "nowhere"), 32)
    (folder / FILES[1]).unlink()
    with pytest.raises(UserError, match=f"{FILES[1]} does not exist"):
        load(source(folder), 32)


def test_a_mistake_on_the_command_line(mistake, folder):
    (folder / FILES[0]).write_bytes(b"PAR1")
    words = ["data.source=cifar10", f"data.path={folder}", "model.condition=none", "--out", folder / "run"]
    assert f"cannot read {folder / FILES[0]} as parquet" in mistake("train", "demo", *words)


def test_the_real_files(shared, tmp_path):
    real = shared / "data" / FILES[1]
    if not real.is_file():
        pytest.skip(f"no data/{FILES[1]} in the folder 'shared': CIFAR-10 is not at hand")
    for name in FILES:  # the small one twice: the large one takes ten seconds
        (tmp_path / name).symlink_to(real)
    held_out = load(source(tmp_path), 32).held_out
    assert len(held_out) == 10_000
    assert {name: held_out.captions.count(name) for name in CLASSES} == dict.fromkeys(CLASSES, 1000)
    mean = held_out.images.double().mean(dim=(0, 2, 3)) / 255
    assert mean.tolist() == pytest.approx([0.494, 0.485, 0.450], abs=5e-3)  # known means of the test set
