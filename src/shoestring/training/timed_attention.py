"""Which form of attention trains fastest here: timed once for the shapes of a run, then kept.

The two forms differ in their last bits. What was chosen is therefore remembered in the run folder, so that a
run that goes on computes as it began.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from shoestring.config import TokensConfig, TransformerConfig
from shoestring.models.attention import AttentionKind, attend, attention_key, usual
from shoestring.runtime import Workers
from shoestring.training.step_shapes import AttentionShape, StepShape, trace_shapes

SCORES = 2**21
"""Of the trial, over all images and heads: larger than a core's cache, as in a step, and done in a blink."""
MOST_HEADS = 64
REPEATS = 3
SHOWN = 3
OTHER: dict[AttentionKind, AttentionKind] = {"explicit": "sdpa", "sdpa": "explicit"}
MARGIN = 1.25
"""The usual form stays unless the other is so many times as fast: two runs should not differ by chance."""


def choose_attention(
    model: TransformerConfig,
    tokens: TokensConfig,
    shapes: Sequence[StepShape],
    dtype: torch.dtype,
    workers: Workers,
) -> dict[str, AttentionKind]:
    """Time both forms, forward and backward, for every attention of these passes on the CPU.

    Args:
        model: the network.
        tokens: its token method.
        shapes: of the passes.
        dtype: of the products.
        workers: of the run; the trial runs in one of their threads.

    Returns:
        The faster form by :func:`shoestring.models.attention.attention_key`, for
        :meth:`shoestring.models.transformer.DiffusionTransformer.use_attention`; empty where
        ``model.attention`` says which form to take.
    """
    if model.attention != "auto":
        return {}
    seen = trace_shapes(model, tokens, shapes).attention
    ordered = sorted(seen, key=lambda s: (s.queries, s.keys, s.width, s.masked))

    first = usual("cpu", dtype)

    def fastest(shape: AttentionShape) -> AttentionKind:
        with torch.enable_grad():
            faster = _seconds(first, shape, dtype) > MARGIN * _seconds(OTHER[first], shape, dtype)
        return OTHER[first] if faster else first

    found = [workers.map(fastest, [shape], together=False)[0] for shape in ordered]
    return {
        attention_key(dtype, shape.queries, shape.keys, shape.width, shape.masked): kind
        for shape, kind in zip(ordered, found, strict=True)
    }


def _seconds(kind: AttentionKind, shape: AttentionShape, dtype: torch.dtype) -> float:
    """The shortest of some trials, forward and backward."""
    heads = max(1, min(MOST_HEADS, SCORES // (shape.queries * shape.keys)))

    def inputs(length: int) -> torch.Tensor:
        return torch.ones(1, heads, length, shape.width, dtype=dtype, requires_grad=True)

    q, k, v = inputs(shape.queries), inputs(shape.keys), inputs(shape.keys)
    mask = torch.ones(1, shape.keys, dtype=torch.bool) if shape.masked else None
    gradient, best = torch.ones(1, heads, shape.queries, shape.width, dtype=dtype), float("inf")
    # The thread's own clock, where it does all the work: it stands still while other programs have the core.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(1 + REPEATS):  # the first warms up, and rarely is the shortest
        start_s = clock()
        torch.autograd.grad(attend(q, k, v, mask, kind), (q, k, v), gradient)
        best = min(best, clock() - start_s)
    return best


def attention_sentence(choices: dict[str, AttentionKind]) -> str:
    """What was chosen, for people.

    Args:
        choices: of :func:`choose_attention`, not empty.

    Returns:
        A sentence.
    """
    parts = []
    for kind, meaning in (("explicit", "written out"), ("sdpa", "fused")):
        shapes = [key for key, chosen in choices.items() if chosen == kind]
        if shapes:
            more = f" and {len(shapes) - SHOWN} more shapes" if len(shapes) > SHOWN else ""
            parts.append(f"{meaning} for {', '.join(shapes[:SHOWN])}{more}")
    return f"Attention, timed here (queries x keys x width of a head): {'; '.join(parts)}; kept for this run"
