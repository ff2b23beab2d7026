"""muP: what is learned in a few steps has the same size at every width, and grows without it."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from shoestring.config import (
    DecoderConfig,
    ExpertsConfig,
    MixerConfig,
    OptimizerConfig,
    TokensConfig,
    TransformerConfig,
)
from shoestring.interfaces import Conditioning
from shoestring.models.files import FAMILIES
from shoestring.models.transformer import DiffusionTransformer
from shoestring.runtime import Workers, stream
from shoestring.training.optim import Optimizers, parameter_groups, parameter_roles

WIDTHS = (64, 128, 256)
Kind = Literal["microdit", "maskdit"]


def config(kind: Kind, dim: int, base: int | None) -> TransformerConfig:
    return TransformerConfig(
        kind=kind,
        in_channels=3,
        caption_dim=16,
        dim=dim,
        depth=2,
        head_dim=16,
        ffn_multiple_of=8,
        mixer=MixerConfig(depth=2, dim=dim // 2) if kind == "microdit" else MixerConfig(depth=0),
        experts=ExpertsConfig(count=4 if kind == "microdit" else 0),
        mup_base_dim=base,
    )


def network(config: TransformerConfig, tokens: TokensConfig | None = None) -> DiffusionTransformer:
    model = FAMILIES[config.kind](config, tokens)
    model.initialize(stream(0, "init"))
    return model


def changes(kind: Kind, dim: int, base: int | None, optimizer: OptimizerConfig) -> dict[str, float]:
    """Root mean square of what five steps change in the activations of each block and in the output."""
    model = network(config(kind, dim, base), TokensConfig(method="dense"))
    widths = model.widths()
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if p.ndim >= 2 and not p.any():
                p.normal_(std=0.05 * widths.initial_scale(name), generator=stream(0, "open", i))
    if optimizer.kind == "muon":
        roles = parameter_roles(model)
        for name, p in model.named_parameters():
            p.requires_grad_(roles[name] in {"block_matrix", "expert"})
    optimizers = Optimizers(model, optimizer, Workers(1))
    optimizers.set_lr(1e-3 if optimizer.kind == "adamw" else 5e-3)
    x, goal = (torch.randn(8, 3, 8, 8, generator=stream(0, name)) for name in ("x", "goal"))
    text = Conditioning(torch.randn(8, 4, 16, generator=stream(0, "text")))
    seen: dict[str, Tensor] = {}
    blocks = {f"mixer {i}": b for i, b in enumerate(model.patch_mixer)}
    blocks |= {f"block {i}": b for i, b in enumerate(model.blocks)}
    for name, block in blocks.items():
        block.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out.detach()))

    def forward() -> Tensor:
        out = model(x, torch.linspace(-1, 1, 8), text).visible_BKG
        seen["output"] = out.detach()
        return out

    forward()
    before = dict(seen)
    aim = goal.reshape(8, 16, 12)
    for _ in range(5):
        (forward() - aim).square().mean().backward()
        optimizers.step()
    forward()
    return {name: float((seen[name] - before[name]).square().mean().sqrt()) for name in seen}


def spread(kind: Kind, on: bool, optimizer: OptimizerConfig) -> dict[str, tuple[float, float]]:
    """Over the widths, the largest change by the smallest, and the widest network's by the narrowest's."""
    found = [changes(kind, dim, WIDTHS[0] if on else None, optimizer) for dim in WIDTHS]
    values = {name: [each[name] for each in found] for name in found[0]}
    return {name: (max(v) / min(v), v[-1] / v[0]) for name, v in values.items()}


@pytest.mark.parametrize("kind", ["microdit", "maskdit"])
def test_coordinate_check(kind: Kind) -> None:
    """From width 64 to 256, changes keep within a factor 1.4; without muP each grows by more, to sixfold."""
    adamw = OptimizerConfig(weight_decay=0.0)
    for name, (ratio, _) in spread(kind, True, adamw).items():
        assert ratio < 1.4, name
    for name, (_, growth) in spread(kind, False, adamw).items():
        assert growth > 1.6, name


def test_coordinate_check_of_muon() -> None:
    """Muon's matrices alone: within 1.25 under both adjustments, more than double without muP."""
    for adjust in ("original", "match_rms_adamw"):
        muon = OptimizerConfig(kind="muon", muon_adjust=adjust, weight_decay=0.0)
        for name, (ratio, _) in spread("microdit", True, muon).items():
            assert ratio < 1.25, (adjust, name)
    for name, (_, growth) in spread("microdit", False, muon).items():
        assert growth > 3, name


