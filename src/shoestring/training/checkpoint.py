"""Checkpoints: a folder that is there whole or not at all.

``checkpoints/000012800/`` holds ``weights.safetensors`` and ``ema.safetensors`` (each a model file that
``shoestring sample`` reads) and ``state.pt`` (optimisers and counters, read with ``weights_only=True``).
It is written under a temporary name and renamed when complete.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from shoestring.config import RunConfig
from shoestring.models.files import ModelFacts, load_model, load_weights, save_model
from shoestring.runtime import UserError
from shoestring.training.step import Learner

WEIGHTS, AVERAGE, STATE = "weights.safetensors", "ema.safetensors", "state.pt"


@dataclass
class Counters:
    """Where a run is; together with the configuration this determines everything that comes."""

    nimg: int = 0
    """Images seen."""
    step: int = 0
    elapsed_s: float = 0.0
    """Time spent training, interruptions left out."""


def checkpoint_folders(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = (p for p in (run / "checkpoints").glob("*") if p.name.isdigit() and p.is_dir())
    return sorted(folders, key=lambda folder: int(folder.name))


def save_checkpoint(
    run: Path, learner: Learner, counters: Counters, config: RunConfig, facts: dict[str, Any]
) -> Path:
    """Write a checkpoint, then delete all but the last ``logging.keep_checkpoints``.

    Args:
        run: run folder.
        learner: what to save.
        counters: where the run is.
        config: of the run.
        facts: fields of :class:`ModelFacts` beside ``nimg`` and ``weights``.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: if the disk is full or not writable; older checkpoints are untouched.
    """
    folder = run / "checkpoints" / f"{counters.nimg:09d}"
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        trained = {name: p.detach() for name, p in learner.model.named_parameters()}
        buffers = dict(learner.model.named_buffers())
        for name, tensors in ((WEIGHTS, trained), (AVERAGE, learner.ema.state_dict())):
            kind = "trained" if name == WEIGHTS else "ema"
            save_model(temporary / name, tensors | buffers, config, ModelFacts(counters.nimg, kind, **facts))
        state = {"counters": asdict(counters), "optimizers": learner.optimizers.state_dict()}
        torch.save(state, temporary / STATE)
        for file in temporary.iterdir():
            _flush(file)
        if folder.exists():  # the same place saved twice, e.g. at a stage's end: nothing can differ
            shutil.rmtree(temporary)
        else:
            temporary.rename(folder)
    except (OSError, RuntimeError, UserError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = str(error).split("\n")[0]
        raise UserError(
            f"cannot write checkpoint {folder} ({reason}); free some space and give the same command again"
        ) from error
    for old in checkpoint_folders(run)[: -config.logging.keep_checkpoints]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _flush(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_checkpoint(folder: Path, learner: Learner) -> tuple[Counters, ModelFacts]:
    """Restore a checkpoint.

    Args:
        folder: written by :func:`save_checkpoint`.
        learner: built from the same configuration; filled in place.

    Returns:
        Counters and facts.

    Raises:
        UserError: if a file is damaged or belongs to another model.
    """
    _, trained, facts = load_model(folder / WEIGHTS)
    _, average, _ = load_model(folder / AVERAGE)
    try:
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        counters = Counters(**state["counters"])
        learner.optimizers.load_state_dict(state["optimizers"])
    except Exception as error:  # torch raises half a dozen types for a damaged file
        raise UserError(
            f"{folder / STATE} is damaged or belongs to another run ({str(error).splitlines()[0]}); delete "
            f"the folder {folder.name} to go on from the checkpoint before"
        ) from error
    load_weights(learner.model, dict(trained.state_dict()), str(folder / WEIGHTS))
    learner.ema.load_state_dict(dict(average.named_parameters()))
    return counters, facts
