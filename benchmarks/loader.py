"""Records per second of the loader, warm and cold, beside a memory-mapped array and a PyTorch DataLoader.

All three give the same thing: batches of latents drawn from their posteriors and captions in float32, in
random order, from a store larger than 2 GB: moments of 8 x 32 x 32 float16 (256 px, SDXL's kind) and captions
of 20 tokens on average, 1,024 int8 wide. Cold = pages dropped by ``posix_fadvise`` before each turn. Turns
alternate; the fastest of each counts.

    python benchmarks/loader.py [--rows 60000] [--folder runs/bench-loader]
    python benchmarks/loader.py --memory     # growth of memory over 50 epochs of a store with buckets
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from shoestring.data.compact import compact
from shoestring.data.manifest import CaptionsColumn, LatentsColumn, Manifest, SourceFacts, TextColumn
from shoestring.data.members import Member
from shoestring.data.store import CAPTIONS, RECORDS, Store, save_checksums, save_manifest
from shoestring.data.store_rows import Mixing, StoreData
from shoestring.data.tables import child, commit_new, write_piece
from shoestring.encoders.image import PixelCodec
from shoestring.interfaces import Identity
from shoestring.runtime import keep_freed_memory, write_text

UNIT, WIDTH, LONGEST = 1024, 1024, 28
SQUARE = ((256, 256),)
WIDE = ((256, 256), (192, 336), (336, 192))


class Posterior(PixelCodec):
    """Draws from moments, as the codec of an autoencoder does."""

    channels = 4

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Mean + std * noise."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        return 0.13 * (mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise)


def build(folder: Path, rows: int, buckets: tuple[tuple[int, int], ...], unit: int = UNIT) -> Store:
    """A store of random numbers, beside it (squares only) the same records for the other two loaders."""
    uri = str(folder)
    counts = tuple(len(range(b, rows, len(buckets))) for b in range(len(buckets)))
    latents = LatentsColumn(
        name="256",
        codec=Identity("random"),
        resolution=256,
        buckets=buckets,
        counts=counts,
        channels=4,
        moment_channels=8,
        downsampling=8,
        dtype="float16",
        mean=(0.0,) * 4,
        std=(1.0,) * 4,
        sigma=1.0,
    )
    text = TextColumn(
        name="t", encoder=Identity("random"), width=WIDTH, max_tokens=77, positions="true", dtype="int8"
    )
    sizes = [2 * int(np.prod(latents.shape(b))) for b in range(len(buckets))]
    kind = pa.binary(sizes[0]) if len(buckets) == 1 else pa.binary()
    schema = pa.schema(
        [*RECORDS, ("caption_source", CAPTIONS), (latents.column, kind), (latents.bucket_column, pa.int16())]
    )
    text_schema = pa.schema(
        [("text", pa.string()), *zip(text.columns, (pa.binary(), pa.binary(), pa.int32()), strict=True)]
    )
    pieces, text_pieces = [], []
    for start in range(0, rows, unit):
        part = range(start, min(rows, start + unit))
        random = np.random.default_rng(start)
        bucket = [i % len(buckets) for i in part]
        tokens = random.integers(12, LONGEST + 1, len(part))
        half = [random.standard_normal(sizes[b] // 2).astype(np.float16).tobytes() for b in bucket]
        columns = [
            [f"{i:08}" for i in part],
            [256] * len(part),
            [256] * len(part),
            [[i] for i in part],
            half,
            bucket,
        ]
        pieces.append(write_piece(child(uri, "records"), pa.table(columns, schema=schema)))
        scale = [random.random(n).astype(np.float16).tobytes() for n in tokens]
        text_columns = [
            [f"caption {i}" for i in part],
            [random.bytes(WIDTH * n) for n in tokens],
            scale,
            tokens,
        ]
        text_pieces.append(write_piece(child(uri, "texts"), pa.table(text_columns, schema=text_schema)))
    records = commit_new(child(uri, "records"), schema, pieces)
    texts = commit_new(child(uri, "texts"), text_schema, text_pieces)
    sums = [(t, f) for t, ps in (("records", pieces), ("texts", text_pieces)) for p in ps for f in p.files]
    return save_manifest(
        uri,
        Manifest(
            made_by="benchmark",
            records=rows,
            texts=rows,
            unit_rows=unit,
            has_images=False,
            sources=(SourceFacts(kind="random", path="", read=rows, kept=rows),),
            captions=(CaptionsColumn(name="source", origin="random"),),
            latents=(latents,),
            text=(text,),
            tables={
                "records": records.version,
                "texts": texts.version,
                "checksums": save_checksums(uri, sums),
            },
        ),
    )


def data_of(store: Store) -> StoreData:
    """Everything in the store, as training would read it."""
    latents, text = store.latents("256"), store.text("t")
    bucket = np.zeros(len(store), np.int64)
    if len(latents.buckets) > 1:
        bucket = store.records.to_table(columns=[latents.bucket_column])[latents.bucket_column].to_numpy()
    rows = tuple(np.flatnonzero(bucket == b) for b in range(len(latents.buckets)))
    member = Member(store, latents, text, (store.captions("source"),), rows)
    return StoreData((member,), Posterior(), Mixing())


def drawn(moments: Tensor, seed: int) -> Tensor:
    """Latents, with fresh noise."""
    noise = torch.randn(len(moments), 4, *moments.shape[2:], generator=torch.Generator().manual_seed(seed))
    return Posterior().latents(moments, noise)


def ours(store: Store, batch: int, batches: int, start: int) -> int:
    """Batches of ``StoreData``, two of them prepared ahead in threads."""
    data, seen = data_of(store), 0
    for k in range(start, start + batches):
        rows = data.batch(0, k * batch, batch)
        assert rows.text_BSD is not None
        seen += len(drawn(rows.moments_BMhw, k))
    data.close()
    return seen


def mapped(folder: Path, rows: int, batch: int, batches: int, start: int) -> int:
    """The same from plain arrays on disk, captions padded to one length; no threads."""
    moments = np.memmap(folder / "moments.bin", np.float16, "r", shape=(rows, 8, 32, 32))
    tokens = np.memmap(folder / "tokens.bin", np.int8, "r", shape=(rows, LONGEST, WIDTH))
    scales = np.memmap(folder / "scales.bin", np.float16, "r", shape=(rows, LONGEST))
    order = np.random.default_rng(start)
    seen = 0
    for k in range(batches):
        index = np.sort(order.integers(0, rows, batch))
        text_BSD = torch.from_numpy(
            tokens[index].astype(np.float32) * scales[index].astype(np.float32)[..., None]
        )
        seen += len(drawn(torch.from_numpy(moments[index]), k)) * bool(len(text_BSD))
    return seen


class _Collate:
    """Rows of ``datasets`` to a batch."""

    def __call__(self, rows: list[dict[str, bytes]]) -> tuple[Tensor, Tensor]:
        moments = np.stack([np.frombuffer(row["moments"], np.float16).reshape(8, 32, 32) for row in rows])
        tokens = [np.frombuffer(row["tokens"], np.int8).reshape(-1, WIDTH) for row in rows]
        text_BSD = np.zeros((len(rows), max(map(len, tokens)), WIDTH), np.float32)
        for b, (values, row) in enumerate(zip(tokens, rows, strict=True)):
            scale = np.frombuffer(row["scale"], np.float16).astype(np.float32)
            text_BSD[b, : len(values)] = values * scale[:, None]
        return torch.from_numpy(moments), torch.from_numpy(text_BSD)


def over_datasets(folder: Path, batch: int, batches: int, start: int) -> int:
    """The same from a ``datasets`` folder by a DataLoader with two worker processes."""
    import datasets

    source = datasets.load_from_disk(str(folder / "datasets"))
    order = np.random.default_rng(start).integers(0, len(source), (batches, batch)).tolist()
    loader = torch.utils.data.DataLoader(source, batch_sampler=order, num_workers=2, collate_fn=_Collate())
    return sum(len(drawn(moments, k)) for k, (moments, _) in enumerate(loader))


def others(folder: Path, store: Store) -> None:
    """The records of a store as plain arrays and as a ``datasets`` folder."""
    import datasets

    if (folder / "datasets").exists():
        return
    datasets.disable_progress_bars()
    text = store.text("t").columns
    with (
        (folder / "moments.bin").open("wb") as moments,
        (folder / "tokens.bin").open("wb") as tokens,
        (folder / "scales.bin").open("wb") as scales,
    ):
        for batch in store.records.to_batches(columns=["moments_256"]):
            moments.writelines(batch["moments_256"].to_pylist())
        for batch in store.texts.to_batches(columns=text):
            tokens.writelines(v.ljust(LONGEST * WIDTH, b"\0") for v in batch[text[0]].to_pylist())
            scales.writelines(v.ljust(LONGEST * 2, b"\0") for v in batch[text[1]].to_pylist())

    def rows() -> Iterator[dict[str, bytes]]:
        pairs = zip(
            store.records.to_batches(columns=["moments_256"], batch_size=UNIT),
            store.texts.to_batches(columns=text, batch_size=UNIT),
            strict=True,
        )
        for records, texts in pairs:
            for m, t, s in zip(records["moments_256"], texts[text[0]], texts[text[1]], strict=True):
                yield {"moments": m.as_py(), "tokens": t.as_py(), "scale": s.as_py()}

    features = datasets.Features({name: datasets.Value("binary") for name in ("moments", "tokens", "scale")})
    made = datasets.Dataset.from_generator(rows, features=features, cache_dir=str(folder / "cache"))
    made.save_to_disk(str(folder / "datasets"))


def drop_pages(folder: Path) -> None:
    """Forget what the system keeps of all files below a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def measure(folder: Path, rows: int, batch: int, batches: int, turns: int) -> list[dict[str, Any]]:
    """Print the table; returns its rows."""
    uri = folder / "store"
    if not (uri / "manifest").exists():
        build(uri, rows, SQUARE)
        compact(str(uri)).clean()
    store = Store(str(uri))
    rows = len(store)
    others(folder, store)
    size = sum(p.stat().st_size for p in uri.rglob("*") if p.is_file())
    print(f"store: {rows:,} records, {size / 1e9:.2f} GB, {size / rows / 1e3:.1f} kB a record; batch {batch}")
    ways: dict[str, Callable[[int], int]] = {
        "shoestring": lambda start: ours(store, batch, batches, start),
        "memory-mapped": lambda start: mapped(folder, rows, batch, batches, start),
        "DataLoader": lambda start: over_datasets(folder, batch, batches, start),
    }
    best: dict[tuple[str, str], float] = {}
    for turn in range(turns):
        for name, way in ways.items():
            for state in ("cold", "warm"):
                if state == "cold":
                    drop_pages(folder)
                elif turn == 0:
                    for path in folder.rglob("*"):
                        _ = path.is_file() and path.read_bytes()
                began = time.perf_counter()
                seen = way(turn * batches)
                rate = seen / (time.perf_counter() - began)
                best[name, state] = max(best.get((name, state), 0.0), rate)
    print(f"{'records/s':>16} {'warm':>9} {'cold':>9}  warm / ours")
    for name in ways:
        warm, cold = best[name, "warm"], best[name, "cold"]
        print(f"{name:>16} {warm:9,.0f} {cold:9,.0f}  {warm / best['shoestring', 'warm']:.2f}")
    return [
        {"loader": name, "warm_per_s": best[name, "warm"], "cold_per_s": best[name, "cold"], "bytes": size}
        for name in ways
    ]


def resident_mb() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def memory(folder: Path, rows: int, batch: int, epochs: int) -> list[dict[str, Any]]:
    """Print how memory grows over epochs of a store with three shapes; returns the rows."""
    uri = folder / "buckets"
    store = Store(str(uri)) if (uri / "manifest").exists() else build(uri, rows, WIDE)
    data = data_of(store)
    per_epoch, table = len(store) // batch, []
    for epoch in range(epochs):
        for k in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            data.batch(0, k * batch, batch)
        if epoch in (0, 1, 4, 9, 19, 29, 39, epochs - 1):
            table.append({"epoch": epoch + 1, "resident_mb": resident_mb()})
            print(f"epoch {epoch + 1:3}: {resident_mb():7.1f} MB", flush=True)
    data.close()
    return table


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-loader"))
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()  # as the command line does
    if options.memory:
        table = memory(options.folder, min(options.rows, 3_000), 64, options.epochs)
    else:
        table = measure(options.folder, options.rows, options.batch, options.batches, options.turns)
    if options.json is not None:
        write_text(options.json, json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
