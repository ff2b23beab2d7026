"""Weights as int8 with a scale an output channel, for files; a network computes with what they stand for.

Symmetric, weights alone: w = scale q with q from -127 to 127 and scale = max|w| / 127 over a channel's
inputs, so that no weight is off by more than half a scale. Gains, biases, tables and routers, which are
small and choose, stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = ".int8_scale"
"""Ending of the names of scales, beside those of their weights."""
EXACT = (".gate.weight", "mask_token", "pos_embed")


def is_quantised(name: str, tensor: Tensor) -> bool:
    """Whether a weight becomes int8: matrices, convolutions and stacks of experts.

    Args:
        name: of the parameter.
        tensor: its values.

    Returns:
        True if it does.
    """
    return tensor.ndim >= 2 and tensor.is_floating_point() and not name.endswith(EXACT)


def quantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as int8 where that is done, with their scales.

    Args:
        tensors: by parameter name.

    Returns:
        The same names, and one more, ``NAME.int8_scale``, for each that is int8 now.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not is_quantised(name, tensor):
            found[name] = tensor
            continue
        # Experts are (experts, inputs, outputs); maps and convolutions (outputs, inputs, ...).
        inputs = [1] if tensor.ndim == 3 else list(range(1, tensor.ndim))
        scale = tensor.float().abs().amax(dim=inputs, keepdim=True).clamp(min=1e-30) / 127
        found[name] = (tensor.float() / scale).round().clamp(-127, 127).to(torch.int8)
        found[name + SCALE] = scale
    return found


def restored(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that :func:`quantised` stands for, in float32; others as they are.

    Args:
        tensors: by name, with scales.

    Returns:
        By parameter name, without scales.
    """
    return {
        name: tensor.float() * tensors[name + SCALE] if name + SCALE in tensors else tensor
        for name, tensor in tensors.items()
        if not name.endswith(SCALE)
    }
