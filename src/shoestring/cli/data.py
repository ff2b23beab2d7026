"""``shoestring data``: from pictures to a store, and what can be done with a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer
from rich.console import Console

from shoestring.cli import making
from shoestring.cli.options import Codec, CodecPath, Device, OutStore, StoreArgument, choice, resumable
from shoestring.runtime import UserError, say

console = Console()
app = typer.Typer(help="Make stores of captioned pictures, look at them, check them.", no_args_is_help=True)
for command in (making.ingest, making.sets, making.rejected, making.prepare, making.caption):
    app.command()(command)


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
        cast(Literal["int8", "float16"], choice("--dtype", dtype, ("int8", "float16"))),
        scale,
        licence,
    )
    with resumable(), JobLine(console) as line:
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

    with resumable(), JobLine(console) as line:
        store = run([Store(uri) for uri in stores], out, "suffix" if suffix else "refuse", line.show)
    say(console, f"Done: {len(store):,} records in {out}")


@app.command()
def compact(store: StoreArgument) -> None:
    """Join small fragments to large ones, of which random rows are read half again as fast."""
    from shoestring.data.compact import compact as run

    made = run(store)
    say(console, f"{store}: version {made.version}; older ones are removed by: shoestring data clean {store}")


@app.command()
def unpin(
    store: StoreArgument,
    pin: Annotated[str, typer.Argument(help="name of the pin, as data info shows it")],
) -> None:
    """Give up the version that a run has pinned, so that clean may remove it."""
    from shoestring.data.describe import pins
    from shoestring.data.store import Store

    opened = Store(store)
    if pin not in pins(opened):
        raise UserError(f"{store} has no pin {pin!r}; it has {', '.join(pins(opened)) or 'none'}")
    opened.unpin(pin)
    say(console, f"{store}: {pin} is given up")


@app.command()
def clean(store: StoreArgument) -> None:
    """Remove versions that are neither the newest nor pinned by a run; only while nobody writes."""
    from shoestring.data.describe import size_text
    from shoestring.data.store import Store

    say(console, f"{size_text(Store(store).clean())} freed")
