"""Solvers on a Gaussian, whose flow is known; guidance; independence of the batch."""

import math

import pytest
import torch

from shoestring.config import SamplingConfig, TransformerConfig
from shoestring.diffusion.process import EDMProcess, FlowProcess
from shoestring.interfaces import Conditioning, Denoised, NoiseLevel
from shoestring.models.microdit import MicroDiT
from shoestring.runtime import stream
from shoestring.sampling.generate import class_number, class_prompts, initial_noise, sample_latents
from shoestring.sampling.guidance import GuidedDenoiser
from shoestring.sampling.samplers import SAMPLERS, solve
from shoestring.sampling.solvers import heun

MEAN, STD = 0.3, 0.8


class Gaussian:
    """The exact denoiser of x0 ~ N(MEAN, STD^2): E[x0 | xt] for any alpha and sigma."""

    calls, predicts_all, guidance_input, patch_size = 0, True, False, 1

    def prepare(self, conditioning):
        return conditioning

    def __call__(self, xt, level, conditioning, visible_BK=None, path_dropped_B=None):
        self.calls += 1
        alpha, sigma = level.images()
        gain = alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2)
        x0 = MEAN + gain * (xt - alpha * MEAN)
        return Denoised.whole(x0, 1)


def exact(x, level):
    """Where the ODE ends: every quantile of N(alpha MEAN, alpha^2 STD^2 + sigma^2) goes to that of x0."""
    alpha, sigma = level
    spread = ((alpha * STD) ** 2 + sigma**2) ** 0.5
    return MEAN + STD * (x - alpha * MEAN) / spread


NONE = Conditioning(torch.zeros(2, 1, 1))


def run(name, denoiser, x, grid, noise=None):
    """A sampler by its name; those that draw noise get none, or what is given."""
    fresh = noise or (lambda step: torch.zeros_like(x))
    return solve(denoiser, x, grid, NONE, SamplingConfig(sampler=name), fresh)


CASES = [
    (EDMProcess(0.8), SamplingConfig(sigma_max=20, sigma_min=0.01)),
    (FlowProcess(1.0), SamplingConfig()),
]


@pytest.mark.parametrize(("process", "config"), CASES)
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_error_falls_with_the_order_of_the_solver(process, config, name, order):
    noise = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (40, 80):
        grid = process.grid(config, steps)
        x = grid[0][1] * noise
        errors.append((run(name, Gaussian(), x, grid) - exact(x, grid[0])).abs().max().item())
    assert errors[1] < 0.1  # of a standard deviation of 0.8: the solution, not something like it
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.25)


@pytest.mark.parametrize(("process", "config"), CASES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_is_the_first_estimate(process, config, name):
    grid = process.grid(config, 1)
    x = grid[0][1] * torch.randn(2, 1, 4, 4)
    level = NoiseLevel(torch.full((2,), grid[0][0]), torch.full((2,), grid[0][1]))
    found = run(name, Gaussian(), x, grid)
    assert torch.allclose(found, Gaussian()(x, level, NONE).image(), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "order", "bar", "case"),
    [
        ("dpmpp-2m", 2, 1.8, CASES[0]),
        ("dpmpp-2m", 2, 1.8, CASES[1]),
        ("dpmpp-3m", 3, 2.7, CASES[0]),  # flow begins at pure noise, where a first step of low order errs
    ],
)
def test_multistep_solvers_have_their_order(name, order, bar, case):
    """From almost pure noise, where the first steps of low order hardly err, to a noise level above zero.

    The last step, into zero, is of first order for all solvers.
    """
    process, config = case[0], case[1].model_copy(update={"sigma_max": 5000.0})
    noise = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (60, 120):
        grid = [level for level in process.grid(config, steps) if level[1] >= 0.05 * level[0]]
        x = grid[0][1] * noise
        end = grid[-1]
        start_spread, spread = (((a * STD) ** 2 + s**2) ** 0.5 for a, s in (grid[0], end))
        truth = end[0] * MEAN + spread * (x - grid[0][0] * MEAN) / start_spread
        errors.append((run(name, Gaussian(), x, grid) - truth).abs().max().item())
    slope = math.log2(errors[0] / errors[1])
    assert bar <= slope <= order + 1.2, (slope, errors)


def test_the_second_order_multistep_solver_is_that_of_diffusers():
    """The third-order one is not: theirs takes half of the quadratic part, see the solver."""
    diffusers = pytest.importorskip("diffusers")
    config, denoiser = SamplingConfig(sigma_max=80, sigma_min=0.002), Gaussian()
    theirs = diffusers.EDMDPMSolverMultistepScheduler(
        sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0, solver_order=2, final_sigmas_type="zero"
    )
    theirs.set_timesteps(20)
    grid = EDMProcess(0.5).grid(config, 20)
    assert theirs.sigmas.tolist() == pytest.approx([sigma for _, sigma in grid], rel=1e-5)
    x = grid[0][1] * torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    for time, sigma in zip(theirs.timesteps, theirs.sigmas.double()[:-1], strict=True):
        level = NoiseLevel(torch.ones(2, dtype=torch.float64), sigma.expand(2))
        x0 = denoiser(y, level, NONE).image()
        skip = 0.25 / (sigma**2 + 0.25)
        out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
        y = theirs.step((x0 - skip * y) / out, time, y).prev_sample
    ours = run("dpmpp-2m", denoiser, x, grid)
    assert (ours - y).abs().max() <= 1e-4 * y.abs().max()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 30])
