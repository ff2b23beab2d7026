"""Commands for what comes after pre-training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shoestring.cli.options import choice
from shoestring.runtime import ExitCode, UserError

adapt_app = typer.Typer(no_args_is_help=True, help="What comes after pre-training.")


@adapt_app.command("superres")
def adapt_superres(
    base: Annotated[Path, typer.Argument(help="run folder, checkpoint folder or model file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="settings to change")
    ] = None,
    factor: Annotated[int, typer.Option(help="2, 4 or 8")] = 4,
    degradation: Annotated[str, typer.Option(help="realesrgan or bicubic")] = "realesrgan",
    noise: Annotated[float, typer.Option(help="noise on the small picture, at most (0 to 2)")] = 0.1,
    nimg: Annotated[int, typer.Option(help="images to train on", min=1)] = 100_000,
    batch: Annotated[int, typer.Option(help="images of a step", min=1)] = 64,
    lr: Annotated[float, typer.Option(help="learning rate")] = 1e-4,
    name: Annotated[str | None, typer.Option(help="of the run [default: BASE-xFACTOR]")] = None,
    out: Annotated[Path | None, typer.Option(help="run folder [default: runs/NAME]")] = None,
) -> None:
    """Fine-tune a pretrained model to enlarge pictures; interrupted, the same command goes on.

    At step 0 the model is the base. Then: shoestring upscale, and shoestring eval --protocol superres.
    """
    from shoestring.adapt.superres import superres_recipe
    from shoestring.config import SuperResConfig, apply_overrides
    from shoestring.models.files import find_model, read_header
    from shoestring.training.loop import train

    if factor not in (2, 4, 8):
        raise UserError(f"--factor is {factor}; it must be 2, 4 or 8")
    if not 0 <= noise <= 2:
        raise UserError(f"--noise is {noise:g}; it must be from 0 to 2")
    if not lr > 0:
        raise UserError(f"--lr is {lr:g}; it must be above 0")
    kind = choice("--degradation", degradation, ("realesrgan", "bicubic"))
    chosen = name or f"{read_header(find_model(base)).config.name}-x{factor}"
    settings = SuperResConfig(factor=factor, degradation=kind, noise=noise)
    config = superres_recipe(base, settings, chosen, nimg, batch, lr)
    config = apply_overrides(config, overrides or [])
    if not train(config, out or Path("runs") / config.name, Console()):
        raise typer.Exit(ExitCode.INTERRUPTED)


@adapt_app.command("distill")
def adapt_distill(
    teacher: Annotated[Path, typer.Argument(help="run folder, checkpoint folder or model file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="settings to change")
    ] = None,
    method: Annotated[str, typer.Option(help="consistency, codi, guided or progressive")] = "consistency",
    steps: Annotated[int, typer.Option(help="of the student's sampler", min=1)] = 4,
    guidance: Annotated[
        list[float] | None,
        typer.Option(
            help="scale folded in; twice: a range, the scale stays an input [default: the teacher's]"
        ),
    ] = None,
    first_steps: Annotated[
        int | None,
        typer.Option(help="progressive: of the first student, halved from there [default: 4x]", min=1),
    ] = None,
    nimg: Annotated[int, typer.Option(help="images to train on (progressive: each round)", min=1)] = 50_000,
    batch: Annotated[int, typer.Option(help="images of a step", min=1)] = 64,
    lr: Annotated[float, typer.Option(help="learning rate")] = 1e-4,
    name: Annotated[str | None, typer.Option(help="of the run [default: TEACHER-METHOD]")] = None,
    out: Annotated[Path | None, typer.Option(help="run folder [default: runs/NAME]")] = None,
) -> None:
    """Distil a model into one that needs 1 to 8 steps; interrupted, the same command goes on.

    Then: shoestring sample, with the sampler and the steps that the student was made for.
    """
    from shoestring.adapt.distill import METHODS, Distilling, distill_recipe, distill_runs
    from shoestring.config import apply_overrides
    from shoestring.models.files import find_model, read_header
    from shoestring.runtime import say
    from shoestring.training.folder import checkpoint_folders
    from shoestring.training.loop import train

    kind = choice("--method", method, METHODS)
    if not lr > 0:
        raise UserError(f"--lr is {lr:g}; it must be above 0")
    given = guidance or []
    if len(given) > 2 or any(not 0 <= scale < float("inf") for scale in given):
        raise UserError(f"--guidance is {given}; give one scale or two, each 0 or more")
    chosen = name or f"{read_header(find_model(teacher)).config.name}-{kind}-{steps}"
    asked = Distilling(kind, steps, (min(given), max(given)) if given else None, nimg, batch, lr)
    console = Console()
    rounds = distill_runs(
        teacher,
        chosen,
        out or Path("runs") / chosen,
        asked,
        4 * steps if first_steps is None else first_steps,
    )
    for i, each in enumerate(rounds):
        config = apply_overrides(distill_recipe(each.teacher, each.name, each.asked), overrides or [])
        done = [int(folder.name) for folder in checkpoint_folders(each.out)]
        if i < len(rounds) - 1 and done and max(done) >= config.nimg:
            continue
        if len(rounds) > 1:
            say(console, f"Round {i + 1} of {len(rounds)}: {each.asked.steps} steps, in {each.out}")
        if not train(config, each.out, console):
            raise typer.Exit(ExitCode.INTERRUPTED)


def upscale(
    checkpoint: Annotated[Path, typer.Argument(help="run folder, checkpoint folder or model file")],
    pictures: Annotated[list[Path], typer.Argument(help="pictures to enlarge")],
    overlap: Annotated[int, typer.Option(help="pixels that tiles share in the small picture")] = 2,
    steps: Annotated[int | None, typer.Option(help="of the sampler", min=1)] = None,
    sampler: Annotated[str | None, typer.Option(help="as in sampling.sampler")] = None,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    out: Annotated[Path, typer.Option(help="folder of the enlarged pictures")] = Path("upscaled"),
) -> None:
    """Enlarge pictures with a model of shoestring adapt superres, in tiles where they are large."""
    from dataclasses import replace

    from shoestring.adapt.superres import upscale as enlarge
    from shoestring.config import apply_overrides
    from shoestring.runtime import pick_device, say
    from shoestring.sampling.generate import load_pipeline, read_pixels, save_png, to_pil
    from shoestring.sampling.samplers import lowered_order
    from shoestring.training.display import LiveLine

    console = Console()
    pipeline = load_pipeline(checkpoint, pick_device(device))
    changes = [f"sampling.{key}={value}" for key, value in (("steps", steps), ("sampler", sampler)) if value]
    pipeline = replace(pipeline, config=apply_overrides(pipeline.config, changes))
    names = [path.stem for path in pictures]
    for path in pictures:
        if not path.is_file():
            raise UserError(f"{path} does not exist")
        if names.count(path.stem) > 1:
            raise UserError(
                f"several pictures are called {path.stem}, and one would overwrite the other; enlarge them "
                "into folders of their own with --out"
            )
    warning = lowered_order(pipeline.config.sampling)
    if warning is not None:
        say(console, warning)
    for path in pictures:
        with LiveLine(console) as line:
            made = enlarge(
                pipeline,
                read_pixels(path),
                seed,
                overlap,
                lambda done, total, path=path: line.show(f"{path.name}: {done}/{total} tiles"),  # type: ignore[misc]
            )
        target = out / f"{path.stem}-x{made.shape[2] // read_pixels(path).shape[2]}.png"
        save_png(target, to_pil(made), {"picture": path.name, "seed": seed})
        say(console, f"{target}: {made.shape[2]} x {made.shape[1]} pixels")
