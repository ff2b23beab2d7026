"""Precompute, killed at random moments: the result is that of an undisturbed run."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from forks import FORKS
from raw_stores import job_of_tests, journal_lines, make_raw, prepare_in_a_process
from shoestring.data.precompute import prepare
from shoestring.data.store import Store

KILLS = 20


@pytest.mark.slow
def test_killed_twenty_times_it_ends_as_an_undisturbed_run(tmp_path: Path) -> None:
    raw = make_raw(tmp_path / "raw", rows=200, unit_rows=8)
    whole = prepare(raw, str(tmp_path / "whole"), *job_of_tests())
    draw = random.Random(0)
    out, killed, finished = tmp_path / "out", 0, 0
    while killed < KILLS:
        process = FORKS.Process(target=prepare_in_a_process, args=(raw.uri, str(out)))
        process.start()
        # Most of the time while it starts or computes, sometimes late enough for the commit.
        deadline = time.monotonic() + 60
        lines = journal_lines(out)
        while journal_lines(out) == lines and process.is_alive() and draw.random() > 0.002:
            time.sleep(0.005)
            assert time.monotonic() < deadline
        process.join(draw.choice([0, 0.05, 0.2, 0.5]))
        process.kill()
        process.join()
        killed += process.exitcode == -9
        if process.exitcode == 0:
            # Done: the next begins with what another run left in the middle.
            finished += 1
            _same(Store(str(out)), whole)
            out = tmp_path / f"out{finished}"
        else:
            assert process.exitcode == -9
    _same(prepare(raw, str(out), *job_of_tests()), whole)
    assert not (out / ".work" / "prepare").exists()
    files = list((out / "records" / "data").iterdir())
    assert len(files) == len(Store(str(out)).records.get_fragments())


def _same(store: Store, whole: Store) -> None:
    assert store.records.to_table() == whole.records.to_table()
    assert store.texts.to_table() == whole.texts.to_table()
    assert store.manifest.latents == whole.manifest.latents
    assert store.digest == whole.digest
