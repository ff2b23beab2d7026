"""FLOPs in closed form against torch's counter, which looks at every product that is computed."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from shoestring import cli, recipes
from shoestring.config import (
    CODEC_DOWNSAMPLING,
    DecoderConfig,
    ExpertsConfig,
    MixerConfig,
    RunConfig,
    TokensConfig,
    TransformerConfig,
)
from shoestring.encoders.image import CODECS, PixelCodec
from shoestring.interfaces import Conditioning
from shoestring.models.files import FAMILIES, new_network
from shoestring.models.moe import ExpertChoice
from shoestring.models.routing import METHODS
from shoestring.models.transformer import DiffusionTransformer, parameter_counts
from shoestring.planning import Flops, model_flops, plan
from shoestring.runtime import stream
from shoestring.tensors import visible_from_noise

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
CAPTION = 7


def count(
    model: TransformerConfig, tokens: TokensConfig, grid: tuple[int, int], ratio: float, s: int
) -> Flops:
    """What torch counts in a forward and a backward pass of one image.

    Large networks are on the meta device; small ones are not, as its shape arithmetic takes longer.
    """
    model = model.model_copy(update={"attention": "explicit", "checkpoint_activations": False})
    device = "meta" if model.dim > SMALL.dim else "cpu"
    with torch.device(device):
        net = FAMILIES[model.kind](model, tokens)
        visible = visible_from_noise(torch.zeros(1, grid[0] * grid[1]), ratio)
        x = torch.zeros(1, model.in_channels, grid[0] * model.patch_size, grid[1] * model.patch_size)
        condition = Conditioning.nothing(1, device)
        if model.condition == "text":
            condition = Conditioning(torch.zeros(1, s, model.caption_dim))
        if model.condition == "class":
            condition = Conditioning(class_B=torch.zeros(1, dtype=torch.long))
        time = torch.zeros(1)
    return count_pass(net, x, time, condition, visible)


def count_pass(net: DiffusionTransformer, *inputs: object) -> Flops:
    with FlopCounterMode(display=False) as forward:
        output = net(*inputs)
        total = output.visible_BKG.sum()
        if output.dropped_BJG is not None:
            total = total + output.dropped_BJG.sum()
    with FlopCounterMode(display=False) as backward:
        total.backward()
    both = forward.get_total_flops() + backward.get_total_flops()
    return Flops(forward.get_total_flops(), both)


def check(
    model: TransformerConfig, tokens: TokensConfig, grid: tuple[int, int], ratio: float, s: int
) -> None:
    """The promise is 1 %; as it is a closed form of the same products, it is exact."""
    counted, ours = count(model, tokens, grid, ratio, s), model_flops(model, grid, s, ratio, tokens)
    assert ours.forward == counted.forward
    assert ours.training == pytest.approx(counted.training, rel=1e-9)


def with_method(model: TransformerConfig, method: str) -> tuple[TransformerConfig, TokensConfig]:
    """The network with what the method needs, and without what others need."""
    depth = (model.decoder.depth or 2) if method == "maskdit" else 0
    model = model.model_copy(update={"decoder": model.decoder.model_copy(update={"depth": depth})})
    return model, TokensConfig(method=method, first=1, last=-1)


@pytest.mark.parametrize("condition", ["text", "class", "none"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_family_and_condition(family, method, condition):
    experts = SMALL.experts if family == "microdit" else ExpertsConfig(count=0)
    decoder = DecoderConfig(dim=24, head_dim=8)
    changes = {"kind": family, "condition": condition, "experts": experts, "decoder": decoder}
    model, tokens = with_method(SMALL.model_copy(update=changes), method)
    for ratio in (0.0,) if method == "dense" else (0.0, 0.6):
        check(model, tokens, (4, 6), ratio, CAPTION)


@pytest.mark.parametrize(
    "changes",
    [
        {"experts": ExpertsConfig(count=0)},
        {"experts": ExpertsConfig(count=2, every=1)},
        {"experts": ExpertsConfig(count=8, capacity=0.5)},
        {"mixer": MixerConfig(depth=0)},
        {"mixer": MixerConfig(depth=1, dim=32)},
        {"bias": True, "qk_norm": False},
        {"patch_size": 4},
        {"mask_captions": True},
        {"qkv_multipliers": (0.5, 1.0), "ffn_multipliers": (1.0,)},
    ],
    ids=str,
)
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_every_switch(changes, ratio):
    model = SMALL.model_copy(update=changes)
    check(model, TokensConfig(), (16 // model.patch_size,) * 2, ratio, CAPTION)


def presets() -> list[RunConfig]:
    """A recipe for each of the transformers that recipes have; U-Nets are in test_unet.py."""
    found: dict[TransformerConfig, RunConfig] = {}
    for name in recipes.names():
        config = recipes.get(name)
        if isinstance(config.model, TransformerConfig):
            found.setdefault(config.model, config)
    return list(found.values())


def preset_grid(config: RunConfig) -> tuple[int, int]:
    side = config.stages[0].resolution // CODEC_DOWNSAMPLING[config.data.codec] // config.model.patch_size
    return side, side


@pytest.mark.parametrize("config", presets(), ids=lambda config: config.name)
@pytest.mark.parametrize("method", METHODS)
def test_every_preset_under_every_method(config, method):
    """Cut to a few blocks, as the counter takes seconds for 28 of them; whole ones below."""
    model, tokens = with_method(config.model, method)
    mixer = model.mixer.model_copy(update={"depth": min(2, model.mixer.depth)})
    decoder = model.decoder.model_copy(update={"depth": min(2, model.decoder.depth)})
    model = model.model_copy(update={"depth": 3, "mixer": mixer, "decoder": decoder})
    check(model, tokens, preset_grid(config), 0.0 if method == "dense" else 0.75, config.data.max_tokens)


@pytest.mark.parametrize("config", presets(), ids=lambda config: config.name)
def test_every_preset_as_it_is(config):
    stage = config.stages[0]
    check(config.model, config.tokens, preset_grid(config), stage.mask_ratio, config.data.max_tokens)


@pytest.mark.parametrize("name", recipes.names())
def test_a_plan_adds_up(name):
    config = recipes.get(name)
    planned = plan(config)
    with torch.device("meta"):
        net = new_network(config.model, config.tokens)
    assert (planned.parameters, planned.active) == parameter_counts(net)
    assert planned.training == pytest.approx(sum(s.flops.training * s.nimg for s in planned.stages))
    for stage, counted in zip(config.stages, planned.stages, strict=True):
        assert counted.nimg == stage.steps * stage.batch
        side = int(counted.patches**0.5)
        assert side * config.model.patch_size * CODEC_DOWNSAMPLING[config.data.codec] == stage.resolution
        if stage.mask_ratio_end is None:
            s = config.data.max_tokens
            flops = model_flops(config.model, (side, side), s, stage.mask_ratio, config.tokens)
            assert counted.flops == flops


def test_a_moving_ratio_costs_the_mean_over_its_steps():
    changes = ["stages.0.mask_ratio_end=0", "stages.0.mask_schedule=cosine", "stages.0.nimg=2560"]
    config = recipes.resolve("demo", changes)
    stage = config.stages[0]
    ratios = [stage.mask_ratio_at(i * stage.batch) for i in range(stage.steps)]
    assert len(set(ratios)) > 3
    each = [model_flops(config.model, (8, 8), 16, ratio, config.tokens) for ratio in ratios]
    planned = plan(config).stages[0]
    assert planned.flops.training == pytest.approx(sum(f.training for f in each) / len(each))
    assert planned.flops.forward == pytest.approx(sum(f.forward for f in each) / len(each))
    assert planned.visible == pytest.approx(sum(int(64 * (1 - r)) / 64 for r in ratios) / len(ratios))


# -- the released dispatch of experts ----------------------------------------------------------------------


def one_hot(layer: ExpertChoice, x_BTD: Tensor) -> Tensor:
    """Experts as released: tokens are picked and put back by products with a one-hot matrix."""
    b, t, d = x_BTD.shape
    score_BET = F.linear(x_BTD, layer.gate.weight).softmax(dim=-1).transpose(1, 2)
    weight_BER, choice_BER = score_BET.topk(layer.tokens_per_expert(t), dim=-1)
    hot_BERT = F.one_hot(choice_BER, t).to(x_BTD.dtype)
    e, r = choice_BER.shape[1:]
    picked = torch.bmm(hot_BERT.view(b, e * r, t), x_BTD).view(b, e, r, d).transpose(0, 1)
    hidden = F.gelu(torch.bmm(picked.reshape(e, b * r, d), layer.w1))
    output = torch.bmm(hidden, layer.w2).view(e, b, r, d).transpose(0, 1)
    weighted = (output * weight_BER[..., None]).reshape(b, e * r, d)
    return torch.bmm(hot_BERT.view(b, e * r, t).transpose(1, 2), weighted)


def test_one_hot_dispatch_computes_the_same_and_is_counted(monkeypatch):
    layer = ExpertChoice(8, 16, experts=4, capacity=2.0).double()
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=stream(0, "test", i)))
    x = torch.randn(3, 10, 8, dtype=torch.float64)
    assert torch.allclose(layer(x), one_hot(layer, x))
    monkeypatch.setattr(ExpertChoice, "forward", one_hot)
    for ratio in (0.0, 0.6):
        counted = count(SMALL, TokensConfig(), (4, 6), ratio, CAPTION)
        ours = model_flops(SMALL, (4, 6), CAPTION, ratio, TokensConfig(), "one-hot")
        assert ours.forward == counted.forward
        assert ours.training == pytest.approx(counted.training, rel=1e-9)


def test_xl2_against_the_published_figures():
    config = recipes.get("microdit-xl2")
    stages = plan(config).stages
    gather = [s.flops.training / 1e9 for s in stages]
    assert gather == pytest.approx([282, 714, 1069, 3002], rel=1e-3)
    released = [s.one_hot.training / 1e9 for s in stages]
    assert released == pytest.approx([285.4, 730.6, 1121.8, 3264.6], abs=0.05)
    published = list(recipes.published_gflop(config).values())
    assert published == [287, 737, 1152, 3398]
    for ours, theirs in ((gather, published), (released, published)):
        assert all(0.88 < a / b < 1 for a, b in zip(ours, theirs, strict=True))


# -- the command -------------------------------------------------------------------------------------------


def said(capsys, monkeypatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["shoestring", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    return capsys.readouterr().out


def row(text: str, label: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.strip().startswith(label))
    return line.replace(label, "").split()


def test_the_command_prints_counted_and_published(capsys, monkeypatch):
    text = said(capsys, monkeypatch, "flops", "microdit-xl2")
    assert "1,165,442,320 parameters, 712,457,488 active" in text
    assert row(text, "training Gflops (counted)") == ["282.1", "714.2", "1,069.2", "3,002.6"]
    assert row(text, "training Gmacs (counted)") == ["141.1", "357.1", "534.6", "1,501.3"]
    assert row(text, "training Gflops, one-hot (counted)") == ["285.4", "730.6", "1,121.8", "3,264.6"]
    assert row(text, "training Gflops (published)") == ["287", "737", "1152", "3398"]
    assert row(text, "of which visible") == ["25.0%", "100.0%", "25.0%", "100.0%"]
    assert row(text, "patches") == ["256", "256", "1024", "1024"]
    assert row(text, "all training Eflops (counted)")[-1] == "328.6"


def test_published_figures_stand_beside_what_was_published_only(capsys, monkeypatch):
    changed = said(capsys, monkeypatch, "flops", "microdit-xl2", "stages.1.mask_ratio=0.5")
    assert row(changed, "training Gflops (published)") == ["287", "1152", "3398"]
    assert "published" not in said(capsys, monkeypatch, "flops", "microdit-xl2", "model.depth=2")
    plain = said(capsys, monkeypatch, "flops", "demo", "model.condition=none")
    assert "one-hot" not in plain
    assert "captions" not in plain


def test_downsampling_is_that_of_the_codecs():
    assert CODEC_DOWNSAMPLING.keys() == CODECS.keys()
    assert CODEC_DOWNSAMPLING["pixels"] == PixelCodec.downsampling


def test_wrong_words(mistake):
    assert "did you mean 'demo'" in mistake("flops", "dmeo")
    assert "unknown key 'model.deph'" in mistake("flops", "demo", "model.deph=3")
