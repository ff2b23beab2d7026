"""What autograd keeps of a U-Net's forward pass: watched on fake tensors, which cost nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from shoestring.interfaces import Conditioning
from shoestring.models.files import new_network
from shoestring.models.network import BaseNetwork
from shoestring.planning.activations import FP32, Bytes, Part


class _Kept:
    """Values that autograd saves, each tensor once; weights are left out."""

    def __init__(self, network: nn.Module) -> None:
        self.values = 0
        self._weights = {p.untyped_storage()._cdata for p in network.parameters()}
        self._storages: set[int] = set()
        self._alive: list[Tensor] = []

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in self._weights and storage not in self._storages:
            self._storages.add(storage)
            self._alive.append(tensor)  # else its address would be given to another
            self.values += tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor


def unet_parts(network: BaseNetwork, grid: tuple[int, int], caption: int, b: Bytes) -> list[Part]:
    """The stacks of a U-Net in the order of the forward pass, then the ends of the network.

    Saved values are counted as results of products; group norms on CUDA, which are float32 under autocast,
    are a few per cent more. That is a forecast for planning, good to about a fifth.

    Args:
        network: whose settings count; it may be on the meta device.
        grid: rows and columns after the pixel-unshuffle.
        caption: caption length; 0 without captions.
        b: bytes of values.

    Returns:
        Their sum is what autograd keeps.
    """
    fake = FakeTensorMode()  # unlike the meta device it knows the kernels, and what attention does not keep
    with fake:
        network = new_network(network.config, network.tokens)
    kept = _Kept(network)
    stacks = network.all_blocks()
    before: dict[int, int] = {}
    parts: list[Part] = []

    def entering(module: nn.Module, inputs: Any, keywords: dict[str, Any]) -> None:
        before[id(module)] = kept.values

    def leaving(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        given = [t for t in (*inputs, *keywords.values()) if isinstance(t, Tensor)]
        for more in keywords.values():
            given += [t for t in more if isinstance(t, Tensor)] if isinstance(more, tuple) else []
        values, entry = kept.values - before[id(module)], sum(t.numel() for t in given)
        parts.append(Part(values * b.low, 2 * max(1, entry) * b.low, entry * b.low, **_sizes(module)))

    handles = [s.register_forward_pre_hook(entering, with_kwargs=True) for s in stacks]
    handles += [s.register_forward_hook(leaving, with_kwargs=True) for s in stacks]
    side = network.patch_size
    try:
        with fake, torch.enable_grad(), saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            x = torch.empty(1, network.in_channels, grid[0] * side, grid[1] * side)
            condition = Conditioning.nothing(1)
            if network.config.condition == "text":
                condition = Conditioning(torch.empty(1, max(1, caption), network.config.caption_dim))
            if network.config.image_channels:
                small = torch.empty(1, network.config.image_channels, *x.shape[2:])
                condition = replace(condition, image=small)
            if network.guidance_input:
                condition = replace(condition, guidance_B=torch.empty(1))
            network(x, torch.empty(1), condition)
    finally:
        for handle in handles:
            handle.remove()
    rest = kept.values - sum(part.kept for part in parts) / b.low
    inside = {id(p) for stack in stacks for p in stack.parameters()}
    ends = [p.numel() for p in network.parameters() if id(p) not in inside]
    image = grid[0] * grid[1] * network.in_channels * side**2
    parts.append(
        Part(
            rest * b.low + image * FP32,
            3 * image * FP32,
            parameters=sum(ends),
            cast=sum(ends),
            largest=max(ends),
        )
    )
    return parts


def _sizes(module: nn.Module) -> dict[str, int]:
    sizes = [p.numel() for p in module.parameters()]
    products = [p.numel() for p in module.parameters() if p.ndim >= 2]
    return {"parameters": sum(sizes), "cast": sum(products), "largest": max(sizes)}
