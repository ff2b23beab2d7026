"""Every setting of a run: frozen, validated, documented. ``RunConfig`` is the whole.

Field descriptions are the comments of ``shoestring recipes show``. Progress is counted in images
(``..._nimg``), so that batch size and number of GPUs may change between stages.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shoestring.config.adapt import DistillConfig, DreamBoothConfig, LoRAConfig, SuperResConfig
from shoestring.config.base import Frozen, Positive, Share, setting
from shoestring.config.data import DataConfig, StoreConfig
from shoestring.config.model import AnyModel, TokensConfig, TransformerConfig
from shoestring.config.running import GuardConfig, LoggingConfig, ParallelConfig

MASK_STEPS = 16
"""A changing mask ratio moves in sixteenths, so that a compiled step is not built anew for every ratio."""
SHORTEST_AVERAGE, LONGEST_AVERAGE = 0.001, 0.2886
"""Of power-function averages, as a share of the run: just below 1/sqrt(12), where all weights count alike."""
AverageLength = Annotated[float, Field(ge=SHORTEST_AVERAGE, le=LONGEST_AVERAGE)]


class ProcessConfig(Frozen):
    """How noise is added and what the network predicts."""

    kind: Literal["edm", "flow", "ddpm"] = setting(
        "edm (Karras et al. 2022), flow (linear path, velocity) or ddpm (a table of noise levels)", "edm"
    )
    sigma_data: Positive | None = setting(
        "standard deviation of the latents; null = measured on the training data", None
    )
    flow_shift: Positive = setting("flow: t -> shift t / (1 + (shift - 1) t); above 1 favours noise", 1.0)
    prediction: Literal["epsilon", "v", "x0"] = setting("ddpm: what the network predicts", "epsilon")
    schedule: Literal["linear", "scaled-linear", "cosine"] = setting(
        "ddpm: linear (DDPM), scaled-linear (Stable Diffusion) or cosine (Improved DDPM)", "scaled-linear"
    )
    timesteps: int = setting("ddpm: entries of the table", 1000, ge=2, le=100_000)
    zero_terminal_snr: bool = setting("ddpm: rescale the table so that its last entry is pure noise", False)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kind == "ddpm" and self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "prediction is epsilon and zero_terminal_snr is true; noise alone says nothing of the "
                "picture there, so set prediction to v or x0"
            )
        return self


class NoiseConfig(Frozen):
    """Distribution of training noise levels."""

    mean: float = setting(
        "edm: mean of ln sigma (P_mean); flow: mean of logit t; ddpm takes all alike", -0.6, ge=-10, le=10
    )
    std: Positive = setting("edm: spread of ln sigma (P_std); flow: spread of logit t", 1.2)


class StageConfig(Frozen):
    """One stretch of training.

    Where a stage begins, positions are made anew by its ``position_scale``; weights and averages go on.
    The classic average starts again where ``ema_start_nimg`` is above 0, and is a copy of the weights in
    stages without ``ema_decay``; power-function averages run over the whole run. The guard compares losses
    within a stage only; its count of roll-backs and the lower learning rate that came with them stay.
    """

    name: str = setting("shown in logs and pictures", min_length=1, max_length=60)
    nimg: int = setting("images to see in this stage", gt=0)
    batch: int = setting("images per optimiser step, over all devices", 256, gt=0)
    micro_batch: int | None = setting("images at once; null = the whole batch", None, gt=0)
    resolution: int = setting("side of the pictures in pixels", 32, gt=0)
    stores: tuple[StoreConfig, ...] = setting(
        "source=store: train this stage on these instead of data.stores", ()
    )
    min_side: int | None = setting(
        "store, folder: leave out pictures whose original had a side shorter than this; null = none",
        None,
        gt=0,
    )
    position_scale: Positive = setting("positions are divided by this (2 at twice the resolution)", 1.0)
    mask_ratio: float = setting("share of patches dropped at the stage's start", 0.0, ge=0, lt=1)
    mask_ratio_end: float | None = setting(
        "share at its end, moved in steps of 1/16; null = constant", None, ge=0, lt=1
    )
    mask_schedule: Literal["linear", "cosine"] = setting(
        "path to the end: linear in images, or along cos(pi/2 progress)^mask_power", "linear"
    )
    mask_power: Positive = setting("cosine: its power (MaskDiT tunes with 4)", 4.0)
    lr: Positive = setting("peak learning rate (of AdamW)")
    warmup_nimg: int = setting("images of linear warm-up", 0, ge=0)
    lr_schedule: Literal["constant", "cosine", "linear", "wsd"] = setting(
        "shape after the warm-up; wsd: constant, then linear", "constant"
    )
    lr_end_ratio: Share = setting("the schedule ends at this share of the peak", 0.0)
    lr_decay_share: float = setting("wsd: share of the stage in which the rate falls", 0.2, gt=0, le=1)
    clip_norm: Positive | None = setting("clip the gradient to this norm; null = never", 1.0)
    noise: NoiseConfig = setting("training noise levels", NoiseConfig())
    ema_decay: float | None = setting(
        "decay of the weight average per step; null = no EMA", 0.999, ge=0, lt=1
    )
    ema_start_nimg: int = setting("images of this stage before the average starts", 0, ge=0)
    ema_rampup: Positive | None = setting(
        "half-life at most this share of the images seen since the start; null = no ramp", 0.1
    )
    keep_optimizer: bool = setting("go on with the optimiser state of the stage before", True)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(
                f"batch is {self.batch}; it must be a multiple of micro_batch ({self.micro_batch})"
            )
        stable_nimg = (1 - self.lr_decay_share) * self.steps * self.batch
        if self.lr_schedule == "wsd" and self.warmup_nimg > stable_nimg:
            raise ValueError(
                f"warmup_nimg is {self.warmup_nimg}, but with lr_schedule=wsd and lr_decay_share="
                f"{self.lr_decay_share:g} the rate falls from image {stable_nimg:.0f} of the stage on; make "
                "one of them smaller"
            )
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps of the stage."""
        return math.ceil(self.nimg / self.batch)

    def mask_ratio_at(self, done_nimg: int) -> float:
        """Share of patches dropped after ``done_nimg`` images of the stage.

        Constant, or over the stage from ``mask_ratio`` to ``mask_ratio_end`` in sixteenths, and never beyond
        the two: linear in images, or end + (start - end) cos(pi/2 progress)^power.

        Source: MaskDiT, arXiv 2306.09305, unmasking tuning (cosine schedules, here of any power).
        """
        if self.mask_ratio_end is None:
            return self.mask_ratio
        progress = min(1.0, done_nimg / max(1, (self.steps - 1) * self.batch))
        left = 1 - progress
        if self.mask_schedule == "cosine":
            left = max(0.0, math.cos(math.pi / 2 * progress)) ** self.mask_power
        ratio = self.mask_ratio_end + (self.mask_ratio - self.mask_ratio_end) * left
        low, high = sorted((self.mask_ratio, self.mask_ratio_end))
        return min(high, max(low, round(ratio * MASK_STEPS) / MASK_STEPS))


