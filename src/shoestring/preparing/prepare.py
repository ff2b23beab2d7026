"""``shoestring data prepare`` and ``data caption``: from options or a recipe to a job on a store."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from PIL import Image
from rich.console import Console

from shoestring.config import CODEC_DOWNSAMPLING, DataConfig, RunConfig
from shoestring.data.buckets import bucket_shapes
from shoestring.data.caption import NAME, caption, check_captions
from shoestring.data.compact import compact
from shoestring.data.forecast import forecast
from shoestring.data.jobs import existing
from shoestring.data.precompute import JOB, Engine, FeatureJob, Job, LatentsJob, Local, TextJob, prepare
from shoestring.data.store import Store
from shoestring.data.tables import child, table_exists
from shoestring.data.units import Makers
from shoestring.encoders.captions import ImageToText
from shoestring.encoders.image import build_codec
from shoestring.encoders.text import build_text_encoder
from shoestring.evaluation.features import EfficientNetLite0Features
from shoestring.interfaces import FeatureExtractor, ImageCodec, TextEncoder
from shoestring.preparing.progress import JobLine
from shoestring.runtime import UserError, pick_device, say

FEATURES: dict[str, tuple[Callable[[torch.device], FeatureExtractor], int]] = {
    "efflite0": (EfficientNetLite0Features, EfficientNetLite0Features.side),
}
"""Teachers by name, and the side of the square that they see."""


@dataclass(frozen=True)
class PrepareOptions:
    """What ``data prepare`` was asked for."""

    data: DataConfig
    """Codec, encoder, ``max_tokens``, ``flip``, ``buckets``, ``bucket_aspect``."""
    resolutions: tuple[int, ...]
    positions: Literal["true", "all"] = "true"
    dtype: Literal["int8", "float16"] = "int8"
    text_name: str | None = None
    """By default the encoder's name; ``none`` as encoder prepares no captions."""
    with_text: bool | None = None
    """``None``: where the result is new, or has embeddings of that name."""
    features: tuple[str, ...] = ()
    multiple: int | None = None
    """Sides of buckets are multiples of it; by default codec times 2."""
    min_bucket: int = 1
    keep_images: bool = False
    batch: int = 32
    engine: Literal["local", "ray"] = "local"
    workers: int = 2
    address: str | None = None
    gpus: float = 0.0
    device: str = "auto"
    usd_per_hour: float = 0.0
    compact: bool = False
    """Join fragments at the end; over a network that copies the whole store."""
    yes: bool = False
    only_forecast: bool = False


def options_of(config: RunConfig) -> dict[str, object]:
    """The options that make a store for a recipe.

    Args:
        config: the recipe.

    Returns:
        Arguments of :class:`PrepareOptions`.
    """
    return {
        "data": config.data,
        "resolutions": tuple(dict.fromkeys(stage.resolution for stage in config.stages)),
        "positions": "true" if config.model.mask_captions else "all",
        "with_text": config.model.condition == "text",
        "multiple": CODEC_DOWNSAMPLING[config.data.codec] * config.model.patch_size,
        "min_bucket": max(stage.batch for stage in config.stages) if config.data.buckets > 1 else 1,
    }


def run_prepare(raw_uri: str, out: str, options: PrepareOptions, console: Console) -> None:
    """Forecast, then compute what the result lacks.

    Args:
        raw_uri: store with the pictures.
        out: store to make, or to add columns to.
        options: what was asked for.
        console: where a person reads.

    Raises:
        UserError: if something does not fit, or the disk is too small.
    """
    raw, data = Store(raw_uri), options.data
    multiple = options.multiple or 2 * CODEC_DOWNSAMPLING[data.codec]
    latents = tuple(
        LatentsJob(
            name=f"{resolution}" if data.buckets == 1 else f"{resolution}x{data.buckets}",
            resolution=resolution,
            shapes=bucket_shapes(resolution, data.buckets, multiple, data.bucket_aspect),
            mirrored=data.flip,
            min_bucket=options.min_bucket,
        )
        for resolution in options.resolutions
    )
    name = options.text_name or data.text_encoder
    if not re.fullmatch(NAME, name):
        raise UserError(f"--text-name is {name!r}; take letters, digits and underscores")
    with_text = options.with_text
    if with_text is None:
        have = existing(out, JOB)
        with_text = have is None or name in {column.name for column in have.manifest.text}
    for feature in options.features:
        if feature not in FEATURES:
            raise UserError(f"--feature {feature!r} is unknown; choose from {', '.join(FEATURES)}")
    job = Job(
        latents=latents,
        text=(TextJob(name, options.positions, options.dtype),) if with_text else (),
        features=tuple(FeatureJob(feature, FEATURES[feature][1]) for feature in options.features),
        keep_images=options.keep_images,
        batch=options.batch,
    )
    makers = Makers(
        partial(_codec, data, options.device) if latents else None,
        {name: partial(_encoder, data, options.device)} if with_text else {},
        {feature: partial(_feature, feature, options.device) for feature in options.features},
    )
    with console.status("Encoding a sample for the forecast"):
        expected = forecast(
            raw,
            out,
            job,
            makers,
            options.usd_per_hour or None,
            options.workers if options.engine == "ray" else 1,
        )
    if expected.columns:
        say(console, f"{expected}  (predicted from a sample)")
    else:
        say(console, f"{out} has all of these latents, embeddings and features")
    if options.only_forecast:
        return
    expected.check(out, options.yes)
    workers = options.workers if options.engine == "ray" else 1
    new = not table_exists(child(out, "manifest"))
    with JobLine(console, options.usd_per_hour * workers) as line:
        store = prepare(raw, out, job, makers, _engine(options), line.show)
    if options.compact:
        with console.status("Joining fragments"):
            store = compact(out)
            if new:  # nobody reads the version of a moment ago
                store.clean()
    say(console, f"Done: {out}, version {store.version}. Look at it with: shoestring data sample {out}")


