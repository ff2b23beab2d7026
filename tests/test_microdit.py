"""The network: counts, switches, invariances. Parity with the released numbers is in test_fill_values.py."""

import pytest
import torch

from shoestring.config import ExpertsConfig, MixerConfig, TransformerConfig
from shoestring.interfaces import Conditioning
from shoestring.models.attention import attend
from shoestring.models.layers import sincos_positions
from shoestring.models.microdit import MicroDiT
from shoestring.models.moe import ExpertChoice
from shoestring.models.released import load_released, to_released
from shoestring.models.transformer import parameter_counts
from shoestring.runtime import UserError, stream
from shoestring.tensors import visible_from_noise

SMALL = TransformerConfig(
    in_channels=3,
    caption_dim=8,
    dim=32,
    depth=4,
    head_dim=16,
    ffn_multiple_of=16,
    mixer=MixerConfig(depth=2, dim=48),
    experts=ExpertsConfig(count=4),
)


def randomized(config: TransformerConfig, dtype=torch.float32) -> MicroDiT:
    """Zero-initialised gates would hide everything, so every parameter is drawn anew."""
    model = MicroDiT(config).to(dtype)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=stream(0, "test", i)))
    return model


def inputs(batch=2, height=8, width=8, tokens=5, dtype=torch.float32):
    generator = stream(1, "test")
    x = torch.randn(batch, 3, height, width, generator=generator, dtype=dtype)
    time = torch.randn(batch, generator=generator, dtype=dtype)
    return x, time, Conditioning(torch.randn(batch, tokens, 8, generator=generator, dtype=dtype))


VARIANTS = {
    "no experts": {"experts": ExpertsConfig(count=0)},
    "one expert": {"experts": ExpertsConfig(count=1, capacity=1.0)},
    "expert everywhere": {"experts": ExpertsConfig(count=2, every=1)},
    "no mixer": {"mixer": MixerConfig(depth=0)},
    "mixer of the same width": {"mixer": MixerConfig(depth=1, dim=32)},
    "biases": {"bias": True},
    "masked captions": {"mask_captions": True},
    "patch 4": {"patch_size": 4},
    "given widths": {"qkv_multipliers": (0.5, 1.0), "ffn_multipliers": (1.0,)},
    "explicit attention": {"attention": "explicit"},
    "checkpointed": {"checkpoint_activations": True},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("ratio", [0.0, 0.75])
def test_every_switch_trains_every_parameter(name, ratio):
    model = randomized(SMALL.model_copy(update=VARIANTS[name]))
    x, time, text = inputs()
    text = Conditioning(text.text_BSD, torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool())
    length = (8 // model.patch_size) ** 2
    visible = visible_from_noise(torch.rand(2, length), ratio)
    output = model(x, time, text, visible).visible_BKG
    kept = length if visible is None else visible.shape[1]
    assert output.shape == (2, kept, 3 * model.patch_size**2)
    output.square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # The softmax over one expert is 1 whatever the gate says.
    expected = [n for n in silent if "gate" in n] if name == "one expert" else []
    assert silent == expected


def test_initialisation_starts_at_zero_output_and_is_reproducible():
    a, b = MicroDiT(SMALL), MicroDiT(SMALL)
    a.initialize(stream(0, "init"))
    b.initialize(stream(0, "init"))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    x, time, text = inputs()
    assert (a(x, time, text).visible_BKG == 0).all()
    std = a.blocks[3].cross_attn.proj.weight.std().item()
    assert std == pytest.approx(0.02 / (2 * 4) ** 0.5, rel=0.1)
    assert a.blocks[1].mlp.w1.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (16, 8)])