class OptimizerConfig(Frozen):
    """AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest."""

    kind: Literal["adamw", "muon"] = setting("adamw or muon", "adamw")
    beta1: float = setting("AdamW", 0.9, ge=0, lt=1)
    beta2: float = setting("AdamW", 0.999, ge=0, lt=1)
    eps: Positive = setting("AdamW", 1e-8)
    weight_decay: float = setting(
        "of matrices; never of gains, biases, routers, class table, mask tokens", 0.1, ge=0
    )
    decay_everything: bool = setting("decay every parameter, as the released MicroDiT did", False)
    expert_lr_scale: Positive = setting("learning rate of expert weights relative to the rest", 1.0)
    muon_lr_scale: Positive = setting("Muon's learning rate relative to AdamW's", 1.0)
    muon_momentum: float = setting("Muon, Nesterov", 0.95, ge=0, lt=1)
    muon_ns_steps: int = setting("Newton-Schulz iterations", 5, ge=1, le=12)
    muon_adjust: Literal["original", "match_rms_adamw"] = setting(
        "scale of the update by matrix shape, as in torch.optim.Muon", "match_rms_adamw"
    )


class SamplingConfig(Frozen):
    """Defaults for drawing pictures."""

    sampler: Literal[
        "heun",
        "euler",
        "ddim",
        "ddpm",
        "euler-ancestral",
        "dpmpp-2m",
        "dpmpp-3m",
        "dpmpp-2s",
        "dpmpp-3s",
        "dpmpp-2m-sde",
        "unipc",
        "consistency",
    ] = setting("docs/sampling-cost.md says what each is; all but heun make one network call a step", "heun")
    steps: int = setting("noise levels", 30, ge=1, le=10_000)
    guidance: float = setting("classifier-free guidance; 1 = off, 0 = without the caption", 5.0)
    weak: Literal["condition", "tokens", "both"] = setting(
        "what the prediction to guide away from lacks (tokens: for tread, sprint, maskdit)",
        "condition",
    )
    weak_ratio: Share = setting(
        "weak=tokens or both: share of tokens the weak prediction leaves out; 1 = the whole path", 0.5
    )
    strong_ratio: float = setting("share of tokens that the guided prediction leaves out", 0.0, ge=0, lt=1)
    guidance_interval: tuple[float, float] | None = setting(
        "guide only where sigma is in [low, high]; null = everywhere", None
    )
    eta: Share = setting("ddim: share of the noise that is drawn anew in every step; 0 = none", 0.0)
    spacing: Literal["auto", "rho", "log-snr", "trailing", "leading", "uniform", "table"] = setting(
        "grid of noise levels; auto = rho for edm, else trailing", "auto"
    )
    sigma_min: Positive = setting("rho, log-snr: last noise-to-signal ratio above zero", 0.002)
    sigma_max: Positive = setting("rho, log-snr: first noise-to-signal ratio", 80.0)
    rho: Positive = setting("rho: exponent of the grid (EDM and Karras: 7)", 7.0)
    sigmas: tuple[Positive, ...] | None = setting(
        "table: falling noise-to-signal ratios; null = those of Align Your Steps", None
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta is {self.eta:g}, but only sampler=ddim reads it; set it to 0")
        if self.sigmas is not None:
            self._fits_table(self.sigmas)
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min is {self.sigma_min}; it must be below sigma_max ({self.sigma_max})")
        if (
            self.guidance_interval is not None
            and not 0 <= self.guidance_interval[0] <= self.guidance_interval[1]
        ):
            raise ValueError(
                f"guidance_interval is {self.guidance_interval}; it must be [low, high] with 0 <= low <= high"
            )
        return self

    def _fits_table(self, sigmas: tuple[float, ...]) -> None:
        if len(sigmas) < 2:
            raise ValueError(f"sigmas has {len(sigmas)} values; it needs 2 or more")
        if self.spacing != "table":
            raise ValueError(
                f"sigmas is set, but spacing is {self.spacing}; set spacing=table, or sigmas=null"
            )
        for i, (ahead, after) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
            if after >= ahead:
                raise ValueError(
                    f"sigmas goes from {ahead:g} to {after:g} at place {i + 1}; noise must fall all the way"
                )


class RunConfig(Frozen):
    """A whole run."""

    name: str = setting("name of the run; runs/NAME is its folder", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = setting("seed of every random stream", 0, ge=0)
    device: str = setting("auto, cpu, cuda, cuda:1, mps", "auto")
    precision: Literal["bf16", "fp32"] = setting("bf16 autocast over fp32 weights, or fp32", "bf16")
    compile: bool = setting("torch.compile the blocks (one to two minutes at the start)", False)
    model: AnyModel = setting("the network", TransformerConfig())
    tokens: TokensConfig = setting("token reduction while training", TokensConfig())
    process: ProcessConfig = setting("noise process", ProcessConfig())
    data: DataConfig = setting("data", DataConfig())
    stages: tuple[StageConfig, ...] = setting("stages, in order", min_length=1)
    initial_weights: str | None = setting(
        "begin with these: run or checkpoint folder, model file, released file; null = drawn", None
    )
    optimizer: OptimizerConfig = setting("optimiser", OptimizerConfig())
    power_ema: tuple[AverageLength, ...] = setting(
        "lengths of power-function averages to keep, e.g. [0.05, 0.1], for shoestring ema", ()
    )
    superres: SuperResConfig | None = setting("super-resolution; null = pictures from noise", None)
    distill: DistillConfig | None = setting("distillation; null = learn from data alone", None)
    lora: LoRAConfig | None = setting("train low-rank factors only; null = all weights", None)
    dreambooth: DreamBoothConfig | None = setting("the subject that is learned; null = none", None)
    sampling: SamplingConfig = setting("sampling", SamplingConfig())
    logging: LoggingConfig = setting("logging", LoggingConfig())
    guard: GuardConfig = setting("guard rails", GuardConfig())
    parallel: ParallelConfig = setting("several processes", ParallelConfig())

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len({f"{length:g}" for length in self.power_ema}) < len(self.power_ema):
            raise ValueError(f"power_ema is {list(self.power_ema)}; two lengths are the same, give each once")
        if self.model.kind == "unet":
            self._fits_unet()
        self._fits_superres()
        self._fits_distill()
        self._fits_lora()
        names = [stage.name for stage in self.stages]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"stages has the name {twice!r} twice; give every stage a name of its own")
        return self

    def _fits_superres(self) -> None:
        wanted = 0 if self.superres is None else self.model.in_channels
        if self.model.image_channels != wanted:
            what = "superres is not set" if self.superres is None else "superres is set"
            raise ValueError(
                f"model.image_channels is {self.model.image_channels}, but {what}; set it to {wanted}"
            )
        if self.superres is None:
            return
        if self.logging.kid_nimg is not None:
            raise ValueError(
                "logging.kid_nimg is set, but superres draws from small pictures; set it to null"
            )
        for stage in self.stages:
            if stage.resolution % self.superres.factor:
                raise ValueError(
                    f"stages.{stage.name}.resolution is {stage.resolution}; with superres it must be a "
                    f"multiple of the factor ({self.superres.factor})"
                )

    def _fits_distill(self) -> None:
        distill = self.distill
        if distill is None:
            return
        low, high = distill.guidance
        if low < high and not self.model.guidance_input:
            raise ValueError(
                f"distill.guidance goes from {low:g} to {high:g}, but model.guidance_input is false, so the "
                "model would not know which is asked for; set it to true, or both numbers to one"
            )
        if distill.method == "guided" and not self.model.guidance_input:
            raise ValueError(
                "distill.method is guided, which makes the scale of guidance an input; set "
                "model.guidance_input=true"
            )
        averaged = distill.target == "ema" and distill.method in ("consistency", "codi")
        if self.parallel.sharding in ("fsdp", "hybrid") and averaged:
            raise ValueError(
                f"parallel.sharding is {self.parallel.sharding}, which spreads the average over the ranks, "
                "but distill.target is ema; set it to student"
            )
        if averaged:
            missing = next((stage.name for stage in self.stages if stage.ema_decay is None), None)
            if missing is not None:
                raise ValueError(
                    f"stages.{missing}.ema_decay is null, but distill.target is ema; set a decay, or the "
                    "target to student"
                )

    def _fits_lora(self) -> None:
        if self.lora is not None and self.optimizer.kind == "muon":
            raise ValueError(
                "lora is set, but optimizer.kind is muon, which is for whole matrices; set it to adamw"
            )
        trained = "superres" if self.superres is not None else "distill" if self.distill is not None else None
        if self.lora is not None and trained is not None:
            raise ValueError(
                f"lora is set, but {trained} trains whole weights; put the factors into the base's weights "
                "first, with shoestring adapt lora-file and shoestring adapt merge"
            )
        if self.dreambooth is not None and self.model.condition != "text":
            raise ValueError(
                f"dreambooth is set, but model.condition is {self.model.condition}; a subject is called by a "
                "word, so it must be text"
            )

    def _fits_unet(self) -> None:
        for found, key, valid in (
            (self.tokens.method, "tokens.method", "dense"),
            (self.optimizer.kind, "optimizer.kind", "adamw"),
            (self.compile, "compile", False),
        ):
            if found != valid:
                raise ValueError(
                    f"{key} is {str(found).lower()}, but model.kind=unet has no transformer blocks; "
                    f"set it to {str(valid).lower()}"
                )

    @property
    def nimg(self) -> int:
        """Images of all stages together."""
        return sum(stage.steps * stage.batch for stage in self.stages)
