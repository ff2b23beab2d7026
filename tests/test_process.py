"""Noise processes: identities, published grids, the loss against its definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shoestring.config import NoiseConfig, ProcessConfig, SamplingConfig
from shoestring.diffusion.losses import denoising_loss
from shoestring.diffusion.process import EDMProcess, FlowProcess, build_process
from shoestring.interfaces import Conditioning, NetworkOutput, NoiseLevel
from shoestring.tensors import gather_tokens, patchify, visible_from_noise

PROCESSES = [EDMProcess(0.7), FlowProcess(1.0), FlowProcess(3.0)]


class Echo(nn.Module):
    """A network that returns a fixed image, and remembers what it was given."""

    patch_size, in_channels, predicts_all, guidance_input = 2, 3, False, False

    def __init__(self, output):
        super().__init__()
        self.output = output

    def prepare(self, conditioning):
        return conditioning

    def forward(self, x, time_B, conditioning, visible_BK=None, path_dropped_B=None):
        self.x, self.time_B = x, time_B
        tokens = patchify(self.output, self.patch_size)
        return NetworkOutput(tokens if visible_BK is None else gather_tokens(tokens, visible_BK), visible_BK)


def captions(batch):
    return Conditioning(torch.zeros(batch, 1, 4))


def levels(process, count=64):
    normal = torch.linspace(-3, 3, count, dtype=torch.float64)
    return process.level_from_normal(normal, NoiseConfig(mean=-0.4, std=1.0))


@pytest.mark.parametrize("process", PROCESSES)
def test_x0_survives_noise_and_the_right_network_output(process):
    """The output that the training target asks for gives back x0: round trip in float64."""
    level = levels(process)
    x0 = torch.randn(64, 3, 4, 4, dtype=torch.float64)
    xt = process.add_noise(x0, torch.randn_like(x0), level)
    c = process.coefficients(level)
    target = (x0 - c.skip_B[:, None, None, None] * xt) / c.out_B[:, None, None, None]
    denoised = process.denoiser(Echo(target))(xt, level, captions(64)).image()
    assert (denoised - x0).abs().max() < 1e-12


@pytest.mark.parametrize("process", PROCESSES)
def test_flow_weight_is_the_velocity_loss_and_edm_weight_the_raw_loss(process):
    """weight (D - x0)^2 = (F - target)^2, whatever the process."""
    level = levels(process)
    c = process.coefficients(level)
    assert torch.allclose(process.weight(level) * c.out_B**2, torch.ones(64, dtype=torch.float64))
    if isinstance(process, FlowProcess):
        x0, noise = torch.randn(2, 64, 3, 4, 4, dtype=torch.float64)
        xt = process.add_noise(x0, noise, level)
        velocity = torch.randn_like(x0)
        loss = denoising_loss(process, process.denoiser(Echo(velocity)), x0, noise, level, captions(64))
        assert torch.allclose(loss, (velocity - (noise - x0)).square().mean(dim=(1, 2, 3)))
        assert torch.allclose(xt - level.sigma_B[:, None, None, None] * (noise - x0), x0)


def test_network_input_has_unit_variance_at_every_level():
    process = EDMProcess(0.7)
    generator = torch.Generator().manual_seed(0)
    for ratio in (0.01, 0.7, 30.0):
        level = process.level_at(torch.full((4000,), ratio))
        x0 = 0.7 * torch.randn(4000, 3, 4, 4, generator=generator)
        noise = torch.randn(4000, 3, 4, 4, generator=generator)
        echo = Echo(x0)
        process.denoiser(echo)(process.add_noise(x0, noise, level), level, captions(4000))
        assert echo.x.std().item() == pytest.approx(1, abs=0.02)
        assert echo.time_B[0].item() == pytest.approx(math.log(ratio) / 4, abs=1e-6)


def test_edm_at_another_scale_is_edm_of_the_scaled_image():
    """alpha and sigma times 0.3 is the same picture, only darker."""
    process, x0 = EDMProcess(0.7), torch.randn(5, 3, 4, 4, dtype=torch.float64)
    ones = torch.ones(5, dtype=torch.float64)
    xt = torch.randn_like(x0)
    a = process.denoiser(Echo(x0))(xt, NoiseLevel(ones, 2 * ones), captions(5)).image()
    b = process.denoiser(Echo(x0))(0.3 * xt, NoiseLevel(0.3 * ones, 0.6 * ones), captions(5)).image()
    assert torch.allclose(a, b)


def test_zero_terminal_snr_is_finite():
    level = NoiseLevel(torch.zeros(2), torch.ones(2))
    for process in PROCESSES:
        c = process.coefficients(level)
        assert all(v.isfinite().all() for v in (c.skip_B, c.out_B, c.in_B, c.time_B))
        assert process.weight(level).isfinite().all()


def test_published_sigma_grid():
    """Values of the released sampler (specification, section 1.11)."""
    sigmas = [sigma for _, sigma in EDMProcess(0.9).grid(SamplingConfig(), 18)]
    published = [80, 57.586, 40.7856, 28.3746, 19.3525, 12.9101, 8.40094, 5.31519, 3.25682, 1.92334]
    published += [1.08817, 0.585348, 0.296442, 0.139516, 0.0599473, 0.0229345, 0.00752802, 0.002, 0]
    assert sigmas == pytest.approx(published, rel=2e-5)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_grids_fall_from_noise_to_clean(process, steps):
    grid = process.grid(SamplingConfig(), steps)
    ratios = [sigma / max(alpha, 1e-12) for alpha, sigma in grid]
    assert len(grid) == steps + 1
    assert grid[-1] == (1.0, 0.0)
    assert ratios == sorted(ratios, reverse=True)
    assert all(math.isfinite(v) for pair in grid for v in pair)


@pytest.mark.parametrize("process", PROCESSES)
def test_level_at_has_the_ratio(process):
    ratio = torch.tensor([0.1, 1.0, 20.0])
    level = process.level_at(ratio)
    assert torch.allclose(level.sigma_B / level.alpha_B, ratio)


def test_masked_loss_is_the_released_average_over_kept_patches():
    """Mean over channels, average pool by patch, mean over kept patches, mean over the batch."""
    process, generator = EDMProcess(0.5), torch.Generator().manual_seed(0)
    x0, noise, output = torch.randn(3, 6, 3, 8, 8, generator=generator)
    level = process.level_from_normal(torch.randn(6, generator=generator), NoiseConfig())
    visible = visible_from_noise(torch.rand(6, 16, generator=generator), 0.75)
    denoiser = process.denoiser(Echo(output))
    ours = denoising_loss(process, denoiser, x0, noise, level, captions(6), visible)

    full = denoiser(process.add_noise(x0, noise, level), level, captions(6)).image()
    squared = process.weight(level)[:, None, None, None] * (full - x0) ** 2
    pooled = F.avg_pool2d(squared.mean(dim=1, keepdim=True), 2).flatten(1)
    kept = torch.zeros(6, 16).scatter(1, visible, 1.0)
    expected = (pooled * kept).sum(1) / kept.sum(1)
    assert torch.allclose(ours, expected, rtol=1e-5)
    dense = denoising_loss(process, denoiser, x0, noise, level, captions(6))
    assert torch.allclose(dense, squared.mean(dim=(1, 2, 3)), rtol=1e-5)


def test_sigma_data_is_measured_or_configured_never_assumed():
    assert build_process(ProcessConfig(), 0.6).sigma_data == 0.6
    assert build_process(ProcessConfig(sigma_data=0.9), 0.6).sigma_data == 0.9
    with pytest.raises(ValueError, match="sigma_data"):
        build_process(ProcessConfig(), None)
    assert isinstance(build_process(ProcessConfig(kind="flow"), None), FlowProcess)
