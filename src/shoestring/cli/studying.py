"""Commands that compare methods side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shoestring.cli.options import choice
from shoestring.runtime import ExitCode, UserError

console = Console()
study_app = typer.Typer(help="Compare methods side by side.", no_args_is_help=True)


@study_app.command("tokens")
def study_tokens(
    preset: Annotated[str, typer.Option(help="tiny (a laptop, no data) or cifar10")] = "tiny",
    data: Annotated[str | None, typer.Option(help="cifar10: folder of the two Parquet files")] = None,
    cells: Annotated[
        list[str] | None, typer.Option(help="a group or a cell; may be repeated [default: all]")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="time for everything, such as 3m or 1.5h")] = None,
    nimg: Annotated[int | None, typer.Option(help="images a cell [default: the preset's]", min=1)] = None,
    plan: Annotated[bool, typer.Option("--plan", help="only print cells, hours and dollars")] = False,
    time: Annotated[
        bool, typer.Option("--time", help="first time all recipes in turns, on a quiet machine")
    ] = False,
    show: Annotated[str | None, typer.Option(help="print a cell's recipe, to train it on its own")] = None,
    usd_per_hour: Annotated[float, typer.Option(help="price of the machine", min=0)] = 0.0,
    out: Annotated[Path | None, typer.Option(help="folder [default: runs/study-tokens-PRESET]")] = None,
) -> None:
    """Compare ways of dropping tokens at equal images, FLOPs and time.

    Interrupted, the same command goes on; several at once share the cells.
    """
    from shoestring.studies.token_command import TokensJob, run_tokens

    job = TokensJob(
        preset=preset,
        data=data,
        cells=tuple(cells or ()),
        budget=budget,
        nimg=nimg,
        plan=plan,
        time=time,
        show=show,
        out=out or Path("runs") / f"study-tokens-{preset}",
        usd_per_hour=usd_per_hour,
    )
    if not run_tokens(job, console):
        raise typer.Exit(ExitCode.INTERRUPTED)


@study_app.command("sampling")
def study_sampling(
    preset: Annotated[str, typer.Option(help="tiny (minutes, no data), shapes or cifar10")] = "tiny",
    data: Annotated[str | None, typer.Option(help="cifar10: folder of the two Parquet files")] = None,
    model: Annotated[
        list[Path] | None,
        typer.Option(help="a run, checkpoint or model file to measure instead of training; may be repeated"),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="a family or a network; may be repeated")] = None,
    sampler: Annotated[list[str] | None, typer.Option(help="may be repeated [default: the preset's]")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="may be repeated [default: the preset's]")] = None,
    guidance: Annotated[
        list[float] | None, typer.Option(help="may be repeated [default: the preset's]")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="pictures of a cell [default: the preset's]")] = None,
    metric: Annotated[str, typer.Option(help="kid, fd, precision, recall, or accuracy (of shapes)")] = "kid",
    full: Annotated[
        bool, typer.Option("--full", help="measure every guidance instead of searching coarse to fine")
    ] = False,
    count_guidance: Annotated[
        bool, typer.Option("--count-guidance", help="count guidance's second pass as cost")
    ] = False,
    any_data: Annotated[
        bool, typer.Option("--any-data", help="allow networks that were trained on different data")
    ] = False,
    train_only: Annotated[bool, typer.Option("--train-only", help="train, and measure nothing yet")] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="only draw the page anew")] = False,
    out: Annotated[Path | None, typer.Option(help="folder [default: runs/study-sampling-PRESET]")] = None,
) -> None:
    """Measure quality per sampling cost over sizes, samplers, steps and guidance.

    Trains the preset's networks, or takes yours with --model. Interrupted, the same command goes on.
    """
    from shoestring.studies.sampling_command import SamplingJob, run_sampling

    job = SamplingJob(
        preset=preset,
        data=data,
        models=tuple(model or ()),
        only=tuple(only or ()),
        samplers=tuple(sampler or ()),
        steps=tuple(steps or ()),
        guidance=tuple(guidance or ()),
        samples=samples,
        metric=metric,
        full=full,
        count_guidance=count_guidance,
        any_data=any_data,
        train_only=train_only,
        report_only=report_only,
        out=out or Path("runs") / f"study-sampling-{preset}",
    )
    if not run_sampling(job, console):
        raise typer.Exit(ExitCode.INTERRUPTED)


@study_app.command("downstream")
def study_downstream(
    study: Annotated[Path, typer.Argument(help="folder of a sampling study")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="settings to change")
    ] = None,
    task: Annotated[str, typer.Option(help="superres, distill or dreambooth")] = "superres",
    family: Annotated[str, typer.Option(help="unet, microdit or maskdit")] = "unet",
    sizes: Annotated[int, typer.Option(help="how many, from the smallest to the largest", min=2)] = 4,
    nimg: Annotated[int, typer.Option(help="images of each fine-tuning", min=8)] = 30_720,
    batch: Annotated[int, typer.Option(help="images of a step", min=1)] = 32,
    lr: Annotated[float, typer.Option(help="learning rate")] = 3e-4,
    factor: Annotated[int, typer.Option(help="superres: 2, 4 or 8")] = 4,
    pictures: Annotated[
        Path | None, typer.Option(help="dreambooth: folder of 3 to 10 pictures of one subject")
    ] = None,
    class_words: Annotated[str, typer.Option("--class", help="dreambooth: what the subject is")] = "",
    steps: Annotated[list[int] | None, typer.Option(help="may be repeated [default: the task's]")] = None,
    samples: Annotated[int, typer.Option(help="pictures of a cell", min=16)] = 500,
    train_only: Annotated[bool, typer.Option("--train-only", help="train, and measure nothing yet")] = False,
    out: Annotated[Path | None, typer.Option(help="folder [default: STUDY/downstream/TASK]")] = None,
) -> None:
    """Take the networks of a sampling study to another task, and compare the sizes again.

    Super-resolution: quality at 4 to 100 steps. Distillation: students of 1 to 8 steps beside the study's own
    rows. DreamBooth: how near one subject comes, by size. Interrupted, the same command goes on.
    """
    from shoestring.studies.downstream import TASKS, DownstreamJob, run_downstream

    if factor not in (2, 4, 8):
        raise UserError(f"--factor is {factor}; it must be 2, 4 or 8")
    if not lr > 0:
        raise UserError(f"--lr is {lr:g}; it must be above 0")
    if any(count < 1 for count in steps or ()):
        raise UserError(f"--steps is {min(steps or ())}; it must be 1 or more")
    job = DownstreamJob(
        study=study,
        task=choice("--task", task, TASKS),
        family=choice("--family", family, ("unet", "microdit", "maskdit")),
        sizes=sizes,
        nimg=nimg,
        batch=batch,
        lr=lr,
        factor=factor,
        pictures=pictures,
        class_words=class_words,
        steps=tuple(steps or ()),
        samples=samples,
        changes=tuple(overrides or ()),
        train_only=train_only,
        out=out or study / "downstream" / task,
    )
    if not run_downstream(job, console):
        raise typer.Exit(ExitCode.INTERRUPTED)
