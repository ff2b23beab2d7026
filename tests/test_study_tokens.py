"""The token-reduction study: cells, resuming, rows, budgets, report; on real tiny trainings."""

import math
import re
import shutil
from dataclasses import replace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from shoestring.cli import app
from shoestring.config import MixerConfig, load_yaml
from shoestring.runtime import UserError
from shoestring.studies.token_cells import Cell, choose_cells, configure
from shoestring.studies.token_command import budget_seconds
from shoestring.studies.token_curves import against_dense, at, crossing, curves, gflops, images
from shoestring.studies.token_recipes import (
    METHOD_RECIPES,
    PRESETS,
    base_recipe,
    parameters,
    training_flops,
    with_model,
    with_stages,
)
from shoestring.studies.token_reduction import Study, flops_so_far, measured_at
from shoestring.studies.token_report import best_guidance, guidance_table, markdown, write_report
from shoestring.studies.token_rows import Row, read_rows
from shoestring.training.folder import locked
from shoestring.training.schedule import position

CIFAR = PRESETS["cifar10"]
BASE = base_recipe(CIFAR, "somewhere", CIFAR.nimg)
SMALL = replace(PRESETS["tiny"], dim=32, mixer_dim=16, depth=3, samples=16, many_samples=24, sampling_steps=2)
CELLS = [
    Cell("dense", "core", "dense", many=True),
    Cell("deferred-0.75-tail25", "core", "deferred", 0.75, tail=0.25, guidance=(2.0,)),
]


def cell(name, seed=0):
    return next(c for c in choose_cells(CIFAR, []) if c.name == name and c.seed == seed)


def config_of(name):
    return configure(
        cell(name), base_recipe(CIFAR, "somewhere", CIFAR.rounded(CIFAR.nimg * cell(name).share))
    )


# --------------------------------------------------------------------------------------------- the cells


def test_every_cell_is_a_valid_recipe_of_its_own_that_can_be_built():
    cells = choose_cells(CIFAR, [])
    assert len({c.key for c in cells}) == len(cells)
    for c in {c.name: c for c in cells}.values():
        config = config_of(c.name)
        assert parameters(config.model, config.tokens) > 0
        assert config.nimg >= (60_000 if c.group != "long" else 20_000)
        assert all(nimg % config.stages[0].batch == 0 for nimg in measured_at(config)), c.name


def test_the_core_is_what_the_study_promises():
    core = choose_cells(CIFAR, ["core"])
    by_name = {name: sum(c.name == name for c in core) for name in {c.name for c in core}}
    three = {"dense", "deferred-0.75", "naive-0.75", "large-patch"}
    assert {name for name, count in by_name.items() if count == 3} == three
    ratios = [f"{m}-{r}" for m in ("naive", "deferred", "maskdit", "small-model") for r in (0.5, 0.75, 0.875)]
    tails = {f"{method}-0.75-tail10" for method in ("deferred", "naive", "sprint")}
    singles = {*ratios, "tread-0.5", "sprint-0.75", *tails} - three
    assert {name for name, count in by_name.items() if count == 1} == singles


def test_baselines_are_fair():
    dense, deferred, naive = (config_of(n) for n in ("dense", "deferred-0.75", "naive-0.75"))
    assert dense.model == deferred.model, "dense and deferred are one network"
    count = parameters(dense.model, dense.tokens)
    assert parameters(naive.model, naive.tokens) == pytest.approx(count, rel=0.01), "the mixer's parameters"
    assert naive.model.mixer.depth == 0
    bare = with_model(dense, mixer=MixerConfig(depth=0, dim=24))
    mixer = count - parameters(bare.model, bare.tokens)
    assert 0.05 < mixer / count < 0.1, "mixer in the proportion of tiny2-paper: under 10 %"
    for name in ("tread-0.5", "sprint-0.75"):
        other = config_of(name)
        assert parameters(other.model, other.tokens) == pytest.approx(count, rel=0.01)
    for ratio in (0.5, 0.75, 0.875):
        small, large = config_of(f"small-model-{ratio}"), config_of(f"deferred-{ratio}")
        target = training_flops(large, large.stages[0])
        assert training_flops(small, small.stages[0]) == pytest.approx(target, rel=0.02)
    constant, growing = config_of("naive-0.75"), config_of("naive-0.75-layer-wise")
    flops = [training_flops(c, c.stages[0]) for c in (constant, growing)]
    assert flops[0] == pytest.approx(flops[1], rel=0.02)
    assert config_of("large-patch").model.patch_size == 4


@pytest.mark.parametrize("method", METHOD_RECIPES)
def test_flops_so_far_follow_the_mask_schedule(method):
    ratio = 0.0 if method in ("dense", "large-patch") else 0.5
    config = configure(Cell("x", "core", method, ratio), BASE)
    assert flops_so_far(config, config.nimg) == config.nimg * training_flops(config, config.stages[0])


