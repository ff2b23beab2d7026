"""DreamBooth on the demo model: an invented subject in five poses, by LoRA and by all weights.

Run: python benchmarks/dreambooth.py runs/demo --out runs/dreambooth
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SIDE = 256
POSES = ((0, 0, 1.0, 0), (-26, 10, 0.85, -14), (24, -8, 0.9, 12), (6, 22, 0.75, 24), (-10, -18, 1.05, -6))
"""Shift to the right and down in pixels, size, turn in degrees."""
PURPLE, DARK, ORANGE, BLACK = "#8a3ffc", "#5a1fb0", "#ff9d2e", "#000000"


def robot(right: float, down: float, size: float, turn: float) -> Image.Image:
    """A purple robot with a cube for a head, an orange body and one eye, in the line style of emoji."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(picture)
    pen.line((128, 30, 128, 62), BLACK, 8)
    pen.ellipse((116, 14, 140, 38), ORANGE, BLACK, 6)
    pen.rectangle((68, 58, 188, 150), PURPLE, BLACK, 8)
    pen.ellipse((102, 78, 154, 130), "white", BLACK, 7)
    pen.ellipse((120, 94, 142, 116), BLACK)
    pen.rectangle((90, 154, 166, 214), ORANGE, BLACK, 8)
    for left in (52, 170):
        pen.rectangle((left, 158, left + 32, 178), DARK, BLACK, 6)
    for left in (94, 134):
        pen.rectangle((left, 214, left + 28, 242), DARK, BLACK, 6)
    turned = picture.rotate(turn, Image.Resampling.BICUBIC, fillcolor="white")
    width = round(SIDE * size)
    resized = turned.resize((width, width), Image.Resampling.LANCZOS)
    placed = Image.new("RGB", (SIDE, SIDE), "white")
    placed.paste(resized, (round((SIDE - width) / 2 + right), round((SIDE - width) / 2 + down)))
    return placed


def make_subject(folder: Path) -> None:
    """Write the five pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, pose in enumerate(POSES):
        robot(*pose).save(folder / f"robot-{number}.png")


def learn(base: Path, out: Path, seed: int, how: list[str], more: list[str]) -> dict[str, Any]:
    """Run the command, or read what it has measured."""
    result = out / "fidelity.json"
    if not result.is_file():
        words = ["adapt", "dreambooth", base, out.parent / "subject", "--class", "alien", "--template", "{}"]
        words += ["--seed", seed, "--out", out, *how, *more]
        subprocess.run([sys.executable, "-m", "shoestring.cli", *map(str, words)], check=True)
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def over(values: list[float]) -> str:
    """Mean and standard deviation over runs."""
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):6.3f} +- {spread:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, nargs="?", default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("runs/dreambooth"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("more", nargs="*", help="options of shoestring adapt dreambooth, after --")
    given = parser.parse_args()
    make_subject(given.out / "subject")
    for name, how in (("lora", ["--lora", "16"]), ("full", ["--full"])):
        runs = [
            learn(given.base, given.out / f"{name}-{seed}", seed, how, given.more)
            for seed in range(given.seeds)
        ]
        print(f"{name}, {len(runs)} runs")
        for label, path in (
            ("subject similarity before", ("subject", "before", "mean")),
            ("subject similarity after", ("subject", "after", "mean")),
            ("gain", ("subject", "gain", "mean")),
            ("class prompt, before", ("class", "before", "mean")),
            ("class prompt, after", ("class", "after", "mean")),
            ("class kept", ("class_kept", "mean")),
            ("other prompts kept", ("ordinary_kept", "mean")),
            ("retrieval top-5 before", ("retrieval", "before", "top5")),
            ("retrieval top-5 after", ("retrieval", "after", "top5")),
            ("retrieval top-5 lost", ("retrieval", "lost_top5")),
        ):
            values = []
            for run in runs:
                value: Any = run
                for key in path:
                    value = value[key]
                values.append(float(value))
            print(f"  {label:28s} {over(values)}")


if __name__ == "__main__":
    main()
