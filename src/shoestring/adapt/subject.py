"""The job behind ``shoestring adapt dreambooth``: words, pictures, training, figures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from shoestring.adapt.dreambooth import (
    Training,
    check_base,
    choose_token,
    dreambooth_recipe,
    prepare_pictures,
    subject_files,
)
from shoestring.adapt.fidelity import measure, table
from shoestring.config import DreamBoothConfig, apply_overrides
from shoestring.encoders.text import build_text_encoder
from shoestring.models.files import read_header
from shoestring.runtime import atomic_write, pick_device, say, write_text
from shoestring.sampling.generate import load_pipeline
from shoestring.training.display import LiveLine
from shoestring.training.loop import train

FIGURES, GRID = "fidelity.json", "before-and-after.png"


@dataclass(frozen=True)
class SubjectJob:
    """What to do; see ``shoestring adapt dreambooth --help``."""

    base: Path
    pictures: Path
    class_words: str
    token: str | None
    """``None`` = a rare word of the text encoder."""
    template: str
    training: Training
    name: str
    """Of the run."""
    folder: Path
    changes: tuple[str, ...] = ()
    """Settings of the recipe, as key=value."""
    prompts: tuple[str, ...] = ()
    """Of the grid; empty = captions of the base's data."""


def learn_subject(job: SubjectJob, console: Console) -> dict[str, Any] | None:
    """Teach a model a subject, and measure what came of it.

    Args:
        job: what to do.
        console: where a person reads.

    Returns:
        The figures of ``fidelity.json``; ``None`` after an interruption.

    Raises:
        UserError: for mistakes in words, pictures or settings.
    """
    path = check_base(job.base)
    config = read_header(path).config
    subject_files(job.pictures)
    word = choose_token(build_text_encoder(config.data), job.token)
    words = DreamBoothConfig(token=word, class_words=job.class_words, template=job.template)
    recipe = dreambooth_recipe(job.base, words, job.training, job.name, job.folder)
    config = apply_overrides(recipe, job.changes)
    before = load_pipeline(path, pick_device(config.device))
    say(console, f"{words.subject_prompt!r} will be the subject, {words.class_prompt!r} any of its class")
    prior = job.training.prior
    with LiveLine(console) as line:

        def drawing(done: int) -> None:
            line.show(f"drawing the class: {done}/{prior}")

        prepare_pictures(config, job.folder, job.pictures, before, prior, drawing)
    if not train(config, job.folder, console):
        return None
    after = load_pipeline(job.folder, pick_device(config.device))
    figures, grid = measure(job.folder, job.base, (before, after), job.prompts, console)
    write_text(job.folder / FIGURES, json.dumps(figures, indent=1) + "\n")
    atomic_write(job.folder / GRID, lambda file: grid.save(file, format="PNG"))
    for text in table(figures):
        say(console, text)
    say(console, f"Look at {job.folder / GRID}; all figures are in {FIGURES} beside it.")
    return figures
