"""Scaling fits, isoFLOP tables, and advice from published and measured evidence."""

import numpy as np
import pytest
import scipy.stats
from typer.testing import CliRunner

from shoestring.cli.main import app
from shoestring.planning.advice import Wishes, choose
from shoestring.planning.cost import Machine
from shoestring.planning.evidence import candidates
from shoestring.planning.machines import gpu
from shoestring.planning.scaling import fit_power_law, interpolated, iso_flop, t_quantile
from shoestring.runtime import UserError
from shoestring.studies.advise import seconds_of
from shoestring.studies.sampling_rows import Row, append_row


def synthetic(seed, points=12, noise=0.02, a=0.2, b=1.0, c=0.5):
    draw = np.random.default_rng(seed)
    x = np.geomspace(1, 200, points)
    return list(zip(x, a + b * x**-c + noise * draw.standard_normal(points), strict=True))


def test_intervals_hold_the_truth_in_90_to_99_of_100_draws():
    held = {"a": 0, "b": 0, "c": 0}
    for seed in range(100):
        fit = fit_power_law(synthetic(seed), rounds=200, seed=seed)
        truth = {"a": 0.2, "b": fit.law.scale**-0.5, "c": 0.5}
        for name, (low, high) in fit.intervals.items():
            held[name] += low <= truth[name] <= high
    assert all(90 <= count <= 99 for count in held.values()), held


@pytest.mark.parametrize("free", [1, 2, 5, 17, 200])
def test_the_quantile_of_students_t(free):
    assert t_quantile(free) == pytest.approx(scipy.stats.t.ppf(0.975, free), rel=1e-5)


def test_without_noise_the_law_is_found():
    fit = fit_power_law(synthetic(0, noise=0.0))
    assert fit.law.a == pytest.approx(0.2, abs=1e-3)
    assert fit.law.c == pytest.approx(0.5, abs=1e-3)
    assert fit.law.at(1e6) == pytest.approx(0.2 + 1e-3, abs=1e-3)
    low, high = fit.interval_at(100.0)
    assert (low, high) == pytest.approx((0.3, 0.3), abs=1e-3)
    assert fit.extrapolates(2000) == pytest.approx(10)
    assert fit.extrapolates(10) == 1


@pytest.mark.parametrize(
    ("points", "sentence"),
    [
        ([(1, 1.0), (2, 0.8), (4, 0.7)], "3 different amounts of compute are too few"),
        ([(1, 0.1), (2, 0.3), (4, 0.5), (8, 0.9)], "the fit diverges: quality does not get better"),
        ([(1, 1.0), (2, 0.9), (4, 0.8), (8, 0.7), (16, 0.6)], "a line in log C"),
        ([(0, 1.0), (2, 0.8), (4, 0.7), (8, 0.6)], "finite figures at compute above 0"),
    ],
)
def test_what_cannot_be_fitted_is_a_sentence(points, sentence):
    with pytest.raises(UserError, match=sentence):
        fit_power_law(points)


def test_quality_is_read_off_the_curves_and_not_beyond_them():
    curves = {"small": [(1, 1.0), (100, 0.5)], "large": [(10, 0.9), (1000, 0.3)]}
    assert interpolated(curves["small"], 10) == pytest.approx(0.75)
    assert interpolated(curves["small"], 1000) is None
    table = iso_flop(curves, [1, 10, 100, 1000])
    assert [sorted(table[budget]) for budget in (1, 10, 1000)] == [["small"], ["large", "small"], ["large"]]


# -- published evidence -----------------------------------------------------------------------------------


def wishes(budget, images=1e6, latency=None, usd=3.75, gpus=8, cost=None):
    return Wishes(budget, images, latency, Machine(gpu("h100"), gpus, 0.35, usd), max_cost=cost)


@pytest.mark.parametrize(
    ("cost", "best", "then"),
    [(3, ("83M", None), None), (6, ("145M", 19.0), ("866M", 26.0)), (12, ("145M", 17.0), ("866M", 20.0))],
)
def test_the_published_order_at_each_sampling_cost(cost, best, then):
    choice, priced = choose(candidates(), wishes(1e6, images=1e3, cost=cost))
    assert (choice.candidate.size, choice.candidate.quality) == best
    if then is not None:  # at the same cost
        same = [p.candidate for p in priced if p.candidate.cost == cost and not p.problem]
        assert [(c.size, c.quality) for c in same] == [best, then]


def test_a_whole_training_is_taken_before_part_of_a_larger_one():
    choice, priced = choose(candidates(), wishes(8000))
    assert (choice.candidate.size, choice.training_share) == ("866M", 1.0)
    assert any(p.candidate.size == "2B" and not p.problem and p.training_share < 1 for p in priced)


def test_free_machines_cost_nothing():
    choice, _ = choose(candidates(), wishes(1, usd=0))
    assert choice.total_usd == 0
    assert choice.training_share == 1


def test_a_larger_budget_never_buys_a_worse_tier():
    ranks = [
        choose(candidates(), wishes(budget))[0].candidate.rank for budget in (300, 500, 1000, 6000, 40000)
    ]
    assert ranks == sorted(ranks)
    choice, priced = choose(candidates(), wishes(500))
    assert choice.candidate.size == "83M"
    assert choice.total_usd <= 500 * (1 + 1e-9)
    assert all(each.problem for each in priced[priced.index(next(p for p in priced if p.problem)) :])


