"""Several ranks give what one gives: DDP, FSDP2 and hybrid sharding, on real gloo processes."""

from __future__ import annotations

import pytest
import torch

from forks import run_ranks
from shoestring.config import (
    DecoderConfig,
    ExpertsConfig,
    LoRAConfig,
    MixerConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    StageConfig,
    TokensConfig,
    TransformerConfig,
)
from shoestring.diffusion.process import EDMProcess
from shoestring.interfaces import Conditioning
from shoestring.models.files import build_network
from shoestring.models.lora import train_factors_only
from shoestring.runtime import UserError, Workers, stream
from shoestring.training.parallel import Parallel, check_batches, local, shard_dimension, whole
from shoestring.training.schedule import position
from shoestring.training.step import Draws, Learner, TrainingBatch, train_step

BATCH = 12
SHAPE = (3, 8, 8)
COMMON = {"in_channels": 3, "dim": 32, "head_dim": 16, "ffn_multiple_of": 16}


def recipe(kind: str, optimizer: str) -> RunConfig:
    """Experts and a patch mixer, or MaskDiT, whose mask token the second stage does not use."""
    if kind in {"experts", "recomputed", "lora"}:
        model = TransformerConfig(
            **COMMON,
            caption_dim=8,
            depth=3,
            mixer=MixerConfig(depth=1, dim=48),
            experts=ExpertsConfig(count=4),
            checkpoint_activations=kind == "recomputed",
        )
        tokens = TokensConfig()
    else:
        model = TransformerConfig(
            **COMMON,
            kind="maskdit",
            condition="class",
            classes=5,
            depth=2,
            qkv_multipliers=(1.0,),
            ffn_multipliers=(4.0,),
            mixer=MixerConfig(depth=0),
            experts=ExpertsConfig(count=0),
            decoder=DecoderConfig(depth=1, dim=32, head_dim=16),
            bias=True,
            qk_norm=False,
        )
        tokens = TokensConfig(method="maskdit", reconstruction=0.1)
    half = StageConfig(name="masked", nimg=10 * BATCH, batch=BATCH, lr=1e-3, mask_ratio=0.5, ema_decay=0.9)
    stages = (half, half.model_copy(update={"name": "whole", "mask_ratio": 0.0}))
    return RunConfig(
        name="r",
        model=model,
        tokens=tokens,
        stages=stages,
        optimizer=OptimizerConfig(kind=optimizer),
        lora=LoRAConfig(rank=4) if kind == "lora" else None,
    )


def randomised(config: RunConfig, dtype: torch.dtype) -> torch.nn.Module:
    """No parameter is zero: gates that are would make every comparison pass."""
    network = build_network(config, stream(0, "init"))
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=stream(1, "noise", i))
    train_factors_only(network)
    return network.to(dtype)


def curve(kind, sharding, dtype_name, steps, optimizer="adamw", micro_batch=None, shard_ranks=None):
    """Losses, norms and final weights of a short training on this rank's share of the batches."""
    dtype = getattr(torch, dtype_name)
    config = recipe(kind, optimizer)
    parallel = Parallel(ParallelConfig(sharding=sharding, shard_ranks=shard_ranks), "cpu")
    network = randomised(config, dtype)
    process = EDMProcess(0.5)
    learner = Learner.build(
        network, config.tokens, process, config.optimizer, Workers(1), parallel, power_ema=(0.1,)
    )
    losses, norms = [], []
    for k in range(steps):
        here = position(config, k * BATCH)
        first, count = parallel.rank * BATCH // parallel.ranks, BATCH // parallel.ranks
        draws = Draws.make(0, "train", k * BATCH + first, count, SHAPE, 16)
        if config.model.condition == "text":
            text = torch.stack([torch.randn(5, 8, generator=stream(2, "text", i)) for i in range(BATCH)])
            condition = Conditioning(text[first : first + count].to(dtype))
        else:
            condition = Conditioning(class_B=torch.arange(first, first + count) % 5)
        batch = TrainingBatch(
            draws.posterior.to(dtype),
            condition,
            draws.noise.to(dtype),
            draws.level_B.to(dtype),
            draws.mask_BL,
        )
        result = train_step(learner, batch, micro_batch or count, here.stage.lr, here.stage.mask_ratio, here)
        losses.append(result.loss.item())
        norms.append(result.norm.item())
    weights = {name: whole(p.detach()).double().sum().item() for name, p in network.named_parameters()}
    held = sum(local(p.detach()).numel() for p in network.parameters())
    averages = sum(whole(tensor).double().sum().item() for tensor in learner.averages.tensors().values())
    return {"losses": losses, "norms": norms, "weights": weights, "held": held, "averages": averages}


