"""Runs that one CPU finishes in minutes: pictures from captions, from nothing, with deferred masking."""

from __future__ import annotations

from shoestring.config import (
    DataConfig,
    ExpertsConfig,
    LoggingConfig,
    MixerConfig,
    NoiseConfig,
    OptimizerConfig,
    ProcessConfig,
    Ramp,
    RunConfig,
    SamplingConfig,
    StageConfig,
    TransformerConfig,
)

MINILM_WIDTH, HASHING_WIDTH = 384, 256


def small(caption_dim: int = MINILM_WIDTH) -> TransformerConfig:
    """A MicroDiT of 7.3 million parameters on pixels: patch 4, no experts, a mixer of one block.

    Wide and shallow, because on a CPU narrow layers spend their time outside the matrix products.
    """
    return TransformerConfig(
        in_channels=3,
        caption_dim=caption_dim,
        patch_size=4,
        dim=256,
        depth=4,
        head_dim=64,
        qkv_multipliers=Ramp(first=0.5, last=1.0),
        ffn_multipliers=Ramp(first=1.0, last=3.0),
        ffn_multiple_of=64,
        mixer=MixerConfig(depth=1, dim=256, ffn_multiplier=2.0),
        experts=ExpertsConfig(count=0),
        mask_captions=True,
    )


def _stages(nimg: int, batch: int, lr: float) -> tuple[StageConfig, ...]:
    """A good half of the images at mask 0.5, then the rest without a mask; the rate falls linearly to zero.

    So much without a mask because this backbone is small: dropping half of its tokens makes a step only a
    quarter faster (EXPERIMENTS.md).
    """
    dense_share = 0.48
    masked = round(nimg * (1 - dense_share))
    common = {
        "batch": batch,
        "resolution": 32,
        "lr_schedule": "linear",
        "noise": NoiseConfig(mean=0.0, std=1.3),
        "ema_decay": 0.999,
    }
    return (
        StageConfig(
            name="masked",
            nimg=masked,
            mask_ratio=0.5,
            lr=lr,
            lr_end_ratio=dense_share,
            warmup_nimg=20 * batch,
            **common,
        ),
        StageConfig(name="unmasked", nimg=nimg - masked, lr=lr * dense_share, lr_end_ratio=0.0, **common),
    )


def _demo(
    name: str,
    data: DataConfig,
    nimg: int,
    every: int,
    guidance: float = 2.0,
    model: TransformerConfig | None = None,
) -> RunConfig:
    """What the small runs share: Muon for the matrices, few sampling steps, frequent looks."""
    return RunConfig(
        name=name,
        model=model or small(),
        process=ProcessConfig(kind="edm"),
        data=data,
        stages=_stages(nimg, batch=96, lr=1.5e-3),
        optimizer=OptimizerConfig(kind="muon", weight_decay=0.0, muon_lr_scale=10 / 3),
        sampling=SamplingConfig(sampler="euler", steps=16, guidance=guidance),
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
    Hours:    0.1 (measured, see EXPERIMENTS.md).
    Dollars:  0.
    Metric:   retrieval top-5 above 80 % over the training captions (measured, see EXPERIMENTS.md).
    """
    data = DataConfig(source="openmoji", max_captions=420, max_tokens=16)
    return _demo("demo", data, nimg=76_800, every=12_800)


def demo_shapes() -> RunConfig:
    """Coloured shapes from captions, judged by an exact reader of pictures: needs no package and no download.

    Paper:    the method of MicroDiT, arXiv 2407.15811.
    Hardware: two CPU cores.
    Hours:    0.14 (measured, see EXPERIMENTS.md).
    Dollars:  0.
    Metric:   above 80 % of single-shape prompts right in shape and colour (measured, see EXPERIMENTS.md).
    """
    data = DataConfig(source="shapes", text_encoder="hashing", max_tokens=24)
    return _demo("demo-shapes", data, 96_000, every=12_800, guidance=3.0, model=small(HASHING_WIDTH))


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
