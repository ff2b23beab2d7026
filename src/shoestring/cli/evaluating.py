"""``shoestring eval``: figures of a model, reference statistics, and whether two results may be compared."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from shoestring.cli.options import resumable
from shoestring.runtime import pick_device, say

console = Console()
DEFAULT = "(a model)"


class _Evaluations(TyperGroup):
    """What is no command of the group is a model to evaluate."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = [DEFAULT, *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].startswith("--") and args[0] != "--help":
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Evaluations,
    help="Evaluate a model: shoestring eval CHECKPOINT --protocol NAME. Also: sweep, stats, check.",
    no_args_is_help=True,
)


@app.command(DEFAULT, hidden=True)
def run(
    checkpoint: Annotated[Path, typer.Argument(help="run folder, checkpoint folder or .safetensors file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings of the protocol to change")
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="name (see: shoestring eval protocols) or YAML file")
    ] = "quick",
    out: Annotated[
        Path | None, typer.Option(help="folder of the results [default: eval in the run folder]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps")] = "auto",
    nproc: Annotated[
        int | None, typer.Option(help="processes that draw, one a GPU [default: 1]", min=1)
    ] = None,
) -> None:
    """Draw what a protocol asks for, and measure it; interrupted, the same command goes on."""
    import torch

    from shoestring.config import apply_overrides
    from shoestring.evaluation.protocol import find_protocol
    from shoestring.models.files import find_model, read_header
    from shoestring.studies.evaluate import Evaluation
    from shoestring.studies.evaluate_figures import evaluate
    from shoestring.studies.evaluate_page import write_page
    from shoestring.training.launch import Launcher, check_gpus, launched, without_nproc

    chosen = find_protocol(protocol)
    if chosen.sampling is None and any(each.startswith("sampling.") for each in overrides or []):
        # null stands for the recipe's own, and that is what is changed.
        own = read_header(find_model(checkpoint)).config.sampling
        chosen = chosen.model_copy(update={"sampling": own})
    chosen = apply_overrides(chosen, overrides or [])
    if launched():  # one of several that only draw
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        quiet = Console(quiet=rank > 0)
        place = pick_device(device)
        if place.type == "cuda":
            place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        Evaluation(checkpoint, chosen, out, place, quiet, (rank, ranks)).draw()
        return
    evaluation = Evaluation(checkpoint, chosen, out, pick_device(device), console)
    several = nproc is not None and nproc > 1

    def draw_together() -> None:
        code = Launcher(without_nproc(sys.argv[1:]), nproc or 1, evaluation.folder, console).run()
        if code:
            raise typer.Exit(code)

    if several and evaluation.device.type == "cuda":
        check_gpus(nproc or 1)
    with resumable():
        result = evaluate(evaluation, console, draw_together if several else None)
    say(console, f"Report: {write_page(evaluation, result)}")


@app.command()
def sweep(
    checkpoint: Annotated[Path, typer.Argument(help="run folder, checkpoint folder or .safetensors file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings of the protocol to change")
    ] = None,
    protocol: Annotated[str, typer.Option(help="name (shoestring eval protocols) or YAML file")] = "quick",
    guidance: Annotated[str, typer.Option(help="scales, as 1,1.5,2")] = "",
    steps: Annotated[str, typer.Option(help="noise levels, as 10,20")] = "",
    sampler: Annotated[str, typer.Option(help="samplers, as heun,euler")] = "",
    weights: Annotated[str, typer.Option(help="files of the checkpoint, as ema,power-0.1")] = "",
    out: Annotated[
        Path | None, typer.Option(help="folder of the results [default: eval in the run folder]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps")] = "auto",
) -> None:
    """Evaluate all combinations of some settings from the same noise: table, heat maps, best settings."""
    from shoestring.config import apply_overrides
    from shoestring.evaluation.protocol import find_protocol
    from shoestring.studies.evaluate_sweep import sweep as run_sweep

    chosen = apply_overrides(find_protocol(protocol), overrides or [])
    given = {"guidance": guidance, "steps": steps, "sampler": sampler, "weights": weights}
    axes = {name: [v.strip() for v in text.split(",") if v.strip()] for name, text in given.items()}
    with resumable():
        folder, _ = run_sweep(checkpoint, chosen, axes, out, pick_device(device), console)
    say(console, f"Table: {folder / 'sweep.csv'}, heat maps: {folder / 'sweep.html'}")


@app.command()
def stats(
    pictures: Annotated[str, typer.Argument(help="folder of pictures, or folder or URL of a store")],
    out: Annotated[Path, typer.Option(help=".npz file to write")],
    extractor: Annotated[str, typer.Option(help="features, e.g. inception, dinov2-vitl14")] = "inception",
    weights: Annotated[
        str | None, typer.Option(help="file, folder or hub name of the extractor's weights")
    ] = None,
    resize: Annotated[
        str | None, typer.Option(help="inception: tensorflow-bilinear (ADM) or pillow-bicubic (clean-fid)")
    ] = None,
    side: Annotated[
        int | None, typer.Option(help="squares of this side, the middle of each [default: as they are]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps")] = "auto",
) -> None:
    """Make reference statistics of real pictures."""
    from shoestring.studies.evaluate_stats import make_stats

    made = make_stats(pictures, out, extractor, weights, resize, side, pick_device(device), console)
    say(console, f"{out}: mean and covariance of {made.count:,} pictures")


@app.command()
def check(
    one: Annotated[Path, typer.Argument(help="result.json of an evaluation, or its folder")],
    other: Annotated[Path, typer.Argument(help="another")],
) -> None:
    """Say whether two results may be compared at all, and then their figures side by side."""
    from shoestring.evaluation.result import compared, read_result

    for line in compared(read_result(one), read_result(other)):
        say(console, line)


@app.command("protocols")
def list_protocols(
    name: Annotated[str | None, typer.Argument(help="print this one as YAML")] = None,
) -> None:
    """List the protocols in the box, or print one, to save and change."""
    from shoestring.config import to_yaml
    from shoestring.evaluation.protocol import find_protocol, protocols

    if name is not None:
        print(to_yaml(find_protocol(name)))
        return
    for each in protocols().values():
        say(console, f"{each.name:14}{', '.join(each.metrics)}")
