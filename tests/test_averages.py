"""Averages of the weights: the classic one and power-function tracks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from shoestring.runtime import UserError, stream
from shoestring.training.averages import Averages, power_decay, power_gamma


def test_classic_average_follows_the_weights() -> None:
    model = nn.Linear(3, 2)
    start = model.weight.detach().clone()
    averages = Averages(model)
    with torch.no_grad():
        model.weight += 1
    averages.update(0.75, 10, 10)
    assert torch.allclose(averages.named("ema")["weight"], start + 0.25)
    with averages.applied():
        assert torch.allclose(model.weight, start + 0.25)
    assert torch.equal(model.weight, start + 1)
    averages.update(0.0, 20, 10)
    assert torch.equal(averages.tracks["ema"][0], model.weight)


def test_exponents_of_the_paper() -> None:
    """arXiv 2312.02696, section 3.1: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert power_gamma(0.05) == pytest.approx(16.97, abs=0.005)
    assert power_gamma(0.10) == pytest.approx(6.94, abs=0.005)
    for length in (0.001, 0.02, 0.15, 0.25, 0.2886):
        g = power_gamma(length)  # the standard deviation of the density (g + 1) t^g on [0, 1]
        assert (g + 1) / (g + 3) - ((g + 1) / (g + 2)) ** 2 == pytest.approx(length**2, rel=1e-6)
    for length in (0.3, 0.0, -0.1, 12.0, float("nan")):
        with pytest.raises(UserError, match="length of a power-function average"):
            power_gamma(length)


def test_power_tracks_are_integrals_of_their_function_whatever_the_batches() -> None:
    """Each step counts by the integral of (g + 1) t^g over its images; batches may change on the way."""
    model = nn.Linear(5, 3)
    averages = Averages(model, (0.05, 0.2))
    batches = [4] * 20 + [12] * 15 + [2] * 10
    nimg, seen, weights = 0, [0], []
    for i, batch in enumerate(batches):
        with torch.no_grad():
            model.weight += torch.randn(3, 5, generator=stream(0, "walk", i))
        nimg += batch
        averages.update(0.9, nimg, batch)
        seen.append(nimg)
        weights.append(model.weight.detach().double())
    share = np.array(seen) / nimg
    for length in (0.05, 0.2):
        density = np.diff(share ** (power_gamma(length) + 1))
        expected = sum(w * d for w, d in zip(weights, density, strict=True))
        found = averages.named(f"power-{length:g}")["weight"].double()
        assert (found - expected).abs().max() < 3e-6 * expected.abs().max()
    assert power_decay(7.0, 10, 10) == 0.0  # the first step copies


def test_state_is_live_and_complete() -> None:
    model = nn.Linear(3, 2)
    averages = Averages(model, (0.1,))
    assert list(averages.tensors()) == ["ema.weight", "ema.bias", "power-0.1.weight", "power-0.1.bias"]
    with torch.no_grad():
        averages.tensors()["power-0.1.bias"].fill_(7.0)
    with averages.applied("power-0.1"):
        assert model.bias.tolist() == [7.0, 7.0]
    assert model.bias.tolist() != [7.0, 7.0]


def test_averages_are_float32_also_of_other_weights() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        model = nn.Linear(3, 2).to(dtype)
        averages = Averages(model, (0.1,))
        averages.update(0.5, 10, 10)
        assert {t.dtype for t in averages.tensors().values()} == {torch.float32}
        with averages.applied():
            assert model.weight.dtype == dtype
