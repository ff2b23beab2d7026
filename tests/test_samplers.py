"""Samplers against diffusers' schedulers, their orders on a mixture, DDPM's process and the grids."""

import math

import pytest
import torch
from scipy.stats import norm

from shoestring.config import ProcessConfig, SamplingConfig, parse_yaml
from shoestring.config.schema import NoiseConfig
from shoestring.diffusion.process import DDPMProcess, EDMProcess, FlowProcess, build_process, noise_table
from shoestring.interfaces import Conditioning, Denoised, NetworkOutput, NoiseLevel
from shoestring.runtime import UserError
from shoestring.sampling.generate import fresh_noise, sample_latents
from shoestring.sampling.samplers import SAMPLERS, lowered_order, solve
from shoestring.tensors import patchify

# diffusers makes arrays of tensors in a way that NumPy 2 dislikes.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
NOTHING = Conditioning.nothing(2)
SIDE = 8


class Mixture:
    """The exact denoiser of a mixture of two Gaussians, value by value."""

    predicts_all, guidance_input, patch_size = False, False, 1
    shares, means, spreads = (0.4, 0.6), (-0.5, 0.7), (0.3, 0.2)

    def prepare(self, conditioning):
        return conditioning

    def x0(self, xt, alpha, sigma):
        logs, posterior = [], []
        for share, mean, spread in zip(self.shares, self.means, self.spreads, strict=True):
            variance = (alpha * spread) ** 2 + sigma**2
            error = xt - alpha * mean
            logs.append(math.log(share) - 0.5 * variance.log() - error**2 / (2 * variance))
            posterior.append(mean + alpha * spread**2 / variance * error)
        weights = torch.stack(logs).softmax(dim=0)
        return (weights * torch.stack(posterior)).sum(dim=0)

    def __call__(self, xt, level, conditioning, visible_BK=None, path_dropped_B=None):
        return Denoised.whole(self.x0(xt, *level.images()), 1)

    def cdf(self, x, alpha, sigma):
        """Of a value with noise: along the ODE the quantile stays."""
        return sum(
            share * norm.cdf((x - alpha * mean) / math.hypot(alpha * spread, sigma))
            for share, mean, spread in zip(self.shares, self.means, self.spreads, strict=True)
        )


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, SIDE, SIDE, dtype=torch.float64, generator=generator)


def ours(name, grid, x, noise=None, **settings):
    sampling = SamplingConfig(sampler=name, **settings)
    return solve(Mixture(), x, grid, NOTHING, sampling, noise or (lambda step: torch.zeros_like(x)))


# -- orders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "least"),
    [
        *(("euler", 0.9), ("ddim", 0.9), ("heun", 1.8), ("dpmpp-2m", 1.8), ("dpmpp-3m", 2.7)),
        *(("dpmpp-2s", 1.8), ("dpmpp-3s", 2.7), ("unipc", 1.8)),
    ],
)
def test_the_order_of_each_sampler_on_a_mixture(name, least):
    """Between two noise levels above zero, even in lambda; the truth is the ODE's, by its quantiles."""
    process, x = EDMProcess(0.5), torch.linspace(-1.2, 1.2, 16, dtype=torch.float64).view(1, 1, 1, 16)
    # The third-order multistep solver begins with steps of lower order: where they hardly err.
    high, low, coarse = (100.0, 0.25, 96) if name == "dpmpp-3m" else (3.0, 0.25, 48)

    def end(steps):
        settings = SamplingConfig(spacing="log-snr", sigma_max=high, sigma_min=low)
        # One step more to zero is dropped: it is of first order for all.
        grid = process.grid(settings, steps + 1)[:-1]
        if name in ("dpmpp-2s", "dpmpp-3s"):  # their last step stands alone; so give them one of no length
            grid = [*grid, (1.0, low * (1 - 1e-9))]
        return ours(name, grid, high * x)

    def truth():  # bisection for the value at the same quantile
        quantiles = Mixture().cdf((high * x).numpy(), 1.0, high)
        left, right = torch.full_like(x, -20), torch.full_like(x, 20)
        for _ in range(200):
            middle = (left + right) / 2
            below = torch.from_numpy(Mixture().cdf(middle.numpy(), 1.0, low) < quantiles)
            left, right = torch.where(below, middle, left), torch.where(below, right, middle)
        return (left + right) / 2

    exact = truth()
    errors = [(end(steps) - exact).abs().max().item() for steps in (coarse, 2 * coarse)]
    assert errors[1] < 0.02
    assert math.log2(errors[0] / errors[1]) >= least, errors


# -- against diffusers ------------------------------------------------------------------------------------

STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PROCESS = DDPMProcess(noise_table("scaled-linear", 1000, False), "epsilon")


def against(scheduler, steps, x, add=None):
    """diffusers' trajectory with the same denoiser, as it predicts noise for the scheduler's own sigmas."""
    scheduler.set_timesteps(steps)
    table_alpha = scheduler.alphas_cumprod.double().sqrt()
    levels = []
    for time in scheduler.timesteps:
        alpha = table_alpha[int(time)]
        sigma = (1 - alpha**2).sqrt()
        levels.append((alpha.item(), sigma.item()))
        x0 = Mixture().x0(x, alpha, sigma)
        x = scheduler.step((x - alpha * x0) / sigma, time, x, **(add or {})).prev_sample
    return x, levels


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_that_of_diffusers(eta):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(**STABLE, clip_sample=False, timestep_spacing="trailing")
    torch.manual_seed(0)
    added = drawn(5)
    expected, levels = against(theirs, 20, drawn(), {"eta": eta, "variance_noise": added if eta else None})
    found = ours("ddim", [*levels, (1.0, 0.0)], drawn(), lambda step: added, eta=eta)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("steps", [1000, 25])
def test_ddpm_is_that_of_diffusers(steps):
    """Also on strided steps; with noise drawn alike in both."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(**STABLE, clip_sample=False, timestep_spacing="trailing")
    numbers = torch.Generator().manual_seed(3)
    expected, levels = against(theirs, steps, drawn(), {"generator": numbers})
    again = torch.Generator().manual_seed(3)

    def same(step):
        return torch.randn(2, 1, SIDE, SIDE, dtype=torch.float64, generator=again)

    found = ours("ddpm", [*levels, (1.0, 0.0)], drawn(), same)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("steps", [5, 6, 7, 20])
@pytest.mark.parametrize(
    ("name", "scheduler", "settings"),
    [
        ("dpmpp-2m", "DPMSolverMultistepScheduler", {"solver_order": 2}),
        ("dpmpp-2s", "DPMSolverSinglestepScheduler", {"solver_order": 2}),
        ("dpmpp-3s", "DPMSolverSinglestepScheduler", {"solver_order": 3}),
        ("euler", "DPMSolverMultistepScheduler", {"solver_order": 1}),
        ("unipc", "UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}),
    ],
)
def test_dpm_solvers_and_unipc_are_those_of_diffusers(name, scheduler, settings, steps):
    diffusers = pytest.importorskip("diffusers")
    extra = {"lower_order_final": True} if "Singlestep" in scheduler else {}
    theirs = getattr(diffusers, scheduler)(**STABLE, final_sigmas_type="zero", **settings, **extra)
    expected, levels = against(theirs, steps, drawn())
    found = ours(name, [*levels, (1.0, 0.0)], drawn())
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_sde_solver_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DPMSolverMultistepScheduler(
        **STABLE, algorithm_type="sde-dpmsolver++", solver_order=2, final_sigmas_type="zero"
    )
    added = drawn(5)
    expected, levels = against(theirs, 20, drawn(), {"variance_noise": added})
    found = ours("dpmpp-2m-sde", [*levels, (1.0, 0.0)], drawn(), lambda step: added)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("euler", "EulerDiscreteScheduler"),
        ("heun", "HeunDiscreteScheduler"),
        ("euler-ancestral", "EulerAncestralDiscreteScheduler"),
    ],
)
def test_solvers_in_sigma_are_those_of_diffusers(name, scheduler):
    """These schedulers work with alpha = 1; so does the grid."""
    diffusers = pytest.importorskip("diffusers")
    theirs = getattr(diffusers, scheduler)(**STABLE, timestep_spacing="trailing")
    theirs.set_timesteps(12)
    sigmas = list(dict.fromkeys(theirs.sigmas.tolist()))
    x = start = sigmas[0] * drawn()
    torch.manual_seed(4)
    for time, sigma in zip(theirs.timesteps, theirs.sigmas.double(), strict=False):
        if sigma == 0:
            break
        x0 = Mixture().x0(x, torch.ones((), dtype=torch.float64), sigma)
        theirs.scale_model_input(x, time)
        x = theirs.step((x - x0) / sigma, time, x).prev_sample
    torch.manual_seed(4)
    numbers = [torch.randn(2, 1, SIDE, SIDE, dtype=torch.float64) for _ in sigmas]
    found = ours(name, [(1.0, sigma) for sigma in sigmas], start, lambda step: numbers[step])
    assert (found - x).abs().max() <= 1e-4 * x.abs().max()


def test_full_fresh_noise_is_one_sampler_under_three_names():
    grid = PROCESS.grid(SamplingConfig(), 9)
    added = drawn(2)
    found = [
        ours(name, grid, drawn(), lambda step: added, **more)
        for name, more in (("ddpm", {}), ("euler-ancestral", {}), ("ddim", {"eta": 1.0}))
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_fresh_noise_of_a_picture_does_not_depend_on_its_batch():
    many = fresh_noise(7, [0, 1, 2, 3], (3, 4, 4))
    one = fresh_noise(7, [2], (3, 4, 4))
    assert torch.equal(many(5)[2:3], one(5))
    assert not torch.equal(many(5), many(6))


# -- the process ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "scaled-linear", "cosine"])
@pytest.mark.parametrize("zero", [False, True])
def test_the_tables_are_those_of_diffusers(schedule, zero):
    diffusers = pytest.importorskip("diffusers")
    kinds = {
        "linear": {"beta_schedule": "linear"},
        "scaled-linear": STABLE,
        "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    }
    theirs = diffusers.DDIMScheduler(**kinds[schedule], rescale_betas_zero_snr=zero)
    found = noise_table(schedule, 1000, zero)
    assert torch.allclose(found.float(), theirs.alphas_cumprod.sqrt(), atol=2e-5)
    assert (found[-1] == 0) == zero


class Oracle:
    """A network that knows the mixture and predicts what it is asked for; it notes the times it sees."""

    predicts_all, guidance_input, patch_size, in_channels = False, False, 1, 1

    def __init__(self, process):
        self.process, self.times = process, []

    def prepare(self, conditioning):
        return conditioning

    def __call__(self, x, time_B, conditioning, visible_BK=None, path_dropped_B=None):
        self.times += time_B.tolist()
        place = time_B.round().long()
        alpha, sigma = (
            t[place].to(x).view(-1, 1, 1, 1) for t in (self.process.alpha_T, self.process.sigma_T)
        )
        x0 = Mixture().x0(x, alpha, sigma)
        noise = (x - alpha * x0) / sigma
        out = {"epsilon": noise, "v": alpha * noise - sigma * x0, "x0": x0}[self.process.prediction]
        return NetworkOutput(patchify(out, 1))


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_every_prediction_gives_the_same_picture_and_whole_timesteps(prediction):
    process = DDPMProcess(noise_table("linear", 1000, False), prediction)
    network = Oracle(process)
    sampling = SamplingConfig(sampler="dpmpp-2m", steps=12, guidance=1)
    found = sample_latents(process.denoiser(network), process, NOTHING, drawn(), sampling)
    exact = ours("dpmpp-2m", process.grid(sampling, 12), process.grid(sampling, 12)[0][1] * drawn())
    assert torch.allclose(found, exact, atol=1e-8)
    assert all(time == int(time) for time in network.times)
    assert network.times[0] == 999


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_zero_terminal_snr_is_finite_everywhere(prediction):
    process = DDPMProcess(noise_table("scaled-linear", 1000, True), prediction)
    sampling = SamplingConfig(sampler="ddim", steps=8, guidance=1)
    assert process.grid(sampling, 8)[0] == (0.0, 1.0)
    x = sample_latents(process.denoiser(Oracle(process)), process, NOTHING, drawn(), sampling)
    assert x.isfinite().all()
    level = NoiseLevel(torch.tensor([0.0, 0.5]), torch.tensor([1.0, 0.75**0.5]))
    assert process.weight(level).isfinite().all()


def test_the_training_loss_is_that_of_the_noise():
    """weight (x0 - x0_hat)^2 is (noise - noise_hat)^2 for epsilon, (v - v_hat)^2 for v."""
    for prediction in ("epsilon", "v", "x0"):
        process = DDPMProcess(noise_table("cosine", 1000, False), prediction)
        level = process.level_from_normal(torch.tensor([-1.0, 0.0, 1.5]), NoiseConfig())
        c = process.coefficients(level)
        error = 0.1  # of what the network predicts
        assert torch.allclose(process.weight(level) * (c.out_B * error) ** 2, torch.full((3,), error**2))


def test_training_takes_every_timestep_equally_often():
    process = DDPMProcess(noise_table("linear", 10, False), "epsilon")
    normal = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    place = process.coefficients(process.level_from_normal(normal, NoiseConfig())).time_B
    counts = torch.bincount(place.long(), minlength=10)
    assert counts.min() > 1_800
    assert counts.max() < 2_200


# -- grids ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("steps", [4, 10, 50])
def test_timesteps_are_those_of_diffusers(spacing, steps):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(**STABLE, timestep_spacing=spacing, steps_offset=1)
    theirs.set_timesteps(steps)
    grid = PROCESS.grid(SamplingConfig(spacing=spacing), steps)
    expected = [PROCESS.alpha_T[int(time)].item() for time in theirs.timesteps]
    assert [alpha for alpha, _ in grid[:-1]] == expected
    assert grid[-1] == (1.0, 0.0)


@pytest.mark.parametrize("process", [PROCESS, EDMProcess(0.5), FlowProcess(2.0)])
@pytest.mark.parametrize("spacing", ["rho", "log-snr", "table", "trailing", "uniform", "leading"])
def test_every_grid_falls_to_zero(process, spacing):
    sampling = SamplingConfig(spacing=spacing)
    if isinstance(process, EDMProcess) and spacing in ("trailing", "uniform", "leading"):
        with pytest.raises(UserError, match=r"sampling\.spacing .* no timesteps"):
            process.grid(sampling, 5)
        return
    for steps in (1, 2, 7):
        grid = process.grid(sampling, steps)
        ratios = [sigma / max(alpha, 1e-9) for alpha, sigma in grid]
        assert len(grid) == steps + 1
        assert grid[-1] == (1.0, 0.0)
        assert all(a > b for a, b in zip(ratios, ratios[1:], strict=False))


def test_the_table_of_ten_steps_is_itself():
    grid = EDMProcess(0.5).grid(SamplingConfig(spacing="table"), 10)
    published = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152)
    assert [sigma for _, sigma in grid[:-1]] == pytest.approx(published)


# -- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("sampling: {steps: 0}", r"sampling\.steps is 0; it must be a whole number of at least 1"),
        ("sampling: {spacing: table, sigmas: [3, 5]}", r"sigmas goes from 3 to 5 at place 1"),
        ("sampling: {spacing: table, sigmas: [3]}", r"sigmas has 1 values"),
        ("sampling: {sigmas: [5, 3]}", r"sigmas is set, but spacing is auto"),
        ("sampling: {eta: 0.5}", r"eta is 0\.5, but only sampler=ddim"),
        ("process: {kind: ddpm, zero_terminal_snr: true}", r"prediction is epsilon and zero_terminal_snr"),
    ],
)
def test_wrong_settings_are_a_sentence(settings, sentence):
    stage = "stages: [{name: a, nimg: 8, lr: 1e-3}]"
    with pytest.raises(UserError, match=sentence):
        parse_yaml(f"name: x\n{stage}\n{settings}\n")


def test_more_steps_than_timesteps_are_refused():
    process = build_process(ProcessConfig(kind="ddpm", timesteps=10), None)
    assert len(process.grid(SamplingConfig(), 10)) == 11
    with pytest.raises(UserError, match=r"sampling\.steps is 11, but the process has 10 timesteps"):
        process.grid(SamplingConfig(), 11)
    with pytest.raises(UserError, match=r"sampling\.steps is 10, but"):
        process.grid(SamplingConfig(spacing="leading"), 10)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"spacing": "rho", "sigma_min": 20.0}, "so the grid would rise"),
        ({"spacing": "log-snr", "sigma_max": 0.01, "sigma_min": 0.001}, "so the grid would rise"),
        ({"spacing": "table", "sigmas": (500.0, 3.0, 0.1)}, "leave out what is beyond them"),
    ],
)
def test_grids_beyond_what_was_trained_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        PROCESS.grid(SamplingConfig(**settings), 8)


def test_an_order_above_the_steps_is_lowered_and_said():
    assert lowered_order(SamplingConfig(sampler="dpmpp-3m", steps=3)) == (
        "dpmpp-3m is of order 3, but with 3 steps it reaches order 2 (the last step is of order 1)"
    )
    for name, sampler in SAMPLERS.items():
        assert lowered_order(SamplingConfig(sampler=name, steps=sampler.order + 1)) is None


@pytest.mark.parametrize("name", ["dpmpp-2m", "dpmpp-3m", "dpmpp-2s", "dpmpp-3s", "unipc"])
def test_what_is_said_of_the_order_is_what_happens(name):
    """With two steps all are Euler; with three those of third order are those of second."""
    process = EDMProcess(0.5)

    def made(sampler, steps):
        grid = process.grid(SamplingConfig(), steps)
        return ours(sampler, grid, grid[0][1] * drawn())

    assert torch.allclose(made(name, 2), made("euler", 2), atol=1e-10)
    assert "reaches order 1" in lowered_order(SamplingConfig(sampler=name, steps=2))
    if name in ("dpmpp-3m", "dpmpp-3s"):
        assert torch.allclose(made(name, 3), made(name.replace("3", "2"), 3), atol=1e-10)
    else:
        assert lowered_order(SamplingConfig(sampler=name, steps=3)) is None
        assert not torch.allclose(made(name, 3), made("euler", 3), atol=1e-4)
