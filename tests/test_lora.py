"""LoRA: step 0, training of the factors alone, files under three names, and the way back into the weights."""

import json

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from run_folders import config_of
from shoestring.adapt.lora import LAYOUTS, keys_of, merge_lora, write_lora
from shoestring.config import (
    ExpertsConfig,
    LoRAConfig,
    OptimizerConfig,
    TokensConfig,
    UNetConfig,
    apply_overrides,
)
from shoestring.interfaces import Conditioning
from shoestring.models.files import ModelFacts, build_network, find_model, load_model, save_model
from shoestring.models.lora import (
    LoRALinear,
    add_lora,
    chosen_maps,
    is_factor,
    lora_parameters,
    train_factors_only,
)
from shoestring.planning.memory import forecast_memory
from shoestring.runtime import UserError, stream
from shoestring.training.loop import train
from shoestring.training.optim import parameter_groups
from shoestring.training.starting import initial_weights
from test_run_stores import Interrupted

UNET = UNetConfig(kind="unet", in_channels=3, channels=8, caption_dim=256, patch_size=2, mask_captions=True)
FACTS = ModelFacts(1000, "ema", 0.5, 1.0, 24)


def save_base(folder, model=None):
    """A model with every weight drawn, none of them zero."""
    config = config_of().model_copy(update={"tokens": TokensConfig(method="dense"), "name": "base"})
    attention = config.model.model_copy(update={"attention": "sdpa"})  # not timed, so the same in every run
    stage = config.stages[1].model_copy(update={"ema_decay": None, "nimg": 40, "resolution": 24})
    config = config.model_copy(update={"stages": (stage,), "model": model or attention})
    network = build_network(config, stream(0, "init"))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: p.detach() + 0.02 * torch.randn(p.shape, generator=generator)
        for name, p in network.named_parameters()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder / "ema.safetensors", tensors, config, FACTS)
    return folder / "ema.safetensors"


@pytest.fixture(scope="module", params=["microdit", "unet"])
def base(request, tmp_path_factory):
    return save_base(tmp_path_factory.mktemp(request.param), UNET if request.param == "unet" else None)


def recipe(base, *overrides):
    """Its base's, with factors."""
    config, _, _ = load_model(base)
    lora = LoRAConfig(rank=2, alpha=6.0)
    config = config.model_copy(update={"lora": lora, "initial_weights": str(base), "name": "with-lora"})
    return apply_overrides(
        config,
        ["data.max_captions=40", "optimizer.weight_decay=0", "logging.validation_images=4", *overrides],
    )


def begin(config):
    network = build_network(config, stream(1, "init"))
    initial_weights(config, network)
    return network


def inputs():
    text = Conditioning(torch.randn(2, 4, 256), torch.ones(2, 4, dtype=torch.bool))
    return torch.randn(2, 3, 8, 8), torch.rand(2), text


# -- the network ------------------------------------------------------------------------------------------


def test_step_zero_is_exactly_the_base(base):
    _, network, _ = load_model(base)
    x, time, told = inputs()

    def outputs(low):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            return network(x, time, told).visible_BKG, network(x, time, network.prepare(told)).visible_BKG

    plain = [outputs(low) for low in (False, True)]
    assert plain[0][0].abs().max() > 0
    add_lora(network, LoRAConfig(rank=2), stream(1, "lora"))
    assert all(m.lora_a.abs().max() > 0 for m in network.modules() if isinstance(m, LoRALinear))
    for low in (False, True):
        assert all(torch.equal(a, b) for a, b in zip(outputs(low), plain[low], strict=True))


def test_a_run_begins_with_the_weights_of_its_base(base):
    before, network = load_file(base), begin(recipe(base))
    for name, parameter in network.named_parameters():
        if name.endswith("lora_b"):
            assert not parameter.any()
        elif not is_factor(name):
            assert torch.equal(parameter, before[name]), name
    again, other = begin(recipe(base)), build_network(recipe(base), stream(2, "init"))
    drawn = [{n: p for n, p in m.named_parameters() if n.endswith("lora_a")} for m in (network, again, other)]
    assert all(torch.equal(value, drawn[1][name]) for name, value in drawn[0].items())
    assert not any(torch.equal(value, drawn[2][name]) for name, value in drawn[0].items())


