"""Runs that read stores: exact resume, pinned versions, moved stores, mistakes, damage in the middle."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from raw_stores import MeanCodec
from shoestring.config import RunConfig
from shoestring.data.ingest import ingest
from shoestring.data.precompute import Job, LatentsJob, TextJob, prepare
from shoestring.data.readers import open_reader
from shoestring.data.store import Store, save_checksums, save_manifest
from shoestring.data.tables import child, commit_new, write_piece
from shoestring.data.units import Makers
from shoestring.encoders.image import PixelCodec
from shoestring.encoders.text import HashingText
from shoestring.recipes import resolve
from shoestring.runtime import UserError
from shoestring.training.loop import Run, train
from shoestring.training.parallel import Parallel
from shoestring.training.stores import open_stores

QUIET = Console(quiet=True)
SIZES = ((24, 24), (16, 32), (32, 16))
SHAPES = ((8, 24), (16, 16), (24, 8))
TINY = """
name: tiny
seed: 3
precision: fp32
device: cpu
model:
  in_channels: 3
  caption_dim: 256
  patch_size: 4
  dim: 16
  depth: 1
  head_dim: 8
  ffn_multiple_of: 8
  mixer: {depth: 1, dim: 16}
  experts: {count: 2}
  mask_captions: true
  attention: sdpa
data: {source: store, text_encoder: hashing, max_tokens: 12, held_out: 0.1, split: pictures}
stages:
  - {name: masked, nimg: 48, batch: 4, resolution: 16, mask_ratio: 0.5, lr: 0.002}
sampling: {steps: 1}
logging: {log_nimg: 8, validate_nimg: 1000, sample_nimg: 1000, checkpoint_nimg: 24, validation_images: 4,
  tensorboard: false}
"""


def pictures(folder: Path, count: int, first: int = 0) -> Path:
    """A folder of pictures in three shapes, with captions."""
    folder.mkdir(parents=True)
    for i in range(first, first + count):
        size = (*SIZES[i % 3], 3)
        pixels = np.random.RandomState(i).randint(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"picture number {i % 7}")
    return folder


def job(resolution: int = 16, mirrored: bool = False) -> Job:
    scale = resolution // 16
    shapes = tuple((h * scale, w * scale) for h, w in SHAPES)
    return Job(
        latents=(LatentsJob(str(resolution), resolution, shapes, mirrored),), text=(TextJob("text"),), batch=8
    )


def makers() -> Makers:
    return Makers(PixelCodec, {"text": lambda: HashingText(12)})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores, a and b, and the pictures of the first."""
    folder = tmp_path_factory.mktemp("made")
    for name, count, first in (("a", 60, 0), ("b", 36, 100)):
        source = pictures(folder / f"{name}-pictures", count, first)
        raw = ingest(open_reader(f"folder:{source}"), str(folder / f"{name}-raw"))
        prepare(raw, str(folder / name), job(), makers())
    return folder