@contextmanager
def _of_options() -> Iterator[None]:
    """Mistakes that are said of a recipe's settings, said of the options that users of stores give."""
    try:
        yield
    except UserError as error:
        text = re.sub(r"^device: (?=')", "--device ", str(error))
        text = re.sub(
            r"data\.(codec_path|codec|text_encoder_path|text_encoder|max_tokens)\b(=?)",
            lambda found: f"--{found[1].replace('_', '-')}{' ' if found[2] else ''}",
            text,
        )
        raise UserError(text) from error


@_of_options()
def _codec(data: DataConfig, device: str) -> ImageCodec:
    return build_codec(data, pick_device(device))


@_of_options()
def _encoder(data: DataConfig, device: str) -> TextEncoder:
    return build_text_encoder(data, pick_device(device))


@_of_options()
def _feature(name: str, device: str) -> FeatureExtractor:
    return FEATURES[name][0](pick_device(device))


@_of_options()
def _captioner(model: str, device: str, prompt: str, max_tokens: int) -> ImageToText:
    return ImageToText(model, pick_device(device), prompt, max_tokens)


def _engine(options: PrepareOptions) -> Engine:
    if options.engine == "local":
        return Local()
    from shoestring.data.precompute_ray import RayEngine

    return RayEngine(options.workers, options.address, gpus=options.gpus)


def run_caption(
    uri: str,
    model: str,
    name: str,
    prompt: str,
    max_tokens: int,
    batch: int,
    device: str,
    encoder: DataConfig | None,
    console: Console,
) -> None:
    """Caption all pictures of a store.

    Args:
        uri: store with pictures.
        model: folder or hub name of an image-to-text model.
        name: of the new captions.
        prompt: see :class:`shoestring.encoders.captions.ImageToText`.
        max_tokens: of a caption.
        batch: pictures at once.
        device: where it runs.
        encoder: of the embeddings that the store has, if it has some.
        console: where a person reads.

    Raises:
        UserError: if something does not fit.
    """
    store = Store(uri)
    check_captions(store, name)
    captioner = _captioner(model, device, prompt, max_tokens)

    def write(pictures: list[Image.Image]) -> list[str]:
        return captioner(pictures)

    encoders = {}
    if encoder is not None:
        encoders = {column.name: partial(_encoder, encoder, device) for column in store.manifest.text}
    with JobLine(console) as line, torch.no_grad():
        store = caption(store, lambda: write, name, captioner.origin, batch, encoders, progress=line.show)
    say(
        console,
        f"Done: {uri} has captions {name!r}; train with data.captions=[source,{name}] to draw from both",
    )


def store_codec(store: Store, codec: str | None, codec_path: str | None, device: str) -> ImageCodec | None:
    """The codec of a store's latents, as far as it can be built without being told.

    Args:
        store: whose.
        codec: name; by default the store's own.
        codec_path: weights; by default where the store says they came from.
        device: where it runs.

    Returns:
        The codec, or ``None`` if the store holds no latents.

    Raises:
        UserError: if the weights are not there, or are others than the store's.
    """
    if not store.manifest.latents:
        return None
    made_by = store.manifest.latents[-1].codec
    name = codec or made_by.name
    if name not in CODEC_DOWNSAMPLING:
        raise UserError(
            f"{store.uri} was made by the codec {made_by}, which is not known here; name one with --codec: "
            f"{', '.join(CODEC_DOWNSAMPLING)}"
        )
    path = codec_path or made_by.source or None
    if path is None and name != "pixels":
        raise UserError(
            f"{store.uri} was made by the codec {made_by} and does not say where its weights are; give "
            "--codec-path"
        )
    built = _codec(DataConfig(codec=name, codec_path=path), device)
    if not built.identity.same(made_by):
        raise UserError(
            f"{store.uri} was made by the codec {made_by}, but this is {built.identity}; give --codec-path"
        )
    return built
