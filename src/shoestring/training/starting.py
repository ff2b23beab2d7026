"""Where a run begins: drawn weights, or those of a model that was trained before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shoestring.config import RunConfig
from shoestring.models.files import is_own, load_weights, read_header
from shoestring.models.released import load_released, read_tensors
from shoestring.models.transformer import DiffusionTransformer
from shoestring.runtime import UserError
from shoestring.sampling.generate import find_model


def initial_weights(config: RunConfig, network: DiffusionTransformer) -> None:
    """Put the weights that a run begins with into its network, where ``config.initial_weights`` names some.

    Position tables are not taken over: every stage makes its own.

    Args:
        config: of the run.
        network: on the CPU; its own weights are drawn already.

    Raises:
        UserError: if the file is missing, damaged, or of another model.
    """
    if config.initial_weights is None:
        return
    path = find_model(Path(config.initial_weights))
    if is_own(path):
        load_weights(network, read_header(path, None).tensors, str(path))
    else:
        load_released(network, read_tensors(path), str(path))
    network.pos_embed = network.decoder_pos_embed = None


def from_stage(config: RunConfig, name: str) -> RunConfig:
    """A recipe without the stages before one.

    Args:
        config: a recipe.
        name: of the first stage to train, or its number from 0.

    Returns:
        The recipe from there on.

    Raises:
        UserError: if there is no such stage.
    """
    names: Sequence[str] = [stage.name for stage in config.stages]
    if name in names:
        index = names.index(name)
    elif name.isdigit() and int(name) < len(names):
        index = int(name)
    else:
        listed = ", ".join(f"{i} ({each})" for i, each in enumerate(names))
        raise UserError(f"--from-stage: there is no stage {name!r}; choose from {listed}")
    return config.model_copy(update={"stages": config.stages[index:]})
