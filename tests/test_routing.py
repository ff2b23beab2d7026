"""Token reduction: every method against a slow one written out, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from shoestring import recipes
from shoestring.config import (
    DecoderConfig,
    ExpertsConfig,
    MixerConfig,
    NoiseConfig,
    RunConfig,
    StageConfig,
    TokensConfig,
    TransformerConfig,
)
from shoestring.diffusion.losses import denoising_loss
from shoestring.diffusion.process import EDMProcess, FlowProcess
from shoestring.interfaces import Conditioning
from shoestring.models.files import FAMILIES, build_network
from shoestring.models.moe import ExpertChoice
from shoestring.models.routing import METHODS
from shoestring.models.transformer import DiffusionTransformer
from shoestring.planning import model_flops, plan
from shoestring.runtime import Workers, stream
from shoestring.tensors import patchify, visible_count, visible_from_noise
from shoestring.training.schedule import Position
from shoestring.training.step import Draws, Learner, TrainingBatch, train_step

CONDITIONS = ("text", "class", "none")
DEPTH, FIRST, LAST = 4, 1, 3
GRID = (3, 5)
LENGTH = GRID[0] * GRID[1]
EVERY = list(product(FAMILIES, METHODS, CONDITIONS))
PREDICT_ALL = ("maskdit", "tread", "sprint")


def settings(family: str, method: str, condition: str = "class") -> tuple[TransformerConfig, TokensConfig]:
    model = TransformerConfig(
        kind=family,
        in_channels=3,
        condition=condition,
        caption_dim=8,
        classes=3,
        dim=32,
        depth=DEPTH,
        head_dim=16,
        ffn_multiple_of=16,
        mixer=MixerConfig(depth=2, dim=48),
        decoder=DecoderConfig(depth=1 if method == "maskdit" else 0, dim=16, head_dim=8),
        experts=ExpertsConfig(count=4 if family == "microdit" else 0, capacity=2.0),
    )
    return model, TokensConfig(method=method, first=FIRST, last=-1)


def network(family: str, method: str, condition: str = "class") -> DiffusionTransformer:
    """Every parameter is drawn anew: gates that start at zero would hide everything.

    The routers of experts are kept small, as saturated scores would be ties.
    """
    made = FAMILIES[family](*settings(family, method, condition)).double()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(made.named_parameters()):
            scale = 0.03 if "mlp.gate" in name else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=stream(0, "test", i)))
    return made


def conditioning(condition: str, batch: int = 3) -> Conditioning:
    if condition == "text":
        text_BSD = torch.randn(batch, 4, 8, generator=stream(1, "text"), dtype=torch.float64)
        return Conditioning(text_BSD, torch.arange(4)[None] <= torch.arange(batch)[:, None])
    if condition == "class":
        return Conditioning(class_B=torch.arange(batch) - 1)
    return Conditioning.nothing(batch)


def inputs(condition: str = "class", batch: int = 3) -> tuple[Tensor, Tensor, Conditioning]:
    generator = stream(1, "test")
    x = torch.randn(batch, 3, 2 * GRID[0], 2 * GRID[1], generator=generator, dtype=torch.float64)
    return x, torch.randn(batch, generator=generator, dtype=torch.float64), conditioning(condition, batch)


def kept(ratio: float = 0.5, batch: int = 3) -> Tensor:
    visible = visible_from_noise(torch.rand(batch, LENGTH, generator=stream(2, "mask")), ratio)
    assert visible is not None
    return visible


def whole(output, batch: int = 3) -> Tensor:
    """All predicted patches at their places, NaN where nothing is predicted."""
    full = torch.full((batch, LENGTH, 12), math.nan, dtype=torch.float64)
    pairs = [(output.visible_BK, output.visible_BKG), (output.dropped_BJ, output.dropped_BJG)]
    for places, values in pairs:
        if values is not None:
            rows = torch.arange(LENGTH).expand(batch, -1) if places is None else places
            full.scatter_(1, rows[:, :, None].expand(-1, -1, 12), values)
    return full


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)


# -- against slow references -------------------------------------------------------------------------------


def slow(net: DiffusionTransformer, x, time, condition, visible, path_dropped=None) -> Tensor:
    """One sample after another, one token after another, as the papers describe the methods."""
    method = net.routing.__class__.__name__
    rows = [
        _slow_sample(
            net,
            method,
            x[i : i + 1],
            time[i : i + 1],
            condition.part(slice(i, i + 1)),
            list(range(LENGTH)) if visible is None else sorted(visible[i].tolist()),
            path_dropped is not None and bool(path_dropped[i]),
        )
        for i in range(len(x))
    ]
    return torch.cat(rows)


def _slow_sample(net, method, x, time, condition, stay: list[int], no_path: bool) -> Tensor:
    pooled, caption, mask = net._condition(condition)
    c = net.t_embedder(time) + (0 if pooled is None else pooled)
    caption_mixer = None if caption is None else net.patch_mixer_map_y(caption)

    def run(blocks, tokens, y=caption):
        for block in blocks:
            tokens = block(tokens, c, y, mask)
        return tokens

    def put(into, tokens):
        parts = [into[:, j] for j in range(LENGTH)]
        for k, j in enumerate(stay):
            parts[j] = tokens[:, k]
        return torch.stack(parts, dim=1)

    def mixed(tokens):
        return run(net.patch_mixer, net.patch_mixer_map_xin(tokens), caption_mixer)

    tokens = net.x_embedder(x)
    tokens = tokens + net.positions(GRID, tokens)
    places = list(range(LENGTH))
    if method in ("Naive", "MaskDiTMethod"):
        tokens = tokens[:, stay]
    tokens = mixed(tokens)
    if method == "Deferred":
        tokens = tokens[:, stay]
    tokens = net.patch_mixer_map_xout(tokens)
    if method in ("Dense", "Naive", "Deferred", "MaskDiTMethod"):
        tokens = run(net.blocks, tokens)
        places = stay if method in ("Naive", "Deferred") else places
    else:
        tokens = run(net.blocks[:FIRST], tokens)
        deep = run(net.blocks[FIRST:LAST], tokens[:, stay])
        if method == "Tread":
            tokens = put(tokens, deep)
        else:
            absent = net.routing.mask_token.expand(1, LENGTH, -1)
            deep = absent if no_path else put(absent, deep)
            tokens = net.routing.fusion(torch.cat([tokens, deep], dim=-1))
        tokens = run(net.blocks[LAST:], tokens)
    if method == "MaskDiTMethod":
        tokens = put(net.mask_token.expand(1, LENGTH, -1), net.decoder_layer(tokens, c))
        tokens = tokens + net.positions(GRID, tokens, "decoder_pos_embed")
        tokens = run(net.decoder_blocks, tokens, None)
    full = torch.full((1, LENGTH, 12), math.nan, dtype=torch.float64)
    full[:, places] = net.final_layer(tokens, c)
    return full


@pytest.mark.parametrize(("family", "method", "condition"), EVERY)
def test_every_method_is_what_its_paper_says(family, method, condition):
    net, (x, time, given) = network(family, method, condition), inputs(condition)
    visible = None if method == "dense" else kept()
    with torch.no_grad():
        output = net(x, time, given, visible)
        assert same(whole(output), slow(net, x, time, given, visible))
        prepared = net(x, time, net.prepare(given), visible)
        assert same(whole(prepared), whole(output))
    assert net.predicts_all == (method in PREDICT_ALL)
    predicted_all = not whole(output).isnan().any()
    assert predicted_all == (net.predicts_all or method == "dense")


@pytest.mark.parametrize("family", FAMILIES)
def test_sprint_leaves_the_sparse_path_out_of_some_samples(family):
    net, (x, time, given), visible = network(family, "sprint"), inputs(), kept()
    dropped = torch.tensor([True, False, True])
    with torch.no_grad():
        some = whole(net(x, time, given, visible, dropped))
        assert same(some, slow(net, x, time, given, visible, dropped))
        none = whole(net(x, time, given, visible[:, :0]))
        plain = whole(net(x, time, given, visible))
    assert same(some[dropped], none[dropped])
    assert torch.equal(some[~dropped], plain[~dropped])
    assert not torch.allclose(some, plain)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", PREDICT_ALL)
def test_no_tokens_at_all_leave_the_other_layers(family, method):
    """Path drop at inference: K = 0."""
    net, (x, time, given) = network(family, method), inputs()
    nobody = kept()[:, :0]
    with torch.no_grad():
        output = whole(net(x, time, given, nobody))
        assert same(output, slow(net, x, time, given, nobody))
    assert output.isfinite().all()
    assert not torch.allclose(output[0], output[1])  # the picture still matters


# -- identities --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_all_methods_are_dense_when_nothing_is_dropped(family, condition):
    dense, (x, time, given) = network(family, "dense", condition), inputs(condition)
    with torch.no_grad():
        expected = dense(x, time, given).visible_BKG
        for method in ("naive", "deferred", "tread"):
            other = network(family, method, condition)
            other.load_state_dict(dense.state_dict())
            assert torch.equal(other(x, time, given).visible_BKG, expected)
        sprint = network(family, "sprint", condition)
        fusion = {"routing.fusion.weight": torch.cat([torch.zeros(32, 32), torch.eye(32)], dim=1)}
        state = sprint.state_dict() | dense.state_dict() | fusion
        sprint.load_state_dict(state | {"routing.fusion.bias": torch.zeros(32)})
        assert same(sprint(x, time, given).visible_BKG, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [m for m in METHODS if m != "dense"])
def test_order_of_visible_patches_does_not_matter(family, method):
    net, (x, time, given), visible = network(family, method), inputs(), kept()
    shuffled = visible[:, torch.randperm(visible.shape[1])]
    with torch.no_grad():
        outputs = [whole(net(x, time, given, places)) for places in (visible, shuffled)]
    assert same(*outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_routed_tokens_pass_the_middle_blocks_unchanged(family):
    net, (x, time, given), visible = network(family, "tread"), inputs(), kept()
    seen: dict[str, Tensor] = {}
    net.blocks[FIRST - 1].register_forward_hook(lambda _, __, out: seen.update(before=out))
    net.blocks[LAST].register_forward_pre_hook(lambda _, args: seen.update(after=args[0]))
    with torch.no_grad():
        net(x, time, given, visible)
    moved = (seen["before"] != seen["after"]).any(dim=-1)
    assert torch.equal(moved, torch.zeros(3, LENGTH, dtype=torch.bool).scatter(1, visible, True))


@pytest.mark.parametrize("method", METHODS)
def test_layers_see_the_tokens_that_are_there(method):
    """How many tokens each block gets; experts choose their share of just those."""
    model, tokens = settings("microdit", method)
    net = FAMILIES["microdit"](model.model_copy(update={"experts": ExpertsConfig(count=4, every=1)}), tokens)
    net.initialize(stream(0, "init"))
    sizes: dict[str, int] = {}
    chosen: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module, args, _output) -> None:
            sizes[name] = args[0].shape[1]
            if isinstance(module.mlp, ExpertChoice):
                chosen[name] = module.mlp.tokens_per_expert(args[0].shape[1])

        return hook

    for name in ("patch_mixer", "blocks", "decoder_blocks"):
        for i, block in enumerate(getattr(net, name)):
            block.register_forward_hook(watch(f"{name}.{i}"))
    visible = None if method == "dense" else kept(0.6)
    x, time, given = inputs()
    with torch.no_grad():
        net(x.float(), time.float(), given, visible)
    few = 6
    mixer, middle, edge, decoder = {
        "dense": (LENGTH, LENGTH, LENGTH, []),
        "naive": (few, few, few, []),
        "deferred": (LENGTH, few, few, []),
        "maskdit": (few, few, few, [LENGTH]),
        "tread": (LENGTH, few, LENGTH, []),
        "sprint": (LENGTH, few, LENGTH, []),
    }[method]
    assert list(sizes.values()) == [mixer] * 2 + [edge, middle, middle, edge] + decoder
    assert chosen == {
        name: sizes[name] * 2 // 4 for name in ("patch_mixer.1", "blocks.0", "blocks.1", "blocks.2")
    }


@pytest.mark.parametrize(("family", "method", "condition"), EVERY)
def test_every_parameter_learns(family, method, condition):
    net, (x, time, given) = network(family, method, condition), inputs(condition)
    dropped = torch.tensor([True, False, False]) if method == "sprint" else None
    output = net(x, time, given, None if method == "dense" else kept(), dropped)
    whole(output).nan_to_num().square().sum().backward()
    silent = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []
    assert all(p.grad.isfinite().all() for p in net.parameters())


# -- the loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [EDMProcess(0.7), FlowProcess(2.0)])
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_looks_at_what_the_method_predicts(process, method):
    net, (x0, _, given) = network("maskdit", method), inputs()
    visible = None if method == "dense" else kept()
    noise = torch.randn(x0.shape, generator=stream(3, "noise"), dtype=torch.float64)
    level = process.level_from_normal(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64), NoiseConfig())
    denoiser = process.denoiser(net)
    tokens = TokensConfig(method=method)
    with torch.no_grad():
        loss = denoising_loss(process, denoiser, x0, noise, level, given, visible, None, tokens)
        xt = process.add_noise(x0, noise, level)
        image = denoiser(xt, level, given, visible).image()
    squared_BL = (patchify(image, 2) - patchify(x0, 2)).square().mean(dim=2)
    looked_at = torch.ones(3, LENGTH, dtype=torch.float64)
    if method in ("naive", "deferred", "maskdit"):
        looked_at = torch.zeros(3, LENGTH, dtype=torch.float64).scatter(1, visible, 1.0)
    expected = process.weight(level) * (squared_BL * looked_at).sum(1) / looked_at.sum(1)
    assert torch.allclose(loss, expected)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "dense"])
def test_a_ratio_that_drops_nothing_is_no_mask(method):
    """No division by the number of dropped patches, which is zero."""
    for length, ratio in ((LENGTH, 0.0), (LENGTH, 1e-17), (1, 0.75)):
        assert visible_count(length, ratio) == length
        assert visible_from_noise(torch.rand(3, length), ratio) is None
    process, (x0, _, given) = EDMProcess(0.7), inputs()
    tokens = TokensConfig(method=method, reconstruction=0.1 if method == "maskdit" else 0)
    level = process.level_at(torch.full((3,), 0.8, dtype=torch.float64))
    denoiser = process.denoiser(network("maskdit", method))
    loss = denoising_loss(process, denoiser, x0, x0.flip(0), level, given, None, None, tokens)
    assert loss.isfinite().all()


# -- one file and one row ----------------------------------------------------------------------------------


@pytest.fixture
def example(root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The method of CONTRIBUTING.md, in the table for one test; its name."""
    section = (root / "CONTRIBUTING.md").read_text().split("## Add a token method")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(code.splitlines()) <= 30
    before = set(METHODS)
    exec(compile(code, "CONTRIBUTING.md", "exec"), {"__name__": "example"})
    (name,) = set(METHODS) - before
    monkeypatch.setitem(METHODS, name, METHODS.pop(name))
    return name


