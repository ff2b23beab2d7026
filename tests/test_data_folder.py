"""The user's own pictures: what is accepted, how it is read, and what is said about the rest."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shoestring.data.captions import read_rows
from shoestring.data.ingest import ingest
from shoestring.data.pixels import Unusable, decode, fit, read_image
from shoestring.data.readers import open_reader
from shoestring.data.records import CaptionedImages, Rejection
from shoestring.runtime import UserError


def add(root: Path, name: str, caption: str | None = "a thing", picture: Image.Image | None = None) -> Path:
    """Save a picture (grey by default) and its caption."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture or Image.new("RGB", (20, 20), (100, 150, 200))).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def load(folder: Path, resolution: int) -> CaptionedImages:
    """Everything that the reader finds, as squares in memory."""
    images, captions, rejected = [], [], []
    for item in open_reader(f"folder:{folder}").items():
        if isinstance(item, Rejection):
            rejected.append(item)
            continue
        try:
            images.append(torch.from_numpy(fit(decode(item.data, resolution), resolution, resolution)))
            captions.append(item.captions[0])
        except Unusable as reason:
            rejected.append(Rejection(item.id, str(reason), "unusable picture"))
    rejected.sort(key=lambda rejection: rejection.item)
    return CaptionedImages(
        torch.stack(images) if images else torch.empty(0), tuple(captions), tuple(rejected)
    )


def reasons(result) -> dict[str, str]:
    return {rejection.item: rejection.reason for rejection in result.rejected}


def png16(width: int, height: int, colour_type: int, samples: list[int]) -> bytes:
    """A 16-bit PNG written by hand: Pillow writes no 16-bit colour."""
    row = b"\0" + struct.pack(f">{len(samples)}H", *samples) * width
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)),
        (b"IDAT", zlib.compress(row * height)),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))
        for tag, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_captions_beside_pictures_are_found_at_any_depth(tmp_path: Path) -> None:
    add(tmp_path, "b.png", "  a red\napple ")
    add(tmp_path, "deep/er/a.jpg", "\ufeffein Käfer")
    add(tmp_path, ".hidden/c.png")
    add(tmp_path, "d.png", None)
    add(tmp_path, "e.png", " \n ")
    result = load(tmp_path, 16)
    assert result.captions == ("a red apple", "ein Käfer")
    assert result.images.shape == (2, 3, 16, 16)
    assert (result.images[0].reshape(3, -1).T.numpy() == [100, 150, 200]).all()
    assert reasons(result) == {"d.png": "no caption", "e.png": "empty caption"}


