"""Damage, full disks and kills: a run ends as if nothing had happened, by nothing but the same command.

The long form, 60 faults: ``make test-faults`` (``FAULTS=200 FAULT_SEED=7 make test-faults``).
"""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import subprocess
import time
from pathlib import Path
from random import Random

import pytest
from rich.console import Console

import faults
from shoestring.config import apply_overrides, load_yaml
from shoestring.runtime import UserError
from shoestring.training.folder import checkpoint_folders
from shoestring.training.loop import train
from shoestring.training.saving import Saver

TOTAL = 192


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return faults.write_recipe(tmp_path_factory.mktemp("recipe"), TOTAL - 48, 36)


def run(recipe: Path, folder: Path, *changes: str, allow_changes: bool = False) -> str:
    """Train in this process, on one rank; what it said."""
    if not folder.exists():
        faults.prepare(folder)
    console = Console(record=True, width=1000, file=io.StringIO())
    config = apply_overrides(load_yaml(recipe), list(changes))
    assert train(config, folder, console, allow_changes)
    return console.export_text()


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    said = run(recipe, folder, "logging.keep_checkpoints=4")
    assert "A checkpoint takes" in said
    return folder


@pytest.fixture
def hurt(whole, tmp_path) -> Path:
    """A copy of the finished run, its newest checkpoint taken away: there is something left to do."""
    folder = tmp_path / "hurt"
    shutil.copytree(whole, folder)
    shutil.rmtree(faults.newest(folder))
    return folder


def spoil_truncated(folder):
    faults.damage(folder / "state" / "__0_0.distcp", "truncate", Random(1))


def spoil_metadata(folder):
    faults.damage(folder / "state" / ".metadata", "flip", Random(2))


def spoil_bit(folder):
    faults.damage(folder / "state" / "__0_0.distcp", "flip", Random(3))


def spoil_model_file(folder):
    faults.damage(folder / "ema.safetensors", "flip", Random(4))


def spoil_missing(folder):
    (folder / "state" / "__0_0.distcp").unlink()


def spoil_unmarked(folder):
    (folder / "complete.json").unlink()


def spoil_garbage(folder):
    (folder / "complete.json").write_bytes(b"\xff\xfe{]")


def spoil_mark(folder):
    """Still JSON, but the run would go on from the wrong image."""
    mark = (folder / "complete.json").read_text()
    assert '"nimg": 180' in mark
    (folder / "complete.json").write_text(mark.replace('"nimg": 180', '"nimg": 168'))


SPOILERS = [
    spoil_truncated,
    spoil_metadata,
    spoil_bit,
    spoil_model_file,
    spoil_missing,
    spoil_unmarked,
    spoil_garbage,
    spoil_mark,
]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_a_damaged_checkpoint_is_passed_over(recipe, whole, hurt, spoil):
    place = faults.newest(hurt)
    before = checkpoint_folders(hurt)[-2]
    spoil(place)
    said = run(recipe, hurt)
    assert f"checkpoint {place} is damaged" in said
    assert f"it is set aside as {place.name}.damaged" in said
    assert f"Going on from image {int(before.name)}" in said
    assert faults.result(hurt) == faults.result(whole)


def test_a_run_goes_on_from_the_furthest_checkpoint_whatever_the_clock_says(recipe, whole, hurt):
    """The clock jumped back by a year between two checkpoints, and the newest seems to be the oldest."""
    for k, folder in enumerate(reversed(checkpoint_folders(hurt))):
        os.utime(folder, (time.time() + (k - 1) * 3e7,) * 2)
    assert f"Going on from image {int(faults.newest(hurt).name)}" in run(recipe, hurt)
    assert faults.result(hurt) == faults.result(whole)
    rows = [json.loads(line) for line in (hurt / "log.jsonl").read_text().splitlines()]
    elapsed = [row["elapsed_s"] for row in rows if row["kind"] == "train"]
    assert elapsed == sorted(elapsed)


def test_elapsed_times_are_read_from_a_clock_that_does_not_jump(root):
    """No file of the training asks for the time of day."""
    for file in (root / "src" / "shoestring" / "training").glob("*.py"):
        text = file.read_text()
        assert "time.time(" not in text, file
        assert "datetime.now" not in text, file


def test_all_checkpoints_damaged(recipe, hurt, mistake):
    for folder in checkpoint_folders(hurt):
        spoil_truncated(folder)
    words = ("train", recipe, "--out", hurt)
    said = mistake(*words)
    assert "is damaged (__0_0.distcp is not what was written), and none before it is whole" in said
    assert mistake(*words) == said  # and the same command says the same again


def test_a_checkpoint_of_a_newer_version_is_neither_read_nor_set_aside(recipe, hurt, mistake):
    from shoestring.training import mark as marks

    place = faults.newest(hurt)
    mark = json.loads((place / "complete.json").read_text()) | {"format": 9}
    mark["versions"]["shoestring"] = "7.0"
    (place / "complete.json").write_text(json.dumps(mark | {"digest": marks._digest(mark)}))
    said = mistake("train", recipe, "--out", hurt)
    assert "has format 9, written by shoestring 7.0" in said
    assert "reads format 2" in said
    assert place.exists()


def test_a_checkpoint_of_an_older_version(recipe, hurt, mistake):
    place = faults.newest(hurt)
    (place / "complete.json").unlink()
    (place / "state.pt").write_bytes(b"")
    assert "has format 1, written by an earlier shoestring" in mistake("train", recipe, "--out", hurt)


