"""Inception score, precision, recall, density, coverage, CMMD, and how sure a figure is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from shoestring.evaluation import manifold
from shoestring.evaluation.distances import cmmd, frechet_distance, kernel_distance
from shoestring.evaluation.manifold import overlap, overlaps
from shoestring.evaluation.scores import inception_score
from shoestring.evaluation.uncertainty import at_infinity, bootstrap_interval


def normal(n: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, width)) + shift)


# -- inception score ---------------------------------------------------------------------------------------


def test_inception_score_agrees_with_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchmetrics.image.inception import InceptionScore

    class Logits(torch.nn.Module):
        num_features = 12

        def forward(self, rows: Tensor) -> Tensor:
            return rows

    logits = normal(203, 12, 0)
    theirs = InceptionScore(feature=Logits(), splits=1)
    theirs.update(logits)
    assert inception_score(logits, 1).mean == pytest.approx(float(theirs.compute()[0]), rel=1e-6)


def test_splits_are_consecutive_parts_and_ten_if_nothing_else_is_said() -> None:
    logits = normal(203, 12, 0) + torch.linspace(0, 3, 203)[:, None] * torch.eye(12)[0]  # parts that differ
    parts = [inception_score(logits[203 * i // 10 : 203 * (i + 1) // 10], 1).mean for i in range(10)]
    found = inception_score(logits)
    assert found.mean == pytest.approx(np.mean(parts), rel=1e-12)
    assert found.std == pytest.approx(np.std(parts), rel=1e-9)
    assert found.std > 0.01


def test_inception_score_of_sure_and_of_unsure_classifiers() -> None:
    sure = 1e4 * torch.eye(5).repeat(40, 1)
    found = inception_score(sure, 4)
    assert found.mean == pytest.approx(5, rel=1e-9)
    assert found.std == pytest.approx(0, abs=1e-9)
    assert inception_score(torch.zeros(20, 5)).mean == pytest.approx(1)
    with pytest.raises(ValueError, match="logits have 9 rows; at least 10"):
        inception_score(torch.zeros(9, 5))


# -- precision and recall ----------------------------------------------------------------------------------


def by_hand(real: Tensor, made: Tensor, k: int) -> tuple[float, float, float, float]:
    """As printed, one pair after another."""

    def far(x: Tensor, y: Tensor) -> float:
        return math.sqrt(sum((a - b) ** 2 for a, b in zip(x.tolist(), y.tolist(), strict=True)))

    def radius(rows: Tensor, i: int) -> float:
        return sorted(far(rows[i], other) for j, other in enumerate(rows) if j != i)[k - 1]

    ball_real = [radius(real, i) for i in range(len(real))]
    ball_made = [radius(made, j) for j in range(len(made))]
    far_to = [[far(x, y) for y in made] for x in real]
    n, m = len(real), len(made)
    precision = sum(any(far_to[i][j] <= ball_real[i] for i in range(n)) for j in range(m)) / m
    recall = sum(any(far_to[i][j] <= ball_made[j] for j in range(m)) for i in range(n)) / n
    density = sum(far_to[i][j] < ball_real[i] for i in range(n) for j in range(m)) / (k * m)
    coverage = sum(min(far_to[i]) < ball_real[i] for i in range(n)) / n
    return precision, recall, density, coverage


@pytest.mark.parametrize(("n", "m", "k"), [(40, 40, 3), (25, 61, 5), (4, 4, 3)])
def test_overlap_is_that_of_every_pair(n: int, m: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifold, "BLOCK_BYTES", 8 * 7 * max(n, m))  # several blocks, the last one smaller
    real, made = normal(n, 3, 0), normal(m, 3, 1, shift=0.8)
    found = overlap(real, made, k)
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(
        by_hand(real, made, k), abs=1e-12
    )


def test_several_numbers_of_neighbours_at_once_are_those_one_by_one() -> None:
    real, made = normal(30, 3, 0), normal(25, 3, 1, shift=0.8)
    found = overlaps(real, made, (5, 1, 3))
    assert found == {k: overlap(real, made, k) for k in (1, 3, 5)}
    assert found[1].recall < found[5].recall


def test_overlap_of_equal_and_of_distant_sets() -> None:
    real = normal(50, 4, 0)
    same = overlap(real + 1e6, real.flip(0) + 1e6)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    apart = overlap(real, real + 100)
    assert (apart.precision, apart.recall, apart.density, apart.coverage) == (0, 0, 0, 0)


def test_pictures_that_are_there_several_times_have_balls_without_extent() -> None:
    """Their copies lie in them, and nothing else, however the products are rounded."""
    rows = 1e3 * normal(6, 200, 0)
    real = rows.repeat(5, 1)
    found = overlap(real, torch.cat([rows, rows + 1e-2]), 3)
    assert found.precision == 0.5
    assert (found.recall, found.density, found.coverage) == (1, 0, 0)


def test_mistakes_of_overlap_are_named() -> None:
    with pytest.raises(ValueError, match="features of real pictures have 3 rows; at least 4"):
        overlap(torch.zeros(3, 2), torch.zeros(9, 2))
    with pytest.raises(ValueError, match="2 and 3 columns"):
        overlap(torch.zeros(9, 2), torch.zeros(9, 3))
    with pytest.raises(ValueError, match=r"neighbours is \[0\]"):
        overlap(torch.zeros(9, 2), torch.zeros(9, 2), 0)


# -- CMMD --------------------------------------------------------------------------------------------------


def test_cmmd_is_the_mean_over_pairs_of_directions() -> None:
    a, b = normal(7, 4, 0), normal(9, 4, 1, shift=1.0)
    u, v = (rows / rows.norm(dim=1, keepdim=True) for rows in (a, b))

    def mean(x: Tensor, y: Tensor) -> float:
        pairs = [math.exp(-float((p - q).square().sum()) / 200) for p in x for q in y]
        return sum(pairs) / len(pairs)

    assert cmmd(a, 5 * b) == pytest.approx(1000 * (mean(u, u) + mean(v, v) - 2 * mean(u, v)), rel=1e-9)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-9)


# -- how sure ----------------------------------------------------------------------------------------------


def test_the_bootstrap_holds_the_truth_as_often_as_it_says() -> None:
    """The mean of 40 numbers, 200 times; of so few the bootstrap holds it a little less often."""

    def mean(rows: Tensor) -> float:
        return rows.mean().item()

    held = 0
    for seed in range(200):
        low, high = bootstrap_interval(mean, normal(40, 1, seed, shift=2.0), rounds=200, level=0.9, seed=seed)
        held += low <= 2.0 <= high
    assert 0.83 <= held / 200 <= 0.95


def test_the_bootstrap_depends_on_its_seed_only_and_refuses_nonsense() -> None:
    rows, reference = normal(60, 4, 0), normal(60, 4, 1)

    def distance(some: Tensor) -> float:
        return kernel_distance(some, reference, subsets=1, subset_size=60).mean

    first = bootstrap_interval(distance, rows, 20)
    torch.manual_seed(5)
    assert bootstrap_interval(distance, rows, 20) == first
    assert first[0] < distance(rows) < first[1]
    for words in ({"rounds": 1}, {"level": 1.0}):
        with pytest.raises(ValueError, match="rounds is"):
            bootstrap_interval(distance, rows, **words)


def test_at_infinity_the_bias_is_gone() -> None:
    """Two samples of one distribution: their distance is all bias."""
    reference = normal(20_000, 16, 0)
    biased = frechet_distance(normal(1_000, 16, 1), reference)
    found = [at_infinity(normal(1_000, 16, seed), reference, 200) for seed in range(1, 6)]
    assert biased > 0.05
    assert abs(np.mean(found)) < 0.2 * biased
    with pytest.raises(ValueError, match="least 60; at least 2 points, and 2 to 59"):
        at_infinity(normal(60, 4, 0), reference, 60)
