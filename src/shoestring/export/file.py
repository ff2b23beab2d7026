"""One safetensors file that is the whole model: weights, configuration, facts, statistics and card."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from shoestring.encoders.autoencoders import LatentCodec
from shoestring.encoders.image import build_codec
from shoestring.export.card import model_card
from shoestring.export.source import Source
from shoestring.models.files import header_of, is_own
from shoestring.models.quantise import quantised
from shoestring.runtime import PRECISIONS, UserError, atomic_write


def stored(tensors: dict[str, Tensor], precision: str) -> dict[str, Tensor]:
    """Weights as they are written.

    Args:
        tensors: by parameter name.
        precision: fp32; bf16; int8: matrices as int8 with a scale an output channel, see
            :mod:`shoestring.models.quantise`.

    Returns:
        Tensors; for int8 with their scales among them.
    """
    if precision == "int8":
        return quantised(tensors)
    dtype = PRECISIONS[precision]  # position tables are no weights
    return {name: t if name.endswith("pos_embed") else t.to(dtype) for name, t in tensors.items()}


def export_file(source: Source, target: Path, precision: str = "fp32") -> str:
    """Write one file.

    Args:
        source: what to export.
        target: ends in .safetensors; a model file of ours that is there is replaced.
        precision: see :func:`stored`.

    Returns:
        A sentence on how it is used.

    Raises:
        UserError: if something else is there, or it cannot be written.
    """
    if target.suffix != ".safetensors":
        raise UserError(f"--out is {target}; a model file ends in .safetensors")
    if target.exists() and not is_own(target):
        raise UserError(
            f"{target} exists and is no model file of shoestring, so it is not replaced; choose another --out"
        )
    header = header_of(source.config, source.facts) | {
        "card": model_card(source, "file"),
        "statistics": json.dumps(statistics(source)),
    }
    tensors = stored({name: t.detach() for name, t in source.network.state_dict().items()}, precision)
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=header)
    atomic_write(target, lambda file: file.write(content))
    return f'shoestring sample {target} --prompt "..."'


def statistics(source: Source) -> dict[str, object]:
    """What is measured of the latents: their deviation, and how they are shifted and scaled.

    Args:
        source: a model whose autoencoder, if it has one, can be loaded.

    Returns:
        Plain values.
    """
    facts = source.facts
    found: dict[str, object] = {
        "sigma_data": facts.sigma_data,
        "resolution": facts.resolution,
        "nimg": facts.nimg,
    }
    codec = build_codec(source.config.data)
    if isinstance(codec, LatentCodec):
        shift, scale = codec.shift_and_scale
        found |= {"latent_shift": shift, "latent_scale": scale}
    return found
