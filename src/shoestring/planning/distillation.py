"""What a distillation costs beside the student's own passes."""

from __future__ import annotations

from pathlib import Path

import torch

from shoestring.config import DistillConfig, RunConfig
from shoestring.models.files import find_model, new_network, read_header
from shoestring.planning.flops import model_flops
from shoestring.runtime import UserError


def passes(distill: DistillConfig, takes_scale: bool) -> tuple[int, int]:
    """Forward passes of a step and image beside the student's own.

    Args:
        distill: settings.
        takes_scale: whether the teacher takes the scale of guidance as an input, so that one pass is guided.

    Returns:
        Those of the teacher, and those of networks like the student (its target).
    """
    each = 1 if takes_scale or distill.guidance == (1.0, 1.0) else 2
    if distill.method == "consistency":
        return each * (2 if distill.solver == "heun" else 1), 1
    if distill.method == "codi":
        return 0, 1
    return each * (2 if distill.method == "progressive" else 1), 0


def distillation_flops(
    config: RunConfig, grid: tuple[int, int], caption_tokens: int, mask_ratio: float, own: float
) -> float:
    """FLOPs of an image's passes beside the student's own; 0 without distillation.

    Args:
        config: of the student's run; a teacher that is not there counts as large as the student.
        grid: rows and columns of patches.
        caption_tokens: caption length.
        mask_ratio: share of patches dropped.
        own: forward FLOPs of the student.

    Returns:
        FLOPs.
    """
    if config.distill is None:
        return 0.0
    theirs = _teacher(config)
    teacher, target = passes(config.distill, theirs.model.guidance_input)
    flops = model_flops(theirs.model, grid, caption_tokens, mask_ratio, theirs.tokens)
    return teacher * flops.forward + target * own


def teacher_parameters(config: RunConfig) -> int:
    """Parameters of the teacher; 0 without one."""
    if config.distill is None or config.distill.method == "codi":
        return 0
    theirs = _teacher(config)
    with torch.device("meta"):
        network = new_network(theirs.model, theirs.tokens)
    return sum(parameter.numel() for parameter in network.parameters())


def _teacher(config: RunConfig) -> RunConfig:
    """Its settings; where it is gone, as of a finished run it may be, those of the student stand for them."""
    assert config.distill is not None
    try:
        return read_header(find_model(Path(config.distill.teacher))).config
    except UserError:
        return config
