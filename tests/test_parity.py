"""Parity: golden tensors of the released code, and a slow reference."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from parity import check
from shoestring.config import ExpertsConfig, MixerConfig, NoiseConfig, TransformerConfig
from shoestring.diffusion.losses import denoising_loss
from shoestring.diffusion.process import EDMProcess
from shoestring.interfaces import Conditioning
from shoestring.models.microdit import MicroDiT
from shoestring.models.released import to_released
from shoestring.tensors import scatter_tokens, unpatchify, visible_from_noise

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from reference_microdit import ReferenceConfig, ReferenceMicroDiT  # noqa: E402

OUTPUTS = tuple(check.MICRODIT_TOLERANCES)


@pytest.fixture
def golden(shared: Path) -> Path:
    """The golden file of MicroDiT."""
    return shared / "golden" / "microdit_a.safetensors"


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


# ------------------------------------------------------------------------------------- the checker


ALL_OUTPUTS = [(kind, name) for kind, (_, limits) in check.CHECKERS.items() for name in limits]


@pytest.mark.parametrize("kind", check.CHECKERS)
def test_golden_file_passes(shared, kind, capsys):
    assert check.main([str(shared / "golden" / f"{kind}_a.safetensors")]) == 0
    expected = [name for of, name in ALL_OUTPUTS if of == kind]
    assert capsys.readouterr().out.count(" ok") == len(expected)


@pytest.mark.parametrize(("kind", "name"), ALL_OUTPUTS)
def test_altered_output_fails(shared, kind, name, tmp_path, capsys):
    tensors, metadata = read(shared / "golden" / f"{kind}_a.safetensors")
    kept = {k: t for k, t in tensors.items() if not k.startswith("out.") or k == f"out.{name}"}
    kept[f"out.{name}"] = kept[f"out.{name}"] + 1e-2
    save_file(kept, tmp_path / "altered.safetensors", metadata)
    assert check.main([str(tmp_path / "altered.safetensors")]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("out.surprise", torch.zeros(1), "unknown output"),
        ("out.mask", torch.zeros(2, 63), "shape"),
        ("out.mask", torch.full((2, 64), float("nan")), "inf"),
    ],
)
def test_wrong_outputs_fail(golden, name, value, said, tmp_path, capsys):
    tensors, metadata = read(golden)
    kept = {k: t for k, t in tensors.items() if not k.startswith("out.")}
    save_file(kept | {name: value}, tmp_path / "wrong.safetensors", metadata)
    assert check.main([str(tmp_path / "wrong.safetensors")]) == 1
    assert said in capsys.readouterr().out


def test_unreadable_files_are_one_clear_sentence(golden, tmp_path, capsys):
    tensors, metadata = read(golden)
    cases = {
        "absent": "no such file",
        "text": "not a readable safetensors file",
        "cut": "not a readable safetensors file",
        "no_metadata": "no 'kind'",
        "no_dit": "describe no MicroDiT",
        "no_weight": "key 'blocks.0.norm1.weight' is missing",
        "no_input": "in.x is missing",
        "bad_input": "out.dense cannot be computed",
        "no_outputs": "no out.* tensor",
    }
    without_outputs = {k: t for k, t in tensors.items() if not k.startswith("out.")}
    one_output = without_outputs | {"out.dense": tensors["out.dense"]}
    (tmp_path / "text").write_text("these are not tensors")
    (tmp_path / "cut").write_bytes(golden.read_bytes()[:5000])
    save_file(tensors, tmp_path / "no_metadata")
    save_file(one_output, tmp_path / "no_dit", {k: v for k, v in metadata.items() if k != "dit"})
    weightless = {k: t for k, t in one_output.items() if k != "weight.blocks.0.norm1.weight"}
    save_file(weightless, tmp_path / "no_weight", metadata)
    save_file({k: t for k, t in one_output.items() if k != "in.x"}, tmp_path / "no_input", metadata)
    save_file(one_output | {"in.captions": torch.zeros(2, 7, 41)}, tmp_path / "bad_input", metadata)
    save_file(without_outputs, tmp_path / "no_outputs", metadata)
    for name, said in cases.items():
        assert check.main([str(tmp_path / name)]) == 2, name
        message = capsys.readouterr().err
        assert said in message
        assert message.count("\n") == 1
    assert check.main([str(tmp_path / "absent"), str(golden)]) == 2


def test_a_kind_without_checker_fails(golden, tmp_path, capsys):
    tensors, metadata = read(golden)
    save_file(tensors, tmp_path / "other.safetensors", metadata | {"kind": "other"})
    assert check.main([str(tmp_path / "other.safetensors")]) == 1
    assert "no checker for files of kind 'other'" in capsys.readouterr().out


# ----------------------------------------------------------------- golden files of other sizes

SMALL = ReferenceConfig(
    input_size=8,
    caption_channels=12,
    dim=32,
    depth=2,
    head_dim=8,
    qkv_multipliers=(0.5, 1.0),
    ffn_multipliers=(0.5, 2.0),
    multiple_of=16,
    patch_mixer_depth=2,
    patch_mixer_dim=24,
    num_experts=4,
)
VARIANTS = {
    "bias and maps": replace(SMALL, use_bias=True),
    "no maps, few multipliers": replace(
        SMALL, depth=4, patch_mixer_dim=32, qkv_multipliers=(0.5, 1.0), ffn_multipliers=(1.0,)
    ),
    "no mixer, 16 channels": replace(SMALL, use_patch_mixer=False, in_channels=16),
    "patch 4, scaled positions": replace(SMALL, input_size=16, patch_size=4, pos_interp_scale=2.0),
    "experts everywhere": replace(
        SMALL, depth=3, qkv_multipliers=(0.7,), ffn_multipliers=(1.5,), experts_every_n=1
    ),
}


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter anew: with zero gates every comparison would pass."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = "norm" in name or (parameter.ndim == 1 and name.endswith("weight"))
            fan_in = (
                parameter[0].numel() if parameter.ndim == 2 or parameter.ndim == 4 else parameter.shape[-1]
            )
            if parameter.ndim == 3:
                fan_in = parameter.shape[1]
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * values if gain else values * fan_in**-0.5)


def write_golden(path: Path, config: ReferenceConfig) -> None:
    """A golden file made by the reference."""
    g = torch.Generator().manual_seed(5)
    reference = ReferenceMicroDiT(config)
    randomise(reference, g)
    shape = (2, config.in_channels, config.input_size, config.input_size)
    length = (config.input_size // config.patch_size) ** 2
    inputs = {
        "x": torch.randn(shape, generator=g),
        "c_noise": torch.randn(2, generator=g),
        "captions": torch.randn(2, 5, config.caption_channels, generator=g),
        "mask_noise": torch.rand(2, length, generator=g),
        "sigma": torch.rand(2, generator=g) + 0.1,
        "loss_rnd_normal": torch.randn(2, generator=g),
        "loss_noise": torch.randn(shape, generator=g),
        "latents": torch.randn(shape, generator=g),
    }
    outputs = reference_outputs(reference, inputs, mask_ratio=0.5, scale=1.5, steps=3)
    dit = asdict(config)
    numbers = {key: str(dit.pop(key)) for key in ("input_size", "in_channels", "caption_channels")}
    metadata = numbers | {
        "kind": "microdit",
        "dit": json.dumps(dit),
        "mask_ratio": "0.5",
        "cfg_scale": "1.5",
        "heun_steps": "3",
        "sigma_data": "0.9",
        "P_mean": "-0.6",
        "P_std": "1.2",
    }
    tensors = {f"weight.{k}": v for k, v in reference.state_dict().items()}
    tensors |= {f"in.{k}": v for k, v in inputs.items()} | {f"out.{k}": v for k, v in outputs.items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)


def reference_outputs(
    reference: ReferenceMicroDiT, inputs: dict[str, Tensor], mask_ratio: float, scale: float, steps: int
) -> dict[str, Tensor]:
    """Every output of the golden format, from the reference."""
    x, time, captions, noise = (inputs[k] for k in ("x", "c_noise", "captions", "mask_noise"))
    draws = (x, captions, inputs["loss_rnd_normal"], inputs["loss_noise"])
    loss = reference.loss(*draws, noise, mask_ratio=mask_ratio)
    loss.backward()
    with torch.no_grad():
        masked, mask = reference(x, time, captions, noise, mask_ratio)
        assert mask is not None
        return {
            "dense": reference(x, time, captions)[0],
            "masked": masked,
            "mask": mask,
            "cfg": reference.guided(x, time, captions, scale),
            "denoised": reference.denoise(x, inputs["sigma"][:, None, None, None], captions)[0],
            "loss_dense": reference.loss(*draws)[None],
            "loss_masked": loss.detach()[None],
            "gradnorm_masked": torch.stack([p.grad.norm() for _, p in sorted(reference.named_parameters())]),
            "sample_heun": reference.sample_heun(inputs["latents"], captions, steps, scale),
        }


def test_reference_matches_golden(golden):
    tensors, metadata = read(golden)
    reference = ReferenceMicroDiT(ReferenceConfig.from_metadata(metadata))
    assert torch.equal(reference.pos_embed, tensors["weight.pos_embed"])
    reference.load_state_dict({k[7:]: t for k, t in tensors.items() if k.startswith("weight.")})
    inputs = {k[3:]: t for k, t in tensors.items() if k.startswith("in.")}
    outputs = reference_outputs(reference, inputs, mask_ratio=0.75, scale=3.0, steps=4)
    assert set(outputs) == set(OUTPUTS)
    for name, tolerance in check.MICRODIT_TOLERANCES.items():
        assert tolerance.error(outputs[name], tensors[f"out.{name}"]) <= tolerance.cpu, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_checker_builds_any_model(variant, tmp_path):
    write_golden(tmp_path / "golden.safetensors", VARIANTS[variant])
    assert check.main([str(tmp_path / "golden.safetensors")]) == 0


# --------------------------------------------------------- ours against the reference, random shapes


@st.composite
def configs(draw: st.DrawFn) -> tuple[TransformerConfig, int, float]:
    depth = draw(st.integers(1, 4))
    config = TransformerConfig(
        in_channels=draw(st.integers(1, 4)),
        caption_dim=draw(st.integers(1, 6)),
        patch_size=draw(st.integers(1, 3)),
        dim=draw(st.sampled_from((8, 16))),
        depth=depth,
        head_dim=draw(st.sampled_from((2, 4))),
        qkv_multipliers=(draw(st.floats(0.3, 1.5)),) * depth,
        ffn_multipliers=(draw(st.floats(0.3, 3.0)),),
        ffn_multiple_of=draw(st.sampled_from((1, 4))),
        mixer=MixerConfig(
            depth=draw(st.integers(0, 3)),
            dim=draw(st.sampled_from((8, 12, 16))),
            qkv_multiplier=1,
            ffn_multiplier=2,
        ),
        experts=ExpertsConfig(
            count=draw(st.integers(0, 9)), capacity=draw(st.floats(0.3, 4)), every=draw(st.integers(1, 3))
        ),
        bias=draw(st.booleans()),
    )
    side = draw(st.integers(1, 5))
    keep = draw(st.integers(1, side * side))
    return config, side, 1 - (keep + 0.5) / side**2 if keep < side * side else 0.0


@settings(max_examples=30)
@given(configs(), st.integers(0, 2**31), st.sampled_from((1.0, 2.0)))
def test_ours_equals_the_reference(drawn, seed, position_scale):
    # float64, so that no near-tie of the router is decided differently
    config, side, mask_ratio = drawn
    g = torch.Generator().manual_seed(seed)
    ours = MicroDiT(config)
    ours.position_scale = position_scale
    randomise(ours, g)
    reference = ReferenceMicroDiT(ReferenceConfig.like(config, side * config.patch_size, position_scale))
    released = to_released(ours, side)
    assert torch.equal(released["pos_embed"], reference.pos_embed)
    reference.load_state_dict(released)
    ours.double()
    reference.double()

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    pixels = side * config.patch_size
    x, noise = normal(2, config.in_channels, pixels, pixels), normal(2, config.in_channels, pixels, pixels)
    captions, level_B = normal(2, 3, config.caption_dim), normal(2)
    mask_noise = torch.rand(2, side * side, generator=g)
    visible = visible_from_noise(mask_noise, mask_ratio)
    # A time that float32 holds exactly: our time features are float32 whatever the network is
    time = level_B.float().double()
    tokens = ours(x, time, Conditioning(captions), visible).visible_BKG
    expected, _ = reference(x, time, captions, mask_noise, mask_ratio)
    if visible is not None:
        tokens = scatter_tokens(tokens, visible, side * side)
    got = unpatchify(tokens, (side, side), config.patch_size)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)

    process = EDMProcess(0.9)
    level = process.level_from_normal(level_B, NoiseConfig())
    denoiser = process.denoiser(ours)
    loss = denoising_loss(process, denoiser, x, noise, level, Conditioning(captions), visible).mean()
    loss_expected = reference.loss(x, captions, level_B, noise, mask_noise, mask_ratio=mask_ratio)
    torch.testing.assert_close(loss, loss_expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    loss_expected.backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert theirs[name].grad is not None
        scale = theirs[name].grad.abs().max().item()
        torch.testing.assert_close(
            parameter.grad,
            theirs[name].grad,
            rtol=1e-4,
            atol=1e-5 * scale + 1e-6,
            msg=lambda m, n=name: f"{n}: {m}",
        )