def test_a_map_is_its_weight_and_the_product_of_its_factors():
    linear = torch.nn.Linear(6, 5).double()
    wrapped = LoRALinear(linear, 3, 1.5)
    torch.nn.init.normal_(wrapped.lora_a)
    torch.nn.init.normal_(wrapped.lora_b)
    x = torch.randn(4, 6).double()
    whole = linear.weight + 1.5 * wrapped.lora_b @ wrapped.lora_a
    torch.testing.assert_close(wrapped(x), F.linear(x, whole, linear.bias))
    assert dict(wrapped.named_parameters()).keys() == {"weight", "bias", "lora_a", "lora_b"}


def test_every_attention_has_factors_and_nothing_else_is_trained(base):
    network = begin(recipe(base))
    train_factors_only(network)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in network.named_parameters() if is_factor(name)}
    maps = {name.rpartition(".")[0] for name in trained}
    config, plain, _ = load_model(base)
    assert maps == set(chosen_maps(plain, LoRAConfig(rank=2)))
    ends = {"microdit": "blocks.1.cross_attn.kv_linear", "unet": "attn2.to_k"}
    assert any(name.endswith(ends[config.model.kind]) for name in maps)
    assert not any("mlp" in name or "ff" in name for name in maps)
    count = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert (
        count == lora_parameters(plain, LoRAConfig(rank=2)) < 0.2 * sum(p.numel() for p in plain.parameters())
    )


def test_patterns_choose_other_maps(tmp_path):
    base = save_base(tmp_path)
    network = begin(recipe(base, "lora.targets=['blocks.?.mlp.w1', '*adaLN*']"))
    train_factors_only(network)
    names = {name for name, m in network.named_modules() if isinstance(m, LoRALinear)}
    assert {"blocks.0.mlp.w1", "blocks.1.mlp.w1", "blocks.0.adaLN_modulation.1"} <= names
    assert not any("attn" in name for name in names)
    network(*inputs()).visible_BKG.sum().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None) == (not is_factor(name)), name


def test_routers_get_no_factors(tmp_path):
    model = config_of().model.model_copy(update={"experts": ExpertsConfig(count=2, every=1)})
    network = build_network(config_of(model=model), stream(0, "init"))
    assert any(name.endswith("mlp.gate") for name, _ in network.named_modules())
    assert not any(name.endswith("gate") for name in chosen_maps(network, LoRAConfig(rank=1, targets=("*",))))


def test_learning_rates_of_factors_do_not_know_the_width(tmp_path):
    model = config_of().model.model_copy(update={"mup_base_dim": 16})
    network = build_network(config_of(model=model, lora=LoRAConfig(rank=2)), stream(0, "init"))
    train_factors_only(network)
    (group,) = parameter_groups(network, OptimizerConfig())
    assert (group.role, group.lr_scale) == ("matrix", 1.0)
    assert all(is_factor(name) for name in group.parameters)


def test_the_forecast_of_memory_counts_what_is_trained(tmp_path):
    config = config_of()
    stage = config.stages[0]
    whole, few = (
        forecast_memory(c, stage, micro_batch=10)
        for c in (config, config.model_copy(update={"lora": LoRAConfig(rank=2)}))
    )
    network = build_network(config)
    extra = lora_parameters(network, LoRAConfig(rank=2))
    assert (few.gradients, few.moments) == (4 * extra, 8 * extra)
    assert few.weights == whole.weights + 4 * extra
    assert few.averages == whole.averages + 4 * extra
    assert few.total < whole.total


# -- training ---------------------------------------------------------------------------------------------


def started(folder, workers=1):
    folder.mkdir(parents=True)
    machine = {"matmul_flops_fp32_cpu": 1e9, "matmul_flops_bf16_cpu": 1e9, "workers_cpu": workers}
    (folder / "machine.json").write_text(json.dumps(machine))
    return folder


