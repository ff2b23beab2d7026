"""What a stage trains on: encoded pictures and conditions at one resolution, and the batches made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from shoestring.config import RunConfig, StageConfig, StoreConfig, TransformerConfig
from shoestring.data.loader import Batch, TrainingData, prepare
from shoestring.data.sources import Splits, load
from shoestring.interfaces import Conditioning, ImageCodec, TextEncoder
from shoestring.models.routing import build_method, method_class
from shoestring.planning import distillation_flops, model_flops, patch_grid
from shoestring.runtime import UserError, say
from shoestring.sampling.guidance import check_guidance
from shoestring.sampling.lowres import made_small, training_image
from shoestring.training.checks import non_finite_records, source_of
from shoestring.training.folder import remember
from shoestring.training.step import Draws, TrainingBatch
from shoestring.training.step_shapes import padded_length
from shoestring.training.stores import open_stores, own_store, same_data

STORED = ("store", "folder")
"""Sources that training reads from a store."""
SHOWN = 4096
SHIFT_BATCHES = 10_007
"""A run that diverged and went back continues so many batches further on in the data order."""


@dataclass(frozen=True)
class StageData:
    """Encoded data of a stage, and of others that train on the same."""

    config: RunConfig
    stage: StageConfig
    """The one that it was made for."""
    train: TrainingData
    held_out: TrainingData | None
    classes: tuple[str, ...]
    """Names of the classes by number, for class-conditional models."""
    device: torch.device

    def serves(self, stage: StageConfig) -> bool:
        """Whether these are the data of a stage."""
        return same_data(self.stage, stage)

    @property
    def resolution(self) -> int:
        """Side of the pictures in pixels."""
        return self.stage.resolution

    @property
    def source(self) -> str:
        """Where the pictures come from, for a sentence."""
        own = {"stores": self.stage.stores} if self.stage.stores else {}
        return source_of(self.config.data.model_copy(update=own))

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of patches of each shape of pictures."""
        multiple = self.train.codec.downsampling * self.config.model.patch_size
        return tuple((height // multiple, width // multiple) for height, width in self.train.buckets)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents."""
        codec = self.train.codec
        side = self.resolution // codec.downsampling
        return codec.channels, side, side

    def batch(
        self, stage: StageConfig, first_nimg: int, nimg: int, shift: int = 0, rank: int = 0, ranks: int = 1
    ) -> TrainingBatch:
        """A batch of a stage, or the share of one rank, with all its random numbers.

        Args:
            stage: which.
            first_nimg: images of the run before the stage.
            nimg: images of the run before this batch.
            shift: how often the run went back because it diverged: other pictures and numbers follow.
            rank: whose share.
            ranks: how many share.

        Returns:
            The batch, on the device. The shares of all ranks, one after another, are the batch.
        """
        config = self.config
        place = nimg + shift * SHIFT_BATCHES * stage.batch
        rows = self.train.batch(first_nimg, place, stage.batch, rank, ranks)
        shape = (self.train.codec.channels, *rows.moments_BMhw.shape[2:])
        patches = shape[1] * shape[2] // config.model.patch_size**2
        first = place + rank * stage.batch // ranks
        draws = Draws.make(config.seed, "train", first, len(rows), shape, patches)
        dropped_B = self._send(draws.drop_B < config.data.caption_drop)
        path_dropped_B = None
        if method_class(config.tokens).drops_paths:
            path_dropped_B = self._send(draws.path_B < config.tokens.path_drop)
        numbers = range(first, first + len(rows))
        conditioning = self._with_image(self.conditioning(rows), rows, self.train.codec, numbers)
        return TrainingBatch(
            x0=self._send(self.train.codec.latents(rows.moments_BMhw, draws.posterior)),
            conditioning=conditioning.drop(dropped_B),
            noise=self._send(draws.noise),
            level_B=self._send(draws.level_B),
            mask_BL=self._send(draws.mask_BL),
            path_dropped_B=path_dropped_B,
            guidance_B=None if config.distill is None else self._send(draws.guidance_B),
        )

    def broken(
        self, stage: StageConfig, first_nimg: int, nimg: int, shift: int = 0, rank: int = 0, ranks: int = 1
    ) -> list[str]:
        """The records of a batch whose latents or captions are not finite, read again; see :meth:`batch`."""
        batch = self.batch(stage, first_nimg, nimg, shift, rank, ranks)
        place, first = nimg + shift * SHIFT_BATCHES * stage.batch, rank * stage.batch // ranks
        return non_finite_records(
            batch, lambda row: self.train.name(first_nimg, place, stage.batch, first + row)
        )

    def flops(self, mask_ratio: float) -> float:
        """Training FLOPs of an image at a mask ratio, captions as long as the longest."""
        shape, model = self.latent_shape, self.config.model
        grid = (shape[1] // model.patch_size, shape[2] // model.patch_size)
        captions = self.config.data.max_tokens
        if model.mask_captions:
            captions = self.train.longest_caption or captions
        flops = model_flops(model, grid, captions, mask_ratio, self.config.tokens)
        beside = distillation_flops(self.config, grid, captions, mask_ratio, flops.forward)
        return flops.training + beside

    def close(self) -> None:
        """Stop whatever works ahead."""
        self.train.close()

    def held_out_batch(self, count: int) -> tuple[Tensor, Conditioning, bool]:
        """Some pictures for validation.

        Args:
            count: at most so many.

        Returns:
            Latents (the means of their posteriors) and conditions on the device, and whether the pictures
            are held out; if nothing is, they are training pictures.
        """
        data = self.held_out if self.held_out is not None else self.train
        rows = data.some(count)
        shape = (len(rows), data.codec.channels, *rows.moments_BMhw.shape[2:])
        x0 = data.codec.latents(rows.moments_BMhw, torch.zeros(shape))
        conditioning = self._with_image(self.conditioning(rows), rows, data.codec, range(len(rows)))
        return x0.to(self.device), conditioning, self.held_out is not None

    def _with_image(
        self, conditioning: Conditioning, rows: Batch, codec: ImageCodec, numbers: Sequence[int]
    ) -> Conditioning:
        """With small pictures made of the rows' own, for super-resolution."""
        superres = self.config.superres
        if superres is None:
            return conditioning
        shape = (len(rows), codec.channels, *rows.moments_BMhw.shape[2:])
        x0 = codec.latents(rows.moments_BMhw, torch.zeros(shape))
        image = training_image(x0, codec, superres, self.config.seed, numbers)
        return replace(conditioning, image=self._send(image))

    def small_pictures(self, count: int) -> Tensor:
        """Held-out pictures (training ones where nothing is held out) made small, to draw from.

        Args:
            count: at most so many.

        Returns:
            uint8 ``B 3 h w``.
        """
        assert self.config.superres is not None
        data = self.held_out if self.held_out is not None else self.train
        rows = data.some(count)
        shape = (len(rows), data.codec.channels, *rows.moments_BMhw.shape[2:])
        pictures = data.codec.decode(data.codec.latents(rows.moments_BMhw, torch.zeros(shape))).cpu()
        return made_small(pictures, self.config.superres, 0, range(len(rows)))

    def conditioning(self, rows: Batch) -> Conditioning:
        """The condition of some rows on the device, captions cut to the longest where padding is unseen.

        Args:
            rows: of the training or the held-out data.

        Returns:
            One condition a row.
        """
        model = self.config.model
        if model.condition == "none":
            return Conditioning.nothing(len(rows), self.device)
        if model.condition == "class":
            assert rows.class_B is not None
            return Conditioning(class_B=self._send(rows.class_B))
        text_BSD, mask_BS = rows.text_BSD, rows.text_mask_BS
        assert text_BSD is not None
        assert mask_BS is not None
        length, most = mask_BS.shape[1], self.config.data.max_tokens
        if model.mask_captions:
            length = max(1, int(mask_BS.sum(1).max()))
        if self.config.compile:  # few lengths, as each is compiled by itself
            length = padded_length(length, most) if model.mask_captions else most
        missing = max(0, length - mask_BS.shape[1])
        text_BSD = torch.nn.functional.pad(text_BSD[:, :length], (0, 0, 0, missing))
        mask_BS = torch.nn.functional.pad(mask_BS[:, :length], (0, missing))
        return Conditioning(self._send(text_BSD), self._send(mask_BS))

    def _send(self, tensor: Tensor) -> Tensor:
        """To the device; to a GPU through pinned memory, so that the copy runs beside the computation."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


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
        if stage.stores and data.source != "store":
            raise UserError(
                f"stages.{stage.name}.stores is set, but data.source is {data.source}; set it to store, or "
                "leave them out"
            )
        if stage.min_side is not None and data.source not in STORED:
            raise UserError(
                f"stages.{stage.name}.min_side is {stage.min_side}, but the pictures of data.source="
                f"{data.source} have no originals of other sizes; set it to null"
            )
    predicts_all = False
    if isinstance(model, TransformerConfig):
        with torch.device("meta"):
            predicts_all = build_method(model, config.tokens).predicts_all
    check_guidance(config.sampling, predicts_all)


def load_stage(
    config: RunConfig,
    stage: StageConfig,
    codec: ImageCodec,
    text_encoder: TextEncoder | None,
    device: torch.device,
    folder: Path,
    console: Console,
) -> StageData:
    """Make the data of a stage ready: open its stores, or read and encode its pictures.

    Args:
        config: of the run.
        stage: its data, resolution and batch size count.
        codec: pixels to latents.
        text_encoder: captions to embeddings; ``None`` where captions are not read.
        device: where batches go.
        folder: run folder; holds the store of a folder of pictures, and the list of rejected ones.
        console: where a person reads.

    Returns:
        The data.

    Raises:
        UserError: if the data are not those that the run began with, or do not fit recipe or model.
    """
    source = config.data.source
    train: TrainingData
    held_out: TrainingData | None
    if source in STORED:
        own = source == "folder"
        places = [own_store(config, stage, codec, text_encoder, folder, console)] if own else []
        train, held_out = open_stores(config, stage, codec, text_encoder, folder, console, places)
        held = 0 if held_out is None else len(held_out)
    else:
        train, held_out, held = _in_memory(config, stage, codec, text_encoder, folder, console)
    classes = _class_names(config, train, held_out)
    say(
        console,
        f"{source}: {len(train):,} pictures to train on, {held:,} held out"
        + (f", {len(classes)} classes" if classes else ""),
    )
    return StageData(config, stage, train, held_out, classes, device)


def real_pictures(config: RunConfig, stage: StageConfig, codec: ImageCodec, folder: Path) -> Splits:
    """The pictures of a run as pixels, to look at and to compare with; of stores at most some thousands.

    Args:
        config: of the run, which has begun.
        stage: its resolution counts.
        codec: of the run; pictures of stores are decoded by it.
        folder: run folder.

    Returns:
        Training and held-out pictures.
    """
    if config.data.source not in STORED:
        return load(config.data, stage.resolution)
    quiet = Console(quiet=True)
    places = [StoreConfig(path=str(folder / "store"))] if config.data.source == "folder" else []
    train, held_out = open_stores(config, stage, codec, None, folder, quiet, places)
    held = train.pictures(0) if held_out is None else held_out.pictures(SHOWN)
    return Splits(train.pictures(SHOWN), held)


def _in_memory(
    config: RunConfig,
    stage: StageConfig,
    codec: ImageCodec,
    text_encoder: TextEncoder | None,
    folder: Path,
    console: Console,
) -> tuple[TrainingData, TrainingData | None, int]:
    """Sources that are drawn or small: training data, some held-out data, and how many are held out."""
    data = config.data
    with console.status(f"Preparing {data.source} pictures at {stage.resolution} px"):
        splits = load(data, stage.resolution)
        _check_same_data(config, splits, folder)
        train = prepare(splits.train, codec, text_encoder, config.seed, flip=data.flip)
        logging = config.logging
        wanted = max(logging.validation_images, logging.kid_pictures if logging.kid_nimg else 0)
        some = splits.held_out.select(range(min(len(splits.held_out), wanted)))
        held_out = prepare(some, codec, text_encoder) if len(some) else None
    return train, held_out, len(splits.held_out)


def _class_names(config: RunConfig, train: TrainingData, held_out: TrainingData | None) -> tuple[str, ...]:
    """Names of the classes by number: the captions in alphabetical order."""
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
