"""``shoestring data``: the commands that make stores of pictures, and of what models see of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from shoestring import recipes
from shoestring.cli.options import (
    Codec,
    CodecPath,
    Device,
    Encoder,
    EncoderPath,
    OutStore,
    StoreArgument,
    choice,
    data_config,
    refuse,
    resumable,
)
from shoestring.config import DataConfig
from shoestring.runtime import UserError, say

console = Console()


def ingest(
    source: Annotated[
        str,
        typer.Argument(help="folder, tars, Parquet, COCO JSON, MDS folder, KIND:PATH, or a published set"),
    ],
    out: OutStore,
    path: Annotated[Path | None, typer.Option(help="published set: what was downloaded")] = None,
    image: Annotated[str | None, typer.Option(help="column of the picture")] = None,
    caption: Annotated[list[str] | None, typer.Option(help="column of captions; may be repeated")] = None,
    id_column: Annotated[str | None, typer.Option("--id", help="column of the id")] = None,
    split: Annotated[str | None, typer.Option(help="part of the source")] = None,
    images: Annotated[Path | None, typer.Option(help="folder of pictures that the source only names")] = None,
    side: Annotated[int | None, typer.Option(help="openmoji, shapes: side in pixels", min=1)] = None,
    min_side: Annotated[int | None, typer.Option(help="shortest side in pixels", min=1)] = None,
    max_aspect: Annotated[float | None, typer.Option(help="longest side by shortest", min=1)] = None,
    min_caption: Annotated[int | None, typer.Option(help="characters of a caption", min=1)] = None,
    max_caption: Annotated[int | None, typer.Option(help="characters of a caption", min=1)] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="threshold such as 'aesthetic>=5'; may be repeated")
    ] = None,
    drop_equal: Annotated[bool, typer.Option(help="leave out equal files")] = False,
    drop_similar: Annotated[
        int | None, typer.Option(help="leave out look-alikes that differ in at most so many of 63 bits")
    ] = None,
    licence: Annotated[str, typer.Option(help="of the pictures, for the record")] = "",
    threads: Annotated[int, typer.Option(help="that decode pictures", min=1)] = 2,
) -> None:
    """Read captioned pictures into a store, as they are; interrupted, the same command goes on."""
    from dataclasses import replace

    from shoestring.data.filters import Filters, Threshold, summary
    from shoestring.data.ingest import ingest as run
    from shoestring.data.published import PUBLISHED
    from shoestring.data.readers import Options, open_reader
    from shoestring.preparing.progress import JobLine

    known = PUBLISHED.get(source)
    if path is not None and known is None:
        raise UserError(f"--path belongs to a published set ({', '.join(PUBLISHED)}), and {source!r} is none")
    options, filters, spec = Options(), Filters(), source
    if known is not None:
        options, filters, spec = known.options, known.filters, known.spec(path)
        licence = licence or known.licence
        if path is not None and known.images:
            options = replace(options, images=path / known.images)
    chosen = {"image": image, "id": id_column, "split": split, "images": images, "side": side}
    changes: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    if caption:
        changes["captions"] = tuple(caption)
    limits = {
        "min_side": min_side,
        "max_aspect": max_aspect,
        "min_caption": min_caption,
        "max_caption": max_caption,
        "look_alikes": drop_similar,
    }
    wanted: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
    if where:
        wanted["thresholds"] = tuple(Threshold.parse(text) for text in where)
    if drop_equal:
        wanted["equal_files"] = True
    filters = replace(filters, **wanted)
    options = replace(options, **changes)
    options = replace(options, numbers=tuple(dict.fromkeys((*options.numbers, *filters.numbers))))
    reader = open_reader(spec, options)
    with resumable(), JobLine(console) as line:
        store = run(reader, out, filters, licence=licence, threads=threads, progress=line.items)
    facts = store.manifest.sources[0]
    say(console, f"{facts.read:,} read, {facts.kept:,} kept, {sum(facts.rejected.values()):,} rejected")
    if facts.rejected:
        say(
            console, f"rejected: {summary(facts.rejected)}; each is listed by: shoestring data rejected {out}"
        )
    say(console, f"Next: shoestring data prepare {out} --out STORE --recipe NAME")


def sets() -> None:
    """List the published sets that ingest knows, with where each is had."""
    from shoestring.data.published import PUBLISHED

    for each in PUBLISHED.values():
        doubt = "" if each.confirmed else "; names of files and columns are not confirmed"
        say(console, f"{each.name:13} {each.title}: about {each.pictures:,} pictures, {each.home}{doubt}")
        say(console, f"{'':13} licence: {each.licence}")
        if each.prepare:
            say(console, f"{'':13} before: {each.prepare}")


def rejected(store: StoreArgument) -> None:
    """List what ingestion left out, with the reason."""
    from shoestring.data.ingest import rejections
    from shoestring.data.store import Store

    for row in rejections(Store(store)).to_pylist():
        print(row["item"], row["kind"], row["reason"], sep="\t")  # the console would make spaces of the tabs


def prepare(
    pictures: Annotated[str, typer.Argument(metavar="PICTURES", help="store made by data ingest")],
    out: OutStore,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY.SUB=VALUE]...", help="with --recipe: settings to change"),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="take all that follows from a recipe or YAML file; options win")
    ] = None,
    resolution: Annotated[
        list[int] | None, typer.Option(help="side in pixels (of a square of equal area); may be repeated")
    ] = None,
    buckets: Annotated[int | None, typer.Option(help="shapes by aspect ratio; 1 = squares", min=1)] = None,
    bucket_aspect: Annotated[
        float | None, typer.Option(help="longer side by shorter of the longest shapes [default: 4]")
    ] = None,
    multiple: Annotated[int | None, typer.Option(help="sides of buckets are multiples of it", min=1)] = None,
    min_bucket: Annotated[
        int | None, typer.Option(help="pictures of rarer buckets go to the nearest larger one", min=1)
    ] = None,
    flip: Annotated[bool | None, typer.Option(help="encode the mirrored pictures too")] = None,
    codec: Codec = None,
    codec_path: CodecPath = None,
    text_encoder: Encoder = None,
    text_encoder_path: EncoderPath = None,
    text_name: Annotated[
        str | None, typer.Option(help="name of the embeddings [default: the encoder's]")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="caption tokens kept", min=2)] = None,
    positions: Annotated[
        str | None, typer.Option(help="true = true length; all = padding too, for models that attend to it")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="of the embeddings: int8 (a scale each token) or float16 [default: int8]"),
    ] = None,
    feature: Annotated[list[str] | None, typer.Option(help="teacher: efflite0; may be repeated")] = None,
    keep_images: Annotated[bool, typer.Option(help="take over the original files")] = False,
    batch: Annotated[int, typer.Option(help="pictures encoded at once", min=1)] = 32,
    engine: Annotated[str, typer.Option(help="local or ray")] = "local",
    workers: Annotated[int | None, typer.Option(help="ray: actors [default: 2]", min=1)] = None,
    address: Annotated[
        str | None, typer.Option(help="ray: cluster, e.g. auto [default: this machine]")
    ] = None,
    gpus: Annotated[float | None, typer.Option(help="ray: GPUs of an actor [default: 0]", min=0)] = None,
    device: Device = "auto",
    usd_per_hour: Annotated[float, typer.Option(help="price of a machine", min=0)] = 0.0,
    only_forecast: Annotated[bool, typer.Option("--forecast", help="only print what it would take")] = False,
    compact: Annotated[
        bool, typer.Option("--compact", help="join fragments at the end: slower to make, faster to read")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="begin even if the disk seems too small")] = False,
) -> None:
    """Encode pictures and captions for training; interrupted, the same command goes on.

    Given an existing store, it adds what is missing: another resolution, another encoder, a teacher.
    """
    from shoestring.preparing.prepare import PrepareOptions, options_of, run_prepare

    if recipe is None and overrides:
        raise UserError(
            f"{overrides[0]!r} is a setting of a recipe; name the recipe with --recipe, or use options"
        )
    chosen = options_of(recipes.resolve(recipe, overrides or [])) if recipe is not None else {}
    data = cast(DataConfig, chosen.get("data", DataConfig())).model_dump()
    if codec not in (None, data["codec"]):
        data["codec_path"] = None  # the recipe's is of another codec
    if text_encoder not in (None, data["text_encoder"]):
        data["text_encoder_path"] = None
    given = {
        "buckets": buckets,
        "bucket_aspect": bucket_aspect,
        "flip": flip,
        "codec": codec,
        "codec_path": codec_path,
        "text_encoder": None if text_encoder == "none" else text_encoder,
        "text_encoder_path": text_encoder_path,
        "max_tokens": max_tokens,
    }
    chosen["data"] = data_config(data | {key: value for key, value in given.items() if value is not None})
    if resolution:
        chosen["resolutions"] = tuple(dict.fromkeys(resolution))
    if not chosen.setdefault("resolutions", ()) and not feature and text_encoder in (None, "none"):
        raise UserError(
            "no resolution is given; add --resolution 256, or --recipe NAME to take those of a recipe"
        )
    if text_encoder is not None:
        chosen["with_text"] = text_encoder != "none"
    elif not chosen["resolutions"]:
        chosen["with_text"] = False
    if positions is not None:
        chosen["positions"] = choice("--positions", positions, ("true", "all"))
    if multiple is not None:
        chosen["multiple"] = multiple
    if min_bucket is not None:
        chosen["min_bucket"] = min_bucket
    settings = cast(DataConfig, chosen["data"])
    codec_options = {"--codec-path": codec_path}
    text_options = {"--text-encoder-path": text_encoder_path}
    if settings.text_encoder == "hashing":
        refuse(text_options, "which has no weights", "--text-encoder hashing")
    if settings.codec == "pixels":
        refuse(codec_options, "which has no weights", "--codec pixels")
    if chosen.get("with_text") is False:
        text_options |= {"--text-name": text_name, "--positions": positions, "--dtype": dtype}
        refuse(
            {**text_options, "--max-tokens": max_tokens}, "so that there are no embeddings", "no text encoder"
        )
    if settings.buckets == 1:
        shape_options = {"--bucket-aspect": bucket_aspect, "--min-bucket": min_bucket}
        refuse(shape_options, "so that all pictures become squares", "no --buckets")
    if engine == "local":
        ray_options = {"--workers": workers, "--address": address, "--gpus": gpus}
        refuse(ray_options, "which is this process alone", "--engine local")
    options = PrepareOptions(
        **cast(dict[str, Any], chosen),
        dtype=choice("--dtype", dtype or "int8", ("int8", "float16")),
        text_name=text_name,
        features=tuple(feature or ()),
        keep_images=keep_images,
        batch=batch,
        engine=choice("--engine", engine, ("local", "ray")),
        workers=workers or 2,
        address=address,
        gpus=gpus or 0.0,
        device=device,
        usd_per_hour=usd_per_hour,
        compact=compact,
        yes=yes,
        only_forecast=only_forecast,
    )
    with resumable():
        run_prepare(pictures, out, options, console)


def caption(
    store: StoreArgument,
    model: Annotated[str, typer.Option("--captioner", help="folder or hub name of an image-to-text model")],
    name: Annotated[str, typer.Option(help="of the new captions")] = "written",
    prompt: Annotated[str, typer.Option(help="what the model is asked, or how captions begin")] = "",
    max_tokens: Annotated[int, typer.Option(help="of a caption", min=1)] = 40,
    batch: Annotated[int, typer.Option(help="pictures at once", min=1)] = 8,
    text_encoder: Encoder = None,
    text_encoder_path: EncoderPath = None,
    encoder_tokens: Annotated[int | None, typer.Option(help="max_tokens of the encoder", min=2)] = None,
    device: Device = "auto",
) -> None:
    """Write captions for all pictures of a store, beside those it has; interrupted, it goes on.

    A store that holds embeddings needs their encoder too, so that the new captions are encoded as well.
    """
    from shoestring.preparing.prepare import run_caption

    encoder = None
    if text_encoder is not None:
        values: dict[str, Any] = {"text_encoder": text_encoder, "text_encoder_path": text_encoder_path}
        values |= {"max_tokens": encoder_tokens} if encoder_tokens else {}
        encoder = data_config(values, {"max_tokens": "--encoder-tokens"})
    else:
        encoder_options = {"--text-encoder-path": text_encoder_path, "--encoder-tokens": encoder_tokens}
        refuse(encoder_options, "so that nothing is encoded", "no --text-encoder")
    with resumable():
        run_caption(store, model, name, prompt, max_tokens, batch, device, encoder, console)
