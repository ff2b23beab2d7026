"""Scaling fits, isoFLOP tables, and advice from published and measured evidence."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from shoestring import recipes
from shoestring.cli.main import app
from shoestring.planning.advice import Wishes, choose
from shoestring.planning.cost import Machine
from shoestring.planning.evidence import DECODER_FLOPS, LATENTS, candidates
from shoestring.planning.machines import gpu
from shoestring.planning.scaling import fit_power_law, interpolated, iso_flop, t_quantile
from shoestring.runtime import UserError
from shoestring.studies.advise import measured_candidates, seconds_of
from shoestring.studies.plan_study import _limit
from shoestring.studies.sampling_rows import Row, append_row, read_rows


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
    with pytest.raises(UserError, match=r"--budget 20 is too small .*: 39M with .* needs \$\d+"):
        choose(candidates(), wishes(20, images=0))
    with pytest.raises(UserError, match=r"--max-latency 0.001 s is too short .*: the fastest, 83M with 23"):
        choose(candidates(), wishes(50_000, latency=0.001))
    with pytest.raises(UserError, match=r"--max-cost 2.9 is too low .* costs 3 a picture"):
        choose(candidates(), wishes(500, cost=2.9))
    with pytest.raises(UserError, match=r"is too small for every setting that is left: 83M .*--max-cost"):
        choose(candidates(), wishes(20, cost=3))


def test_where_pictures_cost_more_than_training_sampling_cost_is_a_constraint():
    rich, _ = choose(candidates(), wishes(1e12, images=1e3))
    assert (rich.candidate.size, rich.rank) == ("5B", 3)
    drawing, _ = choose(candidates(), wishes(1e12, images=1e12))
    assert drawing.rank == 2
    assert drawing.candidate.size == "145M"


def test_the_decoder_is_counted_as_it_is():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        decoder = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )
        with FlopCounterMode(display=False) as counter:
            decoder.decode(torch.empty(1, 4, *LATENTS))
    assert counter.get_total_flops() == pytest.approx(DECODER_FLOPS, rel=0.01)
    each = candidates()[0]
    assert each.picture_flops == 2 * each.evaluations * each.evaluation_flops + DECODER_FLOPS


def shoestring(words):
    done = CliRunner().invoke(app, words.split())
    if done.exception is not None:
        raise done.exception
    return " ".join(done.output.split())


def test_advise_answers_with_sources():
    said = shoestring("advise --budget 500 --gpu h100 --n 8 --images 1e6 --max-latency 2s")
    found = re.search(r"Train 83M with the recipe ldm-83m and (stages\.0\.nimg=(\d+))\.", said)
    assert 0.5 * 1.024e9 < int(found[2]) < 0.53 * 1.024e9  # what the budget pays
    assert recipes.resolve("ldm-83m", [found[1]]).nimg - int(found[2]) < 2048  # whole batches
    assert "decoder" in said
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


def row_of(study, model, steps):
    return next(r for r in read_rows(study / "results.parquet") if (r.model, r.steps) == (model, steps))


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
    said = shoestring(f"advise --budget 0.005 --study {study}")
    assert "Train large." in said
    assert "measured" in said
    paid = float(re.search(r"pays ([\d.]+) times the training compute of the largest training", said)[1])
    assert "predicted by the fit of its training curve (at ddim, 20 steps, guidance 2, where it ends" in said
    drawn = shoestring(f"advise --budget 0.005 --images 4 --study {study}")
    less = float(re.search(r"pays ([\d.]+) times the training compute of the largest training", drawn)[1])
    assert less < paid  # pictures cost money too
    assert "nothing is predicted" in shoestring(f"advise --budget 100 --study {study}")


def test_advice_is_of_all_trainings_of_a_setting_and_never_of_a_lucky_one(study):
    for seed, kid in ((1, 0.01), (2, 0.05)):
        lucky = replace(row("large", 8.0, 16000, 50, kid, 3.0), seed=seed)
        append_row(study / "results.parquet", lucky)
        append_row(study / "results.parquet", replace(lucky, guidance=16.0, kid=0.001))
    said = shoestring(f"advise --budget 100 --study {study / 'results.parquet'}")
    assert "Sample with ddim, 50 steps, guidance 3." in said
    first = row_of(study, "large", 50).kid
    mean = (first + 0.06) / 3
    assert f"KID {mean:.4g} +- 0.01 at 16,000 images (mean of 3 trainings: {first:.4g}, 0.01, 0.05;" in said


def test_rows_without_the_metric_are_left_out(study):
    append_row(study / "results.parquet", replace(row("small", 1.0, 16000, 4, math.nan), fd=math.nan))
    assert "nan" not in shoestring(f"plan study {study} --price 2")
    with pytest.raises(UserError, match=r"--metric is feature_distance, and no row of .* has it"):
        shoestring(f"plan study {study} --metric feature_distance")


def test_a_network_with_the_scale_as_an_input_takes_one_pass(study):
    both = [replace(row("student", 8.0, 16000, 2, 0.01), guided_calls=calls) for calls in (1, 2)]
    one, two = measured_candidates(both, "kid", study)
    assert 2 * one.picture_flops == two.picture_flops
    append_row(study / "results.parquet", both[0])
    assert "not their teacher's training" in shoestring(f"advise --budget 100 --study {study}")


def test_a_fit_below_zero_predicts_nothing(tmp_path):
    for nimg in (1000, 2000, 4000, 8000, 16000):
        kid = -0.65 + 2.0 * nimg**-0.1
        append_row(tmp_path / "results.parquet", row("small", 1.0, nimg, 20, kid))
    said = shoestring(f"advise --budget 0.001 --study {tmp_path}")
    assert "falls below zero" in said
    assert "predicted by" not in said
    assert "none: below 0" in shoestring(f"plan study {tmp_path}")


def test_cells_with_fewer_pictures_are_left_out(study):
    few = replace(row("small", 1.0, 16000, 4, 0.001, 3.0), samples=16)
    append_row(study / "results.parquet", few)
    assert "0.001" not in shoestring(f"plan study {study} --price 2")


def test_rows_of_another_seed_alone_are_a_study_too(tmp_path):
    append_row(tmp_path / "results.parquet", replace(row("only", 1.0, 1000, 4, 0.5), seed=7))
    assert "The study has one size only" in shoestring(f"plan study {tmp_path}")


def test_a_study_measures_nothing_anew(study):
    with pytest.raises(UserError, match="--measure is set, but a study runs nothing"):
        shoestring(f"plan study {study} --measure 5")


def test_networks_without_seed_0_are_planned_too(study):
    rows = [replace(r, seed=4) if r.model == "large" else r for r in read_rows(study / "results.parquet")]
    (study / "results.parquet").unlink()
    for each in rows:
        append_row(study / "results.parquet", each)
    assert "large" in shoestring(f"plan study {study} --price 2")


def test_limits_of_the_search_are_none_of_the_data():
    assert [_limit(value) for value in (0.01, 0.5, 3.0)] == ["< 0.01", "0.5", "> 3"]


def test_a_study_of_one_size_has_no_choice(tmp_path):
    append_row(tmp_path / "results.parquet", row("only", 1.0, 1000, 4, 0.5))
    said = shoestring(f"plan study {tmp_path}")
    assert "No fit for only: 1 different amounts of compute are too few" in said
    assert "The study has one size only" in said
