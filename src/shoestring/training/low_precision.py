"""Low-precision copies of the weights, made once a step and shared by all who work on it.

Under autocast every part of a batch casts every weight anew, and every gradient back: of a small batch on a
CPU that is a tenth of the step. The copies are leaves of their own. A part's gradient is theirs, and is added
up in float32 for the weights themselves: the same bits, as each weight is used once in a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shoestring.models.layers import ClassEmbedding
from shoestring.models.moe import ExpertChoice


def kept_whole(network: nn.Module) -> set[str]:
    """Names of the weights that autocast does not touch either: routers, tables, norms of U-Nets."""
    names = set()
    for name, module in network.named_modules():
        if isinstance(module, ExpertChoice):
            names.add(f"{name}.gate.weight")
        elif isinstance(module, ClassEmbedding):
            names.add(f"{name}.embedding_table.weight")
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
            names |= {f"{name}.weight", f"{name}.bias"}
    return names


class LowPrecisionWeights:
    """The copies and their way into the network.

    Args:
        network: its weights stay what they are, also between steps; compiled or not, but in one process.
        dtype: of autocast.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        whole = kept_whole(network)
        self.leaves: list[nn.Parameter] = []
        """What a pass inside :meth:`used` takes gradients of: trained weights, in the network's order."""
        self._places: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        self._masters: list[Tensor] = []
        self._copies: list[Tensor] = []
        for name, parameter in network.named_parameters():
            module_name, _, leaf = name.rpartition(".")
            copy = parameter
            if name not in whole:
                copy = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
                self._places.append((network.get_submodule(module_name), leaf, parameter, copy))
                self._masters.append(parameter.detach())
                self._copies.append(copy.detach())
            if copy.requires_grad:
                self.leaves.append(copy)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside the block the network computes with copies of what its weights are now."""
        torch._foreach_copy_(self._copies, self._masters)
        for module, leaf, _, copy in self._places:
            setattr(module, leaf, copy)
        try:
            yield
        finally:
            for module, leaf, parameter, _ in self._places:
                setattr(module, leaf, parameter)


def add_gradients(total: Sequence[Tensor] | None, parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Add up the gradients of parts of a batch in float32, weight by weight, while its sum is in the cache.

    Args:
        total: of the parts before, changed in place; ``None`` = there were none.
        parts: one list of gradients a part, in low precision or not.

    Returns:
        The sums, added in the order of the parts.
    """
    sums = []
    for i, (first, *others) in enumerate(zip(*parts, strict=True)):
        value = first.to(torch.float32, copy=True) if total is None else total[i].add_(first)
        for other in others:
            value.add_(other)
        sums.append(value)
    return sums
