"""The sampling-cost study: a real one of seconds, its search, its analysis and its page."""

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from shoestring.adapt.superres import superres_recipe
from shoestring.cli.main import app
from shoestring.config import SuperResConfig, apply_overrides
from shoestring.models.files import find_model, read_header, save_model
from shoestring.runtime import TrainingFailed, UserError
from shoestring.studies import sampling_command, sampling_cost, sampling_pictures, sampling_recipes
from shoestring.studies.sampling_command import SamplingJob, run_sampling
from shoestring.studies.sampling_models import given_models
from shoestring.studies.sampling_recipes import PRESETS, Preset, Size, recipe, trainings
from shoestring.studies.sampling_report import write_report
from shoestring.studies.sampling_rows import append_row, read_rows
from shoestring.training.loop import train

SMALL = Preset(
    name="small",
    source="shapes",
    condition="text",
    classes=1,
    resolution=24,
    nimg=64,
    batch=8,
    samples=16,
    sizes=(Size("unet", 8), Size("microdit", 32, 2)),
    steps=(1, 2),
    guidance=(1.5, 3.0),
    samplers=("ddim", "dpmpp-3m"),
    seeds=1,
)


def job(out, **changes):
    settings = {
        "preset": "small",
        "data": None,
        "models": (),
        "only": (),
        "samplers": (),
        "steps": (),
        "guidance": (),
        "samples": None,
        "metric": "kid",
        "full": False,
        "count_guidance": False,
        "any_data": False,
        "train_only": False,
        "report_only": False,
        "out": out,
    }
    return SamplingJob(**(settings | changes))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("sampling")
    PRESETS["small"] = SMALL
    curves = sampling_cost.CURVE_SAMPLING
    sampling_cost.CURVE_SAMPLING = curves.model_copy(update={"steps": 2})
    said = Console(record=True, width=200)
    assert run_sampling(job(out), said)
    yield out, said.export_text()
    del PRESETS["small"]
    sampling_cost.CURVE_SAMPLING = curves


def test_every_cell_is_a_row(study):
    out, said = study
    rows = read_rows(out / "results.parquet")
    settings = {(r.model, r.sampler, r.steps, r.guidance) for r in rows if r.nimg == 64}
    for model in ("unet-8", "microdit-32"):
        for sampler in ("ddim", "dpmpp-3m"):
            assert {(model, sampler, n, g) for g in (1.5, 3.0) for n in (1, 2)} <= settings
    assert len(rows) == len({row.cell for row in rows})
    assert {row.nimg for row in rows} == {8, 16, 32, 64}  # quality against training compute
    assert all(math.isfinite(row.kid) and row.kid_error > 0 for row in rows)
    assert all(0 <= row.accuracy <= 1 for row in rows)
    assert "dpmpp-3m is of order 3, but with 2 steps it reaches order 1" in said


def test_nothing_is_computed_twice(study, monkeypatch):
    out, _ = study
    before = read_rows(out / "results.parquet")

    def never(*_):
        raise AssertionError("a cell was drawn again")

    monkeypatch.setattr(sampling_pictures.Pictures, "draw", never)
    assert run_sampling(job(out), Console(quiet=True))
    assert str(read_rows(out / "results.parquet")) == str(before)  # as text: nan is not nan


def test_a_damaged_row_is_drawn_again_to_the_same_figures(study):
    out, _ = study
    before = read_rows(out / "results.parquet")
    (out / "results.parquet").unlink()
    for row in before[:-1]:
        append_row(out / "results.parquet", row)
    assert run_sampling(job(out), Console(quiet=True))
    again = read_rows(out / "results.parquet")
    assert str(replace(again[-1], seconds=0.0)) == str(replace(before[-1], seconds=0.0))


def test_the_rows_can_be_shared_as_text(study, tmp_path):
    out, _ = study
    assert str(read_rows(out / "results.csv")) == str(read_rows(out / "results.parquet"))
    torn = tmp_path / "torn.csv"
    torn.write_text((out / "results.csv").read_text()[:-100] + "\n")
    with pytest.raises(UserError, match="not a results file"):
        read_rows(torn)


def test_a_network_has_one_colour_in_all_charts(study, tmp_path):
    rows = [row for row in read_rows(study[0] / "results.parquet") if row.family == "unet"]
    larger = [replace(row, model="unet-9", gflops=2 * row.gflops) for row in rows]
    page = write_report(tmp_path, [r for r in rows if r.sampler != "ddim"] + larger, "kid", False, "")
    found = re.findall(r"<li><span style=\"background:(#\w+)\"></span>(unet-\d)</li>", page.read_text())
    assert len(found) > 2
    assert len(set(found)) == 2