def test_the_example_of_contributing_trains_and_is_counted(example):
    model, tokens = settings("maskdit", "tread")
    tokens = tokens.model_copy(update={"method": example})
    stages = (StageConfig(name="s", nimg=32, batch=8, resolution=8, mask_ratio=0.5, lr=3e-3),)
    config = RunConfig(name="example", model=model, tokens=tokens, stages=stages)
    net = build_network(config, stream(0, "init"))
    process = EDMProcess(0.5)
    learner = Learner.build(net, tokens, process, config.optimizer, Workers(1))
    draws = Draws.make(0, "train", 0, 8, (3, 8, 8), 16)
    classes = Conditioning(class_B=torch.arange(8) % 3)
    batch = TrainingBatch(0.5 * draws.posterior, classes, draws.noise, draws.level_B, draws.mask_BL)
    here = Position(0, stages[0], 0, 0, 0)
    losses = [train_step(learner, batch, 8, 3e-3, 0.5, here).loss.item() for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]

    visible = visible_from_noise(draws.mask_BL[:1], 0.5)
    explicit = model.model_copy(update={"attention": "explicit"})
    net = FAMILIES["maskdit"](explicit, tokens)
    with FlopCounterMode(display=False) as forward:
        output = net(torch.zeros(1, 3, 8, 8), torch.zeros(1), classes.part(slice(1)), visible).visible_BKG
    assert output.shape == (1, 16, 12)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    counted = model_flops(explicit, (4, 4), 0, 0.5, tokens)
    assert forward.get_total_flops() == counted.forward
    both = forward.get_total_flops() + backward.get_total_flops()
    assert both == pytest.approx(counted.training, rel=1e-9)


