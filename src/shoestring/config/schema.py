"""Every setting of a run: frozen, validated, documented. ``RunConfig`` is the whole.

Field descriptions are the comments of ``shoestring recipes show``. Progress is counted in images
(``..._nimg``), so that batch size and number of GPUs may change between stages.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MASK_STEPS = 16
"""A changing mask ratio moves in sixteenths, so that a compiled step is not built anew for every ratio."""
CODEC_DOWNSAMPLING = {
    "pixels": 1,
    "autoencoder-kl": 8,
    "autoencoder-dc": 32,
    "autoencoder-tiny": 8,
    "taef2": 8,
}
"""Pixels per latent along one side, as far as it is known without the weights (the usual ones)."""

SHORTEST_AVERAGE, LONGEST_AVERAGE = 0.001, 0.2886
"""Of power-function averages, as a share of the run: just below 1/sqrt(12), where all weights count alike."""

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
AverageLength = Annotated[float, Field(ge=SHORTEST_AVERAGE, le=LONGEST_AVERAGE)]


class Frozen(BaseModel):
    """Base of all settings: immutable, unknown keys refused, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def setting(description: str, default: Any = ..., **limits: Any) -> Any:
    """A field with its comment; without a default it must be given."""
    return Field(default, description=description, **limits)


class Ramp(Frozen):
    """Width multipliers that grow linearly over the blocks (layer-wise scaling)."""

    first: Positive = setting("multiplier of the first block")
    last: Positive = setting("multiplier of the last block")

    def per_block(self, depth: int) -> tuple[float, ...]:
        """One multiplier a block."""
        if depth == 1:
            return (self.first,)
        step = (self.last - self.first) / (depth - 1)
        return tuple(self.first + i * step for i in range(depth - 1)) + (self.last,)


class MixerConfig(Frozen):
    """The patch mixer: blocks that see all patches before some are dropped (deferred masking)."""

    depth: int = setting("blocks; 0 = no mixer, which makes masking naive", 4, ge=0, le=64)
    dim: int = setting("width; equal to model.dim needs no maps in and out", 512, gt=0)
    qkv_multiplier: Positive = setting("self-attention width as a share of dim", 1.0)
    ffn_multiplier: Positive = setting("feed-forward width as a multiple of dim", 4.0)


class ExpertsConfig(Frozen):
    """Expert-choice mixture of experts in place of some feed-forward layers."""

    count: int = setting("experts per layer; 0 = no experts anywhere", 8, ge=0, le=256)
    capacity: Positive = setting("experts that see an average token", 2.0)
    every: int = setting("every n-th block has experts (never the backbone's last)", 2, ge=1)


class DecoderConfig(Frozen):
    """Blocks at the end that see all patches again, the dropped ones as mask tokens (MaskDiT)."""

    depth: int = setting("blocks; 0 = no decoder", 0, ge=0, le=64)
    dim: int = setting("width", 512, gt=0)
    head_dim: int = setting("width of one attention head", 32, gt=0)


