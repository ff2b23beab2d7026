"""The networks of a sampling-cost study: those it trains, and those it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shoestring.config import RunConfig, SamplingConfig
from shoestring.diffusion.process import build_process
from shoestring.models.files import find_model, read_header
from shoestring.planning import plan
from shoestring.runtime import UserError
from shoestring.studies.sampling_recipes import Training


@dataclass(frozen=True)
class Model:
    """A network of the study."""

    name: str
    family: str
    seed: int
    folder: Path
    """A run folder, a checkpoint folder or a model file."""
    training: Training | None = None
    """How the study trains it; ``None`` = it was given."""
    on_the_way: bool = False
    """Given: whether its earlier checkpoints are measured too, for quality against training compute."""


def trained_flops(config: RunConfig, nimg: int) -> float:
    """Training FLOPs of a run's first images; where a stage's mask ratio moves, at its mean."""
    total, left = 0.0, nimg
    for stage in plan(config).stages:
        seen = min(left, stage.nimg)
        total, left = total + seen * stage.flops.training, left - seen
    return total


def data_of(config: RunConfig) -> tuple[object, ...]:
    """What the data of a run are."""
    data = config.data
    stores = tuple(store.path for store in data.stores)
    return data.source, data.path, stores, data.codec, data.split, data.held_out


def given_data(path: Path) -> tuple[object, ...]:
    """What the data of a run folder, checkpoint folder or model file are, and their side in pixels."""
    header = read_header(find_model(path))
    return (*data_of(header.config), header.facts.resolution)


def given_models(paths: Sequence[Path], any_data: bool, steps: int) -> list[Model]:
    """Networks from checkpoints.

    Args:
        paths: run folders, checkpoint folders or model files.
        any_data: allow different data.
        steps: the most that will be sampled with.

    Returns:
        One a path, named by its run.

    Raises:
        UserError: if one does not exist, two have one name, or they were trained on different data.
    """
    found: list[Model] = []
    first: tuple[Path, tuple[object, ...]] | None = None
    for path in paths:
        header = read_header(find_model(path))
        config, here = header.config, given_data(path)
        build_process(config.process, header.facts.sigma_data).grid(SamplingConfig(), steps)  # may refuse
        if first is not None and here != first[1] and not any_data:
            changed = next((a, b) for a, b in zip(first[1], here, strict=True) if a != b)
            raise UserError(
                f"{path} was trained on other data than {first[0]} ({changed[1]}, not {changed[0]}): their "
                "figures cannot be compared; leave one out, or give --any-data"
            )
        first = first or (path, here)
        name = config.name
        taken = {(model.name, model.seed) for model in found}
        if (name, config.seed) in taken:  # two checkpoints of one run
            name = f"{config.name}@{header.facts.nimg}"
        if (name, config.seed) in taken:
            raise UserError(
                f"{path}: another network of the study has the name {config.name}, seed {config.seed} and "
                f"{header.facts.nimg:,} images seen too; their rows could not be told apart"
            )
        found.append(Model(name, config.model.kind, config.seed, path))
    return found
