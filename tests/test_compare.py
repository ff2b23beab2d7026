"""Comparing runs: axes, budgets, settings that differ, pictures from the same noise, the page."""

from __future__ import annotations

import base64
import io
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from run_folders import config_of, make_checkpoint, make_run, train_row
from shoestring import cli
from shoestring.config import RunConfig, StageConfig, apply_overrides, to_yaml
from shoestring.studies.compare import (
    MISSING,
    at_equal_budget,
    axes_of,
    decide_loss,
    differences,
    read_runs,
    total_loss,
)
from shoestring.studies.compare_page import write_page
from shoestring.studies.compare_samples import Drawn, draw_samples
from shoestring.training.display import RunLog

VOID = {"meta", "img", "br", "line", "rect", "circle", "polyline", "input"}


class Page(HTMLParser):
    """Text and addresses of a page; fails on tags that are not closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.sources = "", list[str]()
        self.source = path.read_text()
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        assert tag != "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + " "


def changed(*overrides: str) -> RunConfig:
    return apply_overrides(config_of(), overrides)


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """A run, and one that costs twice as much an hour, is not done, and has the lower loss."""
    make_run(tmp_path / "one")
    config = changed(
        "name=two",
        "data.text_encoder_path=<two>",
        "logging.usd_per_hour=72",
        "optimizer.kind=muon",
        "stages.0.mask_ratio=0",
    )
    make_run(tmp_path / "two", config, until=600, level=0.5)
    return [tmp_path / "one", tmp_path / "two"]


def test_axes_and_what_was_spent(two: list[Path]) -> None:
    one, other = read_runs(two)
    assert [axis.key for axis in axes_of([one, other])] == ["images", "flops", "s", "usd"]
    assert [axis.label for axis in axes_of([one])][1:] == [
        "training TFLOP",
        "minutes of training",
        "dollars",
    ]
    assert one.where("s", 75) == pytest.approx(7.5)  # between two rows
    assert one.where("flops", 25) == pytest.approx(25e9)  # before the first
    assert other.where("usd", 600) == pytest.approx(2 * one.where("usd", 600)) == pytest.approx(1.2)
    points = total_loss(one, "s")
    assert points[0] == (pytest.approx(20.0), pytest.approx(1.5))
    assert len(points) == 5


def test_an_axis_that_is_not_known_is_left_out(tmp_path: Path) -> None:
    config = changed("logging.usd_per_hour=0")
    make_run(tmp_path / "one", config)
    (tmp_path / "one" / "machine.json").write_text("{}")
    (run,) = read_runs([tmp_path / "one"])
    assert [axis.key for axis in axes_of([run])] == ["images", "s"]
    assert run.points("usd", run.train, lambda row: row["loss"]) == []
    write_page(tmp_path / "page.html", [run], [])
    text = Page(tmp_path / "page.html").text
    assert "No price was set" in text
    assert "FLOP" not in text


def test_losses_at_equal_budgets(two: list[Path]) -> None:
    runs = read_runs(two)
    images, _, _, usd = axes_of(runs)
    budget, losses = at_equal_budget(runs, images) or (0.0, [])
    assert budget == 600  # of the shorter run
    assert losses == pytest.approx([1 + 1 / 6, 0.5 * (1 + 1 / 6)])
    budget, losses = at_equal_budget(runs, usd) or (0.0, [])
    assert budget == pytest.approx(1.0)  # all of the first; the second had seen 500 images by then
    assert losses[0] == pytest.approx(1.1)
    assert 0.5 * (1 + 1 / 6) < (losses[1] or 0) < 0.5 * (1 + 1 / 4)


def test_only_settings_that_differ() -> None:
    base, other = config_of(), changed("model.depth=1", "stages.1.lr=0.5", "logging.prompts=[a, b]")
    found = dict(differences([base, base, other]))
    assert found == {
        "model.depth": [2, 2, 1],
        "stages.1.lr": [0.001, 0.001, 0.5],
        "logging.prompts": [[], [], ["a", "b"]],
    }
    longer = base.model_copy(
        update={"stages": (*base.stages, StageConfig(name="third", nimg=10, batch=10, lr=1))}
    )
    assert dict(differences([base, longer]))["stages.2.name"] == [MISSING, "third"]
    assert differences([base, base]) == []
    assert decide_loss(differences([base, changed("stages.0.resolution=16", "process.kind=flow")])) == [
        "process.kind",
        "stages.0.resolution",
    ]
    assert decide_loss(list(found.items())) == []


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    make_run(tmp_path / "a" / "run", until=100)
    make_run(tmp_path / "b" / "run", until=100)
    runs = read_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert [run.label for run in runs] == ["a/run", "b/run"]
    assert len({run.color for run in runs}) == 2


def draw(folders: list[Path], *prompts: str) -> list[Drawn]:
    return draw_samples(read_runs(folders), prompts, torch.device("cpu"), Console(quiet=True))


def test_pictures_from_the_same_noise_for_the_same_words(two: list[Path], tmp_path: Path) -> None:
    config = config_of()
    make_checkpoint(two[0], config)
    make_checkpoint(two[1], config)
    one, other = draw(two, "a red circle", "")
    assert one.prompts == other.prompts == ("a red circle", "")
    assert len(one.pictures) == 2
    # The same weights here (a seed by the length of the folder's name): only the noise could differ.
    assert [p.tobytes() for p in one.pictures] == [p.tobytes() for p in other.pictures]
    assert one.pictures[0].tobytes() != one.pictures[1].tobytes()
    assert "8 px, euler, 2 steps, guidance 2" in one.note
    write_page(tmp_path / "page.html", read_runs(two), [one, other])
    page = Page(tmp_path / "page.html")
    assert "All began from the same noise" in page.text
    shown = [base64.b64decode(source.split(",")[1]) for source in page.sources]
    assert [Image.open(io.BytesIO(png)).tobytes() for png in shown[:2]] == [
        picture.tobytes() for picture in one.pictures
    ]


def test_captions_come_from_the_settings_or_the_grids_of_the_first_run(two: list[Path]) -> None:
    from shoestring.sampling.generate import save_png

    config = config_of()
    for folder in two:
        make_checkpoint(folder, config)
    assert draw(two)[0].prompts == ("",) * 8
    prompts = [f"caption {i}" for i in range(16)]
    save_png(two[1] / "progress" / "000000500.png", Image.new("RGB", (9, 9)), {"prompts": prompts})
    (two[1] / "progress" / "000000600.png").write_bytes(b"half a pictu")  # just being written
    assert draw(two)[0].prompts == tuple(prompts[::2])
    (two[0] / "config.yaml").write_text(to_yaml(changed("logging.prompts=[mine]")))
    assert [each.prompts for each in draw(two)] == [("mine",), ("mine",)]


def test_other_conditions_and_sizes_stand_apart_and_a_run_without_checkpoint_is_named(
    two: list[Path], tmp_path: Path
) -> None:
    classes = changed("model.condition=class", "model.classes=3", "stages.1.resolution=16")
    make_run(tmp_path / "three", classes, until=100)
    make_checkpoint(tmp_path / "three", classes, classes=("cat", "dog", "<fox>"))
    make_checkpoint(two[0], config_of())
    folders = [*two, tmp_path / "three"]
    drawn = draw(folders, "a square")
    assert drawn[1].pictures == ()
    assert drawn[2].prompts[:4] == ("cat", "dog", "<fox>", "cat")
    write_page(tmp_path / "page.html", read_runs(folders), drawn)
    text = Page(tmp_path / "page.html").text
    assert "No pictures of  two : " in text
    assert "holds no checkpoint" in text
    assert "the shapes differ" in text
    assert "losses do not compare: stages.1.resolution" in text
    assert "the lowest is bold" not in text


def test_the_page(two: list[Path], tmp_path: Path) -> None:
    config = config_of()
    log = RunLog(two[0], 1000, config.logging)
    log.write("train", train_row(config, 1010, 1.0, loss_per_bin={"0.5": 0.3, "3": 0.4}, skipped=3))
    for i in range(25):
        log.write("event", {"nimg": 1010, "what": "rolled-back", "text": f"<b>{i}</b>"})
    log.close()
    write_page(tmp_path / "page.html", read_runs(two), [])
    page = Page(tmp_path / "page.html")
    for part in (
        "one and two", "Final numbers", "Validation loss at equal budgets", "Over images", "Over FLOPs",
        "Over minutes", "Over dollars", "Validation loss at σ 20", "Training loss at σ 0.5", "Throughput",
        "images seen", "training TFLOP", "minutes of training", "<two>", "optimizer.kind", "<b>24</b>",
        "the last 20 of 25", "the lowest is bold",
    ):  # fmt: skip
        assert part in page.text, part
    assert "model.depth" not in page.text
    assert "Samples" not in page.text
    assert page.sources == []  # nothing from outside
    # A line a run in every chart where both have values, in two colours.
    over_images = page.source.split("Over images")[1].split("</div>")[0]
    assert len(set(re.findall(r"stroke:(#\w+)", over_images))) == 2
    assert len(re.findall("<polyline", over_images)) == 2


def test_the_command_with_one_run(
    two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(two[0], config_of())
    out = tmp_path / "page.html"
    words = ["shoestring", "compare", str(two[0]), "--out", str(out), "-p", "a heart", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0, capsys.readouterr().err
    assert f"Compared in {out}: one" in capsys.readouterr().out
    text = Page(out).text
    assert "a heart" in text
    assert "Settings that differ" not in text


def test_mistakes(two: list[Path], tmp_path: Path, mistake: Callable[..., str]) -> None:
    out = tmp_path / "page.html"
    assert "is missing" in mistake("compare", two[0], tmp_path / "no", "--out", out)
    assert "given twice" in mistake("compare", two[0], two[1], two[0], "--out", out)
    assert "does not exist; make it" in mistake("compare", *two, "--out", tmp_path / "no" / "page.html")
    assert "is a folder" in mistake("compare", *two, "--out", tmp_path)
    assert "--prompt was given with --no-samples" in mistake("compare", *two, "--no-samples", "-p", "a")
    assert "--device was given with --no-samples" in mistake(
        "compare", *two, "--no-samples", "--device", "cpu"
    )
    config = make_run(tmp_path / "new", until=0)
    assert "no training row" in mistake("compare", two[0], tmp_path / "new", "--out", out)
    many = [tmp_path / f"run{i}" for i in range(13)]
    for folder in many:
        make_run(folder, config, until=50)
    assert "at most 12" in mistake("compare", *many, "--out", out)
    assert not out.exists()