def test_flops_of_a_tail_are_those_of_two_ratios():
    config = config_of("deferred-0.75-tail10")
    first, tail = config.stages
    assert tail.mask_ratio == 0
    assert tail.nimg == pytest.approx(0.1 * config.nimg, abs=config.stages[0].batch)
    parts = [stage.nimg * training_flops(config, stage) for stage in (first, tail)]
    assert flops_so_far(config, config.nimg) == pytest.approx(sum(parts))
    cosine = config_of("deferred-0.75-cosine5")
    ratios = {
        position(cosine, n).stage.mask_ratio_at(position(cosine, n).done_nimg)
        for n in range(0, cosine.nimg, 64)
    }
    assert max(ratios) == 0.75
    assert min(ratios) == 0
    assert all(ratio * 16 == int(ratio * 16) for ratio in ratios)


# ------------------------------------------------------------------------------------------ a real study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    study = Study(SMALL, tmp_path_factory.mktemp("study"), None, 256, Console(quiet=True))
    study.check_same()
    assert study.run(CELLS)
    return study


def test_every_cell_has_its_rows(study):
    rows = study.rows()
    assert [r.nimg for r in rows if r.cell == "dense"] == [32, 64, 128, 256, 256]
    assert [r.samples for r in rows if r.cell == "dense"] == [16, 16, 16, 16, 24]
    assert [(r.nimg, r.guidance) for r in rows if r.cell != "dense"][-2:] == [(256, 1.0), (256, 2.0)]
    for row in rows:
        assert row.status == "ok"
        assert all(math.isfinite(v) for v in (row.kid, row.fd, row.loss, row.trained_s))
    dense = [r for r in rows if r.cell == "dense"]
    assert dense[3].training_gflops == pytest.approx(dense[3].gflops_per_image * 256)
    losses = [r.loss for r in dense[:4]]
    assert losses == sorted(losses, reverse=True), "it learns"


def test_a_finished_study_does_nothing_and_a_lost_row_is_measured_again(study):
    before = study.results.read_text()
    assert study.run(CELLS)
    assert study.results.read_text() == before
    lines = before.splitlines(keepends=True)
    study.results.write_text("".join(lines[:2] + lines[3:]))
    assert study.run(CELLS)
    again = {(r.cell, r.nimg, r.guidance, r.samples): r for r in study.rows()}
    lost = read_line(lines[2])
    found = again["dense", 64, 1.0, 16]
    assert (found.kid, found.fd, found.loss) == (lost["kid"], lost["fd"], lost["loss"]), "the same pictures"


def read_line(line):
    import csv

    record = dict(zip(Row.__dataclass_fields__, next(csv.reader([line])), strict=True))
    return {name: float(record[name]) for name in ("kid", "fd", "loss")}


def test_a_study_with_other_settings_is_refused(study):
    longer = replace(study, nimg=512)
    with pytest.raises(UserError, match=r"nimg=256, this one has 512"):
        longer.check_same()
    changed = [replace(CELLS[0], change=lambda config: with_stages(config, lr=1e-4))]
    study.results.rename(study.results.with_suffix(".away"))
    try:
        with pytest.raises(UserError, match=r"other settings: stages.0.lr from 0.0015 to 0.0001"):
            study.run(changed)
    finally:
        study.results.with_suffix(".away").rename(study.results)


def test_a_cell_that_another_process_works_on_is_left_to_it(study, capsys):
    other = Cell("large-patch", "core", "large-patch")
    talking = replace(study, console=Console())
    with locked(study.folder / "locks" / other.key):
        assert talking.run([other])
    assert "another process works on it" in capsys.readouterr().out
    assert not any(row.cell == "large-patch" for row in study.rows())


def test_a_cell_that_diverges_is_recorded_and_the_study_goes_on(study, tmp_path):
    shutil.copytree(study.folder / "features", tmp_path / "features")
    study = Study(SMALL, tmp_path, None, 256, Console(quiet=True))
    wild = Cell(
        "wild", "checks", "dense", change=lambda c: with_stages(c, lr=1e30, clip_norm=None, warmup_nimg=0)
    )
    assert study.run([wild, replace(CELLS[0], many=False)])
    rows = study.rows()
    assert [r.status for r in rows if r.cell == "wild"][-1:] == ["diverged"]
    assert sum(r.cell == "dense" for r in rows) == 4
    assert study.run([wild])
    assert len(study.rows()) == len(rows), "and is not tried again"
    assert "Diverged: wild-s0 after 0 images." in markdown(rows, {})


def test_the_report_shows_what_was_measured(study):
    timings = {"dense": 0.01, "deferred-0.75-tail25": 0.004}
    page = write_report(study.folder, study.rows(), timings, study.floor(study.config(CELLS[0])), "About.")
    text = page.read_text()
    assert "deferred-0.75-tail25" in text
    assert text.count("<svg") >= 3
    assert text.count('<img class="pixels"') == 2
    assert "KID by guidance scale" in text
    assert "http" not in re.sub(r'href="[^"]*"|xmlns[^ ]*', "", text), "nothing is loaded from outside"
    table = (study.folder / "table.md").read_text()
    most = max(study.rows(), key=lambda row: row.samples)
    assert f"{most.kid:.3g}" in table, "the measurement with most samples"


