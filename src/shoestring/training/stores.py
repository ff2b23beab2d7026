"""Opens the stores of a run: at the versions it began with, made by the codec and encoder of its recipe."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console

from shoestring.config import RunConfig, StageConfig, StoreConfig
from shoestring.data.buckets import bucket_shapes
from shoestring.data.cache import BlockCache
from shoestring.data.ingest import ingest, rejections
from shoestring.data.members import Member, Rows, choose_rows
from shoestring.data.precompute import Job, LatentsJob, TextJob, prepare
from shoestring.data.readers import open_reader
from shoestring.data.ready import codec_for
from shoestring.data.store import Store
from shoestring.data.store_rows import Mixing, StoreData, distinct_captions
from shoestring.data.units import Makers
from shoestring.interfaces import ImageCodec, TextEncoder
from shoestring.runtime import UserError, say, write_text
from shoestring.training.folder import remember
from shoestring.training.store_columns import (
    at_resolution,
    captions_column,
    latents_column,
    say_unsure,
    text_column,
)

REMOTE_WINDOW = 16
"""Blocks shuffled together where each has to be fetched: 16,384 records."""


def own_store(
    config: RunConfig,
    stage: StageConfig,
    codec: ImageCodec,
    text_encoder: TextEncoder | None,
    folder: Path,
    console: Console,
) -> StoreConfig:
    """The store of a folder of pictures, made in the run folder as far as it is not there.

    Args:
        config: of the run; ``data.path`` is the folder.
        stage: its resolution is prepared.
        codec: of the recipe.
        text_encoder: of the recipe; ``None`` where captions are not encoded.
        folder: run folder; ``pictures`` and ``store`` appear there, and the list of rejected pictures.
        console: where a person reads.

    Returns:
        Where the store is.

    Raises:
        UserError: if there is no usable picture, or the folder is not what the run began with.
    """
    data = config.data
    if data.path is None:
        raise UserError("data.path is not set; data.source=folder needs the folder of your pictures")
    reader = open_reader(f"folder:{data.path}")
    listing = _listing(Path(data.path))
    if remember(folder / "machine.json", "pictures", lambda: listing) != listing:
        raise UserError(
            f"the pictures or captions in {data.path} are not those that the run in {folder} began with; "
            "put them back, or train anew in another folder (--out)"
        )
    with console.status(f"Reading the pictures in {data.path}"):
        raw = ingest(reader, str(folder / "pictures"))
    rejected = rejections(raw).to_pylist()
    if rejected:
        listed = "".join(f"{row['item']}\t{row['reason']}\n" for row in rejected)
        write_text(folder / "rejected.txt", listed)
        say(console, f"{len(rejected):,} left out (listed in {folder / 'rejected.txt'})")
    with console.status(f"Preparing {len(raw):,} pictures at {stage.resolution} px"):
        prepare_own(config, stage, codec, text_encoder, raw, folder / "store")
    return StoreConfig(path=str(folder / "store"))


def prepare_own(
    config: RunConfig,
    stage: StageConfig,
    codec: ImageCodec,
    text_encoder: TextEncoder | None,
    raw: Store,
    out: Path,
) -> None:
    """Encode pictures as a run reads them, as far as that is not done.

    Args:
        config: of the run.
        stage: its resolution is prepared.
        codec: of the recipe.
        text_encoder: of the recipe; ``None`` where captions are not encoded.
        raw: the pictures.
        out: the store to make.
    """
    data = config.data
    multiple = codec.downsampling * config.model.patch_size
    shapes = bucket_shapes(stage.resolution, data.buckets, multiple, data.bucket_aspect)
    job = Job(
        latents=(
            LatentsJob(str(stage.resolution), stage.resolution, shapes, data.flip, _min_bucket(config, stage))
            if data.buckets > 1
            else LatentsJob(str(stage.resolution), stage.resolution, shapes, data.flip),
        ),
        text=() if text_encoder is None else (TextJob("text", _positions(config)),),
    )
    encoders = {} if text_encoder is None else {"text": lambda: text_encoder}
    prepare(raw, str(out), job, Makers(lambda: codec, encoders))


def _min_bucket(config: RunConfig, stage: StageConfig) -> int:
    """Pictures that fill a batch of every stage at this resolution, after some were held out."""
    batch = max(other.batch for other in config.stages if other.resolution == stage.resolution)
    return math.ceil(1.5 * batch / (1 - min(config.data.held_out, 0.9)))  # hashes do not share out evenly


def _positions(config: RunConfig) -> Literal["true", "all"]:
    """Which positions of captions the model looks at."""
    return "true" if config.model.mask_captions else "all"


def _listing(folder: Path) -> str:
    """A hash of the names and sizes of all files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    text = "".join(f"{path.relative_to(folder)} {path.stat().st_size}\n" for path in files)
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def check_stages(
    config: RunConfig,
    codec: ImageCodec,
    text_encoder: TextEncoder | None,
    folder: Path,
    console: Console,
) -> None:
    """Open the stores of all stages, so that what does not fit a later one is said before training.

    Args:
        config: of the run; only data.source=store is looked at.
        codec: of the recipe.
        text_encoder: of the recipe; ``None`` where captions are not read.
        folder: run folder.
        console: where a person reads.

    Raises:
        UserError: as :func:`open_stores`.
    """
    if config.data.source != "store":
        return
    opened: list[tuple[StageConfig, StoreData]] = []
    for stage in config.stages:
        for other, train in opened:
            if same_data(other, stage):
                train.order(stage.batch)
                break
        else:
            train, _ = open_stores(config, stage, codec, text_encoder, folder, console)
            opened.append((stage, train))
    if config.model.condition == "class":
        for stage, train in opened[1:]:
            check_classes(stage, train.captions, opened[0][1].captions)


