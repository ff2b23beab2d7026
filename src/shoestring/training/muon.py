"""Muon for matrices and for stacks of matrices (experts).

``torch.optim.Muon`` takes 2-D parameters only; here Newton-Schulz runs over the last two dimensions, so
every expert's matrix is orthogonalised by itself, and matrices of one shape run as one batched product.
Equal to torch's on 2-D (tested).

Source: Jordan et al., "Muon: an optimizer for hidden layers", 2024; learning-rate adjustment after
arXiv 2502.16982.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from shoestring.runtime import Workers

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(update: Tensor, steps: int, eps: float = 1e-7) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: a quintic Newton-Schulz iteration in bf16.

    Args:
        update: ``... rows columns``; each matrix is treated by itself.
        steps: iterations.
        eps: smallest norm to divide by.

    Returns:
        bf16, shaped like ``update``; singular values between about 0.7 and 1.2.
    """
    a, b, c = COEFFICIENTS
    shape = update.shape
    x = update.bfloat16().reshape(-1, shape[-2], shape[-1])
    tall = shape[-2] > shape[-1]
    if tall:
        x = x.mT.contiguous()  # the products are a quarter faster than on the transposed view
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(shape)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised.

    Args:
        params: parameters of two or more dimensions, or groups of them.
        lr: learning rate before the adjustment by shape.
        weight_decay: decoupled, scaled by ``lr``.
        momentum: Nesterov momentum.
        ns_steps: Newton-Schulz iterations.
        adjust: ``original`` scales by sqrt(max(1, rows / columns)), ``match_rms_adamw`` by
            0.2 sqrt(max(rows, columns)), which makes AdamW's learning rates fit.
        workers: threads that share the matrices.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float,
        momentum: float,
        ns_steps: int,
        adjust: str,
        workers: Workers,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "ns_steps": ns_steps,
            "adjust": adjust,
        }
        super().__init__(params, defaults)
        self.workers = workers
        for group in self.param_groups:
            for p in group["params"]:
                assert p.ndim >= 2, "Muon takes matrices"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        pieces: list[tuple[list[Tensor], dict[str, Any]]] = []
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.ndim, *p.shape[-2:]].append(p)
            for params in by_shape.values():
                n = self.workers.count
                pieces += [(params[i::n], group) for i in range(n) if params[i::n]]
        self.workers.map(self._update, pieces)

    def _update(self, piece: tuple[list[Tensor], dict[str, Any]]) -> None:
        """Parameters whose matrices have one shape, together."""
        params, group = piece
        grads = [p.grad for p in params if p.grad is not None]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(grads, buffers, group["momentum"])
        rows, columns = params[0].shape[-2:]
        stacked = torch.cat([u.reshape(-1, rows, columns) for u in nesterov])
        orthogonal = orthogonalize(stacked, group["ns_steps"])
        if group["adjust"] == "original":
            # Linear weights are (out, in), stacked expert weights (in, out).
            outputs, inputs = (columns, rows) if params[0].ndim == 3 else (rows, columns)
            scale = max(1.0, outputs / inputs) ** 0.5
        else:
            scale = 0.2 * max(rows, columns) ** 0.5
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        sizes = [p.numel() // (rows * columns) for p in params]
        for p, update in zip(params, orthogonal.split(sizes), strict=True):
            p.add_(update.view(p.shape), alpha=-group["lr"] * scale)
