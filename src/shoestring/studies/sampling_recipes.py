"""What is trained for the sampling-cost study: a family of U-Nets and one of transformers, on the same data.

All share data, images, batch, process and averages; sizes differ in width, transformers also in depth.
Transformers have one learning rate, as all networks of the paper; that of U-Nets falls with their width.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoestring.config import (
    DataConfig,
    ExpertsConfig,
    GuardConfig,
    LoggingConfig,
    MixerConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    ProcessConfig,
    Ramp,
    RunConfig,
    SamplingConfig,
    StageConfig,
    TokensConfig,
    TransformerConfig,
    UNetConfig,
)

STEPS = (4, 6, 8, 10, 20, 50, 100)
GUIDANCE = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
SAMPLERS = ("ddim", "ddpm", "dpmpp-2m", "heun")
"""The paper's three, and EDM's."""
LR = 7e-4
"""Of transformers."""
UNET_LR, UNET_LR_WIDTH = 2e-3, 16
"""Of U-Nets up to so many channels; of wider ones less in proportion: at 2e-3 the one of 40 breaks down."""
MEASURED = (1 / 8, 1 / 4, 1 / 2, 1.0)
"""Shares of its images after which every training is measured."""


@dataclass(frozen=True)
class Size:
    """A network of a family."""

    family: str
    """unet or microdit."""
    width: int
    depth: int = 0
    """Of transformers."""

    @property
    def name(self) -> str:
        """Such as unet-16."""
        return f"{self.family}-{self.width}"


@dataclass(frozen=True)
class Preset:
    """Size of a study."""

    name: str
    source: str
    condition: str
    classes: int
    resolution: int
    nimg: int
    batch: int
    samples: int
    """Pictures of a cell."""
    sizes: tuple[Size, ...]
    steps: tuple[int, ...] = STEPS
    guidance: tuple[float, ...] = GUIDANCE
    samplers: tuple[str, ...] = SAMPLERS
    seeds: int = 2
    """Trainings of the two ends of every family; the others have one."""


# About eighteenfold in FLOPs, both.
_UNETS = tuple(Size("unet", width) for width in (8, 12, 16, 24, 40))
_TRANSFORMERS = tuple(Size("microdit", *pair) for pair in ((32, 4), (64, 4), (96, 6), (144, 6)))

PRESETS = {
    "tiny": Preset(
        name="tiny",
        source="shapes",
        condition="text",
        classes=1,
        resolution=24,
        nimg=5_120,
        batch=64,
        samples=64,
        sizes=(Size("unet", 8), Size("unet", 12), Size("unet", 16), Size("microdit", 64, 4)),
        steps=(4, 10),
        guidance=(1.5, 3.0),
        samplers=("ddim", "dpmpp-2m"),
        seeds=1,
    ),
    "cifar10": Preset(
        name="cifar10",
        source="cifar10",
        condition="class",
        classes=10,
        resolution=16,
        nimg=61_440,
        batch=32,
        samples=500,
        sizes=_UNETS + _TRANSFORMERS,
    ),
    "shapes": Preset(
        name="shapes",
        source="shapes",
        condition="text",
        classes=1,
        resolution=24,
        nimg=40_960,
        batch=32,
        samples=500,
        sizes=_UNETS + _TRANSFORMERS,
    ),
}


@dataclass(frozen=True)
class Training:
    """One network to train."""

    size: Size
    seed: int

    @property
    def key(self) -> str:
        """Name of its run folder."""
        return f"{self.size.name}-s{self.seed}"


def trainings(preset: Preset) -> list[Training]:
    """All trainings of a study, those of the first seed first."""
    found = [Training(size, 0) for size in preset.sizes]
    families = dict.fromkeys(size.family for size in preset.sizes)
    for seed in range(1, preset.seeds):
        for family in families:
            members = [size for size in preset.sizes if size.family == family]
            found += [Training(size, seed) for size in dict.fromkeys((members[0], members[-1]))]
    return found


def _network(preset: Preset, size: Size, caption_dim: int) -> ModelConfig:
    shared = {
        "in_channels": 3,
        "condition": preset.condition,
        "classes": preset.classes,
        "caption_dim": caption_dim,
        # U-Nets see pixels: eight channels cannot pass on the twelve values of a patch (EXPERIMENTS.md).
        "patch_size": 1 if size.family == "unet" else 2,
        "mask_captions": True,
    }
    if size.family == "unet":
        return UNetConfig(kind="unet", channels=size.width, **shared)
    return TransformerConfig(
        dim=size.width,
        depth=size.depth,
        head_dim=16,
        qkv_multipliers=Ramp(first=0.5, last=1.0),
        ffn_multipliers=Ramp(first=0.5, last=4.0),
        ffn_multiple_of=32,
        mixer=MixerConfig(depth=2, dim=size.width),
        experts=ExpertsConfig(count=0),
        **shared,
    )


def recipe(preset: Preset, training: Training, data_path: str | None, nimg: int) -> RunConfig:
    """The complete recipe of a training.

    Args:
        preset: of the study.
        training: which.
        data_path: where the pictures are, for presets that need it.
        nimg: images of a training.

    Returns:
        A recipe that ``shoestring train`` can run as well.
    """
    text = preset.condition == "text"
    unet = training.size.family == "unet"
    stage = StageConfig(
        name="train",
        nimg=nimg,
        batch=preset.batch,
        resolution=preset.resolution,
        lr=UNET_LR * min(1.0, UNET_LR_WIDTH / training.size.width) if unet else LR,
        warmup_nimg=nimg // 10,
        clip_norm=1.0,
        noise=NoiseConfig(mean=-1.2, std=1.2),
        ema_decay=0.999,
        ema_rampup=0.1,
    )
    return RunConfig(
        name=training.key,
        seed=training.seed,
        model=_network(preset, training.size, 256 if text else 64),
        tokens=TokensConfig(method="dense"),
        # Of so few steps epsilon makes noise only: what little it errs at pure noise counts 157-fold in x0.
        process=ProcessConfig(kind="edm", sigma_data=0.5),
        data=DataConfig(
            source=preset.source,
            path=data_path,
            text_encoder="hashing",
            max_tokens=24,
            split="captions" if text else "pictures",
        ),
        stages=(stage,),
        optimizer=OptimizerConfig(kind="adamw", weight_decay=0.01),
        sampling=SamplingConfig(sampler="ddim", steps=50, guidance=2.0),
        logging=LoggingConfig(
            log_nimg=max(preset.batch, nimg // 40),
            validate_nimg=nimg,
            sample_nimg=nimg,
            checkpoint_nimg=round(nimg * MEASURED[0]),
            keep_checkpoints=round(1 / MEASURED[0]) + 2,
            tensorboard=False,
        ),
        # A training that diverges is a result, not to be rescued.
        guard=GuardConfig(max_skips=1, max_rollbacks=0),
    )
