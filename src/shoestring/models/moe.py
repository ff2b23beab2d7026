"""Expert-choice mixture of experts: every expert picks its tokens.

Source: Zhou et al., arXiv 2202.09368; MicroDiT, arXiv 2407.15811, section 3.2.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from shoestring.tensors import Float


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Full precision inside; the meta device, on which recipes are counted, knows no autocast at all."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


class ExpertChoice(nn.Module):
    """Feed-forward layer whose experts choose tokens within each image.

    Router: softmax over experts of x gate^T, in float32. Each expert takes its R = capacity * T / E
    highest-scoring tokens (at least one), computes gelu(x w1) w2 and adds the result, times the score, to
    the tokens' outputs. A token that nobody picks gets zero; one picked several times gets the sum.
    Routing is per image, so no picture depends on the batch it is in.
    """

    def __init__(self, dim: int, hidden: int, experts: int, capacity: float) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(experts, dim, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, dim))
        self.gate = nn.Linear(dim, experts, bias=False)
        self.capacity = capacity

    def tokens_per_expert(self, tokens: int) -> int:
        """R for T tokens: int(capacity * T / E), at least 1 and at most T."""
        return max(1, min(tokens, int(self.capacity * tokens / self.w1.shape[0])))

    def logits(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T E"]:
        """What the router makes of the tokens, in float32 or more."""
        with _no_autocast(x_BTD.device.type):
            # Never below fp32: in bf16 0.2-0.3 % of the choices flip. fp64 stays fp64 (tests).
            # Called as a module: where weights are shared out among ranks, it is whole only inside.
            return self.gate(x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32)))

    def route(
        self, x_BTD: Float[Tensor, "B T D"], logits_BTE: Float[Tensor, "B T E"] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Which tokens the experts choose.

        Args:
            x_BTD: at least one token an image.
            logits_BTE: of :meth:`logits`, where they are known already.

        Returns:
            Scores of all tokens ``B E T`` (over the experts they sum to one), and of the R chosen ones of
            each expert their scores and places, both ``B E R``.
        """
        logits_BTE = self.logits(x_BTD) if logits_BTE is None else logits_BTE
        with _no_autocast(x_BTD.device.type):
            score_BET = logits_BTE.softmax(dim=-1).transpose(1, 2)
        weight_BER, choice_BER = score_BET.topk(self.tokens_per_expert(x_BTD.shape[1]), dim=-1, sorted=False)
        return score_BET, weight_BER, choice_BER

    def forward(
        self, x_BTD: Float[Tensor, "B T D"], logits_BTE: Float[Tensor, "B T E"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Route (by logits that are known, if they are), compute and combine: gather, batched matrix
        product, index-add.
        """
        b, t, d = x_BTD.shape
        if t == 0:  # guidance by a prediction without any of the tokens
            return x_BTD
        _, weight_BER, choice_BER = self.route(x_BTD, logits_BTE)
        _, e, r = choice_BER.shape
        offset_B11 = torch.arange(0, b * t, t, device=x_BTD.device)[:, None, None]
        rows = (choice_BER + offset_B11).transpose(0, 1).reshape(-1)  # ordered (expert, image, rank)
        picked = x_BTD.reshape(b * t, d).index_select(0, rows).view(e, b * r, d)
        # As all experts take equally many tokens, a batched product is the grouped one, without its table of
        # sizes, on which a GPU would have to be waited for.
        hidden = F.gelu(torch.bmm(picked, self.w1.to(picked.dtype)))
        output = torch.bmm(hidden, self.w2.to(hidden.dtype)).view(e * b * r, d)
        weight = weight_BER.transpose(0, 1).reshape(-1, 1).to(output.dtype)
        combined = output.new_zeros(b * t, d).index_add(0, rows, output * weight)
        return combined.view(b, t, d)


@dataclass(frozen=True)
class ExpertLoad:
    """How one layer shared the tokens of one forward pass among its experts."""

    tokens_per_expert: int
    """Of each image; the same for all experts, as these choose."""
    favourite_E: tuple[float, ...]
    """Share of the tokens that score this expert highest; all equal where the router is balanced."""
    untouched: float
    """Share of the tokens that no expert chose: for them the layer does nothing."""
    several: float
    """Share of the tokens that more than one chose."""
    entropy: float
    """Mean entropy of a token's scores as a share of ln E: 1 = undecided, 0 = each token has its expert."""


@torch.no_grad()
def expert_load(layer: ExpertChoice, x_BTD: Float[Tensor, "B T D"]) -> ExpertLoad:
    """Route once more and count.

    Args:
        layer: with experts.
        x_BTD: its input, at least one token an image.

    Returns:
        The load; the host waits for it.
    """
    score_BET, _, choice_BER = layer.route(x_BTD)
    experts = score_BET.shape[1]
    times_BT = score_BET.new_zeros(score_BET.shape[0], score_BET.shape[2])
    chosen = choice_BER.flatten(1)
    times_BT.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=times_BT.dtype))
    first_BT = score_BET.argmax(dim=1)
    favourite_E = torch.bincount(first_BT.flatten(), minlength=experts) / first_BT.numel()
    entropy_BT = -torch.xlogy(score_BET, score_BET).sum(dim=1)
    return ExpertLoad(
        choice_BER.shape[2],
        tuple(favourite_E.tolist()),
        (times_BT == 0).double().mean().item(),
        (times_BT > 1).double().mean().item(),
        entropy_BT.mean().item() / max(math.log(experts), 1e-9),
    )


@contextmanager
def expert_statistics(network: nn.Module) -> Iterator[dict[str, ExpertLoad]]:
    """Watch the experts of a network in the forward passes inside the block; elsewhere nothing is added.

    Compiled blocks run uncompiled meanwhile, as hooks are no part of what was compiled.

    Args:
        network: may have no experts.

    Yields:
        dict[str, ExpertLoad]: The loads of the last forward pass by the names of the layers, complete when
        the block ends.
    """
    loads: dict[str, ExpertLoad] = {}

    def watch(name: str, layer: ExpertChoice) -> RemovableHandle:
        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].shape[1]:
                loads[name] = expert_load(layer, inputs[0])

        return layer.register_forward_pre_hook(look)

    layers = [(name, m) for name, m in network.named_modules() if isinstance(m, ExpertChoice)]
    handles = [watch(name, layer) for name, layer in layers]
    try:
        # Where nothing is compiled, the compiler is not even loaded, which takes seconds.
        compiler = "torch._dynamo" in sys.modules
        with torch.compiler.set_stance("force_eager") if compiler else nullcontext():
            yield loads
    finally:
        for handle in handles:
            handle.remove()


def expert_report(loads: dict[str, ExpertLoad]) -> dict[str, float]:
    """The loads of all layers as a few numbers for the log.

    Args:
        loads: of :func:`expert_statistics`; at least one.

    Returns:
        ``most`` and ``least``: largest and smallest share of tokens that score one expert highest, times the
        number of experts (1 = balanced), over all layers; ``untouched`` and ``several``: shares of tokens,
        and ``entropy``, as means over the layers; ``worst_untouched``: of the layer with most such tokens.
    """
    layers = list(loads.values())
    shares = [share * len(load.favourite_E) for load in layers for share in load.favourite_E]
    return {
        "most": max(shares),
        "least": min(shares),
        "untouched": sum(load.untouched for load in layers) / len(layers),
        "worst_untouched": max(load.untouched for load in layers),
        "several": sum(load.several for load in layers) / len(layers),
        "entropy": sum(load.entropy for load in layers) / len(layers),
    }
