"""Seconds an image in training, method against method: measured in turns, on a machine that is quiet."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from shoestring.config import RunConfig
from shoestring.diffusion.process import build_process
from shoestring.interfaces import Conditioning
from shoestring.models.files import build_network
from shoestring.models.transformer import DiffusionTransformer
from shoestring.runtime import PRECISIONS, Workers, default_workers, pick_device, stream, write_text
from shoestring.studies.token_rows import read_json
from shoestring.training.compiling import compile_blocks
from shoestring.training.schedule import Position
from shoestring.training.step import Learner, TrainingBatch, part_sizes, train_step
from shoestring.training.step_shapes import stage_shapes


class TimedStep:
    """A training step of a recipe on random pictures.

    Args:
        config: the recipe; its first stage is timed.
        workers: threads.
    """

    def __init__(self, config: RunConfig, workers: Workers) -> None:
        device = pick_device(config.device)
        generator = stream(0, "timing")
        network = build_network(config, generator).to(device)
        assert isinstance(network, DiffusionTransformer)
        grid = (config.stages[0].resolution // config.model.patch_size,) * 2
        if config.compile:
            images = part_sizes(config.stages[0].batch, config.stages[0].batch, workers.count)
            compile_blocks(network, config.tokens, stage_shapes(config, config.stages[0], grid, images))
        process = build_process(config.process, 0.5)
        self.learner = Learner.build(
            network,
            config.tokens,
            process,
            config.optimizer,
            workers,
            precision=PRECISIONS[config.precision],
        )
        self.stage = stage = config.stages[0]
        b, side = stage.batch, stage.resolution
        patches = (side // config.model.patch_size) ** 2
        self.batch = TrainingBatch(
            x0=0.5 * torch.randn(b, 3, side, side, generator=generator),
            conditioning=Conditioning(class_B=torch.arange(b) % config.model.classes),
            noise=torch.randn(b, 3, side, side, generator=generator),
            level_B=torch.randn(b, generator=generator),
            mask_BL=torch.rand(b, patches, generator=generator),
            path_dropped_B=torch.zeros(b, dtype=torch.bool) if network.routing.drops_paths else None,
        )

    def __call__(self) -> float:
        """Seconds an image."""
        start_s = time.perf_counter()
        here = Position(0, self.stage, 0, 0, 0)
        result = train_step(self.learner, self.batch, self.stage.batch, 1e-4, self.stage.mask_ratio, here)
        result.loss.item()  # a device has to be done
        return (time.perf_counter() - start_s) / self.stage.batch


def time_recipes(configs: Mapping[str, RunConfig], rounds: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds an image of several recipes, one step of each in turn.

    Args:
        configs: recipes by name.
        rounds: timed steps of each.
        warmup: steps before.

    Returns:
        Seconds an image by name.
    """
    with Workers(default_workers(pick_device("auto"))) as workers:
        steps = {name: TimedStep(config, workers) for name, config in configs.items()}
        for step in steps.values():
            for _ in range(warmup):
                step()
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                times[name].append(step())
    return {name: statistics.median(values) for name, values in times.items()}


def read_timings(folder: Path) -> dict[str, float]:
    """Timings kept in a study's folder; empty if none were taken."""
    return read_json(folder / "timings.json")


def write_timings(folder: Path, timings: Mapping[str, float]) -> None:
    """Keep timings."""
    write_text(folder / "timings.json", json.dumps(dict(timings), indent=1) + "\n")
