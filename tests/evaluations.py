"""A tiny run to be evaluated, and protocols cut down for it."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from shoestring.config import apply_overrides
from shoestring.evaluation.protocol import Protocol, find_protocol

QUIET = Console(quiet=True)
CPU = torch.device("cpu")
RECIPE = """
name: tiny
precision: fp32
model:
  in_channels: 3
  caption_dim: 256
  patch_size: 4
  dim: 32
  depth: 2
  head_dim: 16
  ffn_multiple_of: 16
  mixer: {depth: 1, dim: 32}
  experts: {count: 2}
  mask_captions: true
data: {source: shapes, max_captions: 20, text_encoder: hashing, max_tokens: 12}
stages:
  - {name: s, nimg: 64, batch: 8, resolution: 24, mask_ratio: 0.5, lr: 0.002}
sampling: {steps: 2, guidance: 1.5}
logging: {validation_images: 4, tensorboard: false}
"""


def small(name: str, *changes: str) -> Protocol:
    return apply_overrides(find_protocol(name), ["micro_batch=8", *changes])


def compared_with(file: Path) -> list[str]:
    return ["reference=file", f"reference_files={{efficientnet-lite0: {file}}}"]
