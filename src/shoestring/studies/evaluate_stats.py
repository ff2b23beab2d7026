"""Reference statistics of a folder of real pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from shoestring import __version__
from shoestring.evaluation.features import build_extractor
from shoestring.evaluation.moments import Moments, write_moments
from shoestring.runtime import UserError
from shoestring.sampling.generate import read_pixels

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def make_stats(
    folder: Path,
    out: Path,
    extractor: str,
    weights: str | None,
    resize: str | None,
    device: torch.device,
    console: Console,
) -> Moments:
    """Look at all pictures of a folder and write the moments of their features.

    Args:
        folder: of pictures, at any depth.
        out: file to write.
        extractor: name of the features.
        weights: place of the extractor's weights.
        resize: of inception.
        device: where to run.
        console: where a person reads.

    Returns:
        What was written.

    Raises:
        UserError: if there are too few pictures, or one cannot be read.
    """
    if out.suffix != ".npz":
        raise UserError(f"--out is {out}; statistics are a file that ends in .npz")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS)
    if len(files) < 2:
        raise UserError(
            f"{folder} holds {len(files)} pictures; at least 2 are needed, thousands for distances"
        )
    network = build_extractor(extractor, weights, device, resize)
    console = Console(stderr=True) if not console.quiet else console
    rows = [
        network(read_pixels(file)[None])
        for file in track(files, description="Looking at pictures", console=console, transient=True)
    ]
    made = {
        "extractor": network.identity.digest,
        "name": network.name,
        "resize": network.resize,
        "shoestring": __version__,
    }
    moments = Moments.of(torch.cat(rows), made)
    write_moments(out, moments)
    return moments