def same_data(one: StageConfig, other: StageConfig) -> bool:
    """Whether two stages of a run train on the same data."""
    return (one.resolution, one.stores, one.min_side) == (other.resolution, other.stores, other.min_side)


def check_classes(stage: StageConfig, names: Sequence[str], before: Sequence[str]) -> None:
    """Refuse a stage whose classes are others than those of the stages before: their numbers would change.

    Args:
        stage: which.
        names: of its classes, by the alphabet.
        before: of those of the run so far.

    Raises:
        UserError: naming a class that only one of them has.
    """
    odd = sorted(set(names) ^ set(before))
    if odd:
        which = "does not have" if odd[0] in before else "alone has"
        raise UserError(
            f"stage {stage.name!r} {which} the class {odd[0]!r}; with model.condition=class all stages need "
            "the same classes, change its stores or min_side"
        )


def open_stores(
    config: RunConfig,
    stage: StageConfig,
    codec: ImageCodec,
    text_encoder: TextEncoder | None,
    folder: Path,
    console: Console,
    stores: Sequence[StoreConfig] = (),
) -> tuple[StoreData, StoreData | None]:
    """Training and held-out data of a stage.

    Args:
        config: of the run.
        stage: its data, resolution and batch size count.
        codec: of the recipe.
        text_encoder: of the recipe; ``None`` where captions are not read.
        folder: run folder; remembers the stores' versions, which are pinned.
        console: where a person reads.
        stores: which; those of the stage or else of the recipe by default.

    Returns:
        Both; the second is ``None`` if nothing is held out.

    Raises:
        UserError: if a store is missing, was made by another codec or encoder, has no such resolution or no
            such captions, or cannot fill the batches of the stage.
    """
    data = config.data
    mixed = stage.stores or data.stores
    stores = stores or mixed or ([StoreConfig(path=data.path)] if data.path is not None else [])
    if not stores:
        raise UserError(
            "data.path is not set; data.source=store needs the folder or URL of a store (or data.stores)"
        )
    if data.stores and data.path is not None:
        raise UserError(f"data.path is {data.path!r} and data.stores is set too; leave one of them out")
    where = f"stages.{stage.name}.stores" if stage.stores else "data.stores"
    _check_weights(mixed, where)
    trained, held = [], []
    shared: BlockCache | None = None  # one for all: it counts what its folder holds
    for number, place in enumerate(stores):
        store = _open(place, number, stage, folder, console)
        latents = latents_column(store, stage, codec, config)
        text = None if text_encoder is None else text_column(store, text_encoder, config)
        say_unsure(store, latents, text, codec, text_encoder, console)
        captions = tuple(captions_column(store, name) for name in data.captions)
        cache = None
        if "://" in store.uri:
            shared = shared or BlockCache(Path(data.cache or folder / "cache"), int(data.cache_gb * 1e9))
            cache = shared
        train_rows, held_rows = choose_rows(store, latents, captions, data.held_out, data.split)
        if stage.min_side is not None:
            train_rows, held_rows = _large_enough(store, stage, train_rows, held_rows)
        trained.append(Member(store, latents, text, captions, train_rows, cache))
        held.append(Member(store, latents, text, captions, held_rows, cache))
    _check_equal(trained, where)
    remote = any(member.cache is not None for member in trained)
    mixing = Mixing(
        seed=config.seed,
        weights=tuple(place.weight for place in stores) if mixed else (),
        repeats=data.mix == "repeats",
        window=data.window_blocks or (REMOTE_WINDOW if remote else None),
        flip=data.flip,
    )
    classes = distinct_captions(trained) if config.model.condition == "class" else None
    codec = codec_for(trained[0].latents, codec)
    train = StoreData(tuple(trained), codec, mixing, classes)
    train.order(stage.batch)  # says at once what does not fit
    some = tuple(member for member in held if len(member))
    return train, StoreData(some, codec, mixing, classes) if some else None