@pytest.fixture
def workplace(made: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def config_of(workplace: Path, *changes: str) -> RunConfig:
    (workplace / "tiny.yaml").write_text(TINY)
    return resolve(str(workplace / "tiny.yaml"), list(changes))


def folder_of(workplace: Path, name: str) -> Path:
    """A run folder that need not measure the machine: that takes seconds."""
    folder = workplace / name
    folder.mkdir()
    (folder / "machine.json").write_text(json.dumps({"matmul_flops_fp32_cpu": 1e9}))
    return folder


def mixed(workplace: Path, *changes: str) -> RunConfig:
    stores = f"[{{path: {workplace}/a, weight: 2}}, {{path: {workplace}/b, weight: 1}}]"
    return config_of(workplace, f"data.stores={stores}", *changes)


class Interrupted(Run):
    """Stops in the middle: with a checkpoint, as by SIGTERM, or without, as if killed."""

    def __init__(self, config: RunConfig, folder: Path, at: int, killed: bool) -> None:
        super().__init__(config, folder, QUIET, Parallel(config.parallel, config.device))
        self.at, self.killed = at, killed

    def _step(self, *words: Any) -> bool:
        goes_on = super()._step(*words)
        if self.counters.nimg == self.at:
            if self.killed:
                raise InterruptedError
            signal.raise_signal(signal.SIGTERM)
        return goes_on


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max(path for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    return load_file(newest / "weights.safetensors")


def interrupted(config: RunConfig, folder: Path, *cuts: tuple[int, bool]) -> None:
    for at, killed in cuts:
        if killed:
            with pytest.raises(InterruptedError):
                Interrupted(config, folder, at, killed).train()
        else:
            assert not Interrupted(config, folder, at, killed).train()


def run_all(config: RunConfig, folder: Path) -> Path:
    assert train(config, folder, QUIET)
    return folder


def assert_equal(a: Path, b: Path) -> None:
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_mixture_with_buckets_resumes_exactly(workplace: Path) -> None:
    config = mixed(workplace, "data.flip=true")
    whole = run_all(config, folder_of(workplace, "whole"))
    pieces = folder_of(workplace, "pieces")
    interrupted(config, pieces, (12, False), (32, True))
    assert train(config, pieces, QUIET)
    assert_equal(whole, pieces)
    other = config_of(workplace, f"data.path={workplace}/a", "data.flip=true")
    run_all(other, folder_of(workplace, "other"))
    with pytest.raises(AssertionError):
        assert_equal(whole, workplace / "other")


def test_a_folder_at_two_resolutions_with_buckets_resumes_exactly(workplace: Path) -> None:
    path = f"data.path={workplace}/a-pictures"
    stages = [
        f"{{name: {name}, nimg: 24, batch: 4, resolution: {side}, mask_ratio: 0.5, lr: 0.002}}"
        for name, side in (("small", 16), ("large", 32))
    ]
    buckets = ("data.buckets=3", "data.bucket_aspect=2", f"stages=[{', '.join(stages)}]")
    config = config_of(workplace, "data.source=folder", path, *buckets)
    whole = run_all(config, folder_of(workplace, "whole"))
    pieces = folder_of(workplace, "pieces")
    interrupted(config, pieces, (8, False), (16, True), (28, False), (40, True))
    assert train(config, pieces, QUIET)
    assert_equal(whole, pieces)
    shutil.move(pieces, workplace / "elsewhere")  # run folders may be moved
    assert train(config, workplace / "elsewhere", QUIET)


def test_a_run_keeps_reading_the_version_that_it_began_with(workplace: Path) -> None:
    config = mixed(workplace)
    whole = run_all(config, folder_of(workplace, "whole"))
    shutil.rmtree(workplace / "a")
    prepare(Store(str(workplace / "a-raw")), str(workplace / "a"), job(), makers())
    pieces = folder_of(workplace, "pieces")
    interrupted(config, pieces, (20, False))
    began = Store(str(workplace / "a")).version
    prepare(Store(str(workplace / "a-raw")), str(workplace / "a"), job(32), makers())
    newer = Store(str(workplace / "a"))
    save_manifest(newer.uri, newer.manifest.model_copy(update={"made_by": "later"}))
    Store(newer.uri).clean()
    assert Store(newer.uri).version > began
    assert Store(newer.uri, began).manifest.latents == newer.manifest.latents[:1]
    assert train(config, pieces, QUIET)
    assert_equal(whole, pieces)


def test_what_a_later_stage_lacks_is_said_before_training(workplace: Path) -> None:
    stages = [
        f"{{name: {name}, nimg: 16, batch: {batch}, resolution: {side}, lr: 0.002}}"
        for name, side, batch in (("small", 16, 4), ("large", 32, 4), ("larger", 32, 32))
    ]
    config = config_of(workplace, f"data.path={workplace}/a", f"stages=[{', '.join(stages)}]")
    run = folder_of(workplace, "run")
    with pytest.raises(UserError, match=r"'large' has resolution 32.*holds latents at 16 px"):
        train(config, run, QUIET)
    assert not (run / "checkpoints").exists()
    prepare(Store(str(workplace / "a-raw")), str(workplace / "a"), job(32), makers())
    with pytest.raises(UserError, match=r"bucket \w+ holds .* fewer than one batch of 32"):
        train(config, run, QUIET)
    fitting = config.model_copy(update={"stages": config.stages[:2]})
    assert train(fitting, run, QUIET)


def test_a_moved_store_is_taken_where_it_is_now_and_another_one_is_not(workplace: Path) -> None:
    config = config_of(workplace, f"data.path={workplace}/a")
    whole = run_all(config, folder_of(workplace, "whole"))
    pieces = folder_of(workplace, "pieces")
    interrupted(config, pieces, (20, False))
    shutil.move(workplace / "a", workplace / "moved")
    with pytest.raises(UserError, match="a is not a store"):
        train(config, pieces, QUIET)
    with pytest.raises(UserError, match=r"b is not the store that the run in .* began with"):
        train(config_of(workplace, f"data.path={workplace}/b"), pieces, QUIET)
    assert train(config_of(workplace, f"data.path={workplace}/moved"), pieces, QUIET)
    assert_equal(whole, pieces)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["stages.0.resolution=32"], r"stage 'masked' has resolution 32.*16 px"),
        (["model.patch_size=8"], None),
        (["stages.0.resolution=16", "model.patch_size=16"], r"model\.patch_size"),
        (["model.mask_captions=false"], r"model\.mask_captions"),
        (["data.captions=[blip]"], r"data\.captions.*'blip'.*source"),
        (["data.max_tokens=8"], r"data\.max_tokens"),
        (["data.text_encoder=minilm", "model.caption_dim=384"], "minilm"),
        (["stages.0.batch=64"], "bucket .* fewer than one batch"),
        (["process.sigma_data=7"], r"process\.sigma_data"),
        (["data.held_out=1"], r"data\.held_out"),
        (["data.stores=[{path: A}]"], r"data\.path is .* data\.stores"),
        (["data.path=null"], r"data\.path is not set"),
        (["data.path=null", "data.stores=[{path: A}, {path: A}]"], r"data\.stores\.1\.path"),
        (["data.path=null", "data.stores=[{path: A, weight: 0}]"], r"data\.stores\.0\.weight is 0"),
        (["data.path=null", "data.stores=[{path: A, weight: -1}]"], r"data\.stores\.0\.weight is -1"),
        (["data.path=null", "data.stores=[{path: A, weight: .nan}]"], r"data\.stores\.0\.weight"),
        (["data.path=null", "data.stores=[{path: A}, {path: E}]"], r"E.*no (rows|records)"),
        (["data.path=https://nowhere.invalid/store"], "nowhere"),
        (["data.path=RAW"], "RAW|a-raw"),
        (["model.condition=class", "model.classes=7", "data.split=captions"], r"data\.split"),
        (["model.condition=class", "model.classes=3"], r"model\.classes"),
    ],
)
def test_mistakes_are_sentences_that_name_the_field(
    made: Path, tmp_path: Path, changes: list[str], message: str | None
) -> None:
    (tmp_path / "a").symlink_to(made / "a")
    empty = tmp_path / "E"
    shutil.copytree(made / "a", empty)
    store = Store(str(empty))
    records = commit_new(child(store.uri, "records"), store.records.schema, [])
    tables = {**store.manifest.tables, "records": records.version, "checksums": save_checksums(store.uri, [])}
    latents = tuple(c.model_copy(update={"counts": (0, 0, 0)}) for c in store.manifest.latents)
    save_manifest(
        store.uri, store.manifest.model_copy(update={"records": 0, "tables": tables, "latents": latents})
    )
    changes = [c.replace("path: A", f"path: {made}/a").replace("path: E", f"path: {empty}") for c in changes]
    changes = [c.replace("=RAW", f"={made}/a-raw") for c in changes]
    words = [f"data.path={made}/a", *changes]

    def go() -> None:
        train(config_of(tmp_path, *words), folder_of(tmp_path, "run"), QUIET)

    if message is None:
        go()
        return
    with pytest.raises(UserError, match=message) as said:
        go()
    assert "\n" not in str(said.value)


