"""The pictures of a cell of the sampling-cost study: how they are drawn, and how good they are."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from shoestring.config import SamplingConfig
from shoestring.evaluation.distances import KernelReference, frechet_distance
from shoestring.evaluation.extractor import kept_outputs
from shoestring.evaluation.features import EfficientNetLite0Features
from shoestring.evaluation.manifold import overlap
from shoestring.evaluation.paired import feature_distance, psnr
from shoestring.evaluation.shapeeval import ShapePrompt, make_shape_prompts, shows
from shoestring.sampling.generate import Pipeline, batches, class_prompts
from shoestring.sampling.lowres import made_small
from shoestring.studies.sampling_models import data_of
from shoestring.training.display import LiveLine, duration
from shoestring.training.stage_data import real_pictures

SAMPLE_SEED = 1
DRAW_BATCH, PIECE = 100, 50
REFERENCE = 5_000
"""Held-out pictures that drawn ones are compared with, at most."""


class Pictures:
    """Draws and measures, with the real pictures at hand.

    Args:
        folder: of the study; what was computed of the real pictures is kept there.
        samples: pictures of a cell.
        console: where a person reads.
    """

    def __init__(self, folder: Path, samples: int, console: Console) -> None:
        self.folder, self.samples, self.console = folder, samples, console
        self._references: dict[tuple[object, ...], tuple[Tensor, KernelReference]] = {}

    @cached_property
    def extractor(self) -> EfficientNetLite0Features:
        """Features of pictures."""
        return EfficientNetLite0Features()

    def draw(self, pipeline: Pipeline, sampling: SamplingConfig) -> Tensor:
        """Draw the pictures of a cell, always from the same noise."""
        wanted = self._prompts(pipeline)
        found = []
        with LiveLine(self.console) as line:
            started = time.perf_counter()
            for part in batches(len(wanted), DRAW_BATCH):
                found.append(
                    pipeline.draw(
                        [wanted[i] for i in part],
                        SAMPLE_SEED,
                        part,
                        sampling,
                        piece=PIECE,
                        low=self._low(pipeline, part),
                    )
                )
                done = part.stop
                if done == len(wanted):
                    break
                left = (time.perf_counter() - started) / done * (len(wanted) - done)
                line.show(f"{done:,}/{len(wanted):,} pictures  {duration(left)} left")
        return torch.cat(found)

    def _low(self, pipeline: Pipeline, part: Sequence[int]) -> Tensor | None:
        """Held-out pictures made small, for super-resolution models."""
        superres = pipeline.config.superres
        if superres is None:
            return None
        images, _ = self._real(pipeline)
        return made_small(images[[i % len(images) for i in part]], superres, SAMPLE_SEED, list(part))

    def _prompts(self, pipeline: Pipeline) -> list[str]:
        """The same for every cell: all classes in turn, or captions of the data."""
        config, count = pipeline.config, self.samples
        if config.superres is not None:
            names = [""]
        elif config.model.condition == "class":
            names = class_prompts(config.model.classes, pipeline.classes)
        elif config.model.condition == "none":
            names = [""]
        elif config.data.source == "shapes":
            names = [prompt.text for prompt in self._shapes(pipeline)]
        else:
            names = list(dict.fromkeys(self._real(pipeline)[1]))
        return [names[i % len(names)] for i in range(count)]

    def _shapes(self, pipeline: Pipeline) -> tuple[ShapePrompt, ...]:
        each = math.ceil(self.samples / 6)
        return make_shape_prompts(each, pipeline.config.data.held_out)

    def figures(self, pipeline: Pipeline, pictures: Tensor) -> Mapping[str, float]:
        """How good they are: the entries of a row."""
        features, kernel = self._reference(pipeline)
        made = self.extractor(pictures)
        estimate, shared = kernel.compare(made), overlap(features, made)
        found = {
            "kid": estimate.value,
            "kid_error": estimate.standard_error,
            "fd": frechet_distance(made, features),
            "precision": shared.precision,
            "recall": shared.recall,
        }
        if pipeline.config.data.source == "shapes" and pipeline.config.model.condition == "text":
            asked = self._shapes(pipeline)
            right = [shows(picture, asked[i % len(asked)]) for i, picture in enumerate(pictures)]
            found["accuracy"] = sum(right) / len(right)
        if pipeline.config.superres is not None:
            wanted, _ = self._real(pipeline)
            rows = [i % len(wanted) for i in range(len(pictures))]
            found["psnr"] = psnr(pictures, wanted[rows]).mean().item()
            found["feature_distance"] = feature_distance(made, features[rows]).mean().item()
        return found

    def _real(self, pipeline: Pipeline) -> tuple[Tensor, Sequence[str]]:
        """Held-out pictures and their captions, at the side of the network's pictures."""
        config, side = pipeline.config, pipeline.resolution
        stage = next((s for s in reversed(config.stages) if s.resolution == side), config.stages[-1])
        splits = real_pictures(config, stage, pipeline.codec, self.folder)
        real = splits.held_out if len(splits.held_out) >= 3 else splits.train
        return real.images[:REFERENCE], real.captions

    def _reference(self, pipeline: Pipeline) -> tuple[Tensor, KernelReference]:
        key = (*data_of(pipeline.config), pipeline.resolution)
        if key not in self._references:
            with self.console.status("Looking at the real pictures"):
                images, _ = self._real(pipeline)
                (features,) = kept_outputs(self.extractor, images, self.folder / "features", "real")[:1]
                self._references[key] = features, KernelReference(features)
        return self._references[key]
