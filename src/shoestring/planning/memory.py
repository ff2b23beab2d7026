"""The memory of a training step, forecast: what stays, what grows and shrinks, and the worst moment.

It is the forecast of the step as it runs without ``torch.compile``, which needs less. Beside the step there
are: samples and validation (without gradients, so they fit where a step does), and while a checkpoint is
written a second copy of weights, moments and averages in the host's memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from shoestring.config import CODEC_DOWNSAMPLING, RunConfig, StageConfig
from shoestring.models.layers import AdaLN, TransformerBlock
from shoestring.models.lora import lora_parameters
from shoestring.models.moe import ExpertChoice
from shoestring.models.transformer import DiffusionTransformer
from shoestring.planning.activations import FP32, Bytes, DeviceType, Part, network_parts
from shoestring.planning.distillation import teacher_parameters
from shoestring.planning.run import mask_ratios, meta_network, patch_grid
from shoestring.runtime import UserError

Sharding = Literal["single", "ddp", "fsdp", "hybrid"]
NODE_RANKS = 8
"""GPUs of a usual machine: what ``hybrid`` shares a copy of the network among, unless it is told."""
MUON_PIECE, MUON_BYTES = 2**25, 22
"""Elements that Muon updates at once (``training/muon.py``), and bytes of its copies of each."""


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes on one rank."""

    weights: int
    gradients: int
    """All of them, when the optimiser steps."""
    moments: int
    """State of the optimiser."""
    averages: int
    activations: int
    """What autograd keeps of a micro-batch when the forward pass ends, low-precision weights included."""
    workspace: int
    """What the worst moment needs beside: gradients of activations, a block that is recomputed, gathered
    weights, the batch itself."""
    total: int
    """The worst moment. Less than the sum where gradients grow while activations shrink."""


def forecast_memory(
    config: RunConfig,
    stage: StageConfig,
    *,
    micro_batch: int,
    ranks: int = 1,
    sharding: Sharding = "single",
    shard_ranks: int | None = None,
    averages: int | None = None,
    checkpointing: bool | None = None,
    device_type: DeviceType = "cuda",
    workers: int = 1,
) -> MemoryForecast:
    """What a step needs on one rank.

    Args:
        config: the run.
        stage: one of its stages; where the mask ratio moves, the smallest counts.
        micro_batch: images at once on one rank.
        ranks: processes that share the batch.
        sharding: single, ddp (a copy each), fsdp (weights, gradients, moments and averages shared out) or
            hybrid (shared out within groups).
        shard_ranks: hybrid: ranks of a group; ``None`` = 8, or all if there are fewer.
        averages: of the weights; ``None`` = those that the run keeps.
        checkpointing: whether blocks are recomputed; ``None`` = as the model says.
        device_type: cpu or cuda: autocast and attention differ.
        workers: threads that each take a part of the micro-batch, with gradients of their own.

    Returns:
        The forecast.

    Raises:
        UserError: if the numbers do not fit together.
    """
    step = _Step.of(
        config, stage, ranks, sharding, shard_ranks, averages, checkpointing, device_type, workers
    )
    if not 1 <= micro_batch <= step.share:
        raise UserError(
            f"stage {stage.name!r}: micro_batch is {micro_batch}; it must be 1 to {step.share}, a rank's "
            f"share of the batch of {stage.batch}"
        )
    return step.forecast(micro_batch)


def fitting_micro_batch(
    config: RunConfig,
    stage: StageConfig,
    available_bytes: float,
    ranks: int = 1,
    sharding: Sharding = "single",
    *,
    shard_ranks: int | None = None,
    checkpointing: bool | None = None,
    device_type: DeviceType = "cuda",
    workers: int = 1,
) -> int:
    """The most images at once that fit: a divisor of a rank's share of the batch.

    Args:
        config: the run.
        stage: one of its stages.
        available_bytes: what a rank may take.
        ranks: processes that share the batch.
        sharding: as in :func:`forecast_memory`, like all that follow.
        shard_ranks: ranks of a group.
        checkpointing: whether blocks are recomputed.
        device_type: cpu or cuda.
        workers: threads with gradients of their own.

    Returns:
        Images.

    Raises:
        UserError: if not even one image fits.
    """
    step = _Step.of(config, stage, ranks, sharding, shard_ranks, None, checkpointing, device_type, workers)
    share = step.share
    for micro_batch in sorted((n for n in range(1, share + 1) if share % n == 0), reverse=True):
        smallest = step.forecast(micro_batch).total
        if smallest <= available_bytes:
            return micro_batch
    ways = [] if step.recomputing else ["model.checkpoint_activations=true"]
    if ranks > 1 and sharding != "fsdp":
        ways.append("parallel.sharding=fsdp")
    ways += ["a smaller model", "devices with more memory"]
    raise UserError(
        f"stage {stage.name!r}: a step of one image at a time needs {smallest / 1e9:.3g} GB on each rank, "
        f"and {available_bytes / 1e9:.3g} GB are at hand; choose {', '.join(ways[:-1])} or {ways[-1]}"
    )