def test_every_file_and_row_is_used_or_rejected(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "sub/d.png", "e.png"):
        add(tmp_path, name, None)
    (tmp_path / "e.png").write_bytes(b"not a picture")
    add(tmp_path.parent, "secret.png", None)
    rows = [
        {"file_name": "a.png", "caption": "one"},
        {"image": "sub/d.png", "text": "two"},
        {"file_name": "sub\\d.png", "caption": "again"},
        {"path": "absent.png", "caption": "three"},
        {"file_name": "../secret.png", "caption": "four"},
        {"file_name": "sub/../../secret.png", "caption": "five"},
        {"file_name": str(tmp_path.parent / "secret.png"), "caption": "six"},
        {"file_name": "b.png", "caption": ""},
        {"file_name": "c.png"},
        {"file_name": "e.png", "caption": "seven"},
        {"file_name": "x" * 5000, "caption": "eight"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    result = load(tmp_path, 16)
    assert result.captions == ("one", "two")
    assert len(result.captions) + len(result.rejected) == len(rows)
    why = reasons(result)
    assert "already has a caption from metadata.jsonl line 2" in why["metadata.jsonl line 3"]
    assert why["metadata.jsonl line 4"] == "there is no file absent.png"
    for line in (5, 6, 7):
        assert "not inside the folder" in why[f"metadata.jsonl line {line}"]
    assert why["b.png"] == "empty caption"
    assert why["c.png"] == "no caption"
    assert "cannot be read as a picture" in why["e.png"]


def test_a_caption_file_wins_over_text_and_may_lie_deeper(tmp_path: Path) -> None:
    add(tmp_path, "a.png", "from text")
    add(tmp_path, "sub/b.png", "from text")
    (tmp_path / "sub" / "captions.csv").write_text('file_name,caption\nb.png,"from csv, with a comma"\n')
    assert load(tmp_path, 8).captions == ("from text", "from csv, with a comma")


def test_parquet_captions(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    add(tmp_path, "a.png", None)
    table = pyarrow.table({"path": ["a.png", "b.png"], "text": ["one", None], "width": [1, 2]})
    parquet.write_table(table, tmp_path / "metadata.parquet")
    result = load(tmp_path, 8)
    assert result.captions == ("one",)
    assert reasons(result) == {"metadata.parquet line 2": "there is no file b.png"}


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png", "caption": "x"}\n{oops\n', "line 2 is not JSON"),
        ("metadata.jsonl", b'"a.png"\n', "line 1 is not an object"),
        ("metadata.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("metadata.jsonl", b'{"caption": "x"}\n', "line 1 names no picture"),
        ("metadata.jsonl", b'{"file_name": "a.png", "caption": 7}\n', "line 1: the caption of a.png is 7"),
        ("metadata.jsonl", b'{"file_name": "a.png",\n"caption": "\xff"}', "line 2 is not UTF-8"),
        ("metadata.csv", b"file_name,title\na.png,x\n", "no column caption or text among file_name, title"),
        ("metadata.csv", b"", "no column file_name or image or path among no columns"),
        ("metadata.csv", b"file_name,caption\na.png,red, round\n", "line 2 has more values than the header"),
        ("metadata.csv", b'file_name,caption\na.png,"red\n', "line 2 is not CSV"),
        ("metadata.csv", b"file_name,caption\n,red\n", "line 2 names no picture"),
        ("metadata.parquet", b"PAR1 no, it is not", "as parquet"),
    ],
)
def test_an_unreadable_caption_file_is_one_sentence(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    add(tmp_path, "a.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="metadata") as caught:
        load(tmp_path, 16)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_jsonl_lines_end_at_newlines_only(tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"file_name": "a", "caption": "x\u2028y"}\r\n\r\n{"file_name": "b", "caption": "z"}\r\n')
    assert [(row.name, row.line) for row in read_rows(path)] == [("a", 1), ("b", 3)]


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((1, 1), "1 x 1 pixels; each side"),
        ((7, 40), "each side"),
        ((20_000, 100), "the long side may be 8 times"),
    ],
)
def test_odd_sizes_are_rejected(tmp_path: Path, size: tuple[int, int], reason: str) -> None:
    add(tmp_path, "good.png")
    add(tmp_path, "odd.png", picture=Image.new("1", size))
    result = load(tmp_path, 16)
    assert len(result) == 1
    assert reason in reasons(result)["odd.png"]


def test_corrupt_truncated_and_bomb_pictures_are_rejected(tmp_path: Path, monkeypatch) -> None:
    add(tmp_path, "good.png")
    whole = add(tmp_path, "cut.png", picture=Image.effect_noise((64, 64), 50)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    add(tmp_path, "text.jpg").write_text("hello")
    add(tmp_path, "empty.gif").write_bytes(b"")
    add(tmp_path, "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    header = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    bomb = png16(1, 1, 0, [0])
    bomb = bomb[:12] + header + struct.pack(">I", zlib.crc32(header)) + bomb[33:]
    add(tmp_path, "bomb.png").write_bytes(bomb)
    result = load(tmp_path, 16)
    assert len(result) == 1
    why = reasons(result)
    assert set(why) == {"cut.png", "text.jpg", "empty.gif", "script.png", "bomb.png"}
    assert "decompression bomb" in why.pop("bomb.png")
    assert all("cannot be read as a picture" in reason for reason in why.values())


def test_large_photos_are_accepted_quietly(tmp_path: Path, monkeypatch, recwarn) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000 * 1000)
    photo = Image.new("RGB", (1500, 1000), (10, 200, 30))
    add(tmp_path, "photo.jpg", picture=photo)
    result = load(tmp_path, 32)
    assert abs(result.images[0, :, 16, 16].numpy().astype(int) - [10, 200, 30]).max() <= 3
    assert not [w for w in recwarn if issubclass(w.category, Image.DecompressionBombWarning)]


def one(tmp_path: Path, resolution: int = 8) -> np.ndarray:
    """The only picture of the folder, rows first."""
    return load(tmp_path, resolution).images[0].numpy().transpose(1, 2, 0).astype(int)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    add(tmp_path, "grey.png").write_bytes(png16(10, 10, 0, [0x8000]))
    assert abs(one(tmp_path) - 128).max() <= 1
    add(tmp_path, "grey.png").write_bytes(png16(10, 10, 2, [0xFFFF, 0x8000, 0x0100]))
    assert abs(one(tmp_path) - [255, 128, 1]).max() <= 1
    add(tmp_path, "grey.png").unlink()
    for order in ("<u2", ">u2"):
        add(tmp_path, "grey.tiff", picture=Image.fromarray(np.full((10, 10), 0x4000, dtype=order)))
        assert abs(one(tmp_path) - 64).max() <= 1


def test_float_pixels_are_rejected(tmp_path: Path) -> None:
    add(tmp_path, "good.png")
    add(tmp_path, "f.tiff", picture=Image.new("F", (10, 10), 0.5))
    assert "no known white" in reasons(load(tmp_path, 8))["f.tiff"]


def test_cmyk_palette_and_transparency(tmp_path: Path) -> None:
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    add(tmp_path, "a.jpg", picture=red.convert("CMYK"))
    assert abs(one(tmp_path) - [255, 0, 0]).max() <= 4
    (tmp_path / "a.jpg").unlink()
    half = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    half.paste((0, 0, 255, 255), (0, 0, 8, 16))
    for name, picture in (("rgba.png", half), ("palette.gif", half)):
        add(tmp_path, name, picture=picture)
        read = one(tmp_path)
        assert abs(read[:, 1] - [0, 0, 255]).max() <= 8, name
        assert abs(read[:, 6] - 255).max() <= 8, name
        (tmp_path / name).unlink()


def test_the_first_frame_of_an_animation_is_used(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (12, 12), colour) for colour in ("lime", "red")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "a.txt").write_text("blinking")
    assert abs(one(tmp_path) - [0, 255, 0]).max() <= 4


def test_orientation_and_centre_crop(tmp_path: Path) -> None:
    # As stored: left quarter red, middle white, right quarter blue; the camera was turned by a quarter.
    picture = Image.new("RGB", (64, 32), "white")
    picture.paste("red", (0, 0, 24, 32))
    picture.paste("blue", (40, 0, 64, 32))
    add(tmp_path, "a.png", picture=picture)
    plain = one(tmp_path, 32)  # the middle 32 of 64 columns
    assert (plain[16, 2] == [255, 0, 0]).all()
    assert (plain[16, 29] == [0, 0, 255]).all()
    assert (plain[16, 16] == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    turned = one(tmp_path, 32)
    assert (turned[2, 16] == [255, 0, 0]).all()
    assert (turned[29, 16] == [0, 0, 255]).all()


def test_shrinking_does_not_alias(tmp_path: Path) -> None:
    stripes = np.zeros((256, 256), dtype=np.uint8)
    stripes[:, ::2] = 255
    add(tmp_path, "a.png", picture=Image.fromarray(stripes))
    assert abs(one(tmp_path, 16)[:, 1:-1] - 128).max() <= 3


@pytest.mark.parametrize("make", [False, True])
def test_no_folder_and_no_pictures(tmp_path: Path, make: bool) -> None:
    path = tmp_path / "pics"
    if make:
        path.mkdir()
        (path / "notes.pdf").write_text("x")
    with pytest.raises(UserError, match="there is no picture in it" if make else "not a folder"):
        ingest(open_reader(f"folder:{path}"), str(tmp_path / "out"))


def test_all_rejected_names_the_first_reasons(tmp_path: Path) -> None:
    add(tmp_path, "a.png", None)
    with pytest.raises(UserError, match=r"a\.png: no caption"):
        ingest(open_reader(f"folder:{tmp_path}"), str(tmp_path / "out"))


def test_one_picture_alone(tmp_path: Path) -> None:
    path = add(tmp_path, "a.png")
    read = read_image(path, 16)
    assert read.shape == (3, 16, 16)
    assert (read[:, 8, 8] == [100, 150, 200]).all()
    path.write_bytes(b"oops")
    with pytest.raises(UserError, match=r"a\.png: cannot be read as a picture"):
        read_image(path, 16)
