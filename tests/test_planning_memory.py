"""The memory forecast against what steps really take: tensors are followed until they are freed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from shoestring import recipes
from shoestring.config import (
    DecoderConfig,
    ExpertsConfig,
    MixerConfig,
    RunConfig,
    TokensConfig,
    TransformerConfig,
    apply_overrides,
)
from shoestring.diffusion.losses import denoising_loss
from shoestring.planning import fitting_micro_batch, forecast_memory
from shoestring.planning.activations import Bytes, network_parts
from shoestring.planning.memory import MUON_PIECE, muon_elements
from shoestring.planning.run import meta_network
from shoestring.runtime import UserError
from shoestring.tensors import visible_from_noise
from shoestring.training.muon import PIECE_ELEMENTS
from shoestring.training.optim import parameter_roles

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from memory_forecast import LivePeak, Setting, batch_of, compare, learner_of, run_config

CPU = torch.device("cpu")
RESOLUTION = 128
SMALL = TransformerConfig(
    caption_dim=96,
    dim=64,
    depth=4,
    head_dim=32,
    ffn_multiple_of=32,
    mixer=MixerConfig(depth=2, dim=64),
    experts=ExpertsConfig(count=4),
)
PLAIN = SMALL.model_copy(
    update={
        "kind": "maskdit",
        "condition": "class",
        "experts": ExpertsConfig(count=0),
        "mixer": MixerConfig(depth=0),
        "decoder": DecoderConfig(depth=2, dim=32),
    }
)


def small(*words: object, model: TransformerConfig = SMALL, **named: object) -> RunConfig:
    """A run at a setting."""
    return run_config(Setting("small", *words, **named), model, RESOLUTION)


# -- against measurement -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        small(16, 16, 0.75),
        small(16, 16, 0.0),
        small(16, 16, 0.0, checkpointing=True),
        small(16, 16, 0.5, precision="fp32"),
        small(16, 4, 0.5),
        small(2, 2, 0.75, optimizer="muon"),
        small(16, 16, 0.5, method="maskdit", model=PLAIN),
        small(16, 16, 0.5, method="sprint", checkpointing=True, precision="fp32"),
    ],
    ids=["mask", "dense", "recomputed", "fp32", "accumulated", "muon", "maskdit", "sprint"],
)
def test_forecast_is_near_the_measured_peak(config):
    forecast, measured = compare(config, CPU)
    assert forecast == pytest.approx(measured, rel=0.15)


class AsOnCuda(TorchFunctionMode):
    """What CUDA's autocast does beyond the CPU's: norms run in float32."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = dict(keywords or {})
        if function is F.layer_norm and arguments[0].dtype == torch.bfloat16:
            arguments = (arguments[0].float(), *arguments[1:])
            if keywords.get("weight") is not None:
                keywords["weight"] = keywords["weight"].float()
        return function(*arguments, **keywords)


def kept_bytes(config: RunConfig, mode: TorchFunctionMode | None = None) -> tuple[float, float]:
    """What a forward pass leaves for the backward pass, forecast and measured."""
    stage, learner, batch = config.stages[0], learner_of(config, CPU), batch_of(config, CPU)
    visible_BK = visible_from_noise(batch.mask_BL, stage.mask_ratio)
    level = learner.process.level_from_normal(batch.level_B, stage.noise)
    inputs = (batch.x0, batch.noise, level, batch.conditioning, visible_BK, None, config.tokens)
    if mode is not None:
        mode.__enter__()
    try:
        with LivePeak() as made:
            loss = denoising_loss(learner.process, learner.denoiser, *inputs).mean()
            measured = made.live
    finally:
        if mode is not None:
            mode.__exit__(None, None, None)
    assert loss.requires_grad  # what autograd keeps is still there
    b = Bytes.of(config.precision, "cpu" if mode is None else "cuda")
    side = RESOLUTION // 8 // config.model.patch_size
    captions = config.data.max_tokens if config.model.condition == "text" else 0
    parts = network_parts(config, meta_network(config), (side, side), captions, stage.mask_ratio, b)
    return sum(len(batch.x0) * part.kept + b.cast * part.cast for part in parts), measured


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"experts": ExpertsConfig(count=0)},
        {"attention": "sdpa"},
        {"qk_norm": False},
        {"mixer": MixerConfig(depth=2, dim=96)},
        {"condition": "class"},
    ],
    ids=str,
)
def test_kept_activations(changes):
    forecast, measured = kept_bytes(small(8, 8, 0.75, model=SMALL.model_copy(update=changes)))
    assert forecast == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("method", ["naive", "tread", "sprint"])
def test_kept_activations_of_token_methods(method):
    forecast, measured = kept_bytes(small(8, 8, 0.5, method=method))
    assert forecast == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("changes", [{}, {"experts": ExpertsConfig(count=0)}, {"qk_norm": False}], ids=str)
def test_kept_activations_as_cuda_autocasts(changes):
    """There is no GPU here, but its autocast can be imitated; attention is fused there."""
    model = SMALL.model_copy(update={"attention": "sdpa"} | changes)
    forecast, measured = kept_bytes(small(8, 8, 0.75, model=model), AsOnCuda())
    assert forecast == pytest.approx(measured, rel=0.03)
    assert measured > 1.1 * kept_bytes(small(8, 8, 0.75, model=model))[1]


# -- what follows from what --------------------------------------------------------------------------------