def test_latency_keeps_large_settings_out():
    slow, _ = choose(candidates(), wishes(1e5))
    fast, _ = choose(candidates(), wishes(1e5, latency=0.1))
    assert slow.latency_s > 0.1 >= fast.latency_s
    assert fast.candidate.size == "145M"


def test_many_pictures_move_the_money_from_training_to_sampling():
    few, _ = choose(candidates(), wishes(6000, images=1e3))
    many, _ = choose(candidates(), wishes(6000, images=3e7))
    assert few.candidate.cost > many.candidate.cost


def test_a_budget_too_small_for_any_size_is_a_sentence():
    with pytest.raises(UserError, match=r"--budget 20 is too small for every size: 39M needs \$\d+"):
        choose(candidates(), wishes(20, images=0))


def shoestring(words):
    done = CliRunner().invoke(app, words.split())
    if done.exception is not None:
        raise done.exception
    return " ".join(done.output.split())


def test_advise_answers_with_sources():
    said = shoestring("advise --budget 500 --gpu h100 --n 8 --images 1e6 --max-latency 2s")
    assert "Train 83M with the recipe ldm-83m." in said
    assert "published, arXiv 2404.01367" in said
    assert "assumed; give --price" in said
    assert "Beyond the evidence:" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--budget 0", "--budget is 0; it must be above 0 dollars"),
        ("--budget 9 --max-latency soon", "--max-latency is 'soon'"),
        ("--budget 9 --gpu a100", "--price is not set"),
        ("--budget 9 --images nan", "--images is nan"),
        ("--budget 9 --max-cost 0", "--max-cost is 0"),
        ("--budget 9 --metric fd", "--study is not set"),
        ("--budget 9 --images -1", "--images is -1"),
        ("--budget 9 --sampling-mfu 2", "--sampling-mfu is 2"),
        ("--budget 9 --study nowhere", "nowhere does not exist"),
    ],
)
def test_wrong_wishes_are_a_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        shoestring(f"advise {arguments}")


def test_times_are_read():
    assert (seconds_of("2s"), seconds_of("500ms"), seconds_of("1.5")) == (2.0, 0.5, 1.5)


# -- a study of one's own ---------------------------------------------------------------------------------


def row(model, gflops, nimg, steps, kid, guidance=2.0):
    return Row(
        model=model,
        family="unet",
        seed=0,
        parameters=10,
        nimg=nimg,
        training_gflops=3 * gflops * nimg,
        gflops=gflops,
        sampler="ddim",
        steps=steps,
        guidance=guidance,
        evaluations=steps,
        samples=100,
        kid=kid,
        kid_error=0.01,
        fd=10 * kid,
        precision=0.5,
        recall=0.5,
    )


@pytest.fixture
def study(tmp_path):
    for model, gflops, floor in (("small", 1.0, 0.3), ("large", 8.0, 0.1)):
        for nimg in (1000, 2000, 4000, 8000, 16000):
            kid = floor + 2.0 * (gflops * nimg / 1000) ** -0.6
            append_row(tmp_path / "results.parquet", row(model, gflops, nimg, 20, kid))
        for steps in (4, 50):
            kid = floor + 2.0 * (gflops * 16) ** -0.6 + 0.4 / steps
            append_row(tmp_path / "results.parquet", row(model, gflops, 16000, steps, kid, 3.0))
    return tmp_path


def test_a_study_is_planned_from_its_rows(study):
    said = shoestring(f"plan study {study} --price 2")
    assert "KID = a + b C^-c over training compute, 95 % (measured here, beyond predicted)" in said
    assert "The best size for a training budget" in said
    assert "The best network for a sampling cost" in said
    assert "Total cost of ownership with 1,000,000 pictures" in said


def test_advice_from_a_study_says_how_far_it_reaches(study):
    said = shoestring(f"advise --budget 100 --study {study}")
    assert "Train large." in said
    assert "measured" in said
    assert "times the training compute of the largest training of the study" in said
    assert "predicted by its fit" in said


def test_a_fit_below_zero_predicts_nothing(tmp_path):
    for nimg in (1000, 2000, 4000, 8000, 16000):
        kid = -0.5 + 2.0 * nimg**-0.1
        append_row(tmp_path / "results.parquet", row("small", 1.0, nimg, 20, kid))
    said = shoestring(f"advise --budget 100 --study {tmp_path}")
    assert "falls below zero" in said
    assert "predicted by its fit" not in said


def test_cells_with_fewer_pictures_are_left_out(study):
    from dataclasses import replace

    few = replace(row("small", 1.0, 16000, 4, 0.001, 3.0), samples=16)
    append_row(study / "results.parquet", few)
    assert "0.001" not in shoestring(f"plan study {study} --price 2")


def test_rows_of_another_seed_alone_are_a_study_too(tmp_path):
    from dataclasses import replace

    append_row(tmp_path / "results.parquet", replace(row("only", 1.0, 1000, 4, 0.5), seed=7))
    assert "The study has one size only" in shoestring(f"plan study {tmp_path}")


def test_a_study_of_one_size_has_no_choice(tmp_path):
    append_row(tmp_path / "results.parquet", row("only", 1.0, 1000, 4, 0.5))
    said = shoestring(f"plan study {tmp_path}")
    assert "No fit for only: 1 different amounts of compute are too few" in said
    assert "The study has one size only" in said
