"""Scaled dot-product attention in the form that is fast on the device at hand."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

AttentionKind = Literal["auto", "sdpa", "explicit"]
Choices = Mapping[str, AttentionKind]
"""The form to train with, by :func:`attention_key`."""
NOTHING_TIMED: Choices = MappingProxyType({})
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16"}


def attention_key(dtype: torch.dtype, queries: int, keys: int, width: int, masked: bool) -> str:
    """What the time of an attention depends on, in words.

    Args:
        dtype: of queries, keys and values.
        queries: tokens that attend.
        keys: tokens that are attended.
        width: of one head.
        masked: whether some keys may be hidden.

    Returns:
        Such as ``bf16 256x77x32`` or ``bf16 256x77x32 masked``.
    """
    return f"{DTYPES[dtype]} {queries}x{keys}x{width}" + (" masked" if masked else "")


def usual(device: str, dtype: torch.dtype) -> AttentionKind:
    """The form to train with where nothing was timed: written out in bf16 on a CPU, else fused."""
    return "explicit" if device == "cpu" and dtype == torch.bfloat16 else "sdpa"


def _automatic(q_BNLP: Tensor, keys: int, masked: bool, choices: Choices) -> AttentionKind:
    if not torch.is_grad_enabled():
        return "sdpa"  # forward alone, the fused kernel is the faster one everywhere
    key = attention_key(q_BNLP.dtype, q_BNLP.shape[2], keys, q_BNLP.shape[3], masked)
    if key in choices:
        return choices[key]
    return usual(q_BNLP.device.type, q_BNLP.dtype)


def attend(
    q_BNLP: Tensor,
    k_BNSP: Tensor,
    v_BNSP: Tensor,
    mask_BS: Tensor | None,
    kind: AttentionKind,
    choices: Choices = NOTHING_TIMED,
) -> Tensor:
    """Scaled dot-product attention, fused or written out.

    On CPUs torch's fused kernel is fast forward, but has a bf16 backward pass many times slower than the
    written-out form. ``auto`` trains with what was timed for the shape on this machine (``choices``). Where
    nothing was, it is written out in bf16 on a CPU (measured here, see EXPERIMENTS.md), else fused.

    Args:
        q_BNLP: queries.
        k_BNSP: keys.
        v_BNSP: values.
        mask_BS: true at keys that may be attended; ``None`` = all.
        kind: which form.
        choices: for ``auto``: forms that were timed.

    Returns:
        Attention output, shaped like ``q_BNLP``.
    """
    mask = None if mask_BS is None else mask_BS[:, None, None, :]
    if kind == "auto":
        kind = _automatic(q_BNLP, k_BNSP.shape[2], mask is not None, choices)
    if kind == "sdpa":
        return F.scaled_dot_product_attention(q_BNLP, k_BNSP, v_BNSP, attn_mask=mask)
    scores_BNLS = (q_BNLP * q_BNLP.shape[-1] ** -0.5) @ k_BNSP.transpose(-1, -2)
    if mask is not None:
        scores_BNLS = scores_BNLS.masked_fill(~mask, float("-inf"))
    return scores_BNLS.softmax(dim=-1) @ v_BNSP
