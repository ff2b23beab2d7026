"""What a run needs, whatever the machine: images, patches, parameters and FLOPs of every stage."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import torch

from shoestring.config import (
    CODEC_DOWNSAMPLING,
    ModelConfig,
    RunConfig,
    StageConfig,
    TokensConfig,
    TransformerConfig,
)
from shoestring.models.files import new_network
from shoestring.models.network import BaseNetwork
from shoestring.models.routing import method_class
from shoestring.models.transformer import parameter_counts
from shoestring.planning.distillation import distillation_flops
from shoestring.planning.flops import Dispatch, model_flops
from shoestring.planning.flops_unet import Flops
from shoestring.runtime import UserError
from shoestring.tensors import visible_count


def meta_network(config: RunConfig) -> BaseNetwork:
    """The network without its values, to look at shapes; not to be changed."""
    return _meta_network(config.model, config.tokens)


@lru_cache(maxsize=16)
def _meta_network(model: ModelConfig, tokens: TokensConfig) -> BaseNetwork:
    with torch.device("meta"):
        return new_network(model, tokens)


def patch_grid(config: RunConfig, stage: StageConfig, downsampling: int) -> tuple[int, int]:
    """Rows and columns of patches in a stage.

    Args:
        config: the run.
        stage: one of its stages.
        downsampling: pixels per latent along one side.

    Returns:
        The grid.

    Raises:
        UserError: if the resolution does not divide into patches, or the stage's mask ratio does not fit
            the token method or the experts.
    """
    model, multiple = config.model, downsampling * config.model.patch_size
    if stage.resolution % multiple:
        raise UserError(
            f"stage {stage.name!r}: resolution is {stage.resolution}; it must be a multiple of "
            f"{multiple} (codec {downsampling} x model.patch_size {model.patch_size})"
        )
    side = stage.resolution // multiple
    largest = max(stage.mask_ratio, stage.mask_ratio_end or 0.0, *mask_ratios(stage))
    if largest and not method_class(config.tokens).drops:
        raise UserError(
            f"stage {stage.name!r}: mask_ratio is {largest}, but tokens.method={config.tokens.method} "
            "drops nothing; set it to 0, or choose another method"
        )
    if not isinstance(model, TransformerConfig):
        return side, side
    visible, experts = visible_count(side * side, largest), model.experts
    if experts.count and experts.capacity * visible < experts.count:
        raise UserError(
            f"stage {stage.name!r}: mask_ratio is {largest}, which leaves {visible} of {side * side} "
            f"patches; {experts.count} experts of capacity {experts.capacity:g} need at least "
            f"{math.ceil(experts.count / experts.capacity)}"
        )
    return side, side


def mask_ratios(stage: StageConfig) -> Counter[float]:
    """Mask ratios of a stage, and in how many of its steps each is used."""
    if stage.mask_ratio_end is None:
        return Counter({stage.mask_ratio: stage.steps})
    return Counter(stage.mask_ratio_at(step * stage.batch) for step in range(stage.steps))


@dataclass(frozen=True)
class StagePlan:
    """What one stage costs. Where the mask ratio moves, figures per image are means over the stage."""

    name: str
    nimg: int
    resolution: int
    patches: int
    visible: float
    """Share of the patches that the reduced part of the network sees."""
    flops: Flops
    """Of one image."""
    one_hot: Flops | None
    """Of one image with the released dispatch of experts; ``None`` without experts."""

    @property
    def training(self) -> float:
        """FLOPs of the whole stage."""
        return self.flops.training * self.nimg


@dataclass(frozen=True)
class RunPlan:
    """What a run costs."""

    name: str
    parameters: int
    active: int
    """Parameters that an average token meets (of experts, those that see it)."""
    caption_tokens: int
    """Of every caption, padding included; 0 without captions."""
    stages: tuple[StagePlan, ...]

    @property
    def training(self) -> float:
        """FLOPs of all stages."""
        return sum(stage.training for stage in self.stages)


def plan(config: RunConfig) -> RunPlan:
    """Count a run. No weights and no data are loaded.

    Args:
        config: the run.

    Returns:
        Parameters, and the FLOPs of every stage.

    Raises:
        UserError: if model, token method and stages do not fit together.
    """
    grids = [patch_grid(config, stage, CODEC_DOWNSAMPLING[config.data.codec]) for stage in config.stages]
    parameters, active = parameter_counts(meta_network(config))
    captions = config.data.max_tokens if config.model.condition == "text" else 0
    stages = tuple(_plan_stage(config, *pair, captions) for pair in zip(config.stages, grids, strict=True))
    return RunPlan(config.name, parameters, active, captions, stages)


def _plan_stage(config: RunConfig, stage: StageConfig, grid: tuple[int, int], captions: int) -> StagePlan:
    model, tokens, patches, ratios = config.model, config.tokens, grid[0] * grid[1], mask_ratios(stage)

    def mean(values: list[float]) -> float:
        return sum(v * n for v, n in zip(values, ratios.values(), strict=True)) / stage.steps

    def count(dispatch: Dispatch) -> Flops:
        each = [model_flops(model, grid, captions, ratio, tokens, dispatch) for ratio in ratios]
        beside = [
            distillation_flops(config, grid, captions, ratio, flops.forward)
            for ratio, flops in zip(ratios, each, strict=True)
        ]
        forward = mean([flops.forward for flops in each])
        return Flops(forward, mean([flops.training for flops in each]) + mean(beside))

    return StagePlan(
        stage.name,
        stage.steps * stage.batch,
        stage.resolution,
        patches,
        mean([visible_count(patches, ratio) / patches for ratio in ratios]),
        count("gather"),
        count("one-hot") if isinstance(model, TransformerConfig) and model.experts.count else None,
    )
