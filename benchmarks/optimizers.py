"""Muon against AdamW: the demo, three seeds of each, the same training time for both.

``python benchmarks/optimizers.py`` times some steps of both here, gives AdamW so many more images as it is
faster, trains and measures all runs one after another with ``shoestring demo``, and prints mean and spread.
Interrupted, the same command goes on. About three quarters of an hour on two cores; ``--share 0.5`` is half.
"""

from __future__ import annotations

import os

# Before torch is imported: busy waiting collapses when anything else runs on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from shoestring import recipes
from shoestring.runtime import keep_freed_memory, write_text
from shoestring.studies.measured_plan import measured_costs
from shoestring.training.display import read_log

KINDS = {"muon": [], "adamw": ["optimizer.kind=adamw"]}
ROWS = {
    "retrieval_top1": ("retrieval top-1", "{:.3f}"),
    "retrieval_top5": ("retrieval top-5", "{:.3f}"),
    "near_copies": ("near-copies", "{:.0f}"),
    "fd_efflite0": ("FD-EffLite0", "{:.1f}"),
    "kid_efflite0": ("KID", "{:.4f}"),
    "validation": ("validation loss", "{:.4f}"),
    "train_s": ("training, s", "{:.0f}"),
    "images_seen": ("images", "{:.0f}"),
}


def lengths(options: argparse.Namespace) -> dict[str, list[int]]:
    """Images of every stage for each optimiser, so that both take the same time; measured once and kept."""
    kept = options.out / "lengths.json"
    if kept.exists():
        return json.loads(kept.read_text())
    costs, found = {}, dict[str, list[int]]()
    for kind, changes in KINDS.items():
        config = recipes.resolve("demo", changes)
        costs[kind] = measured_costs(config, options.steps, None, Console())
    for kind in KINDS:
        found[kind] = []
        for muon, own, stage in zip(costs["muon"], costs[kind], config.stages, strict=True):
            images = options.share * stage.nimg * muon.cost.hours / own.cost.hours
            found[kind].append(round(images / stage.batch) * stage.batch)
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(kept, json.dumps(found) + "\n")
    return found


def run(options: argparse.Namespace, kind: str, seed: int, images: Sequence[int]) -> dict[str, float]:
    """One demo, unless it has been run already; its metrics."""
    folder = options.out / f"{kind}-{seed}"
    if not (folder / "metrics.json").exists():
        changes = [f"seed={seed}", *KINDS[kind], *(f"stages.{i}.nimg={n}" for i, n in enumerate(images))]
        words = [sys.executable, "-m", "shoestring.cli", "demo", *changes, "--out", str(folder)]
        subprocess.run(words, check=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    losses = [row["loss"] for row in read_log(folder) if row["kind"] == "validation"]
    return metrics | {"validation": losses[-1]}


def show(found: dict[str, list[dict[str, float]]]) -> None:
    """Print mean and standard deviation over the seeds."""
    print(f"\n{'mean ± standard deviation':26}" + "".join(f"{kind:>24}" for kind in found))
    for key, (name, form) in ROWS.items():
        cells = []
        for metrics in found.values():
            values = [each[key] for each in metrics]
            spread = form.format(statistics.stdev(values)) if len(values) > 1 else "one seed"
            cells.append(f"{form.format(statistics.mean(values))} ± {spread}")
        print(f"{name:26}" + "".join(f"{cell:>24}" for cell in cells))


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description="Muon against AdamW in the demo, at equal time.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=1.0, help="of the demo's images")
    parser.add_argument("--steps", type=int, default=12, help="of every stage, to measure the rates")
    parser.add_argument("--out", type=Path, default=Path("runs/optimizers"), help="folder of the runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the metrics of all runs here")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    images = lengths(options)
    print("images of the stages:", images, flush=True)
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for seed in options.seeds:
        for kind, metrics in found.items():
            metrics.append(run(options, kind, seed, images[kind]))
    show(found)
    if options.json is not None:
        write_text(options.json, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
