"""``shoestring ema``: averages of the weights of any length, after training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shoestring.runtime import UserError, say

console = Console()


def ema(
    places: Annotated[
        list[Path],
        typer.Argument(metavar="CKPTS...", help="run folder (all its snapshots), or checkpoint folders"),
    ],
    length: Annotated[
        str, typer.Option(help="standard deviations as shares of the run, e.g. 0.05,0.10,0.15")
    ],
    out: Annotated[Path | None, typer.Option(help="folder of the files [default: RUN/averages]")] = None,
) -> None:
    """Make averages of any length of the weights, from those kept while training (power_ema)."""
    from shoestring.training.posthoc import reconstruct

    made = reconstruct(places, _lengths(length), out, lambda text: say(console, f"Making {text}"))
    for each in made:
        doubt = "" if each.fits else " (a poor fit: take more snapshots, or a length nearer to theirs)"
        say(console, f"{each.path}: {each.residual:.2%} of its power function is not met{doubt}")
    best = min(made, key=lambda each: each.residual)
    say(console, f'Draw with: shoestring sample {best.path} --prompt "..."')


def _lengths(text: str) -> list[float]:
    """Numbers between commas, each once."""
    try:
        return list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError as error:
        raise UserError(
            f"--length is {text!r}; it must be numbers between commas, such as 0.05,0.10"
        ) from error
