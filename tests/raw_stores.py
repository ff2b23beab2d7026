"""Small stores with pictures, as ``shoestring data ingest`` makes them, and small codecs and encoders."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from shoestring.data.manifest import CaptionsColumn, Manifest, SourceFacts
from shoestring.data.precompute import FeatureJob, Job, LatentsJob, TextJob, prepare
from shoestring.data.store import CAPTIONS, RECORDS, Store, save_checksums, save_manifest
from shoestring.data.tables import child, commit_new, write_piece
from shoestring.data.units import Makers
from shoestring.interfaces import Identity

SIZES = ((24, 24), (40, 20), (20, 40), (30, 24))
RAW = pa.schema([*RECORDS, ("caption_source", CAPTIONS), ("image", pa.binary())])


def picture(row: int) -> bytes:
    """A PNG of random pixels of one of four sizes."""
    width, height = SIZES[row % len(SIZES)]
    pixels = np.random.RandomState(row).randint(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    return file.getvalue()


def caption_of(row: int) -> str:
    """A caption of one to five words; every third is that of the row before."""
    row -= row % 3 == 2
    return " ".join(f"word{row}" for _ in range(1 + row % 5))


def make_raw(folder: Path, rows: int = 40, unit_rows: int = 16) -> Store:
    """A store of ``rows`` pictures (:func:`picture`) with a caption each (:func:`caption_of`)."""
    uri = str(folder)
    texts = list(dict.fromkeys(caption_of(i) for i in range(rows)))
    pieces = []
    for start in range(0, rows, unit_rows):
        part = range(start, min(rows, start + unit_rows))
        columns = {
            "id": [f"r{i:06}" for i in part],
            "width": [SIZES[i % len(SIZES)][0] for i in part],
            "height": [SIZES[i % len(SIZES)][1] for i in part],
            "caption_source": [[texts.index(caption_of(i))] for i in part],
            "image": [picture(i) for i in part],
        }
        pieces.append(write_piece(child(uri, "records"), pa.table(columns, schema=RAW)))
    records = commit_new(child(uri, "records"), RAW, pieces)
    schema = pa.schema([("text", pa.string())])
    text_pieces = [
        write_piece(child(uri, "texts"), pa.table({"text": texts[i : i + unit_rows]}, schema=schema))
        for i in range(0, len(texts), unit_rows)
    ]
    table = commit_new(child(uri, "texts"), schema, text_pieces)
    sums = [("records", f) for p in pieces for f in p.files]
    sums += [("texts", f) for p in text_pieces for f in p.files]
    manifest = Manifest(
        made_by="test",
        records=rows,
        texts=len(texts),
        unit_rows=unit_rows,
        has_images=True,
        sources=(SourceFacts(kind="test", path="", read=rows, kept=rows),),
        captions=(CaptionsColumn(name="source", origin="test"),),
        tables={"records": records.version, "texts": table.version, "checksums": save_checksums(uri, sums)},
    )
    return save_manifest(uri, manifest)


class MeanCodec:
    """Mean and log-variance of the pixels in squares of 4; two channels: red, and green minus blue."""

    name = "mean"
    channels = 2
    moment_channels = 4
    moment_dtype = torch.float16
    downsampling = 4

    def __init__(self, digest: str = "m1") -> None:
        self.identity = Identity("mean", digest=digest)

    def encode(self, pixels: Tensor) -> Tensor:
        rgb = pixels.float() / 127.5 - 1
        mean = torch.nn.functional.avg_pool2d(rgb, 4)
        square = torch.nn.functional.avg_pool2d(rgb.square(), 4)
        log_variance = (square - mean**2).clamp(min=1e-3).log()

        def two(values: Tensor) -> Tensor:
            return torch.stack([values[:, 0], values[:, 1] - values[:, 2]], 1)

        return torch.cat([two(mean), two(log_variance)], 1)

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        return 2 * (mean + torch.exp(0.5 * log_variance) * noise)

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


class SlowCodec(MeanCodec):
    """Takes 10 ms a batch, and what it says of a picture depends on all of the batch."""

    def encode(self, pixels: Tensor) -> Tensor:
        time.sleep(0.01)
        return super().encode(pixels) + pixels.float().mean() / 255 + 0.01 * len(pixels)


class WordText:
    """A random vector for each word, of width 8; at most 4 words."""

    name = "words"
    padding_carries_text = True

    def __init__(self, digest: str = "w1", max_tokens: int = 4, width: int = 8) -> None:
        self.identity = Identity("words", digest=digest)
        self.max_tokens = max_tokens
        self.width = width

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        text_BSD = torch.zeros(len(texts), self.max_tokens, self.width)
        mask_BS = torch.zeros(len(texts), self.max_tokens, dtype=torch.bool)
        mask_BS[:, 0] = True
        for b, text in enumerate(texts):
            words = text.split()[: self.max_tokens]
            mask_BS[b, : len(words)] = True
            for s in range(self.max_tokens):
                word = f"{words[s] if s < len(words) else text} {s} {self.identity.digest}"
                key = int.from_bytes(word.encode()[-4:], "little") % 2**31 + len(word)
                text_BSD[b, s] = torch.randn(self.width, generator=torch.Generator().manual_seed(key))
        return text_BSD, mask_BS


class MeanColour:
    """The mean colour of a picture."""

    name = "colour"
    width = 3

    def __init__(self, digest: str = "") -> None:
        self.identity = Identity("colour", digest=digest)

    def __call__(self, pixels: Tensor) -> Tensor:
        return pixels.float().mean((2, 3))


def job_of_tests() -> tuple[Job, Makers]:
    """A job of two resolutions, one mirrored and one with buckets, an encoder and a teacher."""
    latents = (
        LatentsJob("16", 16, ((16, 16), (12, 24), (24, 12))),
        LatentsJob("8", 8, ((8, 8),), mirrored=True),
    )
    job = Job(latents, (TextJob("t"),), (FeatureJob("colour", 24),), batch=4, text_batch=4)
    return job, Makers(SlowCodec, {"t": WordText}, {"colour": MeanColour})


def prepare_in_a_process(raw: str, out: str) -> None:
    """For tests that kill it."""
    torch.set_num_threads(1)
    prepare(Store(raw), out, *job_of_tests())


def prepare_through_ray(raw: str, out: str, address: str) -> None:
    """The same, through a Ray that runs already."""
    from shoestring.data.precompute_ray import RayEngine

    prepare(Store(raw), out, *job_of_tests(), RayEngine(workers=2, address=address))


def journal_lines(out: Path) -> int:
    """How many units a running precompute has finished, and one."""
    try:
        return (out / ".work" / "prepare" / "journal.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
