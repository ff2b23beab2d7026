"""Trackers: TensorBoard for certain; wandb and trackio, offline, where they are installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from run_folders import TINY, config_of, make_run, train_row
from shoestring.config import LoggingConfig
from shoestring.runtime import UserError
from shoestring.training.display import RunLog
from shoestring.training.trackers import NAMES, check_trackers, numbers


def test_numbers_within_mappings_too() -> None:
    row = {"nimg": 10, "loss": 0.5, "stage": "a", "loss_per_bin": {"0.1": 0.2}, "lr": 0, "peak_share": None}
    assert numbers("train", row) == {"train/loss": 0.5, "train/loss_per_bin/0.1": 0.2, "train/lr": 0}


def write_some(folder: Path, logging: LoggingConfig, start: int) -> None:
    """Two rows, an event and a picture, as a sitting that began at some image."""
    config = config_of()
    log = RunLog(folder, start, logging)
    for nimg in (start + 10, start + 20):
        log.write("train", train_row(config, nimg, float(nimg), loss_per_bin={"2": 0.5}))
    log.write("event", {"nimg": start + 20, "what": "stalled", "text": "waited for the data"})
    Image.new("RGB", (6, 4), (255, 0, 9)).save(folder / "grid.png")
    log.picture("samples", start + 20, folder / "grid.png")
    log.close()


def test_tensorboard_shows_curves_events_and_grids_and_hides_what_a_resume_undid(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging = LoggingConfig(tensorboard=True)
    write_some(tmp_path, logging, 0)
    write_some(tmp_path, logging, 10)  # goes on from image 10: 20 is written again
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert losses == [(10, 10.0), (20, 20.0), (30, 30.0)]
    assert {event.value for event in found.Scalars("train/loss_per_bin/2")} == {0.5}
    assert "train/nimg" not in found.Tags()["scalars"]
    assert [event.step for event in found.Tensors("event/stalled/text_summary")][-1] == 30
    images = found.Images("samples")
    assert (images[-1].step, images[-1].width, images[-1].height) == (30, 6, 4)
    (tmp_path / "shown.png").write_bytes(images[-1].encoded_image_string)
    with Image.open(tmp_path / "shown.png") as picture:
        assert (np.array(picture) == (255, 0, 9)).all()


def test_without_trackers_there_is_the_log_alone(tmp_path: Path) -> None:
    write_some(tmp_path, LoggingConfig(tensorboard=False), 0)
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "grid.png"}


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not
    with pytest.raises(UserError, match=rf"logging\.{package} is 'mine', but .* pip install {package}"):
        check_trackers(LoggingConfig(**{package: "mine"}))


def test_nothing_is_written_before_a_missing_tracker_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    make_run(tmp_path / "run", until=200)
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    with pytest.raises(UserError, match="not installed"):
        RunLog(tmp_path / "run", 50, LoggingConfig(wandb="mine"))
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before


def test_an_empty_project_is_no_project(tmp_path: Path, mistake: Callable[..., str]) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY.replace("tensorboard: false", 'wandb: ""'))
    assert "logging.wandb" in mistake("recipes", "show", tmp_path / "tiny.yaml")


def test_trackio_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    make_run(tmp_path / "run", until=50)
    logging = LoggingConfig(tensorboard=False, trackio="mine")
    write_some(tmp_path / "run", logging, 50)
    name = json.loads((tmp_path / "run" / NAMES).read_text())["trackio"]
    write_some(tmp_path / "run", logging, 70)
    runs = trackio.Api().runs("mine")
    assert [run.name for run in runs] == [name]


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    pytest.importorskip("wandb")
    make_run(tmp_path / "run", until=50)
    logging = LoggingConfig(tensorboard=False, wandb="mine")
    write_some(tmp_path / "run", logging, 50)
    name = json.loads((tmp_path / "run" / NAMES).read_text())["wandb"]
    write_some(tmp_path / "run", logging, 70)
    folders = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert folders
    assert all(folder.name.endswith(name) for folder in folders)
