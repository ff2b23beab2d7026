"""What int8 and bf16 files cost and save: ``python benchmarks/shrink.py [RUN] [--pictures N]``.

Prints, for a run or for a drawn network of MicroDiT Tiny/2: size of each file as a share of float32's,
and how far latents drawn from the same noise are from those of float32 (relative error of the norm, and
PSNR with their own range as peak).

Files in int8 and bf16 are read back to float32, so what a file holds does not change the speed, which is
printed too, the files taken in turns; and beside it that of computing in bf16 (autocast), which is a setting
of the run.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from shoestring import recipes
from shoestring.config import RunConfig
from shoestring.diffusion.process import build_process
from shoestring.export.file import stored
from shoestring.interfaces import Conditioning
from shoestring.models.files import ModelFacts, build_network, find_model, load_model, save_model
from shoestring.runtime import PRECISIONS, stream
from shoestring.sampling.generate import initial_noise, sample_latents

ROUNDS, STEPS = 5, 8


def drawn(folder: Path) -> Path:
    """A model file of MicroDiT Tiny/2 whose weights are drawn, every gate open."""
    config = recipes.get("microdit-tiny2")
    network = build_network(config, stream(0, "shrink"))
    draw = stream(1, "shrink")
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02, generator=draw)
    save_model(
        folder / "drawn.safetensors", network.state_dict(), config, ModelFacts(0, "trained", 0.9, 1.0, 256)
    )
    return folder / "drawn.safetensors"


def condition(config: RunConfig, count: int) -> Conditioning:
    """Random captions, or the first classes."""
    model = config.model
    if model.condition == "text":
        tokens = torch.randn(count, config.data.max_tokens, model.caption_dim, generator=stream(2, "shrink"))
        return Conditioning(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))
    if model.condition == "class":
        return Conditioning(class_B=torch.arange(count) % model.classes)
    return Conditioning.nothing(count)


class Drawer:
    """One file in memory, computing in one precision."""

    def __init__(self, file: Path, count: int, side: int, precision: str = "fp32") -> None:
        self.config, network, facts = load_model(file)
        self.process = build_process(self.config.process, facts.sigma_data)
        self.denoiser = self.process.denoiser(network, PRECISIONS[precision])
        self.noise = initial_noise(0, range(count), (self.config.model.in_channels, side, side))
        self.given = condition(self.config, count)
        self.times: list[float] = []

    @torch.no_grad()
    def call(self) -> None:
        """One network call, timed."""
        level = self.process.level_at(torch.ones(len(self.noise)))
        prepared = self.denoiser.prepare(self.given)
        begin = time.perf_counter()
        self.denoiser(self.noise, level, prepared)
        self.times.append(time.perf_counter() - begin)

    def draw(self) -> Tensor:
        """Latents, by a few steps."""
        sampling = self.config.sampling.model_copy(update={"sampler": "dpmpp-2m", "steps": STEPS})
        return sample_latents(self.denoiser, self.process, self.given, self.noise, sampling)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path, help="run folder or model file")
    parser.add_argument("--pictures", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        file = find_model(arguments.run) if arguments.run else drawn(Path(place))
        config, network, facts = load_model(file)
        side = 32 if arguments.run is None else _side(config, facts)
        weights = {key: tensor.detach() for key, tensor in network.state_dict().items()}
        sizes, drawers = {}, {}
        for name in ("fp32", "bf16", "int8"):
            path = Path(place) / f"{name}.safetensors"
            save_model(path, stored(weights, name), config, facts)
            sizes[name] = path.stat().st_size
            drawers[name] = Drawer(path, arguments.pictures, side)
        drawers["autocast"] = Drawer(Path(place) / "fp32.safetensors", arguments.pictures, side, "bf16")
        for _ in range(ROUNDS):
            for drawer in drawers.values():
                drawer.call()
        usual = statistics.median(drawers["fp32"].times)
        speed = {name: statistics.median(each.times) / usual for name, each in drawers.items()}
        exact = drawers["fp32"].draw()
        print(f"{config.name}: {arguments.pictures} pictures, {side} x {side} latents, {STEPS} steps")
        print(f"{'file':10}{'size':>8}{'latents off':>14}{'PSNR dB':>10}{'time of a call':>16}")
        for name, drawer in drawers.items():
            made = drawer.draw()
            error = ((made - exact).norm() / exact.norm()).item()
            root = (made - exact).square().mean().sqrt().item()
            psnr = 20 * math.log10((exact.max() - exact.min()).item() / root) if root else math.inf
            size = f"{sizes[name] / sizes['fp32']:.3f}" if name in sizes else "-"
            print(f"{name:10}{size:>8}{error:14.2e}{psnr:10.1f}{speed[name]:16.2f}")


def _side(config: RunConfig, facts: ModelFacts) -> int:
    from shoestring.encoders.image import build_codec

    return facts.resolution // build_codec(config.data).downsampling


if __name__ == "__main__":
    main()
