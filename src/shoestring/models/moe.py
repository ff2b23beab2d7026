"""Expert-choice mixture of experts: every expert picks its tokens.

Source: Zhou et al., arXiv 2202.09368; MicroDiT, arXiv 2407.15811, section 3.2.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    def forward(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Route, compute and combine: gather, batched matrix product, index-add."""
        b, t, d = x_BTD.shape
        if t == 0:  # guidance by a prediction without any of the tokens
            return x_BTD
        e = self.w1.shape[0]
        r = self.tokens_per_expert(t)
        with _no_autocast(x_BTD.device.type):
            # Never below fp32: in bf16 0.2-0.3 % of the choices flip. fp64 stays fp64 (tests).
            dtype = torch.promote_types(x_BTD.dtype, torch.float32)
            logits_BTE = F.linear(x_BTD.to(dtype), self.gate.weight.to(dtype))
            score_BET = logits_BTE.softmax(dim=-1).transpose(1, 2)
        weight_BER, choice_BER = score_BET.topk(r, dim=-1, sorted=False)
        offset_B11 = torch.arange(0, b * t, t, device=x_BTD.device)[:, None, None]
        rows = (choice_BER + offset_B11).transpose(0, 1).reshape(-1)  # ordered (expert, image, rank)
        picked = x_BTD.reshape(b * t, d).index_select(0, rows).view(e, b * r, d)
        hidden = F.gelu(torch.bmm(picked, self.w1.to(picked.dtype)))
        output = torch.bmm(hidden, self.w2.to(hidden.dtype)).view(e * b * r, d)
        weight = weight_BER.transpose(0, 1).reshape(-1, 1).to(output.dtype)
        combined = output.new_zeros(b * t, d).index_add(0, rows, output * weight)
        return combined.view(b, t, d)
