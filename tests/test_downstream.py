"""The downstream part of the sampling study: which networks, the two tasks end to end, the tables."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from run_folders import config_of, make_checkpoint
from shoestring.cli.main import app
from shoestring.config import TokensConfig, UNetConfig
from shoestring.studies.downstream import _bases, _chosen, distilled_table, few_or_many
from shoestring.studies.sampling_analysis import Scale
from shoestring.studies.sampling_rows import Row, append_row, read_rows


def unet(channels, seed=0):
    config = config_of()
    stages = (config.stages[1].model_copy(update={"resolution": 24}),)
    model = UNetConfig(
        kind="unet", in_channels=3, channels=channels, multipliers=(1, 1), attention=(True, False), layers=1,
        caption_dim=256, patch_size=4, mask_captions=True,
    )  # fmt: skip
    more = {"model": model, "tokens": TokensConfig(method="dense"), "stages": stages}
    return config.model_copy(update=more | {"name": f"unet-{channels}", "seed": seed})


def row(model, gflops, steps, kid, **more):
    values = {
        "model": model, "family": "unet", "seed": 0, "parameters": 1, "nimg": 10, "training_gflops": 1.0,
        "gflops": gflops, "sampler": "ddim", "steps": steps, "guidance": 1.0,
        "evaluations": steps, "samples": 50,
        "kid": kid, "kid_error": 0.01, "fd": 100 * kid, "precision": 0.5, "recall": 0.5,
    }  # fmt: skip
    return Row(**values | more)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    for channels in (8, 12, 16, 24):
        for seed in (0, 1):
            make_checkpoint(folder / f"models/unet-{channels}-s{seed}", unet(channels, seed), nimg=400)
    make_checkpoint(folder / "models/unet-32-s0", unet(32), nimg=200)  # not finished
    append_row(folder / "results.parquet", row("unet-8", 1.0, 4, 0.5))
    append_row(folder / "results.parquet", row("unet-24", 4.0, 10, 0.2))
    return folder


def test_sizes_are_spread_over_the_costs_and_the_ends_have_all_seeds(study):
    bases = _bases(study, "unet")
    assert {base.name for base in bases} == {"unet-8", "unet-12", "unet-16", "unet-24"}
    chosen = [(base.name, base.seed) for base in _chosen(bases, 3)]
    assert chosen[:2] == [("unet-8", 0), ("unet-8", 1)]
    assert chosen[-2:] == [("unet-24", 0), ("unet-24", 1)]
    assert len(chosen) == 5
    assert len(_chosen(bases, 9)) == 6


@pytest.mark.parametrize("task", ["superres", "distill"])
def test_a_task_from_the_networks_to_the_page(tmp_path, task):
    study = tmp_path / "study"
    for channels in (8, 12):
        make_checkpoint(study / f"models/unet-{channels}-s0", unet(channels), nimg=400)
    append_row(study / "results.parquet", row("unet-8", 1.0, 4, 0.5, samples=16))
    words = ["study", "downstream", str(study), "--task", task, "--sizes", "2", "--nimg", "8", "--batch", "8"]
    words += [
        "--factor",
        "2",
        "--steps",
        "1",
        "--steps",
        "2",
        "--samples",
        "16",
        "--out",
        str(tmp_path / task),
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    rows = read_rows(tmp_path / task / "results.parquet")
    names = {r.model for r in rows}
    suffix = "-distilled" if task == "distill" else ""
    assert names == {f"unet-{c}{suffix}" for c in (8, 12)}
    page = (tmp_path / task / "report.html").read_text()
    if task == "superres":
        assert "Small or large at equal cost" in page
        assert all(0 < r.psnr < 60 and 0 <= r.feature_distance <= 2 for r in rows)
        assert {r.guidance for r in rows} == {1.0}
    else:
        assert "Distilled beside undistilled" in page
        assert {r.sampler for r in rows} == {"consistency"}
    again = CliRunner().invoke(app, words)  # nothing is done twice
    assert again.exit_code == 0, again.output
    assert len(read_rows(tmp_path / task / "results.parquet")) == len(rows)


def test_a_subject_for_every_size(tmp_path):
    study, pictures = tmp_path / "study", tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        Image.new("RGB", (30, 30), (80 * i, 40, 200)).save(pictures / f"{i}.png")
    for channels in (8, 12):
        make_checkpoint(study / f"models/unet-{channels}-s0", unet(channels), nimg=400)
    words = ["study", "downstream", str(study), "--task", "dreambooth", "--nimg", "8", "--batch", "8"]
    words += ["--pictures", str(pictures), "--class", "circle", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out/report.html").read_text()
    for channels in (8, 12):
        figures = json.loads((tmp_path / f"out/models/unet-{channels}-s0/fidelity.json").read_text())
        after = figures["subject"]["after"]
        assert f"<td>{after['mean']:.3f} +- {after['spread']:.3f}</td>" in page
    assert page.count("data:image/") == 2
    missing = CliRunner().invoke(app, [*words[:9], "--class", "circle"])
    assert "needs the pictures of a subject" in str(missing.exception)


def test_who_wins_with_few_steps_and_with_many():
    rows = [row("small", 1.0, steps, kid) for steps, kid in ((4, 0.5), (20, 0.3), (50, 0.29), (100, 0.28))]
    rows += [row("large", 4.0, steps, kid) for steps, kid in ((4, 0.6), (10, 0.4), (25, 0.1), (50, 0.05))]
    table = few_or_many(rows, Scale.of(rows, True), "kid")
    few, many = table.split("more than 20 steps", 1)
    assert few.count("small, ") > 0
    assert "<td>at most 20 steps</td><td>10</td><td>small, 20 steps</td>" in few
    assert "large, 25 steps" in many
    assert "large, 50 steps" in many


def test_students_are_set_beside_undistilled_networks_of_their_size():
    rows = [row("a", 1.0, 4, 0.5), row("a", 1.0, 20, 0.2), row("a", 1.0, 50, 0.1)]
    rows += [row("a-distilled", 1.0, 4, 0.25, sampler="consistency"), row("b", 2.0, 4, 0.01)]
    rows += [row("a-distilled", 1.0, 2, 0.05, sampler="consistency")]
    table = distilled_table(rows, Scale.of(rows, True), "kid")
    assert "<td>a-distilled</td><td>4</td><td>2</td><td>0.25</td><td>0.5 (ddim 4)</td>" in table
    assert "<td>5.0 (ddim 20, guidance 1)</td>" in table
    assert "none measured is as good" in table


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--task", "magic"], "--task is 'magic'; choose from superres, distill"),
        (["--factor", "3"], "--factor is 3; it must be 2, 4 or 8"),
        (["--lr", "0"], "--lr is 0; it must be above 0"),
        (["--steps", "0"], "--steps is 0; it must be 1 or more"),
        (["--family", "maskdit"], "has 0 finished networks of kind maskdit in models/; two sizes or more"),
    ],
)
def test_mistakes_are_a_sentence(study, words, sentence):
    done = CliRunner().invoke(app, ["study", "downstream", str(study), *words])
    assert sentence in str(done.exception)
