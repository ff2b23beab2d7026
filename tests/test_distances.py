"""Distances between sets of features: closed forms, other implementations, unbiasedness."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.evaluation.distances import frechet_distance, kernel_distance
from shoestring.evaluation.moments import finite_rows
from shoestring.evaluation.uncertainty import wilson_interval


def with_moments(n: int, mean_F: np.ndarray, root_FF: np.ndarray, seed: int) -> np.ndarray:
    """Samples whose mean and unbiased covariance (root root') are exact, not just on average."""
    z_NF = np.random.default_rng(seed).normal(size=(n, len(mean_F)))
    z_NF -= z_NF.mean(axis=0)
    u_NF, _, _ = np.linalg.svd(z_NF, full_matrices=False)
    return mean_F + math.sqrt(n - 1) * u_NF @ root_FF.T


def by_scipy(a_NF: np.ndarray, b_NF: np.ndarray) -> float:
    """The formula as printed, with a matrix root."""
    from scipy.linalg import sqrtm

    cov_a, cov_b = np.cov(a_NF, rowvar=False), np.cov(b_NF, rowvar=False)
    root = np.real(sqrtm(cov_a @ cov_b))
    gap = a_NF.mean(axis=0) - b_NF.mean(axis=0)
    return float(gap @ gap + np.trace(cov_a + cov_b - 2 * root))


def test_gaussians_with_commuting_covariances() -> None:
    scale_a, scale_b = np.array([1.0, 2.0, 0.5]), np.array([3.0, 2.0, 0.25])
    gap = np.array([1.0, -2.0, 0.5])
    a = with_moments(50, np.zeros(3), np.diag(scale_a), 0)
    b = with_moments(70, gap, np.diag(scale_b), 1)
    expected = (gap**2).sum() + ((scale_a - scale_b) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_gaussians_with_rotated_covariances() -> None:
    # In two dimensions tr((A B)^(1/2)) = sqrt(tr(A B) + 2 sqrt(det(A B))).
    angle = 0.7
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    root_a, root_b = np.diag([3.0, 0.4]), rotation @ np.diag([2.0, 0.1])
    cov_a, cov_b = root_a @ root_a.T, root_b @ root_b.T
    cross = math.sqrt(np.trace(cov_a @ cov_b) + 2 * math.sqrt(np.linalg.det(cov_a @ cov_b)))
    expected = np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    a, b = with_moments(20, np.ones(2), root_a, 0), with_moments(9, np.ones(2), root_b, 1)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n", "m", "width"), [(40, 60, 8), (200, 90, 16)])
def test_agrees_with_scipy_and_torchmetrics(n: int, m: int, width: int) -> None:
    from torchmetrics.image.fid import _compute_fid

    rng = np.random.default_rng(3)
    a = rng.normal(size=(n, width)) @ rng.normal(size=(width, width))
    b = rng.normal(size=(m, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)
    ours = frechet_distance(a, b)
    assert ours == pytest.approx(by_scipy(a, b), rel=1e-8)
    moments = [torch.from_numpy(x) for s in (a, b) for x in (s.mean(axis=0), np.cov(s, rowvar=False))]
    assert ours == pytest.approx(float(_compute_fid(*moments)), rel=1e-8)


def test_fewer_samples_than_features() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 30)), rng.normal(size=(11, 30))
    # Gaussians in a subspace: a rotation of the features changes nothing, and with the rotation that puts
    # all samples into 18 coordinates the matrix root is far better conditioned.
    basis, _ = np.linalg.qr(np.concatenate([a, b]).T)
    small = frechet_distance(a @ basis, b @ basis)
    assert frechet_distance(a, b) == pytest.approx(small, rel=1e-10)
    # Orthogonal subspaces have no cross term at all.
    a[:, 15:] = 0
    b[:, :15] = 0
    expected = np.var(a, axis=0, ddof=1).sum() + np.var(b, axis=0, ddof=1).sum()
    expected += ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_where_the_matrix_root_goes_wrong() -> None:
    """Twenty samples of 128 large features against themselves: the root of a singular product is far off."""
    a = 1e4 * np.random.default_rng(0).normal(size=(20, 128))
    assert by_scipy(a, a) < -100
    rounding = 1e-12 * np.cov(a, rowvar=False).trace()
    assert frechet_distance(a, a) == pytest.approx(0, abs=rounding)
    # One more sample, where the truth is known in the few coordinates that the samples fill.
    b = np.concatenate([a, a[:1] + 1])
    basis, _ = np.linalg.qr(b.T)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(a @ basis, b @ basis), rel=1e-8)


