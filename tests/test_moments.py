"""Moments of features: the distance from them, their files, and those of others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shoestring.evaluation.distances import frechet_distance
from shoestring.evaluation.moments import Moments, RunningMoments, read_moments, write_moments
from shoestring.runtime import UserError


def features(n: int, width: int, seed: int, rank: int | None = None) -> np.ndarray:
    """Correlated, with a mean, in a subspace if asked for."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, rank or width)) @ rng.normal(size=(rank or width, width)) + rng.normal(
        size=width
    )


@pytest.mark.parametrize(("n", "m", "width", "rank"), [(40, 60, 8, None), (9, 30, 20, None), (50, 70, 20, 4)])
def test_the_distance_of_moments_is_that_of_the_features(
    n: int, m: int, width: int, rank: int | None
) -> None:
    a, b = features(n, width, 0, rank), features(m, width, 1)
    expected = frechet_distance(a, b)
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, Moments.of(b)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(Moments.of(a), Moments.of(a)) == pytest.approx(0, abs=1e-6 * expected)


@pytest.mark.parametrize("width", [1, 3, 64, 2048])
def test_gaussians_of_every_width(width: int) -> None:
    """Diagonal covariances, half of them zero in one: sum of squared differences of deviations and means."""
    rng = np.random.default_rng(width)
    scale_a, scale_b, gap = rng.uniform(0.1, 3, width), rng.uniform(0.1, 3, width), rng.normal(size=width)
    scale_a[: width // 2] = 0
    zero = torch.zeros(width, dtype=torch.float64)
    a = Moments(zero, torch.from_numpy(np.diag(scale_a**2)))
    b = Moments(torch.from_numpy(gap), torch.from_numpy(np.diag(scale_b**2)))
    expected = (gap**2).sum() + ((scale_a - scale_b) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_moments_of_pieces_are_those_of_the_whole(tmp_path: Path) -> None:
    rows = 1e3 + torch.randn(57, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    running = RunningMoments()
    for piece in rows.split([1, 20, 7, 29]):
        running.add(piece)
    whole, found = Moments.of(rows), running.moments({"side": "24"})
    torch.testing.assert_close(found.mean_F, whole.mean_F, rtol=1e-13, atol=0)
    torch.testing.assert_close(found.covariance_FF, whole.covariance_FF, rtol=1e-10, atol=1e-12)
    assert (found.count, found.made["side"]) == (57, "24")
    write_moments(tmp_path / "m.npz", found, spatial=whole)
    assert torch.equal(read_moments(tmp_path / "m.npz").mean_F, found.mean_F)
    assert torch.equal(read_moments(tmp_path / "m.npz", spatial=True).mean_F, whole.mean_F)
    with pytest.raises(ValueError, match="have 0 rows; at least 2"):
        RunningMoments().moments()


def test_a_file_says_what_it_was_made_of(tmp_path: Path) -> None:
    made = {"extractor": "efficientnet-lite0", "resize": "bicubic"}
    moments = Moments.of(features(30, 5, 0), made)
    write_moments(tmp_path / "own.npz", moments)
    found = read_moments(tmp_path / "own.npz")
    assert torch.equal(found.mean_F, moments.mean_F)
    assert torch.equal(found.covariance_FF, moments.covariance_FF)
    assert (found.count, dict(found.made)) == (30, made)


def test_files_of_adm_and_clean_fid(tmp_path: Path) -> None:
    a, b = Moments.of(features(30, 5, 0)), Moments.of(features(30, 7, 1))
    np.savez(
        tmp_path / "adm.npz",
        arr_0=np.zeros((2, 4, 4, 3), np.uint8),
        mu=a.mean_F,
        sigma=a.covariance_FF.float(),
        mu_s=b.mean_F,
        sigma_s=b.covariance_FF,
    )
    whole, spatial = read_moments(tmp_path / "adm.npz"), read_moments(tmp_path / "adm.npz", spatial=True)
    assert torch.equal(whole.covariance_FF, a.covariance_FF.float().double())
    assert torch.equal(spatial.mean_F, b.mean_F)
    assert whole.count is None
    assert frechet_distance(whole, a) == pytest.approx(0, abs=1e-4)


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; make reference statistics"):
        read_moments(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(UserError, match=r"is no \.npz file of reference statistics"):
        read_moments(tmp_path / "text.npz")
    np.savez(tmp_path / "objects.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    with pytest.raises(UserError, match=r"is no \.npz file of reference statistics"):
        read_moments(tmp_path / "objects.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(UserError, match="holds a; it needs mean and covariance or mu and sigma"):
        read_moments(tmp_path / "other.npz")
    np.savez(tmp_path / "adm.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match="it needs mean_spatial and covariance_spatial or mu_s and sigma_s"):
        read_moments(tmp_path / "adm.npz", spatial=True)
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(UserError, match=r"mean of shape \(3,\) and a covariance of shape \(4, 4\)"):
        read_moments(tmp_path / "shape.npz")
    np.savez(tmp_path / "nan.npz", mu=np.zeros(3), sigma=np.full((3, 3), np.nan))
    with pytest.raises(UserError, match="NaN or infinity"):
        read_moments(tmp_path / "nan.npz")
    zero = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="eigenvalue of -1 beside 3, so it is no covariance"):
        Moments(zero, torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double()).root()
    with pytest.raises(ValueError, match="not symmetric"):
        Moments(zero, torch.tensor([[1.0, 0.5], [0.0, 1.0]]).double()).root()
