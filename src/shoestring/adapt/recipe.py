"""What the recipes of all adaptations share."""

from __future__ import annotations

from typing import Any

from shoestring.config import RunConfig
from shoestring.models.files import Header


def fine_tuning_stage(header: Header, name: str, nimg: int, batch: int, lr: float) -> dict[str, Any]:
    """The one stage of an adaptation: the base's last at its own resolution, dense, with a falling rate.

    Args:
        header: of the base.
        name: of the stage.
        nimg: images to train on.
        batch: of a step.
        lr: learning rate, warmed up over a twentieth, then falling to a tenth.

    Returns:
        Values of a ``StageConfig``.
    """
    stages, side = header.config.stages, header.facts.resolution
    last = next((stage for stage in reversed(stages) if stage.resolution == side), stages[-1])
    return last.model_dump() | {
        "name": name,
        "nimg": nimg,
        "batch": batch,
        "micro_batch": None,
        "mask_ratio": 0.0,
        "mask_ratio_end": None,
        "lr": lr,
        "warmup_nimg": nimg // 20,
        "lr_schedule": "linear",
        "lr_end_ratio": 0.1,
        "ema_decay": last.ema_decay if last.ema_decay is not None else 0.999,
        "ema_start_nimg": 0,
        "ema_rampup": 0.1,  # else a slow average of a short run is mostly the base
    }


def fine_tuning_logging(config: RunConfig, nimg: int, batch: int, times: int) -> dict[str, Any]:
    """What is written down on the way.

    Args:
        config: of the base.
        nimg: images to train on.
        batch: of a step.
        times: how often is validated, sampled and saved.

    Returns:
        Values of a ``LoggingConfig``.
    """
    every = max(batch, nimg // times)
    return config.logging.model_dump() | {
        "kid_nimg": None,
        "log_nimg": max(batch, nimg // 50),
        "validate_nimg": every,
        "sample_nimg": every,
        "checkpoint_nimg": every,
    }
