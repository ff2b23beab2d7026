"""What happens beside the steps: validation loss and sample grids, shared out among the ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoestring.config import RunConfig, TransformerConfig
from shoestring.data.degradation import enlarged
from shoestring.evaluation.validation import validation_loss
from shoestring.interfaces import ImageCodec, TextEncoder
from shoestring.models.moe import expert_report, expert_statistics
from shoestring.sampling.generate import Pipeline, batches, picture_grid, save_png
from shoestring.tensors import UInt8
from shoestring.training.schedule import Position
from shoestring.training.stage_data import StageData
from shoestring.training.step import Learner, TrainingBatch, batch_loss

GRID_PICTURES = 16
LOAD_SAMPLES = 16
AT_ONCE = 64
"""Pictures of the validation loss."""


def validate(learner: Learner, data: StageData, count: int) -> dict[str, Any]:
    """Loss of the averaged weights on pinned noise; every rank looks at its share of the pictures.

    Args:
        learner: whose average counts.
        data: of the stage.
        count: at most so many pictures.

    Returns:
        The row for the log.
    """
    x0, conditioning, held_out = data.held_out_batch(count)
    ranks, rank = learner.parallel.ranks, learner.parallel.rank
    # Every rank must have a picture: where weights are shared out, all ranks run the network together.
    first, last = rank * len(x0) // ranks, (rank + 1) * len(x0) // ranks
    counted = last > first
    part = slice(first, last) if counted else slice(0, 1)
    at_once = _equal_pieces(len(x0), ranks)
    with learner.averages.applied():
        losses = validation_loss(
            learner.process, learner.denoiser, x0[part], conditioning.part(part), at_once, part.start
        )
    weight = (last - first) if counted else 0
    sums = learner.parallel.total([loss * weight for loss in losses.values()])
    means = {f"{level:g}": total / len(x0) for level, total in zip(losses, sums, strict=True)}
    return {"held_out": held_out, "loss": sum(means.values()) / len(means), "loss_per_level": means}


def _equal_pieces(count: int, ranks: int) -> int:
    """How many pictures to look at together, so that all ranks run the network equally often.

    Shares differ by one picture at most; it must not be a piece of its own.

    Args:
        count: pictures of all ranks.
        ranks: how many share them.

    Returns:
        At most ``AT_ONCE``.
    """
    fewest = count // ranks
    if not fewest or count % ranks == 0:
        return AT_ONCE
    return next(size for size in range(AT_ONCE, 0, -1) if fewest % size)


@torch.no_grad()
def expert_load(learner: Learner, batch: TrainingBatch, here: Position) -> dict[str, float]:
    """How the experts share the patches of a step's first samples on this rank.

    Args:
        learner: whose weights count, not the average.
        batch: of a step.
        here: where in the run: noise levels and mask ratio.

    Returns:
        See :func:`shoestring.models.moe.expert_report`; empty for models without experts.
    """
    model = learner.model.config
    if not isinstance(model, TransformerConfig) or not model.experts.count:
        return {}
    part, stage = next(batch.split(LOAD_SAMPLES)), here.stage
    with expert_statistics(learner.model) as loads:
        ratio = stage.mask_ratio_at(here.done_nimg)
        batch_loss(learner.process, learner.denoiser, part, stage.noise, ratio, learner.tokens)
    return expert_report(loads) if loads else {}


def grid_prompts(config: RunConfig, data: StageData) -> list[str]:
    """Captions of the sample grids: as configured, else from the data, a quarter of them held out."""
    if config.logging.prompts:
        return list(config.logging.prompts)
    if config.model.condition != "text":
        names = data.classes or ("",)
        return [names[i % len(names)] for i in range(GRID_PICTURES)]
    held = list(data.held_out.captions) if data.held_out is not None else []
    held = held[: GRID_PICTURES // 4]
    prompts = list(data.train.captions[: GRID_PICTURES - len(held)]) + held
    return prompts or [""] * GRID_PICTURES  # pictures need have no captions


def pipeline_of(
    learner: Learner,
    config: RunConfig,
    data: StageData,
    codec: ImageCodec,
    text_encoder: TextEncoder | None,
    nimg: int,
) -> Pipeline:
    """A model in training as one that draws.

    Args:
        learner: the model.
        config: of the run.
        data: of the stage.
        codec: latents to pixels.
        text_encoder: of text-conditional models.
        nimg: images seen.

    Returns:
        The pipeline; it draws with whatever weights are applied.
    """
    return Pipeline(
        config,
        learner.denoiser,
        learner.process,
        codec,
        text_encoder,
        learner.parallel.device,
        data.resolution,
        nimg,
        learner.workers,
        data.classes,
        strict=False,
    )


def draw_shared(
    learner: Learner,
    pipeline: Pipeline,
    prompts: Sequence[str],
    seed: int,
    at_once: int,
    low: UInt8[Tensor, "B 3 h w"] | None = None,
) -> UInt8[Tensor, "B 3 H W"]:
    """Draw with the averaged weights; every rank draws its share, and all get all pictures.

    Args:
        learner: whose average draws.
        pipeline: of the learner.
        prompts: one for each picture.
        seed: of the noise.
        at_once: pictures that a rank draws together.
        low: small pictures to enlarge, of super-resolution models.

    Returns:
        The pictures.
    """
    parallel = learner.parallel
    pieces = list(batches(len(prompts), at_once))
    mine: dict[int, Tensor] = {}
    with learner.averages.applied():
        for first in range(0, len(pieces), parallel.ranks):
            place = first + parallel.rank
            # Where weights are shared out, all ranks run the network together: also one without a piece.
            piece = pieces[min(place, len(pieces) - 1)]
            sampling, wanted = pipeline.config.sampling, [prompts[i] for i in piece]
            small = None if low is None else low[list(piece)]
            pictures = pipeline.draw(wanted, seed, piece, sampling, low=small)
            if place < len(pieces):
                mine |= dict(zip(piece, pictures, strict=True))
    placed = {i: picture for part in parallel.gathered(mine) for i, picture in part.items()}
    return torch.stack([placed[i] for i in range(len(prompts))])


def sample_grid(learner: Learner, pipeline: Pipeline, data: StageData, folder: Path) -> Path:
    """Draw a grid with the averaged weights; every rank draws its share.

    Super-resolution models enlarge held-out pictures; above each row stands what bicubic makes of them.

    Args:
        learner: whose average draws.
        pipeline: of the learner.
        data: of the stage.
        folder: of the pictures.

    Returns:
        The picture; written by the first rank.
    """
    config, parallel, nimg = pipeline.config, learner.parallel, pipeline.nimg
    prompts, low = grid_prompts(config, data), None
    if config.superres is not None:
        low = data.small_pictures(GRID_PICTURES)
        prompts = [""] * len(low)
    at_once = math.ceil(len(prompts) / parallel.ranks)
    grid = draw_shared(learner, pipeline, prompts, config.seed, at_once, low)
    if low is not None and config.superres is not None:
        rows = zip(enlarged(low, config.superres.factor).split(8), grid.split(8), strict=True)
        grid = torch.cat([picture for pair in rows for picture in pair])
    path = folder / f"{nimg:09d}.png"
    if parallel.first:
        zoom = max(1, 64 // data.resolution)
        facts = {"nimg": nimg, "prompts": prompts, "seed": config.seed}
        save_png(path, picture_grid(grid, columns=8, zoom=zoom), facts)
    return path
