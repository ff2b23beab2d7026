"""MaskDiT (Fast Training of Diffusion Models with Masked Transformers, arXiv 2306.09305), and DiT."""

from __future__ import annotations

from typing import Literal

from shoestring.config import (
    DataConfig,
    DecoderConfig,
    ExpertsConfig,
    LoggingConfig,
    MixerConfig,
    NoiseConfig,
    OptimizerConfig,
    ProcessConfig,
    RunConfig,
    SamplingConfig,
    StageConfig,
    TokensConfig,
    TransformerConfig,
)
from shoestring.recipes.microdit import EIGHT_H100_USD

Size = Literal["S", "B", "L", "XL", "H"]
SIZES: dict[Size, tuple[int, int, int]] = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
    "H": (1280, 32, 16),
}
"""Width, blocks, heads."""

BATCH, TUNING_BATCH = 1024, 512
"""Images per optimiser step of the XL/2 runs: with mask, and in the tuning without."""
B_BATCH = 256

MASKDIT = TokensConfig(method="maskdit", reconstruction=0.1, reconstruction_target="noisy")
DENSE = TokensConfig(method="dense")


def maskdit(size: Size, patch_size: Literal[2, 4, 8] = 2, classes: int = 1000) -> TransformerConfig:
    """A released size: with patch 2 S has 68,116,880 parameters, B 175,581,968, L 509,783,056,
    XL 730,115,216 and H 1,009,543,440.

    Args:
        size: of the encoder; the decoder always has 8 blocks of width 512.
        patch_size: side of a patch in latents.
        classes: how many.

    Returns:
        The network.

    Source: arXiv 2306.09305; Anima-Lab/MaskDiT, ``models/maskdit.py``.
    """
    dim, depth, heads = SIZES[size]
    return TransformerConfig(
        kind="maskdit",
        condition="class",
        classes=classes,
        patch_size=patch_size,
        dim=dim,
        depth=depth,
        head_dim=dim // heads,
        qkv_multipliers=(1.0,),
        ffn_multipliers=(4.0,),
        ffn_multiple_of=1,
        mixer=MixerConfig(depth=0),
        decoder=DecoderConfig(depth=8, dim=512, head_dim=32),
        experts=ExpertsConfig(count=0),
        bias=True,
        qk_norm=False,
    )


def dit(size: Size, patch_size: Literal[2, 4, 8] = 2, classes: int = 1000) -> TransformerConfig:
    """The same without decoder, which is DiT (without its learned variance): XL/2 has 674,815,120 parameters.

    Args:
        size: see :func:`maskdit`.
        patch_size: side of a patch in latents.
        classes: how many.

    Returns:
        The network, for ``tokens.method=dense``.

    Source: DiT, arXiv 2212.09748.
    """
    return maskdit(size, patch_size, classes).model_copy(update={"decoder": DecoderConfig(depth=0)})


def _stage(
    name: str, steps: int, batch: int, micro_batch: int, mask: float, lr: float, resolution: int = 256
) -> StageConfig:
    return StageConfig(
        name=name,
        nimg=steps * batch,
        batch=batch,
        micro_batch=micro_batch,
        resolution=resolution,
        position_scale=1.0,  # the position table is never stretched
        mask_ratio=mask,
        lr=lr,
        lr_schedule="constant",
        clip_norm=None,
        noise=NoiseConfig(mean=-1.2, std=1.2),
        ema_decay=0.9999,
        ema_rampup=None,
    )


def _tuned(stage: StageConfig) -> StageConfig:
    """The stage with a fresh optimiser."""
    return stage.model_copy(update={"keep_optimizer": False})


