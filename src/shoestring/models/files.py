"""One safetensors file is one model: weights, and in its header the whole run configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shoestring.config import ModelConfig, RunConfig, TokensConfig, UNetConfig, from_json
from shoestring.models.lora import add_lora
from shoestring.models.maskdit import MaskDiT
from shoestring.models.microdit import MicroDiT
from shoestring.models.network import BaseNetwork
from shoestring.models.quantise import SCALE, restored
from shoestring.models.transformer import DiffusionTransformer
from shoestring.runtime import UserError

FORMAT = "shoestring-1"

FAMILIES: dict[str, type[DiffusionTransformer]] = {"microdit": MicroDiT, "maskdit": MaskDiT}


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model beside its configuration."""

    nimg: int
    """Images seen in training."""
    weights: str
    """``trained`` or ``ema``."""
    sigma_data: float
    """Standard deviation of the training latents, measured."""
    position_scale: float
    """Interpolation scale of the last stage trained."""
    resolution: int
    """Side of the training pictures in pixels."""
    classes: tuple[str, ...] = ()
    """Names of the classes by their number, for class-conditional models."""


def new_network(model: ModelConfig, tokens: TokensConfig) -> BaseNetwork:
    """A network whose weights are not drawn yet, on the default device.

    Args:
        model: its settings.
        tokens: the token method.

    Returns:
        Of the family that ``model.kind`` names.
    """
    if isinstance(model, UNetConfig):
        from shoestring.models.unet import UNet  # diffusers takes a second to import

        return UNet(model, tokens)
    return FAMILIES[model.kind](model, tokens)


def build_network(config: RunConfig, generator: torch.Generator | None = None) -> BaseNetwork:
    """The network of a configuration.

    Args:
        config: the run.
        generator: draws the initial weights; ``None`` leaves them unset, to be loaded.

    Returns:
        The network, on the default device.
    """
    network = new_network(config.model, config.tokens)
    if generator is not None:
        network.initialize(generator)
    if config.lora is not None:
        add_lora(network, config.lora, generator)
    return network


def header_of(config: RunConfig, facts: ModelFacts) -> dict[str, str]:
    """What stands in the header of a model file, by key."""
    return {"format": FORMAT, "config": config.model_dump_json(), "facts": json.dumps(asdict(facts))}


def save_model(path: Path, tensors: dict[str, Tensor], config: RunConfig, facts: ModelFacts) -> None:
    """Write weights with configuration and facts in the header.

    Args:
        path: file to write; the caller makes it appear atomically (see ``training/checkpoint.py``).
        tensors: weights by parameter name.
        config: of the run.
        facts: see :class:`ModelFacts`.

    Raises:
        UserError: if the file cannot be written.
    """
    header = header_of(config, facts)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=header)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error


def write_model(path: Path, tensors: dict[str, Tensor], config: RunConfig, facts: ModelFacts) -> None:
    """A model file, whole or not at all.

    Args:
        path: file to write; its folder is made if needed.
        tensors: weights by parameter name.
        config: of the run.
        facts: see :class:`ModelFacts`.

    Raises:
        UserError: if the file cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(temporary, tensors, config, facts)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another folder with --out") from error
    finally:
        with suppress(OSError):  # where the folder could not be made
            temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Header:
    """What a model file says of itself, and some of its tensors."""

    config: RunConfig
    facts: ModelFacts
    tensors: dict[str, Tensor]
    card: str | None = None
    """The model card inside, of files that were exported."""


def read_header(path: Path, names: Sequence[str] | None = ()) -> Header:
    """Configuration and facts of a model file, and the tensors of some names.

    Args:
        path: a safetensors file written by :func:`save_model`.
        names: of the tensors to read, those that are missing left out; ``None`` = all.

    Returns:
        What was found.

    Raises:
        UserError: if the file is missing, damaged or not ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            there = file.keys()
            wanted = [name for name in there if names is None or name.removesuffix(SCALE) in names]
            tensors = restored({name: file.get_tensor(name) for name in wanted})
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} is damaged or not a safetensors file ({error}); take another checkpoint"
        ) from error
    if header.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a model of shoestring: its header says format {header.get('format')!r}, "
            f"not {FORMAT!r}"
        )
    stored = json.loads(header["facts"])
    facts = ModelFacts(**stored | {"classes": tuple(stored.get("classes", ()))})  # JSON knows lists only
    return Header(from_json(header["config"]), facts, tensors, header.get("card"))


def is_own(path: Path) -> bool:
    """Whether a file is one that :func:`save_model` wrote; false also for what is no safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def find_model(path: Path, weights: str | None = None) -> Path:
    """The model file meant by a path: the file itself, a checkpoint folder, or a run's newest checkpoint.

    Args:
        path: what the user gave.
        weights: which of a checkpoint, as ``ema``, ``weights`` or ``power-0.1``; ``None`` takes averaged
            weights where there are some.

    Returns:
        A safetensors file.

    Raises:
        UserError: if there is none.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(
            f"{path} does not exist; give a run folder, a checkpoint folder or a .safetensors file"
        )
    checkpoints = sorted(
        (p for p in path.glob("checkpoints/*") if p.name.isdigit()), key=lambda p: int(p.name)
    )
    for folder in [path, *reversed(checkpoints)]:
        for name in ("ema", "weights") if weights is None else (weights,):
            if (folder / f"{name}.safetensors").is_file():
                return folder / f"{name}.safetensors"
        there = sorted(file.stem for file in folder.glob("*.safetensors"))
        if there:
            raise UserError(f"{folder} holds no {weights}.safetensors; choose from {', '.join(there)}")
    raise UserError(f"{path} holds no checkpoint; train first, or give a .safetensors file")


def load_model(path: Path) -> tuple[RunConfig, BaseNetwork, ModelFacts]:
    """Read a model file.

    Args:
        path: a safetensors file written by :func:`save_model`.

    Returns:
        Configuration, network with its weights in evaluation mode, facts.

    Raises:
        UserError: if the file is missing, damaged, not ours, or does not fit its own configuration.
    """
    header = read_header(path, None)
    config, facts = header.config, header.facts
    network = build_network(config)
    load_weights(network, header.tensors, str(path))
    network.position_scale = facts.position_scale
    return config, network.eval(), facts


@torch.no_grad()
def load_weights(network: BaseNetwork, tensors: dict[str, Tensor], where: str) -> None:
    """Copy weights into a network that they fit exactly.

    Args:
        network: changed only if everything fits.
        tensors: weights by parameter name.
        where: name of the file, for messages.

    Raises:
        UserError: naming the first key or shape that does not fit.
    """
    tensors = dict(tensors)
    tables = {name: tensors.pop(name, None) for name in ("pos_embed", "decoder_pos_embed")}
    own = dict(network.named_parameters())
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors or name not in own:
            problem = "missing" if name not in tensors else "unexpected"
            raise UserError(f"{where}: key {name!r} is {problem}; it is a checkpoint of another model")
        if own[name].shape != tensors[name].shape:
            raise UserError(
                f"{where}: {name} has shape {list(tensors[name].shape)}, this model needs "
                f"{list(own[name].shape)}; it is a checkpoint of another model"
            )
    for name, parameter in own.items():
        parameter.copy_(tensors[name])
    for name, table in tables.items():
        if table is not None:
            setattr(network, name, table)