# -- what is refused ---------------------------------------------------------------------------------------


LIGHT = ("data.source=shapes", "data.text_encoder=hashing", "model.caption_dim=256")
MISTAKES = [
    (
        ["stages.0.mask_ratio=1"],
        "stages.0.mask_ratio is 1; it must be a number of at least 0 and below 1",
    ),
    (["stages.0.mask_ratio=-0.1"], "stages.0.mask_ratio is -0.1"),
    (["stages.0.mask_ratio_end=1"], "stages.0.mask_ratio_end is 1"),
    (["tokens.method=treat"], "did you mean tread?"),
    (["tokens.method=dense"], "mask_ratio is 0.5, but tokens.method=dense drops nothing"),
    (["tokens.method=dense", "stages.0.mask_ratio=0", "stages.0.mask_ratio_end=0.25"], "drops nothing"),
    (["tokens.method=tread", "tokens.last=9"], "0 <= first < last <= 4"),
    (["tokens.method=tread", "tokens.first=3", "tokens.last=1"], "first is 3 and tokens.last is 1"),
    (["tokens.method=tread", "tokens.first=2", "tokens.last=2"], "first < last"),
    (["tokens.method=tread", "tokens.last=-4"], "first < last"),
    (["tokens.method=sprint", "tokens.first=0", "tokens.last=-1"], "dense blocks before and after"),
    (["tokens.method=sprint", "tokens.first=1", "tokens.last=4"], "dense blocks before and after"),
    (
        ["tokens.method=maskdit", "tokens.reconstruction=0.1"],
        "depth is 0 and tokens.reconstruction is 0.1; tokens.method=maskdit needs a decoder",
    ),
    (["tokens.reconstruction=0.1"], "tokens.method=deferred reconstructs nothing"),
    (["model.decoder.depth=2"], "tokens.method=deferred has no decoder"),
    (["model.experts.count=8", "stages.0.mask_ratio=0.99"], "8 experts of capacity 2 need at least 4"),
    (["stages.0.resolution=30"], "resolution is 30; it must be a multiple of 4"),
    (
        ["model.experts.count=66", "stages.0.mask_ratio=0.5", "stages.0.mask_ratio_end=0"],
        "mask_ratio is 0.5, which leaves 32 of 64 patches; 66 experts",
    ),
]


@pytest.mark.parametrize(("changes", "expected"), MISTAKES)
@pytest.mark.parametrize("command", ["flops", "train"])
def test_wrong_settings_get_one_sentence(mistake, tmp_path, command, changes, expected):
    where = ["--out", tmp_path / "run"] if command == "train" else []
    assert expected in mistake(command, "demo", *LIGHT, *changes, *where)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("change", ["weak=tokens", "weak=both", "strong_ratio=0.5"])
def test_guidance_that_the_model_cannot_give_is_refused_before_training(mistake, tmp_path, change):
    said = mistake("train", "demo", *LIGHT, f"sampling.{change}", "--out", tmp_path / "run")
    assert "this model predicts only the tokens it sees" in said
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_the_demo_takes_every_method():
    """The errors above are not about something else."""
    for method in METHODS:
        changes = [f"tokens.method={method}", "tokens.first=1", "tokens.last=-1"]
        changes += ["model.decoder.depth=1"] if method == "maskdit" else []
        changes += ["stages.0.mask_ratio=0"] if method == "dense" else []
        assert plan(recipes.resolve("demo", changes)).training > 0
