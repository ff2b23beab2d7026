"""Super-resolution from a pretrained model: the recipe of its fine-tuning, and tiles for large pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from shoestring.adapt.recipe import fine_tuning_logging, fine_tuning_stage
from shoestring.config import RunConfig, SuperResConfig, from_json
from shoestring.models.files import find_model, read_header
from shoestring.runtime import UserError
from shoestring.sampling.generate import Pipeline
from shoestring.tensors import UInt8


def superres_recipe(
    base: Path,
    superres: SuperResConfig,
    name: str,
    nimg: int,
    batch: int,
    lr: float,
) -> RunConfig:
    """The recipe that teaches a pretrained model to enlarge pictures.

    The model gets further input channels for the small picture, whose weights are zero, so that at step 0 it
    is the base. Captions are left out. Everything else is the base's: data, codec, process, optimiser, the
    noise of its last stage.

    Args:
        base: run folder, checkpoint folder or model file.
        superres: factor and degradation.
        name: of the run.
        nimg: images to train on.
        batch: of a step.
        lr: learning rate, warmed up over a twentieth.

    Returns:
        A recipe that ``shoestring train`` can run as well.

    Raises:
        UserError: if the base cannot be read, or enlarges pictures already.
    """
    path = find_model(base)
    header = read_header(path)
    config = header.config
    if config.superres is not None:
        raise UserError(f"{path} enlarges pictures already; go on with shoestring train and initial_weights")
    if config.distill is not None:
        raise UserError(
            f"{path} is distilled ({config.distill.method}) and would lose its few steps; give the model "
            "that it was made from, and distil the result"
        )
    stage = fine_tuning_stage(header, "superres", nimg, batch, lr)
    values = config.model_dump() | {
        "name": name,
        "model": config.model.model_dump() | {"image_channels": config.model.in_channels},
        "superres": superres.model_dump(),
        "dreambooth": None,
        # Nobody gives captions when pictures are enlarged, so none are trained with.
        "data": config.data.model_dump() | {"caption_drop": 1.0},
        "stages": [stage],
        "initial_weights": str(path.resolve()),
        "sampling": config.sampling.model_dump() | {"guidance": 1.0},
        "logging": fine_tuning_logging(config, nimg, batch, 5) | {"prompts": ()},
    }
    return from_json(json.dumps(values), "the recipe of super-resolution")


def upscale(
    pipeline: Pipeline,
    picture: UInt8[Tensor, "3 h w"],
    seed: int,
    overlap: int,
    on_tile: Callable[[int, int], object] = lambda done, total: None,
) -> UInt8[Tensor, "3 H W"]:
    """Enlarge a picture of any size, tile by tile.

    Tiles overlap, and are blended linearly where they do; each has noise of its own.

    Args:
        pipeline: of a super-resolution model.
        picture: at least as large as one small tile.
        seed: of the noise.
        overlap: pixels of the small picture that neighbours share.
        on_tile: called after each tile with the number done and of all.

    Returns:
        The enlarged picture.

    Raises:
        UserError: if the model does not enlarge, or the picture is smaller than a tile.
    """
    superres = pipeline.config.superres
    if superres is None:
        raise UserError(
            f"{pipeline.config.name} draws from words and does not enlarge; make a model that does with "
            "shoestring adapt superres"
        )
    factor, tile = superres.factor, pipeline.resolution // superres.factor
    height, width = picture.shape[1:]
    if min(height, width) < tile:
        raise UserError(
            f"the picture has {width} x {height} pixels; this model enlarges tiles of {tile}, so it needs at "
            "least that"
        )
    if not 0 <= overlap < tile:
        raise UserError(f"--overlap is {overlap}; it must be 0 or more and below the tile's {tile} pixels")
    places = [(top, left) for top in _starts(height, tile, overlap) for left in _starts(width, tile, overlap)]
    total = torch.zeros(3, height * factor, width * factor)
    weights = torch.zeros(height * factor, width * factor)
    window = _window(tile * factor, overlap * factor)
    for number, (top, left) in enumerate(places):
        low = picture[None, :, top : top + tile, left : left + tile]
        drawn = pipeline.draw([""], seed, [number], pipeline.config.sampling, low=low)[0]
        rows = slice(top * factor, (top + tile) * factor)
        columns = slice(left * factor, (left + tile) * factor)
        total[:, rows, columns] += drawn.float() * window
        weights[rows, columns] += window
        on_tile(number + 1, len(places))
    return (total / weights).round().clamp(0, 255).to(torch.uint8)


def _starts(length: int, tile: int, overlap: int) -> Sequence[int]:
    """Where tiles begin: in steps of tile less overlap, the last one at the end."""
    step = tile - overlap
    starts = list(range(0, length - tile, step))
    return [*starts, length - tile]


def _window(side: int, overlap: int) -> Tensor:
    """Weights of a tile: 1, falling linearly over the overlap towards its edges, nowhere 0."""
    places = torch.arange(side, dtype=torch.float32)
    edge = torch.minimum(places + 1, side - places)
    ramp = (edge / (overlap + 1)).clamp(max=1)
    return ramp[:, None] * ramp[None, :]