class ModelConfig(Frozen):
    """The network."""

    kind: Literal["microdit", "maskdit"] = setting(
        "family of blocks: microdit (SwiGLU, experts) or maskdit (plain DiT)", "microdit"
    )
    in_channels: int = setting("channels of the latents (3 for pixels)", 4, gt=0)
    condition: Literal["text", "class", "none"] = setting(
        "text (cross-attention and modulation), class (a table; modulation) or none", "text"
    )
    caption_dim: int = setting("text: width of the caption embeddings", 1024, gt=0)
    classes: int = setting("class: how many", 1000, ge=1)
    patch_size: int = setting("side of a patch in latents", 2, ge=1)
    dim: int = setting("width D", 512, gt=0)
    depth: int = setting("backbone blocks", 16, ge=1, le=256)
    head_dim: int = setting("width of one attention head", 32, gt=0)
    qkv_multipliers: Ramp | tuple[Positive, ...] = setting(
        "self-attention widths: a ramp, or one value a block (fewer: each for depth/len blocks)",
        Ramp(first=0.5, last=1.0),
    )
    ffn_multipliers: Ramp | tuple[Positive, ...] = setting(
        "feed-forward widths, likewise", Ramp(first=0.5, last=4.0)
    )
    ffn_multiple_of: int = setting("feed-forward widths are rounded up to this", 256, gt=0)
    mixer: MixerConfig = setting("patch mixer", MixerConfig())
    decoder: DecoderConfig = setting("decoder", DecoderConfig())
    experts: ExpertsConfig = setting("mixture of experts", ExpertsConfig())
    bias: bool = setting("biases in attention, dense FFN, caption block and mixer maps", False)
    mup_base_dim: int | None = setting(
        "muP: dim at which learning rate and initial weights were tuned; null = off", None, gt=0
    )
    qk_norm: bool = setting("normalise queries and keys of self-attention over the whole width", True)
    norm_eps: Positive = setting("epsilon of every layer norm", 1e-6)
    mask_captions: bool = setting(
        "attend to and pool over real caption tokens only (false: padding too, as released)", False
    )
    attention: Literal["auto", "sdpa", "explicit"] = setting(
        "auto: explicit softmax(QK)V to train in bf16 on a CPU, where sdpa is slow; else sdpa", "auto"
    )
    checkpoint_activations: bool = setting("recompute each block in the backward pass", False)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.dim % self.head_dim or self.dim % 4:
            raise ValueError(
                f"dim is {self.dim}; it must be a multiple of 4 and of head_dim ({self.head_dim})"
            )
        if self.mixer.depth and self.mixer.dim % self.head_dim:
            raise ValueError(
                f"mixer.dim is {self.mixer.dim}; it must be a multiple of head_dim ({self.head_dim})"
            )
        if self.decoder.depth and (self.decoder.dim % self.decoder.head_dim or self.decoder.dim % 4):
            raise ValueError(
                f"decoder.dim is {self.decoder.dim}; it must be a multiple of 4 and of decoder.head_dim "
                f"({self.decoder.head_dim})"
            )
        if self.mup_base_dim is not None:
            widths = {"dim": self.dim} | {
                f"{name}.dim": part.dim
                for name, part in (("mixer", self.mixer), ("decoder", self.decoder))
                if part.depth
            }
            for name, width in widths.items():
                head = self.decoder.head_dim if name == "decoder.dim" else self.head_dim
                unit = math.lcm(head, 4)
                if width * self.mup_base_dim % (self.dim * unit):
                    raise ValueError(
                        f"mup_base_dim is {self.mup_base_dim}, at which {name} would be "
                        f"{width * self.mup_base_dim / self.dim:g}; it must be a multiple of {unit} (of the "
                        "heads' width and of 4)"
                    )
        if self.kind == "maskdit" and self.experts.count:
            raise ValueError(
                f"experts.count is {self.experts.count}; blocks of kind maskdit have no experts, set it to 0"
            )
        for name in ("qkv_multipliers", "ffn_multipliers"):
            values = getattr(self, name)
            if not isinstance(values, Ramp) and (not values or self.depth % len(values)):
                raise ValueError(
                    f"{name} has {len(values)} values; their number must divide depth ({self.depth})"
                )
            smallest = min((values.first, values.last) if isinstance(values, Ramp) else values)
            narrowest = min(self.dim, self.mup_base_dim or self.dim)
            if narrowest * smallest < 2:
                raise ValueError(
                    f"{name} goes down to {smallest}; it must be at least {2 / narrowest:g} (2 / dim)"
                )
        return self

    def at_width(self, dim: int) -> ModelConfig:
        """The same network at another width: mixer and decoder in proportion, heads as wide as before."""

        def scaled(part: MixerConfig | DecoderConfig) -> dict[str, Any]:
            return part.model_dump() | ({"dim": part.dim * dim // self.dim} if part.depth else {})

        changes = {"dim": dim, "mixer": scaled(self.mixer), "decoder": scaled(self.decoder)}
        return ModelConfig.model_validate(self.model_dump() | changes | {"mup_base_dim": None})

    def per_block(self, name: Literal["qkv_multipliers", "ffn_multipliers"]) -> tuple[float, ...]:
        """The multipliers of all backbone blocks."""
        values = getattr(self, name)
        if isinstance(values, Ramp):
            return values.per_block(self.depth)
        return tuple(v for v in values for _ in range(self.depth // len(values)))


class TokensConfig(Frozen):
    """Which patches the network leaves out while it trains, and what happens to them.

    dense: none. naive: dropped at the input. deferred: dropped after the patch mixer. maskdit: naive, and a
    decoder restores them. tread: they skip blocks and rejoin. sprint: they skip blocks, whose result is
    fused with that of the dense ones. How many is a matter of the stages (``mask_ratio``).
    """

    method: str = setting(
        "dense, naive, deferred, maskdit, tread or sprint (docs/token-reduction.md)",
        "deferred",
    )
    first: int = setting("tread, sprint: first backbone block that sees fewer patches", 2, ge=0)
    last: int = setting(
        "tread, sprint: the block before which all are back; negative counts from the end", -2
    )
    pattern: Literal["random", "blocks", "stratified"] = setting(
        "which patches: random, whole squares (blocks), or evenly over squares (stratified)", "random"
    )
    block: int = setting("blocks, stratified: side of the squares in patches", 2, ge=2, le=64)
    path_drop: Share = setting("sprint: share of samples trained without the sparse path", 0.1)
    reconstruction: float = setting(
        "maskdit: coefficient of the squared error of dropped patches (MAE); 0 = none", 0.0, ge=0
    )
    reconstruction_target: Literal["noisy", "clean"] = setting(
        "maskdit: the noisy input, normalised by patch (as released), or clean patches", "noisy"
    )
    score_dropped: bool = setting("maskdit: the denoising loss looks at dropped patches too", False)


class ProcessConfig(Frozen):
    """How noise is added and what the network predicts."""

    kind: Literal["edm", "flow"] = setting("edm (Karras et al. 2022) or flow (linear path, velocity)", "edm")
    sigma_data: Positive | None = setting(
        "standard deviation of the latents; null = measured on the training data", None
    )
    flow_shift: Positive = setting("flow: t -> shift t / (1 + (shift - 1) t); above 1 favours noise", 1.0)


class NoiseConfig(Frozen):
    """Distribution of training noise levels."""

    mean: float = setting("edm: mean of ln sigma (P_mean); flow: mean of logit t", -0.6, ge=-10, le=10)
    std: Positive = setting("edm: spread of ln sigma (P_std); flow: spread of logit t", 1.2)


class StoreConfig(Frozen):
    """One store of a mixture."""

    path: str = setting("folder or URL", min_length=1)
    weight: float = setting("share of the samples, or views per epoch (data.mix); above 0", 1.0)


class DataConfig(Frozen):
    """Where the pictures and captions come from."""

    source: Literal["openmoji", "shapes", "folder", "cifar10", "store"] = setting(
        "folder, store (shoestring data prepare), openmoji, shapes or cifar10", "folder"
    )
    path: str | None = setting(
        "folder: pictures with .txt, or metadata.jsonl/.csv/.parquet; store: folder or URL; cifar10: folder",
        None,
    )
    stores: tuple[StoreConfig, ...] = setting("store: several, mixed, instead of path", ())
    mix: Literal["proportion", "repeats"] = setting(
        "stores: weights are shares of the samples, or views of every record per epoch", "proportion"
    )
    captions: tuple[str, ...] = setting(
        "store: columns of captions; each sample is drawn one of all", ("source",), min_length=1
    )
    window_blocks: int | None = setting(
        "store: blocks of 1,024 records shuffled together; null = all, of a store behind a URL 16", None, ge=1
    )
    cache: str | None = setting("store behind a URL: local folder for its blocks; null = in the run", None)
    cache_gb: Positive = setting("store behind a URL: what the local blocks may take", 20.0)
    buckets: int = setting("folder: shapes of pictures by aspect ratio; 1 = squares", 1, ge=1, le=99)
    bucket_aspect: float = setting("folder: longer side by shorter of the longest shapes", 4.0, ge=1, le=8)
    max_captions: int | None = setting(
        "openmoji, shapes: train on this many captions (chosen by hash); null = all; a folder is used whole",
        None,
        ge=1,
    )
    held_out: Share = setting("share kept out of training (by hash); cifar10: its test file", 0.1)
    split: Literal["captions", "pictures"] = setting(
        "hold out whole captions, or pictures of captions that are trained too", "captions"
    )
    text_encoder: Literal["hashing", "minilm", "clip", "t5"] = setting(
        "hashing (no weights), minilm, clip or t5 (transformers)", "minilm"
    )
    text_encoder_path: str | None = setting(
        "clip, t5, minilm: hub name or folder of the weights; minilm, null: those from pip", None
    )
    text_encoder_dtype: Literal["fp32", "bf16", "fp16"] = setting(
        "clip, t5, minilm: precision the encoder runs in", "fp32"
    )
    max_tokens: int = setting("caption tokens kept; longer captions are cut", 77, ge=2, le=512)
    codec: Literal["pixels", "autoencoder-kl", "autoencoder-dc", "autoencoder-tiny", "taef2"] = setting(
        "pixels, or for latents autoencoder-kl, -dc or -tiny (diffusers) or taef2", "pixels"
    )
    codec_path: str | None = setting(
        "autoencoder-...: hub name or folder of the weights; taef2: folder of its two files", None
    )
    codec_dtype: Literal["fp32", "bf16", "fp16"] = setting(
        "autoencoder-..., taef2: precision the codec runs in", "fp32"
    )
    flip: bool = setting("mirror half of the pictures", False)
    caption_drop: Share = setting("share of samples trained with the empty caption", 0.1)


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

    sampler: Literal["heun", "euler"] = setting("heun (2 calls a step) or euler", "heun")
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
    sigma_min: Positive = setting("edm: last noise level", 0.002)
    sigma_max: Positive = setting("edm: first noise level", 80.0)
    rho: Positive = setting("edm: spacing of the noise levels", 7.0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
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


class LoggingConfig(Frozen):
    """What is written while training, and how often. Intervals are in images seen."""

    log_nimg: int = setting("a line in log.jsonl and TensorBoard", 2_048, gt=0)
    validate_nimg: int = setting("validation loss on pinned noise, per noise level", 50_000, gt=0)
    validation_images: int = setting("held-out pictures of the validation loss", 64, gt=0)
    sample_nimg: int = setting("a sample grid", 50_000, gt=0)
    checkpoint_nimg: int = setting("a checkpoint", 50_000, gt=0)
    keep_checkpoints: int = setting("the last checkpoints kept", 2, ge=1)
    milestone_nimg: int | None = setting(
        "checkpoints at each so many images, and at each stage's end, are kept for good; null = none",
        None,
        gt=0,
    )
    prompts: tuple[str, ...] = setting("captions of the sample grids; empty = from the data", ())
    tensorboard: bool = setting("write TensorBoard files when it is installed", True)
    wandb: str | None = setting(
        "project on Weights & Biases (a package of its own); null = none", None, min_length=1
    )
    trackio: str | None = setting(
        "project in trackio (a package of its own); null = none", None, min_length=1
    )
    usd_per_hour: float = setting("price of the machine, for the cost so far", 0.0, ge=0)


class ParallelConfig(Frozen):
    """How the network is spread over several processes; it does not change what is computed."""

    sharding: Literal["auto", "ddp", "fsdp", "hybrid"] = setting(
        "auto = ddp (a copy on every rank); fsdp: shared out; hybrid: a copy per group of ranks", "auto"
    )
    shard_ranks: int | None = setting("hybrid: ranks that share one copy", None, ge=2)


class GuardConfig(Frozen):
    """What happens when training goes wrong. A step that is not finite never changes anything."""

    max_skips: int = setting("so many steps of a window that are not finite roll the run back", 5, ge=1)
    window: int = setting("steps over which losses are compared, the last quarter with the rest", 128, ge=16)
    warmup: int = setting("first steps of a stage or mask ratio, whose losses are not compared", 128, ge=0)
    spike: Positive = setting("a loss is a spike so many spreads above the usual (of logarithms)", 8.0)
    good_after: int = setting("a checkpoint is good if so many good steps followed it", 64, ge=0)
    max_rollbacks: int = setting("times a diverged run is rolled back before it stops", 3, ge=0)
    lr_cut: float = setting("factor of the learning rate after each roll-back", 0.5, gt=0, le=1)
    dead_step: int = setting("step at which parameters that never had a gradient are named", 20, ge=8)
    stall_s: Positive = setting("seconds without a batch after which the source of the data is named", 60.0)


class RunConfig(Frozen):
    """A whole run."""

    name: str = setting("name of the run; runs/NAME is its folder", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = setting("seed of every random stream", 0, ge=0)
    device: str = setting("auto, cpu, cuda, cuda:1, mps", "auto")
    precision: Literal["bf16", "fp32"] = setting("bf16 autocast over fp32 weights, or fp32", "bf16")
    compile: bool = setting("torch.compile the blocks (one to two minutes at the start)", False)
    model: ModelConfig = setting("the network", ModelConfig())
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
    sampling: SamplingConfig = setting("sampling", SamplingConfig())
    logging: LoggingConfig = setting("logging", LoggingConfig())
    guard: GuardConfig = setting("guard rails", GuardConfig())
    parallel: ParallelConfig = setting("several processes", ParallelConfig())

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len({f"{length:g}" for length in self.power_ema}) < len(self.power_ema):
            raise ValueError(f"power_ema is {list(self.power_ema)}; two lengths are the same, give each once")
        names = [stage.name for stage in self.stages]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"stages has the name {twice!r} twice; give every stage a name of its own")
        return self

    @property
    def nimg(self) -> int:
        """Images of all stages together."""
        return sum(stage.steps * stage.batch for stage in self.stages)
