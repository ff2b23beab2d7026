"""What a stage trains on: encoded pictures and conditions at one resolution, and the batches made of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from shoestring.config import RunConfig, StageConfig
from shoestring.data.loader import Batch, PreparedData, prepare
from shoestring.data.sources import Splits, load
from shoestring.interfaces import Conditioning, ImageCodec, TextEncoder
from shoestring.models.routing import build_method, method_class
from shoestring.planning import patch_grid
from shoestring.runtime import UserError, say, write_text
from shoestring.sampling.guidance import check_guidance
from shoestring.training.folder import remember
from shoestring.training.step import Draws, TrainingBatch


@dataclass(frozen=True)
class StageData:
    """Encoded data at one resolution."""

    config: RunConfig
    train: PreparedData
    held_out: PreparedData | None
    classes: tuple[str, ...]
    """Names of the classes by number, for class-conditional models."""
    resolution: int
    device: torch.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents."""
        codec = self.train.codec
        side = self.resolution // codec.downsampling
        return codec.channels, side, side

    def batch(self, stage: StageConfig, nimg: int) -> TrainingBatch:
        """The batch of a stage after ``nimg`` images of the run, with all its random numbers."""
        config, device = self.config, self.device
        rows = self.train.batch(config.seed, nimg, stage.batch)
        shape = self.latent_shape
        patches = shape[1] * shape[2] // config.model.patch_size**2
        draws = Draws.make(config.seed, "train", nimg, stage.batch, shape, patches)
        dropped_B = (draws.drop_B < config.data.caption_drop).to(device)
        path_dropped_B = None
        if method_class(config.tokens).drops_paths:
            path_dropped_B = (draws.path_B < config.tokens.path_drop).to(device)
        return TrainingBatch(
            x0=self.train.codec.latents(rows.moments_BMhw, draws.posterior).to(device),
            conditioning=self.conditioning(self.train, rows).drop(dropped_B),
            noise=draws.noise.to(device),
            level_B=draws.level_B.to(device),
            mask_BL=draws.mask_BL.to(device),
            path_dropped_B=path_dropped_B,
        )

    def conditioning(self, data: PreparedData, rows: Batch) -> Conditioning:
        """The condition of some rows on the device, captions cut to the longest where padding is unseen.

        Args:
            data: that the rows are of, training or held out.
            rows: as :meth:`PreparedData.rows` gives them.

        Returns:
            One condition a row.
        """
        if self.config.model.condition == "none":
            return Conditioning.nothing(len(rows.caption_B), self.device)
        if self.config.model.condition == "class":
            number_U = torch.tensor([self.classes.index(name) for name in data.captions])
            return Conditioning(class_B=number_U[rows.caption_B].to(self.device))
        text_BSD, mask_BS = rows.text_BSD, rows.text_mask_BS
        assert text_BSD is not None
        assert mask_BS is not None
        if self.config.model.mask_captions and not self.config.compile:  # compiled once for each length
            longest = int(mask_BS.sum(1).max())
            text_BSD, mask_BS = text_BSD[:, :longest], mask_BS[:, :longest]
        return Conditioning(text_BSD.to(self.device), mask_BS.to(self.device))


def check_settings(config: RunConfig, codec: ImageCodec, text_encoder: TextEncoder | None) -> None:
    """What only shows when model, data and stages are seen together.

    Args:
        config: of the run.
        codec: pixels to latents.
        text_encoder: of text-conditional models.

    Raises:
        UserError: naming the setting that does not fit.
    """
    model, data = config.model, config.data
    if model.in_channels != codec.channels:
        raise UserError(
            f"model.in_channels is {model.in_channels}, but data.codec={data.codec} gives "
            f"{codec.channels} channels; set model.in_channels={codec.channels}"
        )
    if text_encoder is not None and model.caption_dim != text_encoder.width:
        raise UserError(
            f"model.caption_dim is {model.caption_dim}, but data.text_encoder={data.text_encoder} gives "
            f"{text_encoder.width}; set model.caption_dim={text_encoder.width}"
        )
    for stage in config.stages:
        patch_grid(config, stage, codec.downsampling)
    with torch.device("meta"):
        method = build_method(model, config.tokens)
    check_guidance(config.sampling, method.predicts_all)


def load_stage(
    config: RunConfig,
    stage: StageConfig,
    codec: ImageCodec,
    text_encoder: TextEncoder | None,
    device: torch.device,
    folder: Path,
    console: Console,
) -> StageData:
    """Read and encode the pictures of a stage.

    Args:
        config: of the run.
        stage: its resolution counts.
        codec: pixels to latents.
        text_encoder: captions to embeddings; ``None`` where captions are not read.
        device: where batches go.
        folder: run folder, in which rejected pictures are listed.
        console: where a person reads.

    Returns:
        The data.

    Raises:
        UserError: if the pictures are not those that the run began with, or do not fit the model's classes.
    """
    data = config.data
    with console.status(f"Preparing {data.source} pictures at {stage.resolution} px"):
        splits: Splits = load(data, stage.resolution)
        train = prepare(splits.train, codec, text_encoder, flip=data.flip)
        some = splits.held_out.select(range(min(len(splits.held_out), config.logging.validation_images)))
        held_out = prepare(some, codec, text_encoder) if len(some) else None
    rejected = splits.train.rejected
    _check_same_data(config, splits, folder)
    say(
        console,
        f"{data.source}: {len(train):,} pictures with {len(train.captions):,} captions to train on, "
        f"{len(splits.held_out):,} held out, {len(rejected):,} left out"
        + (f" (listed in {folder / 'rejected.txt'})" if rejected else ""),
    )
    if rejected:
        write_text(folder / "rejected.txt", "".join(f"{r.item}\t{r.reason}\n" for r in rejected))
    classes = _class_names(config, train, held_out)
    return StageData(config, train, held_out, classes, stage.resolution, device)


def _class_names(config: RunConfig, train: PreparedData, held_out: PreparedData | None) -> tuple[str, ...]:
    """Names of the classes by number: the training captions in alphabetical order."""
    if config.model.condition != "class":
        return ()
    names, count = tuple(sorted(train.captions)), config.model.classes
    if len(names) > count:
        raise UserError(
            f"model.classes is {count}, but the data have {len(names)} different captions, each a class; "
            f"set model.classes={len(names)}"
        )
    foreign = sorted(set(held_out.captions if held_out is not None else ()) - set(names))
    if foreign:
        raise UserError(
            f"data.split is {config.data.split}, which keeps the class {foreign[0]!r} out of "
            "training; with model.condition=class set data.split=pictures"
        )
    return names


def _check_same_data(config: RunConfig, splits: Splits, folder: Path) -> None:
    """Refuse to go on with other pictures: order, split and sigma_data would change in the middle."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (splits.train, splits.held_out):
        digest.update(json.dumps(part.captions).encode())
        digest.update(part.images.contiguous().numpy().tobytes())
    key = f"data_digest_{splits.train.images.shape[-1]}"
    if remember(folder / "machine.json", key, digest.hexdigest) != digest.hexdigest():
        raise UserError(
            f"the pictures or captions of data.source={config.data.source} are not those that the "
            f"run in {folder} began with; put them back, or train anew in another folder (--out)"
        )
