"""Precompute: the right numbers, nothing twice, nothing lost, and mistakes said in a sentence."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raw_stores import MeanCodec, MeanColour, WordText, caption_of, make_raw, picture
from shoestring.data.caption import caption
from shoestring.data.embeddings import unpack
from shoestring.data.forecast import forecast
from shoestring.data.jobs import Progress
from shoestring.data.pixels import decode, fit
from shoestring.data.precompute import FeatureJob, Job, LatentsJob, Local, TextJob, prepare
from shoestring.data.store import Store
from shoestring.data.units import Makers
from shoestring.runtime import UserError

SHAPES = ((16, 16), (12, 24), (24, 12))
LATENTS = LatentsJob("16", 16, SHAPES)
JOB = Job(latents=(LATENTS,), text=(TextJob("t"),), batch=4, text_batch=4)
MAKERS = Makers(MeanCodec, {"t": WordText, "u": lambda: WordText("w2")}, {"colour": MeanColour})


@pytest.fixture
def raw(tmp_path: Path) -> Store:
    return make_raw(tmp_path / "raw")


def rows_of(store: Store, name: str) -> list[Any]:
    return list(store.records.to_table(columns=[name])[name].to_pylist())


def expected_moments(row: int, shape: tuple[int, int], mirrored: bool = False) -> np.ndarray:
    pixels = torch.from_numpy(fit(decode(picture(row)), *shape))[None]
    pixels = pixels.flip(-1) if mirrored else pixels
    return MeanCodec().encode(pixels)[0].half().numpy()


def test_every_record_has_its_own_moments_and_captions(raw: Store, tmp_path: Path) -> None:
    store = prepare(raw, str(tmp_path / "out"), JOB, MAKERS)
    assert not store.manifest.has_images
    assert "image" not in store.records.schema.names
    column = store.latents("16")
    assert column.buckets == SHAPES
    assert column.counts == (20, 10, 10)
    buckets = rows_of(store, column.bucket_column)
    assert buckets == [(0, 1, 2, 0)[i % 4] for i in range(40)]
    assert rows_of(store, "id") == [f"r{i:06}" for i in range(40)]
    for i, data in enumerate(rows_of(store, column.column)):
        got = np.frombuffer(data, np.float16).reshape(column.shape(buckets[i]))
        assert np.array_equal(got, expected_moments(i, SHAPES[buckets[i]]))
    texts = store.texts.to_table()
    words, mask_BS = unpack(store.text("t"), texts)
    for i, (row,) in enumerate(rows_of(store, "caption_source")):
        assert texts["text"][row].as_py() == caption_of(i)
        text_BSD, wanted_BS = WordText()([caption_of(i)])
        true = int(wanted_BS.sum())
        assert mask_BS[row].sum() == true
        cosine = torch.cosine_similarity(torch.from_numpy(words[row, :true]), text_BSD[0, :true], dim=-1)
        assert cosine.min() > 0.999
    assert not (tmp_path / "out" / ".work" / "prepare").exists()


def test_statistics_are_those_of_the_latents(tmp_path: Path) -> None:
    raw = make_raw(tmp_path / "raw", rows=150, unit_rows=32)
    column = prepare(raw, str(tmp_path / "out"), JOB, MAKERS).latents("16")
    draws: list[list[torch.Tensor]] = [[], []]
    generator = torch.Generator().manual_seed(0)
    for i in range(150):
        moments = torch.from_numpy(expected_moments(i, SHAPES[(0, 1, 2, 0)[i % 4]]))[None].float()
        for _ in range(20):
            noise = torch.randn(1, 2, *moments.shape[2:], generator=generator)
            for channel, values in enumerate(MeanCodec().latents(moments, noise)[0]):
                draws[channel].append(values.flatten())
    channels = [torch.cat(part) for part in draws]
    assert column.mean == pytest.approx([float(c.mean()) for c in channels], abs=0.15)
    assert column.std == pytest.approx([float(c.std()) for c in channels], rel=0.03)
    assert column.sigma == pytest.approx(float(torch.cat(channels).std()), rel=0.03)


def test_further_columns_leave_the_old_files_alone(raw: Store, tmp_path: Path) -> None:
    uri = str(tmp_path / "out")
    first = prepare(raw, uri, JOB, MAKERS)
    before = {
        f: f.read_bytes() for t in ("records", "texts") for f in (tmp_path / "out" / t / "data").iterdir()
    }
    wanted = Job(
        latents=(LATENTS, LatentsJob("32", 32, ((32, 32),), mirrored=True)),
        text=(TextJob("u", "all", "float16"),),
        features=(FeatureJob("colour", 24),),
        batch=4,
    )
    store = prepare(raw, uri, wanted, MAKERS)
    assert {f: f.read_bytes() for f in before} == before
    assert [c.name for c in store.manifest.latents] == ["16", "32"]
    assert store.latents("16") == first.latents("16")
    column = store.latents("32")
    mirrors, features = rows_of(store, column.mirror_column), rows_of(store, "feature_colour")
    for i in range(40):
        got = np.frombuffer(mirrors[i], np.float16).reshape(column.shape(0))
        assert np.array_equal(got, expected_moments(i, (32, 32), mirrored=True))
        colour = fit(decode(picture(i)), 24, 24).mean((1, 2))
        assert np.allclose(features[i], colour, rtol=1e-3)
    texts = store.texts.to_table()
    words, _ = unpack(store.text("u"), texts)
    assert words.shape[1] == 4  # all positions
    wanted_BSD, _ = WordText("w2")(texts["text"].to_pylist())
    assert np.array_equal(words, wanted_BSD.half().float().numpy())
    # Old checksums stay, those of the new files follow.
    assert store.checksums.count_rows() == 2 * first.checksums.count_rows()
    version = store.version
    assert prepare(raw, uri, wanted, MAKERS).version == version


def test_a_raw_store_can_get_the_columns_itself(raw: Store) -> None:
    store = prepare(raw, raw.uri, JOB, MAKERS)
    assert store.manifest.has_images
    assert {"image", "moments_16"} < set(store.records.schema.names)
    assert "t_tokens" in store.texts.schema.names


def test_images_are_kept_if_asked_for(raw: Store, tmp_path: Path) -> None:
    job = Job(latents=(LATENTS,), keep_images=True)
    store = prepare(raw, str(tmp_path / "out"), job, MAKERS)
    assert store.manifest.has_images
    assert rows_of(store, "image") == [picture(i) for i in range(40)]


class Stops:
    """A codec that breaks off after some batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def __call__(self) -> MeanCodec:
        codec, encode = MeanCodec(), MeanCodec().encode

        def counted(pixels: torch.Tensor) -> torch.Tensor:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return encode(pixels)

        codec.encode = counted  # type: ignore[method-assign]
        return codec


