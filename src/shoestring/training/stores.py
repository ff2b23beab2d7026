"""Opens the stores of a run: at the versions it began with, made by the codec and encoder of its recipe."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from shoestring.config import RunConfig, StageConfig, StoreConfig
from shoestring.data.buckets import bucket_shapes
from shoestring.data.cache import BlockCache
from shoestring.data.ingest import ingest, rejections
from shoestring.data.manifest import CaptionsColumn, LatentsColumn, TextColumn
from shoestring.data.members import Member, choose_rows
from shoestring.data.precompute import Job, LatentsJob, TextJob, prepare
from shoestring.data.readers import open_reader
from shoestring.data.ready import codec_for
from shoestring.data.store import Store
from shoestring.data.store_rows import Mixing, StoreData, distinct_captions
from shoestring.data.units import Makers
from shoestring.interfaces import ImageCodec, TextEncoder
from shoestring.runtime import UserError, say, write_text
from shoestring.training.folder import remember

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
    with console.status(f"Preparing {len(raw):,} pictures at {stage.resolution} px"):
        prepare(raw, str(folder / "store"), job, Makers(lambda: codec, encoders))
    return StoreConfig(path=str(folder / "store"))


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
    for resolution in dict.fromkeys(stage.resolution for stage in config.stages):
        stages = [stage for stage in config.stages if stage.resolution == resolution]
        train, _ = open_stores(config, stages[0], codec, text_encoder, folder, console)
        for stage in stages:
            train.order(stage.batch)


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
        stage: its resolution and batch size count.
        codec: of the recipe.
        text_encoder: of the recipe; ``None`` where captions are not read.
        folder: run folder; remembers the stores' versions, which are pinned.
        console: where a person reads.
        stores: which; those of the recipe by default.

    Returns:
        Both; the second is ``None`` if nothing is held out.

    Raises:
        UserError: if a store is missing, was made by another codec or encoder, has no such resolution or no
            such captions, or cannot fill the batches of the stage.
    """
    data = config.data
    stores = stores or data.stores or ([StoreConfig(path=data.path)] if data.path is not None else [])
    if not stores:
        raise UserError(
            "data.path is not set; data.source=store needs the folder or URL of a store (or data.stores)"
        )
    if data.stores and data.path is not None:
        raise UserError(f"data.path is {data.path!r} and data.stores is set too; leave one of them out")
    _check_weights(data.stores)
    trained, held = [], []
    shared: BlockCache | None = None  # one for all: it counts what its folder holds
    for number, place in enumerate(stores):
        store = _open(place, number, stage, folder, console)
        latents = _latents(store, stage, codec, config)
        text = None if text_encoder is None else _text(store, text_encoder, config)
        _say_unsure(store, latents, text, codec, text_encoder, console)
        captions = tuple(_captions(store, name) for name in data.captions)
        cache = None
        if "://" in store.uri:
            shared = shared or BlockCache(Path(data.cache or folder / "cache"), int(data.cache_gb * 1e9))
            cache = shared
        train_rows, held_rows = choose_rows(store, latents, captions, data.held_out, data.split)
        trained.append(Member(store, latents, text, captions, train_rows, cache))
        held.append(Member(store, latents, text, captions, held_rows, cache))
    _check_equal(trained)
    remote = any(member.cache is not None for member in trained)
    mixing = Mixing(
        seed=config.seed,
        weights=tuple(place.weight for place in stores) if data.stores else (),
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


def _check_weights(stores: Sequence[StoreConfig]) -> None:
    for number, place in enumerate(stores):
        if not (math.isfinite(place.weight) and place.weight > 0):
            raise UserError(
                f"data.stores.{number}.weight is {place.weight:g}, but must be a positive number; to leave "
                f"{place.path} out, take it off data.stores"
            )


def _open(place: StoreConfig, number: int, stage: StageConfig, folder: Path, console: Console) -> Store:
    """A store as it was when the run first needed this resolution, wherever it lies now."""
    path, key = folder / "machine.json", f"store {number} at {stage.resolution} px"

    def newest() -> int:
        store = Store(place.path)
        _at_resolution(store, stage)  # a version without it would be of no use
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
    name = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=6).hexdigest()
    try:
        store.pin(f"run-{name}-{stage.resolution}")
    except (OSError, ValueError, UserError) as error:
        say(
            console,
            f"{place.path} cannot be written ({str(error).splitlines()[0]}), so its version {version} is not "
            "kept from being cleaned away",
        )
    return store


def _captions(store: Store, name: str) -> CaptionsColumn:
    have = [column.name for column in store.manifest.captions]
    if name not in have:
        raise UserError(
            f"data.captions names {name!r}, but {store.uri} has the captions {', '.join(have) or 'none'}; "
            "set data.captions to some of them, or add them with: shoestring data caption"
        )
    return store.captions(name)


