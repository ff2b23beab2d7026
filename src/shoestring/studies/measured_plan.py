"""Some steps of every stage, run here, and what they come to for the whole run."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from rich.console import Console

from shoestring.config import RunConfig
from shoestring.planning import Measured, StageCost, plan
from shoestring.runtime import UserError, say
from shoestring.training.display import read_log
from shoestring.training.loop import train


def measured_costs(
    config: RunConfig, steps: int, usd_per_hour: float | None, console: Console
) -> tuple[Measured, ...]:
    """Train a few steps of every stage in a folder that is thrown away, and carry their rate over.

    The rate of a stage is the median of the second half of its steps: the first ones also compile and fill
    caches.

    Args:
        config: the run; its data must be there.
        steps: of every stage.
        usd_per_hour: price of this machine, if it is known.
        console: where a person reads.

    Returns:
        One a stage.

    Raises:
        UserError: if ``steps`` is below 1, or for mistakes in configuration or data.
        KeyboardInterrupt: if somebody stopped it.
    """
    if steps < 1:
        raise UserError(f"--measure is {steps}; it must be 1 or more steps of every stage")
    say(console, f"Measuring {steps} steps of every stage here")
    with tempfile.TemporaryDirectory(prefix="shoestring-plan-") as folder:
        if not train(shortened(config, steps), Path(folder), Console(quiet=True)):
            raise KeyboardInterrupt
        rows = [row for row in read_log(Path(folder)) if row["kind"] == "train"]
    costs, before = [], 0
    for stage, planned in zip(config.stages, plan(config).stages, strict=True):
        until = before + steps * stage.batch
        mine = [row for row in rows if before < row["nimg"] <= until]
        rate = statistics.median(row["images_per_s"] for row in mine[len(mine) // 2 :])
        hours = planned.nimg / rate / 3600
        usd = None if usd_per_hour is None else hours * usd_per_hour
        memory = max((row["memory_bytes"] for row in mine if "memory_bytes" in row), default=None)
        costs.append(Measured(StageCost(stage.name, planned.nimg, planned.training, hours, usd), memory))
        before = until
    return tuple(costs)


def shortened(config: RunConfig, steps: int) -> RunConfig:
    """The run with so many steps a stage, a line in the log for each, and hardly anything beside them."""
    stages = tuple(
        stage.model_copy(update={"nimg": steps * stage.batch, "warmup_nimg": 0}) for stage in config.stages
    )
    never = config.nimg + 1
    quiet = {
        "log_nimg": 1,
        "validate_nimg": never,
        "sample_nimg": never,
        "checkpoint_nimg": never,
        "milestone_nimg": None,
        "validation_images": 1,
        "tensorboard": False,
        "wandb": None,
        "trackio": None,
    }
    return config.model_copy(
        update={
            "stages": stages,
            "logging": config.logging.model_copy(update=quiet),
            "sampling": config.sampling.model_copy(update={"steps": 1}),
            "initial_weights": None,
        }
    )
