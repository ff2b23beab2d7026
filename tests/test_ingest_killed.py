"""Ingestion killed at random moments: the same command ends where an undisturbed one does."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from shoestring.data.ingest import rejections
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
    files = {name: len(list((Path(uri) / name / "data").iterdir())) for name in ("records", "texts", "rejected")}
    tables = [store.records.to_table(), store.texts.to_table(), rejections(store)]
    return manifest, store.digest, files, *[table.to_pylist() for table in tables]


def test_killed_again_and_again(tmp_path: Path) -> None:
    folder = make_source(tmp_path / "f")
    words = [sys.executable, "-c", SCRIPT, str(folder)]
    start = time.monotonic()
    subprocess.run([*words, str(tmp_path / "whole")], check=True, capture_output=True)
    chance = random.Random(1)  # noqa: S311
    kills = 0
    while True:
        process = subprocess.Popen([*words, str(tmp_path / "s")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()  # imports are done
        try:
            _, errors = process.communicate(timeout=chance.uniform(0.05, 0.6) if kills < 6 else None)
            assert process.returncode == 0, errors
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
    assert kills >= 2, f"only {kills} kills in {time.monotonic() - start:.1f} s"
    assert contents(str(tmp_path / "s")) == contents(str(tmp_path / "whole"))
    assert {path.name for path in (tmp_path / "s").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


def test_killed_in_every_step_of_the_end(tmp_path: Path) -> None:
    """A process that dies before, between and after the commits; here each commit is the last thing it does."""
    folder = make_source(tmp_path / "f")
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
    subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "whole"), "-1"], check=True)
    for step in (0, 2, 4, 5, 6):
        done = subprocess.run([*words, str(step)], check=False, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, (step, done.stderr)
        if step >= 5:
            assert len(Store(str(tmp_path / "s"))) > 0
    subprocess.run([*words, "-1"], check=True)
    assert contents(str(tmp_path / "s")) == contents(str(tmp_path / "whole"))
    assert not (tmp_path / "s" / ".work").exists()
