"""Reference statistics of real pictures, of a folder or of a store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from shoestring import __version__
from shoestring.data.pixels import Unusable, decode, fit
from shoestring.data.store import Store
from shoestring.data.tables import child, reading, table_exists
from shoestring.evaluation.features import build_extractor
from shoestring.evaluation.moments import Moments, RunningMoments, write_moments
from shoestring.runtime import UserError, say
from shoestring.tensors import UInt8

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
PIECES = 64
"""Of features, taken into the moments together."""
ROWS = 64
"""Records of a store that are read together."""


def make_stats(
    place: str,
    out: Path,
    extractor: str,
    weights: str | None,
    resize: str | None,
    side: int | None,
    device: torch.device,
    console: Console,
) -> Moments:
    """Look at all pictures of a folder or store and write the moments of their features.

    Args:
        place: folder of pictures, at any depth, or folder or URL of a store that keeps its originals.
        out: file to write.
        extractor: name of the features.
        weights: place of the extractor's weights.
        resize: of inception.
        side: the middle of each picture is brought to a square of this side first, as for training;
            ``None`` = pictures as they are.
        device: where to run.
        console: where a person reads.

    Returns:
        What was written.

    Raises:
        UserError: if there are too few pictures, or one cannot be read.
    """
    if out.suffix != ".npz":
        raise UserError(f"--out is {out}; statistics are a file that ends in .npz")
    if side is not None and side < 1:
        raise UserError(f"--side is {side}; it must be at least 1")
    count, pictures = _stored(place) if table_exists(child(place, "manifest")) else _in_folder(Path(place))
    if count < 2:
        raise UserError(f"{place} holds {count} pictures; at least 2 are needed, thousands for distances")
    network = build_extractor(extractor, weights, device, resize)
    console = console if console.quiet else Console(stderr=True)
    shown = track(pictures, description="Looking at pictures", total=count, console=console, transient=True)
    sizes: Counter[tuple[int, int]] = Counter()

    def pixels() -> Iterator[Tensor]:
        for name, file in shown:
            picture = _pixels(name, file, side)
            sizes[picture.shape[2], picture.shape[1]] += 1
            yield picture

    # Pooled features, and beside those of Inception the spatial ones.
    running = [RunningMoments() for _ in network.widths[:2]]
    waiting: list[tuple[Tensor, ...]] = []

    def take_in() -> None:
        for moments, column in zip(running, zip(*waiting, strict=True), strict=False):
            moments.add(torch.cat(column))
        waiting.clear()

    for piece in network.pieces(pixels()):
        waiting.append(piece)
        if len(waiting) == PIECES:
            take_in()
    if waiting:
        take_in()
    if len(sizes) > 1:
        (most, _), *_ = sizes.most_common(1)
        say(
            console,
            f"Note: the pictures have {len(sizes)} sizes, most often {most[0]} x {most[1]}; each was brought "
            f"to {network.side} x {network.side}, whatever its proportions; --side would take the middle",
        )
    made = {
        "extractor": network.identity.digest,
        "name": network.name,
        "resize": network.resize,
        "side": "as they are" if side is None else str(side),
        "filter": "none" if side is None else "Pillow Lanczos, the middle",
        "shoestring": __version__,
    }
    moments, *others = (each.moments(made) for each in running)
    write_moments(out, moments, *others)
    return moments


def _in_folder(folder: Path) -> tuple[int, Iterable[tuple[str, Path | bytes]]]:
    """How many pictures, and their names and files."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS)
    return len(files), ((str(file), file) for file in files)


def _stored(uri: str) -> tuple[int, Iterable[tuple[str, Path | bytes]]]:
    store = Store(uri)
    if not store.manifest.has_images:
        raise UserError(
            f"{uri} does not keep the original pictures; make statistics of the pictures that it was made of"
        )
    return len(store), _records(store)


def _records(store: Store) -> Iterator[tuple[str, bytes]]:
    with reading(f"pictures of {store.uri}"):
        for batch in store.records.to_batches(columns=["id", "image"], batch_size=ROWS):
            for name, data in zip(batch["id"].to_pylist(), batch["image"].to_pylist(), strict=True):
                yield f"{store.uri}, record {name}", data


def _pixels(name: str, file: Path | bytes, side: int | None) -> UInt8[Tensor, "3 H W"]:
    try:
        picture = decode(file)
    except Unusable as reason:
        raise UserError(f"{name}: {reason}") from reason
    height, width = (picture.height, picture.width) if side is None else (side, side)
    return torch.from_numpy(fit(picture, height, width, exact=True))
