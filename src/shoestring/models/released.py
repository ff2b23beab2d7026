"""Released MicroDiT and MaskDiT weights, in and out.

Our modules carry the released names, so conversion is a matter of prefixes, position tables and MicroDiT's
unused ``mask_token``. A missing or unexpected key is an error that names it. ``read_released(path)`` needs no
other information; ``load_released`` fills a network that is there already.
"""

from __future__ import annotations

import re
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from shoestring.config import TransformerConfig
from shoestring.models.files import FAMILIES, load_weights
from shoestring.models.layers import sincos_positions
from shoestring.models.released_config import config_from_weights, tokens_of
from shoestring.models.transformer import DiffusionTransformer
from shoestring.runtime import UserError, atomic_write

PREFIXES = ("state.model.", "state/model/", "_orig_mod.", "module.", "model.", "dit.", "dit/")
FOREIGN = ("vae.", "text_encoder.", "tokenizer.")
OUTWARD_PREFIX = {"microdit": "", "maskdit": "model."}
"""What the released code puts before every name."""

Part = Literal["ema", "model"]


def _strip(name: str) -> str:
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if name.startswith(prefix):
                name, stripped = name.removeprefix(prefix), True
    return name.replace("._orig_mod", "")


def _named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's own entries under our names."""
    named = {_strip(name): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in named.items() if not name.startswith(FOREIGN)}


def _table_widths(model: TransformerConfig) -> dict[str, int]:
    """The position tables that a network has, with their widths."""
    widths = {"pos_embed": model.dim}
    return widths | {"decoder_pos_embed": model.decoder.dim} if model.decoder.depth else widths


# ------------------------------------------------------------------------------------------- tensors


def load_released(
    network: DiffusionTransformer, tensors: Mapping[str, Tensor], where: str = "released weights"
) -> None:
    """Load released weights, whatever their prefixes; position tables of any square grid.

    The file's own position tables are kept (training under bf16 buffers may have rounded them); the
    network's ``position_scale`` becomes that of the table, for grids of other shapes (released MicroDiT:
    1 at 256 pixels, 2 at 512; MaskDiT: always 1).

    Args:
        network: a MicroDiT or MaskDiT of the same shape; changed only if everything fits.
        tensors: released state dict; entries of a VAE or text encoder in a training checkpoint are skipped.
        where: name of the file, for messages.

    Raises:
        UserError: if a key is missing or unexpected, or a shape differs.
    """
    model, named = network.config, _named(tensors)
    if model.kind == "microdit":
        named.pop("mask_token", None)  # a buffer of zeros there
    if not model.decoder.depth and "decoder_pos_embed" in named:
        raise UserError(f"{where}: key 'decoder_pos_embed' is unexpected; this model has no decoder")
    for name, width in _table_widths(model).items():
        table = named.get(name)
        if table is None:
            continue
        side = round(table.shape[1] ** 0.5) if table.ndim == 3 else 0
        if table.ndim != 3 or side * side != table.shape[1] or table.shape[2] != width:
            raise UserError(
                f"{where}: {name} has shape {list(table.shape)}; it must be [1, side * side, {width}]"
            )
        named[name] = table.float()
    load_weights(network, named, where)
    if "pos_embed" in named:
        network.position_scale = _table_scale(named["pos_embed"][0].cpu(), model.dim)


def _table_scale(table_LD: Tensor, dim: int) -> float:
    """The interpolation scale that a square position table was made with."""
    side = round(table_LD.shape[0] ** 0.5)

    def distance(scale: float) -> float:
        return (sincos_positions(dim, (side, side), scale) - table_LD).abs().max().item()

    return min((1.0, 2.0, 4.0), key=distance)


def to_released(network: DiffusionTransformer, side: int) -> dict[str, Tensor]:
    """The state dict under the released names, with the buffers that the released code expects.

    Args:
        network: a MicroDiT for captions, or a MaskDiT for classes (or without condition).
        side: side of the position tables in patches (16 for 256 pixels, 32 for 512).

    Returns:
        Tensors to save as they are, or to load into the released code.

    Raises:
        UserError: if the network has a part for which the released code has no place.
    """
    model = network.config
    _check_released_form(network)
    released = {name: parameter.detach().cpu() for name, parameter in network.named_parameters()}
    for name, width in _table_widths(model).items():
        table_LD = sincos_positions(width, (side, side), network.position_scale)
        stored = getattr(network, name)
        if stored is not None and stored.shape[1] == side * side:
            table_LD = stored[0].cpu()
        released[name] = table_LD[None]
    if model.kind == "microdit":
        released["mask_token"] = torch.zeros(1, 1, model.in_channels * model.patch_size**2)
    return {OUTWARD_PREFIX[model.kind] + name: tensor for name, tensor in released.items()}