def states(run):
    return {kind: load_file(find_model(run, kind)) for kind in ("ema", "weights")}


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Four steps, in two threads with weights in bfloat16."""
    folder = started(tmp_path_factory.mktemp("runs") / "whole", workers=2)
    assert train(recipe(base, "precision=bf16", "stages.0.lr=0.01"), folder, Console(quiet=True))
    return folder


def test_training_moves_the_factors_and_nothing_else(base, trained):
    before = load_file(base)
    for tensors in states(trained).values():
        for name, tensor in tensors.items():
            if is_factor(name):
                assert tensor.abs().max() > 0, name
            else:
                assert torch.equal(tensor, before[name]), name
        assert before.keys() == {name for name in tensors if not is_factor(name)}


def test_an_interrupted_run_is_the_whole_one(base, trained, tmp_path):
    config = recipe(base, "precision=bf16", "stages.0.lr=0.01")
    if config.model.kind == "unet":
        pytest.skip("the loop is the same")
    pieces = started(tmp_path / "pieces", workers=2)
    assert not Interrupted(config, pieces, 20, killed=False).train()
    assert train(config, pieces, Console(quiet=True))
    for kind, tensors in states(trained).items():
        other = states(pieces)[kind]
        assert all(torch.equal(tensor, other[name]) for name, tensor in tensors.items())


def test_one_thread_learns_what_two_do(tmp_path):
    """In float32 the gradients differ by the order of sums only."""
    base, found = save_base(tmp_path / "base"), []
    for workers in (1, 2):
        folder = started(tmp_path / f"run-{workers}", workers)
        assert train(recipe(base, "stages.0.lr=0.001"), folder, Console(quiet=True))
        found.append(states(folder)["weights"])
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-3, atol=1e-5)


# -- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_weights_are_the_network_with_factors(base, trained, tmp_path, layout):
    write_lora(trained, tmp_path / "lora.safetensors", layout)
    merge_lora(base, tmp_path / "lora.safetensors", tmp_path / "merged.safetensors")
    config, merged, facts = load_model(tmp_path / "merged.safetensors")
    assert config.lora is None
    assert facts.nimg == 40
    _, beside, _ = load_model(find_model(trained))
    _, original, _ = load_model(base)
    x, time, told = inputs()
    with torch.no_grad():
        found, expected, plain = (n(x, time, told).visible_BKG for n in (merged, beside, original))
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # float32 sums in another order


def test_a_scale_between_the_base_and_all_that_was_learned(base, trained, tmp_path):
    write_lora(trained, tmp_path / "lora.safetensors", "shoestring")
    found = []
    for scale in (0.0, 0.5, 1.0):
        merge_lora(base, tmp_path / "lora.safetensors", tmp_path / "merged.safetensors", scale)
        found.append(load_file(tmp_path / "merged.safetensors"))
    before = load_file(base)
    assert all(torch.equal(found[0][name], tensor) for name, tensor in before.items())
    for name in before:
        middle = (found[0][name] + found[2][name]) / 2
        torch.testing.assert_close(found[1][name], middle, rtol=1e-5, atol=1e-6)


def test_names_of_the_tensors(base, trained, tmp_path):
    assert (
        keys_of("blocks.0.attn.qkv", "kohya", unet=False)[1] == "lora_unet_blocks_0_attn_qkv.lora_up.weight"
    )
    assert (
        keys_of("unet.mid_block.a.to_out.0", "diffusers", True)[0]
        == "unet.mid_block.a.to_out.0.lora_A.weight"
    )
    maps = dict(load_model(find_model(trained))[1].named_modules())
    modules = [m for m in maps.values() if isinstance(m, LoRALinear)]
    for layout, start in (("diffusers", ("unet.", "transformer.")), ("kohya", ("lora_unet_",))):
        path = tmp_path / f"{layout}.safetensors"
        assert write_lora(trained, path, layout) == len(modules)
        with safe_open(path, "pt") as file:
            words, keys = file.metadata(), set(file.keys())
            alphas = {file.get_tensor(key).item() for key in keys if key.endswith(".alpha")}
            if layout == "diffusers":  # whose loaders take the product as it is
                name, lora = next((n, m) for n, m in maps.items() if isinstance(m, LoRALinear))
                a, b = (file.get_tensor(key) for key in keys_of(name, layout, name.startswith("unet.")))
                torch.testing.assert_close(b @ a, lora.scale * (lora.lora_b @ lora.lora_a))
                assert lora.scale != 1
        assert all(key.startswith(start) for key in keys)
        assert len(keys) == len(modules) * (3 if layout == "kohya" else 2)
        assert alphas == ({6.0} if layout == "kohya" else set())
        assert json.loads(words["lora"])["rank"] == 2
        assert json.loads(words["config"])["initial_weights"] is None


def test_diffusers_knows_the_names(trained, tmp_path):
    """Its own U-Net has a module of every name."""
    config, network, _ = load_model(find_model(trained))
    if config.model.kind != "unet":
        pytest.skip("transformers of ours are not diffusers'")
    write_lora(trained, tmp_path / "lora.safetensors", "diffusers")
    there = {f"unet.{name}" for name, _ in network.unet.named_modules()}
    for key in load_file(tmp_path / "lora.safetensors"):
        assert key.partition(".lora_")[0] in there


# -- bad input --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A base, a run with factors, and their file."""
    folder = tmp_path_factory.mktemp("small")
    base = save_base(folder / "base")
    run = started(folder / "run")
    assert train(recipe(base), run, Console(quiet=True))
    write_lora(run, folder / "lora.safetensors", "shoestring")
    return folder


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "lora.targets=['*attn*','*atention*']",
            r"no linear map .* called like '\*atention\*'",
        ),
        ("lora.rank=33", r"lora.rank is 33, but \S+ maps \d+ to \d+ values; choose at most 32"),
        ("lora.rank=0", r"lora\.rank is 0"),
        ("lora.alpha=0", r"lora\.alpha is 0"),
        ("lora.targets=[]", r"lora\.targets is"),
        ("optimizer.kind=muon", "lora is set, but optimizer.kind is muon"),
        ("lora=null", "has LoRA factors beside its weights, and lora is null"),
    ],
)
def test_wrong_settings_are_a_sentence(small, override, sentence):
    start = small / "run" if override == "lora=null" else small / "base"
    with pytest.raises(UserError, match=sentence):
        begin(recipe(find_model(small / "base"), override, f"initial_weights={start}"))