def _say_unsure(
    store: Store,
    latents: LatentsColumn,
    text: TextColumn | None,
    codec: ImageCodec,
    encoder: TextEncoder | None,
    console: Console,
) -> None:
    """Imports do not say which weights made them, and fit all of their kind and size."""
    pairs = [(latents.codec, codec.identity)]
    if text is not None and encoder is not None:
        pairs.append((text.encoder, encoder.identity))
    for stored, wanted in pairs:
        if stored.digest != wanted.digest:
            say(
                console,
                f"{store.uri} does not say which weights of {stored.name} made it; they are taken to be "
                f"those of the recipe, {wanted}",
            )


def _at_resolution(store: Store, stage: StageConfig) -> list[LatentsColumn]:
    columns = store.manifest.latents
    fitting = [column for column in columns if column.resolution == stage.resolution]
    if not fitting:
        have = ", ".join(f"{c.resolution} px ({c.codec.name})" for c in columns) or "none"
        raise UserError(
            f"stage {stage.name!r} has resolution {stage.resolution}, but {store.uri} holds latents at "
            f"{have}; set the resolution to one of them, or add the column with: shoestring data prepare"
        )
    return fitting


def _latents(store: Store, stage: StageConfig, codec: ImageCodec, config: RunConfig) -> LatentsColumn:
    """The moments at the stage's resolution by the recipe's codec."""
    fitting = _at_resolution(store, stage)
    same = [column for column in fitting if column.codec.same(codec.identity)]
    if not same:
        raise UserError(
            f"{store.uri} was made by the codec {fitting[0].codec}, but the recipe has {codec.identity}; set "
            "data.codec and data.codec_path to the store's, or prepare the pictures anew"
        )
    column = same[-1]
    channels = codec.channels if column.sampled else codec.moment_channels
    stored = (column.channels, column.moment_channels, column.downsampling)
    if stored != (codec.channels, channels, codec.downsampling):
        raise UserError(
            f"the latents {column.name!r} of {store.uri} have {column.channels} channels, one for "
            f"{column.downsampling} x {column.downsampling} pixels, but the recipe's codec {codec.identity} "
            f"has {codec.channels} for {codec.downsampling} x {codec.downsampling}; set data.codec_path to "
            "the one that made them"
        )
    if not column.sigma > 0:
        raise UserError(
            f"the latents {column.name!r} of {store.uri} have the deviation {column.sigma:g}, so all its "
            "pictures are one flat colour and there is nothing to learn; prepare other pictures"
        )
    if config.data.flip and not column.mirrored and column.downsampling > 1:
        raise UserError(
            f"data.flip is true, but {store.uri} holds no mirrored latents {column.name!r}; prepare with "
            "--flip, or set data.flip=false"
        )
    for height, width in column.buckets:
        unit = column.downsampling * config.model.patch_size
        if height % unit or width % unit:
            raise UserError(
                f"{store.uri} holds pictures of {width} x {height}, whose sides are no multiples of {unit} "
                f"(codec {column.downsampling} times model.patch_size {config.model.patch_size}); set "
                "model.patch_size to a smaller one, or prepare with --multiple"
            )
    sigma = config.process.sigma_data
    if sigma is not None and not 0.5 <= sigma / column.sigma <= 2:
        raise UserError(
            f"process.sigma_data is {sigma}, but the latents of {store.uri} were measured to have "
            f"{column.sigma:.4g}; "
            "set process.sigma_data=null to take the measured one"
        )
    return column


def _text(store: Store, encoder: TextEncoder, config: RunConfig) -> TextColumn:
    """The embeddings by the recipe's encoder."""
    columns = store.manifest.text
    same = [column for column in columns if column.encoder.same(encoder.identity)]
    if not same:
        have = ", ".join(str(column.encoder) for column in columns) or "no encoder"
        raise UserError(
            f"{store.uri} holds captions encoded by {have}, but the recipe has {encoder.identity}; set "
            "data.text_encoder to the store's, or add the column with: shoestring data prepare"
        )
    attends_padding = not config.model.mask_captions
    fitting = [column for column in same if column.positions == "all" or not attends_padding]
    if not fitting:
        raise UserError(
            f"model.mask_captions is false, so padding is attended to, but {store.uri} holds captions at "
            "their true length only; set model.mask_captions=true, or prepare with --positions all"
        )
    column = fitting[-1]
    if column.width != encoder.width:
        raise UserError(
            f"{store.uri} holds captions of width {column.width}, but the recipe's encoder "
            f"{encoder.identity} gives {encoder.width}; set data.text_encoder_path to the one that made them"
        )
    if column.max_tokens != encoder.max_tokens:
        raise UserError(
            f"data.max_tokens is {encoder.max_tokens}, but {store.uri} holds captions cut at "
            f"{column.max_tokens} tokens; "
            f"set data.max_tokens={column.max_tokens}"
        )
    return column


def _check_equal(members: Sequence[Member]) -> None:
    """One batch may hold rows of all stores."""
    first = members[0]
    keys = [member.key for member in members]
    for number, member in enumerate(members[1:], 1):
        if member.key in keys[:number]:
            raise UserError(
                f"data.stores.{number}.path is {member.store.uri}, which holds the same records as "
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
