"""What a precompute costs beyond its work, and whether its forecast is right.

``python benchmarks/precompute.py`` prepares a store of photographs (smooth random JPEGs of 640 x 480) and, in
turns and in one process, does the same work without a store: read, decode, resize and encode in the same
batches and with as many threads, results thrown away. Reported are the medians of seconds by the clock and of
seconds of the processors (all threads; steadier on a busy machine), and their ratios; the bar is 1.10. The
codec is a small convolutional network with the moments of SDXL's (8 x 32 x 32 at 256 px); ``--codec-blocks``
makes it slower.

Then captions of 20 tokens on average at width 1024 join the latents, and the forecast is compared with the
bytes on the disk; the bars are 45 kB a record and 3 %.
"""

from __future__ import annotations

import os

# Before torch is imported: busy waiting collapses when anything else runs on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import io
import json
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor, nn

from shoestring.data.forecast import forecast
from shoestring.data.manifest import CaptionsColumn, Manifest, SourceFacts
from shoestring.data.pixels import decode, fit
from shoestring.data.precompute import Job, LatentsJob, Local, TextJob, prepare
from shoestring.data.store import CAPTIONS, RECORDS, Store, save_checksums, save_manifest
from shoestring.data.tables import child, commit_new, write_piece
from shoestring.data.units import Makers, ahead, filled_up
from shoestring.interfaces import Identity

SIDE = 256
BATCH = 32
MEAN_TOKENS = 20


class Codec:
    """A network of convolutions with the downsampling and the moments of SDXL's autoencoder."""

    name = "benchmark"
    identity = Identity("benchmark")
    channels, moment_channels, downsampling = 4, 8, 8
    moment_dtype = torch.float16

    def __init__(self, blocks: int) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 8, stride=8)]
        for _ in range(blocks):
            layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
        self._network = nn.Sequential(*layers, nn.Conv2d(32, 8, 1)).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Moments."""
        return self._network(pixels.float() / 127.5 - 1)

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A draw."""
        mean, log_variance = moments.chunk(2, dim=1)
        return mean + torch.exp(0.5 * log_variance) * noise

    def decode(self, latents: Tensor) -> Tensor:
        """Not needed here."""
        raise NotImplementedError


