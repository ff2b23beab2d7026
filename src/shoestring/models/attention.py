"""Scaled dot-product attention in the form that is fast on the device at hand."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

AttentionKind = Literal["auto", "sdpa", "explicit"]


def attend(
    q_BNLP: Tensor, k_BNSP: Tensor, v_BNSP: Tensor, mask_BS: Tensor | None, kind: AttentionKind
) -> Tensor:
    """Scaled dot-product attention, fused or written out.

    On CPUs torch's fused kernel is fast forward, but has a bf16 backward pass many times slower than the
    written-out form: ``auto`` writes it out in bf16 training on a CPU (measured here, see EXPERIMENTS.md).

    Args:
        q_BNLP: queries.
        k_BNSP: keys.
        v_BNSP: values.
        mask_BS: true at keys that may be attended; ``None`` = all.
        kind: which form.

    Returns:
        Attention output, shaped like ``q_BNLP``.
    """
    mask = None if mask_BS is None else mask_BS[:, None, None, :]
    if kind == "auto":
        slow = q_BNLP.device.type == "cpu" and q_BNLP.dtype == torch.bfloat16 and torch.is_grad_enabled()
        kind = "explicit" if slow else "sdpa"
    if kind == "sdpa":
        return F.scaled_dot_product_attention(q_BNLP, k_BNSP, v_BNSP, attn_mask=mask)
    scores_BNLS = (q_BNLP * q_BNLP.shape[-1] ** -0.5) @ k_BNSP.transpose(-1, -2)
    if mask is not None:
        scores_BNLS = scores_BNLS.masked_fill(~mask, float("-inf"))
    return scores_BNLS.softmax(dim=-1) @ v_BNSP
