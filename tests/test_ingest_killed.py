"""Ingestion killed at random moments: the same command ends where an undisturbed one does."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoestring.data.filters import Filters
from shoestring.data.ingest import ingest, rejections
from shoestring.data.readers import open_reader
from shoestring.data.store import Store
from test_ingest import check_balance, encoded, make_folder, noise

SCRIPT = """
import sys, time
from shoestring.data.filters import Filters
from shoestring.data.ingest import ingest
from shoestring.data.readers import open_reader
print("ready", flush=True)
ingest(open_reader(sys.argv[1]), sys.argv[2], Filters(equal_files=True, look_alikes=3, min_side=20),
       unit_rows=5, progress=lambda done, kept, total: time.sleep(0.004))
"""


FILTERS = Filters(equal_files=True, look_alikes=3, min_side=20)


def make_source(path: Path) -> Path:
    """150 pictures, some bad, some twice; captions that come again in later units."""
    files, captions = {}, {}
    for i in range(150):
        name = f"{i:03}.png"
        files[name] = encoded(noise(i, 24, 19 if i % 13 == 0 else 24))
        if i % 11 == 5:
            files[name] = files[f"{i - 5:03}.png"]
        if i % 17 == 3:
            files[name] = b"broken"
        if i % 19 == 7:
            files[name] = encoded(noise(i - 6, 24, 24), "WEBP", quality=90)
        captions[name] = [f"caption {i % 40}", f"other {i}"]
    return make_folder(path, files, captions)


def contents(uri: str) -> tuple[object, ...]:
    """All that a store says and holds, except Lance's names of files."""
    store = Store(uri)
    check_balance(store)
    manifest = store.manifest.model_dump(exclude={"tables"})
    files = {
        name: len(list((Path(uri) / name / "data").iterdir())) for name in ("records", "texts", "rejected")
    }
    tables = [store.records.to_table(), store.texts.to_table(), rejections(store)]
    return manifest, store.digest, files, *[table.to_pylist() for table in tables]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source, and the store of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source = make_source(folder / "f")
    ingest(open_reader(str(source)), str(folder / "s"), FILTERS, unit_rows=5)
    return source, folder / "s"


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path, undisturbed: tuple[Path, Path]) -> None:
    folder, whole = undisturbed
    words = [sys.executable, "-c", SCRIPT, str(folder)]
    chance = random.Random(1)
    kills = 0
    while kills < 2:
        process = subprocess.Popen(
            [*words, str(tmp_path / "s")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()  # imports are done
        time.sleep(chance.uniform(0.05, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was done before it was killed"
        kills += 1
    assert not (tmp_path / "s" / "manifest").exists()
    ingest(open_reader(str(folder)), str(tmp_path / "s"), FILTERS, unit_rows=5)
    assert contents(str(tmp_path / "s")) == contents(str(whole))
    assert {path.name for path in (tmp_path / "s").iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.slow
def test_killed_between_the_commits(tmp_path: Path, undisturbed: tuple[Path, Path]) -> None:
    """A process that dies before the commits, between them and after the last."""
    folder, whole = undisturbed
    code = SCRIPT.replace("time.sleep(0.004)", "None").replace(
        'print("ready", flush=True)',
        """
import os, signal
import shoestring.data.ingest as job
left = [int(sys.argv[3])]
def dying(function):
    def call(*args):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return function(*args)
    return call
for name in ("commit_new", "save_checksums", "save_manifest", "_tidy", "clean"):
    setattr(job, name, dying(getattr(job, name)))
""",
    )
    words = [sys.executable, "-c", code, str(folder), str(tmp_path / "s")]
    # Three tables, checksums, manifest, then the cleaning.
    for step, complete in ((4, False), (5, True)):
        done = subprocess.run([*words, str(step)], check=False, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, (step, done.stderr)
        assert (tmp_path / "s" / "manifest").exists() == complete
    ingest(open_reader(str(folder)), str(tmp_path / "s"), FILTERS, unit_rows=5)
    assert contents(str(tmp_path / "s")) == contents(str(whole))
    assert not (tmp_path / "s" / ".work").exists()
