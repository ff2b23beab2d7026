"""LoRA: low-rank factors beside the linear maps of a network whose own weights stay as they are.

Source: Hu et al., arXiv 2106.09685, equation 3: W x + (alpha / rank) B A x, A drawn, B zero.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoestring.config import LoRAConfig
from shoestring.models.layers import ClassEmbedding
from shoestring.models.moe import ExpertChoice
from shoestring.runtime import UserError

FACTORS = ("lora_a", "lora_b")
SHOWN = 6
"""Names in a sentence."""


class LoRALinear(nn.Linear):
    """A linear map under its old names, and two factors beside it; only these are trained.

    Args:
        linear: whose weights are taken over.
        rank: of the factors.
        scale: what their product is multiplied by.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        nn.Module.__init__(self)  # that of a linear map would draw weights
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_a = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_b = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """The map, and what was learned."""
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def linear_maps(network: nn.Module) -> dict[str, nn.Linear]:
    """The linear maps that factors may stand beside, by name; not routers, nor class tables."""
    others: set[int] = set()
    for module in network.modules():
        if isinstance(module, ExpertChoice):
            others.add(id(module.gate))
        elif isinstance(module, ClassEmbedding):
            others.add(id(module.embedding_table))
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in others
    }


def chosen_maps(network: nn.Module, lora: LoRAConfig) -> dict[str, nn.Linear]:
    """The maps that get factors.

    Args:
        network: with or without factors.
        lora: its patterns and rank count.

    Returns:
        By name, in the network's order.

    Raises:
        UserError: if a pattern matches nothing, or the rank is above the width of a map.
    """
    maps = linear_maps(network)
    for pattern in lora.targets:
        if not fnmatch.filter(maps, pattern):
            raise UserError(
                f"lora.targets: no linear map of this model is called like {pattern!r}; there are for "
                f"example {', '.join(_examples(list(maps)))}"
            )
    chosen = {n: m for n, m in maps.items() if any(fnmatch.fnmatchcase(n, p) for p in lora.targets)}
    for name, module in chosen.items():
        widest = min(module.in_features, module.out_features)
        if lora.rank > widest:
            raise UserError(
                f"lora.rank is {lora.rank}, but {name} maps {module.in_features} to {module.out_features} "
                f"values; choose at most {widest}"
            )
    return chosen


def _examples(names: Sequence[str]) -> list[str]:
    """Some of the names, evenly."""
    return [names[i * len(names) // SHOWN] for i in range(min(SHOWN, len(names)))]


def scale_of(lora: LoRAConfig) -> float:
    """What the product of the factors is multiplied by: alpha / rank."""
    return (lora.rank if lora.alpha is None else lora.alpha) / lora.rank


@torch.no_grad()
def add_lora(network: nn.Module, lora: LoRAConfig, generator: torch.Generator | None) -> None:
    """Put factors beside the linear maps of a network.

    Args:
        network: changed in place; it computes what it did before, to the bit, as B is zero.
        lora: rank and targets.
        generator: draws A, normal with standard deviation 1 / sqrt(inputs); ``None`` leaves it unset.

    Raises:
        UserError: as :func:`chosen_maps`.
    """
    for name, linear in chosen_maps(network, lora).items():
        wrapped = LoRALinear(linear, lora.rank, scale_of(lora))
        if generator is not None:
            nn.init.normal_(wrapped.lora_a, std=1 / math.sqrt(linear.in_features), generator=generator)
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, wrapped)


def train_factors_only(network: nn.Module) -> None:
    """Keep a network's own weights from being trained, if it has factors beside them.

    Not done where pictures are drawn: torch multiplies in another order where a weight needs no gradient,
    which would change the last bits.

    Args:
        network: changed in place.
    """
    if any(isinstance(module, LoRALinear) for module in network.modules()):
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(is_factor(name))


@torch.no_grad()
def merge_factors(network: nn.Module) -> None:
    """Put what was learned into the weights: W + (alpha / rank) B A, and plain linear maps again.

    Args:
        network: changed in place.
    """
    for name, module in list(network.named_modules()):
        if not isinstance(module, LoRALinear):
            continue
        with torch.device("meta"):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        change = module.lora_b.double() @ module.lora_a.double()
        merged = (module.weight.double() + module.scale * change).to(module.weight.dtype)
        plain.weight, plain.bias = nn.Parameter(merged), module.bias
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, plain)


def is_factor(name: str) -> bool:
    """Whether a parameter, by its name, is one of the factors."""
    return name.rpartition(".")[2] in FACTORS


def lora_parameters(network: nn.Module, lora: LoRAConfig) -> int:
    """How many values the factors beside a network have."""
    return sum(lora.rank * (m.in_features + m.out_features) for m in chosen_maps(network, lora).values())