def _run(
    name: str,
    model: TransformerConfig,
    tokens: TokensConfig,
    stages: tuple[StageConfig, ...],
    usd_per_hour: float,
    guidance: float = 1.5,
) -> RunConfig:
    """What all runs share: process, optimiser, sampler, and pictures as latents of Stable Diffusion 1."""
    batch = stages[0].batch
    condition = model.condition
    return RunConfig(
        name=name,
        precision="bf16",
        compile=True,
        model=model,
        tokens=tokens,
        process=ProcessConfig(kind="edm", sigma_data=0.5),
        data=DataConfig(
            source="folder",
            held_out=0.001,
            split="captions" if condition == "text" else "pictures",
            text_encoder="clip",
            text_encoder_path="apple/DFN5B-CLIP-ViT-H-14-378" if condition == "text" else None,
            max_tokens=77,
            codec="autoencoder-kl",
            codec_path="stabilityai/sd-vae-ft-ema",
            flip=False,
            caption_drop=0.0 if condition == "none" else 0.1,
        ),
        stages=stages,
        optimizer=OptimizerConfig(kind="adamw", beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0),
        sampling=SamplingConfig(sampler="heun", steps=40, guidance=guidance),
        logging=LoggingConfig(
            log_nimg=50 * batch,
            validate_nimg=5_000 * batch,
            validation_images=2048,
            sample_nimg=5_000 * batch,
            checkpoint_nimg=2_500 * batch,
            usd_per_hour=usd_per_hour,
        ),
    )


def maskdit_xl2_256() -> RunConfig:
    """MaskDiT XL/2, 730 M parameters, ImageNet at 256 pixels: half of the patches, then tuned on all.

    Paper:    Fast Training of Diffusion Models with Masked Transformers, arXiv 2306.09305 (published);
              settings from the released configurations.
    Hardware: 8 x A100 (published).
    Hours:    260 for the first stage (published: the project's README, 2 M steps of 1024 images), and 12
              for the tuning (predicted: 755 GFLOP an image at the 107 TFLOP/s a GPU of the first).
    Dollars:  3,270 (predicted: 8 H100 at 30 an hour are 2.5 times as fast, both as in MicroDiT's account).
    Metric:   FID-50K on ImageNet 256: 5.69 without guidance and without the tuning, 2.28 with guidance 1.5
              and tuned (published; ADM's evaluator). How long the released weights were tuned
              is not known; 100,000 steps are the most that the released configuration allows.
    Data:     ImageNet's 1.28 M training pictures, each with the name of its class as caption (published).
              Name your own with data.path=FOLDER. They are held in memory, 197 kB a picture.

    The tuning has mask 0 throughout, one of the two published schedules. The other, from 0.5 to 0 along
    cos^4: stages.1.mask_ratio=0.5 stages.1.mask_ratio_end=0 stages.1.mask_schedule=cosine.

    Deviations. (1) bfloat16 in place of float16 with loss scaling; the released tuning runs without mixed
    precision, in TF32: here a run has one precision. (2) Pictures are shuffled, and every image has noise and
    mask of its own: the released trainer does not shuffle, and all its GPUs draw the same numbers.
    (3) Moments of the latents are kept in half precision. (4) Which of Stable Diffusion's autoencoders was
    used is not known; they share the encoder. The reconstruction term is the released one
    (tokens.reconstruction_target=clean is the other).
    micro_batch is what one of the published GPUs held.
    """
    stages = (
        _stage("pretrain-256", 2_000_000, BATCH, 128, 0.5, 1e-4),
        _tuned(_stage("unmask-256", 100_000, TUNING_BATCH, 64, 0.0, 5e-5)),
    )
    return _run("maskdit-xl2-256", maskdit("XL"), MASKDIT, stages, EIGHT_H100_USD)


def maskdit_xl2_512() -> RunConfig:
    """MaskDiT XL/2, 730 M parameters, ImageNet at 512 pixels: half of the patches, then tuned on all.

    Paper:    Fast Training of Diffusion Models with Masked Transformers, arXiv 2306.09305 (published);
              settings from the released configurations, steps of the released checkpoints.
    Hardware: 32 GPUs of 32 images each (published).
    Hours:    5,292 A100-hours for the first stage (published: the project's README, 210 A100-days for 1 M
              steps), and 151 for the tuning (predicted: 3,357 GFLOP an image at the 95 TFLOP/s a GPU of the
              first): 170 on 32.
    Dollars:  8,160 (predicted: an H100-hour at 3.75 does the work of 2.5 A100-hours, both as in MicroDiT's
              account).
    Metric:   FID-50K on ImageNet 512: 10.79 without guidance, 2.50 with guidance 1.5 and tuned (published).
    Data:     ImageNet, as in maskdit-xl2-256; 786 kB a picture.

    The released weights are those after 1.05 M steps with mask 0.5, of 2 M configured, and 30,000 steps with
    mask 0, of 50,000 configured. Deviations as in maskdit-xl2-256.
    """
    stages = (
        _stage("pretrain-512", 1_050_000, BATCH, 32, 0.5, 1e-4, resolution=512),
        _tuned(_stage("unmask-512", 30_000, TUNING_BATCH, 16, 0.0, 5e-5, resolution=512)),
    )
    return _run("maskdit-xl2-512", maskdit("XL"), MASKDIT, stages, 4 * EIGHT_H100_USD)


