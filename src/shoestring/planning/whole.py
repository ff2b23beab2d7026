"""All that can be said of a run before it is run, put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table

from shoestring import recipes
from shoestring.config import RunConfig
from shoestring.planning.cost import Machine, Measured, StageCost, explained, stage_costs
from shoestring.planning.fits import Fit, stage_fit
from shoestring.planning.published import PublishedRun, published_run
from shoestring.planning.run import RunPlan, plan
from shoestring.planning.table import cost_table, gpu_table, memory_table, plan_table, published_table
from shoestring.runtime import UserError

Source = Literal["counted", "published"]


@dataclass(frozen=True)
class Plan:
    """A run on a machine."""

    run: RunPlan
    machine: Machine
    source: Source
    """Of the FLOPs from which the hours follow."""
    costs: tuple[StageCost, ...]
    fits: tuple[Fit, ...]
    published_gflop: Mapping[str, float]
    report: PublishedRun | None
    """What others reported of the same run."""

    def tables(self, measured: Sequence[Measured] | None) -> list[Table]:
        """For people.

        Args:
            measured: what steps that were run here came to; ``None`` = none were.

        Returns:
            FLOPs, memory, hours and dollars, other GPUs, and the published run where there is one.
        """
        title = f"Memory of one {self.machine.gpu.title} of {self.machine.count}"
        # Whichever way needs least, for the stage that needs most.
        needed = max(min(min(both) for both in fit.totals.values()) for fit in self.fits)
        tables = [
            plan_table(self.run, self.published_gflop),
            memory_table(self.fits, title),
            cost_table(self.run, self.machine, self.costs, self.source, measured),
            gpu_table(sum(cost.flops for cost in self.costs), self.machine, needed),
        ]
        if self.report is not None:
            accounts = {
                (name, counted): explained(self.run, self.report, name, counted)
                for name in self.report.times
                for counted in (False, True)
            }
            tables.append(published_table(self.report, [s.name for s in self.run.stages], accounts))
        return tables


def whole_plan(config: RunConfig, machine: Machine, source: Source) -> Plan:
    """Plan a run.

    Args:
        config: the run.
        machine: GPUs, the share of their peak, their price.
        source: of the FLOPs.

    Returns:
        The plan.

    Raises:
        UserError: if nothing is published of a stage, or the GPUs cannot share the batch.
    """
    run, gflop = plan(config), recipes.published_gflop(config)
    per_image: list[float] | None = None
    if source == "published":
        for stage in run.stages:
            if stage.name not in gflop:
                raise UserError(
                    f"--flops is published, but of stage {stage.name!r} of {run.name} no FLOPs are "
                    "published; use counted"
                )
        per_image = [gflop[stage.name] for stage in run.stages]
    return Plan(
        run,
        machine,
        source,
        stage_costs(run, machine, per_image),
        tuple(stage_fit(config, stage, machine.gpu, machine.count) for stage in config.stages),
        gflop,
        published_run(config),
    )
