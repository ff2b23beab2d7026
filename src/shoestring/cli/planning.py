"""The command that says what a run costs before it is run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from shoestring import recipes
from shoestring.cli.options import choice
from shoestring.runtime import UserError

if TYPE_CHECKING:
    from shoestring.planning import Machine

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
    images: Annotated[float, typer.Option(help="study: pictures that will be made")] = 1e6,
    metric: Annotated[str, typer.Option(help="study: kid or fd")] = "kid",
) -> None:
    """Say what a recipe will take: FLOPs, memory of a GPU, hours and dollars of every stage.

    Every figure is marked counted, published, predicted or measured here. With "study FOLDER" in place of a
    recipe: the fits of a sampling-cost study, and the best sizes for budgets of training and of sampling.
    """
    from shoestring.planning import Machine, whole_plan
    from shoestring.planning import gpu as named
    from shoestring.studies.measured_plan import measured_costs

    machine = Machine(named(gpu), n, mfu, price)
    if recipe == "study":
        if images < 0:
            raise UserError(f"--images is {images:g}; it must be 0 or more")
        _plan_study(overrides or [], machine, images, metric)
        return
    config = recipes.resolve(recipe, overrides or [])
    whole = whole_plan(config, machine, choice("--flops", flops, ("counted", "published")))
    console = _console()
    measured = None if measure is None else measured_costs(config, measure, price, console)
    for table in whole.tables(measured):
        console.print(table)


def _console() -> Console:
    console = Console()
    # Into a file or a pipe as wide as it needs to be.
    return console if console.is_terminal else Console(width=TABLE_WIDTH)


def _plan_study(paths: list[str], machine: Machine, images: float, metric: str) -> None:
    from shoestring.studies.plan_study import plan_study

    if len(paths) != 1:
        raise UserError(
            "plan study takes the folder of one sampling-cost study, such as runs/study-sampling-tiny"
        )
    plan_study(Path(paths[0]), metric, machine, images, _console())


def advise(
    budget: Annotated[float, typer.Option(help="dollars for training and all pictures together")],
    images: Annotated[float, typer.Option(help="pictures that will be made, e.g. 1e6")] = 0.0,
    max_latency: Annotated[str | None, typer.Option(help="of one picture on one GPU, e.g. 2s")] = None,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, b200, mi300x, l40s, 4090 or 5090")] = "h100",
    n: Annotated[int, typer.Option("--n", help="how many of them")] = 1,
    price: Annotated[float | None, typer.Option(help="dollars for an hour of one of them")] = None,
    mfu: Annotated[float, typer.Option(help="share of the peak that training is assumed to use")] = 0.35,
    sampling_mfu: Annotated[float, typer.Option(help="the same for sampling")] = 0.25,
    max_cost: Annotated[
        float | None, typer.Option(help="sampling cost of a picture, normalised as in the evidence")
    ] = None,
    study: Annotated[
        Path | None, typer.Option(help="folder of your own sampling-cost study [default: published figures]")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="with --study: kid or fd [default: kid]")] = None,
) -> None:
    """Recommend a size, recipe, steps, sampler and guidance for a budget, with the evidence.

    The evidence is the published LDM scaling study (arXiv 2404.01367), or your own with --study.
    """
    from shoestring.planning import Machine
    from shoestring.planning import gpu as named
    from shoestring.planning.advice import ASSUMED_USD, Wishes
    from shoestring.studies.advise import advise as find
    from shoestring.studies.advise import print_advice, seconds_of

    usd = ASSUMED_USD.get(gpu.lower()) if price is None else price
    device = named(gpu)
    if usd is None:
        raise UserError(f"--price is not set, and there is no assumption for {gpu}: give dollars for an hour")
    latency = None if max_latency is None else seconds_of(max_latency)
    if metric is not None and study is None:
        raise UserError(
            "--metric is of your own study, and --study is not set; the published figures are FIDs"
        )
    wishes = Wishes(budget, images, latency, Machine(device, n, mfu, usd), sampling_mfu, max_cost)
    print_advice(find(wishes, study, metric or "kid"), wishes, price is None, _console())
