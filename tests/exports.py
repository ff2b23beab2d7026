"""Runs to export: tiny networks of every kind, whose weights are drawn anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from run_folders import config_of, make_checkpoint, make_run
from shoestring.config import RunConfig
from shoestring.export.source import Source, open_source
from shoestring.models.files import save_model

UNET = {"kind": "unet", "in_channels": 3, "channels": 8, "caption_dim": 256, "patch_size": 2}
UNET |= {"multipliers": [1, 2], "attention": [True, False], "layers": 1}
EXPERTS = {"experts": {"count": 4, "capacity": 2.0, "every": 2}, "depth": 3, "patch_size": 2}
MASKDIT = {"kind": "maskdit", "mixer": {"depth": 0}, "decoder": {"depth": 1, "dim": 32, "head_dim": 16}}
MASKDIT |= {"bias": True, "qk_norm": False}
CLASSES = {"condition": "class", "classes": 5}


def variant(model: Mapping[str, Any] | None = None, **sections: Any) -> RunConfig:
    """The tiny recipe with other settings."""
    values = config_of().model_dump()
    unet = (model or {}).get("kind") == "unet"
    kept = {} if unet else values["model"]
    if unet:
        values["tokens"] = {"method": "dense"}
    values["model"] = kept | (model or {})
    for name, section in sections.items():
        values[name] = (values[name] or {}) | section if isinstance(section, dict) else section
    return RunConfig.model_validate(values)


def trained(folder: Path, config: RunConfig, classes: Sequence[str] = ()) -> Source:
    """A run whose weights are all drawn anew, so that no gate is zero."""
    make_run(folder, config)
    make_checkpoint(folder, config, classes=classes)
    file = next(folder.glob("checkpoints/*/ema.safetensors"))
    draw = torch.Generator().manual_seed(1)
    source = open_source(file, None, False)
    with torch.no_grad():
        for p in source.network.parameters():
            scale = 0.3 if p.ndim < 2 else p[0].numel() ** -0.5
            p.copy_(torch.randn(p.shape, generator=draw) * scale)
    save_model(file, source.network.state_dict(), source.config, source.facts)
    return open_source(folder, None, False)