def test_a_checkpoint_of_another_model(recipe, hurt, mistake, tmp_path):
    run(recipe, tmp_path / "wide", "model.dim=48", "stages.0.nimg=12", "stages.1.nimg=12")
    place = hurt / "checkpoints" / "000000186"
    shutil.copytree(faults.newest(tmp_path / "wide"), place)
    said = mistake("train", recipe, "--out", hurt)
    assert f"checkpoint {place} is of another model" in said
    assert "this model needs [" in said
    assert place.exists()


def test_settings_that_changed(recipe, whole, hurt, mistake):
    words = ("train", recipe, "--out", hurt)
    said = mistake(*words, "stages.1.lr=0.002", "optimizer.beta1=0.8")
    assert "optimizer.beta1 from 0.9 to 0.8, stages.1.lr from 0.001 to 0.002" in said
    assert "--allow-changes" in said
    assert "seed from 5 to 6" in mistake(*words, "seed=6", "--allow-changes")
    assert "stages.0.lr from 0.002 to 0.003" in mistake(*words, "stages.0.lr=0.003", "--allow-changes")
    shutil.rmtree(faults.newest(hurt))
    said = run(recipe, hurt, "stages.1.lr=0.002", allow_changes=True)
    assert "Changed: stages.1.lr from 0.001 to 0.002" in said
    assert faults.result(whole) != faults.result(hurt)


# -- full disks --------------------------------------------------------------------------------------------


@pytest.fixture
def file_limit():
    """Files may not grow beyond a limit, which fails writes in the middle of a file as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(bytes_: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_to_the_end(recipe, hurt, mistake, file_limit, capsys):
    kept = checkpoint_folders(hurt)
    file_limit(60_000)
    said = mistake("train", recipe, "--out", hurt)
    assert "the last checkpoint of" in said
    assert "give the same command again" in said
    file_limit(resource.RLIM_INFINITY)
    assert checkpoint_folders(hurt) == kept
    assert not list((hurt / "checkpoints").glob(".*.part"))


def test_a_disk_that_is_full_for_a_while(whole, recipe, tmp_path, file_limit, monkeypatch):
    """The save fails and says so; training goes on, and the next checkpoint is written."""
    folder, begun = tmp_path / "run", Saver.save

    def save(saver, counters, *words, **more):
        """The disk is full while the second checkpoint is written."""
        saver.finish()
        file_limit(60_000 if counters.nimg == 72 else resource.RLIM_INFINITY)
        return begun(saver, counters, *words, **more)

    monkeypatch.setattr(Saver, "save", save)
    faults.prepare(folder, whole)
    said = run(recipe, folder, "logging.keep_checkpoints=9")
    assert "cannot write checkpoint" in said
    assert "(File too large)" in said
    assert "training goes on and tries again at the next checkpoint" in said
    assert [int(place.name) for place in checkpoint_folders(folder)] == [36, 108, 144, 180, 192]
    assert faults.result(folder) == faults.result(whole)


def test_a_disk_without_room_for_a_checkpoint(recipe, hurt, tmp_path):
    """A file system of its own, so small that the forecast does not fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        shutil.copytree(hurt, disk / "run")
        free = shutil.disk_usage(disk).free
        (disk / "ballast").write_bytes(b"x" * (free - 100_000))
        with pytest.raises(UserError, match=r"the last checkpoint of .* could not be written"):
            run(recipe, disk / "run")
        (disk / "ballast").unlink()
        assert "Going on from image" in run(recipe, disk / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# -- everything at random times ----------------------------------------------------------------------------


def undisturbed(recipe: Path, folder: Path) -> dict[str, str]:
    with faults.Launched(recipe, faults.prepare(folder)) as launched:
        assert launched.ended(300) == 0, launched.words()
    return faults.result(folder)


@pytest.mark.slow
def test_a_few_faults(tmp_path):
    """The short form: a rank is killed, the disk is full, all are killed and the newest checkpoint is cut."""
    recipe = faults.write_recipe(tmp_path, 552, 36)
    expected = undisturbed(recipe, tmp_path / "calm")
    run_folder = faults.prepare(tmp_path / "run", tmp_path / "calm")
    faults.disturb(recipe, run_folder, 600, ["rank", "disk", "truncate"], Random(0))
    assert faults.result(run_folder) == expected


@pytest.mark.faults
def test_many_faults(tmp_path, capsys):
    count, seed = int(os.environ.get("FAULTS", "60")), int(os.environ.get("FAULT_SEED", "0"))
    random, total = Random(seed), 120 * count
    recipe = faults.write_recipe(tmp_path, total - 48, 60)
    kinds = [faults.KINDS[i % len(faults.KINDS)] for i in range(count)]
    random.shuffle(kinds)
    with capsys.disabled():
        print(f"\n{count} faults of seed {seed} over {total} images")
        expected = undisturbed(recipe, tmp_path / "calm")
        began = time.monotonic()
        run_folder = faults.prepare(tmp_path / "run", tmp_path / "calm")
        commands = faults.disturb(recipe, run_folder, total, kinds, random)
        print(f"the same command was given {commands} times, in {time.monotonic() - began:.0f} s")
    assert faults.result(tmp_path / "run") == expected