def test_the_page_has_the_figures(study):
    out, _ = study
    page = (out / "report.html").read_text()
    for words in (
        "Quality against training compute",
        "Quality against sampling cost: ddim",
        "Best guidance, dpmpp-3m",
        "Samplers: the front over all sizes",
        "Families: the front over all sizes and samplers",
        "measured here",
        "second pass is not counted",
    ):
        assert words in page
    assert "| unet-8 | ddim | 2 |" in (out / "table.md").read_text()
    assert len(list((out / "grids").glob("*.png"))) == len(read_rows(out / "results.parquet"))


def test_given_networks_are_measured_like_trained_ones(study, tmp_path):
    out, _ = study
    models = (out / "models" / "unet-8-s0", out / "models" / "microdit-32-s0")
    given = job(tmp_path, models=models, samplers=("ddim",))
    assert run_sampling(given, Console(quiet=True))
    rows = {(r.sampler, r.steps, r.guidance): r for r in read_rows(tmp_path / "results.parquet")}
    trained = [r for r in read_rows(out / "results.parquet") if r.model == "microdit-32" and r.nimg == 64]
    same = next(r for r in trained if (r.sampler, r.steps, r.guidance) == ("ddim", 2, 1.5))
    assert rows["ddim", 2, 1.5].kid == same.kid
    page = (tmp_path / "report.html").read_text()
    assert "2 trainings of up to 64 images, 16 pictures a cell" in page
    without = [replace(row, accuracy=math.nan) for row in read_rows(tmp_path / "results.parquet")]
    (tmp_path / "results.parquet").unlink()
    for each in without:
        append_row(tmp_path / "results.parquet", each)
    again = job(tmp_path, models=models, metric="accuracy", report_only=True)
    with pytest.raises(UserError, match="--metric is accuracy, and no row"):
        run_sampling(again, Console(quiet=True))


def test_two_checkpoints_of_one_run_are_two_networks(study, tmp_path):
    out, _ = study
    folders = sorted((out / "models" / "unet-8-s0" / "checkpoints").iterdir())
    found = given_models([folders[0], folders[-1]], False, 4)
    assert [model.name for model in found] == ["unet-8-s0", "unet-8-s0@64"]


def test_a_diverged_training_does_not_end_the_study(study, tmp_path, monkeypatch):
    def diverges(config, folder, console):
        raise TrainingFailed("the loss is not finite")

    monkeypatch.setattr(sampling_cost, "train", diverges)
    said = Console(record=True, width=200)
    assert run_sampling(job(tmp_path), said)
    assert said.export_text().count("diverged: the loss is not finite") == 2


def test_a_super_resolution_network_is_measured_without_guidance(study, tmp_path):
    out, _ = study
    base = find_model(out / "models" / "microdit-32-s0")
    config = superres_recipe(base, SuperResConfig(factor=2), "larger", 16, 8, 1e-3)
    assert train(config, tmp_path / "run", Console(quiet=True))
    said = Console(record=True, width=200)
    given = job(tmp_path / "study", models=(tmp_path / "run",), samplers=("ddim",), steps=(2,))
    assert run_sampling(given, said)
    (row,) = read_rows(tmp_path / "study" / "results.parquet")
    assert row.guidance == 1
    assert "larger enlarges pictures: guidance has nothing to leave out" in said.export_text()


