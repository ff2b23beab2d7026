"""``shoestring profile``: where the time of a training step goes."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console

from shoestring import recipes
from shoestring.config import RunConfig, StageConfig
from shoestring.runtime import UserError, pick_device

console = Console()
TABLE_WIDTH = 120
MOST_IMAGES = 32
"""Where neither the recipe nor the command says how many at once."""


def profile(
    recipe: Annotated[str, typer.Argument(help="name of a recipe or a YAML file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="settings to change")
    ] = None,
    stage: Annotated[str, typer.Option(help="name of a stage, or its number from 0")] = "0",
    batch: Annotated[
        int | None, typer.Option(help="images at once [default: the stage's micro_batch, or up to 32]", min=1)
    ] = None,
    steps: Annotated[int, typer.Option(help="steps to look at", min=1)] = 3,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda [default: the recipe's]")] = None,
    data: Annotated[bool, typer.Option("--data", help="read the recipe's data, not made-up numbers")] = False,
) -> None:
    """Time some training steps by parts of the model, against the FLOPs of each; nothing is kept."""
    from shoestring.training.profile import profile_recipe, profile_table

    config = recipes.resolve(recipe, overrides or [])
    chosen = _stage(config, stage)
    size = batch or chosen.micro_batch or min(chosen.batch, MOST_IMAGES)
    place = pick_device(config.device if device is None else device)
    try:
        found = profile_recipe(config, chosen, size, steps, place, data, console)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            f"{size:,} images at once do not fit into the memory of {place}; give fewer with --batch"
        ) from error
    table = profile_table(found, f"{config.name}, stage {chosen.name}, {place.type}", data)
    # Into a file or a pipe as wide as it needs to be.
    (console if console.is_terminal else Console(width=TABLE_WIDTH)).print(table)


def _stage(config: RunConfig, name: str) -> StageConfig:
    """A stage by its name or number."""
    names = [stage.name for stage in config.stages]
    if name in names:
        return config.stages[names.index(name)]
    if name.isdigit() and int(name) < len(names):
        return config.stages[int(name)]
    listed = ", ".join(f"{i} ({each})" for i, each in enumerate(names))
    raise UserError(f"--stage: there is no stage {name!r}; choose from {listed}")
