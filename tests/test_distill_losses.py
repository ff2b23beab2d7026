"""Losses of distillation: closed forms on a Gaussian, and the passes that they make."""

from dataclasses import replace

import pytest
import torch

from shoestring.config import (
    DistillConfig,
    ProcessConfig,
    SamplingConfig,
    UNetConfig,
)
from shoestring.diffusion.distillation import (
    Sample,
    codi_loss,
    consistency_loss,
    guided_loss,
    progressive_loss,
    step_weight,
    teacher_step,
)
from shoestring.diffusion.process import EDMProcess, build_process
from shoestring.interfaces import Conditioning, Denoised, NoiseLevel
from shoestring.planning.distillation import passes
from shoestring.sampling.generate import no_fresh_noise
from shoestring.sampling.samplers import solve

DATA = 0.5
EDM, FLOW = EDMProcess(DATA), build_process(ProcessConfig(kind="flow"), None)
DDPM = build_process(ProcessConfig(kind="ddpm", prediction="v"), None)
PROCESSES = {"edm": EDM, "flow": FLOW, "ddpm": DDPM}
UNET = UNetConfig(kind="unet", in_channels=3, channels=8, caption_dim=256, patch_size=2, mask_captions=True)


class Exact:
    """A denoiser in closed form: ``estimate`` of (xt, level)."""

    predicts_all, patch_size, guidance_input = False, 1, False

    def __init__(self, estimate):
        self.estimate, self.calls = estimate, 0

    def __call__(self, xt, level, conditioning, visible_BK=None, path_dropped_B=None):
        self.calls += 1
        return Denoised.whole(self.estimate(xt, *level.images()), 1)

    def prepare(self, conditioning):
        return conditioning


def posterior_mean(xt, alpha, sigma):
    """Of data N(0, DATA^2)."""
    return alpha * DATA**2 * xt / ((alpha * DATA) ** 2 + sigma**2)


def end_of_path(xt, alpha, sigma):
    """Where the probability-flow ODE of N(0, DATA^2) leads from (alpha, sigma) to (1, 0)."""
    return xt * DATA / ((alpha * DATA) ** 2 + sigma**2).sqrt()


def sample_of(count=64, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 1, 4, 4)
    return Sample(
        DATA * torch.randn(shape, generator=generator, dtype=torch.float64),
        torch.randn(shape, generator=generator, dtype=torch.float64),
        Conditioning.nothing(count),
        torch.rand(count, generator=generator, dtype=torch.float64),
        torch.full((count,), scale, dtype=torch.float64),
    )


def grid_of(process, steps):
    return process.grid(SamplingConfig(steps=steps, sigma_min=0.01), steps)


@pytest.mark.parametrize("kind", PROCESSES)
def test_the_exact_consistency_function_has_no_loss_on_a_fine_path(kind):
    """With the error of one Heun step, which falls with its length, and no other."""
    process, teacher, exact = PROCESSES[kind], Exact(posterior_mean), Exact(end_of_path)

    def loss(student, steps, solver="heun"):
        grid = grid_of(process, steps)[:-1]  # the step into sigma 0 is never exact
        found = consistency_loss(process, student, exact, teacher, sample_of(), grid, solver, 0.0)
        return found.median().item()

    coarse, fine, finest = loss(exact, 20), loss(exact, 80), loss(exact, 320)
    assert finest < fine < coarse
    assert fine < coarse / 30  # second order: the error of a step falls with its cube, divided by its length
    assert loss(exact, 80, "euler") > 10 * fine
    assert loss(Exact(posterior_mean), 80) > 1000 * fine


def test_the_last_step_aims_at_the_teacher_s_own_estimate():
    sample = sample_of()
    sample = replace(sample, uniform_B=torch.full_like(sample.uniform_B, 0.999))
    teacher, target = Exact(posterior_mean), Exact(end_of_path)
    loss_B = consistency_loss(
        EDM, Exact(posterior_mean), target, teacher, sample, grid_of(EDM, 10), "heun", 0.001
    )
    assert loss_B.abs().max() < 1e-9
    assert loss_B.isfinite().all()


@pytest.mark.parametrize("kind", PROCESSES)
def test_two_steps_of_the_teacher_are_one_of_the_student(kind):
    """The wanted estimate is that whose single DDIM step ends where the teacher's two end."""
    process, teacher, seen = PROCESSES[kind], Exact(posterior_mean), []
    grid, sample = grid_of(process, 8), sample_of(256)

    def single(xt, alpha, sigma):
        """Found from the grid, by the sampler itself."""
        out = torch.empty_like(xt)
        for i in range(0, 8, 2):
            here = (
                sigma.flatten() / alpha.flatten().clamp(min=1e-9) - grid[i][1] / max(grid[i][0], 1e-9)
            ).abs()
            rows = here < 1e-6 * (1 + grid[i][1] / max(grid[i][0], 1e-9))
            seen.append(int(rows.sum()))
            if not rows.any():
                continue
            two = solve(
                teacher, xt[rows], grid[i : i + 3], Conditioning.nothing(int(rows.sum())),
                SamplingConfig(sampler="euler"), no_fresh_noise,
            )  # fmt: skip
            r = grid[i + 2][1] / grid[i][1]
            out[rows] = (two - r * xt[rows]) / (grid[i + 2][0] - r * grid[i][0])
        return out

    loss_B = progressive_loss(process, Exact(single), teacher, sample, grid, DATA)
    assert sum(seen) == 256
    assert sum(count > 0 for count in seen) == 4
    assert loss_B.max() < 1e-9
    assert progressive_loss(process, teacher, teacher, sample, grid, DATA).mean() > 1e-4


