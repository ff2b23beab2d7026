"""``shoestring data``: from pictures to a store, and what can be done with a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from rich.console import Console

from shoestring import recipes
from shoestring.config import DataConfig
from shoestring.runtime import UserError, say

console = Console()
app = typer.Typer(help="Make stores of captioned pictures, look at them, check them.", no_args_is_help=True)

StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="folder or URL of a store")]
OutStore = Annotated[str, typer.Option("--out", help="folder or URL of the store to make")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps")]
Codec = Annotated[
    str | None,
    typer.Option(help="pixels, autoencoder-kl, autoencoder-dc, autoencoder-tiny or taef2"),
]
CodecPath = Annotated[str | None, typer.Option(help="folder or hub name of the codec's weights")]
Encoder = Annotated[str | None, typer.Option(help="hashing, minilm, clip, t5 or none")]
EncoderPath = Annotated[str | None, typer.Option(help="folder or hub name of the encoder's weights")]


def _choice(option: str, value: str, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise UserError(f"{option} is {value!r}; choose from {', '.join(allowed)}")
    return value


@app.command()
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
    with JobLine(console) as line:
        store = run(reader, out, filters, licence=licence, threads=threads, progress=line.items)
    facts = store.manifest.sources[0]
    say(console, f"{facts.read:,} read, {facts.kept:,} kept, {sum(facts.rejected.values()):,} rejected")
    if facts.rejected:
        say(
            console, f"rejected: {summary(facts.rejected)}; each is listed by: shoestring data rejected {out}"
        )
    say(console, f"Next: shoestring data prepare {out} --out STORE --recipe NAME")


@app.command()
def sets() -> None:
    """List the published sets that ingest knows, with where each is had."""
    from shoestring.data.published import PUBLISHED

    for each in PUBLISHED.values():
        doubt = "" if each.confirmed else "; names of files and columns are not confirmed"
        say(console, f"{each.name:13} {each.title}: about {each.pictures:,} pictures, {each.home}{doubt}")
        say(console, f"{'':13} licence: {each.licence}")
        if each.prepare:
            say(console, f"{'':13} before: {each.prepare}")


@app.command()
def rejected(store: StoreArgument) -> None:
    """List what ingestion left out, with the reason."""
    from shoestring.data.ingest import rejections
    from shoestring.data.store import Store

    for row in rejections(Store(store)).to_pylist():
        say(console, f"{row['item']}\t{row['kind']}\t{row['reason']}")


@app.command()
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
        str, typer.Option(help="of the embeddings: int8 (a scale each token) or float16")
    ] = "int8",
    feature: Annotated[list[str] | None, typer.Option(help="teacher: efflite0; may be repeated")] = None,
    keep_images: Annotated[bool, typer.Option(help="take over the original files")] = False,
    batch: Annotated[int, typer.Option(help="pictures encoded at once", min=1)] = 32,
    engine: Annotated[str, typer.Option(help="local or ray")] = "local",
    workers: Annotated[int, typer.Option(help="ray: actors", min=1)] = 2,
    address: Annotated[
        str | None, typer.Option(help="ray: cluster, e.g. auto [default: this machine]")
    ] = None,
    gpus: Annotated[float, typer.Option(help="ray: GPUs of an actor", min=0)] = 0.0,
    device: Device = "auto",
    usd_per_hour: Annotated[float, typer.Option(help="price of a machine", min=0)] = 0.0,
    only_forecast: Annotated[bool, typer.Option("--forecast", help="only print what it would take")] = False,
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
    chosen["data"] = _data_config(data | {key: value for key, value in given.items() if value is not None})
    if resolution:
        chosen["resolutions"] = tuple(dict.fromkeys(resolution))
    if "resolutions" not in chosen:
        raise UserError(
            "no resolution is given; add --resolution 256, or --recipe NAME to take those of a recipe"
        )
    if text_encoder is not None:
        chosen["with_text"] = text_encoder != "none"
    if positions is not None:
        chosen["positions"] = _choice("--positions", positions, ("true", "all"))
    if multiple is not None:
        chosen["multiple"] = multiple
    if min_bucket is not None:
        chosen["min_bucket"] = min_bucket
    options = PrepareOptions(
        **cast(dict[str, Any], chosen),
        dtype=_choice("--dtype", dtype, ("int8", "float16")),
        text_name=text_name,
        features=tuple(feature or ()),
        keep_images=keep_images,
        batch=batch,
        engine=_choice("--engine", engine, ("local", "ray")),
        workers=workers,
        address=address,
        gpus=gpus,
        device=device,
        usd_per_hour=usd_per_hour,
        yes=yes,
        only_forecast=only_forecast,
    )
    run_prepare(pictures, out, options, console)


def _data_config(values: dict[str, Any]) -> DataConfig:
    from pydantic import ValidationError

    try:
        return DataConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise UserError(f"{option} is {first['input']!r}: {first['msg'].lower()}") from error


@app.command()
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
        encoder = _data_config(values | ({"max_tokens": encoder_tokens} if encoder_tokens else {}))
    run_caption(store, model, name, prompt, max_tokens, batch, device, encoder, console)


@app.command()
def info(store: StoreArgument) -> None:
    """What is in a store, and what made it."""
    from shoestring.data.describe import info as text
    from shoestring.data.store import Store

    say(console, text(Store(store)))


@app.command()
def stats(
    store: StoreArgument,
    codec: Codec = None,
    codec_path: CodecPath = None,
    count: Annotated[int, typer.Option(help="pictures whose latents are measured anew", min=1)] = 2048,
    device: Device = "auto",
) -> None:
    """Captions, sizes and latents in numbers; latents are measured anew and compared."""
    from shoestring.data.describe import stats as text
    from shoestring.data.store import Store
    from shoestring.preparing.prepare import store_codec

    opened = Store(store)
    say(console, text(opened, store_codec(opened, codec, codec_path, device), count))


@app.command()
def verify(store: StoreArgument) -> None:
    """Read a store to the last byte and compare it with its checksums; exit code 1 if anything is wrong."""
    from shoestring.data.verify import verify as run
    from shoestring.preparing.progress import JobLine

    with JobLine(console) as line:
        found = run(store, line.bytes)
    for sentence in found.problems:
        say(console, sentence)
    for sentence in found.notes:
        say(console, f"note: {sentence}")
    if found.problems:
        raise typer.Exit(1)
    say(console, f"{store} is whole")


@app.command()
def sample(
    store: StoreArgument,
    out: Annotated[Path, typer.Option(help="the picture to write")] = Path("sample.png"),
    count: Annotated[int, typer.Option(help="records", min=1, max=400)] = 24,
    seed: Annotated[int, typer.Option(help="of the choice", min=0)] = 0,
    originals: Annotated[bool, typer.Option("--originals", help="the files instead of the latents")] = False,
    latents: Annotated[str | None, typer.Option(help="column [default: the largest resolution]")] = None,
    codec: Codec = None,
    codec_path: CodecPath = None,
    device: Device = "auto",
) -> None:
    """Draw a sheet of records: what training sees, decoded, with captions."""
    from shoestring.data.store import Store
    from shoestring.preparing.prepare import store_codec
    from shoestring.preparing.sheet import draw_sheet

    opened = Store(store)
    decoder = None if originals else store_codec(opened, codec, codec_path, device)
    shown = draw_sheet(opened, out, count, seed, decoder, latents)
    say(console, f"{len(shown)} of {len(opened):,} records: {out}")


@app.command("export-mds")
def export_mds(
    store: StoreArgument,
    out: Annotated[Path, typer.Option("--out", help="folder to make")],
    latents: Annotated[list[str] | None, typer.Option(help="columns [default: all]")] = None,
    text: Annotated[str | None, typer.Option(help="embeddings [default: the first]")] = None,
    captions: Annotated[str | None, typer.Option(help="captions [default: the first]")] = None,
    seed: Annotated[int, typer.Option(help="of the posterior's draws", min=0)] = 0,
    codec: Codec = None,
    codec_path: CodecPath = None,
    device: Device = "auto",
) -> None:
    """Write latents and embeddings as an MDS folder in MicroDiT's columns."""
    from shoestring.data.mds_export import export_mds as run
    from shoestring.data.store import Store
    from shoestring.preparing.prepare import store_codec
    from shoestring.preparing.progress import JobLine

    opened = Store(store)
    columns = list(latents or [column.name for column in opened.manifest.latents])
    names = [column.name for column in opened.manifest.text]
    if text is None and not names:
        raise UserError(f"{store} holds no embeddings; add them with data prepare --positions all")
    with JobLine(console) as line:
        decoder = store_codec(opened, codec, codec_path, device)
        number = run(opened, out, columns, text or names[0], decoder, captions, seed, progress=line.show)
    say(console, f"Done: {number:,} samples in {out}")