def test_classes_are_trained_from_a_store(made: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, f"data.path={made}/a", "model.condition=class", "model.classes=7")
    assert train(config, folder_of(tmp_path, "run"), QUIET)


def test_draws_of_an_import_and_records_without_captions_are_trained_on(workplace: Path) -> None:
    store = Store(str(workplace / "a"))
    (latents,) = store.manifest.latents
    latents = latents.model_copy(update={"sampled": True})
    empty = pa.array([[]] * len(store), pa.list_(pa.int32()))
    table = store.records.to_table()
    table = table.set_column(table.schema.get_field_index("caption_source"), "caption_source", empty)
    uri = str(workplace / "bare")
    shutil.copytree(workplace / "a", uri)
    piece = write_piece(child(uri, "records"), table)
    version = commit_new(child(uri, "records"), table.schema, [piece]).version
    sums = save_checksums(uri, [("records", file) for file in piece.files])
    tables = {**store.manifest.tables, "records": version, "checksums": sums}
    save_manifest(uri, store.manifest.model_copy(update={"tables": tables, "latents": (latents,)}))
    config = config_of(workplace, f"data.path={uri}")
    run_all(config, folder_of(workplace, "run"))


def test_what_an_import_does_not_say_is_taken_on_trust_as_far_as_it_fits(workplace: Path) -> None:
    uri = str(workplace / "mean")
    store = prepare(Store(str(workplace / "a-raw")), uri, job(), Makers(MeanCodec, makers().encoders))
    console = Console(record=True, file=io.StringIO(), width=500)
    config_of(workplace)  # writes tiny.yaml

    def opened(*changes: str, **values: object) -> str:
        (latents,) = store.manifest.latents
        latents = latents.model_copy(update=values)
        save_manifest(uri, store.manifest.model_copy(update={"latents": (latents,)}))
        folder = workplace / str(len(list(workplace.iterdir())))
        folder.mkdir()
        now = resolve(str(workplace / "tiny.yaml"), [f"data.path={uri}", "model.patch_size=2", *changes])
        open_stores(now, now.stages[0], MeanCodec(), None, folder, console)
        return console.export_text()

    assert "taken to be" not in opened()
    nameless = replace(MeanCodec().identity, digest="")
    assert "does not say which weights" in opened(codec=nameless)
    with pytest.raises(UserError, match=r"data\.flip is true, but .*mean holds no mirrored"):
        opened("data.flip=true")
    with pytest.raises(UserError, match=r"have 5 channels.*data\.codec_path"):
        opened(codec=nameless, channels=5)
    with pytest.raises(UserError, match=r"one flat colour"):
        opened(sigma=0.0)
    with pytest.raises(UserError, match=r"was made by the codec .* but the recipe has"):
        opened(codec=replace(nameless, digest="00ff"))