def test_what_is_done_is_not_done_again(raw: Store, tmp_path: Path) -> None:
    whole = prepare(raw, str(tmp_path / "whole"), JOB, MAKERS)
    uri = str(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        prepare(raw, uri, JOB, Makers(Stops(9), MAKERS.encoders))
    with pytest.raises(UserError, match="was begun with --batch=4, now it is 8"):
        prepare(raw, uri, Job(latents=(LATENTS,), text=(TextJob("t"),), batch=8, text_batch=4), MAKERS)
    with pytest.raises(UserError, match=r"no manifest: it is incomplete|is not a store"):
        Store(uri)
    # Units of 16 are 8 + 4 + 4 rows by shape, in batches of 4: 4 a unit, and the last of 8 rows has 3. The
    # second may still be on its way to the disk when the third begins.
    again = Stops(100)
    seen: list[Progress] = []
    left = forecast(raw, uri, JOB, MAKERS)
    assert 0 < left.bytes_left < left.bytes_total
    store = prepare(raw, uri, JOB, Makers(again, MAKERS.encoders), progress=seen.append)
    assert again.left in (100 - 3, 100 - 7)
    assert seen[0].total == 40
    assert seen[0].done == (36 if again.left == 97 else 20)
    assert seen[-1].done == seen[-1].total
    for name in ("records", "texts"):
        assert getattr(store, name).to_table() == getattr(whole, name).to_table()
    assert store.manifest.latents == whole.manifest.latents
    assert store.digest == whole.digest


def test_a_piece_that_vanished_is_made_again(raw: Store, tmp_path: Path) -> None:
    uri = str(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        prepare(raw, uri, JOB, Makers(Stops(9), MAKERS.encoders))
    next(iter((tmp_path / "out" / "records" / "data").iterdir())).write_bytes(b"short")
    store = prepare(raw, uri, JOB, MAKERS)
    assert len(rows_of(store, "moments_16")) == 40


@pytest.mark.parametrize("step", ["commit_new", "save_checksums", "save_manifest", "tidy"])
def test_killed_between_the_commits(step: str, raw: Store, tmp_path: Path, monkeypatch: Any) -> None:
    from shoestring.data import jobs, precompute

    whole = prepare(raw, str(tmp_path / "whole"), JOB, MAKERS)
    whole = prepare(raw, whole.uri, Job(text=(TextJob("u"),)), MAKERS)
    uri = str(tmp_path / "out")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    def killed(job: Job) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(precompute if step == "tidy" else jobs, step, stop)
            if step == "commit_new":
                patch.setattr(jobs, "commit_columns", stop)
            with pytest.raises(KeyboardInterrupt):
                prepare(raw, uri, job, MAKERS)

    for job in (JOB, Job(text=(TextJob("u"),))):
        for _ in range(2):
            if not (Path(uri) / "manifest").exists() or step != "tidy":
                killed(job)
        store = prepare(raw, uri, job, MAKERS)
        assert not (Path(uri) / ".work" / "prepare").exists()
    assert store.digest == whole.digest
    assert store.records.to_table() == whole.records.to_table()
    assert store.texts.to_table() == whole.texts.to_table()


# -- captions ------------------------------------------------------------------------------------------------


def says(pictures: Sequence[Image.Image]) -> list[str]:
    return [f"a picture of {p.width} by  {p.height}" if p.width != 30 else "word0" for p in pictures]


def test_captions_of_a_model_stand_beside_those_of_the_source(raw: Store, tmp_path: Path) -> None:
    uri = str(tmp_path / "out")
    prepare(raw, uri, JOB, MAKERS)
    captioned = caption(raw, lambda: says, "short", "a test", batch=4)
    assert captioned.captions("short").origin == "a test"
    assert captioned.manifest.texts == raw.manifest.texts + 3  # word0 was there
    texts = captioned.texts.to_table()["text"].to_pylist()
    assert texts[: raw.manifest.texts] == Store(raw.uri, raw.version).texts.to_table()["text"].to_pylist()
    expected = ["a picture of 24 by 24", "a picture of 40 by 20", "a picture of 20 by 40", "word0"]
    assert [texts[row] for (row,) in rows_of(captioned, "caption_short")] == expected * 10
    assert [texts[row] for (row,) in rows_of(captioned, "caption_source")] == [
        caption_of(i) for i in range(40)
    ]
    assert caption(captioned, lambda: says, "short", "a test").version == captioned.version
    with pytest.raises(UserError, match="has captions 'short' of a test"):
        caption(captioned, lambda: says, "short", "another")
    # The prepared store takes them over, with their embeddings and together with a new encoder.
    both = Job(latents=(LATENTS,), text=(TextJob("t"), TextJob("u")), batch=4, text_batch=4)
    with pytest.raises(UserError, match=r"has embeddings 't' of words .* name that encoder as well"):
        prepare(captioned, uri, Job(text=(TextJob("u"),)), Makers(encoders={"u": WordText}))
    store = prepare(captioned, uri, both, MAKERS)
    assert rows_of(store, "caption_short") == rows_of(captioned, "caption_short")
    table = store.texts.to_table()
    assert table["text"].to_pylist() == texts
    assert all(table[name].null_count == 0 for name in table.column_names)
    fresh = prepare(captioned, str(tmp_path / "fresh"), both, MAKERS)
    assert table == fresh.texts.to_table().select(table.column_names)
    assert store.manifest.captions == fresh.manifest.captions


def test_captioning_goes_on_where_it_was_killed(raw: Store, tmp_path: Path) -> None:
    calls = 0

    def breaks(pictures: list[Image.Image]) -> list[str]:
        nonlocal calls
        calls += 1
        assert len(pictures) == 4
        if calls == 7:
            raise KeyboardInterrupt
        return says(pictures)

    with pytest.raises(KeyboardInterrupt):
        caption(raw, lambda: breaks, "short", "a test", batch=4)
    store = caption(raw, lambda: breaks, "short", "a test", batch=4)
    assert calls in (7 + 6, 7 + 10)  # the first of three units was done
    assert len(rows_of(store, "caption_short")) == 40


def test_captions_of_a_store_with_embeddings_get_theirs(raw: Store) -> None:
    store = prepare(raw, raw.uri, Job(text=(TextJob("t"),)), MAKERS)
    with pytest.raises(UserError, match="has embeddings 't' of words"):
        caption(store, lambda: says, "short", "a test")
    with pytest.raises(UserError, match="new captions need the same"):
        caption(store, lambda: says, "short", "a test", encoders={"t": lambda: WordText("other")})
    store = caption(store, lambda: says, "short", "a test", encoders={"t": WordText})
    table = store.texts.to_table()
    assert all(table[name].null_count == 0 for name in table.column_names)
    words, mask_BS = unpack(store.text("t"), table)
    wanted_BSD, _ = WordText()(table["text"].to_pylist())
    assert np.abs(words - wanted_BSD.numpy())[mask_BS].max() < 0.05


# -- mistakes ------------------------------------------------------------------------------------------------


def test_mistakes_are_said(raw: Store, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    store = prepare(raw, out, JOB, MAKERS)
    other = make_raw(tmp_path / "other", rows=41)
    bare = Job(latents=(LATENTS,), batch=4)

    def says_of(said: str, *given: Any) -> None:
        with pytest.raises(UserError, match=said):
            prepare(*given)

    says_of(
        "has latents '16' of mean .m1. at .* asked for is mean .m2.",
        raw,
        out,
        bare,
        Makers(lambda: MeanCodec("m2")),
    )
    says_of(
        "asked for is words .w1., 4 tokens, all positions", raw, out, Job(text=(TextJob("t", "all"),)), MAKERS
    )
    colour = Job(features=(FeatureJob("colour", 24),))
    prepare(raw, out, colour, MAKERS)
    retrained = Makers(extractors={"colour": lambda: MeanColour("new weights")})
    says_of(
        r"features 'colour' of colour at .* asked for is colour .new weights", raw, out, colour, retrained
    )
    says_of("has 40 records, .*other has 41", other, out, bare, MAKERS)
    says_of("holds no pictures", store, str(tmp_path / "new"), bare, MAKERS)
    says_of("nothing to prepare", raw, str(tmp_path / "new"), Job(), MAKERS)
    odd = Job(latents=(LatentsJob("x", 16, ((18, 14),)),))
    says_of("a shape of x is 18 x 14 px; mean .m1. needs multiples of 4", raw, out, odd, MAKERS)
    says_of("'a b' is no name", raw, out, Job(text=(TextJob("a b"),)), MAKERS)
    says_of("asked for twice", raw, out, Job(text=(TextJob("t"), TextJob("t"))), MAKERS)
    says_of("batch is 0", raw, out, Job(batch=0), MAKERS)
    rare = Job(latents=(LatentsJob("x", 16, SHAPES, min_bucket=64),))
    says_of("--min-bucket is 64, but the store has 40", raw, out, rare, MAKERS)

    def missing() -> MeanCodec:
        raise UserError("cannot load weights")

    says_of("cannot load weights", raw, str(tmp_path / "new"), bare, Makers(missing))
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("no folder")
    says_of("cannot write to", raw, str(tmp_path / "file" / "out"), bare, MAKERS)


def test_a_bucket_that_is_too_small_is_merged(raw: Store, tmp_path: Path) -> None:
    job = Job(latents=(LatentsJob("16", 16, SHAPES, min_bucket=11),), batch=4)
    column = prepare(raw, str(tmp_path / "out"), job, MAKERS).latents("16")
    assert (column.buckets, column.counts) == (((16, 16),), (40,))


def test_numbers_that_are_not_finite_are_said(raw: Store, tmp_path: Path) -> None:
    class Overflows(MeanCodec):
        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            return super().encode(pixels) * torch.where(pixels[:, :1, :1, :1] == pixels[0, 0, 0, 0], 1, 1e6)

    with pytest.raises(UserError, match=r"moments_16 of record 'r00.*' is not finite in float16"):
        prepare(raw, str(tmp_path / "out"), Job(latents=(LATENTS,)), Makers(Overflows))

    class Nothing(WordText):
        def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
            text_BSD, mask_BS = super().__call__(texts)
            return text_BSD / 0, mask_BS

    with pytest.raises(UserError, match=r"words.* gives numbers that are not finite for the caption 'word0'"):
        prepare(raw, str(tmp_path / "o2"), Job(text=(TextJob("t"),)), Makers(encoders={"t": Nothing}))


@pytest.mark.parametrize("table", ["records", "texts", "manifest"])
def test_a_half_deleted_store_is_said(table: str, raw: Store, tmp_path: Path) -> None:
    out = prepare(raw, str(tmp_path / "out"), JOB, MAKERS)
    shutil.rmtree(tmp_path / "out" / table)
    with pytest.raises(UserError, match="put it back from a copy"):
        prepare(raw, out.uri, Job(latents=(LatentsJob("32", 32, ((32, 32),)),), text=(TextJob("u"),)), MAKERS)
    for file in (tmp_path / "raw" / "records" / "data").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"raw: .* cannot be read .* put it back"):
        prepare(raw, str(tmp_path / "new"), JOB, MAKERS)


def test_a_picture_that_became_unreadable_is_named(raw: Store, tmp_path: Path, monkeypatch: Any) -> None:
    import raw_stores

    monkeypatch.setattr(raw_stores, "picture", lambda i: b"no picture" if i == 17 else picture(i))
    bad = make_raw(tmp_path / "bad")
    with pytest.raises(UserError, match="the picture of record 'r000017' cannot be read as a picture"):
        prepare(bad, str(tmp_path / "out"), JOB, MAKERS)


FULL = """
import resource, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_precompute import JOB, MAKERS, Store, UserError, prepare
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    prepare(Store({raw!r}), {out!r}, JOB, MAKERS)
except UserError as error:
    print(error)
    raise SystemExit(2)
"""


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_same_command_goes_on(raw: Store, tmp_path: Path) -> None:
    script = FULL.format(tests=str(Path(__file__).parent), limit=1500, raw=raw.uri, out=str(tmp_path / "out"))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    assert "make room" in ended.stdout
    store = prepare(raw, str(tmp_path / "out"), JOB, MAKERS)
    assert len(rows_of(store, "moments_16")) == 40


def test_the_unfinished_store_of_another_command_is_left_alone(raw: Store, tmp_path: Path) -> None:
    from shoestring.data.journal import Journal, work_folder

    journal = Journal(work_folder(str(tmp_path / "out"), "ingest"), {"size": 1})
    journal.add({"items": 1})
    journal.close()
    with pytest.raises(UserError, match=r"out is unfinished work of another command .ingest."):
        prepare(raw, str(tmp_path / "out"), JOB, MAKERS)


def test_two_commands_do_not_work_on_one_store(raw: Store, tmp_path: Path) -> None:
    from shoestring.data.journal import Journal, work_folder

    other = Journal(work_folder(str(tmp_path / "out"), "prepare"), {"base": 0})
    with pytest.raises(UserError, match="is being worked on by another process"):
        prepare(raw, str(tmp_path / "out"), JOB, MAKERS)
    other.close()


# -- forecast ------------------------------------------------------------------------------------------------


def test_the_forecast_is_within_three_percent(tmp_path: Path) -> None:
    raw = make_raw(tmp_path / "raw", rows=600, unit_rows=128)
    out = tmp_path / "out"

    job = Job(latents=(LatentsJob("64", 64, ((64, 64), (48, 96), (96, 48))),), text=(TextJob("t"),), batch=8)
    makers = Makers(MeanCodec, {"t": lambda: WordText(width=256)})
    said = forecast(raw, str(out), job, makers, usd_per_hour=2.5)
    assert not out.exists()
    assert said.cost_usd == pytest.approx(said.hours * 2.5)
    prepare(raw, str(out), job, makers)
    real = sum(file.stat().st_size for file in out.glob("[rt]e*/data/*"))
    assert said.bytes_total == pytest.approx(real, rel=0.03)
    assert said.bytes_per_record == pytest.approx(sum(size for _, size in said.columns))
    assert said.enough
    small = replace(said, bytes_free=1000)
    with pytest.raises(UserError, match=r"would need .* and 1.00 kB are free"):
        small.check("out")
    small.check("out", anyway=True)
    assert "bytes a record" in str(said)
    more = Job(text=(TextJob("u"),))
    added = forecast(raw, str(out), more, MAKERS)
    assert {name for name, _ in added.columns} == {"u_tokens", "u_scale", "u_true", "files"}


def test_batches_are_filled_up_to_few_sizes(raw: Store, tmp_path: Path) -> None:
    sizes: set[int] = set()

    class Counts(MeanCodec):
        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            sizes.add(len(pixels))
            return super().encode(pixels)

    prepare(raw, str(tmp_path / "out"), replace(JOB, batch=6), Makers(Counts, MAKERS.encoders))
    assert sizes == {6, 4, 2}  # 8 + 4 + 4 and 4 + 2 + 2 pictures


def test_a_picture_is_decoded_once_for_all_squares(raw: Store, tmp_path: Path, monkeypatch: Any) -> None:
    decoded: list[bytes] = []

    def counted(data: bytes, smallest: int) -> Image.Image:
        decoded.append(data)
        return decode(data, smallest)

    monkeypatch.setattr("shoestring.data.runner.decode", counted)
    squares = tuple(LatentsJob(str(side), side, ((side, side),)) for side in (16, 8))
    job = Job(squares, features=(FeatureJob("colour", 24),), batch=4)
    seen: list[Progress] = []
    both = prepare(raw, str(tmp_path / "both"), job, MAKERS, progress=seen.append)
    assert sorted(decoded) == sorted(picture(i) for i in range(40))
    assert max(p.done for p in seen if p.stage == "records") == 120  # a record counts once for each column
    prepare(raw, str(tmp_path / "one"), Job(squares[1:], batch=4), MAKERS)
    one = prepare(raw, str(tmp_path / "one"), Job(squares[:1], batch=4), MAKERS)
    for name in ("8", "16"):
        assert rows_of(one, f"moments_{name}") == rows_of(both, f"moments_{name}")
        assert one.latents(name) == both.latents(name)


def test_decoding_happens_in_threads_and_in_order(raw: Store, tmp_path: Path) -> None:
    one = prepare(raw, str(tmp_path / "one"), JOB, MAKERS, Local(threads=1))
    four = prepare(raw, str(tmp_path / "four"), JOB, MAKERS, Local(threads=4))
    assert one.digest == four.digest
