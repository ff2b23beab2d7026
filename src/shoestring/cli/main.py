"""The commands. Mistakes of the user end with one sentence and exit code 2."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer.exceptions import TyperException

from shoestring import recipes
from shoestring.cli.adapting import adapt_app, upscale
from shoestring.cli.averages import ema
from shoestring.cli.data import app as data_app
from shoestring.cli.evaluating import app as eval_app
from shoestring.cli.exporting import export, import_, push
from shoestring.cli.planning import advise, plan
from shoestring.cli.profiling import profile
from shoestring.cli.studying import study_app
from shoestring.cli.subjects import dreambooth, lora_file, merge
from shoestring.cli.watching import compare, watch
from shoestring.config import RunConfig, apply_overrides, to_yaml
from shoestring.runtime import (
    ExitCode,
    OutOfMemory,
    SaidElsewhere,
    TrainingFailed,
    UserError,
    keep_freed_memory,
    pick_device,
    say,
)

TABLE_WIDTH = 200

console = Console()
app = typer.Typer(
    help="Train image diffusion models from scratch on a shoestring.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # "rich" would take [default: ...] for a colour and leave it out
)
recipes_app = typer.Typer(help="List recipes; with show NAME, print one whole.", invoke_without_command=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(study_app, name="study")
adapt_app.command()(dreambooth)
adapt_app.command("lora-file")(lora_file)
adapt_app.command()(merge)
app.add_typer(adapt_app, name="adapt")
app.add_typer(data_app, name="data")
app.add_typer(eval_app, name="eval")
app.command()(ema)
app.command()(plan)
app.command()(advise)
app.command()(upscale)
app.command()(watch)
app.command()(compare)
app.command()(profile)
app.command()(export)
app.command()(push)
app.command("import")(import_)

Recipe = Annotated[str, typer.Argument(help="name of a recipe (see: shoestring recipes list) or a YAML file")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="settings to change")
]
Out = Annotated[
    Path | None, typer.Option(help="run folder [default: runs/NAME, or runs/NAME-FOLDER for own pictures]")
]


def _folder(config: RunConfig, out: Path | None) -> Path:
    """The run folder; a run on somebody's own pictures does not get in the way of the recipe's own."""
    if out is not None:
        return out
    own = config.data.path if config.data.source == "folder" else None
    return Path("runs") / (config.name if own is None else f"{config.name}-{Path(own).resolve().name}")


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    nproc: Annotated[
        int | None, typer.Option(help="processes on this machine, one a GPU [default: 1]", min=1)
    ] = None,
    from_stage: Annotated[
        str | None, typer.Option(help="leave out the stages before this one (name or number)")
    ] = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="go on although settings have changed")
    ] = False,
) -> None:
    """Train a model; interrupted, the same command goes on.

    Your own pictures: shoestring train demo data.source=folder data.path=my_pics
    """
    from shoestring.training.launch import Launcher, check_ranks, is_first, without_nproc
    from shoestring.training.starting import from_stage as cut

    config = recipes.resolve(recipe, overrides or [])
    if from_stage is not None:
        config = cut(config, from_stage)
    folder = _folder(config, out)
    if nproc is not None and nproc > 1:
        check_ranks(config, nproc)
        pick_device(config.device)  # said once, not by every rank
        code = Launcher(without_nproc(sys.argv[1:]), nproc, folder, console).run()
        if code:
            raise typer.Exit(code)
        return
    from shoestring.training.loop import train as run

    if not run(config, folder, console, allow_changes):
        raise typer.Exit(ExitCode.INTERRUPTED)
    if is_first():
        say(console, f'Done: {folder}. Draw with: shoestring sample {folder} --prompt "..."')


@app.command()
def demo(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [KEY.SUB=VALUE]...", help="recipe or YAML file [default: demo]"),
    ] = None,
    out: Out = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="seconds instead of minutes: a check, not a model")
    ] = False,
) -> None:
    """Train from nothing, draw, measure, and write report.html."""
    from shoestring.studies.demo import quick as shortened
    from shoestring.studies.demo import run_demo

    words = words or []
    named = bool(words) and "=" not in words[0]
    config = recipes.resolve(words[0] if named else "demo", words[named:])
    if quick:
        config = shortened(config)
    if not run_demo(config, _folder(config, out), console):
        raise typer.Exit(ExitCode.INTERRUPTED)


@app.command()
def sample(
    checkpoint: Annotated[Path, typer.Argument(help="run folder, checkpoint folder or .safetensors file")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[sampling.KEY=VALUE]...", help="any other sampling setting"),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="what to draw; may be repeated")
    ] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="text file, one prompt a line")] = None,
    num: Annotated[int, typer.Option(help="pictures per prompt", min=1)] = 1,
    steps: Annotated[int | None, typer.Option(help="noise levels [default: as configured]")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="0 ignores the prompt, 1 is plain, more follows it more")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="heun, euler, dpmpp-2m or dpmpp-3m")] = None,
    negative: Annotated[str | None, typer.Option(help="what to move away from")] = None,
    image: Annotated[Path | None, typer.Option(help="picture to begin with")] = None,
    strength: Annotated[float, typer.Option(help="with --image: 0 keeps it, 1 forgets it")] = 0.6,
    seed: Annotated[
        int | None, typer.Option(help="same seed, same pictures [default: a new one]", min=0)
    ] = None,
    batch: Annotated[int, typer.Option(help="pictures at once", min=1)] = 64,
    gif: Annotated[bool, typer.Option("--gif", help="also save the denoising as animation")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps")] = "auto",
    out: Annotated[Path, typer.Option(help="folder of the pictures")] = Path("samples"),
) -> None:
    """Draw pictures with a trained model."""
    from shoestring.sampling.command import SampleJob, run_sample

    changes = list(overrides or [])
    for name, value in (("steps", steps), ("guidance", guidance), ("sampler", sampler)):
        if value is not None:
            finite = isinstance(value, str) or math.isfinite(value)
            changes.append(f"sampling.{name}={value if finite else f'.{value}'}")  # YAML writes .nan
    for change in changes:
        if not change.startswith("sampling."):
            raise UserError(f"{change!r} cannot be changed when sampling; settings begin with sampling.")
    job = SampleJob(
        prompts=tuple(prompt or ()),
        prompts_file=prompts_file,
        num=num,
        negative=negative,
        image=image,
        strength=strength,
        seed=seed,
        batch=batch,
        gif=gif,
        out=out,
    )
    run_sample(checkpoint, job, lambda config: apply_overrides(config, changes), pick_device(device), console)


@app.command()
def retrieval(
    run: Annotated[Path, typer.Argument(help="run folder of a demo")],
    samples: Annotated[Path, typer.Option(help="folder of PNGs, at any depth")],
) -> None:
    """Compute the retrieval measure of pictures that were drawn, from the files alone."""
    from shoestring.studies.demo import recompute_retrieval

    for key, value in recompute_retrieval(run, samples).items():
        say(console, f"{key}: {value:g}")


@app.command()
def flops(recipe: Recipe, overrides: Overrides = None) -> None:
    """Count what a recipe costs: parameters, FLOPs of an image, of every stage and of the run."""
    from shoestring.planning import plan, plan_table

    config = recipes.resolve(recipe, overrides or [])
    table = plan_table(plan(config), recipes.published_gflop(config))
    # Into a file or a pipe as wide as it needs to be.
    (console if console.is_terminal else Console(width=TABLE_WIDTH)).print(table)


@recipes_app.callback()
def list_unless_asked(context: typer.Context) -> None:
    """List recipes; with show NAME, print one whole."""
    if context.invoked_subcommand is None:
        list_recipes()


@recipes_app.command("list")
def list_recipes() -> None:
    """All recipes, a line each."""
    for name in recipes.names():
        say(console, f"{name:26}{recipes.describe(name).splitlines()[0]}")


@recipes_app.command("show")
def show_recipe(recipe: Recipe, overrides: Overrides = None) -> None:
    """Complete YAML of a recipe, with comments: save it, change it, train with it."""
    header = recipes.describe(recipe) if recipe in recipes.names() else ""
    print(to_yaml(recipes.resolve(recipe, overrides or []), header))


def main() -> None:
    """Entry point of the command ``shoestring``."""
    keep_freed_memory()
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except TyperException as error:  # wrong words; without any, help was shown already
        if words := error.format_message().rstrip("."):
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "shoestring"
            say(Console(stderr=True), f"shoestring: {words}; {command} --help lists what there is")
        sys.exit(ExitCode.MISTAKE)
    except SaidElsewhere:
        sys.exit(ExitCode.MISTAKE)
    except UserError as error:
        say(Console(stderr=True), f"shoestring: {error}")
        sys.exit(ExitCode.MISTAKE)
    except OutOfMemory as error:
        say(Console(stderr=True), f"shoestring: {error}")
        sys.exit(ExitCode.NO_MEMORY)
    except TrainingFailed as error:  # of all ranks at once
        say(Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0"), f"shoestring: {error}")
        sys.exit(ExitCode.FAILED)
    except RuntimeError as error:
        from shoestring.training.launch import lost_another

        if not lost_another(error):
            raise
        sys.exit(ExitCode.LOST)  # whoever started the ranks says which one was lost
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
