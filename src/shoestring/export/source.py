"""What is exported: a model file, with its network and everything that is known of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shoestring.config import RunConfig, apply_overrides
from shoestring.models.files import ModelFacts, find_model, load_model
from shoestring.models.lora import merge_factors
from shoestring.models.network import BaseNetwork
from shoestring.runtime import UserError


@dataclass(frozen=True)
class Source:
    """A trained model."""

    file: Path
    run: Path | None
    """The run folder that the file lies in, if it does."""
    config: RunConfig
    """Of the run; its sampling settings become the defaults of what is exported."""
    network: BaseNetwork
    """In evaluation mode, on the CPU, float32."""
    facts: ModelFacts


def open_source(path: Path, weights: str | None, unfinished: bool, overrides: Sequence[str] = ()) -> Source:
    """Read what is to be exported.

    Args:
        path: run folder, checkpoint folder or model file.
        weights: which of a checkpoint, as ``ema``, ``weights`` or ``power-0.1``; ``None`` takes the average.
        unfinished: whether a run that has not seen all its images may be exported.
        overrides: of the sampling settings.

    Returns:
        The model.

    Raises:
        UserError: if there is none, or its run is not finished and that was not allowed.
    """
    for change in overrides:
        if not change.startswith("sampling."):
            raise UserError(f"{change!r} cannot be changed when exporting; settings begin with sampling.")
    file = find_model(path, weights)
    config, network, facts = load_model(file)
    if facts.nimg < config.nimg and not unfinished:
        raise UserError(
            f"{file} has seen {facts.nimg:,} of its run's {config.nimg:,} images; let the run finish, or "
            "export it as it is with --unfinished"
        )
    if config.lora is not None:
        merge_factors(network)
        config = config.model_copy(update={"lora": None})
    run = next((folder for folder in file.resolve().parents if (folder / "config.yaml").is_file()), None)
    return Source(file, run, apply_overrides(config, overrides), network.requires_grad_(False), facts)
