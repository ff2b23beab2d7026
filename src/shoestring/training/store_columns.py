"""Which columns of a store fit a recipe: latents, captions and their embeddings."""

from __future__ import annotations

from rich.console import Console

from shoestring.config import RunConfig, StageConfig
from shoestring.data.manifest import CaptionsColumn, LatentsColumn, TextColumn
from shoestring.data.store import Store
from shoestring.interfaces import ImageCodec, TextEncoder
from shoestring.runtime import UserError, say


def captions_column(store: Store, name: str) -> CaptionsColumn:
    """Captions of a store.

    Args:
        store: whose.
        name: of the column.

    Returns:
        The column.

    Raises:
        UserError: if there is none of that name.
    """
    have = [column.name for column in store.manifest.captions]
    if name not in have:
        raise UserError(
            f"data.captions names {name!r}, but {store.uri} has the captions {', '.join(have) or 'none'}; "
            "set data.captions to some of them, or add them with: shoestring data caption"
        )
    return store.captions(name)


def say_unsure(
    store: Store,
    latents: LatentsColumn,
    text: TextColumn | None,
    codec: ImageCodec,
    encoder: TextEncoder | None,
    console: Console,
) -> None:
    """Say where an import does not tell which weights made it: it fits all of their kind and size.

    Args:
        store: whose columns.
        latents: chosen of it.
        text: chosen of it; ``None`` where captions are not read.
        codec: of the recipe.
        encoder: of the recipe.
        console: where a person reads.
    """
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


def at_resolution(store: Store, stage: StageConfig) -> list[LatentsColumn]:
    """All latents of a store at the resolution of a stage.

    Args:
        store: whose.
        stage: its resolution counts.

    Returns:
        At least one column.

    Raises:
        UserError: if there is none.
    """
    columns = store.manifest.latents
    fitting = [column for column in columns if column.resolution == stage.resolution]
    if not fitting:
        have = ", ".join(f"{c.resolution} px ({c.codec.name})" for c in columns) or "none"
        raise UserError(
            f"stage {stage.name!r} has resolution {stage.resolution}, but {store.uri} holds latents at "
            f"{have}; set the resolution to one of them, or add the column with: shoestring data prepare"
        )
    return fitting


def latents_column(store: Store, stage: StageConfig, codec: ImageCodec, config: RunConfig) -> LatentsColumn:
    """The moments at the stage's resolution by the recipe's codec.

    Args:
        store: whose.
        stage: its resolution counts.
        codec: of the recipe.
        config: of the run.

    Returns:
        The column.

    Raises:
        UserError: naming the setting that does not fit what the store holds.
    """
    fitting = at_resolution(store, stage)
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


def text_column(store: Store, encoder: TextEncoder, config: RunConfig) -> TextColumn:
    """The embeddings by the recipe's encoder.

    Args:
        store: whose.
        encoder: of the recipe.
        config: of the run.

    Returns:
        The column.

    Raises:
        UserError: naming the setting that does not fit what the store holds.
    """
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
