"""The commands of the README and of pages in docs/, run in order as a reader would, on small data.

Only ``sh`` blocks: commands that need GPUs, other machines or a reader's own data are indented there.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

import forks
from shoestring.data.cifar10 import FILES
from shoestring.data.store import Store

# What makes a training small; everything else is as the README says.
SMALL = [
    "stages.0.nimg=16",
    "stages.0.batch=8",
    "stages.1.nimg=16",
    "stages.1.batch=8",
    "model.dim=64",
    "model.depth=2",
    "model.mixer.dim=64",
    "model.mixer.depth=1",
    "sampling.steps=2",
    "logging.validation_images=4",
    "logging.tensorboard=false",
]
# Run by .ci/run itself, or not a command of ours.
ELSEWHERE = ("make ", "source ")


def commands_of(page: Path) -> list[str]:
    """The shell lines of a page, in order, without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.S)
    lines = [re.sub(r"\s{2,}# .*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(ELSEWHERE)]


def small_version(command: str) -> list[str]:
    """The words of the command, with a small training."""
    words = shlex.split(command)
    assert words[0] == "shoestring", f"the test does not know how to run {command!r}"
    if words[1] == "train":
        words += [o for o in SMALL if o.partition("=")[0] not in {w.partition("=")[0] for w in words}]
    if words[1] == "profile":
        words += ["--steps", "1", "--batch", "8", *(o for o in SMALL if o.startswith("model."))]
    if words[1] == "adapt" and words[2] in ("superres", "dreambooth", "distill"):
        words = [word for i, word in enumerate(words) if "--nimg" not in words[max(0, i - 1) : i + 1]]
        words += ["--nimg", "16", "--batch", "8", *(["--prior", "4"] if words[2] == "dreambooth" else [])]
    if words[1:3] == ["study", "tokens"]:
        words.append("--plan")
    return words[1:]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with somebody's own pictures and the finished run that the README speaks of."""
    place = tmp_path_factory.mktemp("reader")
    pictures = place / "my_pics"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for i in range(24):
        shape = ((70, 80, 3), (90, 48, 3))[i % 2]
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"a picture number {i}")
    run(
        place,
        [
            *small_version("shoestring train demo"),
            "data.source=folder",
            "data.path=my_pics",
            "--out",
            "runs/demo",
        ],
    )
    return place


def run(place: Path, words: list[str], out: Path | None = None) -> str:
    """Run to the end; the test fails with what the command said."""
    done = forks.shoestring(*words, cwd=place)
    assert done.returncode == 0, f"shoestring {shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    if out is not None:
        out.write_text(done.stdout)
    return done.stdout


@pytest.mark.slow
def test_the_commands_of_the_readme_work_in_order(root: Path, workplace: Path) -> None:
    commands = commands_of(root / "README.md")
    assert len(commands) >= 6
    for command in commands:
        plain, _, target = command.partition(" > ")
        words = small_version(plain)
        run(workplace, words, workplace / target if target else None)
    assert (workplace / "runs" / "demo-my_pics" / "config.yaml").exists()
    assert list((workplace / "samples").glob("*.png"))


@pytest.mark.slow
def test_the_commands_of_the_planning_page_work(root: Path, workplace: Path) -> None:
    commands = commands_of(root / "docs" / "planning.md")
    assert len(commands) >= 3
    for command in commands:
        assert "holds it" in run(workplace, small_version(command))


@pytest.mark.slow
def test_the_commands_of_the_training_page_work_in_order(root: Path, workplace: Path) -> None:
    commands = commands_of(root / "docs" / "training.md")
    assert len(commands) >= 8
    for command in commands:  # averages are named after the images seen, which are few here
        said = run(workplace, small_version(re.sub(r"-at-\d+", "-at-000000032", command)))
        if command.startswith("shoestring watch"):
            assert "finished" in said
    assert {"shapes", "two"} <= {folder.name for folder in (workplace / "runs").iterdir()}
    assert (workplace / "compare.html").stat().st_size > 10_000


@pytest.mark.slow
def test_the_commands_of_the_evaluation_page_work(root: Path, workplace: Path) -> None:
    commands = commands_of(root / "docs" / "evaluation.md")
    assert len(commands) >= 3
    for command in commands:
        plain, _, target = command.partition(" > ")
        run(workplace, small_version(plain), workplace / target if target else None)
    assert list((workplace / "runs" / "demo" / "eval").glob("demo-*/report.html"))


@pytest.mark.slow
def test_the_commands_of_the_export_page_work_in_order(root: Path, workplace: Path) -> None:
    commands = commands_of(root / "docs" / "export.md")
    assert len(commands) >= 10
    for command in commands:
        run(workplace, small_version(command))
    assert (workplace / "demo-diffusers" / "model_index.json").is_file()
    sizes = [(workplace / f"{name}.safetensors").stat().st_size for name in ("demo", "demo-int8")]
    assert sizes[1] <= 0.3 * sizes[0]


@pytest.mark.slow
def test_the_commands_of_the_adaptation_page_work_in_order(root: Path, workplace: Path) -> None:
    (workplace / "subject").mkdir()
    for i in range(3):
        Image.fromarray(np.full((40, 40, 3), 60 * i + 40, np.uint8)).save(workplace / f"subject/{i}.png")
    Image.fromarray(np.full((12, 20, 3), 90, np.uint8)).save(workplace / "photo.png")
    commands = commands_of(root / "docs" / "adapt.md")
    assert len(commands) >= 12
    for command in commands:
        run(workplace, small_version(command))
    assert (workplace / "runs" / "demo-dreambooth" / "before-and-after.png").is_file()
    with Image.open(workplace / "upscaled" / "photo-x4.png") as picture:
        assert picture.size == (80, 48)


@pytest.mark.slow
def test_the_walk_of_the_data_page_works_in_order(root: Path, shared: Path, workplace: Path) -> None:
    cifar = workplace / "cifar"
    cifar.mkdir()
    for name in FILES:
        with pyarrow.parquet.ParquetFile(shared / "data" / name) as file:
            rows = pa.Table.from_batches([next(file.iter_batches(96))])
            pyarrow.parquet.write_table(rows, cifar / name)
    commands = commands_of(root / "docs" / "data.md")
    assert len(commands) >= 14
    for command in commands:
        said = run(workplace, small_version(command))
        if command.startswith("shoestring data verify"):
            assert said.rstrip().endswith("is whole")
    assert Store(str(workplace / "photos-32")).manifest.records == 96
    assert len(Store(str(workplace / "mine-32")).manifest.latents[0].buckets) == 2
    assert [column.name for column in Store(str(workplace / "mine-32")).manifest.text] == [
        "minilm",
        "hashing",
    ]
    for name in ("photos.png", "mine.png"):
        with Image.open(workplace / name) as sheet:
            assert min(sheet.size) > 200
