"""Low-rank factors as a file of their own, under the names of three programs, and back into the weights.

The file knows its base by a digest of the base's weights: put beside others, factors make noise.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from shoestring.config import LoRAConfig, from_json
from shoestring.encoders.weights import weights_digest
from shoestring.models.files import ModelFacts, build_network, find_model, read_header, write_model
from shoestring.models.lora import FACTORS, is_factor, scale_of
from shoestring.runtime import UserError, atomic_write

FORMAT = "shoestring-lora-1"
Layout = Literal["shoestring", "diffusers", "kohya"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def base_digest(tensors: dict[str, Tensor]) -> str:
    """A hash of weights without factors and position tables; 0 and -0 are one."""
    tables = ("pos_embed", "decoder_pos_embed")
    own = {n: t.float() + 0.0 for n, t in tensors.items() if not is_factor(n) and n not in tables}
    return weights_digest(own, {})


def keys_of(module: str, layout: Layout, unet: bool) -> tuple[str, str]:
    """The names of both factors of a linear map.

    Args:
        module: name of the map in our network.
        layout: ``shoestring`` (``MODULE.lora_a``), ``diffusers`` (``unet.MODULE.lora_A.weight``, or
            ``transformer.``) or ``kohya`` (``lora_unet_MODULE.lora_down.weight``, dots as underscores).
        unet: whether the network is a U-Net, whose maps have the names that diffusers gives them.

    Returns:
        Of A and of B.
    """
    if layout == "shoestring":
        return f"{module}.{FACTORS[0]}", f"{module}.{FACTORS[1]}"
    inner = module.removeprefix("unet.") if unet else module
    if layout == "diffusers":
        stem = f"{'unet' if unet else 'transformer'}.{inner}"
        return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
    stem = f"lora_unet_{inner.replace('.', '_')}"
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"


def write_lora(run: Path, out: Path, layout: Layout) -> int:
    """Write the factors of a run, with what they belong to in the header.

    Args:
        run: run folder, checkpoint folder or model file.
        out: file to write.
        layout: names of the tensors.

    Returns:
        How many maps have factors.

    Raises:
        UserError: if there are none, or the file cannot be written.
    """
    path = find_model(run)
    header = read_header(path, None)
    config = header.config
    if config.lora is None:
        raise UserError(f"{path} has no LoRA factors; train some with shoestring adapt dreambooth")
    unet, tensors = config.model.kind == "unet", {}
    modules = [n.removesuffix(f".{FACTORS[0]}") for n in header.tensors if n.endswith(f".{FACTORS[0]}")]
    for module in modules:
        for factor, key in zip(FACTORS, keys_of(module, layout, unet), strict=True):
            value = header.tensors[f"{module}.{factor}"]
            # Without an alpha of its own diffusers takes the product as it is.
            counts = scale_of(config.lora) if layout == "diffusers" and factor == FACTORS[1] else 1.0
            tensors[key] = (counts * value).contiguous()
        if layout == "kohya":
            tensors[f"{keys_of(module, layout, unet)[0].partition('.')[0]}.alpha"] = _alpha(config.lora)
    words = {
        "format": FORMAT,
        "keys": layout,
        "base": base_digest(header.tensors),
        "lora": config.lora.model_dump_json(),
        "config": config.model_copy(update={"initial_weights": None}).model_dump_json(),
        "facts": json.dumps(asdict(header.facts)),
    }
    if layout == "kohya":
        words |= {
            "ss_network_dim": str(config.lora.rank),
            "ss_network_alpha": str(float(_alpha(config.lora))),
        }
    atomic_write(out, lambda file: file.write(save(tensors, words)))
    return len(modules)


def _alpha(lora: LoRAConfig) -> Tensor:
    return torch.tensor(float(lora.rank if lora.alpha is None else lora.alpha))


def merge_lora(base: Path, lora: Path, out: Path, scale: float = 1.0) -> None:
    """Write W + scale (alpha / rank) B A as an ordinary model file.

    Args:
        base: the model that the factors were trained on.
        lora: file of :func:`write_lora`, of any layout.
        out: file to write.
        scale: of what was learned.

    Raises:
        UserError: if the factors are of another base, or a file is missing or damaged.
    """
    path = find_model(base)
    header = read_header(path, None)
    words, factors = _read(lora)
    found = base_digest(header.tensors)
    if found != words["base"]:
        raise UserError(
            f"{lora} was trained on a base whose weights have the digest {words['base']}, and those of "
            f"{path} have {found}; give the base that it was trained on"
        )
    config = from_json(words["config"], str(lora))
    assert config.lora is not None
    with torch.device("meta"):
        network = build_network(config)
    unet, tensors = config.model.kind == "unet", dict(header.tensors)
    for name, parameter in network.named_parameters():
        module, _, leaf = name.rpartition(".")
        if leaf != FACTORS[0]:
            continue
        a_key, b_key = keys_of(module, words["keys"], unet)  # type: ignore[arg-type]
        weight = tensors[f"{module}.weight"]
        shapes = {a_key: parameter.shape, b_key: (weight.shape[0], parameter.shape[0])}
        for key, shape in shapes.items():
            if key not in factors or factors[key].shape != shape:
                there = "missing" if key not in factors else f"of shape {list(factors[key].shape)}"
                raise UserError(f"{lora}: {key} is {there}; it is damaged, write it anew")
        change = factors[b_key].double() @ factors[a_key].double()
        inside = 1.0 if words["keys"] == "diffusers" else scale_of(config.lora)
        merged = weight.double() + scale * inside * change
        tensors[f"{module}.weight"] = merged.to(weight.dtype)
    facts = ModelFacts(**json.loads(words["facts"]) | {"classes": header.facts.classes})
    plain = config.model_copy(update={"lora": None})
    write_model(out, tensors, plain, facts)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header and the factors of a LoRA file."""
    try:
        with safe_open(path, framework="pt") as file:
            words = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error}); write it anew") from error
    if words.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a file of shoestring adapt lora-file: its header says format "
            f"{words.get('format')!r}, not {FORMAT!r}"
        )
    return words, tensors