def test_any_height_and_width(size):
    x, time, text = inputs(height=size[0], width=size[1])
    assert randomized(SMALL)(x, time, text).visible_BKG.shape == (2, size[0] * size[1] // 4, 12)


def test_positions_of_the_specification():
    table = sincos_positions(512, (16, 16), 1.0)
    assert table[17, :3].tolist() == pytest.approx([0.84147098, 0.8019618, 0.76172041], abs=1e-6)
    assert table[17, 128:130].tolist() == pytest.approx([0.54030231, 0.59737533], abs=1e-6)
    table = sincos_positions(1024, (32, 32), 2.0)
    assert table[35, :3].tolist() == pytest.approx([0.99749499, 0.99234608, 0.98473729], abs=1e-6)
    assert table[35, 512:515].tolist() == pytest.approx([0.47942554, 0.46384534, 0.44867843], abs=1e-6)
    assert table.abs().sum().item() == pytest.approx(589768.0646, rel=1e-6)


def test_position_of_a_patch_does_not_depend_on_the_shape_of_the_grid():
    wide, square = sincos_positions(32, (4, 9), 1.0), sincos_positions(32, (6, 6), 1.0)
    assert torch.equal(wide[2 * 9 + 5], square[2 * 6 + 5])


def test_padding_of_captions_is_invisible_where_they_are_masked():
    x, time, text = inputs(tokens=3)
    padded = torch.cat([text.text_BSD, torch.randn(2, 4, 8)], dim=1)
    mask = torch.arange(7)[None].expand(2, 7) < 3
    masked = randomized(SMALL.model_copy(update={"mask_captions": True}))
    plain = masked(x, time, Conditioning(text.text_BSD, torch.ones(2, 3).bool())).visible_BKG
    assert torch.allclose(masked(x, time, Conditioning(padded, mask)).visible_BKG, plain, atol=1e-5)
    attends_padding = randomized(SMALL)
    seen = attends_padding(x, time, Conditioning(padded, mask)).visible_BKG
    assert not torch.allclose(seen, plain, atol=1e-2)


def test_visible_patches_do_not_see_dropped_ones_beyond_the_mixer():
    """Without a mixer (naive masking) the dropped patches leave no trace; with one they do."""
    x, time, text = inputs()
    visible = visible_from_noise(torch.rand(2, 16), 0.5)
    kept = torch.zeros(2, 16, dtype=torch.bool).scatter(1, visible, True).view(2, 1, 4, 4)
    pixels = kept.repeat_interleave(2, 2).repeat_interleave(2, 3)
    changed = torch.where(pixels, x, x + 1)
    naive = randomized(SMALL.model_copy(update=VARIANTS["no mixer"]))
    seen = [naive(image, time, text, visible).visible_BKG for image in (x, changed)]
    assert torch.equal(*seen)
    deferred = randomized(SMALL)
    seen = [deferred(image, time, text, visible).visible_BKG for image in (x, changed)]
    assert not torch.allclose(*seen)


def test_order_of_visible_patches_does_not_matter():
    model, (x, time, text) = randomized(SMALL, torch.float64), inputs(dtype=torch.float64)
    visible = visible_from_noise(torch.rand(2, 16), 0.5)
    forward = model(x, time, text, visible).visible_BKG
    backward = model(x, time, text, visible.flip(1)).visible_BKG
    assert torch.allclose(forward, backward.flip(1), atol=1e-10)


def test_explicit_and_fused_attention_agree():
    q, k, v = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64)
    mask = torch.rand(2, 6) > 0.4
    mask[:, 0] = True
    for m in (None, mask):
        assert torch.allclose(attend(q, k, v, m, "explicit"), attend(q, k, v, m, "sdpa"), atol=1e-12)


def test_checkpointing_changes_no_gradient():
    grads = []
    for on in (False, True):
        model = randomized(SMALL.model_copy(update={"checkpoint_activations": on}))
        visible = visible_from_noise(torch.linspace(0, 1, 32).view(2, 16), 0.5)
        model(*inputs(), visible).visible_BKG.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_every_expert_takes_at_least_one_token(tokens):
    layer = ExpertChoice(8, 16, experts=8, capacity=2.0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    assert layer.tokens_per_expert(tokens) == max(1, tokens * 2 // 8)
    assert layer(torch.randn(2, tokens, 8)).abs().sum() > 0


def test_active_parameters_follow_the_capacity():
    total, active = parameter_counts(MicroDiT(SMALL))
    experts = sum(
        m.w1.numel() + m.w2.numel() for m in MicroDiT(SMALL).modules() if isinstance(m, ExpertChoice)
    )
    assert total - active == experts // 2


# -- released files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["", "dit.", "state/model/dit.", "state.model.dit.", "model.", "_orig_mod."]
)
def test_released_weights_survive_the_round_trip(prefix):
    model, copy = randomized(SMALL), MicroDiT(SMALL)
    saved = {prefix + name: tensor for name, tensor in to_released(model, side=16).items()}
    assert saved[prefix + "pos_embed"].shape == (1, 256, 32)
    load_released(copy, saved)
    assert torch.equal(model(*inputs()).visible_BKG, copy(*inputs()).visible_BKG)


@pytest.mark.parametrize("side", [16, 32])
def test_position_table_of_the_file_is_used(side):
    model = MicroDiT(SMALL)
    saved = to_released(randomized(SMALL), side=side)
    saved["pos_embed"] = saved["pos_embed"].bfloat16()
    load_released(model, saved)
    assert torch.equal(model.positions((side, side), torch.zeros(32)), saved["pos_embed"][0].float())
    assert torch.equal(model.positions((4, 4), torch.zeros(32)), sincos_positions(32, (4, 4), 1.0))


def test_released_files_that_do_not_fit_name_the_key():
    model, saved = randomized(SMALL), to_released(randomized(SMALL), side=16)
    before = [p.clone() for p in model.parameters()]
    missing = {k: v for k, v in saved.items() if k != "blocks.1.mlp.w1"}
    with pytest.raises(UserError, match=r"'blocks.1.mlp.w1' is missing"):
        load_released(model, missing)
    with pytest.raises(UserError, match=r"'blocks.9.norm' is unexpected"):
        load_released(model, saved | {"blocks.9.norm": torch.zeros(1)})
    with pytest.raises(UserError, match=r"x_embedder.proj.weight has shape \[32, 16, 2, 2\]"):
        load_released(model, saved | {"x_embedder.proj.weight": torch.zeros(32, 16, 2, 2)})
    with pytest.raises(UserError, match="pos_embed has shape"):
        load_released(model, saved | {"pos_embed": torch.zeros(1, 200, 32)})
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_encoders_in_a_training_checkpoint_are_passed_over():
    model, saved = MicroDiT(SMALL), to_released(randomized(SMALL), side=16)
    load_released(model, {f"dit.{k}": v for k, v in saved.items()} | {"vae.decoder.weight": torch.zeros(1)})
