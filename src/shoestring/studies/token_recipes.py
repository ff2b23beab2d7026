"""What the methods of the token-reduction study are: presets, and a recipe for each method from one base.

All share blocks, width, data, optimiser and process. Dense and deferred are one network; the others spend the
mixer's parameters on the backbone's feed-forwards, MaskDiT adds its decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from shoestring.config import (
    DataConfig,
    DecoderConfig,
    ExpertsConfig,
    GuardConfig,
    LoggingConfig,
    MixerConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    ProcessConfig,
    RunConfig,
    SamplingConfig,
    StageConfig,
    TokensConfig,
    TransformerConfig,
)
from shoestring.planning import model_flops

MEASURED = (1 / 8, 1 / 4, 1 / 2, 1.0)
"""Shares of its images after which every training is measured: evenly on the logarithmic axis of budgets."""
LR = 1.5e-3


@dataclass(frozen=True)
class Preset:
    """Size of a study."""

    name: str
    source: str
    condition: str
    classes: int
    resolution: int
    dim: int
    depth: int
    mixer_dim: int
    nimg: int
    batch: int
    samples: int
    many_samples: int
    """For cells with several seeds."""
    sampling_steps: int
    validation_images: int
    compile: bool

    def rounded(self, nimg: float) -> int:
        """Images in whole steps, and every measured share of them too."""
        unit = self.batch * round(1 / MEASURED[0])
        return max(unit, round(nimg / unit) * unit)


PRESETS = {
    "tiny": Preset(
        name="tiny",
        source="shapes",
        condition="none",
        classes=1,
        resolution=24,
        dim=64,
        depth=4,
        mixer_dim=16,
        nimg=2_560,
        batch=16,
        samples=128,
        many_samples=128,
        sampling_steps=6,
        validation_images=64,
        compile=False,
    ),
    "cifar10": Preset(
        name="cifar10",
        source="cifar10",
        condition="class",
        classes=10,
        resolution=32,
        dim=96,
        depth=6,
        mixer_dim=24,
        nimg=61_440,
        batch=64,
        samples=2_000,
        many_samples=5_000,
        sampling_steps=9,
        validation_images=500,
        compile=True,
    ),
}


def base_recipe(preset: Preset, data_path: str | None, nimg: int) -> RunConfig:
    """The recipe that all cells change: dense, with the mixer in the paper's proportion.

    Args:
        preset: size of the study.
        data_path: where the pictures are, for presets that need it.
        nimg: images of one training.

    Returns:
        The recipe.
    """
    model = TransformerConfig(
        in_channels=3,
        condition=preset.condition,
        classes=preset.classes,
        patch_size=2,
        dim=preset.dim,
        depth=preset.depth,
        head_dim=preset.mixer_dim,
        qkv_multipliers=(1.0,),
        ffn_multipliers=(4.0,),
        ffn_multiple_of=8,
        mixer=MixerConfig(depth=4, dim=preset.mixer_dim),
        experts=ExpertsConfig(count=0),
    )
    stage = StageConfig(
        name="train",
        nimg=nimg,
        batch=preset.batch,
        resolution=preset.resolution,
        lr=LR,
        warmup_nimg=nimg // 20,
        clip_norm=1.0,
        noise=NoiseConfig(mean=-1.2, std=1.2),
        ema_decay=0.999,
        ema_rampup=0.1,
    )
    return RunConfig(
        name="study-tokens",
        compile=preset.compile,
        model=model,
        tokens=TokensConfig(method="dense"),
        process=ProcessConfig(kind="edm", sigma_data=0.5),
        data=DataConfig(source=preset.source, path=data_path, text_encoder="hashing"),
        stages=(stage,),
        optimizer=OptimizerConfig(kind="muon", weight_decay=0.01, muon_lr_scale=10 / 3),
        sampling=SamplingConfig(sampler="heun", steps=preset.sampling_steps, guidance=1.0),
        logging=LoggingConfig(
            log_nimg=max(preset.batch, nimg // 40),
            validate_nimg=nimg,
            sample_nimg=nimg,
            checkpoint_nimg=round(nimg * MEASURED[0]),
            keep_checkpoints=round(1 / MEASURED[0]) + 2,
            tensorboard=False,
        ),
        # A cell that diverges is a result, not to be rescued.
        guard=GuardConfig(max_skips=1, max_rollbacks=0),
    )


def with_model(config: RunConfig, **changes: object) -> RunConfig:
    """Change settings of the network."""
    values = config.model.model_dump() | changes
    return config.model_copy(update={"model": TransformerConfig(**values)})


def with_tokens(config: RunConfig, **changes: object) -> RunConfig:
    """Change settings of the token method."""
    values = config.tokens.model_dump() | changes
    return config.model_copy(update={"tokens": TokensConfig(**values)})


def with_stages(config: RunConfig, **changes: object) -> RunConfig:
    """Change settings of all stages."""
    stages = tuple(StageConfig(**(stage.model_dump() | changes)) for stage in config.stages)
    return config.model_copy(update={"stages": stages})


def parameters(model: ModelConfig, tokens: TokensConfig) -> int:
    """Parameters of a network, built on the meta device."""
    import torch

    from shoestring.models.files import new_network

    with torch.device("meta"):
        return sum(p.numel() for p in new_network(model, tokens).parameters())


def transformer(config: RunConfig) -> TransformerConfig:
    """The network of a recipe of this study."""
    assert isinstance(config.model, TransformerConfig)
    return config.model


def _dense(base: RunConfig, ratio: float) -> RunConfig:
    return base


def _deferred(base: RunConfig, ratio: float) -> RunConfig:
    return with_stages(with_tokens(base, method="deferred"), mask_ratio=ratio)


def _without_mixer(base: RunConfig) -> RunConfig:
    return with_model(base, mixer=MixerConfig(depth=0, dim=transformer(base).mixer.dim))


def _spent(bare: RunConfig, base: RunConfig) -> RunConfig:
    """The mixer's parameters spent on the feed-forwards of the backbone."""
    target = parameters(base.model, base.tokens)
    candidates = [with_model(bare, ffn_multipliers=(4 + step / 16,)) for step in range(32)]
    return min(candidates, key=lambda c: abs(parameters(c.model, c.tokens) - target))


