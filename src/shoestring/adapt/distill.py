"""Distillation: the recipe of a run that turns a trained model into one of few steps."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from shoestring.adapt.recipe import fine_tuning_logging, fine_tuning_stage
from shoestring.config import RunConfig, from_json
from shoestring.diffusion.grids import PLACES
from shoestring.diffusion.process import build_process
from shoestring.models.files import Header, find_model, read_header
from shoestring.runtime import UserError

Method = Literal["consistency", "codi", "guided", "progressive"]
METHODS: tuple[Method, ...] = ("consistency", "codi", "guided", "progressive")
LEVELS = 18
"""Of the path of consistency distillation, as on EDM's grid for small pictures."""


@dataclass(frozen=True)
class Distilling:
    """What is asked for; see ``shoestring adapt distill --help``."""

    method: Method
    steps: int
    """Of the student's sampler."""
    guidance: tuple[float, float] | None
    """Scales folded in; ``None`` = that of the teacher's own sampling."""
    nimg: int
    batch: int
    lr: float
    halvings: int = 0
    """Progressive: rounds still to come, whose levels are among those of this one."""


@dataclass(frozen=True)
class Round:
    """One run of a distillation."""

    teacher: Path
    name: str
    out: Path
    asked: Distilling


def distill_recipe(teacher: Path, name: str, asked: Distilling) -> RunConfig:
    """The recipe that distils a model into a student of the same size.

    The student begins as the teacher; where the scale of guidance becomes an input, its weights are zero,
    so that at step 0 the student is the teacher without guidance. Data, codec, process and optimiser are
    the teacher's.

    Args:
        teacher: run folder, checkpoint folder or model file.
        name: of the run.
        asked: method, steps, guidance, length.

    Returns:
        A recipe that ``shoestring train`` can run as well.

    Raises:
        UserError: if the teacher cannot be read, or what is asked for does not fit it.
    """
    path = find_model(teacher)
    header = read_header(path)
    config = header.config
    if config.distill is not None and asked.method in ("consistency", "codi"):
        raise UserError(
            f"{path} is distilled already ({config.distill.method}), and its path is no longer that of the "
            "data; give the model it was made from"
        )
    guidance = _guidance(header, asked, path)
    takes_scale = asked.method == "guided" or guidance[0] < guidance[1] or config.model.guidance_input
    stage = fine_tuning_stage(header, asked.method, asked.nimg, asked.batch, asked.lr)
    values = config.model_dump() | {
        "name": name,
        "model": config.model.model_dump() | {"guidance_input": takes_scale},
        "distill": _settings(path, asked, guidance),
        # A student whose guidance is folded in is never asked without the condition.
        "data": config.data.model_dump()
        | ({} if asked.method == "codi" or config.superres else {"caption_drop": 0.0}),
        "stages": [stage],
        "initial_weights": str(path.resolve()),
        "sampling": _sampling(header, asked, guidance, takes_scale),
        "logging": fine_tuning_logging(config, asked.nimg, asked.batch, 5),
    }
    return from_json(json.dumps(values), "the recipe of the distillation")


