"""Where a run begins: drawn weights, or those of a model that was trained before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from shoestring.config import ModelConfig, RunConfig, TransformerConfig, UNetConfig
from shoestring.models.files import Header, find_model, is_own, load_weights, read_header
from shoestring.models.lora import is_factor
from shoestring.models.network import BaseNetwork
from shoestring.models.released import load_released, read_tensors
from shoestring.models.transformer import DiffusionTransformer
from shoestring.runtime import UserError
from shoestring.training.folder import checkpoint_folders
from shoestring.training.mark import read_mark

CLOSE = 0.01
"""Measured deviations that differ by less are taken to be one."""


def initial_weights(config: RunConfig, network: BaseNetwork) -> None:
    """Put the weights that a run begins with into its network, where ``config.initial_weights`` names some.

    Of run and checkpoint folders the averaged weights are taken; averages and optimiser begin anew. Position
    tables are not taken over: every stage makes its own.

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
        header = read_header(path, None)
        _check_same_model(config.model, header.config.model, path)
        if header.config.lora is not None and config.lora is None:
            raise UserError(
                f"initial_weights: {path} has LoRA factors beside its weights, and lora is null; put them "
                "into the weights first, with shoestring adapt lora-file and shoestring adapt merge"
            )
        own = {**_new_inputs(network, header), **_factors(network)}
        load_weights(network, {**own, **header.tensors}, str(path))
    elif not isinstance(network, DiffusionTransformer):
        raise UserError(
            f"initial_weights: {path} is not a file of shoestring, and model.kind=unet has no other layout; "
            "give a run folder, a checkpoint folder or a model file that shoestring wrote"
        )
    else:
        load_released(network, {**_factors(network), **read_tensors(path)}, str(path))
    network.pos_embed = network.decoder_pos_embed = None


def _new_inputs(network: BaseNetwork, header: Header) -> dict[str, Tensor]:
    """The zero weights for a small picture or the scale of guidance, where only the network has such."""
    names: tuple[str, ...] = ()
    if not header.config.model.image_channels:
        names += ("image_embedder.", "unet.conv_in.image.")
    if not header.config.model.guidance_input:
        names += ("guidance_embedder.", "unet.time_embedding.cond_proj.")
    return {name: p.detach() for name, p in network.named_parameters() if name.startswith(names)}


def _factors(network: BaseNetwork) -> dict[str, Tensor]:
    """The LoRA factors of a network as they were drawn, for files that have none."""
    return {name: p.detach() for name, p in network.named_parameters() if is_factor(name)}


def _check_same_model(ours: ModelConfig, theirs: ModelConfig, path: Path) -> None:
    """What shapes do not show: the same tensors would be another function."""
    pairs: dict[str, tuple[object, object]] = {"kind": (ours.kind, theirs.kind)}
    if isinstance(ours, TransformerConfig) and isinstance(theirs, TransformerConfig):
        pairs |= {
            "head_dim": (ours.head_dim, theirs.head_dim),
            "decoder.head_dim": (ours.decoder.head_dim, theirs.decoder.head_dim),
            "mup_base_dim": (ours.mup_base_dim, theirs.mup_base_dim),
        }
    if isinstance(ours, UNetConfig) and isinstance(theirs, UNetConfig):
        pairs |= {"heads": (ours.heads, theirs.heads), "patch_size": (ours.patch_size, theirs.patch_size)}
    for name, (here, there) in pairs.items():
        if here != there:
            raise UserError(
                f"initial_weights: {path} is of another model, with model.{name}={there}, here it is {here}; "
                "set it to that, or take other weights"
            )


def begun(folder: Path) -> bool:
    """Whether a run has a checkpoint, so that what it began with does not matter any more."""
    return bool(checkpoint_folders(folder))


def scale_of_latents(config: RunConfig, folder: Path, measure: Callable[[], float]) -> float:
    """The standard deviation of the latents that a run scales its network by, the same to its end.

    Args:
        config: of the run.
        folder: of the run; if it has begun, its checkpoints know.
        measure: gives that of the first stage's data.

    Returns:
        ``process.sigma_data`` where it is set, else that of the initial weights, else the measured one.

    Raises:
        UserError: if the initial weights were trained with another one than is set, or nobody knows.
    """
    for checkpoint in reversed(checkpoint_folders(folder)):
        try:
            return float(read_mark(checkpoint)["facts"]["sigma_data"])
        except UserError:  # damaged: restoring passes it over too, and says so
            continue
    given, known = config.process.sigma_data, None
    if config.initial_weights is not None:
        path = find_model(Path(config.initial_weights))
        if is_own(path):
            known = read_header(path).facts.sigma_data
            if given is not None and abs(given / known - 1) > CLOSE:
                raise UserError(
                    f"process.sigma_data is {given:g}, but {path} was trained with {known:.4g}; set it to "
                    "null to go on with that"
                )
        elif given is None and config.process.kind == "edm":
            raise UserError(
                f"process.sigma_data is null, but {path} does not say what it was trained with; set it "
                "(released MicroDiT: 0.9, MaskDiT: 0.5)"
            )
    return given or known or measure()


def from_stage(config: RunConfig, name: str) -> RunConfig:
    """A recipe without the stages before one.

    Args:
        config: a recipe.
        name: of the first stage to train, or its number from 0.

    Returns:
        The recipe from there on.

    Raises:
        UserError: if there is no such stage, or nothing to begin it with.
    """
    names: Sequence[str] = [stage.name for stage in config.stages]
    if name in names:
        index = names.index(name)
    elif name.isdecimal() and int(name) < len(names):
        index = int(name)
    else:
        listed = ", ".join(f"{i} ({each})" for i, each in enumerate(names))
        raise UserError(f"--from-stage: there is no stage {name!r}; choose from {listed}")
    if index > 0 and config.initial_weights is None:
        raise UserError(
            f"--from-stage {name} leaves out the stages before it, but initial_weights is not set, so "
            "nothing learned would go into it; set initial_weights to a run folder, checkpoint or model file"
        )
    return config.model_copy(update={"stages": config.stages[index:]})
