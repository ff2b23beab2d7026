"""Hours and dollars from FLOPs, a machine and the share of its peak that is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoestring.planning.machines import GPU, gpu
from shoestring.planning.published import PublishedRun
from shoestring.planning.run import RunPlan
from shoestring.runtime import UserError


def dollars(usd: float) -> str:
    """An amount for people: cents, or three digits where it is less than a dollar."""
    return f"${usd:,.2f}" if abs(usd) >= 1 else f"${usd:.3g}"


@dataclass(frozen=True)
class Machine:
    """Rented GPUs.

    Raises:
        UserError: if a number makes no sense.
    """

    gpu: GPU
    count: int
    mfu: float
    """Share of the peak that training uses, the same for all stages. Recomputed blocks are no use."""
    usd_per_gpu_hour: float | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"--n is {self.count}; it must be 1 or more GPUs")
        if not 0 < self.mfu <= 1:
            raise UserError(
                f"--mfu is {self.mfu:g}; it must be above 0 and at most 1, e.g. 0.35 for 35 % of the peak"
            )
        if self.usd_per_gpu_hour is not None and not 0 <= self.usd_per_gpu_hour < float("inf"):
            raise UserError(
                f"--price is {self.usd_per_gpu_hour:g}; it must be 0 or more dollars for an hour of a GPU"
            )

    def hours(self, flops: float) -> float:
        """Hours that so many FLOPs take."""
        return flops / (self.count * self.gpu.peak_flops * self.mfu) / 3600

    def usd(self, hours: float) -> float | None:
        """Dollars of so many hours of all GPUs, if the price is known."""
        return None if self.usd_per_gpu_hour is None else hours * self.count * self.usd_per_gpu_hour


@dataclass(frozen=True)
class StageCost:
    """What a stage takes on a machine."""

    name: str
    nimg: int
    flops: float
    """Of all its images."""
    hours: float
    usd: float | None

    @property
    def images_per_s(self) -> float:
        """Images per second that the hours come to."""
        return self.nimg / (3600 * self.hours)


@dataclass(frozen=True)
class Measured:
    """What steps that were run here come to."""

    cost: StageCost
    memory_bytes: float | None
    """Of the device at the worst moment; ``None`` where that is not known."""


def stage_costs(
    run: RunPlan, machine: Machine, gflop: Sequence[float] | None = None
) -> tuple[StageCost, ...]:
    """Hours and dollars of every stage.

    Args:
        run: the plan.
        machine: GPUs and the share of their peak.
        gflop: training GFLOP of one image of each stage; ``None`` = as counted.

    Returns:
        One a stage.
    """
    per_image = [s.flops.training for s in run.stages] if gflop is None else [1e9 * value for value in gflop]
    flops = [stage.nimg * each for stage, each in zip(run.stages, per_image, strict=True)]
    return tuple(
        StageCost(stage.name, stage.nimg, total, hours := machine.hours(total), machine.usd(hours))
        for stage, total in zip(run.stages, flops, strict=True)
    )


def explained(run: RunPlan, report: PublishedRun, name: str, counted: bool) -> tuple[StageCost, ...]:
    """Our account of a published run.

    Args:
        run: the plan of the same run.
        report: what was published.
        name: short name of the GPU.
        counted: from our FLOPs instead of the published ones.

    Returns:
        One a stage, all at the one utilisation of the report.
    """
    time = report.times[name]
    price = report.usd_per_gpu_hour if name == report.priced else None
    machine = Machine(gpu(name), time.gpus, time.utilisation, price)
    return stage_costs(run, machine, None if counted else report.gflop)