def _check_released_form(network: DiffusionTransformer) -> None:
    model = network.config
    microdit = model.kind == "microdit"
    facts: list[tuple[str, object, tuple[object, ...]]] = [
        ("model.condition", model.condition, ("text",) if microdit else ("class", "none")),
        ("model.qk_norm", model.qk_norm, (microdit,)),
        ("model.image_channels", model.image_channels, (0,)),
        ("model.guidance_input", model.guidance_input, (False,)),
    ]
    if microdit:
        facts.append(("model.decoder.depth", model.decoder.depth, (0,)))
    else:
        facts += [("model.mixer.depth", model.mixer.depth, (0,)), ("model.bias", model.bias, (True,))]
        facts.append(("model.qkv_multipliers", set(model.per_block("qkv_multipliers")), ({1.0},)))
        facts.append(("model.ffn_multipliers", set(model.per_block("ffn_multipliers")), ({4.0},)))
    for name, found, valid in facts:
        if found not in valid:
            raise UserError(
                f"{name} is {found}; the released {'MicroDiT' if microdit else 'MaskDiT'} knows only "
                f"{' or '.join(map(str, valid))}, so there is no released form of this model"
            )
    own = [name for name, _ in network.routing.named_parameters()]
    if own:
        raise UserError(
            f"the token method has weights of its own (routing.{own[0]}); the released code has no place for "
            "them, so there is no released form of this model"
        )


# --------------------------------------------------------------------------------------------- files


def read_tensors(path: Path, part: Part = "ema") -> dict[str, Tensor]:
    """The state dict in a released file: ``.safetensors``, or a checkpoint of torch (any other ending).

    Nothing in the file is executed: torch reads tensors, numbers, strings and containers, and here also
    ``argparse.Namespace``, in which the released MaskDiT keeps its arguments. Anything else is refused.

    Args:
        path: the file.
        part: which weights of a training checkpoint: the averaged ones, or those of the last step. A file
            that is a state dict itself has no parts.

    Returns:
        Tensors on the CPU under the names of the file.

    Raises:
        UserError: if the file is missing, damaged, holds other Python objects, or lacks that part.
    """
    if not path.is_file():
        raise UserError(
            f"{path} does not exist, or is a folder; give a .safetensors file or a checkpoint (.pt)"
        )
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is damaged or not a safetensors file ({error})") from error
    return _state_dict(_unpickled(path), part, path)


def _unpickled(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([Namespace]):
            # Mapped where the format allows it: optimiser states, two thirds of the file, are never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        named = f" ({found[1]})" if found else ""
        raise UserError(
            f"{path} holds Python objects other than tensors{named}, which could run code; it was not read, "
            "so ask its author for a .safetensors file"
        ) from error
    except Exception as error:  # what a damaged file makes of an unpickler can be anything
        reason = (str(error).splitlines() or ["it ends too early"])[0]
        raise UserError(f"{path} is damaged or not a checkpoint of torch ({reason})") from error


def _state_dict(content: Any, part: Part, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and any(
        isinstance(content.get(name), Mapping) for name in ("ema", "model")
    ):
        if not isinstance(content.get(part), Mapping):
            raise UserError(
                f"{path} has no part {part!r}; it has {', '.join(sorted(map(str, content)))}, choose one of "
                "'ema' and 'model'"
            )
        content = content[part]
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}; a state dict, name to tensor, is needed")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor):
            raise UserError(
                f"{path}: entry {name!r} is a {type(tensor).__name__}; a state dict has tensors only"
            )
    return dict(content)


def read_released(
    path: Path, model: TransformerConfig | None = None, part: Part = "ema"
) -> DiffusionTransformer:
    """A network from a released file of MicroDiT or MaskDiT.

    Args:
        path: see :func:`read_tensors`.
        model: its configuration; ``None`` = found out from the weights, for all released sizes.
        part: see :func:`read_tensors`.

    Returns:
        The network with the file's weights, in evaluation mode, on the CPU.

    Raises:
        UserError: if the file cannot be read, or its weights do not fit.
    """
    named = _named(read_tensors(path, part))
    if model is None:
        model = config_from_weights(named, str(path))
    with torch.device("meta"):  # saves drawing weights that are overwritten
        network = FAMILIES[model.kind](model, tokens_of(model))
    network.to_empty(device="cpu")
    load_released(network, named, str(path))
    return network.eval()


def write_released(path: Path, network: DiffusionTransformer, side: int) -> None:
    """Write a network for the released code.

    Args:
        path: ``.safetensors``, or ``.pt``: for MaskDiT a checkpoint of which its tools read ``ema``, for
            MicroDiT the state dict itself.
        network: see :func:`to_released`.
        side: see :func:`to_released`.

    Raises:
        UserError: if the ending is another, the file cannot be written, or there is no released form.
    """
    tensors = {name: tensor.contiguous() for name, tensor in to_released(network, side).items()}
    if path.suffix == ".safetensors":
        atomic_write(path, lambda file: file.write(save(tensors)))
    elif path.suffix == ".pt":
        content = tensors if network.config.kind == "microdit" else {"model": tensors, "ema": tensors}
        atomic_write(path, lambda file: torch.save(content, file))
    else:
        raise UserError(f"{path} ends in {path.suffix!r}; released weights are .safetensors or .pt")
