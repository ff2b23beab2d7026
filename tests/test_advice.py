"""Advice from published evidence, and from a study of one's own; what a study is planned from."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from shoestring import recipes
from shoestring.cli.main import app
from shoestring.config import to_yaml
from shoestring.planning.advice import Wishes, choose
from shoestring.planning.cost import Machine, dollars
from shoestring.planning.evidence import DECODER_FLOPS, candidates
from shoestring.planning.machines import gpu
from shoestring.runtime import UserError
from shoestring.studies.advise import seconds_of
from shoestring.studies.plan_study import shown_exponents, shown_range
from shoestring.studies.sampling_rows import Row, append_row, read_rows
from shoestring.studies.study_evidence import measured

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


@pytest.mark.parametrize(("budget", "size"), [(1000, "83M"), (3500, "145M"), (8000, "866M")])
def test_a_whole_training_is_taken_before_part_of_one_of_a_higher_rank(budget, size):
    choice, priced = choose(candidates(), wishes(budget))
    assert (choice.candidate.size, choice.training_share) == (size, 1.0)
    parts = [p for p in priced if not p.problem and p.training_share < 1 and p.rank]
    assert any(p.candidate.full_training_flops > choice.candidate.full_training_flops for p in parts)


def test_table_1_alone_is_taken_only_where_nothing_else_can_be_had():
    for budget in (600, 900):
        choice, priced = choose(candidates(), wishes(budget))
        assert (choice.candidate.size, choice.rank, choice.training_share < 1) == ("83M", 1, True)
    assert any(p.candidate.size == "39M" and p.training_share == 1 and not p.problem for p in priced)
    assert choose(candidates(), wishes(300))[0].candidate.size == "39M"


def test_where_pictures_are_most_of_the_dollars_sampling_cost_is_a_constraint():
    few, _ = choose(candidates(), wishes(1e12, images=1e6))
    many, priced = choose(candidates(), wishes(1e12, images=1e12))
    assert (few.candidate.size, few.rank) == ("5B", 3)
    assert (many.candidate.size, many.candidate.steps, many.rank) == ("145M", 60, 2)
    assert {p.rank for p in priced if p.candidate.size in ("2B", "5B")} == {0}


def test_the_autoencoders_decoder_is_priced_and_counted():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        codec = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            codec.decode(torch.empty(1, 4, 64, 64))
    assert counter.get_total_flops() == pytest.approx(DECODER_FLOPS, rel=1e-4)
    for each in candidates():
        guided = 2 * each.evaluations * each.evaluation_flops
        assert each.picture_flops == pytest.approx(guided + DECODER_FLOPS)
    assert {c.cost for c in candidates() if c.protocol == "cost 3"} == {3}  # as the paper counts it


def test_free_machines_cost_nothing():
    choice, _ = choose(candidates(), wishes(1, usd=0))
    assert (choice.total_usd, choice.training_share) == (0, 1)


def test_a_larger_budget_never_buys_a_worse_tier():
    ranks = [
        choose(candidates(), wishes(budget, images=images))[0].rank
        for images in (0, 1e6)
        for budget in np.geomspace(250, 60000, 80)
    ]
    assert ranks[:80] == sorted(ranks[:80])
    assert ranks[80:] == sorted(ranks[80:])
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
    many, _ = choose(candidates(), wishes(6000, images=1e8))
    assert few.candidate.cost > many.candidate.cost


def test_a_budget_too_small_for_any_size_is_a_sentence():
    with pytest.raises(UserError, match=r"--budget 20 is too small for every size: 39M needs \$\d+"):
        choose(candidates(), wishes(20, images=0))


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        (
            {"latency": 0.001},
            "--max-latency is 0.001 s, but the fastest setting, 83M with ddim, 23 steps, takes",
        ),
        (
            {"cost": 1},
            "--max-cost is 1, but the cheapest setting, 83M with ddim, 23 steps, costs 3 a picture",
        ),
        (
            {"latency": 0.03, "cost": 1},
            "cheapest setting within --max-latency 0.03 s, .*--max-cost or --max-l",
        ),
        ({"latency": 0.03, "budget": 20}, "small for every size within --max-latency 0.03 s: 83M needs"),
        (
            {"budget": 1, "images": 1e9},
            r"83M needs \$30,\d+.\d\d, \$29,\d+.\d\d of it for the pict",
        ),
    ],
)
def test_the_option_that_excludes_everything_is_named(limits, sentence):
    with pytest.raises(UserError, match=sentence):
        choose(candidates(), wishes(**{"budget": 50000, "images": 1e3, **limits}))


def test_less_than_a_dollar_is_not_nothing():
    assert [dollars(usd) for usd in (0, 1.2345e-4, 0.12345, 1, 12345.678)] == [
        "$0",
        "$0.000123",
        "$0.123",
        "$1.00",
        "$12,345.68",
    ]


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
    assert "autoencoder's decoder included, text encoder not" in said


def test_the_part_of_the_training_that_is_paid_is_given_as_a_setting():
    said = shoestring("advise --budget 500 --images 1e6")
    setting = re.search(r"Change it by (stages\.0\.nimg=\d+): ", said)[1]
    config, whole = recipes.resolve("ldm-83m", [setting]), recipes.resolve("ldm-83m", [])
    choice, _ = choose(candidates(), wishes(500))
    assert 0 <= choice.training_share * whole.nimg - config.nimg < config.stages[0].batch
    assert "Change it" not in shoestring("advise --budget 1000 --images 1e6")


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
    assert "KID = a + b C^-c over training compute, 95 % (measured here, beyond predicted; ddim, 20" in said
    assert "The best size for a training budget" in said
    assert "The best network for a sampling cost" in said
    assert "Total cost of ownership with 1,000,000 pictures" in said


def test_advice_from_a_study_says_how_far_it_reaches(study):
    said = shoestring(f"advise --budget 0.005 --study {study}")
    assert "Train large." in said
    assert "measured" in said
    assert "4.3 times the training compute of the largest training of the study" in said
    assert (
        "the fit of large is of ddim, 20 steps, guidance 2, where KID is 0.209 at the end of its first seed's"
        in said
    )
    assert "4.3 times beyond its points it predicts KID 0.14" in said


def test_what_the_pictures_take_pays_no_training(study):
    said = shoestring(f"advise --budget 0.005 --images 1.5e3 --study {study}")
    assert "2.6 times the training compute" in said
    assert "within what was measured" in shoestring(f"advise --budget 0.005 --images 2.8e3 --study {study}")


def test_ten_times_beyond_its_points_a_fit_predicts_nothing(study):
    said = shoestring(f"advise --budget 100 --study {study}")
    assert "times beyond its points it predicts nothing, as it is used up to 10 times beyond" in said
    assert "predicts KID" not in said


def test_a_fit_below_zero_predicts_nothing(tmp_path):
    for nimg in (1000, 2000, 4000, 8000, 16000):
        kid = -0.7 + 2.0 * nimg**-0.1
        append_row(tmp_path / "results.parquet", row("small", 1.0, nimg, 20, kid))
    said = shoestring(f"advise --budget 0.0007 --study {tmp_path}")
    assert "falls below zero, and predicts nothing" in said
    assert "predicts KID" not in said
    assert "none (below 0)" in shoestring(f"plan study {tmp_path}")


def test_ends_of_the_search_and_figures_below_zero_are_not_printed_as_limits():
    assert shown_exponents(0.01, 3.0) == "< 0.01 to > 3"
    assert shown_exponents(0.31, 0.62) == "0.31 to 0.62"
    assert [shown_range(*pair) for pair in ((-1, -0.5), (-1, 0.25), (0.1, 0.25))] == [
        "below 0",
        "below 0 to 0.25",
        "0.1 to 0.25",
    ]


def test_titles_say_whether_guidance_is_counted(study):
    said = shoestring(f"plan study {study} --price 2")
    assert "The best network for a sampling cost (guidance's second pass not counted)" in said
    assert "with 1,000,000 pictures (guidance's second pass counted): the front" in said


def test_a_setting_is_the_mean_of_its_seeds_and_none_is_of_a_later_seed_alone(tmp_path):
    rows = [row("end", 1.0, 1000, 20, 0.3), replace(row("end", 1.0, 1000, 20, 0.2), seed=1)]
    rows += [
        replace(row("end", 1.0, 1000, 8, 0.01), seed=1),
        replace(row("mid", 1.0, 1000, 20, 0.26), seed=3),
    ]
    for each in rows:
        append_row(tmp_path / "results.parquet", each)
    found = measured(rows, "kid", tmp_path)
    assert [(c.size, c.steps, c.quality) for c in found] == [("end", 20, 0.25), ("mid", 20, 0.26)]
    said = shoestring(f"advise --budget 1 --study {tmp_path}")
    assert "KID 0.25 (standard error 0.0071 by the drawn pictures; mean of 2 seeds: 0.3, 0.2)" in said
    said = shoestring(f"plan study {tmp_path} --price 2")
    assert "No fit for end, mid:" in said  # the only seed of one is another
    assert "Tables are of every network's first seed" in said


def test_other_rows_are_told_apart_by_sampler_and_images_seen(tmp_path):
    rows = [row("only", 1.0, nimg, 20, 1 / nimg) for nimg in (1000, 2000)]
    rows.append(replace(row("only", 1.0, 2000, 20, 0.002), sampler="dpmpp-2m"))
    for each in rows:
        append_row(tmp_path / "results.parquet", each)
    said = shoestring(f"advise --budget 1 --study {tmp_path}")
    assert "size images seen sampler steps guidance cost KID training pictures s each" in said
    assert "only 1,000 ddim 20" in said
    assert "only 2,000 dpmpp-2m 20" in said


@pytest.mark.parametrize("file", ["", "results.parquet"])
def test_the_recipe_of_a_study_is_found_and_shortened_to_the_checkpoint(tmp_path, file):
    append_row(tmp_path / "results.parquet", row("small", 1.0, 1024, 20, 0.2))
    recipe = tmp_path / "models" / "small-s0" / "config.yaml"
    recipe.parent.mkdir(parents=True)
    changes = ["stages.0.nimg=4096", "stages.0.batch=64"]
    recipe.write_text(to_yaml(recipes.resolve("ldm-39m", changes)))
    said = shoestring(f"advise --budget 1 --study {tmp_path / file}")
    assert "config.yaml. Change it by stages.0.nimg=1024: 1,024 of its 4,096 images" in said
    assert recipes.resolve(str(recipe), ["stages.0.nimg=1024"]).nimg == 1024


def test_rows_without_the_metric_are_left_out(tmp_path):
    append_row(tmp_path / "results.parquet", row("bad", 1.0, 1000, 4, float("nan")))
    with pytest.raises(UserError, match="--metric is kid, but no row"):
        shoestring(f"advise --budget 1 --study {tmp_path}")
    append_row(tmp_path / "results.parquet", row("good", 1.0, 1000, 4, 0.5))
    for command in ("advise --budget 1 --study", "plan study --price 2"):
        said = shoestring(f"{command} {tmp_path}")
        assert "Left out: 1 of 2 rows, whose KID is not finite." in said
        assert "bad" not in said
    with pytest.raises(UserError, match=r"no row of .* has a finite one .*; choose kid or fd"):
        shoestring(f"plan study {tmp_path} --metric feature_distance")


def test_distilled_networks_take_one_call_and_their_teachers_are_not_priced(tmp_path):
    student = replace(row("student", 1.0, 1000, 4, 0.2), guided_calls=1, sampler="consistency")
    both = measured([student, row("base", 1.0, 1000, 4, 0.3)], "kid", tmp_path)
    assert [c.picture_flops for c in both] == [4e9, 8e9]
    append_row(tmp_path / "results.parquet", student)
    for command in ("advise --budget 1 --study", "plan study"):
        assert "Training of student is priced at the distillation alone" in shoestring(
            f"{command} {tmp_path}"
        )


def test_cells_with_fewer_pictures_are_left_out(study):
    few = replace(row("small", 1.0, 16000, 4, 0.001, 3.0), samples=16)
    append_row(study / "results.parquet", few)
    assert "0.001" not in shoestring(f"plan study {study} --price 2")


def test_rows_of_another_seed_alone_are_a_study_too(tmp_path):
    append_row(tmp_path / "results.parquet", replace(row("only", 1.0, 1000, 4, 0.5), seed=7))
    assert "The study has one size only" in shoestring(f"plan study {tmp_path}")


def test_a_study_of_one_size_has_no_choice(tmp_path):
    append_row(tmp_path / "results.parquet", row("only", 1.0, 1000, 4, 0.5))
    said = shoestring(f"plan study {tmp_path}")
    assert "No fit for only: 1 different amounts of compute are too few" in said
    assert "The study has one size only" in said


def test_a_study_measures_nothing_anew(study):
    with pytest.raises(UserError, match="--measure is set, but a study runs nothing"):
        shoestring(f"plan study {study} --measure 5")


def test_networks_without_seed_0_are_planned_too(study):
    for each in read_rows(study / "results.parquet"):
        append_row(study / "later" / "results.parquet", replace(each, seed=4 * (each.model == "large")))
    assert "large" in shoestring(f"plan study {study / 'later'} --price 2")
