"""``shoestring export``, ``push`` and ``import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from shoestring.cli.options import choice
from shoestring.runtime import UserError, say

console = Console()
PRECISIONS = {
    "file": ("fp32", "bf16", "int8"),
    "diffusers": ("fp32", "bf16"),
    "onnx": ("fp32",),
    "torch": ("fp32",),
    "released": ("fp32",),
    "card": ("fp32",),
}
"""What each form may hold; its keys are the forms."""


def export(
    run: Annotated[Path, typer.Argument(help="run folder, checkpoint folder or model file")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[sampling.KEY=VALUE]...", help="other defaults for drawing"),
    ] = None,
    to: Annotated[str, typer.Option(help="file, diffusers, onnx, torch, released or card")] = "file",
    out: Annotated[
        Path | None, typer.Option(help="file or folder [default: RUN/export/..., by what it is]")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="of the weights: fp32, bf16 (file, diffusers) or int8 (file)")
    ] = "fp32",
    weights: Annotated[
        str | None, typer.Option(help="ema, weights or power-... [default: averaged ones]")
    ] = None,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="although the run is not finished")
    ] = False,
) -> None:
    """Take a model to where people work: one file, diffusers, ONNX, torch.export, released layouts.

    All but released layouts carry a model card, filled from the run.
    """
    from shoestring.export.source import open_source

    kind = choice("--to", to, tuple(PRECISIONS))
    if precision not in PRECISIONS[kind]:
        choice("--precision", precision, ("fp32", "bf16", "int8"))
        raise UserError(
            f"--precision is {precision}, and --to {kind} knows {' and '.join(PRECISIONS[kind])} only"
        )
    source = open_source(run, weights, unfinished, overrides or [])
    target = out or _target(source, kind, precision)
    say(console, f"{target}: {_export(source, kind, target, precision)}")


def _target(source: Any, kind: str, precision: str) -> Path:
    """Where an export goes by itself: into the run, or beside the model file."""
    folder = (source.run or source.file.parent) / "export"
    name = source.config.name if precision == "fp32" else f"{source.config.name}-{precision}"
    if kind in ("file", "card"):
        return Path(folder / f"{name}{'.safetensors' if kind == 'file' else '.md'}")
    return Path(folder / (kind if precision == "fp32" else f"{kind}-{precision}"))


def _export(source: Any, kind: str, target: Path, precision: str) -> str:
    if kind == "file":
        from shoestring.export.file import export_file

        return export_file(source, target, precision)
    if kind == "diffusers":
        from shoestring.export.pipeline import export_diffusers

        return export_diffusers(source, target, precision)
    if kind == "onnx":
        from shoestring.export.program import export_onnx

        return export_onnx(source, target)
    if kind == "torch":
        from shoestring.export.program import export_torch

        return export_torch(source, target)
    if kind == "released":
        from shoestring.export.released import export_released

        return export_released(source, target)
    from shoestring.export.card import export_card

    return export_card(source, target)


def push(
    folder: Annotated[Path, typer.Argument(help="what shoestring export made: a folder or a model file")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only list what would go there; needs no network")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="if the repository is made anew")] = False,
) -> None:
    """Upload an export to the Hugging Face hub (HF_TOKEN, or hf auth login)."""
    from shoestring.export.push import check_name, collect
    from shoestring.export.push import push as upload

    found = collect(folder)
    check_name(repository)
    if found.left_open():
        say(console, "The card has fields that are to be filled in, the licence among them")
    if dry_run:
        say(console, "\n".join([f"To {repository}:", *found.listed()]))
        return
    say(console, upload(found, repository, private))


def import_(
    file: Annotated[Path, typer.Argument(help="released weights: .safetensors or .pt")],
    recipe: Annotated[str, typer.Option(help="recipe of the model, or a YAML file")],
    out: Annotated[Path, typer.Option(help="run folder to make")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY.SUB=VALUE]...", help="settings of the recipe to change"),
    ] = None,
    part: Annotated[str, typer.Option(help="of a training checkpoint: ema or model")] = "ema",
) -> None:
    """Make a run of released MicroDiT or MaskDiT weights, to sample, evaluate and fine-tune."""
    from shoestring import recipes
    from shoestring.export.released import import_released

    config = recipes.resolve(recipe, overrides or [])
    said = import_released(file, config, out, choice("--part", part, ("ema", "model")))
    say(console, f'{out}: {said}. Draw with: shoestring sample {out} --prompt "..."')