def test_every_weight_counts_by_its_own_inputs() -> None:
    wide = config("microdit", 192, 64).model_copy(update={"qkv_multipliers": (1.0,), "ffn_multiple_of": 48})
    widths = network(wide).widths()
    ratios = {
        "blocks.0.attn.qkv.weight": 3,
        "blocks.1.attn.proj.weight": 3,
        "blocks.0.mlp.w1.weight": 3,
        "blocks.0.mlp.w3.weight": 96 / 48,  # int(2/3 32) and int(2/3 96), rounded up
        "patch_mixer.1.mlp.w1": 3,
        "patch_mixer.1.mlp.w2": 384 / 144,  # 4 * 96 and 4 * 32, rounded up
        "patch_mixer.1.mlp.gate.weight": 3,
        "final_layer.linear.weight": 3,
        "blocks.0.adaLN_modulation.1.weight": 3,
        "patch_mixer_map_xout.1.weight": 3,
        "t_embedder.mlp.0.weight": 1,
        "t_embedder.mlp.2.weight": 3,
        "x_embedder.proj.weight": 1,
        "y_embedder.y_proj.fc1.weight": 1,
    }
    assert {name: widths.inputs_ratio(name) for name in ratios} == pytest.approx(ratios)
    groups = parameter_groups(network(wide), OptimizerConfig(weight_decay=0.1))
    for group in groups:
        for name in group.parameters:
            expected = ratios.get(name)
            if expected is not None:
                assert group.lr_scale == pytest.approx(1 / expected), name
            if group.role in {"vector", "router"}:
                assert group.weight_decay == 0
            else:  # what a step takes away stays
                assert group.lr_scale * group.weight_decay == pytest.approx(0.1), name


@pytest.mark.parametrize("kind", ["microdit", "maskdit"])
def test_initial_weights_are_those_of_the_base_by_the_root_of_their_inputs(kind: Kind) -> None:
    narrow, wide = network(config(kind, 64, None)), network(config(kind, 256, 64))
    there = dict(narrow.named_parameters())
    for name, p in wide.named_parameters():
        if p.ndim < 2 or not p.any():
            continue
        expected = 1 / 4 if "gate" in name else 1 if name in OF_FIXED_INPUTS else 1 / 2
        if not name.endswith(("mlp.w3.weight", "mlp.w2")):  # whose inputs are rounded up
            assert float(p.detach().std() / there[name].detach().std()) == pytest.approx(
                expected, rel=0.08
            ), name


OF_FIXED_INPUTS = {"x_embedder.proj.weight", "y_embedder.y_proj.fc1.weight", "t_embedder.mlp.0.weight"}


def test_at_the_base_width_nothing_changes() -> None:
    plain, same = network(config("microdit", 64, None)), network(config("microdit", 64, 64))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), same.parameters(), strict=True))
    groups = parameter_groups(same, OptimizerConfig())
    assert {group.lr_scale for group in groups} == {1.0}


def test_a_base_that_does_not_fit_is_named() -> None:
    with pytest.raises(
        ValidationError, match=r"mup_base_dim is 40, at which dim would be 40; .* multiple of 16"
    ):
        config("microdit", 64, 40)
    with pytest.raises(ValidationError, match=r"at which mixer\.dim would be 24; .* multiple of 16"):
        config("microdit", 64, 48)
    with pytest.raises(ValidationError, match=r"at which decoder\.dim would be 32; .* multiple of 64"):
        TransformerConfig(
            dim=64,
            head_dim=16,
            mup_base_dim=32,
            mixer=MixerConfig(depth=0),
            decoder=DecoderConfig(depth=1, dim=64, head_dim=64),
        )
    with pytest.raises(ValidationError, match=r"must be at least 0\.125 \(2 / dim\)"):
        TransformerConfig(
            dim=64, head_dim=16, mup_base_dim=16, qkv_multipliers=(0.1,), mixer=MixerConfig(depth=0)
        )