def distill_runs(teacher: Path, name: str, out: Path, asked: Distilling, first_steps: int) -> list[Round]:
    """The runs of a distillation: one, or for progressive distillation one for each halving.

    Args:
        teacher: run folder, checkpoint folder or model file.
        name: of the last run.
        out: its folder; those before it are inside.
        asked: what the last student is to be.
        first_steps: progressive: steps of the first student.

    Returns:
        The runs in order; a round's teacher is there only when the one before it is done.

    Raises:
        UserError: if the steps do not halve to what is asked for.
    """
    if asked.method != "progressive":
        return [Round(teacher, name, out, asked)]
    steps = [first_steps]
    while steps[-1] > asked.steps and steps[-1] % 2 == 0:
        steps.append(steps[-1] // 2)
    if steps[-1] != asked.steps:
        raise UserError(
            f"--first-steps is {first_steps}; halved again and again it must become --steps ({asked.steps}), "
            f"such as {asked.steps}, {2 * asked.steps} or {4 * asked.steps}"
        )
    rounds: list[Round] = []
    for i, count in enumerate(steps):
        folder = out if count == asked.steps else out / "rounds" / str(count)
        before = rounds[-1].out if rounds else teacher
        run_name = name if count == asked.steps else f"{name}-round-{count}"
        rounds.append(
            Round(
                before,
                run_name,
                folder,
                replace(
                    asked,
                    steps=count,
                    halvings=len(steps) - 1 - i,
                    guidance=asked.guidance if i == 0 else None,
                ),
            )
        )
    return rounds


def _guidance(header: Header, asked: Distilling, path: Path) -> tuple[float, float]:
    config = header.config
    if config.model.guidance_input and config.distill is None:
        raise UserError(
            f"{path} takes the scale of guidance as an input but was not distilled, so no scale means "
            "anything to it; give a model that was trained with model.guidance_input=false"
        )
    unguided = asked.method == "codi" or config.superres is not None or config.model.condition == "none"
    if config.model.guidance_input:
        assert config.distill is not None
        return config.distill.guidance if asked.guidance is None else asked.guidance
    if unguided and asked.method == "guided":
        raise UserError(
            f"--method guided makes one pass of two, but {path} has no condition to leave out and needs one "
            "as it is; choose consistency, codi or progressive"
        )
    if unguided:
        if asked.guidance is not None and asked.guidance != (1.0, 1.0):
            why = (
                "method codi has no teacher to guide" if asked.method == "codi" else f"{path} has no captions"
            )
            raise UserError(f"--guidance is given, but {why}; leave it out")
        return 1.0, 1.0
    if config.distill is not None and config.distill.method != "codi":  # folded in already
        if asked.guidance not in (None, (1.0, 1.0)):
            raise UserError(
                f"--guidance is given, but {path} has guidance folded in already and knows nothing "
                "without; leave it out"
            )
        return 1.0, 1.0
    if asked.guidance is not None:
        return asked.guidance
    if asked.method == "guided":
        return 1.0, max(4.0, 2 * config.sampling.guidance)
    return (config.sampling.guidance,) * 2


def _settings(path: Path, asked: Distilling, guidance: tuple[float, float]) -> dict[str, Any]:
    path_steps = {"consistency": LEVELS, "codi": LEVELS, "guided": 1, "progressive": asked.steps}
    return {
        "method": asked.method,
        "teacher": str(path.resolve()),
        "guidance": guidance,
        "steps": path_steps[asked.method],
        "data_weight": 1.0 if asked.method == "codi" else 0.0,
        # CoDi makes its own steps, and under the pseudo-Huber distance learns to leave the noise.
        **({"huber": 0.0} if asked.method == "codi" else {}),
    }


def _sampling(
    header: Header, asked: Distilling, guidance: tuple[float, float], takes_scale: bool
) -> dict[str, Any]:
    """How the student is sampled: its own number of steps, guidance off where it is folded in."""
    teachers = header.config.sampling
    changes: dict[str, Any] = {
        "weak": "condition",
        "strong_ratio": 0.0,
        "guidance_interval": None,
        "eta": 0.0,
    }
    if asked.method != "codi":
        folded = min(max(teachers.guidance, guidance[0]), guidance[1])
        changes["guidance"] = folded if takes_scale else 1.0
    if asked.method != "guided":
        sampler = "ddim" if asked.method == "progressive" else "consistency"
        changes |= {"sampler": sampler, "steps": asked.steps} | _table(header, asked.steps >> asked.halvings)
    return teachers.model_dump() | changes


def _table(header: Header, steps: int) -> dict[str, Any]:
    """The student's grid: no step is spent on the least noise, which counts as none.

    Grids in timesteps spend none as they are. Other numbers of steps stretch the table, so that every other
    level of twice as many steps is one of its own: what progressive distillation needs.
    """
    sampling = header.config.sampling
    process = build_process(header.config.process, header.facts.sigma_data)
    spacing = process.spacing if sampling.spacing == "auto" else sampling.spacing
    if spacing in PLACES:
        return {"spacing": "trailing"}
    if spacing == "table":  # somebody's own, or that of the round before
        return {}
    grid = process.grid(sampling.model_copy(update={"steps": steps + 1}), steps + 1)
    return {"spacing": "table", "sigmas": [sigma / alpha for alpha, sigma in grid[:-1]]}