def _share(stage: StageConfig, ranks: int) -> int:
    """Images of a step on one rank."""
    if ranks < 1 or stage.batch % ranks:
        raise UserError(
            f"stage {stage.name!r}: batch is {stage.batch}, which {ranks} ranks cannot share evenly; choose "
            "a number of ranks that divides it"
        )
    return stage.batch // ranks


def _shards(ranks: int, sharding: Sharding, shard_ranks: int | None) -> int:
    """Among how many ranks the weights are shared out."""
    if sharding == "single" and ranks > 1:
        raise UserError(
            f"sharding is single, which is one rank, and there are {ranks}; use ddp, fsdp or hybrid"
        )
    if sharding in ("single", "ddp"):
        return 1
    if sharding == "fsdp":
        return ranks
    group = min(NODE_RANKS, ranks) if shard_ranks is None else shard_ranks
    if group < 1 or ranks % group:
        raise UserError(f"shard_ranks is {group}; it must divide the {ranks} ranks")
    return group


def _image_bytes(config: RunConfig, grid: tuple[int, int], captions: int) -> int:
    """Of one image of a batch on the device: latents, noise, noisy latents, caption and draws of the mask."""
    model = config.model
    values = grid[0] * grid[1] * model.in_channels * model.patch_size**2
    return FP32 * (3 * values + captions * model.caption_dim + grid[0] * grid[1])


def muon_elements(network: nn.Module) -> tuple[int, int]:
    """How many weights Muon updates, and the most of one shape: the matrices inside the blocks.

    Args:
        network: of the run.

    Returns:
        All, and those of the most frequent shape; modulations and gates are AdamW's.
    """
    of_shape: Counter[torch.Size] = Counter()
    for block in network.modules():
        if not isinstance(block, TransformerBlock):
            continue
        others = {id(m) for a in block.modules() if isinstance(a, AdaLN) for m in a.modules()}
        others |= {id(m.gate) for m in block.modules() if isinstance(m, ExpertChoice)}
        for m in block.modules():
            if isinstance(m, ExpertChoice):
                of_shape.update({m.w1.shape: m.w1.numel()})
                of_shape.update({m.w2.shape: m.w2.numel()})
            elif isinstance(m, nn.Linear) and id(m) not in others:
                of_shape.update({m.weight.shape: m.weight.numel()})
    return of_shape.total(), max(of_shape.values(), default=0)


