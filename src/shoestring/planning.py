"""What a model and a run cost: FLOPs of a forward pass, of a training step and of all stages, and the
machine's matmul peak.

``flops`` counts two per multiply-accumulate. Only matrix products are counted, as everybody does.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from shoestring.config.schema import CODEC_DOWNSAMPLING, ModelConfig, RunConfig, StageConfig, TokensConfig
from shoestring.models.files import FAMILIES, build_network
from shoestring.models.layers import attention_width, mlp_width, swiglu_width
from shoestring.models.routing import build_method, method_class
from shoestring.models.transformer import has_experts, parameter_counts
from shoestring.runtime import UserError
from shoestring.tensors import gather_tokens, visible_count

Dispatch = Literal["gather", "one-hot"]


@dataclass(frozen=True)
class Flops:
    """FLOPs of one image."""

    forward: float
    training: float
    """Forward and backward, recomputation not counted."""


@dataclass
class _Counter:
    """The layers of a network that count instead of computing; tokens are on the meta device."""

    model: ModelConfig
    caption: int
    length: int
    dispatch: Dispatch
    macs: float = 0.0
    constant: float = field(default=0.0)
    """Of which in products that need one gradient only: the one-hot of the released dispatch has none."""

    @property
    def depth(self) -> int:
        return self.model.depth

    def mixer(self, x_BLD: Tensor, visible_BK: Tensor | None = None) -> Tensor:
        model, mixer, before = self.model, self.model.mixer, x_BLD.shape[1]
        for i in range(mixer.depth):
            expert = has_experts(model, i, mixer=True)
            self._block(
                mixer.dim, mixer.qkv_multiplier, mixer.ffn_multiplier, model.head_dim, expert, before, True
            )
        if visible_BK is not None:
            x_BLD = gather_tokens(x_BLD, visible_BK)
        if mixer.depth and mixer.dim != model.dim:
            self.macs += (before + x_BLD.shape[1] + self.caption) * model.dim * mixer.dim
        return x_BLD

    def backbone(self, x_BKD: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        model = self.model
        qkv, ffn = model.per_block("qkv_multipliers"), model.per_block("ffn_multipliers")
        for i in range(model.depth)[first:last]:
            expert = has_experts(model, i)
            self._block(model.dim, qkv[i], ffn[i], model.head_dim, expert, x_BKD.shape[1], True)
        return x_BKD

    def decoder(self, x_BKD: Tensor, visible_BK: Tensor | None) -> Tensor:
        model, decoder = self.model, self.model.decoder
        self.macs += model.dim * 2 * model.dim + x_BKD.shape[1] * model.dim * decoder.dim
        for _ in range(decoder.depth):
            self._block(decoder.dim, 1.0, 4.0, decoder.head_dim, False, self.length, False)
        return x_BKD.new_empty(1, self.length, decoder.dim)

    def _block(
        self, dim: int, qkv: float, ffn: float, head_dim: int, expert: bool, tokens: int, captioned: bool
    ) -> None:
        model, s = self.model, self.caption
        width = attention_width(dim, qkv, head_dim)
        macs: float = 4 * tokens * dim * width + 2 * tokens * tokens * width + 6 * dim * model.dim
        if captioned and model.condition == "text":
            macs += 2 * tokens * dim * dim + 2 * s * dim * dim + 2 * tokens * s * dim
        if expert:
            count = model.experts.count
            chosen = max(1, min(tokens, int(model.experts.capacity * tokens / count)))
            hidden = mlp_width(dim, ffn, model.ffn_multiple_of)
            macs += count * tokens * dim + 2 * count * chosen * dim * hidden
            if self.dispatch == "one-hot":  # gathers and combines by products with a one-hot matrix
                macs += 2 * count * chosen * tokens * dim
                self.constant += 2 * count * chosen * tokens * dim
        elif model.kind == "maskdit":
            macs += 2 * tokens * dim * mlp_width(dim, ffn, model.ffn_multiple_of)
        else:
            macs += 3 * tokens * dim * swiglu_width(dim, ffn, model.ffn_multiple_of)
        self.macs += macs


@lru_cache(maxsize=256)
def model_flops(
    model: ModelConfig,
    grid: tuple[int, int],
    caption_tokens: int = 0,
    mask_ratio: float = 0.0,
    tokens: TokensConfig | None = None,
    dispatch: Dispatch = "gather",
) -> Flops:
    """FLOPs that one image needs, in closed form for every layer.

    Which layer sees how many patches is not written down a second time: the token method itself runs, on
    the meta device. The backward pass costs twice the forward, except for the layers that look at
    inputs (patches, captions, time), which need no gradient of their input, and looking up a class.

    Args:
        model: the network.
        grid: rows and columns of patches.
        caption_tokens: caption length S, padding included if it is attended; ignored without captions.
        mask_ratio: share of patches that the reduced part of the network does not see.
        tokens: the token method; ``None`` = the default.
        dispatch: of experts: ours (gather), or the one-hot products of the released MicroDiT.

    Returns:
        Forward and training FLOPs.
    """
    with torch.device("meta"):
        method = build_method(model, tokens if tokens is not None else TokensConfig())
    length = grid[0] * grid[1]
    d, patch_values = model.dim, model.in_channels * model.patch_size**2
    family = FAMILIES[model.kind]
    inputs: float = length * patch_values * d + family.time_features * d
    macs: float = d * d  # the second half of the time embedding
    s = 0
    if model.condition == "text":
        s = caption_tokens
        inputs += s * model.caption_dim * d
        macs += s * d * d + 4 * s * d * d + 2 * s * s * d + 2 * d * d
        macs += 3 * s * d * swiglu_width(d, 4.0, model.ffn_multiple_of)

    counter = _Counter(model, s, length, dispatch)
    visible = visible_count(length, mask_ratio) if method.drops else length
    visible_BK = None
    if visible < length:
        visible_BK = torch.empty(1, visible, dtype=torch.long, device="meta")
    out_BKD, places = method(counter, torch.empty(1, length, d, device="meta"), visible_BK, None)
    predicted = length if places is None else places.shape[1]
    assert out_BKD.shape[1] == predicted
    last_dim = model.decoder.dim if model.decoder.depth else d
    macs += counter.macs + method.extra_macs(length)
    macs += predicted * last_dim * patch_values + 2 * d * last_dim
    training = 3 * macs - counter.constant + 2 * inputs
    return Flops(forward=2.0 * (macs + inputs), training=2.0 * training)


# -- a run -------------------------------------------------------------------------------------------------


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
    largest = max(stage.mask_ratio, stage.mask_ratio_end or 0.0, *_ratios(stage))
    if largest and not method_class(config.tokens).drops:
        raise UserError(
            f"stage {stage.name!r}: mask_ratio is {largest}, but tokens.method={config.tokens.method} "
            "drops nothing; set it to 0, or choose another method"
        )
    visible, experts = visible_count(side * side, largest), model.experts
    if experts.count and experts.capacity * visible < experts.count:
        raise UserError(
            f"stage {stage.name!r}: mask_ratio is {largest}, which leaves {visible} of {side * side} "
            f"patches; {experts.count} experts of capacity {experts.capacity:g} need at least "
            f"{math.ceil(experts.count / experts.capacity)}"
        )
    return side, side


def _ratios(stage: StageConfig) -> Counter[float]:
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
    with torch.device("meta"):
        parameters, active = parameter_counts(build_network(config))
    captions = config.data.max_tokens if config.model.condition == "text" else 0
    stages = tuple(_plan_stage(config, *pair, captions) for pair in zip(config.stages, grids, strict=True))
    return RunPlan(config.name, parameters, active, captions, stages)


def _plan_stage(config: RunConfig, stage: StageConfig, grid: tuple[int, int], captions: int) -> StagePlan:
    model, tokens, patches, ratios = config.model, config.tokens, grid[0] * grid[1], _ratios(stage)

    def mean(values: list[float]) -> float:
        return sum(v * n for v, n in zip(values, ratios.values(), strict=True)) / stage.steps

    def count(dispatch: Dispatch) -> Flops:
        each = [model_flops(model, grid, captions, ratio, tokens, dispatch) for ratio in ratios]
        return Flops(mean([flops.forward for flops in each]), mean([flops.training for flops in each]))

    return StagePlan(
        stage.name,
        stage.steps * stage.batch,
        stage.resolution,
        patches,
        mean([visible_count(patches, ratio) / patches for ratio in ratios]),
        count("gather"),
        count("one-hot") if model.experts.count else None,
    )


def plan_table(run: RunPlan, published_gflop: Mapping[str, float]) -> Table:
    """A plan for people: one column a stage, one row a quantity, each with where it comes from.

    Args:
        run: the plan.
        published_gflop: training GFLOP of one image by name of the stage, as far as published.

    Returns:
        The table.
    """
    title = f"{run.name}: {run.parameters:,} parameters, {run.active:,} active per token"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in (*(stage.name for stage in run.stages), "run"):
        table.add_column(name, justify="right", overflow="fold")
    stages = run.stages

    def row(label: str, values: Iterable[str], whole: str = "", last: bool = False) -> None:
        table.add_row(label, *values, whole, end_section=last)

    row("images", [_many(stage.nimg) for stage in stages], _many(sum(stage.nimg for stage in stages)))
    row("pixels a side", [str(stage.resolution) for stage in stages])
    row("patches", [str(stage.patches) for stage in stages])
    row("of which visible", [f"{stage.visible:.1%}" for stage in stages], last=True)
    for unit, per in (("Gflops", 1e9), ("Gmacs", 2e9)):
        row(f"forward {unit} (counted)", [_figure(stage.flops.forward / per) for stage in stages])
        row(f"training {unit} (counted)", [_figure(stage.flops.training / per) for stage in stages])
    one_hot = [_figure(stage.one_hot.training / 1e9) for stage in stages if stage.one_hot is not None]
    if one_hot:
        row("training Gflops, one-hot (counted)", one_hot)
    if published_gflop:
        known = [published_gflop.get(stage.name) for stage in stages]
        row("training Gflops (published)", ["" if value is None else f"{value:g}" for value in known])
    table.add_section()
    prefix, per = next(((x, p) for x, p in (("E", 1e18), ("P", 1e15)) if run.training >= p), ("T", 1e12))
    totals = [f"{stage.training / per:,.4g}" for stage in stages]
    row(f"all training {prefix}flops (counted)", totals, f"{run.training / per:,.4g}")
    table.caption = (
        "Gflops and Gmacs of one image. flops: 2 per multiply-accumulate (mac), in matrix products; "
        "training: forward and backward, recomputation not counted"
        + (f"; captions of {run.caption_tokens} tokens" if run.caption_tokens else "")
        + ("; one-hot: experts as in the released code" if one_hot else "")
    )
    return table


def _figure(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def _many(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"


# -- the machine -------------------------------------------------------------------------------------------


def measured_peak_flops(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...] = (2048, 4096), repeats: int = 5
) -> float:
    """Best rate of square matrix products on this machine right now.

    Args:
        device: where.
        dtype: of the factors.
        sizes: sides of the matrices.
        repeats: products of each size; the fastest counts.

    Returns:
        FLOP/s.
    """
    best = 0.0
    for n in sizes:
        a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
        a @ b
        for _ in range(repeats):
            _synchronize(device)
            start_s = time.perf_counter()
            a @ b
            _synchronize(device)
            best = max(best, 2.0 * n**3 / (time.perf_counter() - start_s))
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