def _naive(base: RunConfig, ratio: float) -> RunConfig:
    bare = with_tokens(_without_mixer(base), method="naive")
    return with_stages(_spent(bare, base), mask_ratio=ratio)


def _maskdit(base: RunConfig, ratio: float) -> RunConfig:
    decoder = DecoderConfig(depth=2, dim=transformer(base).dim // 2, head_dim=transformer(base).head_dim)
    config = with_model(_without_mixer(base), decoder=decoder)
    return with_stages(with_tokens(config, method="maskdit", reconstruction=0.1), mask_ratio=ratio)


def _middle(base: RunConfig, ratio: float, method: str) -> RunConfig:
    """All but the first and the last block see fewer tokens; no mixer, its parameters spent as for naive."""
    bare = with_tokens(_without_mixer(base), method=method, first=1, last=-1)
    return with_stages(_spent(bare, base), mask_ratio=ratio)


def _large_patch(base: RunConfig, ratio: float) -> RunConfig:
    return with_model(base, patch_size=2 * base.model.patch_size)


def _small_model(base: RunConfig, ratio: float) -> RunConfig:
    """Dense, no mixer, narrower or shallower: the training FLOPs of deferred masking at this ratio."""
    deferred = _deferred(base, ratio)
    target = training_flops(deferred, deferred.stages[0])
    side = base.stages[0].resolution // base.model.patch_size
    return with_model(_without_mixer(base), **_smaller(transformer(base), side, target))


@lru_cache(maxsize=32)
def _smaller(model: TransformerConfig, side: int, target: float) -> dict[str, object]:
    best: tuple[float, dict[str, object]] | None = None
    for dim in range(model.head_dim, model.dim + 1, model.head_dim):
        for depth in range(1, model.depth + 1):
            for quarter in range(4, 29):
                change: dict[str, object] = {
                    "dim": dim,
                    "depth": depth,
                    "ffn_multipliers": (quarter / 4,),
                    "mixer": MixerConfig(depth=0, dim=model.mixer.dim),
                }
                small = TransformerConfig(**(model.model_dump() | change))
                flops = model_flops(small, (side, side), 0, 0.0, TokensConfig(method="dense")).training
                # Within 2 %; then as near as possible to the proportions of the base: of width to depth, and
                # of the feed-forward.
                shape = abs(math.log((dim / depth) / (model.dim / model.depth)))
                penalty = max(0.0, abs(flops / target - 1) - 0.02) * 100 + abs(quarter / 4 - 4) + 2 * shape
                if best is None or penalty < best[0]:
                    best = penalty, change
    assert best is not None
    return best[1]


METHOD_RECIPES: dict[str, Callable[[RunConfig, float], RunConfig]] = {
    "dense": _dense,
    "deferred": _deferred,
    "naive": _naive,
    "maskdit": _maskdit,
    "tread": lambda base, ratio: _middle(base, ratio, "tread"),
    "sprint": lambda base, ratio: _middle(base, ratio, "sprint"),
    "large-patch": _large_patch,
    "small-model": _small_model,
}


def training_flops(config: RunConfig, stage: StageConfig, ratio: float | None = None) -> float:
    """Training FLOPs of one image in a stage (at its first ratio unless another is given)."""
    side = stage.resolution // config.model.patch_size
    ratio = stage.mask_ratio if ratio is None else ratio
    return model_flops(config.model, (side, side), config.data.max_tokens, ratio, config.tokens).training