@dataclass(frozen=True)
class _Step:
    """A step but for its micro-batch."""

    parts: Sequence[Part]
    bytes: Bytes
    share: int
    """Images of a step on one rank."""
    shards: int
    image_bytes: int
    recomputing: bool
    standing: bool
    """Whether the gradients' memory is kept between steps (DDP's buckets)."""
    workers: int
    tracks: int
    parameters: int
    trained: int
    """Parameters that have a gradient: all of them, or those of LoRA."""
    muon: int
    """Parameters that Muon updates."""
    muon_piece: int
    """Of which at once."""
    teacher: int
    """Parameters of a distillation's teacher, whole on every rank. Its passes keep nothing, and are over
    before those of the student begin."""

    @staticmethod
    def of(
        config: RunConfig,
        stage: StageConfig,
        ranks: int,
        sharding: Sharding,
        shard_ranks: int | None,
        averages: int | None,
        checkpointing: bool | None,
        device_type: DeviceType,
        workers: int,
    ) -> _Step:
        """See :func:`forecast_memory`."""
        share, shards = _share(stage, ranks), _shards(ranks, sharding, shard_ranks)
        network, low = meta_network(config), Bytes.of(config.precision, device_type)
        grid = patch_grid(config, stage, CODEC_DOWNSAMPLING[config.data.codec])
        captions = config.data.max_tokens if config.model.condition == "text" else 0
        if isinstance(network, DiffusionTransformer):
            parts = network_parts(config, network, grid, captions, min(mask_ratios(stage)), low)
        else:
            from shoestring.planning.activations_unet import unet_parts  # with diffusers, slow to import

            parts = unet_parts(network, grid, captions, low)
        parameters = trained = sum(p.numel() for p in network.parameters())
        if config.lora is not None:
            trained = lora_parameters(network, config.lora)
            parameters += trained
        muon, largest = muon_elements(network) if config.optimizer.kind == "muon" else (0, 0)
        return _Step(
            parts,
            low,
            share,
            shards,
            _image_bytes(config, grid, captions),
            config.model.checkpoint_activations if checkpointing is None else checkpointing,
            sharding == "ddp",
            workers,
            1 + len(config.power_ema) if averages is None else averages,
            parameters,
            trained,
            muon,
            min(largest, MUON_PIECE * workers),
            teacher_parameters(config),
        )

    def forecast(self, micro_batch: int) -> MemoryForecast:
        """For so many images at once."""
        accumulating = micro_batch < self.share
        weights = FP32 * math.ceil(self.parameters / self.shards)
        mine = FP32 * math.ceil(self.trained / self.shards)
        moments = FP32 * math.ceil((2 * self.trained - self.muon) / self.shards)
        # FSDP adds the gradients of micro-batches up before they are shared out.
        gradients = FP32 * self.trained if accumulating else mine
        activations, peak = self._timeline(micro_batch, gradients if accumulating or self.standing else 0)
        update = mine + MUON_BYTES * self.muon_piece
        if self.workers > 1:  # every thread's gradients, the sum so far and the new one
            update = max(update, (self.workers + 1 + accumulating) * mine)
        batch = self.share * self.image_bytes
        worst = max(peak, update)
        return MemoryForecast(
            weights=weights + FP32 * self.teacher,
            gradients=gradients,
            moments=moments,
            averages=self.tracks * weights,
            activations=activations,
            workspace=batch + max(0, worst - activations - gradients),
            total=(1 + self.tracks) * weights + FP32 * self.teacher + moments + batch + worst,
        )

    def _kept(self, part: Part, images: int) -> float:
        """Bytes of a part from its forward to its backward pass."""
        if self.recomputing and part.entry:
            return images * part.entry
        return images * part.kept + self._casts(part)

    def _casts(self, part: Part) -> float:
        """Low-precision copies of a part's weights; FSDP hands out low ones, and takes them back."""
        return 0.0 if self.shards > 1 else self.bytes.cast * part.cast * self.workers

    def _timeline(self, images: int, gradients: float) -> tuple[int, int]:
        """Activations at the end of the forward pass; they and the gradients at the worst moment.

        The backward pass goes through the parts from the last to the first: activations go, gradients come,
        unless there are gradients already, to which the new ones are added.
        """
        kept = [self._kept(part, images) for part in self.parts]
        held = sum(kept)
        activations, there = round(held), gradients + (self._gathered() if self.shards > 1 else 0.0)
        arriving = FP32 * self.workers / self.shards if not gradients or self.workers > 1 else 0.0
        arriving *= self.trained / self.parameters  # of LoRA as if its factors were spread evenly
        peak = held + there
        for part, mine in zip(reversed(self.parts), reversed(kept), strict=True):
            again = images * part.kept + self._casts(part) - mine if self.recomputing and part.entry else 0.0
            fresh = (FP32 + self.bytes.cast) * part.largest * self.workers
            peak = max(peak, held + again + images * part.moment + fresh + there)
            held, there = held - mine, there + arriving * part.parameters
            peak = max(peak, held + there)
        return activations, round(peak)

    def _gathered(self) -> float:
        """FSDP: whole weights of the block at work, the next and the rest; gradients on their way.

        Each is there twice for a moment: as it arrives, and parameter by parameter.
        """
        blocks = sorted((part.parameters for part in self.parts if part.entry), reverse=True)
        rest = sum(part.parameters for part in self.parts if not part.entry)
        return self.bytes.low * (2 * sum(blocks[:2]) + rest) + 2 * FP32 * max(blocks, default=0)
