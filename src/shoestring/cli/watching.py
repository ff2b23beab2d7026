"""``shoestring watch`` and ``shoestring compare``: runs looked at from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shoestring.cli.options import refuse
from shoestring.runtime import pick_device, say

console = Console()


def watch(
    run: Annotated[Path, typer.Argument(help="run folder")],
    once: Annotated[bool, typer.Option("--once", help="print it once and end")] = False,
) -> None:
    """Look at a run while it trains: loss by noise level, rate, money, time left, events. Ctrl-C ends it."""
    from shoestring.studies.watch import watch as show

    show(run, console, once)


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders")],
    out: Annotated[Path, typer.Option(help="page to write")] = Path("compare.html"),
    samples: Annotated[bool, typer.Option(help="draw pictures from the newest checkpoints")] = True,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="what to draw; may be repeated [default: as in the first run]"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, mps [default: auto]")] = None,
) -> None:
    """Compare runs on one HTML page: curves over images, FLOPs, hours and dollars, samples, settings."""
    from shoestring.studies.compare import read_runs
    from shoestring.studies.compare_page import check_page, write_page
    from shoestring.studies.compare_samples import draw_samples

    if not samples:
        refuse({"--prompt": prompt, "--device": device}, "which draws nothing", "--no-samples")
    check_page(out)
    compared = read_runs(runs)
    drawn = draw_samples(compared, prompt or [], pick_device(device or "auto"), console) if samples else []
    write_page(out, compared, drawn)
    say(console, f"Compared in {out}: {', '.join(run.label for run in compared)}")
