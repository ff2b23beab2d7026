"""Scaling fits with intervals, and isoFLOP tables."""

import numpy as np
import pytest
import scipy.stats

from shoestring.planning.scaling import fit_power_law, interpolated, iso_flop, t_quantile
from shoestring.runtime import UserError


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
