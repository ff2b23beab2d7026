"""Distillation as a training objective: the teacher beside the student, and what a step asks of both."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

from shoestring.config import DistillConfig, NoiseConfig, RunConfig
from shoestring.diffusion.distillation import (
    Sample,
    codi_loss,
    consistency_loss,
    guided_loss,
    progressive_loss,
)
from shoestring.diffusion.process import Process
from shoestring.interfaces import Denoiser
from shoestring.models.files import find_model, load_model, read_header
from shoestring.models.network import BaseNetwork
from shoestring.runtime import PRECISIONS, UserError
from shoestring.tensors import visible_from_noise
from shoestring.training.averages import CLASSIC, Averages
from shoestring.training.step import TrainingBatch

CLOSE = 0.01
"""Deviations of data that differ by less are taken to be one."""


def data_facts(config: RunConfig) -> dict[str, object]:
    """What must be the same for one model to learn from another."""
    data, model = config.data, config.model
    return {
        "data.source": data.source,
        "data.path": data.path,
        "data.stores": tuple(store.path for store in data.stores),
        "data.codec": data.codec,
        "data.codec_path": data.codec_path,
        "data.text_encoder": data.text_encoder if model.condition == "text" else None,
        "data.text_encoder_path": data.text_encoder_path if model.condition == "text" else None,
        "process": config.process.model_dump(exclude={"sigma_data"}),
        "superres": config.superres,
        "model.condition": model.condition,
        "model.in_channels": model.in_channels,
        "model.patch_size": model.patch_size,
    }


def check_teacher(config: RunConfig) -> Path:
    """The teacher's file.

    Args:
        config: of the student's run.

    Returns:
        Where it is.

    Raises:
        UserError: if it cannot be read, or was trained on other data, latents or noise than the student.
    """
    assert config.distill is not None
    try:
        path = find_model(Path(config.distill.teacher))
    except UserError as error:
        raise UserError(f"distill.teacher: {error}") from error
    theirs = data_facts(read_header(path).config)
    for key, value in data_facts(config).items():
        if theirs[key] != value:
            raise UserError(
                f"distill.teacher: {path} was trained with {key}={theirs[key]}, and the student has {value}; "
                "teacher and student need the same data, latents and noise process"
            )
    return path


class Distillation:
    """The loss of a batch under a teacher.

    Args:
        config: of the run.
        process: noise process.
        sigma_data: deviation of the latents.
        network: the student.
        averages: of the student's weights.
        device: where the teacher goes.

    Raises:
        UserError: if the teacher does not fit.
    """

    def __init__(
        self,
        config: RunConfig,
        process: Process,
        sigma_data: float,
        network: BaseNetwork,
        averages: Averages,
        device: torch.device,
    ) -> None:
        assert config.distill is not None
        self.config: DistillConfig = config.distill
        self.tokens, self.process, self.sigma_data = config.tokens, process, sigma_data
        path = check_teacher(config)
        _, teacher, facts = load_model(path)
        if abs(facts.sigma_data / sigma_data - 1) > CLOSE:
            raise UserError(
                f"distill.teacher: {path} was trained with sigma_data {facts.sigma_data:.4g}, and the "
                f"student has {sigma_data:.4g}; leave process.sigma_data as the teacher's"
            )
        precision = PRECISIONS[config.precision]
        if self.config.method != "codi":  # which looks at its settings only
            teacher.to(device)
        self.teacher = process.denoiser(teacher.requires_grad_(False), precision)
        # A path of many levels is that of the process; a student's step is cut in two on its own grid.
        halved = self.config.method == "progressive"
        sampling = config.sampling
        if not halved:
            sampling = sampling.model_copy(update={"spacing": "auto", "sigmas": None})
        self.grid = process.grid(sampling, self.config.steps * (2 if halved else 1))
        self.network, self.twin = network, None
        self.target: Denoiser | None = None
        if self.config.target == "ema" and self.config.method in ("consistency", "codi"):
            self.twin = _averaged(network, averages)
            self.target = process.denoiser(self.twin, precision)

    def __call__(
        self, student: Denoiser, batch: TrainingBatch, noise: NoiseConfig, mask_ratio: float
    ) -> Tensor:
        """Mean loss of a batch; see :mod:`shoestring.diffusion.distillation`."""
        assert batch.guidance_B is not None, "a batch of a distillation draws scales of guidance"
        config, process, tokens = self.config, self.process, self.tokens
        low, high = config.guidance
        side = student.patch_size
        grid = (batch.x0.shape[2] // side, batch.x0.shape[3] // side)
        sample = Sample(
            batch.x0,
            batch.noise,
            batch.conditioning,
            torch.special.ndtr(batch.level_B),
            low + (high - low) * batch.guidance_B,
            visible_from_noise(batch.mask_BL, mask_ratio, tokens.pattern, grid, tokens.block),
        )
        target = self.target if self.target is not None else student
        if self.twin is not None:
            self.twin.position_scale = self.network.position_scale  # stages change it
        if config.method == "consistency":
            loss_B = consistency_loss(
                process, student, target, self.teacher, sample, self.grid, config.solver, config.huber
            )
        elif config.method == "codi":
            loss_B = codi_loss(process, student, target, sample, self.grid, config.huber, config.data_weight)
        elif config.method == "guided":
            level = process.level_from_normal(batch.level_B, noise)
            loss_B = guided_loss(process, student, self.teacher, sample, level)
        else:
            loss_B = progressive_loss(process, student, self.teacher, sample, self.grid, self.sigma_data)
        return loss_B.mean()


def _averaged(network: BaseNetwork, averages: Averages) -> BaseNetwork:
    """The network with the averaged weights: the same memory, so that it follows and resumes with them."""
    twin = copy.deepcopy(network).requires_grad_(False)
    named = averages.named(CLASSIC)
    for name, parameter in twin.named_parameters():
        parameter.data = named[name]
    return twin.eval()