def test_a_damaged_results_file_names_its_line(tmp_path):
    (tmp_path / "results.csv").write_text("cell,seed,group,method,ratio,nimg\ndense,zero,core,dense,0,8\n")
    with pytest.raises(UserError, match="line 2 is damaged"):
        read_rows(tmp_path / "results.csv")


# ------------------------------------------------------------------------------------ reading the curves


def rows_of(name, per_image, kids, seed=0, **changes):
    return [
        Row(name, seed, "core", name.partition("-")[0], 0.0, nimg=n, training_gflops=n * per_image, kid=kid,
            gflops_per_image=per_image, samples=100, **changes)
        for n, kid in zip((100, 200, 400, 800), kids, strict=True)
    ]  # fmt: skip


def test_equal_budgets_are_read_off_the_curves():
    rows = rows_of("dense", 4.0, (4.0, 2.0, 1.0, 0.5)) + rows_of("tread", 1.0, (6.0, 4.0, 2.0, 1.0))
    dense, tread = curves(rows, {"dense": 0.4, "tread": 0.2})
    # All of tread's 800 GFLOP are 200 images of dense; its 160 s are 400 images of dense.
    assert against_dense(tread, dense) == (pytest.approx(1.0 / 2.0), pytest.approx(1.0 / 1.0))
    assert at(dense.over(images), 283) == pytest.approx(1.414, rel=1e-3), "straight in the logarithms"
    assert at(dense.over(images), 99) is None, "never beyond what was measured"
    assert at(dense.over(gflops), 4000) is None
    assert crossing(tread, dense, "images") is None
    late = rows_of("late", 4.0, (8.0, 3.0, 0.8, 0.2))
    assert crossing(curves(late, {})[0], dense, "images") == pytest.approx(310, rel=0.1)


def test_spread_is_over_seeds_and_the_largest_measurement_counts():
    rows = [r for seed in range(3) for r in rows_of("dense", 1.0, (4.0, 2.0, 1.0, 0.5 + 0.1 * seed), seed)]
    rows += [replace(rows[3 + 4 * s], samples=500, kid=0.4 + 0.1 * s) for s in range(3)]
    rows.append(replace(rows[3], guidance=2.0, kid=0.1))
    rows.append(Row("dense", 3, "core", "dense", 0.0, 100, status="diverged"))
    (curve,) = curves(rows, {})
    assert (curve.seeds, curve.diverged) == (3, 1)
    assert curve.last.kid == pytest.approx(0.5)
    assert curve.spread == pytest.approx(0.1)
    assert curve.points[2].kid == pytest.approx(1.0)
    assert guidance_table(rows)[1][-1] == "2"


def test_best_guidance_follows_the_share_of_unmask_tuning():
    rows = []
    for name, best in (("x", 1.0), ("x-tail2.5", 1.5), ("x-cosine2.5", 2.0)):
        for scale in (1.0, 1.5, 2.0):
            rows.append(Row(name, 0, "tuning", "deferred", 0.75, 800, guidance=scale, kid=abs(scale - best)))
        rows.append(Row(name, 0, "tuning", "deferred", 0.75, 100, guidance=1.0, kid=-9.0))
    assert best_guidance(rows) == {"tail": [(0, 1), (2.5, 1.5)], "cosine": [(0, 1), (2.5, 2.0)]}
    assert [row[-1] for row in guidance_table(rows)[1:]] == ["1", "1.5", "2"]


# ------------------------------------------------------------------------------------------ command line


def run(*arguments):
    return CliRunner().invoke(app, ["study", "tokens", *map(str, arguments)])


def test_a_plan_prints_cells_hours_and_dollars_and_trains_nothing(tmp_path):
    result = run("--plan", "--out", tmp_path / "s", "--usd-per-hour", 2)
    assert result.exit_code == 0, result.output
    assert "deferred-0.75" in result.output
    assert "TFLOP of training" in result.output
    assert not (tmp_path / "s").exists()


def test_a_shown_cell_is_a_recipe(tmp_path, capsys):
    result = run("--show", "sprint-0.75", "--out", tmp_path)
    path = tmp_path / "cell.yaml"
    path.write_text(result.output)
    assert load_yaml(path).tokens.method == "sprint"


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("5m", 300), ("1.5h", 5400)])
def test_budgets(text, seconds):
    assert budget_seconds(text) == seconds


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--preset", "huge"], "--preset is 'huge'"),
        (["--preset", "cifar10"], "--data is not set"),
        (["--budget", "soon"], "--budget is 'soon'"),
        (["--budget", "0m"], "--budget is '0m'"),
        (["--budget", "1m", "--nimg", "100"], "give one of them"),
        (["--cells", "dence"], "'dence' is unknown"),
        (["--show", "dence"], "no cell 'dence'"),
    ],
)
def test_wrong_arguments_get_a_sentence(arguments, sentence, tmp_path):
    result = run(*arguments, "--out", tmp_path)
    assert isinstance(result.exception, UserError)
    assert sentence in str(result.exception)
    assert "\n" not in str(result.exception)
