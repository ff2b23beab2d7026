"""The U-Net family: sizes, costs, seam, training and forecasts."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shoestring import recipes
from shoestring.config import RunConfig, TokensConfig, UNetConfig, apply_overrides, parse_yaml, to_yaml
from shoestring.interfaces import Conditioning
from shoestring.models.files import build_network, new_network
from shoestring.planning import forecast_memory, model_flops
from shoestring.planning.activations import Bytes
from shoestring.planning.activations_unet import unet_parts
from shoestring.recipes.ldm import FAMILY
from shoestring.runtime import UserError, stream
from shoestring.training.checks import dead_parameters

DENSE = TokensConfig(method="dense")
TINY = UNetConfig(kind="unet", in_channels=3, channels=8, caption_dim=12, patch_size=2)


def parameters_of(config):
    with torch.device("meta"):
        return sum(p.numel() for p in new_network(config, DENSE).parameters())


@pytest.mark.parametrize(
    ("size", "millions"),
    [
        *zip(
            FAMILY, (38.8, 83.4, 144.8, 223.0, 318.0, 429.8, 558.3, 703.7, 865.9, 2191.7, 4900.2), strict=True
        )
    ],
)
def test_the_eleven_sizes_have_their_parameters(size, millions):
    config = recipes.get(f"ldm-{size}")
    assert parameters_of(config.model) / 1e6 == pytest.approx(millions, abs=0.1)
    assert config.nimg == 500_000 * 2048
    assert config.sampling.guidance == 7.5


def test_costs_of_an_evaluation_are_the_papers():
    """39M is a misprint in the paper: its cost of 0.07 is right, its 25.3 GFLOPs are not."""
    gflops = {
        size: model_flops(recipes.get(f"ldm-{size}").model, (64, 64), 77).forward / 1e9 for size in FAMILY
    }
    costs = {size: value / gflops["866m"] for size, value in gflops.items()}
    for size, member in FAMILY.items():
        if size == "39m":
            assert round(costs[size], 2) == member.cost == 0.07
            continue
        bar = 0.05 if size in ("83m", "145m") else 0.02
        assert costs[size] == pytest.approx(member.gflops / 789.3, rel=bar)


@pytest.mark.parametrize("condition", ["text", "class"])
@pytest.mark.parametrize("image_channels", [0, 3])
@pytest.mark.parametrize("shape", [{}, {"multipliers": (1, 3), "attention": (False, True), "layers": 1}])
def test_training_costs_what_torch_counts(condition, image_channels, shape):
    changes = {"condition": condition, "classes": 3, "image_channels": image_channels, "attention_depth": 2}
    config = TINY.model_copy(update=changes | shape)
    counted = model_flops(config, (16, 16), 5)
    with torch.device("meta"):
        net = new_network(config, DENSE)
        told = Conditioning(torch.empty(1, 5, 12))
        if condition == "class":
            told = Conditioning(class_B=torch.zeros(1, dtype=torch.long))
        if image_channels:
            told = replace(told, image=torch.empty(1, 3, 32, 32))
        with FlopCounterMode(display=False) as counter:
            output = net(torch.empty(1, 3, 32, 32), torch.empty(1), told).visible_BKG.sum()
        assert counted.forward == counter.get_total_flops()
        with counter:
            output.backward()
    assert counted.training == pytest.approx(counted.forward + counter.get_total_flops(), rel=1e-9)


@pytest.mark.parametrize("size", ["39m", "866m"])
def test_the_papers_sizes_cost_what_torch_counts(size):
    config = recipes.get(f"ldm-{size}").model
    with torch.device("meta"), torch.no_grad():
        net = new_network(config, DENSE)
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 4, 64, 64), torch.empty(1), Conditioning(torch.empty(1, 77, 1024)))
    assert model_flops(config, (64, 64), 77).forward == counter.get_total_flops()


def test_groups_and_heads_of_narrow_members():
    for channels in (8, 12, 16, 24, 32, 48, 64, 320):
        config = UNetConfig(kind="unet", channels=channels)
        assert channels % config.norm_groups == 0
        assert channels // config.norm_groups >= (8 if channels < 64 else 2)
        for width in config.widths:
            heads = config.heads_of(width)
            assert width % heads == 0
            assert width // heads >= 8 or heads == 1
    assert [UNetConfig(kind="unet").heads_of(width) for width in (320, 640, 1280)] == [8, 8, 8]
    assert UNetConfig(kind="unet", channels=24).heads_of(24) == 3


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    made = new_network(TINY, DENSE)
    made.initialize(stream(0, "init"))
    return made.eval()


def caption(length=5, batch=2):
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[:, :3] = True
    return Conditioning(torch.randn(batch, length, 12), mask)


def test_the_output_is_an_image_and_zero_at_first(network):
    out = network(torch.randn(2, 3, 32, 16), torch.rand(2) * 999, caption())
    assert out.visible_BKG.shape == (2, 16 * 8, 12)
    assert out.visible_BK is None
    assert out.visible_BKG.abs().max() == 0


def trained_a_little(network):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def test_hidden_caption_tokens_change_nothing_where_captions_are_masked():
    config = TINY.model_copy(update={"mask_captions": True})
    net = new_network(config, DENSE)
    net.initialize(stream(0, "init"))
    trained_a_little(net.eval())
    x, time, told = torch.randn(2, 3, 16, 16), torch.rand(2) * 999, caption()
    changed = told.text_BSD.clone()
    changed[:, 3:] += 5
    again = Conditioning(changed, told.text_mask_BS)
    with torch.no_grad():
        first, second = net(x, time, told), net(x, time, again)
        shorter = net(x, time, Conditioning(told.text_BSD[:, :3], told.text_mask_BS[:, :3]))
        prepared = net(x, time, net.prepare(told))
    assert torch.allclose(first.visible_BKG, second.visible_BKG, atol=1e-5)
    assert torch.allclose(first.visible_BKG, shorter.visible_BKG, atol=1e-5)
    assert torch.equal(first.visible_BKG, prepared.visible_BKG)


@pytest.mark.parametrize("condition", ["class", "none", "text"])
def test_every_parameter_learns(condition):
    net = new_network(TINY.model_copy(update={"condition": condition, "classes": 3}), DENSE)
    net.initialize(stream(0, "init"))
    trained_a_little(net)
    told = caption() if condition == "text" else Conditioning(class_B=torch.tensor([0, 2]))
    if condition == "none":
        told = Conditioning.nothing(2)
    out = net(torch.randn(2, 3, 32, 32), torch.rand(2) * 999, told)
    out.visible_BKG.square().mean().backward()
    assert dead_parameters({name: p.grad for name, p in net.named_parameters()}) == []


def test_the_same_seed_draws_the_same_weights():
    config = recipes.get("ldm-39m").model_copy(update={"model": TINY})
    one, two = (build_network(config, stream(3, "init")).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_memory_that_autograd_keeps_is_forecast(network):
    """Against what it does keep, on a CPU in fp32."""
    parts = unet_parts(network, (16, 16), 5, Bytes.of("fp32", "cpu"))
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = network(torch.randn(4, 3, 32, 32), torch.rand(4) * 999, caption(batch=4))
    actual = sum(size for size, _ in kept.values()) / 4
    assert sum(part.kept for part in parts) == pytest.approx(actual, rel=0.2)
    del out


def test_a_plan_of_the_family_is_made():
    config = recipes.get("ldm-866m")
    forecast = forecast_memory(config, config.stages[0], micro_batch=8, ranks=8, sharding="fsdp")
    assert 5e9 < forecast.total < 80e9
    less = forecast_memory(
        config, config.stages[0], micro_batch=8, ranks=8, sharding="fsdp", checkpointing=True
    )
    assert less.activations < forecast.activations


# -- settings ---------------------------------------------------------------------------------------------


def test_a_recipe_survives_yaml_and_overrides():
    config = recipes.get("ldm-145m")
    assert parse_yaml(to_yaml(config)) == config
    changed = apply_overrides(config, ["model.channels=48", "process.prediction=v"])
    assert changed.model.channels == 48
    assert changed.process.prediction == "v"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.channels=10", r"model\.channels is 10; .* a multiple of 4"),
        ("model.depth=3", r"unknown key 'model\.depth'"),
        ("model.kind=microdat", r"model\.kind is .microdat.; it must be microdit, maskdit or unet"),
        ("model.kind=microdit", r"model\.kind=microdit is another family of networks"),
        ("superres.factor=2", r"superres is null, so superres\.factor cannot be changed alone"),
        ("model.attention=[true]", r"attention has 1 values and multipliers 4"),
        ("model.attention=[false, false, false, false]", r"attention is false everywhere"),
        ("tokens.method=tread", r"tokens\.method is tread, but model\.kind=unet"),
        ("optimizer.kind=muon", r"optimizer\.kind is muon, but model\.kind=unet"),
        ("compile=true", r"compile is true, but model\.kind=unet"),
    ],
)
def test_wrong_settings_are_a_sentence(override, sentence):
    with pytest.raises(UserError, match=sentence):
        apply_overrides(recipes.get("ldm-39m"), [override])


def test_settings_of_a_u_net_are_not_those_of_a_transformer():
    with pytest.raises(UserError, match=r"unknown key 'model\.channels'"):
        apply_overrides(recipes.get("demo"), ["model.channels=8"])
    assert isinstance(recipes.get("ldm-39m"), RunConfig)