def same(one, many, relative):
    for each in many:
        assert each["losses"] == pytest.approx(one["losses"], rel=relative)
        assert each["norms"] == pytest.approx(one["norms"], rel=10 * relative)
        assert each["averages"] == pytest.approx(one["averages"], rel=1e-3)


TWO = {
    f"{kind} {sharding}": (kind, sharding, "float64", 20)
    for kind in ("experts", "maskdit")
    for sharding in ("ddp", "fsdp")
} | {
    "pieces ddp": ("experts", "ddp", "float32", 5, "adamw", 2),
    "pieces fsdp": ("experts", "fsdp", "float32", 5, "adamw", 2),
    "muon ddp": ("experts", "ddp", "float32", 4, "muon"),
    "muon fsdp": ("experts", "fsdp", "float32", 4, "muon"),
    "checkpointing fsdp": ("recomputed", "fsdp", "float32", 5),
    "lora ddp": ("lora", "ddp", "float64", 5),
    "lora fsdp": ("lora", "fsdp", "float64", 5),
}


def curves(settings):
    """Several trainings one after another in the same processes: starting these takes longest."""
    return {name: curve(*words) for name, words in settings.items()}


@pytest.fixture(scope="module")
def two():
    return run_ranks(2, "test_parallel:curves", TWO)


def of(results, name):
    return [each[name] for each in results]


@pytest.mark.parametrize("kind", ["experts", "maskdit"])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_ranks_equal_one_in_float64(two, kind, sharding):
    one, many = curve(kind, "auto", "float64", 20), of(two, f"{kind} {sharding}")
    assert one["losses"][-1] != pytest.approx(one["losses"][0], rel=1e-3)
    same(one, many, 1e-9)
    for each in many:
        assert each["weights"] == pytest.approx(one["weights"], rel=1e-6, abs=1e-9)
        share = 1.0 if sharding == "ddp" else 0.5
        assert each["held"] == pytest.approx(share * one["held"], rel=0.05)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_ranks_in_pieces(two, sharding):
    same(curve("experts", "auto", "float32", 5), of(two, f"pieces {sharding}"), 1e-4)


def test_recomputed_activations_on_shared_out_weights(two):
    same(curve("experts", "auto", "float32", 5), of(two, "checkpointing fsdp"), 1e-4)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_factors_beside_weights_that_stay(two, sharding):
    one, many = curve("lora", "auto", "float64", 5), of(two, f"lora {sharding}")
    same(one, many, 1e-9)
    for each in many:
        assert each["weights"] == pytest.approx(one["weights"], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_muon_on_ranks(two, sharding):
    # Newton-Schulz runs in bf16: another rounding of the gradient is another update, of some per cent.
    same(curve("experts", "auto", "float32", 4, "muon"), of(two, f"muon {sharding}"), 1e-3)


def test_three_ranks():
    words = {sharding: ("experts", sharding, "float32", 5) for sharding in ("ddp", "fsdp")}
    many = run_ranks(3, "test_parallel:curves", words)
    one = curve("experts", "auto", "float32", 5)
    for sharding in words:
        same(one, of(many, sharding), 1e-4)


def test_a_copy_for_each_two_of_four_ranks():
    words = {"hybrid": ("experts", "hybrid", "float32", 5, "adamw", None, 2)}
    many = run_ranks(4, "test_parallel:curves", words)
    same(curve("experts", "auto", "float32", 5), of(many, "hybrid"), 1e-4)


def test_one_rank_in_pieces_equals_the_whole():
    same(curve("maskdit", "auto", "float64", 4), [curve("maskdit", "auto", "float64", 4, "adamw", 5)], 1e-9)


def test_experts_are_cut_along_their_widest_dimension():
    assert shard_dimension((8, 32, 128), 2) == 2
    assert shard_dimension((8, 128, 32), 4) == 1
    assert shard_dimension((8, 32, 128), 3) == 0  # nothing divides evenly; the first may be uneven
    assert shard_dimension((6, 32, 128), 3) == 0
    assert shard_dimension((64, 32), 2) == 0
    assert shard_dimension((32,), 2) == 0


def test_ranks_that_do_not_divide_the_batch():
    config = recipe("experts", "adamw")
    check_batches(config, 3)
    with pytest.raises(UserError, match="stage 'masked': batch is 12, which 5 ranks cannot share evenly"):
        check_batches(config, 5)
