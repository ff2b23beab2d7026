"""The sampling-cost study: which cells it measures, and what its rows say."""

import re
from dataclasses import replace

import pytest
import torch

from shoestring.evaluation.distances import KernelReference, kernel_distance
from shoestring.studies.sampling_analysis import (
    Scale,
    best_at_costs,
    best_guidance,
    best_within,
    budgets,
    first_seeds,
    front,
    guidance_shown,
    most_samples,
)
from shoestring.studies.sampling_report import winners, write_report
from shoestring.studies.sampling_rows import Row
from shoestring.studies.sampling_search import coarse_to_fine, one_valley

# -- the search -------------------------------------------------------------------------------------------

SCALES = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)


@pytest.mark.parametrize("best", range(8))
def test_the_best_of_one_valley_is_found_with_fewer_cells(best):
    values = {scale: abs(i - best) + 0.1 * (i < best) for i, scale in enumerate(SCALES)}
    measured = coarse_to_fine(SCALES, values.__getitem__)
    assert min(measured, key=values.__getitem__) == SCALES[best]
    assert len(measured) == len(set(measured)) <= 6


def test_a_curve_with_two_valleys_is_measured_whole():
    values = dict(zip(SCALES, (3, 2, 3, 5, 4, 3, 1, 2), strict=True))
    assert sorted(coarse_to_fine(SCALES, values.__getitem__)) == list(SCALES)


def test_one_valley():
    assert one_valley([3, 2, 1, 2])
    assert one_valley([1, 2, 3])
    assert one_valley([3, 2])
    assert not one_valley([1, 3, 2])


# -- the analysis -----------------------------------------------------------------------------------------


def row(model, gflops, steps, guidance, kid):
    return Row(
        model, "unet", 0, 1, 10, 1.0, gflops, "ddim", steps, guidance, steps, 50, kid, 0.01, 1.0, 0.5, 0.5
    )


ROWS = [
    row("small", 1.0, 4, 2.0, 0.9),
    row("small", 1.0, 4, 3.0, 0.8),
    row("small", 1.0, 20, 2.0, 0.4),
    row("large", 10.0, 4, 2.0, 0.5),
    row("large", 10.0, 20, 2.0, 0.1),
]


def test_networks_of_equal_size_have_winners_too():
    rows = [row("a", 1.0, 4, 2.0, 0.9), row("b", 1.0, 4, 2.0, 0.8), row("c", 3.0, 4, 2.0, 0.7)]
    assert [w.model for _, w, _ in winners(rows, Scale.of(rows, False), "kid")][-1] == "c"


def test_best_guidance_front_and_winners_at_a_cost():
    scale, best = Scale.of(ROWS, False), best_guidance(ROWS, "kid")
    assert [r.guidance for r in best] == [3.0, 2.0, 2.0, 2.0]
    assert [scale.sampling(r) for r in best] == [0.4, 2.0, 4.0, 20.0]
    assert Scale.of(ROWS, True).sampling(best[0]) == 0.8
    assert [r.kid for r in front(best, scale, "kid")] == [0.8, 0.4, 0.1]
    assert best_within(best, scale, "kid", 5).model == "small"
    assert best_within(best, scale, "kid", 0.1) is None
    costs = budgets(best, scale)
    assert costs[0] == 4.0
    assert costs[-1] == 20.0
    found = winners(ROWS, scale, "kid")
    assert (found[0][1].model, found[0][2].model, found[-1][1].model) == ("small", "large", "large")


def test_where_guidance_costs_a_picture_without_it_can_win():
    rows = [*ROWS, row("large", 10.0, 4, 1.0, 0.6)]
    scale = Scale.of(rows, True)
    assert [r.guidance for r in best_guidance(rows, "kid") if r.model == "large"] == [2.0, 2.0]
    found = winners(rows, scale, "kid")
    assert (found[0][0], found[0][1].model) == (4.0, "small")
    assert (found[0][2].model, found[0][2].guidance) == ("large", 1.0)  # half as dear as with guidance
    shown = [(r.steps, r.guidance) for r in best_at_costs(rows, scale, "kid") if r.model == "large"]
    assert shown == [(4, 1.0), (4, 2.0), (20, 2.0)]
    assert len(best_at_costs(rows, Scale.of(rows, False), "kid")) == len(best_guidance(rows, "kid"))


def test_a_best_scale_at_the_edge_of_those_tried_is_marked():
    shown = [guidance_shown(best, ROWS) for best in best_guidance(ROWS, "kid")]
    assert shown == ["3+", "2", "2", "2"]  # of one scale nothing is known
    assert guidance_shown(ROWS[0], ROWS) == "2"


def test_a_cell_with_more_pictures_takes_the_place_of_its_own_only():
    more = replace(ROWS[0], samples=500, kid=0.95)
    assert most_samples([*ROWS, more]) == [more, *ROWS[1:]]
    anew = replace(ROWS[0], digest="other", kid=0.5)  # trained again: rows of the old weights are of no use
    assert most_samples([*ROWS, anew]) == [*ROWS[3:], anew]


def test_networks_without_seed_0_are_shown_too(tmp_path):
    rows = [replace(r, seed=3) if r.model == "large" else r for r in ROWS]
    assert first_seeds([*rows, replace(ROWS[3], seed=4)]) == rows
    page = write_report(tmp_path, rows, "kid", False, "").read_text()
    assert re.search(r"<li><span[^>]*></span>large</li>", page)
    assert "at a sampling cost of at most" in page
    without = [replace(r, guidance=0.0) for r in ROWS]  # a map of scales that are all 0
    assert "Best guidance" in write_report(tmp_path, without, "kid", False, "").read_text()


# -- the kernel distance of whole sets --------------------------------------------------------------------


def test_the_standard_error_is_the_spread_of_repeated_draws():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(600, 16, generator=generator)
    kernel = KernelReference(reference)
    found = [kernel.compare(0.4 + torch.randn(80, 16, generator=generator)) for _ in range(200)]
    spread = torch.tensor([each.value for each in found]).std().item()
    said = sum(each.standard_error for each in found) / len(found)
    assert said == pytest.approx(spread, rel=0.15)


def test_whole_sets_agree_with_the_mean_over_subsets():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(200, 8, generator=generator) + 0.5, torch.randn(200, 8, generator=generator)
    assert KernelReference(b).compare(a).value == pytest.approx(
        kernel_distance(a, b, subsets=300, subset_size=150).mean, rel=0.05
    )
