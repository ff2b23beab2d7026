"""Precompute on a local Ray of two workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raw_stores import (
    MeanCodec,
    MeanColour,
    SlowCodec,
    WordText,
    job_of_tests,
    journal_lines,
    make_raw,
    prepare_through_ray,
)
from shoestring.data.precompute import prepare
from shoestring.data.store import Store
from shoestring.data.units import Makers
from shoestring.runtime import UserError

ray = pytest.importorskip("ray", reason="the engine of clusters is optional")

from shoestring.data.precompute_ray import RayEngine  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _local_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # Workers, also those of other drivers, find the helpers of the tests.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


def makers(folder: Path) -> Makers:
    """Of tools that note the process they are in."""

    def codec() -> SlowCodec:
        (folder / f"pid{os.getpid()}").touch()
        return SlowCodec()

    return Makers(codec, {"t": WordText}, {"colour": MeanColour})


def same(store: Store, whole: Store) -> None:
    assert store.records.to_table() == whole.records.to_table()
    assert store.texts.to_table() == whole.texts.to_table()
    assert store.manifest.latents == whole.manifest.latents
    assert store.digest == whole.digest


def test_two_workers_one_killed_in_the_middle(tmp_path: Path) -> None:
    raw = make_raw(tmp_path / "raw", rows=120, unit_rows=8)
    job, alone = job_of_tests()
    whole = prepare(raw, str(tmp_path / "whole"), job, alone)
    pids = tmp_path / "pids"
    pids.mkdir()
    killed: list[int] = []

    def kill() -> None:
        while journal_lines(tmp_path / "out") < 4:
            time.sleep(0.01)
        pid = max(pids.iterdir(), key=lambda file: file.stat().st_mtime).name.removeprefix("pid")
        os.kill(int(pid), signal.SIGKILL)
        killed.append(int(pid))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    store = prepare(raw, str(tmp_path / "out"), job, makers(pids), RayEngine(workers=2))
    assert killed
    same(store, whole)
    assert len(list((tmp_path / "out" / "records" / "data").iterdir())) == 15


def test_a_driver_that_is_killed_goes_on(tmp_path: Path) -> None:
    raw = make_raw(tmp_path / "raw", rows=160, unit_rows=8)
    whole = prepare(raw, str(tmp_path / "whole"), *job_of_tests())
    out = tmp_path / "out"
    # A new interpreter: a server that another test left does not know how to speak to this Ray.
    processes = multiprocessing.get_context("spawn")
    address = ray.get_runtime_context().gcs_address
    process = processes.Process(target=prepare_through_ray, args=(raw.uri, str(out), address))
    process.start()
    while journal_lines(out) < 4:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    same(prepare(raw, str(out), *job_of_tests(), RayEngine(workers=2)), whole)


def test_a_job_goes_on_under_the_other_engine(tmp_path: Path) -> None:
    raw = make_raw(tmp_path / "raw", rows=48, unit_rows=8)
    job, alone = job_of_tests()
    whole = prepare(raw, str(tmp_path / "whole"), job, alone)
    seen = 0

    def stop(_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(raw, str(tmp_path / "out"), job, alone, RayEngine(workers=2), stop)
    same(prepare(raw, str(tmp_path / "out"), job, alone), whole)


def test_mistakes_come_back_as_sentences(tmp_path: Path) -> None:
    raw = make_raw(tmp_path / "raw", rows=8)
    job, alone = job_of_tests()

    def missing() -> MeanCodec:
        raise UserError("cannot load weights")

    with pytest.raises(UserError, match=r"^cannot load weights$"):
        prepare(raw, str(tmp_path / "out"), job, Makers(missing, alone.encoders), RayEngine(workers=1))
    for file in (tmp_path / "raw" / "records" / "data").iterdir():
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        prepare(raw, str(tmp_path / "out"), job, alone, RayEngine(workers=1))
    with pytest.raises(UserError, match="--workers is 9 and each takes 1 CPU, but Ray has 2"):
        RayEngine(workers=9, cpus=1)
