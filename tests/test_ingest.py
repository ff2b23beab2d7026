"""Ingestion: what goes in is kept or counted, with every filter and every bad input."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shoestring.data.duplicates import Looks, look
from shoestring.data.filters import Filters, Threshold, summary
from shoestring.data.ingest import complete, ingest, rejections
from shoestring.data.readers import Options, open_reader
from shoestring.data.store import Store, save_manifest
from shoestring.runtime import UserError
from stores import make_store


def noise(seed: int, width: int = 24, height: int = 24) -> Image.Image:
    """A picture of soft blobs, different for each seed."""
    values = np.random.RandomState(seed).randint(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def make_folder(path: Path, files: dict[str, bytes], captions: dict[str, object], **numbers: dict) -> Path:
    """Pictures with a metadata.jsonl; ``numbers`` are further columns by file."""
    path.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    rows = [
        {"file_name": name, "caption": caption}
        | {column: values[name] for column, values in numbers.items() if name in values}
        for name, caption in captions.items()
    ]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def kinds(store: Store) -> dict[str, str]:
    return {row["item"]: row["kind"] for row in rejections(store).to_pylist()}


def check_balance(store: Store) -> None:
    """What went in equals what came out plus what was rejected, and the store says so."""
    (facts,) = store.manifest.sources
    assert facts.read == facts.kept + sum(facts.rejected.values())
    assert facts.kept == len(store) == store.records.count_rows()
    rows = [row for row in rejections(store).to_pylist() if not row["kind"].startswith("caption: ")]
    assert len(rows) == sum(facts.rejected.values())
    for kind, count in facts.rejected.items():
        assert sum(row["kind"] == kind for row in rows) == count
    assert store.texts.count_rows() == store.manifest.texts


def take(folder: Path, out: Path, filters: Filters | None = None, **options: object) -> Store:
    filters = filters or Filters()
    store = ingest(open_reader(str(folder), Options(numbers=filters.numbers)), str(out), filters, **options)
    check_balance(store)
    return store


# -- good and bad pictures ---------------------------------------------------------------------------------


def test_files_are_kept_as_they_are_and_bad_ones_are_counted(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    big = encoded(noise(9, 64, 64))
    files = {
        "a.jpg": encoded(noise(1, 40, 20), "JPEG", exif=turned),
        "b.webp": encoded(noise(2, 20, 30), "WEBP"),
        "c.png": encoded(noise(3)),
        "cut.png": big[: len(big) // 2],
        "empty.gif": b"",
        "float.tiff": encoded(Image.new("F", (10, 10), 0.5), "TIFF"),
        "long.png": encoded(Image.new("L", (200, 10))),
        "small.png": encoded(Image.new("L", (4, 4))),
        "text.jpg": b"hello",
        "nothing.png": encoded(noise(4)),
        "blank.png": encoded(noise(5)),
    }
    captions: dict[str, object] = {name: f"caption of {name[0]}" for name in files if name != "nothing.png"}
    captions |= {"a.jpg": ["first  of a", "second of a"], "c.png": "first of a", "blank.png": "  "}
    captions["absent.png"] = "x"
    store = take(make_folder(tmp_path / "f", files, captions), tmp_path / "s", licence="CC0")
    rows = store.take([0, 1, 2], ["id", "width", "height", "caption_source", "image"]).to_pylist()
    assert [row["id"] for row in rows] == ["a.jpg", "b.webp", "c.png"]
    assert [(row["width"], row["height"]) for row in rows] == [(20, 40), (20, 30), (24, 24)]
    assert all(row["image"] == files[row["id"]] for row in rows)
    texts = store.texts.to_table()["text"].to_pylist()
    assert texts == ["first of a", "second of a", "caption of b"]
    assert [[texts[i] for i in row["caption_source"]] for row in rows] == [texts[:2], texts[2:], texts[:1]]
    facts = store.manifest.sources[0]
    assert (facts.kind, facts.path, facts.licence) == ("folder", str(tmp_path / "f"), "CC0")
    assert facts.rejected == {"unusable picture": 6, "no caption": 2, "no picture": 1}
    assert summary(facts.rejected) == "6 unusable picture, 2 no caption, 1 no picture"
    assert {kind for name, kind in kinds(store).items() if name in files} == {
        "unusable picture",
        "no caption",
    }
    assert store.manifest.has_images
    assert not (tmp_path / "s" / ".work").exists()


def test_duplicated_ids_are_counted_and_the_first_good_one_stays(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    images = [encoded(noise(i)) for i in range(5)]
    images[0] = b"broken"
    table = pa.table({"image": images, "caption": list("abcde"), "key": ["x", "x", "y", "x", None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    reader = open_reader(str(tmp_path / "a.parquet"), Options(id="key"))
    store = ingest(reader, str(tmp_path / "s"))
    check_balance(store)
    assert store.take([0, 1, 2], ["id"])["id"].to_pylist() == ["x", "y", "a/4"]
    assert store.take([0], ["image"])["image"][0].as_py() == images[1]
    assert store.manifest.sources[0].rejected == {"unusable picture": 1, "duplicate id": 1}


def test_a_cut_tar_is_counted(tmp_path: Path) -> None:
    from test_readers_webdataset import samples, tar_of

    whole = tar_of(samples(0, 4))
    (tmp_path / "0.tar").write_bytes(whole[: len(whole) // 2 - 3000])
    (tmp_path / "1.tar").write_bytes(tar_of(samples(4, 2)))
    store = ingest(open_reader(f"webdataset:{tmp_path}/{{0..1}}.tar"), str(tmp_path / "s"))
    check_balance(store)
    assert store.manifest.sources[0].rejected == {"tar cut": 1}
    (row,) = rejections(store).to_pylist()
    assert row["item"] == str(tmp_path / "0.tar")
    assert "what follows is lost" in row["reason"]


# -- filters -----------------------------------------------------------------------------------------------


def test_each_filter_and_its_count(tmp_path: Path) -> None:
    names = ("good", "small", "narrow", "short", "long", "ugly", "unknown", "nsfw", "twin", "again")
    files = {f"{name}.png": encoded(noise(i, 40, 40)) for i, name in enumerate(names)}
    files["small.png"] = encoded(noise(20, 40, 31))
    files["narrow.png"] = encoded(noise(21, 100, 40))
    files["twin.png"] = files["good.png"]
    files["again.png"] = encoded(noise(0, 57, 57), "WEBP", quality=80)
    captions: dict[str, object] = dict.fromkeys(files, "a good caption")
    captions |= {"short.png": "x", "long.png": ["y" * 30, "z"], "good.png": ["a good caption", "no", ""]}
    aesthetic = dict.fromkeys(files, 6.0) | {"ugly.png": 4.9, "unknown.png": None}
    nsfw = dict.fromkeys(files, 0.2) | {"nsfw.png": "0.21"}
    folder = make_folder(tmp_path / "f", files, captions, aesthetic=aesthetic, nsfw=nsfw)
    filters = Filters(
        min_side=32,
        max_aspect=2,
        min_caption=3,
        max_caption=20,
        thresholds=(Threshold.parse("aesthetic>=5"), Threshold.parse(" nsfw <= 2e-1")),
        equal_files=True,
        look_alikes=6,
    )
    store = take(folder, tmp_path / "s", filters)
    # By name "again" comes before "good": it stays, and both copies of the other are like it.
    assert store.take(range(len(store)), ["id"])["id"].to_pylist() == ["again.png"]
    assert kinds(store) == {
        "small.png": "too small",
        "narrow.png": "too long",
        "short.png": "caption too short",
        "long.png": "caption too short",
        "ugly.png": "not aesthetic>=5",
        "unknown.png": "aesthetic missing",
        "nsfw.png": "not nsfw<=0.2",
        "good.png": "look-alike",
        "twin.png": "look-alike",
    }
    plain = Filters(min_caption=3, equal_files=True)
    store = take(folder, tmp_path / "t", plain)
    assert kinds(store)["twin.png"] == "duplicate file"
    assert kinds(store)["good.png caption 2"] == "caption: caption too short"
    assert kinds(store)["good.png caption 3"] == "caption: no caption"
    assert "good.png" in store.take(range(len(store)), ["id"])["id"].to_pylist()


@pytest.mark.parametrize("text", ["aesthetic>5", ">=5", "aesthetic>=", "aesthetic>=five", "aesthetic>=1e"])
def test_a_threshold_that_is_none(text: str) -> None:
    with pytest.raises(UserError, match="COLUMN>=NUMBER"):
        Threshold.parse(text)


def test_no_look_alike_is_missed() -> None:
    """The search by bands finds what comparing all pairs finds."""
    rng = np.random.RandomState(0)
    for distance in (0, 3, 4, 7, 11):
        looks, seen = Looks(distance), []
        for i in range(300):
            bits = int(rng.randint(0, 2**62))
            if seen and i % 3:
                bits = seen[rng.randint(len(seen))][0]
                for bit in rng.choice(63, rng.randint(0, distance + 3), replace=False):
                    bits ^= 1 << int(bit)
            colours = bytes(rng.choice([0, 0, 0, 24, 25], 12).tolist())
            near = [
                j
                for j, (other, theirs) in enumerate(seen)
                if (bits ^ other).bit_count() <= distance
                and all(abs(a - b) <= 24 for a, b in zip(colours, theirs, strict=True))
            ]
            assert looks.near((bits, colours)) == (near[0] if near else None)
            looks.add((bits, colours))
            seen.append((bits, colours))
    with pytest.raises(UserError, match="choose 0 to 11"):
        Looks(12)


def test_looks_survive_resizing_and_saving_anew_and_tell_pictures_apart() -> None:
    pictures = [noise(seed, 96, 96) for seed in range(30)]
    for picture in pictures:
        bits, colours = look(picture)
        small = picture.resize((64, 48))
        saved = Image.open(io.BytesIO(encoded(small, "JPEG", quality=70)))
        other_bits, other_colours = look(saved)
        assert (bits ^ other_bits).bit_count() <= 6
        assert max(abs(a - b) for a, b in zip(colours, other_colours, strict=True)) <= 24
    looks = [look(picture) for picture in pictures]
    assert min((a[0] ^ b[0]).bit_count() for i, a in enumerate(looks) for b in looks[:i]) > 11
    red, green = (look(Image.new("RGB", (40, 40), colour)) for colour in ("red", "green"))
    assert red[0] == green[0] == 0
    assert red[1] != green[1]


# -- settings, places, disks -------------------------------------------------------------------------------


def simple(path: Path, count: int = 6) -> Path:
    files = {f"{i}.png": encoded(noise(i)) for i in range(count)}
    return make_folder(path, files, {name: f"caption {i % 4}" for i, name in enumerate(files)})


def test_a_complete_store_is_left_alone_and_other_settings_are_refused(tmp_path: Path) -> None:
    folder, out = simple(tmp_path / "f"), str(tmp_path / "s")
    store = take(folder, Path(out), unit_rows=4)
    reader = open_reader(str(folder))
    assert complete(reader, str(tmp_path / "other"), unit_rows=4) is None
    again = complete(reader, out, unit_rows=4)
    assert again is not None
    assert again.version == store.version
    assert ingest(reader, out, unit_rows=4).version == store.version
    save_manifest(out, store.manifest.model_copy(update={"made_by": "a later job"}))
    assert ingest(reader, out, unit_rows=4).manifest.made_by == "a later job"
    assert rejections(Store(out)).num_rows == 0
    with pytest.raises(UserError, match="complete store that was made with unit_rows=4, now it is 5"):
        ingest(reader, out, unit_rows=5)
    with pytest.raises(UserError, match="was made without --min-side, now it is 9"):
        ingest(reader, out, Filters(min_side=9), unit_rows=4)
    (folder / "new.png").write_bytes(encoded(noise(77)))
    with pytest.raises(UserError, match="items=6, now it is 7"):
        ingest(open_reader(str(folder)), out, unit_rows=4)
    other = make_store(tmp_path / "prepared")
    with pytest.raises(UserError, match="was not made by data ingest; choose another --out"):
        ingest(reader, other.uri)
    with pytest.raises(UserError, match="keeps no list"):
        rejections(other)


def test_an_interrupted_job_is_refused_with_other_settings(tmp_path: Path) -> None:
    folder, out = simple(tmp_path / "f", 20), str(tmp_path / "s")

    def stop(done: int, kept: int, total: int | None) -> None:
        assert (done, kept, total) == (done, done, 20)
        if done == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(open_reader(str(folder)), out, unit_rows=4, progress=stop)
    with pytest.raises(UserError, match="is not a store"):
        Store(out)
    with pytest.raises(UserError, match="was begun with unit_rows=4, now it is 8"):
        ingest(open_reader(str(folder)), out, unit_rows=8)
    done: list[int] = []
    store = ingest(open_reader(str(folder)), out, unit_rows=4, progress=lambda d, k, t: done.append(d))
    check_balance(store)
    assert done == list(range(9, 21))  # two units of four were whole
    assert store.digest == take(folder, tmp_path / "t", unit_rows=4).digest


def test_a_job_that_has_done_nothing_yet_leaves_nothing_and_may_change(tmp_path: Path) -> None:
    folder, out = simple(tmp_path / "f", 5), tmp_path / "s"

    def stop(done: int, kept: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(open_reader(str(folder)), str(out), unit_rows=4, progress=stop)
    assert not out.exists()
    journal = out / ".work" / "ingest" / "journal.jsonl"
    journal.parent.mkdir(parents=True)  # what a kill at that moment leaves
    journal.write_text('{"unit_rows": 4}\n')
    assert len(ingest(open_reader(str(folder)), str(out), unit_rows=2)) == 5


def test_a_store_is_not_made_among_other_files(tmp_path: Path) -> None:
    folder = simple(tmp_path / "f")
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=r"--out is '.*', a folder with other things in it \(0\.png\)"):
        take(folder, folder)
    assert sorted(folder.iterdir()) == before
    with pytest.raises(UserError, match="--out is empty"):
        ingest(open_reader(str(folder)), "")


def test_a_source_that_changes_in_between_is_noticed(tmp_path: Path) -> None:
    folder, out = simple(tmp_path / "f", 12), str(tmp_path / "s")

    def stop(done: int, kept: int, total: int | None) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(open_reader(str(folder)), out, unit_rows=4, progress=stop)
    text = (folder / "metadata.jsonl").read_text()
    (folder / "0.png").rename(folder / "99.png")
    (folder / "metadata.jsonl").write_text(text.replace('"0.png"', '"99.png"'))
    with pytest.raises(UserError, match=r"has changed since this job began: item 8 was '5\.png', now it is"):
        ingest(open_reader(str(folder)), out, unit_rows=4)


def test_nothing_kept_is_one_sentence_and_can_be_tried_again(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "f", {"a.png": b"x"}, {"a.png": "a"})
    for _ in range(2):
        with pytest.raises(UserError, match=r"no picture was kept of 1 items \(1 unusable picture; a.png: "):
            take(folder, tmp_path / "s")
    (folder / "a.png").write_bytes(encoded(noise(1)))
    assert len(take(folder, tmp_path / "s")) == 1
    assert not list((tmp_path / "s" / "rejected" / "data").glob("*"))


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    folder = simple(tmp_path / "f")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="choose a folder that can be written"):
        take(folder, tmp_path / "file" / "s")
    read_only = tmp_path / "locked"
    read_only.mkdir()
    read_only.chmod(0o500)
    try:
        (read_only / "probe").touch()
    except OSError:
        with pytest.raises(UserError, match="choose a folder that can be written"):
            take(folder, read_only / "s")
    finally:
        read_only.chmod(0o700)


SCRIPT = """
import resource, sys
from shoestring.data.ingest import ingest
from shoestring.data.readers import open_reader
from shoestring.runtime import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # a file cannot grow beyond: a full disk
try:
    ingest(open_reader(sys.argv[1]), sys.argv[2], unit_rows=4)
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(tmp_path: Path) -> None:
    files = {f"{i}.png": encoded(noise(i)) for i in range(8)}
    files["6.png"] = encoded(Image.effect_noise((300, 300), 90))
    folder = make_folder(tmp_path / "f", files, dict.fromkeys(files, "a caption"))
    out = tmp_path / "s"

    words = [sys.executable, "-c", SCRIPT, str(folder), str(out)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "cannot write to" in done.stdout
    assert "make room" in done.stdout
    assert done.stdout.count("\n") == 1
    journal = (out / ".work" / "ingest" / "journal.jsonl").read_text()
    assert len(journal.splitlines()) == 2  # the settings and the first unit
    store = take(folder, out, unit_rows=4)
    assert store.digest == take(folder, tmp_path / "t", unit_rows=4).digest
    assert len(list((out / "records" / "data").iterdir())) == 2


def test_a_store_below_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its journal is in the user's cache, and goes when the store is complete."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, out = simple(tmp_path / "f", 9), f"file://{tmp_path}/s"

    def stop(done: int, kept: int, total: int | None) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(open_reader(str(folder)), out, unit_rows=4, progress=stop)
    assert list((tmp_path / "cache").rglob("journal.jsonl"))
    store = ingest(open_reader(str(folder)), out, unit_rows=4)
    check_balance(store)
    assert len(Store(str(tmp_path / "s"))) == 9
    assert not list((tmp_path / "cache").rglob("journal.jsonl"))
    assert store.digest == take(folder, tmp_path / "t", unit_rows=4).digest