def _check_weights(stores: Sequence[StoreConfig], where: str) -> None:
    for number, place in enumerate(stores):
        if not (math.isfinite(place.weight) and place.weight > 0):
            raise UserError(
                f"{where}.{number}.weight is {place.weight:g}, but must be a positive number; to leave "
                f"{place.path} out, take it off {where}"
            )


def _large_enough(
    store: Store, stage: StageConfig, *sides: tuple[Rows, ...]
) -> tuple[tuple[Rows, ...], tuple[Rows, ...]]:
    """Training and held-out rows without those of small originals."""
    assert stage.min_side is not None
    width_N, height_N = (store.column("records", name).to_numpy() for name in ("width", "height"))
    shorter_N = np.minimum(width_N, height_N)
    train, held = (tuple(rows[shorter_N[rows] >= stage.min_side] for rows in side) for side in sides)
    if not any(len(rows) for rows in train):
        raise UserError(
            f"stage {stage.name!r} has min_side {stage.min_side}, which leaves no picture of {store.uri} to "
            f"train on: the largest has a shorter side of {shorter_N.max()} px; lower it or leave that out"
        )
    return train, held


def _open(place: StoreConfig, number: int, stage: StageConfig, folder: Path, console: Console) -> Store:
    """A store as it was when the run first looked at it for this stage's data, wherever it lies now."""
    path = folder / "machine.json"
    own = f" of stage {stage.name!r}" if stage.stores else ""
    key = f"store {number}{own} at {stage.resolution} px"

    def newest() -> int:
        store = Store(place.path)
        at_resolution(store, stage)  # a version without it would be of no use
        return store.version

    version = remember(path, f"{key}: version", newest)
    store = Store(place.path, version)
    if remember(path, f"{key}: digest", lambda: store.digest) != store.digest:
        raise UserError(
            f"{place.path} is not the store that the run in {folder} began with; put that one back, or train "
            "anew in another folder (--out)"
        )
    if not len(store):
        raise UserError(f"{place.path} has no records; leave it out, or ingest and prepare pictures anew")
    name = hashlib.blake2b(f"{folder.resolve()}{own}".encode(), digest_size=6).hexdigest()
    try:
        store.pin(f"run-{name}-{stage.resolution}")
    except (OSError, ValueError, UserError) as error:
        say(
            console,
            f"{place.path} cannot be written ({str(error).splitlines()[0]}), so its version {version} is not "
            "kept from being cleaned away",
        )
    return store


def _check_equal(members: Sequence[Member], where: str) -> None:
    """One batch may hold rows of all stores."""
    first = members[0]
    keys = [member.key for member in members]
    for number, member in enumerate(members[1:], 1):
        if member.key in keys[:number]:
            raise UserError(
                f"{where}.{number}.path is {member.store.uri}, which holds the same records as "
                f"{members[keys.index(member.key)].store.uri}; name it once, with a higher weight"
            )
        if member.latents.sampled != first.latents.sampled:
            raise UserError(
                f"of {first.store.uri} and {member.store.uri} one holds moments and one ready latents; mix "
                "stores of one kind"
            )
        if member.latents.buckets != first.latents.buckets:
            raise UserError(
                f"{first.store.uri} has the buckets {list(first.latents.buckets)}, {member.store.uri} has "
                f"{list(member.latents.buckets)}; prepare the stores of a mixture with the same buckets"
            )