@pytest.mark.parametrize("shape", [(5, 20), (60, 6)])
def test_identical_sets_have_distance_zero(shape: tuple[int, int]) -> None:
    a = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-9)


@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 9), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_frechet_is_symmetric_and_scales_as_a_square(n: int, m: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, width)), rng.normal(size=(m, width)) + 1
    d = frechet_distance(a, b)
    assert d >= 0
    assert frechet_distance(b, a) == pytest.approx(d, rel=1e-9, abs=1e-9)
    assert frechet_distance(a + 5, b + 5) == pytest.approx(d, rel=1e-8, abs=1e-8)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * d, rel=1e-9, abs=1e-9)


def test_kernel_distance_is_unbiased() -> None:
    """Twenty pairs of samples of one distribution: the mean is within three standard errors of zero."""
    rng = np.random.default_rng(0)
    values = [
        kernel_distance(rng.normal(size=(40, 6)), rng.normal(size=(40, 6)), subsets=20, seed=i).mean
        for i in range(30)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values, ddof=1) / math.sqrt(len(values))
    assert min(values) < 0 < max(values)


def test_kernel_distance_is_the_mean_over_pairs() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)) + 1

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 3 + 1) ** 3)

    pairs = [(i, j) for i in range(5) for j in range(5)]
    within = sum(k(a[i], a[j]) + k(b[i], b[j]) for i, j in pairs if i != j) / 20
    between = sum(k(a[i], b[j]) for i, j in pairs) / 25
    found = kernel_distance(a, b, subsets=3, subset_size=5)
    assert found.mean == pytest.approx(within - 2 * between, rel=1e-10)
    assert found.std == pytest.approx(0, abs=1e-9)


def test_kernel_distance_agrees_with_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    rng = np.random.default_rng(2)
    a, b = torch.from_numpy(rng.normal(size=(30, 9))), torch.from_numpy(rng.normal(size=(30, 9)) + 0.5)
    ours = kernel_distance(a, b, subsets=1, subset_size=30).mean
    assert ours == pytest.approx(float(poly_mmd(a, b)), rel=1e-8)


def test_kernel_distance_depends_on_its_seed_only() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 4)), rng.normal(size=(30, 4)) + 1
    first = kernel_distance(a, b, seed=1)
    torch.manual_seed(7)
    assert kernel_distance(a, b, seed=1) == first
    assert kernel_distance(a, b, seed=2) != first
    assert first.mean > 0.5
    assert first.std > 0


def test_wilson_interval() -> None:
    # Newcombe 1998, Statistics in Medicine 17, 857, table I, method 3.
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(20, 20)[1] == 1


@given(st.integers(1, 500), st.floats(0, 1))
def test_wilson_interval_holds_the_share(n: int, share: float) -> None:
    low, high = wilson_interval(share * n, n)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1


def test_bad_input_is_named() -> None:
    good = np.random.default_rng(0).normal(size=(6, 3))
    bad = good.copy()
    bad[2, 1] = np.nan
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match="second set hold NaN or infinity in 1 of 6 rows"):
            distance(good, bad)
        with pytest.raises(ValueError, match="first set have 1 rows; at least 2"):
            distance(good[:1], good)
        with pytest.raises(ValueError, match="3 and 2 columns"):
            distance(good, good[:, :2])
        with pytest.raises(ValueError, match="must be a matrix"):
            distance(good[0], good)
    with pytest.raises(ValueError, match="subset_size is 7; it must be at least 2 and at most 6"):
        kernel_distance(good, good, subset_size=7)
    with pytest.raises(ValueError, match="subsets is 0"):
        kernel_distance(good, good, subsets=0)
    with pytest.raises(ValueError, match="3 successes of 2"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match="0 successes of 0"):
        wilson_interval(0, 0)
    with pytest.raises(ValueError, match="pixels have 0 rows"):
        finite_rows(np.zeros((0, 4)), "pixels")
