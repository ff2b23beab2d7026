"""Muon for matrices and for stacks of matrices (experts), also where they are shared out over ranks.

``torch.optim.Muon`` takes 2-D parameters only; here Newton-Schulz runs over the last two dimensions, so that
every expert's matrix, and the queries', keys' and values' part of a fused one, is orthogonalised by itself,
and matrices of one shape run as one batched product. Equal to torch's on 2-D (tested).

Matrices that are shared out (FSDP2) are put together for the update: the ranks of a shard group exchange
their parts so that each has some matrices whole, orthogonalise those, and exchange back. So the work is
divided within a shard group, and done by each group alike (hybrid sharding, DDP).

Source: Jordan et al., "Muon: an optimizer for hidden layers", 2024; learning-rate adjustment after
arXiv 2502.16982.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Shard

from shoestring.runtime import Workers
from shoestring.training.parallel import local

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
PIECE_ELEMENTS = 2**25
"""Elements that a rank updates at once; bounds the copies, about five of them in float32."""


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


@dataclass(frozen=True)
class Matrices:
    """Parameters of one shape, and shared out in one way: linear weights or stacks of experts.

    Linear weights are ``outputs inputs``, stacks ``experts inputs outputs``.
    """

    parameters: list[nn.Parameter]
    momentum: list[Tensor]
    parts: int = 1
    """Equal matrices one above the other in each (3 for fused queries, keys and values)."""
    lr_scale: float = 1.0
    weight_decay: float = 0.0
    """Decoupled, scaled by the learning rate."""

    @property
    def sharded(self) -> bool:
        """Whether they are shared out over ranks."""
        return isinstance(self.parameters[0], DTensor)

    def select(self, chosen: Sequence[int]) -> Matrices:
        """Some of them."""
        return replace(
            self,
            parameters=[self.parameters[i] for i in chosen],
            momentum=[self.momentum[i] for i in chosen],
        )


class Muon:
    """Momentum, orthogonalised.

    Args:
        groups: what to update; the momentum is changed in place.
        momentum: Nesterov momentum.
        ns_steps: Newton-Schulz iterations.
        adjust: ``original`` scales by sqrt(max(1, outputs / inputs)), ``match_rms_adamw`` by
            0.2 sqrt(max(rows, columns)), which makes AdamW's learning rates fit.
        workers: threads that share the matrices.
    """

    def __init__(
        self, groups: Sequence[Matrices], momentum: float, ns_steps: int, adjust: str, workers: Workers
    ) -> None:
        self.groups, self.workers = groups, workers
        self.momentum, self.ns_steps, self.adjust = momentum, ns_steps, adjust
        for group in groups:
            assert all(p.ndim in (2, 3) for p in group.parameters), "Muon takes matrices and stacks of them"

    @torch.no_grad()
    def step(self, lr: float, skip: Tensor | None = None) -> None:
        """One update of every parameter that has a gradient.

        Args:
            lr: learning rate before the scale by shape.
            skip: a boolean number on the parameters' device; where it is true, nothing is changed. It is
                not waited for. ``None`` = false.
        """
        pieces = [piece for group in self.groups for piece in self._cut(group)]
        # All ranks must exchange their parts in the same order: no threads there.
        for piece in pieces:
            if piece.sharded:
                self._update(piece, lr, skip)
        self.workers.map(lambda piece: self._update(piece, lr, skip), [p for p in pieces if not p.sharded])

    def _cut(self, group: Matrices) -> list[Matrices]:
        """As many pieces as there are threads, none too large, of the parameters that have gradients."""
        found = [i for i, p in enumerate(group.parameters) if p.grad is not None]
        if not found:
            return []
        first = group.parameters[0]
        # From numbers that are the same on all ranks, whose own parts may differ by a row.
        ranks = first.device_mesh.size() if isinstance(first, DTensor) else 1
        count = math.ceil(len(found) / max(1, PIECE_ELEMENTS * ranks // first.numel()))
        if not group.sharded:
            count = max(count, min(len(found), self.workers.count))
        return [group.select(found[i::count]) for i in range(count)]

    def _update(self, piece: Matrices, lr: float, skip: Tensor | None) -> None:
        weights = [local(p) for p in piece.parameters]
        buffers = [local(buffer) for buffer in piece.momentum]
        grad = torch.stack([local(p.grad) for p in piece.parameters if p.grad is not None])
        before = torch.stack(buffers)
        momentum = before.lerp(grad, 1 - self.momentum)
        if skip is not None:
            momentum = torch.where(skip, before, momentum)
        torch._foreach_copy_(buffers, list(momentum.unbind()))
        # Rounded before the exchange as Newton-Schulz would round it after: half the traffic, the same bits.
        nesterov = grad.lerp_(momentum, self.momentum).bfloat16()
        first = piece.parameters[0]
        flat = nesterov.reshape(-1, *nesterov.shape[-2:])
        update = _on_whole_matrices(flat, first, lambda whole: self._orthogonal(whole, piece.parts))
        update = update.reshape(grad.shape).to(grad.dtype)
        rate = lr * piece.lr_scale
        kept = grad.new_full((), 1 - rate * piece.weight_decay)
        if skip is not None:
            update, kept = update.masked_fill(skip, 0.0), kept.masked_fill(skip, 1.0)
        torch._foreach_mul_(weights, kept)
        torch._foreach_add_(weights, list(update.unbind()), alpha=-rate * self._scale(first, piece.parts))

    def _orthogonal(self, stack: Tensor, parts: int) -> Tensor:
        """Each part of each matrix by itself."""
        rows, columns = stack.shape[-2:]
        return orthogonalize(stack.reshape(-1, rows // parts, columns), self.ns_steps).reshape(stack.shape)

    def _scale(self, parameter: Tensor, parts: int) -> float:
        rows, columns = parameter.shape[-2] // parts, parameter.shape[-1]
        if self.adjust == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        outputs, inputs = (columns, rows) if parameter.ndim == 3 else (rows, columns)
        return math.sqrt(max(1.0, outputs / inputs))


def _on_whole_matrices(stack: Tensor, like: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of whole matrices, of matrices of which each rank has a part.

    Args:
        stack: this rank's parts, ``matrices rows columns``.
        like: a parameter that is shared out in the same way, or not at all.
        function: treats every matrix of a stack by itself.

    Returns:
        This rank's parts of the result.
    """
    stacked = like.ndim - 2  # 1 for experts: the dimension before rows and columns
    if not isinstance(like, DTensor) or all(
        p.is_replicate() or (stacked and p.is_shard(0)) for p in like.placements
    ):
        return function(stack)
    assert not (stacked and any(p.is_shard(0) for p in like.placements)), "experts cut in two ways"
    parts = [Shard(p.dim + 1 - stacked) if isinstance(p, Shard) else p for p in like.placements]
    wholes = [Shard(0) if isinstance(p, Shard) else p for p in like.placements]
    shape = torch.Size((len(stack), *like.shape[-2:]))

    def spread(tensor: Tensor, placements: list[Placement]) -> DTensor:
        return DTensor.from_local(
            tensor.contiguous(),
            like.device_mesh,
            placements,
            run_check=False,
            shape=shape,
            stride=(shape[1] * shape[2], shape[2], 1),
        )

    mine = spread(stack, parts).redistribute(placements=wholes).to_local()
    return spread(function(mine), wholes).redistribute(placements=parts).to_local()
