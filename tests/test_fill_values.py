"""Parity with the published check sums of the released code (specification, section 1.11)."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from torch import Tensor

from parity import check
from shoestring.config import NoiseConfig, SamplingConfig, TransformerConfig
from shoestring.diffusion.losses import denoising_loss
from shoestring.diffusion.process import EDMProcess
from shoestring.interfaces import Conditioning, NoiseLevel
from shoestring.models.layers import TimeEmbedding, sincos_positions
from shoestring.models.microdit import MicroDiT
from shoestring.sampling.guidance import GuidedDenoiser
from shoestring.sampling.solvers import heun
from shoestring.tensors import visible_from_noise

# ----------------------------------------------- published check sums (specification, section 1.11)


def fill(key: str, *shape: int) -> Tensor:
    """Deterministic numbers in [-0.5, 0.5) from a key."""
    h = np.arange(int(np.prod(shape)), dtype=np.uint32)
    h *= np.uint32(2654435761)
    h += np.uint32(zlib.crc32(key.encode()))
    h ^= h >> 16
    h *= np.uint32(2246822519)
    h ^= h >> 13
    # h / 2**32 - 0.5 is the signed reading of h with its top bit flipped, over 2**32
    return (torch.from_numpy((h ^ np.uint32(2**31)).view(np.int32)).float() / 2**32).reshape(shape)


def test_fill():
    expected = torch.tensor([-0.071004994, -0.039305802, -0.400883906, 0.357589236])
    torch.testing.assert_close(fill("a", 4), expected)


@pytest.fixture(scope="module")
def tiny2() -> MicroDiT:
    with torch.device("meta"):  # saves drawing 200 million numbers
        model = MicroDiT(TransformerConfig())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            u = fill(name, *parameter.shape)
            parameter.copy_(1 + 0.2 * u if parameter.ndim == 1 and name.endswith(".weight") else 0.1 * u)
    return model.requires_grad_(False)


X = 12**0.5 * fill("input:x", 2, 4, 32, 32)
TEXT = Conditioning(12**0.5 * fill("input:y", 2, 1, 77, 1024)[:, 0])
TIME = torch.tensor([-1.25, 0.75])


def assert_summary(
    tensor: Tensor, mean: float, std: float, total: float, *first: float, tolerance: float = 1e-5
) -> None:
    """Compare mean, standard deviation, sum of absolute values and the first numbers."""
    flat = tensor.flatten().double()
    expected = pytest.approx(first, rel=10 * tolerance, abs=tolerance * std)
    assert flat[: len(first)].tolist() == expected
    assert flat.mean().item() == pytest.approx(mean, abs=tolerance * std)
    assert [flat.std().item(), flat.abs().sum().item()] == pytest.approx([std, total], rel=tolerance)


def test_fill_values_of_the_embeddings(tiny2):
    assert_summary(
        tiny2.t_embedder(TIME),
        *(5.040493e-3, 0.1697774, 136.7281),
        *(0.00593836, 0.151707, 0.436786, -0.141268),
    )
    y = tiny2.y_embedder(TEXT.text_BSD)
    assert_summary(y, -2.284125e-3, 0.6557217, 41269.93, -0.475717, 0.226664, 1.721, -0.943972)
    y = tiny2.y_emb_preprocess(y, None)
    assert_summary(y, -4.808736e-3, 0.7145356, 44959.01, -0.57792, -0.00976406, 1.44327, -1.27665)
    pooled = tiny2.pooled_y_emb_process(y.mean(dim=1))
    assert_summary(pooled, 3.447393e-2, 0.6577908, 544.8208, 0.186035, -0.330064, -1.36091, 0.718562)
    x = tiny2.x_embedder(X)
    x = x + tiny2.positions((16, 16), x)
    assert_summary(x, 0.4557346, 0.5534433, 153620.4, -0.0598691, 0.0950346, 0.192323, -0.0744005)


def test_fill_values_of_the_output(tiny2):
    bare = check.BareNetwork(1.0).denoiser(tiny2)
    level = NoiseLevel(torch.ones(2), TIME)
    out = bare(X, level, TEXT).image()
    assert_summary(out, 7.490607e-2, 0.7219319, 4778.512, -1.83294, -1.15464, -1.84275, -1.03542)
    noise = torch.rand(2, 256, generator=torch.Generator().manual_seed(0))
    visible = visible_from_noise(noise, 0.75)
    dropped = torch.ones(2, 256).scatter(1, visible, 0.0)
    assert dropped[0, :16].tolist() == [1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1]
    assert_summary(bare(X, level, TEXT, visible).image(), 1.964876e-2, 0.3639560, 1197.258)
    out = GuidedDenoiser(bare, SamplingConfig(guidance=3.0))(X, level, TEXT).image()
    assert_summary(out, -7.459379e-3, 2.198971, 14661.11, -3.77497, -3.46442, -3.70453, -3.22013)


def test_fill_values_of_denoiser_and_sampler(tiny2):
    process = EDMProcess(0.9)
    denoiser = process.denoiser(tiny2)
    out = denoiser(X, NoiseLevel(torch.ones(2), torch.full((2,), 2.0)), TEXT).image()
    assert_summary(out, 5.414186e-2, 0.6240144, 4124.312, -1.35944, -1.16636, -1.88165, -1.13282)
    guided = GuidedDenoiser(denoiser, SamplingConfig(guidance=2.0))
    text = guided.prepare(Conditioning(TEXT.text_BSD[:1]))
    out = heun(guided, X[:1] * 80, process.grid(SamplingConfig(), 3), text)
    # Five guided calls in float32 add up: the reference itself is as far off
    numbers = (9.172186e-2, 5.498203, 18495.67, -1.5771, -5.64846, -14.1411, -6.50228)
    assert_summary(out, *numbers, tolerance=5e-5)


@pytest.mark.parametrize(("mask_ratio", "expected"), [(0.0, 1.6968898), (0.75, 1.6570340)])
def test_fill_values_of_the_loss(tiny2, mask_ratio, expected):
    g = torch.Generator().manual_seed(0)
    normal, noise = torch.randn(2, 1, 1, 1, generator=g), torch.randn(X.shape, generator=g)
    visible = visible_from_noise(torch.rand(2, 256, generator=g), mask_ratio)
    process = EDMProcess(0.9)
    level = process.level_from_normal(normal.flatten(), NoiseConfig(mean=-0.6, std=1.2))
    loss = denoising_loss(process, process.denoiser(tiny2), X, noise, level, TEXT, visible).mean()
    assert loss.item() == pytest.approx(expected, rel=2e-6)


def test_closed_form_values():
    small, large = sincos_positions(512, (16, 16), 1.0), sincos_positions(1024, (32, 32), 2.0)
    torch.testing.assert_close(small[17, :3], torch.tensor([0.84147098, 0.8019618, 0.76172041]))
    torch.testing.assert_close(small[17, 128:130], torch.tensor([0.54030231, 0.59737533]))
    torch.testing.assert_close(large[35, :3], torch.tensor([0.99749499, 0.99234608, 0.98473729]))
    torch.testing.assert_close(large[35, 512:515], torch.tensor([0.47942554, 0.46384534, 0.44867843]))
    assert large.double().abs().sum().item() == pytest.approx(589768.0646, abs=1e-2)

    embedding = TimeEmbedding(512)
    with torch.no_grad():
        embedding.mlp[0].weight.copy_(torch.eye(512))
        embedding.mlp[0].bias.zero_()
    features = []
    embedding.mlp[0].register_forward_hook(lambda module, inputs, output: features.append(inputs[0]))
    embedding(torch.tensor([-1.25]))
    torch.testing.assert_close(features[0][0, :3], torch.tensor([0.31532237, 0.35692066, 0.39638990]))
    torch.testing.assert_close(features[0][0, 256:259], torch.tensor([-0.94898462, -0.93413472, -0.91808224]))

    process = EDMProcess(0.9)
    eighteen = [sigma for _, sigma in process.grid(SamplingConfig(), 18)]
    assert eighteen == pytest.approx(
        [80, 57.586, 40.7856, 28.3746, 19.3525, 12.9101, 8.40094, 5.31519, 3.25682, 1.92334, 1.08817]
        + [0.585348, 0.296442, 0.139516, 0.0599473, 0.0229345, 0.00752802, 0.002, 0],
        rel=1e-5,
    )
    thirty = [sigma for _, sigma in process.grid(SamplingConfig(), 30)]
    assert thirty[:4] == pytest.approx([80, 66.1014, 54.3261, 44.3966], rel=1e-5)
    assert thirty[-5:] == pytest.approx([0.0178059, 0.00924233, 0.0044827, 0.002, 0], rel=1e-5)
