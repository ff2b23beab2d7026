"""Learning rate, EMA decay and stage as functions of images seen: nothing else is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shoestring.config import RunConfig, StageConfig


@dataclass(frozen=True)
class Position:
    """Where in the run we are."""

    index: int
    stage: StageConfig
    start_nimg: int
    """Images seen when the stage began."""
    done_nimg: int
    """Images seen within the stage."""
    averaged_nimg: int
    """Images of earlier stages over which the weight average already ran without a break."""


def position(config: RunConfig, nimg: int) -> Position | None:
    """The stage after ``nimg`` images, or ``None`` when all are done."""
    start = averaged = 0
    for index, stage in enumerate(config.stages):
        length = stage.steps * stage.batch
        if stage.ema_decay is None or stage.ema_start_nimg > 0:
            averaged = -stage.ema_start_nimg
        if nimg < start + length:
            return Position(index, stage, start, nimg - start, averaged)
        start += length
        averaged = 0 if stage.ema_decay is None else averaged + length
    return None


def learning_rate(stage: StageConfig, done_nimg: int) -> float:
    """Linear warm-up, then constant, linear or cosine to ``lr_end_ratio`` of the peak at the stage's end.

    wsd (warm-up, stable, decay): constant, and over the last ``lr_decay_share`` of the stage linear. The step
    that sees images ``done_nimg`` to ``done_nimg + batch`` is scheduled by its last image, so that the first
    step of a warm-up does something.

    Args:
        stage: where we are.
        done_nimg: images of the stage seen before the step.

    Returns:
        The rate of AdamW.

    Source: wsd: Hu et al., arXiv 2404.06395, section 4; linear decay: arXiv 2405.18392.
    """
    seen = done_nimg + stage.batch
    if seen < stage.warmup_nimg:
        return stage.lr * seen / stage.warmup_nimg
    total = stage.steps * stage.batch
    if stage.lr_schedule == "constant":
        return stage.lr
    falls_from = (1 - stage.lr_decay_share) * total if stage.lr_schedule == "wsd" else stage.warmup_nimg
    progress = min(1.0, max(0.0, seen - falls_from) / max(1, total - falls_from))
    fall = (1 - math.cos(math.pi * progress)) / 2 if stage.lr_schedule == "cosine" else progress
    return stage.lr * (1 - (1 - stage.lr_end_ratio) * fall)


def ema_decay(here: Position) -> float:
    """Decay of the weight average for the next step.

    Zero before the start (the average is a copy of the weights). With a ramp the half-life is at most
    ``ema_rampup`` times the images seen since the start, so that early weights are soon forgotten.

    Source: EDM, arXiv 2206.00364, training details (half-life in images, ramp-up ratio).
    """
    stage = here.stage
    since = here.averaged_nimg + here.done_nimg + stage.batch
    if stage.ema_decay is None or since <= 0:
        return 0.0
    if stage.ema_rampup is None:
        return stage.ema_decay
    return min(stage.ema_decay, 0.5 ** (stage.batch / (stage.ema_rampup * since)))
