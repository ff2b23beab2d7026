"""Signals that come while a run waits for data that do not come."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import Any, cast

import pytest
from rich.console import Console

from run_folders import TINY, config_of
from shoestring.config import ParallelConfig, StageConfig
from shoestring.training import signals
from shoestring.training.folder import checkpoint_folders
from shoestring.training.loop import Run
from shoestring.training.parallel import Parallel
from shoestring.training.stage_data import StageData
from shoestring.training.step import TrainingBatch

SHORT = (
    TINY.replace("resolution: 8", "resolution: 24")
    .replace("nimg: 600", "nimg: 40")
    .replace("nimg: 400", "nimg: 20")
    .replace("source: shapes", "source: shapes, max_captions: 20")
)


class Stalling:
    """Data whose second batch does not come until something has happened, and a signal in the meantime."""

    def __init__(self, data: StageData, number: signal.Signals, until: Callable[[], bool]) -> None:
        self.data, self.number, self.until, self.asked = data, number, until, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def batch(self, stage: StageConfig, first_nimg: int, nimg: int, *share: int) -> TrainingBatch:
        self.asked.append(nimg)
        if len(self.asked) == 2:
            Timer(0.1, os.kill, (os.getpid(), self.number)).start()
        deadline = time.monotonic() + 60
        while len(self.asked) >= 2 and not self.until():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self.data.batch(stage, first_nimg, nimg, *share)


def stalled(folder: Path, number: signal.Signals, until: Callable[[], bool]) -> tuple[Run, list[int]]:
    """A run on such data, and the places of the batches that it asked for."""
    run = Run(config_of(SHORT), folder, Console(quiet=True), Parallel(ParallelConfig(), "cpu"))
    data = Stalling(run.data, number, until)
    run.data = cast(StageData, data)
    return run, data.asked


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "STALL_S", 0.3)


def test_a_run_that_is_stopped_while_it_waits_saves_and_ends(tmp_path: Path) -> None:
    run, asked = stalled(tmp_path, signal.SIGTERM, lambda: False)
    began = time.monotonic()
    assert not run.train()
    assert time.monotonic() - began < 30
    assert [int(folder.name) for folder in checkpoint_folders(tmp_path)] == asked[1:] == [asked[1]]


def test_a_run_that_is_asked_to_save_while_it_waits_saves_and_waits_on(tmp_path: Path) -> None:
    saved: list[str] = []

    def there() -> bool:
        saved.extend(folder.name for folder in checkpoint_folders(tmp_path))
        return bool(saved)

    run, asked = stalled(tmp_path, signal.SIGUSR1, there)
    assert run.train()
    assert asked[1] == asked[2] == int(saved[0])
    assert len(set(asked)) == len(asked) - 1
