"""Guidance by a prediction that lacks the condition, some of the tokens, or the sparse path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shoestring.config import (
    DecoderConfig,
    ExpertsConfig,
    MixerConfig,
    SamplingConfig,
    TokensConfig,
    TransformerConfig,
)
from shoestring.diffusion.process import EDMProcess, FlowProcess, NetworkDenoiser, Process
from shoestring.interfaces import Conditioning, NoiseLevel
from shoestring.models.files import FAMILIES
from shoestring.runtime import UserError, stream
from shoestring.sampling.generate import sample_latents
from shoestring.sampling.guidance import GuidedDenoiser, LeftOut

PROCESSES = [EDMProcess(0.6), FlowProcess(1.0)]
GRID, BATCH = (4, 3), 2
LENGTH = GRID[0] * GRID[1]
METHODS = ["tread", "sprint", "maskdit"]


class Counting(NetworkDenoiser):
    """Remembers how many tokens and samples each call had."""

    def __init__(self, process: Process, network: torch.nn.Module) -> None:
        super().__init__(process, network, torch.float32)
        self.calls: list[tuple[int, int]] = []

    def __call__(self, xt, level, conditioning, visible_BK=None, path_dropped_B=None):
        self.calls.append((len(xt), LENGTH if visible_BK is None else visible_BK.shape[1]))
        return super().__call__(xt, level, conditioning, visible_BK, path_dropped_B)


def denoiser(method: str = "tread", process: Process = PROCESSES[0], condition: str = "class") -> Counting:
    model = TransformerConfig(
        in_channels=3,
        condition=condition,
        classes=3,
        caption_dim=8,
        dim=32,
        depth=4,
        head_dim=16,
        ffn_multiple_of=16,
        mixer=MixerConfig(depth=1, dim=32),
        decoder=DecoderConfig(depth=1 if method == "maskdit" else 0, dim=16, head_dim=8),
        experts=ExpertsConfig(count=2),
    )
    tokens = TokensConfig(method=method, first=1, last=-1)
    network = FAMILIES["microdit"](model, tokens).double()
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=stream(0, "test", i)))
    return Counting(process, network)


def condition_of(kind: str = "class") -> Conditioning:
    if kind == "text":
        return Conditioning(torch.randn(BATCH, 5, 8, generator=stream(1, "t"), dtype=torch.float64))
    return Conditioning(class_B=torch.tensor([2, 0]))


def noisy() -> Tensor:
    return torch.randn(BATCH, 3, 2 * GRID[0], 2 * GRID[1], generator=stream(2, "x"), dtype=torch.float64)


def level(process: Process, ratio: float = 1.5) -> NoiseLevel:
    return process.level_at(torch.full((BATCH,), ratio, dtype=torch.float64))


LEFT_OUT = LeftOut(torch.rand(BATCH, LENGTH, generator=stream(3, "tokens")), "random", GRID)


def guided(inner: Counting, **sampling) -> Tensor:
    settings = SamplingConfig(**{"guidance": 2.5} | sampling)
    outer = GuidedDenoiser(inner, settings, None, LEFT_OUT)
    with torch.no_grad():
        return outer(noisy(), level(inner.process), condition_of()).image()


def plain(inner: Counting, condition: Conditioning, ratio: float) -> Tensor:
    with torch.no_grad():
        return inner(noisy(), level(inner.process), condition, LEFT_OUT.visible(ratio)).image()


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("weak", "strong_ratio", "weak_ratio"),
    [
        ("tokens", 0.0, 0.5),  # sparse guidance, two rates of which one is zero
        ("tokens", 0.25, 0.75),
        ("both", 0.0, 0.5),
        ("both", 0.0, 1.0),  # path drop
        ("tokens", 0.25, 1.0),
        ("condition", 0.25, 0.9),  # the weak rate plays no part
    ],
)
def test_guided_is_a_line_from_weak_to_strong(process, method, weak, strong_ratio, weak_ratio):
    inner, condition = denoiser(method, process), condition_of()
    result = guided(inner, weak=weak, strong_ratio=strong_ratio, weak_ratio=weak_ratio)
    strong = plain(inner, condition, strong_ratio)
    empty = condition if weak == "tokens" else condition.null()
    away = plain(inner, empty, strong_ratio if weak == "condition" else weak_ratio)
    assert (strong - away).abs().max() > 0.01
    assert torch.allclose(result, away + 2.5 * (strong - away), atol=1e-10)


def test_path_drop_is_the_network_without_its_sparse_path():
    inner, condition = denoiser("sprint"), condition_of()
    with torch.no_grad():
        everything = torch.ones(BATCH, dtype=torch.bool)
        dropped = inner(noisy(), level(inner.process), condition, None, everything).image()
    assert torch.allclose(plain(inner, condition, 1.0), dropped, atol=1e-12)


def test_a_weak_prediction_that_is_not_weaker_is_refused():
    settings = SamplingConfig(weak="tokens", strong_ratio=0.5, weak_ratio=0.5)
    with pytest.raises(UserError, match=r"weak_ratio is 0.5 and sampling.strong_ratio is 0.5"):
        GuidedDenoiser(denoiser(), settings, None, LEFT_OUT)


@pytest.mark.parametrize("kind", ["text", "class"])
def test_equal_predictions_guide_nowhere(kind):
    """Two rates that leave out as many of 12 tokens: whatever the scale."""
    inner = denoiser(condition=kind)
    settings = SamplingConfig(guidance=7.0, weak="tokens", strong_ratio=0.45, weak_ratio=0.5)
    with torch.no_grad():
        both = [
            GuidedDenoiser(inner, s, None, LEFT_OUT)(
                noisy(), level(inner.process), condition_of(kind)
            ).image()
            for s in (settings, settings.model_copy(update={"guidance": 1.0}))
        ]
    assert torch.allclose(*both, atol=1e-10)


@pytest.mark.parametrize(
    ("sampling", "calls"),
    [
        ({"guidance": 1.0, "weak": "tokens"}, [(BATCH, 12)]),
        ({"guidance": 0.0, "weak": "tokens", "weak_ratio": 0.75}, [(BATCH, 3)]),
        ({"guidance": 0.0, "strong_ratio": 0.5, "weak_ratio": 0.75}, [(BATCH, 6)]),
        ({"guidance": 3.0, "weak": "tokens", "weak_ratio": 0.75}, [(BATCH, 12), (BATCH, 3)]),
        ({"guidance": 3.0, "weak": "both", "weak_ratio": 1.0}, [(BATCH, 12), (BATCH, 0)]),
        ({"guidance": 3.0}, [(2 * BATCH, 12)]),
        ({"guidance": 3.0, "strong_ratio": 0.5}, [(2 * BATCH, 6)]),
        ({"guidance": 3.0, "weak": "tokens", "guidance_interval": (0.1, 1.0)}, [(BATCH, 12)]),
        ({"guidance": 3.0, "weak": "tokens", "guidance_interval": (0.1, 2.0)}, [(BATCH, 12), (BATCH, 6)]),
    ],
)
def test_calls_and_the_tokens_they_cost(sampling, calls):
    inner = denoiser()
    guided(inner, **sampling)
    assert inner.calls == calls


def test_nothing_to_leave_out_costs_one_call():
    inner = denoiser(condition="none")
    settings = SamplingConfig(guidance=5.0)
    with torch.no_grad():
        nothing = Conditioning.nothing(BATCH)
        result = GuidedDenoiser(inner, settings)(noisy(), level(inner.process), nothing).image()
    assert inner.calls == [(BATCH, LENGTH)]
    assert torch.equal(result, plain(inner, nothing, 0.0))


@pytest.mark.parametrize("process", PROCESSES)
def test_tokens_are_the_same_at_all_steps_and_in_every_batch(process):
    """A picture depends on its own token noise and not on its neighbours."""
    inner, sampling = denoiser(process=process), SamplingConfig(steps=3, weak="both", sigma_max=5.0)
    noise = noisy()
    together = sample_latents(inner, process, condition_of(), noise, sampling, left_out=LEFT_OUT)
    assert together.isfinite().all()
    for i in range(BATCH):
        rows = slice(i, i + 1)
        alone = LeftOut(LEFT_OUT.noise_BL[rows], "random", GRID)
        condition = condition_of().part(rows)
        single = sample_latents(inner, process, condition, noise[rows], sampling, left_out=alone)
        assert torch.allclose(single, together[rows], atol=1e-8)


@pytest.mark.parametrize("method", ["dense", "naive", "deferred"])
@pytest.mark.parametrize("sampling", [{"weak": "tokens"}, {"weak": "both"}, {"strong_ratio": 0.1}])
def test_models_that_predict_visible_patches_only_cannot_leave_any_out(method, sampling):
    with pytest.raises(UserError, match="this model predicts only the tokens it sees"):
        guided(denoiser(method), **sampling)


def test_a_negative_prompt_needs_a_prediction_that_looks_at_it():
    settings = SamplingConfig(weak="tokens")
    with pytest.raises(UserError, match=r"negative prompt is given, but sampling\.weak=tokens"):
        GuidedDenoiser(denoiser(), settings, condition_of().null(), LEFT_OUT)
    GuidedDenoiser(denoiser(), settings.model_copy(update={"weak": "both"}), condition_of().null(), LEFT_OUT)
