"""The single checks of a run: dead parameters, stalled data, broken records, disk, equal ranks."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shoestring.config import (
    DataConfig,
    DecoderConfig,
    GuardConfig,
    NoiseConfig,
    StoreConfig,
    TokensConfig,
)
from shoestring.diffusion.losses import denoising_loss
from shoestring.diffusion.process import EDMProcess
from shoestring.interfaces import Conditioning
from shoestring.models.maskdit import MaskDiT
from shoestring.runtime import UserError, stream
from shoestring.training.checks import (
    DataWatch,
    check_disk,
    dead_parameters,
    dead_sentence,
    digests,
    gradient_sums,
    non_finite_records,
    rank_divergence,
    source_of,
)
from shoestring.training.step import TrainingBatch
from test_guard import CONFIG, SMALL

NAN = math.nan

# -- parameters without a gradient -------------------------------------------------------------------------


class Tail(nn.Module):
    """A class-conditional network with a decoder, and a layer that nothing passes through."""

    def __init__(self) -> None:
        super().__init__()
        config = SMALL.model_copy(
            update={
                "kind": "maskdit",
                "condition": "class",
                "classes": 3,
                "decoder": DecoderConfig(depth=1, dim=32, head_dim=16),
            }
        )
        self.network = MaskDiT(config, TokensConfig(method="maskdit"))
        self.network.initialize(stream(0, "init"))
        self.forgotten = nn.Linear(3, 3)


def first_steps(model: Tail, steps: int) -> dict[str, Tensor]:
    """State of AdamW after some steps on whole pictures, named as the run's optimisers name it."""
    process = EDMProcess(0.5)
    denoiser = process.denoiser(model.network)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for i in range(steps):
        x0 = torch.randn(4, 3, 8, 8, generator=stream(0, "x", i))
        level = process.level_from_normal(torch.randn(4, generator=stream(0, "level", i)), NoiseConfig())
        label = Conditioning(class_B=torch.tensor([0, 1, 1, 0]))
        denoising_loss(process, denoiser, x0, torch.randn_like(x0), level, label).mean().backward()
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{key}": tensor
        for parameter, state in optimizer.state.items()
        for key, tensor in state.items()
    }


def test_dead_parameters_are_named_once_the_zeros_of_the_start_are_gone() -> None:
    tokens, whole = TokensConfig(method="maskdit"), CONFIG.stages[0]
    model = Tail()
    assert len(dead_parameters(gradient_sums(first_steps(model, 1)))) > 20  # only the output has a gradient
    model = Tail()
    dead = dead_parameters(gradient_sums(first_steps(model, GuardConfig().dead_step)))
    assert dead == ["network.mask_token", "forgotten.weight", "forgotten.bias"]
    sentence = dead_sentence(dead, 20, whole, tokens)
    assert sentence is not None
    assert "2 parameters" in sentence
    assert "forgotten.weight, forgotten.bias" in sentence
    assert "mask_token" not in sentence  # nothing is dropped here
    masked = whole.model_copy(update={"mask_ratio": 0.5})
    assert "network.mask_token" in (dead_sentence(dead, 20, masked, tokens) or "")
    assert dead_sentence(["network.mask_token"], 20, whole, tokens) is None
    sprint = TokensConfig(method="sprint")  # its paths are dropped even where patches are not
    assert dead_sentence(["network.mask_token"], 20, whole, sprint) is not None


def test_a_gradient_on_any_rank_is_enough() -> None:
    gradients = {"a": torch.zeros(3), "b": None, "c": torch.tensor([0.0, 1e-30]), "d": torch.zeros(0)}
    assert dead_parameters(gradients) == ["a", "b", "d"]

    def others_too(mine: list[float]) -> list[float]:
        return [x + y for x, y in zip(mine, [2.0, 0.0, 0.0], strict=True)]

    assert dead_parameters(gradients, others_too) == ["b", "d"]
    assert dead_parameters({"a": None}) == ["a"]


# -- data, disk, ranks -------------------------------------------------------------------------------------


