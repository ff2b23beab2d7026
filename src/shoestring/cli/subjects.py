"""Commands that teach a model a subject, and that move what was learned as low-rank factors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shoestring.cli.options import choice
from shoestring.runtime import ExitCode, UserError

Base = Annotated[Path, typer.Argument(help="run folder, checkpoint folder or model file")]
SafetensorsOut = Annotated[Path, typer.Option(help="the .safetensors file to write")]


def dreambooth(
    base: Base,
    pictures: Annotated[Path, typer.Argument(help="folder of 3 to 10 pictures of one subject")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="settings to change")
    ] = None,
    class_words: Annotated[str, typer.Option("--class", help="what kind of thing it is, e.g. cat")] = "",
    token: Annotated[
        str | None, typer.Option(help="the word for it [default: a rare one of the text encoder]")
    ] = None,
    template: Annotated[str, typer.Option(help="caption; {} is the subject, or its class alone")] = "a {}",
    lora: Annotated[int | None, typer.Option(help="rank of low-rank factors [default: 16]")] = None,
    full: Annotated[bool, typer.Option("--full", help="train all weights instead")] = False,
    alpha: Annotated[float | None, typer.Option(help="LoRA: alpha [default: the rank]")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="LoRA: linear maps by name, with * [default: of every attention]")
    ] = None,
    prior: Annotated[
        int, typer.Option(help="pictures of the class, drawn by the base; 0 = none", min=0)
    ] = 64,
    prior_weight: Annotated[float, typer.Option(help="samples of the class for one of the subject")] = 1.0,
    nimg: Annotated[int, typer.Option(help="images to train on", min=1)] = 1_600,
    batch: Annotated[int, typer.Option(help="images of a step", min=1)] = 16,
    lr: Annotated[
        float | None, typer.Option(help="learning rate [default: 2e-3 with LoRA, 1.5e-4 with --full]")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the run", min=0)] = 0,
    prompt: Annotated[
        list[str] | None, typer.Option(help="of the grid [default: captions of the base's data]")
    ] = None,
    name: Annotated[str | None, typer.Option(help="of the run [default: BASE-dreambooth]")] = None,
    out: Annotated[Path | None, typer.Option(help="run folder [default: runs/NAME]")] = None,
) -> None:
    """Teach a model a subject by a few pictures; interrupted, the same command goes on.

    Writes before-and-after.png and fidelity.json into the run folder. Then: shoestring sample RUN --prompt "a
    TOKEN CLASS".
    """
    from shoestring.adapt.dreambooth import Training
    from shoestring.adapt.subject import SubjectJob, learn_subject
    from shoestring.config import LoRAConfig
    from shoestring.models.files import find_model, read_header

    if not class_words.strip():
        raise UserError("--class is not given; say what kind of thing the subject is, e.g. --class cat")
    if template.count("{}") != 1 or "{" in template.replace("{}", ""):
        raise UserError(f"--template is {template!r}; it must hold {{}} once, as in 'a photo of a {{}}'")
    if full and (lora is not None or alpha is not None or target):
        raise UserError("--full trains all weights, and LoRA's options were given too; leave one of them out")
    for option, value in (("--lr", lr), ("--prior-weight", prior_weight), ("--alpha", alpha)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{option} is {value:g}; it must be above 0 and finite")
    if lora is not None and lora < 1:
        raise UserError(f"--lora is {lora}; the rank must be 1 or more (--full trains all weights)")
    factors = None if full else LoRAConfig(rank=lora or 16, alpha=alpha, targets=tuple(target or ("*attn*",)))
    chosen = name or f"{read_header(find_model(base)).config.name}-dreambooth"
    job = SubjectJob(
        base=base,
        pictures=pictures,
        class_words=class_words.strip(),
        token=token,
        template=template,
        training=Training(factors, prior, prior_weight, nimg, batch, lr or (1.5e-4 if full else 2e-3), seed),
        name=chosen,
        folder=out or Path("runs") / chosen,
        changes=tuple(overrides or ()),
        prompts=tuple(prompt or ()),
    )
    if learn_subject(job, Console()) is None:
        raise typer.Exit(ExitCode.INTERRUPTED)


def lora_file(
    run: Base,
    out: SafetensorsOut,
    keys: Annotated[
        str, typer.Option(help="names of the tensors: shoestring, diffusers or kohya")
    ] = "shoestring",
) -> None:
    """Write the low-rank factors of a run into a file of their own."""
    from shoestring.adapt.lora import LAYOUTS, write_lora
    from shoestring.runtime import say

    count = write_lora(run, out, choice("--keys", keys, LAYOUTS))
    say(Console(), f"{out}: factors of {count} linear maps, {out.stat().st_size / 1e6:.2f} MB")


def merge(
    base: Base,
    lora: Annotated[Path, typer.Argument(help="file of shoestring adapt lora-file")],
    out: SafetensorsOut,
    scale: Annotated[float, typer.Option(help="how much of what was learned; 0 is the base")] = 1.0,
) -> None:
    """Put low-rank factors into the weights of the base they were trained on: an ordinary model file."""
    from shoestring.adapt.lora import merge_lora
    from shoestring.runtime import say

    if not math.isfinite(scale):
        raise UserError(f"--scale is {scale:g}; it must be a finite number")
    merge_lora(base, lora, out, scale)
    say(Console(), f'{out}: draw with shoestring sample {out} --prompt "..."')
