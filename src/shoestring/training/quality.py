"""How good the pictures are while training goes on: the kernel distance of a few to real ones."""

from __future__ import annotations

from functools import cached_property
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from shoestring.config import RunConfig
from shoestring.evaluation.distances import kernel_distance
from shoestring.evaluation.extractor import Extractor
from shoestring.evaluation.features import build_extractor
from shoestring.interfaces import ImageCodec
from shoestring.sampling.generate import Pipeline, class_prompts
from shoestring.training.beside import draw_shared
from shoestring.training.parallel import Parallel
from shoestring.training.stage_data import StageData
from shoestring.training.step import Learner

EXTRACTOR = "efficientnet-lite0"
LEAST = 4
"""Real pictures that a kernel distance needs to say anything."""
AT_ONCE = 32
"""Pictures drawn together on a rank."""


class SampleQuality:
    """Kernel distance (unbiased, so that few pictures suffice) of samples to held-out pictures.

    Both have passed the codec: held-out pictures are encoded and decoded, so that the distance is the
    model's and not the autoencoder's.

    Args:
        config: of the run.
        interval: images from one measurement to the next.
        device: where features are computed.
    """

    def __init__(self, config: RunConfig, interval: int, device: torch.device) -> None:
        self.interval = interval
        self._config, self._count, self._device = config, config.logging.kid_pictures, device
        self._real: dict[tuple[int, ...], Tensor] = {}

    @cached_property
    def _extractor(self) -> Extractor:
        return build_extractor(EXTRACTOR, None, self._device)

    def check(self) -> None:
        """Say that weights are missing before anything is trained.

        Raises:
            UserError: if the extractor cannot be loaded.
        """
        assert self._extractor is not None

    def measure(self, learner: Learner, data: StageData, pipeline: Pipeline) -> dict[str, Any]:
        """Draw with the averaged weights and compare; every rank draws its share.

        Args:
            learner: whose average draws.
            data: of the stage.
            pipeline: of the learner.

        Returns:
            The row for the log; empty on all ranks but the first, and where real pictures are too few.
        """
        prompts = quality_prompts(self._config, data, self._count)
        pictures = draw_shared(learner, pipeline, prompts, self._config.seed, AT_ONCE)
        if not learner.parallel.first:
            return {}
        real_NF = self._real_features(data, pipeline.codec)
        if len(real_NF) < LEAST:
            return {}
        found = kernel_distance(self._extractor(pictures), real_NF)
        return {
            "kid_efflite0": found.mean,
            "kid_efflite0_spread": found.std,
            "pictures": len(pictures),
            "real_pictures": len(real_NF),
            "held_out": data.held_out is not None,
        }

    def _real_features(self, data: StageData, codec: ImageCodec) -> Tensor:
        """Of held-out pictures at the stage's resolution, or of training pictures where none is held out."""
        key = data.latent_shape
        if key not in self._real:
            x0, _, _ = data.held_out_batch(self._count)
            decoded = [codec.decode(part).cpu() for part in x0.split(AT_ONCE)]
            self._real[key] = self._extractor(torch.cat(decoded))
        return self._real[key]


def sample_quality(config: RunConfig, parallel: Parallel) -> SampleQuality | None:
    """The measurement that a run asks for; its weights are loaded at once on the first rank.

    Args:
        config: of the run.
        parallel: this process among those of the run.

    Returns:
        ``None`` where none is asked for.

    Raises:
        UserError: if the extractor cannot be loaded.
    """
    if config.logging.kid_nimg is None:
        return None
    quality = SampleQuality(config, config.logging.kid_nimg, parallel.device)
    parallel.from_first(quality.check)
    return quality


def quality_prompts(config: RunConfig, data: StageData, count: int) -> list[str]:
    """What the pictures are drawn from: held-out captions, classes in turn, or nothing.

    Args:
        config: of the run.
        data: of the stage.
        count: pictures.

    Returns:
        A prompt for each.
    """
    if config.model.condition == "class":
        names = class_prompts(config.model.classes, data.classes)
    elif config.model.condition == "text":
        source = data.held_out if data.held_out is not None else data.train
        names = list(islice(source.captions, count))
    else:
        names = []
    return list(islice(cycle(names or [""]), count))
