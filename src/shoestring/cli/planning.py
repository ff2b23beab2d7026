"""The command that says what a run costs before it is run."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from shoestring import recipes
from shoestring.cli.options import choice

TABLE_WIDTH = 200


def plan(
    recipe: Annotated[
        str, typer.Argument(help="name of a recipe (see: shoestring recipes list) or a YAML file")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="settings to change")
    ] = None,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, b200, mi300x, l40s, 4090 or 5090")] = "h100",
    n: Annotated[int, typer.Option("--n", help="how many of them")] = 1,
    price: Annotated[float | None, typer.Option(help="dollars for an hour of one of them")] = None,
    mfu: Annotated[float, typer.Option(help="share of the peak that training is assumed to use")] = 0.35,
    flops: Annotated[str, typer.Option(help="counted, or published (where they are known)")] = "counted",
    measure: Annotated[
        int | None, typer.Option(help="run so many steps of every stage here and carry them over")
    ] = None,
) -> None:
    """Say what a recipe will take: FLOPs, memory of a GPU, hours and dollars of every stage.

    Every figure is marked counted, published, predicted or measured here.
    """
    from shoestring.planning import Machine, whole_plan
    from shoestring.planning import gpu as named
    from shoestring.studies.measured_plan import measured_costs

    machine = Machine(named(gpu), n, mfu, price)
    config = recipes.resolve(recipe, overrides or [])
    whole = whole_plan(config, machine, choice("--flops", flops, ("counted", "published")))
    console = Console()
    if not console.is_terminal:  # into a file or a pipe as wide as it needs to be
        console = Console(width=TABLE_WIDTH)
    measured = None if measure is None else measured_costs(config, measure, price, console)
    for table in whole.tables(measured):
        console.print(table)
