"""The shapes that training steps have, known before the first one: for compiling and for timing attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from shoestring.config import RunConfig, StageConfig, TokensConfig, TransformerConfig
from shoestring.interfaces import Conditioning
from shoestring.models.files import FAMILIES
from shoestring.models.layers import CrossAttention, SelfAttention, TransformerBlock
from shoestring.tensors import visible_from_noise

CAPTION_MULTIPLE = 8
"""Compiled steps see captions of multiples of so many tokens: few lengths, and fast ones."""


@dataclass(frozen=True)
class StepShape:
    """What the shapes inside one forward pass follow from."""

    images: int
    """In one pass: of a micro-batch, or of one worker's part of it."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    mask_ratio: float = 0.0
    captions: int = 0
    """Tokens of a caption; 0 without captions."""


@dataclass(frozen=True)
class AttentionShape:
    """One attention over tokens."""

    queries: int
    keys: int
    width: int
    """Of one head."""
    masked: bool
    """Whether keys may be hidden."""


@dataclass
class Traced:
    """What a network sees in passes of some shapes."""

    blocks: dict[str, set[tuple[int, int, int]]] = field(default_factory=dict)
    """By the name of the block: images, tokens and caption tokens."""
    attention: set[AttentionShape] = field(default_factory=set)


def padded_length(longest: int, max_tokens: int) -> int:
    """Caption tokens of a batch in compiled steps: the next multiple of 8.

    Only where padding is hidden (``model.mask_captions``); elsewhere it is attended, and all captions have
    ``max_tokens``.

    Args:
        longest: tokens of the longest caption of the batch, at least 1.
        max_tokens: ``data.max_tokens``.

    Returns:
        At most ``max_tokens``.
    """
    return min(max_tokens, math.ceil(longest / CAPTION_MULTIPLE) * CAPTION_MULTIPLE)


def stage_shapes(
    config: RunConfig, stage: StageConfig, grid: tuple[int, int], images: Iterable[int]
) -> list[StepShape]:
    """All shapes that the steps of a stage may have.

    Args:
        config: the run.
        stage: one of its stages.
        grid: rows and columns of patches there.
        images: sizes of the parts that batches are cut into.

    Returns:
        Every combination of these sizes, the stage's mask ratios and the lengths of captions.
    """
    ratios = {stage.mask_ratio_at(step * stage.batch) for step in range(stage.steps)}
    if stage.mask_ratio_end is None:
        ratios = {stage.mask_ratio}
    most = config.data.max_tokens if config.model.condition == "text" else 0
    captions = {most}
    if most and config.model.mask_captions:
        captions = {padded_length(length, most) for length in range(1, most + 1)}
    return [
        StepShape(count, grid, ratio, length)
        for count in sorted(set(images))
        for ratio in sorted(ratios)
        for length in sorted(captions)
    ]


def trace_shapes(model: TransformerConfig, tokens: TokensConfig, shapes: Sequence[StepShape]) -> Traced:
    """Run a network without memory (on the meta device) and look at what its blocks and attentions see.

    Args:
        model: the network.
        tokens: its token method.
        shapes: of the passes.

    Returns:
        What was seen.
    """
    traced = Traced()
    model = model.model_copy(update={"attention": "explicit", "checkpoint_activations": False})
    with torch.device("meta"), torch.no_grad():
        network = FAMILIES[model.kind](model, tokens)
        for grid, ratio, captions in sorted({(s.grid, s.mask_ratio, s.captions) for s in shapes}):
            images = [
                s.images for s in shapes if (s.grid, s.mask_ratio, s.captions) == (grid, ratio, captions)
            ]
            handles = _watch(network, traced, images, captions)
            visible_BK = visible_from_noise(torch.zeros(1, grid[0] * grid[1]), ratio)
            side = model.patch_size
            network(
                torch.zeros(1, model.in_channels, grid[0] * side, grid[1] * side),
                torch.zeros(1),
                _condition(model, captions, (grid[0] * side, grid[1] * side)),
                visible_BK,
            )
            for handle in handles:
                handle.remove()
    return traced


def _watch(network: nn.Module, traced: Traced, images: Sequence[int], captions: int) -> list[RemovableHandle]:
    """Note the inputs of blocks and attentions of the passes to come."""

    def block(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            traced.blocks.setdefault(name, set()).update((n, inputs[0].shape[1], captions) for n in images)

        return note

    def own(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, SelfAttention)
        tokens, masked = inputs[0].shape[1], len(inputs) > 1 and inputs[1] is not None
        traced.attention.add(AttentionShape(tokens, tokens, module.head_dim, masked))

    def cross(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, CrossAttention)
        keys, masked = inputs[1][0].shape[2], inputs[2] is not None
        traced.attention.add(AttentionShape(inputs[0].shape[1], keys, module.head_dim, masked))

    handles = []
    for name, module in network.named_modules():
        if isinstance(module, TransformerBlock):
            handles.append(module.register_forward_pre_hook(block(name)))
        elif isinstance(module, SelfAttention):
            handles.append(module.register_forward_pre_hook(own))
        elif isinstance(module, CrossAttention):
            handles.append(module.register_forward_pre_hook(cross))
    return handles


def _condition(model: TransformerConfig, captions: int, size: tuple[int, int]) -> Conditioning:
    image = torch.zeros(1, model.image_channels, *size) if model.image_channels else None
    scale_B = torch.ones(1) if model.guidance_input else None
    if model.condition == "class":
        found = Conditioning(class_B=torch.zeros(1, dtype=torch.long))
    elif model.condition == "none":
        found = Conditioning.nothing(1, "meta")
    else:
        mask_BS = torch.ones(1, captions, dtype=torch.bool)
        found = Conditioning(torch.zeros(1, captions, model.caption_dim), mask_BS)
    return replace(found, image=image, guidance_B=scale_B)
