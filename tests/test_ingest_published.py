"""Declarations of published sets: read from folders laid out like theirs, and named on the web."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoestring.data.ingest import ingest
from shoestring.data.published import PUBLISHED, published
from shoestring.data.readers import Options, open_reader
from shoestring.data.records import Picture
from shoestring.runtime import UserError
from test_ingest import encoded, noise


def test_published_sets_can_be_read_from_a_folder_laid_out_like_theirs(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    big = encoded(noise(1, 256, 300))

    def read(name: str, images: Path | None = None) -> list:
        declared = published(name)
        options = declared.options
        if images is not None:
            options = Options(**(vars(options) | {"images": images}))
        return list(open_reader(declared.spec(tmp_path / name), options).items())

    table = {
        "image_name": ["a.png"],
        "part_id": [1],
        "prompt": ["p"],
        "image_nsfw": [0.1],
        "prompt_nsfw": [0.3],
    }
    (tmp_path / "diffusiondb" / "images" / "part-000001").mkdir(parents=True)
    (tmp_path / "diffusiondb" / "images" / "part-000001" / "a.png").write_bytes(big)
    parquet.write_table(pa.table(table), tmp_path / "diffusiondb" / "metadata-large.parquet")
    (found,) = read("diffusiondb")
    assert isinstance(found, Picture)
    assert found.columns == {"image_nsfw": 0.1, "prompt_nsfw": 0.3}
    declared = published("diffusiondb")
    reader = open_reader(declared.spec(tmp_path / "diffusiondb"), declared.options)
    with pytest.raises(UserError, match=r"1 not prompt_nsfw<=0\.2"):
        ingest(reader, str(tmp_path / "s"), declared.filters)

    images = tmp_path / "journeydb" / "train" / "imgs"
    (images / "000").mkdir(parents=True)
    (images / "000" / "x.jpg").write_bytes(big)
    row = {"img_path": "./000/x.jpg", "prompt": "p", "Task1": {"Caption": "c"}}
    (tmp_path / "journeydb" / "train" / "train_anno_realease_repath.jsonl").write_text(json.dumps(row))
    assert [item.captions for item in read("journeydb", images)] == [("p",)]

    (tmp_path / "coco2014-val" / "annotations").mkdir(parents=True)
    (tmp_path / "coco2014-val" / "val2014").mkdir()
    (tmp_path / "coco2014-val" / "val2014" / "1.jpg").write_bytes(big)
    notes = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "c"}]}
    (tmp_path / "coco2014-val" / "annotations" / "captions_val2014.json").write_text(json.dumps(notes))
    assert [item.captions for item in read("coco2014-val", tmp_path / "coco2014-val" / "val2014")] == [("c",)]

    (tmp_path / "textcaps").mkdir()
    caps = {"image": [{"bytes": big, "path": "x"}], "reference_strs": [["one", "two"]]}
    parquet.write_table(pa.table(caps), tmp_path / "textcaps" / "train-0.parquet")
    assert [item.captions for item in read("textcaps")] == [("one", "two")]

    (tmp_path / "sa1b").mkdir()
    (tmp_path / "sa1b" / "sa_1.jpg").write_bytes(big)
    (tmp_path / "sa1b" / "sa_1.txt").write_text("long caption")
    assert [item.captions for item in read("sa1b")] == [("long caption",)]


def test_published_sets_on_the_web_and_wrong_names() -> None:
    reader = open_reader(published("cc12m").spec())
    assert len(reader.tars) == 2176
    assert reader.tars[-1].endswith("/cc12m-train-2175.tar")
    assert published("imagenet").spec("/data/saved") == "hf:/data/saved"
    assert published("cc12m").spec("/data/tars") == "webdataset:/data/tars"
    with pytest.raises(UserError, match="no published set is called 'laion'; known are cc12m, sa1b"):
        published("laion")
    with pytest.raises(UserError, match="has to be downloaded first"):
        published("sa1b").spec()
    assert all(declared.licence and declared.home for declared in PUBLISHED.values())