def test_fixed_parts_of_the_forecast():
    config = small(16, 16, 0.75)
    parameters = sum(p.numel() for p in meta_network(config).parameters())
    one = forecast_memory(config, config.stages[0], micro_batch=16)
    assert (one.weights, one.gradients, one.moments) == (4 * parameters, 4 * parameters, 8 * parameters)
    assert one.averages == 4 * parameters
    assert one.total < sum(value for name, value in vars(one).items() if name != "total")
    tracks = config.model_copy(update={"power_ema": (0.05, 0.1)})
    assert forecast_memory(tracks, config.stages[0], micro_batch=16).averages == 12 * parameters
    assert forecast_memory(config, config.stages[0], micro_batch=16, averages=0).averages == 0


def test_sharding_divides_what_stays():
    config = small(16, 16, 0.75)
    stage = config.stages[0]

    def four(sharding, **more):
        return forecast_memory(config, stage, micro_batch=4, ranks=4, sharding=sharding, **more)

    ddp, fsdp, hybrid = four("ddp"), four("fsdp"), four("hybrid", shard_ranks=2)
    for name in ("weights", "moments", "averages"):
        assert getattr(fsdp, name) == pytest.approx(getattr(ddp, name) / 4, abs=16)
        assert getattr(hybrid, name) == pytest.approx(getattr(ddp, name) / 2, abs=16)
    assert fsdp.total < hybrid.total < ddp.total
    assert four("hybrid").weights == fsdp.weights  # of few ranks all share
    more = forecast_memory(config, stage, micro_batch=2, ranks=4, sharding="fsdp")
    assert more.gradients == ddp.gradients  # added up over micro-batches before they are shared out


def test_recomputing_blocks_needs_less_and_dropping_patches_too():
    def total(mask: float, checkpointing: bool) -> int:
        config = small(64, 64, mask)
        return forecast_memory(config, config.stages[0], micro_batch=64, checkpointing=checkpointing).total

    assert total(0.0, True) < 0.5 * total(0.0, False)
    assert total(0.75, False) < 0.7 * total(0.0, False)


def test_threads_have_gradients_of_their_own():
    config = small(4, 4, 0.75)

    def total(workers: int) -> int:
        return forecast_memory(
            config, config.stages[0], micro_batch=4, device_type="cpu", workers=workers
        ).total

    weights = forecast_memory(config, config.stages[0], micro_batch=4).weights
    assert total(2) - total(1) > 0.5 * weights


def test_a_moving_mask_ratio_counts_by_its_smallest():
    config = small(16, 16, 0.75)
    stage = config.stages[0].model_copy(update={"nimg": 1600})
    moving = stage.model_copy(update={"mask_ratio_end": 0.0})
    dense = stage.model_copy(update={"mask_ratio": 0.0})
    assert forecast_memory(config, moving, micro_batch=16) == forecast_memory(config, dense, micro_batch=16)


def test_muon_counts_what_the_optimiser_gives_it():
    assert MUON_PIECE == PIECE_ELEMENTS
    for name in ("demo", "microdit-tiny2"):
        network = meta_network(recipes.get(name))
        roles = parameter_roles(network)
        given = {"block_matrix", "expert"}
        sizes = [p.numel() for n, p in network.named_parameters() if roles[n] in given]
        assert muon_elements(network)[0] == sum(sizes)


def test_every_stage_of_every_recipe_has_a_forecast():
    for name in recipes.names():
        config = recipes.get(name)
        for stage in config.stages:
            forecast = forecast_memory(config, stage, micro_batch=1)
            assert forecast.total > forecast.weights + forecast.moments + forecast.averages


# -- the micro-batch that fits -----------------------------------------------------------------------------


def test_the_largest_divisor_that_fits():
    config = small(24, 24, 0.5)
    stage = config.stages[0]

    def total(images: int) -> int:
        return forecast_memory(config, stage, micro_batch=images, ranks=2, sharding="ddp").total

    assert fitting_micro_batch(config, stage, total(12), 2, "ddp") == 12
    assert fitting_micro_batch(config, stage, total(12) - 1, 2, "ddp") == 6
    assert fitting_micro_batch(config, stage, total(3), 2, "ddp") == 3
    assert fitting_micro_batch(config, stage, float("inf"), 2, "ddp") == 12


def test_where_not_even_one_image_fits():
    config = small(24, 24, 0.5)
    with pytest.raises(UserError) as error:
        fitting_micro_batch(config, config.stages[0], 1e6, 2, "ddp")
    said = str(error.value)
    assert "0.001 GB are at hand" in said
    assert "model.checkpoint_activations=true, parallel.sharding=fsdp" in said
    alone = apply_overrides(config, ["model.checkpoint_activations=true"])
    with pytest.raises(UserError, match="choose a smaller model or devices with more memory"):
        fitting_micro_batch(alone, config.stages[0], 1e6)


def test_numbers_that_do_not_fit_together():
    config = small(16, 16, 0.5)
    stage = config.stages[0]
    with pytest.raises(UserError, match="it must be 1 to 8"):
        forecast_memory(config, stage, micro_batch=9, ranks=2, sharding="ddp")
    with pytest.raises(UserError, match="3 ranks cannot share evenly"):
        forecast_memory(config, stage, micro_batch=1, ranks=3, sharding="ddp")
    with pytest.raises(UserError, match="it must divide the 4 ranks"):
        forecast_memory(config, stage, micro_batch=1, ranks=4, sharding="hybrid", shard_ranks=3)
    with pytest.raises(UserError, match="use ddp, fsdp or hybrid"):
        forecast_memory(config, stage, micro_batch=1, ranks=2)
    broken = config.model_copy(update={"tokens": TokensConfig(method="maskdit")})
    with pytest.raises(UserError, match="decoder"):
        forecast_memory(broken, stage, micro_batch=1)
