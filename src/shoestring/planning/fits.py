"""Which micro-batch a GPU holds, and what each way of spreading the network needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shoestring.config import RunConfig, StageConfig
from shoestring.planning.machines import GPU, USABLE
from shoestring.planning.memory import (
    NODE_RANKS,
    MemoryForecast,
    Sharding,
    fitting_micro_batch,
    forecast_memory,
)
from shoestring.runtime import UserError


@dataclass(frozen=True)
class Fit:
    """The memory of a stage on one GPU."""

    stage: str
    micro_batch: int
    source: str
    """Where the micro-batch comes from: recipe, the forecast, or what is left where nothing fits."""
    plain: MemoryForecast
    """Of the first kind in ``totals``."""
    recomputed: MemoryForecast
    totals: Mapping[Sharding, tuple[int, int]]
    """Bytes at the worst moment by kind of parallel run: without and with blocks recomputed."""
    available: float
    """Bytes of the GPU that a plan fills."""


def stage_fit(config: RunConfig, stage: StageConfig, device: GPU, count: int) -> Fit:
    """How a stage fits GPUs.

    Args:
        config: the run.
        stage: one of its stages.
        device: the kind of GPU.
        count: how many.

    Returns:
        Forecasts for every way of spreading the network that so many GPUs have, the run's own first.

    Raises:
        UserError: if the GPUs cannot share the batch evenly.
    """
    available, group = device.memory_bytes * USABLE, config.parallel.shard_ranks or NODE_RANKS
    kinds: list[Sharding] = ["single"]
    if count > 1:
        chosen: Sharding = "ddp" if config.parallel.sharding == "auto" else config.parallel.sharding
        others: list[Sharding] = ["ddp", "fsdp"]
        if chosen == "hybrid" or (count > group and count % group == 0):
            others.append("hybrid")
        kinds = [chosen, *(kind for kind in others if kind != chosen)]

    def forecast(micro_batch: int, kind: Sharding, recomputed: bool) -> MemoryForecast:
        return forecast_memory(
            config,
            stage,
            micro_batch=micro_batch,
            ranks=count,
            sharding=kind,
            shard_ranks=group if kind == "hybrid" else None,
            checkpointing=recomputed,
        )

    micro_batch, source = _micro_batch(config, stage, available, count, kinds[0], group)
    by_kind = {
        kind: (forecast(micro_batch, kind, False), forecast(micro_batch, kind, True)) for kind in kinds
    }
    plain, recomputed = by_kind[kinds[0]]
    totals = {kind: (a.total, b.total) for kind, (a, b) in by_kind.items()}
    return Fit(stage.name, micro_batch, source, plain, recomputed, totals, available)


def _micro_batch(
    config: RunConfig, stage: StageConfig, available: float, count: int, kind: Sharding, group: int
) -> tuple[int, str]:
    share = stage.batch // count
    if stage.micro_batch is not None:
        return min(stage.micro_batch, max(1, share)), "recipe"
    if stage.batch % count:
        return 1, "recipe"  # the forecast says what is wrong
    shard_ranks = group if kind == "hybrid" else None
    try:
        return fitting_micro_batch(config, stage, available, count, kind, shard_ranks=shard_ranks), "fits"
    except UserError:
        return 1, "does not fit"
