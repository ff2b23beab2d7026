"""What happens beside the steps: the validation loss and the sample grids, shared out among the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shoestring.config import RunConfig
from shoestring.evaluation.validation import validation_loss
from shoestring.interfaces import ImageCodec, TextEncoder
from shoestring.models.moe import expert_report, expert_statistics
from shoestring.sampling.generate import Pipeline, picture_grid, save_png
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
    if not learner.model.config.experts.count:
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


def sample_grid(
    learner: Learner,
    config: RunConfig,
    data: StageData,
    codec: ImageCodec,
    text_encoder: TextEncoder | None,
    nimg: int,
    folder: Path,
) -> Path:
    """Draw a grid with the averaged weights; every rank draws its share.

    Args:
        learner: whose average draws.
        config: of the run.
        data: of the stage.
        codec: latents to pixels.
        text_encoder: of text-conditional models.
        nimg: images seen.
        folder: of the pictures.

    Returns:
        The picture; written by the first rank.
    """
    pipeline = Pipeline(
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
    )
    prompts, parallel = grid_prompts(config, data), learner.parallel
    mine = list(range(parallel.rank, len(prompts), parallel.ranks))
    drawn = mine or [0]  # where weights are shared out, all ranks run the network together
    with learner.averages.applied():
        pictures = pipeline.draw([prompts[i] for i in drawn], config.seed, drawn, config.sampling)
    everybody = parallel.gathered(dict(zip(mine, pictures, strict=False)))
    path = folder / f"{nimg:09d}.png"
    if parallel.first:
        placed = {i: picture for part in everybody for i, picture in part.items()}
        grid = torch.stack([placed[i] for i in range(len(prompts))])
        zoom = max(1, 64 // data.resolution)
        facts = {"nimg": nimg, "prompts": prompts, "seed": config.seed}
        save_png(path, picture_grid(grid, columns=8, zoom=zoom), facts)
    return path
