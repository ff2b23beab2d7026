"""What is done with finished stores: described, merged, MDS in and out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch

from raw_stores import MeanCodec, WordText, job_of_tests, make_raw
from shoestring.data.describe import column_bytes, info, sample_rows, stats
from shoestring.data.embeddings import unpack
from shoestring.data.jobs import Progress, begin
from shoestring.data.mds import MDSFolder, write_mds
from shoestring.data.mds_export import export_mds
from shoestring.data.mds_import import Declared, import_mds
from shoestring.data.merge import merge
from shoestring.data.precompute import TextJob, prepare
from shoestring.data.store import Store, save_manifest
from shoestring.data.units import Makers, Sums
from shoestring.data.verify import verify
from shoestring.interfaces import Identity
from shoestring.runtime import UserError
from stores import BUCKETS, make_store, moments_of
from test_merge import rows_of

# -- describe ----------------------------------------------------------------------------------------------


def test_info_tells_all_that_a_store_says(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", rows=40, buckets=BUCKETS, captions_each=2)
    store.pin("run-1")
    (source,) = store.manifest.sources
    source = source.model_copy(
        update={"read": 47, "rejected": {"too small": 5, "no caption": 2}, "licence": "CC0"}
    )
    store = save_manifest(store.uri, store.manifest.model_copy(update={"sources": (source,)}))
    text = info(store)
    for said in (
        "40 records, 80 distinct captions",
        "version 2, schema 1",
        "run-1 (1)",
        "47 read, 40 kept, 7 rejected, licence CC0",
        "5 x too small",
        "latents 16: test",
        "24 x 8",
        "at most 7 tokens of 8 int8",
    ):
        assert said in text, said
    assert text.index("5 x too small") < text.index("2 x no caption")
    sizes = column_bytes(store)
    data = sum(store.checksums.to_table()["bytes"].to_pylist())
    assert sum(sizes.values()) * 40 == pytest.approx(data)
    assert sizes["moments_16"] >= 6 * 2 * 4 * 2  # not compressed: they are noise


def test_stats_say_when_the_latents_are_not_those_of_the_manifest(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", rows=60, buckets=BUCKETS)
    codec = Moments()
    text = stats(store, codec)
    assert "measured on 60 pictures" in text
    assert "MISMATCH in channel 0, 1: " in text  # make_store claims a mean of 0 and a deviation of 1
    assert "not measured anew: that needs the codec test" in stats(store)
    (column,) = store.manifest.latents
    sums = Sums(2)
    for batch in (store.take([i], ["moments_16", "bucket_16"]) for i in range(60)):
        shape = column.shape(batch["bucket_16"][0].as_py())
        moments = torch.from_numpy(
            np.frombuffer(batch["moments_16"][0].as_py(), np.float16).reshape(1, *shape).copy()
        )
        sums.add(codec.latents(moments, torch.randn(1, 2, *shape[1:])))
    manifest = store.manifest.model_copy(update={"latents": (sums.update(column),)})
    assert "MISMATCH" not in stats(save_manifest(store.uri, manifest), codec)


def test_sampled_rows_are_the_same_again_and_bring_their_captions(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", rows=40, captions_each=2)
    samples = sample_rows(store, 5, seed=1)
    assert samples == sample_rows(store, 5, seed=1)
    assert samples != sample_rows(store, 5, seed=2)
    assert len({sample.row for sample in samples}) == 5
    for sample in samples:
        assert sample.id == f"r{sample.row:06}"
        assert sample.captions == {"source": (f"caption {2 * sample.row}", f"caption {2 * sample.row + 1}")}
    assert [sample.row for sample in sample_rows(store, 99)] == list(range(40))


def test_prepared_stores_are_sound_described_and_merged(tmp_path: Path) -> None:
    job, makers = job_of_tests()
    makers = replace(makers, codec=MeanCodec)
    stores = []
    for name, rows in (("a", 24), ("b", 16)):
        raw = make_raw(tmp_path / f"raw-{name}", rows=rows)
        assert verify(raw.uri).problems == []
        uri = str(tmp_path / name)
        prepare(raw, uri, replace(job, latents=job.latents[:1], features=()), makers)
        stores.append(prepare(raw, uri, job, makers))  # widened
        found = verify(uri)
        assert (found.problems, found.notes) == ([], [])
    assert "features colour: colour at 24 px, 3 wide" in info(stores[0])
    assert "MISMATCH" not in stats(stores[0], MeanCodec())
    merged = merge(stores, str(tmp_path / "m"), duplicates="suffix")
    assert verify(merged.uri).problems == []
    assert merged.manifest.texts == stores[0].manifest.texts
    assert "MISMATCH" not in stats(merged, MeanCodec())
    parts = [store.records.to_table().drop_columns(["id"]) for store in (*stores, merged)]
    assert pa.concat_tables(parts[:2]).to_pylist() == parts[2].to_pylist()
    again = prepare(
        merged,
        merged.uri,
        replace(job, latents=(), features=(), text=(TextJob("all", "all"),)),
        Makers(encoders={"all": WordText}),
    )
    assert verify(again.uri).problems == []


# -- MDS in and out ----------------------------------------------------------------------------------------

DECLARED = Declared(codec=Identity("kl"), encoder=Identity("clip"), channels=4, width=8)


class Moments:
    """A codec of which only the posterior is needed: mean and log-variance."""

    name = "test"
    identity = Identity("test")
    channels, moment_channels, moment_dtype, downsampling = 2, 4, torch.float16, 4

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def latents(self, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        mean, log_variance = moments.float().chunk(2, dim=1)
        return mean + torch.exp(0.5 * log_variance) * noise

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def test_ready_latents_of_the_public_writer_are_imported(shared: Path, tmp_path: Path) -> None:
    expected = np.load(shared / "golden" / "mds" / "expected.npz")
    out = str(tmp_path / "s")
    store = import_mds(shared / "golden" / "mds" / "latents_zstd", out, DECLARED, unit_rows=10)
    assert len(store) == 37
    assert store.manifest.texts == 25  # a third are empty, and one
    latents = store.latents("512")
    assert (latents.channels, latents.moment_channels, latents.downsampling) == (4, 4, 64)
    assert latents.sampled
    assert latents.counts == (37,)
    assert store.latents("256").shape(0) == (4, 4, 4)
    rows = store.records.to_table().to_pylist()
    texts = store.texts.to_table()
    text_BSD, mask_BS = unpack(store.text("text"), texts)
    seen = set()
    for i, row in enumerate(rows):
        assert row["id"] == f"latents_zstd/shard.{i // 7:05}.mds/{i % 7}"
        for size in ("256", "512"):
            got = np.frombuffer(row[f"moments_{size}"], np.float16)
            assert np.array_equal(got, expected[f"latents_{size}"][i])
        (text,) = row["caption_source"]
        assert texts["text"][text].as_py() == expected["captions"][i]
        if text not in seen:
            assert np.array_equal(text_BSD[text].ravel(), expected["caption_latents"][i].astype(np.float32))
        seen.add(text)
    assert mask_BS.all()
    values = expected["latents_512"].astype(np.float64).reshape(37, 4, -1)
    assert latents.mean == pytest.approx(values.mean((0, 2)))
    assert latents.std == pytest.approx(values.std((0, 2)))
    assert latents.sigma == pytest.approx(values.std())
    assert verify(out).problems == []
    with pytest.raises(UserError, match="holds a store already"):
        import_mds(shared / "golden" / "mds" / "latents", out, DECLARED)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_import_and_export_are_inverse(tmp_path: Path, dtype: Literal["float16", "int8"]) -> None:
    random = np.random.RandomState(0)
    samples = [
        {
            "caption": f"caption {i}",
            "caption_latents": random.standard_normal(5 * 8).astype(np.float16).tobytes(),
            "latents_256": random.standard_normal(4 * 4 * 4).astype(np.float16).tobytes(),
        }
        for i in range(100)
    ]
    columns = {"caption": "str", "caption_latents": "bytes", "latents_256": "bytes"}
    write_mds(tmp_path / "mds", columns, samples, 5000)
    declared = replace(DECLARED, text_dtype=dtype)
    store = import_mds(tmp_path / "mds", str(tmp_path / "s"), declared, unit_rows=32)
    assert export_mds(store, tmp_path / "back", ["256"], "text", None, size_limit=5000) == 100
    again = list(MDSFolder(tmp_path / "back"))
    if dtype == "float16":
        assert again == samples
        for path in (tmp_path / "mds").iterdir():
            assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()
    for got, want in zip(again, samples, strict=True):
        assert got["latents_256"] == want["latents_256"]
        values = [
            np.frombuffer(sample["caption_latents"], np.float16).astype(float) for sample in (got, want)
        ]
        assert np.allclose(*values, atol=0.02)


def test_exported_latents_are_draws_that_depend_on_the_record_alone(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", rows=70, positions="all", captions_each=2)
    export_mds(store, tmp_path / "mds", ["16"], "t", Moments())
    assert MDSFolder(tmp_path / "mds").columns == {
        "caption": "str",
        "caption_latents": "bytes",
        "latents_16": "bytes",
    }
    drawn = []
    for i, sample in enumerate(MDSFolder(tmp_path / "mds")):
        assert sample["caption"] == f"caption {2 * i}"
        assert len(sample["caption_latents"]) == 7 * 8 * 2
        mean, log_variance = np.split(moments_of(i, (4, 4, 4)).astype(np.float32), 2)
        latents = np.frombuffer(sample["latents_16"], np.float16).reshape(2, 4, 4)
        drawn.append((latents - mean) / np.exp(0.5 * log_variance))
    assert abs(np.mean(drawn)) < 0.1
    assert np.std(drawn) == pytest.approx(1, abs=0.05)
    assert len({values.tobytes() for values in drawn}) == 70
    merged = merge(
        [make_store(tmp_path / "t", rows=3, first=500, positions="all", captions_each=2), store],
        str(tmp_path / "m"),
    )
    export_mds(merged, tmp_path / "later", ["16"], "t", Moments())
    assert [sample["latents_16"] for sample in MDSFolder(tmp_path / "later")][3:] == [
        sample["latents_16"] for sample in MDSFolder(tmp_path / "mds")
    ]


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    true = make_store(tmp_path / "a", rows=4)
    with pytest.raises(
        UserError, match=r"'t' up to the true length .* prepare them again with positions=all"
    ):
        export_mds(true, tmp_path / "mds", ["16"], "t", Moments())
    store = make_store(tmp_path / "b", rows=4, positions="all", buckets=BUCKETS)
    with pytest.raises(UserError, match="'16' have 3 shapes"):
        export_mds(store, tmp_path / "mds", ["16"], "t", Moments())
    store = make_store(tmp_path / "c", rows=4, positions="all")
    with pytest.raises(UserError, match="are moments of test; name this codec"):
        export_mds(store, tmp_path / "mds", ["16"], "t", None)
    other = Moments()
    other.identity = Identity("other")
    with pytest.raises(UserError, match="were made by test, not by other"):
        export_mds(store, tmp_path / "mds", ["16"], "t", other)
    assert not (tmp_path / "mds").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"channels": 3}, "64 values a picture, which are no square of 3 channels"),
        ({"width": 7}, "40 values a caption, which is no multiple of the width 7"),
        ({"encoder": None}, "has caption_latents; name the text encoder"),
    ],
)
def test_what_was_declared_must_fit_the_folder(
    shared: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        import_mds(shared / "golden" / "mds" / "latents", str(tmp_path / "s"), replace(DECLARED, **change))
    with pytest.raises(UserError, match="for pictures take shoestring data ingest"):
        import_mds(shared / "golden" / "mds" / "images", str(tmp_path / "s"), DECLARED)
    assert not any(tmp_path.iterdir())


def test_samples_that_cannot_be_taken_are_counted(tmp_path: Path) -> None:
    good = {"caption": "a", "latents_16": np.ones(16, np.float16).tobytes()}
    nan = good | {"latents_16": np.full(16, np.nan, np.float16).tobytes()}
    short = good | {"latents_16": b"1234"}
    write_mds(tmp_path / "mds", {"caption": "str", "latents_16": "bytes"}, [good, nan, short, nan, good])
    declared = replace(DECLARED, encoder=None, latents_scale=0.5)
    store = import_mds(tmp_path / "mds", str(tmp_path / "s"), declared, unit_rows=2)
    (source,) = store.manifest.sources
    assert (source.read, source.kept) == (5, 2)
    assert source.rejected == {
        "latents_16 holds numbers that are not finite": 2,
        "latents_16 has another size than in the first sample": 1,
    }
    assert store.latents("16").mean == (0.5,) * 4
    assert store.manifest.text == ()
    assert verify(store.uri).problems == []


SCRIPT = """
import sys
sys.path[:0] = [sys.argv[1]]
import test_store_tools as tools
tools.slow_job(sys.argv[2], sys.argv[3])
"""


def slow_job(kind: str, folder: str) -> None:
    """A job that tells of each unit; run in a process of its own and killed in between."""
    root = Path(folder)

    def told(progress: Progress) -> None:
        print(progress.done, flush=True)
        time.sleep(0.05)

    if kind == "import":
        import_mds(root / "mds", str(root / "out"), DECLARED, unit_rows=5, progress=told)
    else:
        merge([Store(str(root / "a")), Store(str(root / "b"))], str(root / "out"), progress=told)


def test_a_job_killed_after_its_commit_only_has_to_tidy_up(tmp_path: Path) -> None:
    one = make_store(tmp_path / "a", rows=4)
    merged = merge([one], str(tmp_path / "m"))
    journal = begin(merged.uri, "merge", None, {})
    journal.add({"what it did": "all"})
    journal.close()
    (tmp_path / "m" / "seals" / "1.json").unlink()
    assert merge([one], merged.uri).digest == merged.digest
    found = verify(merged.uri)
    assert (found.problems, found.notes) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["import", "merge"])
def test_a_killed_job_goes_on_and_ends_like_an_undisturbed_one(tmp_path: Path, kind: str) -> None:
    make_store(tmp_path / "a", rows=30, unit_rows=5, distinct_texts=8)
    make_store(tmp_path / "b", rows=30, unit_rows=5, first=100)
    samples = [
        {
            "caption": f"caption {i % 17}",
            "caption_latents": np.full(16, i, np.float16).tobytes(),
            "latents_16": np.full(16, i, np.float16).tobytes(),
        }
        for i in range(60)
    ]
    columns = {"caption": "str", "caption_latents": "bytes", "latents_16": "bytes"}
    write_mds(tmp_path / "mds", columns, samples, 2000)
    words = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), kind, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        told = [job.stdout.readline() for _ in range(4)]
        job.send_signal(signal.SIGKILL)
    assert 0 < int(told[-1]) < 60
    assert not (tmp_path / "out" / "manifest").exists()
    slow_job(kind, str(tmp_path))
    (tmp_path / "out").rename(tmp_path / "first")
    slow_job(kind, str(tmp_path))
    stores = [Store(str(tmp_path / name)) for name in ("first", "out")]
    assert stores[0].records.to_table() == stores[1].records.to_table()
    assert stores[0].texts.to_table() == stores[1].texts.to_table()
    assert stores[0].digest == stores[1].digest
    assert stores[0].manifest.latents == stores[1].manifest.latents
    found = verify(stores[0].uri)
    assert (found.problems, found.notes) == ([], [])


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    one = make_store(tmp_path / "a", rows=4)
    (tmp_path / "locked").mkdir(mode=0o555)
    # Root may write everywhere but there.
    locked = "/proc" if os.geteuid() == 0 else str(tmp_path / "locked")
    with pytest.raises(UserError, match=f"cannot write to {locked}/out"):
        merge([one], f"{locked}/out")
    with pytest.raises(UserError, match=f"cannot write to {locked}/out"):
        export_mds(make_store(tmp_path / "b", positions="all"), f"{locked}/out", ["16"], "t", Moments())


@pytest.mark.slow
def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    make_store(tmp_path / "a", rows=30, unit_rows=5)
    make_store(tmp_path / "b", rows=600, unit_rows=600, first=100)
    program = (
        "import resource, signal, sys\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "import test_store_tools as tools\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "tools.slow_job('merge', sys.argv[1])\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert "UserError: cannot write to" in ran.stderr, ran.stderr
    assert "then give the same command" in ran.stderr
    slow_job("merge", str(tmp_path))
    merged = Store(str(tmp_path / "out"))
    assert rows_of(merged) == rows_of(Store(str(tmp_path / "a"))) + rows_of(Store(str(tmp_path / "b")))
    assert verify(merged.uri).problems == []