def dit_xl2_256() -> RunConfig:
    """DiT XL/2, 675 M parameters, ImageNet at 256 pixels: the dense side of maskdit-xl2-256.

    Paper:    DiT, arXiv 2212.09748, for the network. Process, batch, rate and steps are those of
              maskdit-xl2-256, so that the two differ in the mask and the decoder alone: it is not the
              published run of DiT, which had a DDPM objective with learned variance.
    Hardware: 8 x A100 (predicted).
    Hours:    471 (predicted: 712 GFLOP an image at the 107 TFLOP/s a GPU that MaskDiT reached). The official
              DiT, without mixed precision, makes 0.61 steps of 1024 images a second on 8 GPUs (published,
              read off a chart of MaskDiT's project page): 911 hours.
    Dollars:  5,650 (predicted: 8 H100 at 30 an hour are 2.5 times as fast, both as in MicroDiT's account).
    Metric:   none known for this run. The published DiT XL/2: FID-50K 9.62 without guidance, 2.27 with 1.5
              (published, as MaskDiT and others quote it).
    Data:     ImageNet, as in maskdit-xl2-256.
    """
    stages = (_stage("pretrain-256", 2_000_000, BATCH, 128, 0.0, 1e-4),)
    return _run("dit-xl2-256", dit("XL"), DENSE, stages, EIGHT_H100_USD)


def maskdit_b2_text() -> RunConfig:
    """MaskDiT B/2 for captions, 213 M parameters, 256 pixels: class table out, cross-attention in.

    Paper:    none for this run. MaskDiT (arXiv 2306.09305) knows classes only; caption block and
              cross-attention are those of MicroDiT (arXiv 2407.15811), in the encoder alone.
    Hardware: one H100 (predicted).
    Hours:    12 (predicted: 132 and 215 GFLOP an image, masked and not, 51 M and 5 M images, at 19 % of 989
              TFLOP/s, the share that MicroDiT XL/2 reached in its published run).
    Dollars:  44 at 3.75 for an H100-hour (predicted).
    Metric:   none known.
    Data:     your own captioned pictures, data.path=FOLDER.

    The gradient is clipped at 1: a user who gave MaskDiT cross-attention reported NaN after some 70 epochs
    in float16 without clipping.
    """
    model = maskdit("B").model_copy(update={"condition": "text", "caption_dim": 1024})
    stages = tuple(stage.model_copy(update={"clip_norm": 1.0}) for stage in _b2_stages())
    return _run("maskdit-b2-text", model, MASKDIT, stages, EIGHT_H100_USD / 8, guidance=3.0)


def maskdit_b2_unconditional() -> RunConfig:
    """MaskDiT B/2 without any condition, 175 M parameters, 256 pixels.

    Paper:    none for this run. A released recipe is missing; a user who trained with one class instead of
              none got a worse FID than with DiT.
    Hardware: one H100 (predicted).
    Hours:    10 (predicted: 110 and 181 GFLOP an image, masked and not, 51 M and 5 M images, at 19 % of 989
              TFLOP/s, the share that MicroDiT XL/2 reached in its published run).
    Dollars:  36 at 3.75 for an H100-hour (predicted).
    Metric:   none known.
    Data:     your own pictures, data.path=FOLDER; their captions may say anything.

    Guidance is off, as there is no condition to leave out; sampling.weak=tokens guides away from a
    prediction that sees fewer patches.
    """
    model = maskdit("B").model_copy(update={"condition": "none"})
    name, price = "maskdit-b2-unconditional", EIGHT_H100_USD / 8
    return _run(name, model, MASKDIT, _b2_stages(), price, guidance=1.0)


def _b2_stages() -> tuple[StageConfig, ...]:
    """200,000 steps on half of the patches, 20,000 on all."""
    return (
        _stage("pretrain-256", 200_000, B_BATCH, 256, 0.5, 1e-4),
        _tuned(_stage("unmask-256", 20_000, B_BATCH, 128, 0.0, 5e-5)),
    )