def test_networks_of_different_data_are_refused_unless_told(study, tmp_path):
    out, _ = study
    path = find_model(out / "models" / "unet-8-s0")
    header = read_header(path)
    config = apply_overrides(header.config, ["data.held_out=0.2", "name=other"])
    save_model(tmp_path / "other.safetensors", load_file(path), config, header.facts)
    models = (out / "models" / "unet-8-s0", tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"was trained on other data than .*--any-data"):
        run_sampling(job(tmp_path / "c", models=models), Console(quiet=True))
    one_by_one = [
        job(tmp_path / "d", models=(path,), samplers=("ddim",), steps=(1,), guidance=(1.5,))
        for path in models
    ]
    assert run_sampling(one_by_one[0], Console(quiet=True))
    with pytest.raises(UserError, match=r"holds a study with data=.*0\.2.* or give --any-data"):
        run_sampling(one_by_one[1], Console(quiet=True))
    assert run_sampling(replace(one_by_one[1], any_data=True), Console(quiet=True))
    with pytest.raises(UserError, match="has the name unet-8-s0, seed 0 and 64 images seen too"):
        run_sampling(job(tmp_path / "c", models=(models[0],) * 3), Console(quiet=True))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"preset": "huge"}, "--preset is 'huge'"),
        ({"metric": "beauty"}, "--metric is 'beauty'"),
        ({"samplers": ("magic",)}, "--sampler is 'magic'"),
        ({"steps": (0,)}, "--steps is 0; it must be from 1"),
        ({"steps": (20_000,)}, "--steps is 20000; it must be from 1"),
        ({"guidance": (math.nan,)}, "--guidance is nan"),
        ({"guidance": (-1.0,)}, "--guidance is -1"),
        ({"samples": 3}, "--samples is 3"),
        ({"only": ("unet-9",)}, "--only: 'unet-9' is unknown"),
        ({"preset": "cifar10"}, "--data is not set"),
        ({"preset": "cifar10", "data": "x", "metric": "accuracy"}, "only pictures of shapes have"),
    ],
)
def test_wrong_settings_are_a_sentence(study, changes, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        run_sampling(job(tmp_path, **changes), Console(quiet=True))


def test_a_study_goes_on_only_with_its_own_trainings(study, monkeypatch):
    out, _ = study
    monkeypatch.setitem(PRESETS, "small", replace(SMALL, nimg=128))
    with pytest.raises(UserError, match="holds a study with nimg=64, this one has 128"):
        run_sampling(job(out), Console(quiet=True))


def test_networks_of_another_recipe_are_not_taken_for_its_own(study, monkeypatch):
    out, _ = study
    monkeypatch.setattr(sampling_recipes, "UNET_LR", 1e-3)
    with pytest.raises(
        UserError, match=r"models/unet-8-s0 holds a run with other settings: stages\.0\.lr from"
    ):
        run_sampling(job(out), Console(quiet=True))


def test_a_page_drawn_anew_shows_what_is_asked_for(study, tmp_path):
    out, _ = study
    for name in ("results.parquet", "study.json"):
        shutil.copy(out / name, tmp_path)
    again = job(tmp_path, report_only=True, only=("unet",), samplers=("dpmpp-3m",), steps=(2,))
    assert run_sampling(again, Console(quiet=True))
    page = (tmp_path / "report.html").read_text()
    assert "unet-8" in page
    assert "microdit-32" not in page
    assert "ddim" not in page
    assert len(read_rows(tmp_path / "results.csv")) == len(read_rows(tmp_path / "results.parquet"))
    with pytest.raises(UserError, match="has no row of the networks, samplers, steps"):
        run_sampling(replace(again, steps=(7,)), Console(quiet=True))
    with pytest.raises(UserError, match="does not exist; run the study first"):
        run_sampling(replace(again, out=tmp_path / "none"), Console(quiet=True))


def test_the_command_takes_its_options(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(sampling_command, "run_sampling", lambda given, console: seen.append(given) or True)
    words = "study sampling --preset shapes --steps 4 --steps 8 --guidance 2 --full"
    assert CliRunner().invoke(app, words.split()).exit_code == 0
    assert (seen[0].steps, seen[0].guidance, seen[0].full) == ((4, 8), (2.0,), True)
    assert seen[0].out == Path("runs/study-sampling-shapes")


def test_results_that_are_none_are_a_sentence(tmp_path):
    (tmp_path / "results.parquet").write_text("nonsense")
    with pytest.raises(UserError, match="is not a results file of shoestring study sampling"):
        read_rows(tmp_path / "results.parquet")


def test_rows_without_values_are_a_sentence(study, tmp_path):
    table = pq.read_table(study[0] / "results.parquet")
    path, place = tmp_path / "results.parquet", table.column_names.index("gflops")
    for values, sentence in (
        ([None] * len(table), "column gflops has cells without a value"),
        (["much"] * len(table), "is not a results file"),
        ([0.0] * len(table), "column gflops has 0; it must be above 0"),
    ):
        pq.write_table(table.set_column(place, "gflops", pa.array(values)), path)
        with pytest.raises(UserError, match=sentence):
            read_rows(path)
    pq.write_table(table.append_column("more", table["kid"]), path)
    with pytest.raises(UserError, match="is not a results file"):
        read_rows(path)


def test_the_recipes_of_a_study_differ_in_size_and_seed_only():
    found = [recipe(PRESETS["cifar10"], t, "x", 640) for t in trainings(PRESETS["cifar10"])]
    assert len({config.name for config in found}) == len(found) == 13
    stages = [config.stages[0].model_copy(update={"lr": 0.0}) for config in found]
    shared = {(s, c.process, c.optimizer, c.data, c.precision) for s, c in zip(stages, found, strict=True)}
    assert len(shared) == 1


def test_transformers_of_a_study_have_one_learning_rate_and_wide_u_nets_a_lower_one():
    found = [recipe(PRESETS["cifar10"], t, "x", 640) for t in trainings(PRESETS["cifar10"])]
    assert len({c.stages[0].lr for c in found if c.model.kind != "unet"}) == 1
    by_width = {c.model.channels: c.stages[0].lr for c in found if c.model.kind == "unet"}
    assert by_width[8] == by_width[16] == 2e-3
    assert by_width[40] == pytest.approx(2e-3 * 16 / 40)