def damage_cut(workplace: Path, table: str) -> None:
    for path in (workplace / "a" / table / "data").iterdir():
        os.truncate(path, path.stat().st_size // 2)


def damage_gone(workplace: Path, table: str) -> None:
    shutil.rmtree(workplace / "a" / table / "data")


class Damaging(Run):
    """Does something after some steps."""

    def __init__(self, config: RunConfig, folder: Path, at: int, act: Callable[[], None]) -> None:
        super().__init__(config, folder, QUIET, Parallel(config.parallel, config.device))
        self.at, self.act = at, act

    def _step(self, *words: Any) -> bool:
        if self.counters.nimg == self.at:
            self.act()
        return super()._step(*words)


@pytest.mark.parametrize("table", ["records", "texts"])
@pytest.mark.parametrize("damage", [damage_cut, damage_gone])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_store_that_breaks_in_the_middle_ends_the_run_with_a_sentence(
    workplace: Path, table: str, damage: Callable[[Path, str], None], scheme: str
) -> None:
    config = config_of(
        workplace, f"data.path={scheme}{workplace}/a", "data.cache_gb=0.000001", "data.window_blocks=1"
    )
    before = set(threading.enumerate())
    run = Damaging(config, folder_of(workplace, "run"), 20, lambda: damage(workplace, table))
    with pytest.raises(UserError, match=rf"{workplace}/a") as said:
        run.train()
    assert "\n" not in str(said.value)
    assert "data verify" in str(said.value)
    left = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("prefetch")]
    assert not [thread for thread in left if thread.is_alive()]
