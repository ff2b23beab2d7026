"""The profile of a step: every product is counted, where it belongs, forward and backward."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from shoestring import cli, recipes
from shoestring.config import (
    DecoderConfig,
    ExpertsConfig,
    MixerConfig,
    RunConfig,
    TokensConfig,
    TransformerConfig,
)
from shoestring.models.routing import METHODS
from shoestring.planning import measured_peak_flops, model_flops
from shoestring.training import profile
from shoestring.training.operations import Ledger
from shoestring.training.profile import StepProfile, profile_recipe, profile_table

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
CAPTION = 6


@pytest.fixture(autouse=True)
def _small_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's peak by small products: large ones would take longer than all else here."""
    monkeypatch.setattr(profile, "measured_peak_flops", partial(measured_peak_flops, sizes=(64,)))


def recipe(changes: dict[str, object], tokens: TokensConfig, ratio: float, **settings: object) -> RunConfig:
    base = recipes.resolve("demo-shapes", [f"stages.0.mask_ratio={ratio}", f"data.max_tokens={CAPTION}"])
    return base.model_copy(update={"model": SMALL.model_copy(update=changes), "tokens": tokens} | settings)


def run(config: RunConfig) -> StepProfile:
    stage = config.stages[0].model_copy(update={"resolution": 8})
    return profile_recipe(config, stage, 3, 1, torch.device("cpu"), False, Console(quiet=True))


@pytest.mark.parametrize(
    ("changes", "tokens", "ratio", "precision"),
    [
        ({}, TokensConfig(), 0.5, "bf16"),
        ({}, TokensConfig(), 0.0, "fp32"),
        ({"attention": "explicit"}, TokensConfig(method="sprint", first=1, last=-1), 0.5, "fp32"),
        (
            {
                "kind": "maskdit",
                "condition": "class",
                "experts": ExpertsConfig(count=0),
                "decoder": DecoderConfig(depth=1, dim=24, head_dim=8),
            },
            TokensConfig(method="maskdit"),
            0.5,
            "bf16",
        ),
    ],
    ids=["deferred", "fused", "sprint", "maskdit"],
)
def test_flops_are_those_of_the_formula(changes, tokens, ratio, precision):
    config = recipe(changes, tokens, ratio, precision=precision)
    found = run(config)
    needed = model_flops(config.model, (4, 4), CAPTION, ratio, tokens).training
    assert found.flops == pytest.approx(3 * needed, rel=1e-9)
    assert found.images == 3


def test_every_part_is_there_and_has_its_own_products():
    config = recipe({}, TokensConfig(), 0.5)
    parts = run(config).parts
    names = {"self-attention", "cross-attention", "feed-forward", "modulation, norms"}
    expected = {f"{where}: {name}" for where in ("mixer", "backbone") for name in names} | {
        *("embedding", "captions", "mixer: maps", "token method", "head", "noise and loss"),
        *("experts: products", "experts: router", "experts: moving tokens"),
        *("clip", "optimiser", "averages", "data"),
    }
    assert set(parts) == expected
    once = {"clip", "optimiser", "averages", "data"}  # have no backward pass
    for name, part in parts.items():
        assert (part.backward_s > 0) == (name not in once), name
        assert part.forward_s > 0, name
    # Two layers of the backbone and one of the mixer have experts, each of which takes half of the tokens.
    products = 0.0
    for dim, hidden, chosen in ((48, 192, 8), (32, 64, 4), (32, 96, 4)):
        products += 3 * 2 * 2 * (4 * 3 * chosen) * dim * hidden
    assert parts["experts: moving tokens"].flops == 0
    assert parts["experts: products"].flops == pytest.approx(products, rel=0.2)  # widths are rounded
    assert parts["backbone: self-attention"].flops > parts["backbone: modulation, norms"].flops


def test_recomputed_blocks_are_counted_twice():
    plain = run(recipe({}, TokensConfig(), 0.5)).parts
    again = run(recipe({"checkpoint_activations": True}, TokensConfig(), 0.5)).parts
    for name in ("backbone: self-attention", "mixer: feed-forward", "experts: products"):
        assert again[name].flops == pytest.approx(plain[name].flops * 4 / 3, rel=0.02), name
    assert again["captions"].flops == plain["captions"].flops


def test_table_says_what_was_not_measured():
    def printed(own: bool) -> str:
        console = Console(width=120)
        with console.capture() as capture:
            console.print(profile_table(found, "title", own))
        return capture.get()

    found = run(recipe({}, TokensConfig(), 0.5))
    assert "not measured" in printed(own=False)
    assert "not measured" not in printed(own=True)
    assert "images/s" in printed(own=True)


def test_command_with_the_recipes_own_data(monkeypatch, capsys):
    small = [
        *("model.dim=32", "model.head_dim=16", "model.depth=2", "model.mixer.dim=32", "model.patch_size=8"),
        *("data.max_captions=20", "stages.0.batch=4"),
    ]
    words = ["shoestring", "profile", "demo-shapes", *small, "--steps", "1", "--data", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    said = capsys.readouterr().out
    assert "data" in said
    assert "not measured" not in said
    assert "A step of 4 images" in said


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["demo", "--stage", "third"], "'third'"),
        (["demo", "--stage", "7"], "1 (unmasked)"),
        (["nonsense"], "nonsense"),
        (["demo", "--device", "abacus"], "abacus"),
        (["demo", "--batch", str(10**14)], "images at once do not fit"),
        (["demo", "stages.0.resolution=30"], "30"),
    ],
)
def test_mistakes(mistake, words, named):
    assert named in mistake("profile", *words)


# -- nothing waits for the device --------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Notes operations for which the host would wait on a GPU: numbers read, shapes that depend on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "bincount", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name.startswith(self.NAMES):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["random", "blocks", "stratified"])
def test_a_step_never_waits_for_the_device(method, pattern):
    changes = {"mask_captions": True}
    if method == "maskdit":
        changes["decoder"] = DecoderConfig(depth=1, dim=24, head_dim=8)
    ratio = 0.0 if method == "dense" else 0.5
    tokens = TokensConfig(method=method, first=1, last=-1, pattern=pattern)
    config = recipe(changes, tokens, ratio)
    steps = profile._Steps(config, config.stages[0], torch.device("cpu"), 0.5)
    batch = profile.random_batch(config, 2, 8, torch.device("cpu"))
    ledger = Ledger(torch.device("cpu"))
    steps.step(batch, ledger, look=False)
    with Waits() as waits:
        steps.step(batch, ledger, look=False)
    assert waits.seen == []
    with Waits() as waits:
        batch.x0.mean().item()
    assert waits.seen == ["_local_scalar_dense"]
