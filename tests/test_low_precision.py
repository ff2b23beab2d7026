"""Weights cast once a step: the same gradients, bit for bit, as those of autocast."""

from __future__ import annotations

import pytest
import torch

from shoestring.config import DecoderConfig, ExpertsConfig, MixerConfig, TokensConfig, TransformerConfig
from shoestring.diffusion.losses import denoising_loss
from shoestring.diffusion.process import EDMProcess
from shoestring.interfaces import Conditioning
from shoestring.models.files import FAMILIES
from shoestring.runtime import Workers, stream
from shoestring.tensors import visible_from_noise
from shoestring.training.low_precision import LowPrecisionWeights, add_gradients, kept_whole

SMALL = TransformerConfig(
    in_channels=3,
    caption_dim=8,
    classes=5,
    dim=32,
    depth=4,
    head_dim=16,
    ffn_multiple_of=16,
    mixer=MixerConfig(depth=2, dim=48),
    experts=ExpertsConfig(count=4),
)
MASKDIT = {"kind": "maskdit", "experts": ExpertsConfig(count=0), "decoder": DecoderConfig(depth=1, dim=24)}


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({}, "deferred"),
        ({"bias": True, "mask_captions": True}, "sprint"),
        ({"condition": "class", **MASKDIT, "decoder": DecoderConfig(depth=1, dim=24, head_dim=8)}, "maskdit"),
        ({"condition": "none"}, "naive"),
        ({"checkpoint_activations": True}, "tread"),
    ],
    ids=["deferred", "sprint", "maskdit", "naive", "tread"],
)
def test_same_bits_as_autocast(changes, method):
    model = SMALL.model_copy(update=changes)
    tokens = TokensConfig(method=method, first=1, last=-1)
    network = FAMILIES[model.kind](model, tokens)
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=stream(0, "test", i)))
    process = EDMProcess(0.5)
    denoiser = process.denoiser(network, torch.bfloat16)
    generator = stream(0, "data")
    x0, noise = (torch.randn(4, 3, 8, 8, generator=generator) for _ in range(2))
    visible = visible_from_noise(torch.rand(4, 16, generator=generator), 0.5)
    text, dropped = torch.randn(4, 6, 8, generator=generator), torch.tensor([True, False, False, True])

    def gradients(part: slice, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        condition = Conditioning(text[part], torch.ones(2, 6, dtype=torch.bool))
        if model.condition != "text":
            condition = Conditioning(class_B=torch.tensor([1, -1]))
        level = process.level_at(torch.tensor([0.3, 2.0]))
        paths = dropped[part] if method == "sprint" else None
        loss = denoising_loss(
            process, denoiser, x0[part], noise[part], level, condition, visible[part], paths, tokens
        )
        return list(torch.autograd.grad(loss.mean(), weights, materialize_grads=True))

    parts = [slice(0, 2), slice(2, 4)]
    masters = list(network.parameters())
    cast_anew = [gradients(part, masters) for part in parts]
    expected = [a + b for a, b in zip(*cast_anew, strict=True)]
    low = LowPrecisionWeights(network, torch.bfloat16)
    for _ in range(2):
        with low.used(), Workers(2) as workers:
            total = add_gradients(None, workers.map(lambda part: gradients(part, low.leaves), parts))
        assert [id(p) for p in network.parameters()] == [id(p) for p in masters]
        for name, a, b in zip(dict(network.named_parameters()), total, expected, strict=True):
            assert a.dtype == torch.float32
            assert torch.equal(a, b), name
        # The next step sees what the weights have become.
        with torch.no_grad():
            for parameter in masters:
                parameter.mul_(1.01)
        cast_anew = [gradients(part, masters) for part in parts]
        expected = [a + b for a, b in zip(*cast_anew, strict=True)]


def test_sums_are_in_float32_and_in_order():
    torch.manual_seed(1)
    parts = [[torch.randn(50).bfloat16(), torch.randn(3)] for _ in range(4)]
    kept = [[value.clone() for value in part] for part in parts]
    total = add_gradients(add_gradients(None, parts[:2]), parts[2:])
    for i, value in enumerate(total):
        expected = kept[0][i].float()
        for part in kept[1:]:
            expected = expected + part[i].float()
        assert torch.equal(value, expected)
    assert all(
        torch.equal(a, b)
        for part, same in zip(parts, kept, strict=True)
        for a, b in zip(part, same, strict=True)
    )


def test_routers_and_tables_stay_in_float32():
    network = FAMILIES["microdit"](SMALL.model_copy(update={"condition": "class"}), TokensConfig())
    low = LowPrecisionWeights(network, torch.bfloat16)
    whole = kept_whole(network)
    assert "blocks.1.mlp.gate.weight" in whole
    assert "y_embedder.embedding_table.weight" in whole
    for name, leaf in zip(dict(network.named_parameters()), low.leaves, strict=True):
        assert (leaf.dtype == torch.float32) == (name in whole), name


def test_weights_come_back_after_an_error():
    network = FAMILIES["microdit"](SMALL, TokensConfig())
    before = [id(p) for p in network.parameters()]
    low = LowPrecisionWeights(network, torch.bfloat16)

    def fail() -> None:
        with low.used():
            assert [id(p) for p in network.parameters()] == [id(p) for p in low.leaves]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [id(p) for p in network.parameters()] == before
