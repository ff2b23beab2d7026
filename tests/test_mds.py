"""MDS folders: real ones of the public writer, every encoding, every kind of damage."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shoestring.data.mds import MDSFolder, write_mds
from shoestring.data.mds_values import decode, encode, size_of
from shoestring.runtime import UserError

SAMPLES = [{"text": f"nº {i}", "count": i, "raw": bytes(range(i))} for i in range(10)]
COLUMNS = {"text": "str", "count": "int32", "raw": "bytes"}


@pytest.fixture
def golden(shared: Path) -> Path:
    return shared / "golden" / "mds"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten samples in several shards."""
    write_mds(tmp_path / "mds", COLUMNS, SAMPLES, size_limit=320)
    return tmp_path / "mds"


def change_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the description of the first shard."""
    index = json.loads((folder / "index.json").read_text())
    change(index["shards"][0])
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["latents", "latents_zstd"])
def test_folders_of_the_public_writer_are_read(golden: Path, name: str) -> None:
    folder = MDSFolder(golden / name)
    expected = np.load(golden / "expected.npz")
    assert len(folder) == len(expected["captions"]) == 37
    assert folder.columns["caption"] == "str"
    assert folder.name(0).startswith("shard.00000.mds")
    assert folder.name(36).endswith("/1")
    rows = [*range(37), 20, 3]  # also backwards
    for i, sample in zip(rows, [*folder, folder[20], folder[3]], strict=True):
        assert sample["caption"] == expected["captions"][i]
        for column in ("caption_latents", "latents_256", "latents_512"):
            assert np.array_equal(np.frombuffer(sample[column], np.float16), expected[column][i])


def test_pictures_of_the_public_writer_are_read(golden: Path) -> None:
    folder = MDSFolder(golden / "images")
    assert folder.columns == {"caption": "str", "height": "int32", "jpg": "jpeg", "width": "int32"}
    for i, sample in enumerate(folder):
        picture = Image.open(io.BytesIO(sample["jpg"]))
        assert picture.size == (sample["width"], sample["height"]) == (40 + i, 30 + 2 * i)
        assert abs(np.asarray(picture)[..., 2].mean() - 20 * i) < 4


def test_what_is_written_equals_the_public_writer_byte_for_byte(golden: Path, tmp_path: Path) -> None:
    original = MDSFolder(golden / "latents")
    assert write_mds(tmp_path / "copy", original.columns, original, size_limit=6000) == 37
    names = sorted(path.name for path in (golden / "latents").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "copy").iterdir())
    for name in names:
        assert (tmp_path / "copy" / name).read_bytes() == (golden / "latents" / name).read_bytes(), name


VALUES = {
    "str": st.text(),
    "bytes": st.binary(),
    "int": st.integers(-(2**63), 2**63 - 1),
    "uint8": st.integers(0, 255),
    "int16": st.integers(-(2**15), 2**15 - 1),
    "float16": st.floats(width=16, allow_nan=False),
    "float32": st.floats(width=32, allow_nan=False),
    "float64": st.floats(allow_nan=False),
    "str_int": st.integers(),
    "str_float": st.floats(allow_nan=False),
    "str_decimal": st.decimals(allow_nan=False),
    "json": st.recursive(st.none() | st.booleans() | st.text(), st.lists, max_leaves=5),
    "png": st.binary(),
}


@given(st.sampled_from(sorted(VALUES)).flatmap(lambda name: st.tuples(st.just(name), VALUES[name])))
def test_values_come_back(pair: tuple[str, Any]) -> None:
    encoding, value = pair
    data = encode(encoding, value)
    assert size_of(encoding) in (None, len(data))
    assert decode(encoding, data) == value
    assert type(decode(encoding, data)) is (Decimal if encoding == "str_decimal" else type(value))


@pytest.mark.parametrize("encoding", ["ndarray", "ndarray:float16", "ndarray:float16:3,300"])
def test_arrays_come_back(encoding: str) -> None:
    array = np.random.RandomState(0).standard_normal((3, 300)).astype(np.float16)
    data = encode(encoding, array)
    # Type (1 byte), then number of axes and width of their lengths (1) and two lengths of 2 bytes each.
    assert len(data) - array.nbytes == {"ndarray": 6, "ndarray:float16": 5}.get(encoding, 0)
    assert size_of(encoding) == (1800 if encoding.endswith("300") else None)
    got = decode(encoding, data)
    assert got.dtype == np.float16
    assert np.array_equal(got, array)
    assert encode("ndarray", array)[:6] == bytes([18, 2 << 2 | 1, 3, 0, 44, 1])


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK"])
def test_raw_pixels_become_a_picture_file(mode: str) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (5, 7, len(Image.new(mode, (1, 1)).getbands())))
    picture = Image.frombytes(mode, (7, 5), pixels.astype(np.uint8).tobytes())
    head = np.array([7, 5, len(mode)], "<u4").tobytes() + mode.encode()
    got = Image.open(io.BytesIO(decode("pil", head + picture.tobytes())))
    assert np.array_equal(np.asarray(got.convert("RGB")), np.asarray(picture.convert("RGB")))
    with pytest.raises(ValueError, match="mode"):
        decode("pil", np.array([7, 5, 1], "<u4").tobytes() + b"P" + bytes(35))


@pytest.mark.parametrize(("kind", "pack"), [("gz", gzip.compress), ("bz2:9", bz2.compress)])
def test_other_compressions_are_read(folder: Path, kind: str, pack: Callable[[bytes], bytes]) -> None:
    def compress(shard: dict[str, Any]) -> None:
        raw = folder / shard["raw_data"]["basename"]
        data = pack(raw.read_bytes())
        raw.with_suffix(".packed").write_bytes(data)
        raw.unlink()
        digest = hashlib.blake2s(data).hexdigest()
        name = raw.with_suffix(".packed").name
        shard["zip_data"] = {"basename": name, "bytes": len(data), "hashes": {"blake2s": digest}}
        shard["compression"] = kind

    change_index(folder, compress)
    assert list(MDSFolder(folder)) == SAMPLES
    change_index(folder, lambda shard: shard.update(compression="lzma"))
    with pytest.raises(UserError, match="is compressed by lzma; only zstd, gz, bz2, br are known"):
        MDSFolder(folder)[0]


def test_a_root_index_and_folders_without_one_are_read(tmp_path: Path) -> None:
    for rank in (0, 2, 10):
        part = [{"n": rank * 100 + i} for i in range(3)]
        write_mds(tmp_path / "mds" / str(rank), {"n": "int64"}, part)
    (tmp_path / "mds" / ".unfinished").mkdir()
    (tmp_path / "mds" / ".unfinished" / "index.json").write_text("{")
    expected = [rank * 100 + i for rank in (0, 2, 10) for i in range(3)]
    unmerged = MDSFolder(tmp_path / "mds")
    assert [sample["n"] for sample in unmerged] == expected
    assert unmerged.name(4) == "2/shard.00000.mds/1"
    shards = []
    for rank in (0, 2, 10):
        (shard,) = json.loads((tmp_path / "mds" / str(rank) / "index.json").read_text())["shards"]
        shard["raw_data"]["basename"] = f"{rank}/{shard['raw_data']['basename']}"
        shards.append(shard)
    (tmp_path / "mds" / "index.json").write_text(json.dumps({"version": 2, "shards": shards[1:]}))
    assert [sample["n"] for sample in MDSFolder(tmp_path / "mds")] == expected[3:]


def test_absent_and_short_shards_are_named(folder: Path) -> None:
    assert len(list(folder.glob("*.mds"))) >= 3
    (folder / "shard.00001.mds").unlink()
    (folder / "shard.00002.mds").write_bytes(b"short")
    with pytest.raises(UserError, match=r"shard.00001.mds is absent \(and 1 more of \d shards\)"):
        MDSFolder(folder)
    shutil.copy(folder / "shard.00000.mds", folder / "shard.00001.mds")
    (folder / "shard.00001.mds").write_bytes((folder / "shard.00000.mds").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"shard.00001.mds has \d+ bytes instead of"):
        MDSFolder(folder)


def test_every_flipped_byte_of_a_shard_is_found_with_hashes_and_never_crashes_without(folder: Path) -> None:
    path = folder / "shard.00001.mds"
    whole = path.read_bytes()
    count = MDSFolder(folder)._shards[0].samples
    for hashed in (True, False):
        if not hashed:
            index = json.loads((folder / "index.json").read_text())
            for shard in index["shards"]:
                shard["raw_data"]["hashes"] = {}
            (folder / "index.json").write_text(json.dumps(index))
        for position in range(len(whole)):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x81]) + whole[position + 1 :])
            try:
                MDSFolder(folder)[count]
                assert not hashed
            except UserError as error:
                assert "shard.00001.mds" in str(error)  # noqa: PT017


def test_hashes_that_cannot_be_checked_are_said(folder: Path) -> None:
    change_index(folder, lambda shard: shard["raw_data"]["hashes"].update(moon128="00"))
    read = MDSFolder(folder)
    assert read.unchecked_hashes == ("moon128",)
    assert list(read) == SAMPLES


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.update(column_encodings=["int32", "bytes", "pkl"]), "pickled objects"),
        (lambda s: s.update(column_encodings=["int32", "bytes", "lies"]), "'lies', which is not known"),
        (lambda s: s.update(column_sizes=[8, None, None]), "gives 8 bytes a value .* but int32 has 4"),
        (lambda s: s.update(format="csv"), "format 'csv'; only mds is read"),
        (lambda s: s.update(samples=99), "its offsets do not fit"),
        (lambda s: s["raw_data"].update(basename="../x.mds"), "is not inside the folder"),
        (lambda s: s.pop("column_names"), "is not an index of MDS shards"),
        (lambda s: s["raw_data"]["hashes"].update(sha1="00"), "index.json has another sha1"),
    ],
)
def test_a_bad_index_is_said_in_a_sentence(
    folder: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    change_index(folder, change)
    with pytest.raises(UserError, match=said):
        MDSFolder(folder)[0]


def test_what_is_no_mds_folder_is_said(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        MDSFolder(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no index\.json"):
        MDSFolder(tmp_path / "empty")
    with pytest.raises(UserError, match="exists already and is not an empty folder"):
        write_mds(folder, COLUMNS, SAMPLES)
    with pytest.raises(UserError, match="there is no sample"):
        write_mds(tmp_path / "empty", COLUMNS, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mds"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    # A limit on the size of files: what a full disk looks like to a program.
    program = (
        "import resource, signal, sys\n"
        "from shoestring.data.mds import write_mds\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "write_mds(sys.argv[1], {'a': 'bytes'}, [{'a': bytes(900)}] * 9, 1 << 20)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert "UserError: cannot write to" in ran.stderr
    assert "nothing was left behind" in ran.stderr
    assert not any(tmp_path.iterdir())


def test_a_read_only_folder_is_said(tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "from shoestring.data.mds import write_mds\n"
        "if os.geteuid() == 0:\n"
        "    os.setuid(65534)  # root may write everywhere\n"
        "write_mds(sys.argv[1], {'a': 'bytes'}, [{'a': b''}])\n"
    )
    (tmp_path / "locked").mkdir(mode=0o555)
    words = [sys.executable, "-c", program, str(tmp_path / "locked" / "out")]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "UserError: cannot write to" in ran.stderr
    assert "Permission denied" in ran.stderr
