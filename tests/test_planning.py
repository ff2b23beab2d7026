"""Hours, dollars, GPUs and the command ``shoestring plan``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest
import torch
from rich.console import Console

from shoestring import cli, recipes
from shoestring.config import RunConfig, apply_overrides
from shoestring.planning import GPUS, Machine, gpu, whole_plan
from shoestring.planning.cost import explained, stage_costs
from shoestring.planning.published import published_run
from shoestring.planning.run import plan
from shoestring.runtime import UserError
from shoestring.studies.measured_plan import measured_costs, shortened

TINY = (
    "model.dim=32",
    "model.depth=2",
    "model.head_dim=16",
    "model.mixer.dim=32",
    "model.ffn_multiple_of=16",
    "data.text_encoder=hashing",
    "model.caption_dim=256",
    "data.max_captions=24",
    "data.source=shapes",
    "logging.tensorboard=false",
)


def tiny(*overrides: str) -> RunConfig:
    """The smallest run that needs no package and no file."""
    batches = [f"stages.{i}.batch=8" for i in range(2)]
    return apply_overrides(recipes.get("demo-shapes"), [*TINY, *batches, *overrides])


# -- the published run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def xl2() -> RunConfig:
    return recipes.get("microdit-xl2")


def test_one_utilisation_explains_the_published_days_and_dollars(xl2):
    run, report = plan(xl2), published_run(xl2)
    assert report is not None
    h100 = explained(run, report, "h100", counted=False)
    for cost, days in zip(h100, (1.11, 0.38, 0.88, 0.26), strict=True):
        assert cost.hours / 24 == pytest.approx(days, rel=0.10)
    assert sum(cost.hours for cost in h100) / 24 == pytest.approx(2.6, rel=0.03)
    assert sum(cost.usd for cost in h100) == pytest.approx(1890, rel=0.03)
    a100 = explained(run, report, "a100", counted=False)
    assert sum(cost.hours for cost in a100) / 24 == pytest.approx(6.6, rel=0.03)
    assert all(cost.usd is None for cost in a100)  # nobody published a price of those
    assert (report.times["h100"].utilisation, report.times["a100"].utilisation) == (0.192, 0.245)
    flops = [cost.flops for cost in h100]
    assert sum(flops[:2]) / sum(flops) == pytest.approx(0.56, abs=0.005)
    assert sum(flops) == pytest.approx(3.45e20, rel=0.005)


def test_counted_flops_give_other_hours_than_published_ones(xl2):
    machine = Machine(gpu("h100"), 8, 0.192, 3.75)
    counted, published = (whole_plan(xl2, machine, source).costs for source in ("counted", "published"))
    assert sum(c.usd for c in published) == pytest.approx(1892.5, abs=1)
    assert sum(c.hours for c in counted) < 0.96 * sum(c.hours for c in published)
    assert counted[0].flops == 512e6 * plan(xl2).stages[0].flops.training


def test_a_report_is_shown_of_the_same_run_only(xl2):
    assert published_run(xl2) is not None
    assert published_run(apply_overrides(xl2, ["stages.0.nimg=1024"])) is None
    assert published_run(apply_overrides(xl2, ["model.depth=2"])) is None
    assert published_run(recipes.get("microdit-tiny2")) is None


# -- machines ----------------------------------------------------------------------------------------------


def test_hours_follow_from_flops_and_peak():
    machine = Machine(gpu("A100"), 4, 0.5, 2.0)
    assert machine.hours(4 * 312e12 * 0.5 * 3600 * 7) == pytest.approx(7)
    assert machine.usd(7) == pytest.approx(56)
    assert Machine(gpu("a100"), 4, 0.5).usd(7) is None


def test_the_list_of_gpus():
    assert set(GPUS) == {"a100", "h100", "h200", "b200", "mi300x", "l40s", "4090", "5090"}
    # No figure with sparsity: a dense tensor core of these gives at most 2.3 PFLOP/s in bf16.
    assert max(each.peak_flops for each in GPUS.values()) < 2.3e15
    assert GPUS["h200"].peak_flops == GPUS["h100"].peak_flops


def test_images_per_second_and_hours_belong_together():
    run = plan(tiny())
    cost = stage_costs(run, Machine(gpu("4090"), 1, 0.35))[0]
    assert cost.images_per_s * cost.hours * 3600 == pytest.approx(run.stages[0].nimg)


# -- the command -------------------------------------------------------------------------------------------


def said(capsys, monkeypatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["shoestring", "plan", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    return capsys.readouterr().out


def row(text: str, label: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.strip().startswith(label))
    return line.replace(label, "").split()


def test_the_command_says_everything_of_the_published_run(capsys, monkeypatch):
    text = said(capsys, monkeypatch, "microdit-xl2", "--n", "8", "--price", "3.75", "--mfu", "0.192")
    assert row(text, "training Gflops (counted)") == ["282.1", "714.2", "1,069.2", "3,002.6"]
    assert row(text, "days, 8 x H100 SXM (published)") == ["1.11", "0.38", "0.88", "0.26", "2.6"]
    assert row(text, "days, 19.2% of peak, published FLOPs (predicted)")[-1] == "2.63"
    assert row(text, "days, 24.5% of peak, published FLOPs (predicted)")[-1] == "6.53"
    assert row(text, "dollars at 3.75 for a GPU-hour (predicted)")[-1] == "1,892"
    for figure in ("$28,400", "14x", "19x", "118x"):
        assert figure in text
    assert "not measured" in text
    assert "fsdp" in text
    published = said(
        capsys,
        monkeypatch,
        "microdit-xl2",
        "--n",
        "8",
        "--price",
        "3.75",
        "--mfu",
        "0.192",
        "--flops",
        "published",
    )
    assert "256 pixels 56%, 512 pixels 44%" in published
    assert row(published, "dollars (predicted)")[-1] == "1,892.48"


def test_without_a_price_there_are_no_dollars(capsys, monkeypatch):
    text = said(capsys, monkeypatch, "demo-shapes", "--gpu", "4090")
    assert "dollars (" not in text
    assert "--price" in text
    assert "published run" not in text
    assert "single, blocks recomputed" in text
    assert "fsdp" not in text


def test_steps_run_here_are_carried_over(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    config = tiny("stages.0.nimg=800", "stages.1.nimg=400")
    monkeypatch.setattr(tempfile, "tempdir", None)
    costs = measured_costs(config, 2, 3.0, Console(quiet=True))
    assert [m.cost.nimg for m in costs] == [800, 400]
    for m in costs:
        assert m.cost.hours > 0
        assert m.cost.usd == pytest.approx(3 * m.cost.hours)
    assert (costs[0].memory_bytes is None) == (not torch.cuda.is_available())
    assert not list(Path(tmp_path).iterdir())
    text = "\n".join(
        str(t.caption) for t in whole_plan(config, Machine(gpu("4090"), 1, 0.3), "counted").tables(costs)
    )
    assert "measured here" in text


def test_a_measuring_run_has_so_many_steps_and_nothing_else():
    short = shortened(tiny(), 3)
    assert [stage.steps for stage in short.stages] == [3, 3]
    assert short.logging.log_nimg == 1
    assert short.model == tiny().model


# -- mistakes ----------------------------------------------------------------------------------------------


def test_wrong_words(mistake):
    assert "b200, mi300x" in mistake("plan", "demo", "--gpu", "h1000")
    assert "--n is 0" in mistake("plan", "demo", "--n", 0)
    assert "batch is 96, which 97 ranks cannot share evenly" in mistake("plan", "demo", "--n", 97)
    for value in ("0", "1.5", "-1", "nan"):
        assert f"--mfu is {float(value):g}" in mistake("plan", "demo", f"--mfu={value}")
    assert "--price is -2" in mistake("plan", "demo", "--price=-2")
    assert "--flops is 'guessed'" in mistake("plan", "demo", "--flops", "guessed")
    assert "no FLOPs are published" in mistake("plan", "demo", "--flops", "published")
    assert "did you mean 'demo'" in mistake("plan", "dmeo")
    assert "--measure is 0" in mistake("plan", "demo", "--measure", 0)


def test_the_most_of_a_peak_is_all_of_it():
    assert Machine(gpu("l40s"), 1, 1.0).mfu == 1.0
    with pytest.raises(UserError, match="at most 1"):
        Machine(gpu("l40s"), 1, 1.0001)