class Text:
    """Random embeddings of the shape of CLIP-H's, a token a word."""

    name = "benchmark"
    identity = Identity("benchmark")
    padding_carries_text = True
    width, max_tokens = 1024, 77

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode."""
        true_B = torch.tensor([min(len(text.split()), 77) for text in texts])
        # Equal rows would be stored once.
        generator = torch.Generator().manual_seed(zlib.crc32(texts[0].encode()))
        text_BSD = torch.randn(len(texts), 77, 1024, generator=generator)
        return text_BSD, torch.arange(77)[None] < true_B[:, None]


def jpeg(row: int, size: tuple[int, int]) -> bytes:
    draw = np.random.RandomState(row)
    small = Image.fromarray(draw.randint(0, 256, (30, 40, 3), np.uint8))
    pixels = np.asarray(small.resize(size, Image.Resampling.BICUBIC), np.float32)
    noisy = np.clip(pixels + draw.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_raw(uri: str, rows: int, unit_rows: int, different: int, size: tuple[int, int]) -> Store:
    jpegs = [jpeg(i, size) for i in range(different)]
    draw = np.random.RandomState(0)
    lengths = np.clip(np.rint(draw.lognormal(np.log(MEAN_TOKENS) - 0.08, 0.4, rows)), 2, 77).astype(int)
    texts = [" ".join(f"w{draw.randint(10000)}" for _ in range(length)) for length in lengths]
    schema = pa.schema([*RECORDS, ("caption_source", CAPTIONS), ("image", pa.binary())])
    pieces, text_pieces = [], []
    for start in range(0, rows, unit_rows):
        part = range(start, min(rows, start + unit_rows))
        columns = {
            "id": [f"r{i:08}" for i in part],
            "width": [size[0] for _ in part],
            "height": [size[1] for _ in part],
            "caption_source": [[i] for i in part],
            "image": [jpegs[i % len(jpegs)] for i in part],
        }
        pieces.append(write_piece(child(uri, "records"), pa.table(columns, schema=schema)))
        rows_of_text = pa.table({"text": [texts[i] for i in part]})
        text_pieces.append(write_piece(child(uri, "texts"), rows_of_text))
    records = commit_new(child(uri, "records"), schema, pieces)
    table = commit_new(child(uri, "texts"), pa.schema([("text", pa.string())]), text_pieces)
    versions = {"records": records.version, "texts": table.version, "checksums": save_checksums(uri, [])}
    manifest = Manifest(
        made_by="benchmark",
        records=rows,
        texts=rows,
        unit_rows=unit_rows,
        has_images=True,
        sources=(SourceFacts(kind="benchmark", path="", read=rows, kept=rows),),
        captions=(CaptionsColumn(name="source", origin="benchmark"),),
        tables=versions,
    )
    return save_manifest(uri, manifest)


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """By the clock, and of the processors."""
    began = time.monotonic(), time.process_time()
    work()
    return time.monotonic() - began[0], time.process_time() - began[1]


def without_store(raw: Store, codec: Codec, threads: int) -> None:
    """Read, decode, resize and encode everything."""

    def load(start: int) -> Tensor:
        rows = raw.take(range(start, min(start + BATCH, len(raw))), ["image"])
        pixels = [fit(decode(data.as_py(), SIDE), SIDE, SIDE) for data in rows["image"]]
        return torch.from_numpy(np.stack(pixels))

    for pixels in ahead(iter(range(0, len(raw), BATCH)), load, threads, 2):
        codec.encode(filled_up(pixels, BATCH)).half()


def with_store(raw: Store, codec: Codec, threads: int, out: Path) -> None:
    """Precompute the latents."""
    job = Job(latents=(LatentsJob("256", SIDE, ((SIDE, SIDE),)),), batch=BATCH)
    prepare(raw, str(out), job, Makers(lambda: codec), Local(threads))


def measure_overhead(folder: Path, rows: int, turns: int, blocks: int, threads: int) -> dict[str, float]:
    raw = make_raw(str(folder / "raw"), rows, min(1024, rows), 64, (640, 480))
    codec = Codec(blocks)
    plain, stored = [], []
    for turn in range(turns + 1):
        out = folder / f"out{turn}"
        one = seconds(lambda: without_store(raw, codec, threads))
        two = seconds(partial(with_store, raw, codec, threads, out))
        shutil.rmtree(out)
        if turn:  # the first warms up
            plain.append(one)
            stored.append(two)
    figures: dict[str, float] = {}
    for i, kind in enumerate(("by the clock", "of the processors")):
        alone = statistics.median(pair[i] for pair in plain)
        whole = statistics.median(pair[i] for pair in stored)
        figures |= {f"without a store, s {kind}": alone, f"prepare, s {kind}": whole}
        figures[f"ratio {kind}"] = whole / alone
    return figures


def measure_forecast(folder: Path, rows: int, threads: int) -> dict[str, float]:
    raw = make_raw(str(folder / "raw2"), rows, 1024, rows, (64, 48))
    job = Job(latents=(LatentsJob("256", SIDE, ((SIDE, SIDE),)),), text=(TextJob("clip"),), batch=BATCH)
    makers = Makers(lambda: Codec(1), {"clip": Text})
    said = forecast(raw, str(folder / "out"), job, makers, threads=threads)
    print(said)
    prepare(raw, str(folder / "out"), job, makers, Local(threads))
    real = sum(file.stat().st_size for file in (folder / "out").rglob("*") if file.is_file())
    return {
        "forecast, bytes a record": said.bytes_per_record,
        "on the disk, bytes a record": real / rows,
        "forecast / disk": said.bytes_total / real,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--forecast-rows", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--codec-blocks", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = measure_overhead(folder, given.rows, given.turns, given.codec_blocks, given.threads)
        figures |= measure_forecast(folder, given.forecast_rows, given.threads)
    for what, value in figures.items():
        print(f"{what}: {value:,.3f}")
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
