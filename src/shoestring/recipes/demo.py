"""Runs that one CPU finishes in minutes: pictures from captions, from nothing, with deferred masking."""

from __future__ import annotations

from shoestring.config.schema import (
    DataConfig,
    ExpertsConfig,
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
)

MINILM_WIDTH, HASHING_WIDTH = 384, 256


def small(caption_dim: int = MINILM_WIDTH) -> ModelConfig:
    """A MicroDiT of 9.3 million parameters on pixels: patch 4, no experts, a mixer of two blocks."""
    return ModelConfig(
        in_channels=3,
        caption_dim=caption_dim,
        patch_size=4,
        dim=256,
        depth=6,
        head_dim=32,
        qkv_multipliers=Ramp(first=0.5, last=1.0),
        ffn_multipliers=Ramp(first=1.0, last=3.0),
        ffn_multiple_of=32,
        mixer=MixerConfig(depth=2, dim=128, ffn_multiplier=3.0),
        experts=ExpertsConfig(count=0),
        mask_captions=True,
    )


def _stages(nimg: int, batch: int, lr: float) -> tuple[StageConfig, ...]:
    """Four fifths of the images at mask 0.5, then the rest without a mask."""
    masked = nimg * 4 // 5
    return (
        StageConfig(
            name="masked",
            nimg=masked,
            batch=batch,
            resolution=32,
            mask_ratio=0.5,
            lr=lr,
            warmup_nimg=20 * batch,
            noise=NoiseConfig(mean=-0.6, std=1.2),
            ema_decay=0.995,
        ),
        StageConfig(
            name="unmasked",
            nimg=nimg - masked,
            batch=batch,
            resolution=32,
            mask_ratio=0.0,
            lr=lr,
            lr_schedule="cosine",
            lr_end_ratio=0.05,
            noise=NoiseConfig(mean=-0.6, std=1.2),
            ema_decay=0.995,
        ),
    )


def _demo(name: str, data: DataConfig, nimg: int, every: int) -> RunConfig:
    """What the small runs share: Muon for the matrices, a few steps of Heun, frequent looks."""
    return RunConfig(
        name=name,
        model=small(),
        process=ProcessConfig(kind="edm"),
        data=data,
        stages=_stages(nimg, batch=64, lr=1.5e-3),
        optimizer=OptimizerConfig(kind="muon", weight_decay=0.01, muon_lr_scale=10 / 3),
        sampling=SamplingConfig(sampler="heun", steps=18, guidance=3.0),
        logging=LoggingConfig(
            log_nimg=1_024,
            validate_nimg=every,
            sample_nimg=every,
            checkpoint_nimg=every,
            validation_images=64,
        ),
    )


def demo() -> RunConfig:
    """Emoji from captions, trained from nothing on a CPU in minutes: what ``make demo`` runs.

    Paper:    the method of MicroDiT, arXiv 2407.15811, at a hundredth of its size.
    Hardware: two CPU cores.
    Hours:    0.1 (predicted: 86,400 images at 240 images/s, the rate of a sketch on this size).
    Dollars:  0.
    Metric:   retrieval top-5 of at least 80 % over the training captions is the aim.
    """
    data = DataConfig(source="openmoji", max_captions=460, max_tokens=16)
    return _demo("demo", data, nimg=86_400, every=14_400)


def demo_shapes() -> RunConfig:
    """Coloured shapes from captions, judged by an exact reader of pictures: needs no package and no download.

    Paper:    the method of MicroDiT, arXiv 2407.15811.
    Hardware: two CPU cores.
    Hours:    0.1 (predicted: 86,400 images at 240 images/s).
    Dollars:  0.
    Metric:   at least 80 % of single-shape prompts right in shape and colour is the aim.
    """
    data = DataConfig(source="shapes", text_encoder="hashing", max_tokens=24)
    config = _demo("demo-shapes", data, nimg=86_400, every=14_400)
    return config.model_copy(update={"model": small(HASHING_WIDTH)})


def openmoji_all() -> RunConfig:
    """All of OpenMoji, skin tones left out: the demo's model on every caption, for a night on a CPU.

    Paper:    the method of MicroDiT, arXiv 2407.15811.
    Hardware: two CPU cores, or any GPU.
    Hours:    1.2 on two CPU cores (predicted: 1 M images at 240 images/s).
    Dollars:  0.
    Metric:   none yet.
    """
    data = DataConfig(source="openmoji", max_captions=None, max_tokens=16)
    return _demo("openmoji-all", data, nimg=1_000_000, every=100_000)
