"""How experts share the tokens: counted by hooks in single forward passes."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shoestring.config import ExpertsConfig, MixerConfig, TransformerConfig
from shoestring.interfaces import Conditioning
from shoestring.models.microdit import MicroDiT
from shoestring.models.moe import ExpertChoice, expert_load, expert_report, expert_statistics
from shoestring.runtime import stream

SMALL = TransformerConfig(
    in_channels=3,
    caption_dim=8,
    dim=32,
    depth=4,
    head_dim=16,
    ffn_multiple_of=16,
    mixer=MixerConfig(depth=2, dim=32),
    experts=ExpertsConfig(count=4),
)


def layer(capacity: float = 2.0) -> ExpertChoice:
    made = ExpertChoice(8, 16, experts=4, capacity=capacity)
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=stream(0, "layer", i)))
    return made


def network() -> MicroDiT:
    made = MicroDiT(SMALL)
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=stream(0, "network", i)))
    return made


def call(model: MicroDiT, visible: torch.Tensor | None = None) -> torch.Tensor:
    x = torch.randn(2, 3, 8, 8, generator=stream(0, "x"))
    text = Conditioning(torch.randn(2, 4, 8, generator=stream(0, "text")))
    return model(x, torch.tensor([0.1, -0.3]), text, visible).visible_BKG


@pytest.mark.parametrize("capacity", [0.5, 1.0, 2.0])
def test_the_load_is_what_counting_one_by_one_gives(capacity: float) -> None:
    moe = layer(capacity)
    x = torch.randn(3, 12, 8)
    times = [[0] * 12 for _ in range(3)]
    favourites, entropies = [0] * 4, []
    r = max(1, int(capacity * 12 / 4))
    for b in range(3):
        scores = (x[b] @ moe.gate.weight.T).softmax(-1)
        for e in range(4):
            for token in sorted(range(12), key=lambda t: -scores[t, e].item())[:r]:
                times[b][token] += 1
        for t in range(12):
            favourites[int(scores[t].argmax())] += 1
            entropies.append(-sum(p * math.log(p) for p in scores[t].tolist()) / math.log(4))
    flat = [count for row in times for count in row]
    load = expert_load(moe, x)
    assert load.tokens_per_expert == r
    assert load.untouched == pytest.approx(flat.count(0) / 36)
    assert load.several == pytest.approx(sum(count > 1 for count in flat) / 36)
    assert load.favourite_E == pytest.approx([count / 36 for count in favourites])
    assert load.entropy == pytest.approx(sum(entropies) / 36, rel=1e-5)
    assert load.several > 0 if capacity == 2 else load.untouched > 0


def test_an_undecided_router_leaves_the_same_tokens_to_all() -> None:
    moe = layer()
    with torch.no_grad():
        moe.gate.weight.zero_()
    load = expert_load(moe, torch.randn(2, 12, 8))
    assert load.entropy == pytest.approx(1)
    assert load.untouched == pytest.approx(0.5)  # all take the same 6 of 12
    assert expert_report({"a": load})["most"] == 4


def test_a_forward_pass_is_watched_and_left_as_it_was() -> None:
    model = network()
    before = call(model)
    with torch.no_grad(), expert_statistics(model) as loads:
        assert loads == {}
        inside = call(model)
    assert torch.equal(inside, before)
    assert list(loads) == ["patch_mixer.1.mlp", "blocks.1.mlp"]  # as they were called
    assert all(not module._forward_pre_hooks for module in model.modules())
    kept = dict(loads)
    call(model)
    assert loads == kept


def test_only_the_tokens_that_a_layer_saw_count() -> None:
    model = network()
    visible = torch.arange(8)[None].expand(2, 8)
    with torch.no_grad(), expert_statistics(model) as loads:
        call(model, visible)
    # 16 patches in the mixer, 8 in the backbone; capacity 2 of 4 experts
    assert loads["patch_mixer.1.mlp"].tokens_per_expert == 8
    assert loads["blocks.1.mlp"].tokens_per_expert == 4


def test_the_report_is_of_all_layers() -> None:
    model = network()
    with torch.no_grad(), expert_statistics(model) as loads:
        call(model)
    report = expert_report(loads)
    shares = [4 * share for load in loads.values() for share in load.favourite_E]
    assert (report["least"], report["most"]) == (min(shares), max(shares))
    assert report["least"] < 1 < report["most"]
    untouched = [load.untouched for load in loads.values()]
    assert report["untouched"] == pytest.approx(sum(untouched) / 2)
    assert report["worst_untouched"] == max(untouched)


def test_a_network_without_experts_gives_nothing() -> None:
    model = MicroDiT(SMALL.model_copy(update={"experts": ExpertsConfig(count=0)}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    with expert_statistics(model) as loads:
        call(model)
    assert loads == {}


COMPILED = """
import torch
from test_expert_load import call, expert_statistics, network

model, graphs = network(), []
for block in model.all_blocks():
    block.compile(backend=lambda graph, inputs: graphs.append(graph) or graph, dynamic=False)
with torch.no_grad():
    before, compiled = call(model), len(graphs)
    with expert_statistics(model) as loads:
        inside = call(model)
    assert list(loads) == ["patch_mixer.1.mlp", "blocks.1.mlp"], loads
    assert torch.equal(call(model), before)
assert torch.allclose(inside, before, atol=1e-6)
assert compiled == len(graphs) > 0
"""


def test_compiled_blocks_are_watched_too_and_stay_compiled() -> None:
    # A process of its own: the checks of shapes that tests add to the models cannot be compiled.
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
