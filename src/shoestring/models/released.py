"""Released MicroDiT weights, in and out.

Our modules carry the released names, so conversion is a matter of prefixes, the position table and the
unused ``mask_token``. A missing or unexpected key is an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shoestring.config.schema import ExpertsConfig, MixerConfig, ModelConfig
from shoestring.models.files import load_weights
from shoestring.models.layers import sincos_positions
from shoestring.models.microdit import MicroDiT
from shoestring.runtime import UserError

PREFIXES = ("state.model.", "state/model/", "_orig_mod.", "module.", "model.", "dit.", "dit/")
FOREIGN = ("vae.", "text_encoder.", "tokenizer.")


def config_from_released(values: Mapping[str, Any]) -> ModelConfig:
    """Our configuration from the released constructor's values.

    Args:
        values: ``dit`` (the constructor's keyword arguments, or their JSON), ``in_channels`` and
            ``caption_channels``; other entries are ignored.

    Returns:
        The configuration of the same network.
    """
    dit = values["dit"]
    dit = json.loads(dit) if isinstance(dit, str) else dit
    mixer_on = dit.get("use_patch_mixer", True)
    return ModelConfig(
        in_channels=int(dit.get("in_channels", values.get("in_channels", 4))),
        caption_dim=int(dit.get("caption_channels", values.get("caption_channels", 1024))),
        patch_size=dit["patch_size"],
        dim=dit["dim"],
        depth=dit["depth"],
        head_dim=dit["head_dim"],
        qkv_multipliers=tuple(dit["qkv_multipliers"]),
        ffn_multipliers=tuple(dit["ffn_multipliers"]),
        ffn_multiple_of=dit["multiple_of"],
        bias=dit.get("use_bias", False),
        norm_eps=dit.get("norm_eps", 1e-6),
        mixer=MixerConfig(
            depth=dit["patch_mixer_depth"] if mixer_on else 0,
            dim=dit["patch_mixer_dim"],
            qkv_multiplier=dit["patch_mixer_qkv_ratio"],
            ffn_multiplier=dit["patch_mixer_mlp_ratio"],
        ),
        experts=ExpertsConfig(
            count=dit["num_experts"], capacity=dit["expert_capacity"], every=dit["experts_every_n"]
        ),
    )


def _strip(name: str) -> str:
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if name.startswith(prefix):
                name, stripped = name.removeprefix(prefix), True
    return name.replace("._orig_mod", "")


def load_released(model: MicroDiT, tensors: Mapping[str, Tensor], where: str = "released weights") -> None:
    """Load released weights, whatever their prefixes; position tables of any square grid.

    The file's own position table is kept (training under bf16 buffers may have rounded it); the model's
    ``position_scale`` becomes that of the table (1 at 256 pixels, 2 at 512), for grids of other shapes.

    Args:
        model: a network of the same shape; changed only if everything fits.
        tensors: released state dict; entries of a VAE or text encoder in a training checkpoint are skipped.
        where: name of the file, for messages.

    Raises:
        UserError: if a key is missing or unexpected, or a shape differs.
    """
    named = {_strip(name): tensor for name, tensor in tensors.items()}
    named = {name: tensor for name, tensor in named.items() if not name.startswith(FOREIGN)}
    table = named.pop("pos_embed", None)
    named.pop("mask_token", None)
    if table is not None:
        side = round(table.shape[1] ** 0.5) if table.ndim == 3 else 0
        if table.ndim != 3 or side * side != table.shape[1] or table.shape[2] != model.config.dim:
            raise UserError(
                f"{where}: pos_embed has shape {list(table.shape)}; it must be [1, side * side, "
                f"{model.config.dim}]"
            )
        named["pos_embed"] = table = table.float()
    load_weights(model, named, where)
    if table is not None:
        model.position_scale = _table_scale(table[0].cpu(), model.config.dim)


def _table_scale(table_LD: Tensor, dim: int) -> float:
    """The interpolation scale that a square position table was made with."""
    side = round(table_LD.shape[0] ** 0.5)

    def distance(scale: float) -> float:
        return (sincos_positions(dim, (side, side), scale) - table_LD).abs().max().item()

    return min((1.0, 2.0, 4.0), key=distance)


def to_released(model: MicroDiT, side: int) -> dict[str, Tensor]:
    """The state dict under the released names, with the two buffers the released code expects.

    Args:
        model: the network.
        side: side of the position table in patches (16 for 256 pixels, 32 for 512).

    Returns:
        Tensors to save as they are, or to load into the released code.
    """
    patch_values = model.config.in_channels * model.config.patch_size**2
    table_LD = sincos_positions(model.config.dim, (side, side), model.position_scale)
    if model.pos_embed is not None and model.pos_embed.shape[1] == side * side:
        table_LD = model.pos_embed[0].cpu()
    released = {name: p.detach().cpu() for name, p in model.named_parameters()}
    return released | {"pos_embed": table_LD[None], "mask_token": torch.zeros(1, 1, patch_values)}