def test_a_source_that_stalls_is_named_again_and_again_at_growing_intervals() -> None:
    said: list[tuple[float, str]] = []
    began = time.perf_counter()
    watch = DataWatch("s3://bucket/store", 0.1, lambda text: said.append((time.perf_counter() - began, text)))
    with watch:
        time.sleep(1.0)
    assert [round(10 * at) for at, _ in said[:3]] == pytest.approx([1, 3, 7], abs=1.5)
    assert len(said) == 3
    assert all("s3://bucket/store" in text for _, text in said)
    assert watch.waited_s == pytest.approx(1.0, abs=0.3)


def test_a_source_that_answers_is_not_named_and_leaves_no_thread() -> None:
    said: list[str] = []
    watch = DataWatch("here", 0.2, said.append)
    for _ in range(3):
        with watch:
            time.sleep(0.01)
    with pytest.raises(OSError, match="gone"), watch:
        raise OSError("gone")
    with DataWatch("here", 600.0, said.append):
        pass
    time.sleep(0.5)
    assert said == []
    assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())
    assert 0.03 <= watch.waited_s < 0.3


def test_the_name_of_a_source_is_what_was_configured() -> None:
    assert source_of(DataConfig(source="shapes")) == "data.source=shapes"
    assert source_of(DataConfig(source="folder", path="/pictures")) == "/pictures"
    two = DataConfig(source="store", stores=(StoreConfig(path="a"), StoreConfig(path="s3://b")))
    assert source_of(two) == "a, s3://b"


def test_broken_records_are_named() -> None:
    x0 = torch.randn(4, 3, 8, 8)
    text = torch.randn(4, 5, 8)
    batch = TrainingBatch(x0, Conditioning(text), torch.randn(4, 3, 8, 8), torch.randn(4), torch.rand(4, 16))
    asked: list[int] = []

    def name(row: int) -> str:
        asked.append(row)
        return f"record r{row}"

    assert non_finite_records(batch, name) == []
    x0[2, 1, 3, 3] = NAN
    text[1, 4, 7] = -math.inf
    x0[1, 0, 0, 0] = math.inf
    assert non_finite_records(batch, name) == [
        "record r1 holds NaN or infinity (latents)",
        "record r2 holds NaN or infinity (latents)",
    ]
    x0[1, 0, 0, 0] = 0
    assert non_finite_records(batch, name)[0] == "record r1 holds NaN or infinity (caption embedding)"
    assert asked == [1, 2, 1, 2]


def test_a_full_disk_is_seen_before_the_save(tmp_path: Path) -> None:
    check_disk(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(
        UserError, match=r"GB free, the next checkpoint needs 1,000,000.00 GB; free some space"
    ):
        check_disk(tmp_path / "checkpoints", 10**15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_a_digest_sees_every_bit_and_every_place(dtype: torch.dtype) -> None:
    values = (100 * torch.rand(33, 7)).to(dtype)
    digest = digests([values])
    assert digest.dtype == torch.int64
    assert torch.equal(digests([values.clone()]), digest)
    assert torch.equal(digests([values.t().contiguous().t()]), digest)  # by contents, not by layout
    swapped = values.clone()
    swapped[[0, 1]] = values[[1, 0]]
    assert not torch.equal(digests([swapped]), digest)
    bits = values.clone().flatten()
    raw = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    raw[100] ^= 1
    assert not torch.equal(digests([bits.view(33, 7)]), digest)


def test_a_digest_is_a_sum_modulo_two_to_the_sixty_four(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([3, -5, 2**62, -(2**63)], dtype=torch.int64)
    golden = 0x9E3779B97F4A7C15
    wanted = sum(int(v) * ((i * golden) | 1) for i, v in enumerate(values.tolist())) % 2**64
    assert int(digests([values])[0]) % 2**64 == wanted
    many = torch.randn(1000)
    whole = digests([many])
    monkeypatch.setattr("shoestring.training.checks.CHUNK", 7)
    assert torch.equal(digests([many]), whole)


def test_ranks_that_differ_are_named() -> None:
    names = ["a", "b", "c"]
    same = digests([torch.ones(3), torch.zeros(2), torch.ones(1)]).tolist()
    other = digests([torch.ones(3), -torch.zeros(2), torch.ones(1)]).tolist()  # -0.0: other bits
    assert rank_divergence(names, [same, same, same]) is None
    sentence = rank_divergence(names, [same, same, other])
    assert sentence is not None
    assert "1 of 3 parameters differ, first b (rank 2 against the others)" in sentence