@app.command("import-mds")
def import_mds(
    folder: Annotated[Path, typer.Argument(help="MDS folder with latents_... and caption_latents")],
    out: OutStore,
    codec: Annotated[str, typer.Option(help="what made the latents: name, or name@revision")],
    text_encoder: Annotated[str | None, typer.Option(help="what made the embeddings, likewise")] = None,
    channels: Annotated[int, typer.Option(help="of the latents", min=1)] = 4,
    width: Annotated[int, typer.Option(help="of the embeddings", min=1)] = 1024,
    text_name: Annotated[str, typer.Option(help="name of the embeddings in the store")] = "text",
    dtype: Annotated[str, typer.Option(help="of the embeddings: float16 or int8")] = "float16",
    scale: Annotated[float, typer.Option(help="times this the stored values are model latents")] = 1.0,
    licence: Annotated[str, typer.Option(help="for the record")] = "",
) -> None:
    """Make a store of ready latents, as MicroDiT and Nitro-E write them; interrupted, it goes on."""
    from shoestring.data.mds_import import Declared
    from shoestring.data.mds_import import import_mds as run
    from shoestring.interfaces import Identity
    from shoestring.preparing.progress import JobLine

    def identity(text: str) -> Identity:
        name, _, revision = text.partition("@")
        return Identity(name, revision=revision)

    declared = Declared(
        identity(codec),
        None if text_encoder is None else identity(text_encoder),
        channels,
        width,
        text_name,
        cast(Literal["int8", "float16"], _choice("--dtype", dtype, ("int8", "float16"))),
        scale,
        licence,
    )
    with JobLine(console) as line:
        store = run(folder, out, declared, progress=line.show)
    say(console, f"Done: {len(store):,} records in {out}")


@app.command()
def merge(
    stores: Annotated[list[str], typer.Argument(metavar="STORE...", help="two or more, with equal columns")],
    out: OutStore,
    suffix: Annotated[bool, typer.Option("--suffix", help="give ids that repeat an ending")] = False,
) -> None:
    """Join stores to one; interrupted, the same command goes on."""
    from shoestring.data.merge import merge as run
    from shoestring.data.store import Store
    from shoestring.preparing.progress import JobLine

    with JobLine(console) as line:
        store = run([Store(uri) for uri in stores], out, "suffix" if suffix else "refuse", line.show)
    say(console, f"Done: {len(store):,} records in {out}")


@app.command()
def clean(store: StoreArgument) -> None:
    """Remove versions that are neither the newest nor pinned by a run; only while nobody writes."""
    from shoestring.data.describe import size_text
    from shoestring.data.store import Store

    say(console, f"{size_text(Store(store).clean())} freed")
