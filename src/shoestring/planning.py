"""What a model costs: FLOPs of a forward pass and of a training step, and the machine's matmul peak.

``flops`` counts two per multiply-accumulate. Only matrix products are counted, as everybody does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from shoestring.config.schema import ModelConfig
from shoestring.models.layers import TimeEmbedding
from shoestring.models.microdit import attention_width, expert_width, has_experts, swiglu_width
from shoestring.tensors import visible_count


@dataclass(frozen=True)
class Flops:
    """FLOPs of one image."""

    forward: float
    training: float
    """Forward and backward, recomputation not counted."""


def model_flops(
    model: ModelConfig, grid: tuple[int, int], caption_tokens: int, mask_ratio: float = 0.0
) -> Flops:
    """FLOPs that one image needs, in closed form.

    The backward pass costs twice the forward, except for the three layers that look at inputs (patches,
    captions, time), which need no gradient of their input.

    Args:
        model: the network.
        grid: rows and columns of patches.
        caption_tokens: caption length S, padding included if it is attended.
        mask_ratio: share of patches that the backbone does not see.

    Returns:
        Forward and training FLOPs.
    """
    tokens = grid[0] * grid[1]
    visible = visible_count(tokens, mask_ratio)
    s, d = caption_tokens, model.dim
    patch_values = model.in_channels * model.patch_size**2

    inputs = tokens * patch_values * d + s * model.caption_dim * d + TimeEmbedding.features * d
    caption = (
        s * d * d + 4 * s * d * d + 2 * s * s * d + 3 * s * d * swiglu_width(d, 4.0, model.ffn_multiple_of)
    )
    macs: float = caption + 3 * d * d + visible * d * patch_values + 2 * d * d

    qkv, ffn = model.per_block("qkv_multipliers"), model.per_block("ffn_multipliers")
    for i in range(model.depth):
        expert = has_experts(model, i)
        macs += _block_macs(model, d, qkv[i], ffn[i], expert, visible, s)
    mixer = model.mixer
    for i in range(mixer.depth):
        expert = has_experts(model, i, mixer=True)
        macs += _block_macs(model, mixer.dim, mixer.qkv_multiplier, mixer.ffn_multiplier, expert, tokens, s)
    if mixer.depth and mixer.dim != d:
        macs += (tokens + visible + s) * d * mixer.dim
    return Flops(forward=2.0 * (macs + inputs), training=2.0 * (3 * macs + 2 * inputs))


def _block_macs(
    model: ModelConfig, dim: int, qkv: float, ffn: float, expert: bool, tokens: int, s: int
) -> float:
    width = attention_width(dim, qkv, model.head_dim)
    macs: float = 4 * tokens * dim * width + 2 * tokens * tokens * width
    macs += 2 * tokens * dim * dim + 2 * s * dim * dim + 2 * tokens * s * dim
    macs += 6 * dim * model.dim
    if expert:
        count = model.experts.count
        chosen = max(1, min(tokens, int(model.experts.capacity * tokens / count)))
        hidden = expert_width(dim, ffn, model.ffn_multiple_of)
        return macs + count * tokens * dim + 2 * count * chosen * dim * hidden
    return macs + 3 * tokens * dim * swiglu_width(dim, ffn, model.ffn_multiple_of)


def measured_peak_flops(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...] = (2048, 4096), repeats: int = 5
) -> float:
    """Best rate of square matrix products on this machine right now.

    Args:
        device: where.
        dtype: of the factors.
        sizes: sides of the matrices.
        repeats: products of each size; the fastest counts.

    Returns:
        FLOP/s.
    """
    best = 0.0
    for n in sizes:
        a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
        a @ b
        for _ in range(repeats):
            _synchronize(device)
            start_s = time.perf_counter()
            a @ b
            _synchronize(device)
            best = max(best, 2.0 * n**3 / (time.perf_counter() - start_s))
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