def test_network_calls_are_counted(name, steps):
    denoiser = Gaussian()
    x = run(name, denoiser, torch.randn(2, 1, 2, 2), FlowProcess(1.0).grid(SamplingConfig(), steps))
    assert denoiser.calls == SAMPLERS[name].calls(steps)
    assert x.isfinite().all()


def test_heun_calls_the_network_twice_a_step_but_the_last():
    denoiser = Gaussian()
    heun(denoiser, torch.randn(2, 1, 2, 2), EDMProcess(0.8).grid(SamplingConfig(), 30), NONE)
    assert denoiser.calls == 59


def network(**changes):
    config = TransformerConfig(
        in_channels=3,
        caption_dim=8,
        dim=32,
        depth=3,
        head_dim=16,
        ffn_multiple_of=16,
        mixer={"depth": 2, "dim": 48},
        experts={"count": 4},
        **changes,
    )
    model = MicroDiT(config)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=stream(0, "test", i)))
    return model


@pytest.fixture(scope="module")
def denoiser():
    return EDMProcess(0.6).denoiser(network(mask_captions=True))


def text(batch, length=5):
    mask = torch.arange(length)[None] < torch.tensor([length, 2, 3, 1] * batch)[:batch, None]
    values = torch.randn(batch, length, 8, generator=stream(0, "text")) * mask[:, :, None]
    return Conditioning(values, mask)


def at(sigma, batch):
    return NoiseLevel(torch.ones(batch), torch.full((batch,), sigma))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_guidance_is_linear_between_empty_and_caption(denoiser, scale):
    x, caption = torch.randn(4, 3, 8, 8), text(4)
    with torch.no_grad():
        c = denoiser(x, at(2.0, 4), caption).image()
        u = denoiser(x, at(2.0, 4), caption.null()).image()
        guided = GuidedDenoiser(denoiser, SamplingConfig(guidance=scale))(x, at(2.0, 4), caption).image()
    assert (c - u).abs().max() > 0.01
    assert torch.allclose(guided, u + scale * (c - u), atol=1e-5)


def test_guidance_interval_and_negative(denoiser):
    x, caption, other = torch.randn(4, 3, 8, 8), text(4), Conditioning(*vars_of(text(4)))
    other = Conditioning(other.text_BSD.flip(0), other.text_mask_BS.flip(0))
    with torch.no_grad():
        c = denoiser(x, at(2.0, 4), caption).image()
        n = denoiser(x, at(2.0, 4), other).image()
        outside = GuidedDenoiser(denoiser, SamplingConfig(guidance=3.0, guidance_interval=(0.1, 1.0)))(
            x, at(2.0, 4), caption
        ).image()
        inside = GuidedDenoiser(denoiser, SamplingConfig(guidance=3.0, guidance_interval=(0.1, 2.0)), other)(
            x, at(2.0, 4), caption
        )
    assert torch.allclose(outside, c, atol=1e-6)
    assert torch.allclose(inside.image(), n + 3 * (c - n), atol=1e-5)


def vars_of(conditioning):
    return conditioning.text_BSD, conditioning.text_mask_BS


def test_prepared_captions_change_nothing(denoiser):
    x, caption = torch.randn(4, 3, 8, 8), text(4)
    with torch.no_grad():
        plain = denoiser(x, at(1.0, 4), caption).image()
        prepared = denoiser(x, at(1.0, 4), denoiser.prepare(caption)).image()
    assert torch.allclose(plain, prepared, atol=1e-6)


def test_a_picture_does_not_depend_on_its_batch(denoiser):
    process, sampling = EDMProcess(0.6), SamplingConfig(steps=4, guidance=2.0)
    caption = text(4)
    noise = initial_noise(7, range(4), (3, 8, 8))
    together = sample_latents(denoiser, process, caption, noise, sampling)
    for i in range(4):
        alone = Conditioning(caption.text_BSD[i : i + 1], caption.text_mask_BS[i : i + 1])
        single = sample_latents(denoiser, process, alone, initial_noise(7, [i], (3, 8, 8)), sampling)
        assert (single[0] - together[i]).abs().max() < 1e-4 * together.abs().max()


def test_classes_whose_names_are_numbers_are_asked_for_by_name():
    names = sorted(str(i) for i in range(1, 13))  # 1, 10, 11, 12, 2, ...
    asked = class_prompts(12, names)
    assert [class_number(text, names, 12) for text in asked] == list(range(12))
    assert class_prompts(3, ()) == ["0", "1", "2"]


def test_seed_zero_is_a_seed():
    a, b, c = (initial_noise(seed, [0], (1, 4, 4)) for seed in (0, 1, 0))
    assert torch.equal(a, c)
    assert not torch.equal(a, b)


@pytest.mark.parametrize("process", [EDMProcess(0.8), FlowProcess(1.0)])
def test_strength_between_keeping_and_forgetting(process):
    start = torch.full((2, 1, 4, 4), 0.9)
    noise = torch.randn(2, 1, 4, 4, generator=stream(0, "noise"))
    sampling = SamplingConfig(steps=10, guidance=1.0, sigma_max=20)

    def result(strength):
        return sample_latents(Gaussian(), process, NONE, noise, sampling, start=start, strength=strength)

    assert torch.equal(result(0.0), start)
    plain = sample_latents(Gaussian(), process, NONE, noise, sampling)
    assert torch.equal(result(1.0), plain)
    distance = [(result(s) - start).abs().mean().item() for s in (0.2, 0.5, 0.9)]
    assert distance == sorted(distance)
