"""The form of attention: timed, kept, used, and the same result in either form."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch.overrides import TorchFunctionMode

from shoestring.config import ExpertsConfig, MixerConfig, TokensConfig, TransformerConfig
from shoestring.interfaces import Conditioning
from shoestring.models.attention import attend, attention_key
from shoestring.models.microdit import MicroDiT
from shoestring.recipes import microdit
from shoestring.runtime import Workers
from shoestring.tensors import visible_from_noise
from shoestring.training.step_shapes import StepShape
from shoestring.training.timed_attention import attention_sentence, choose_attention

SMALL = TransformerConfig(
    in_channels=3,
    caption_dim=8,
    dim=32,
    depth=2,
    head_dim=16,
    qkv_multipliers=(1.0,),
    ffn_multiple_of=16,
    mixer=MixerConfig(depth=1, dim=32),
    experts=ExpertsConfig(count=0),
)
SHAPES = [StepShape(2, (4, 4), 0.5, 6)]


class Fused(TorchFunctionMode):
    """Counts calls of the fused kernel by queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.seen.append((args[0].shape[2], args[1].shape[2]))
        return function(*args, **(kwargs or {}))


def run(network: MicroDiT) -> list[tuple[int, int]]:
    with Fused() as fused, torch.autocast("cpu", torch.bfloat16):
        network(
            torch.zeros(2, 3, 8, 8),
            torch.zeros(2),
            Conditioning(torch.zeros(2, 6, 8)),
            visible_from_noise(torch.rand(2, 16), 0.5),
        )
    return fused.seen


def test_every_shape_is_timed_once_and_the_answer_is_json():
    with Workers(2) as workers:
        choices = choose_attention(SMALL, TokensConfig(), SHAPES, torch.bfloat16, workers)
    assert set(choices) == {
        f"bf16 {queries}x{keys}x16" for queries, keys in ((16, 16), (16, 6), (8, 8), (8, 6), (6, 6))
    }
    assert set(choices.values()) <= {"explicit", "sdpa"}
    assert json.loads(json.dumps(choices)) == choices
    sentence = attention_sentence(choices)
    assert next(iter(choices)) in sentence
    assert sentence.count("\n") == 0


def test_nothing_is_timed_where_the_recipe_says_which():
    fixed = SMALL.model_copy(update={"attention": "sdpa"})
    assert choose_attention(fixed, TokensConfig(), SHAPES, torch.bfloat16, Workers(1)) == {}


def test_the_choice_is_used_where_gradients_are_taken():
    network = MicroDiT(SMALL)
    assert run(network) == []  # the rule, where nothing was timed: written out in bf16 on a CPU
    key = attention_key(torch.bfloat16, 8, 8, 16, masked=False)
    network.use_attention({key: "sdpa"})
    assert run(network) == [(8, 8)] * 2
    network.use_attention({key: "explicit"})
    assert run(network) == []
    with torch.no_grad():
        assert len(run(network)) == 1 + 2 * 3  # caption; self and cross of mixer and both blocks


@pytest.mark.parametrize("masked", [False, True])
def test_both_forms_compute_the_same(masked):
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
    mask = torch.rand(2, 7) < 0.6 if masked else None
    if mask is not None:
        mask[:, 0] = True
    results = []
    for kind in ("explicit", "sdpa"):
        key = attention_key(torch.float64, 5, 7, 8, masked)
        output = attend(q, k, v, mask, "auto", {key: kind})
        results.append((output, *torch.autograd.grad(output.square().sum(), (q, k, v))))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.slow
def test_timing_tiny2_is_cheap():
    shape = StepShape(16, (16, 16), 0.75, 77)
    start = time.process_time()
    choices = choose_attention(microdit.tiny2(), TokensConfig(), [shape], torch.bfloat16, Workers(1))
    assert time.process_time() - start < 3  # of the processor: other work on this machine does not count
    assert len(choices) == 5
    print(choices)