@pytest.mark.parametrize("kind", ["edm", "flow", "ddpm", "zero-snr"])
def test_no_step_of_the_path_is_left_out(kind):
    """The distance to what one step changes: what each counts for must be of one order."""
    zero = ProcessConfig(kind="ddpm", prediction="v", schedule="cosine", zero_terminal_snr=True)
    process = build_process(zero, None) if kind == "zero-snr" else PROCESSES[kind]
    grid = torch.tensor(process.grid(SamplingConfig(), 18), dtype=torch.float64)
    level, following = (NoiseLevel(*part.unbind(1)) for part in (grid[:-1], grid[1:]))
    weight = step_weight(level, following)
    if kind == "edm":  # as published
        torch.testing.assert_close(weight, 1 / (level.sigma_B - following.sigma_B))
    else:
        assert weight.max() < 1000 * weight.min()
        assert 1 / weight[0] < 0.2  # the first step, from which every picture starts


def test_codi_is_the_distance_of_the_noises_and_of_the_data():
    grid, sample = grid_of(EDM, 12), sample_of(16)
    sample = replace(sample, uniform_B=torch.full_like(sample.uniform_B, 0.5))  # step 5 of 11
    student = Exact(lambda xt, alpha, sigma: 0.3 * xt)
    target = Exact(lambda xt, alpha, sigma: 0.2 * xt)
    loss_B = codi_loss(EDM, student, target, sample, grid, 0.0, 0.0)
    sigma, following = grid[5][1], grid[6][1]
    xt = sample.x0 + sigma * sample.noise
    noise_t = (xt - 0.3 * xt) / sigma
    xs = 0.3 * xt + following * noise_t
    noise_s = (xs - 0.2 * xs) / following
    torch.testing.assert_close(loss_B, (noise_t - noise_s).square().mean(dim=(1, 2, 3)))
    with_data = codi_loss(EDM, student, target, sample, grid, 0.0, 2.0)
    level = NoiseLevel(torch.ones(16, dtype=torch.float64), torch.full((16,), sigma, dtype=torch.float64))
    pull = 2 * EDM.weight(level) * (0.3 * xt - sample.x0).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(with_data - loss_B, pull)


def noise_left(huber):
    """Black pictures, and a model that is blind below 0.05: the share of the noise that CoDi leaves above."""
    grid = grid_of(EDM, 18)
    sigmas = torch.tensor([sigma for _, sigma in grid[:-1]], dtype=torch.float64)
    learned = torch.zeros_like(sigmas).requires_grad_()  # a share a level; at first all noise is removed

    def estimate(xt, alpha, sigma):
        at = (sigmas[:, None] - sigma.flatten()).abs().argmin(dim=0)
        return torch.where(sigmas < 0.05, 1.0, learned)[at][:, None, None, None] * xt

    optimizer = torch.optim.Adam([learned], 0.02)
    for seed in range(300):
        sample = sample_of(128, seed=seed)
        sample = replace(sample, x0=torch.zeros_like(sample.x0))
        loss = codi_loss(EDM, Exact(estimate), Exact(estimate), sample, grid, huber, 1.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return learned.detach()[(sigmas > 0.1) & (sigmas < 0.5)].mean()


def test_codi_leaves_noise_under_the_pseudo_huber_distance():
    assert noise_left(0.0) < 0.5 * noise_left(DistillConfig.model_fields["huber"].default)


def test_a_step_of_the_teacher_is_a_step_of_the_sampler():
    sample, grid = sample_of(6), grid_of(EDM, 5)
    for solver in ("euler", "heun"):
        for i in range(5):
            level, following = (
                NoiseLevel(*(torch.full((6,), v, dtype=torch.float64) for v in pair))
                for pair in grid[i : i + 2]
            )
            ours = teacher_step(Exact(posterior_mean), sample.noise, level, following, sample, solver)
            theirs = solve(
                Exact(posterior_mean), sample.noise, grid[i : i + 2], sample.conditioning,
                SamplingConfig(sampler=solver), no_fresh_noise,
            )  # fmt: skip
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("method", "solver", "guidance"),
    [
        ("consistency", "heun", 2.0),
        ("consistency", "euler", 1.0),
        ("codi", "heun", 1.0),
        ("guided", "heun", 2.0),
        ("progressive", "heun", 2.0),
        ("progressive", "heun", 1.0),
    ],
)
def test_the_planner_counts_the_passes_that_are_made(method, solver, guidance):
    counts = {"teacher": 0, "target": 0, "student": 0}

    def counting(role):
        def estimate(xt, alpha, sigma):
            counts[role] += len(xt)
            return posterior_mean(xt, alpha, sigma)

        return Exact(estimate)

    student, target, teacher = counting("student"), counting("target"), counting("teacher")
    sample, grid = sample_of(10, guidance), grid_of(EDM, 8)
    if method == "consistency":
        consistency_loss(EDM, student, target, teacher, sample, grid, solver, 0.0)
    elif method == "codi":
        codi_loss(EDM, student, target, sample, grid, 0.0, 1.0)
    elif method == "guided":
        guided_loss(EDM, student, teacher, sample, NoiseLevel(torch.ones(10), torch.ones(10)))
    else:
        progressive_loss(EDM, student, teacher, sample, grid, DATA)
    config = DistillConfig(method=method, teacher="x", guidance=(guidance, guidance), solver=solver)
    assert passes(config, takes_scale=False) == (counts["teacher"] / 10, counts["target"] / 10)
    assert counts["student"] == 10