def test_a_lora_of_another_base_is_refused(small, tmp_path, mistake):
    other = save_base(tmp_path / "other")
    tensors = load_file(other)
    with safe_open(other, "pt") as file:
        words = file.metadata()
    tensors["final_layer.linear.weight"] += 1e-3
    save_file(tensors, other, words)
    said = mistake("adapt", "merge", other, small / "lora.safetensors", "--out", tmp_path / "m.safetensors")
    assert "was trained on a base whose weights have the digest" in said
    assert not (tmp_path / "m.safetensors").exists()


def test_files_that_are_no_lora_are_refused(small, tmp_path, mistake):
    out, noise = tmp_path / "out.safetensors", tmp_path / "noise"
    base, run = small / "base", small / "run"

    def merged(lora):
        return mistake("adapt", "merge", base, lora, "--out", out)

    assert "has no LoRA factors" in mistake("adapt", "lora-file", base, "--out", out)
    assert "--keys is 'peft'" in mistake("adapt", "lora-file", run, "--keys", "peft", "--out", out)
    model = find_model(base)
    assert "is not a file of shoestring adapt lora-file" in mistake(
        "adapt", "merge", base, model, "--out", out
    )
    assert "does not exist" in mistake("adapt", "merge", base, tmp_path / "nothing", "--out", out)
    (tmp_path / "noise").write_bytes(b"x" * 99)
    assert "is damaged or not a safetensors file" in merged(noise)
    tensors = load_file(small / "lora.safetensors")
    with safe_open(small / "lora.safetensors", "pt") as file:
        words = file.metadata()
    key = next(iter(sorted(tensors)))
    save_file({k: t for k, t in tensors.items() if k != key}, tmp_path / "less.safetensors", words)
    assert f"{key} is missing; it is damaged" in merged(tmp_path / "less.safetensors")
    save_file({**tensors, key: tensors[key][:, :1].clone()}, tmp_path / "odd.safetensors", words)
    assert "of shape" in merged(tmp_path / "odd.safetensors")
    assert not out.exists()
