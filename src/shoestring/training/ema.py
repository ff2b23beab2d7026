"""Exponential moving average of the weights, kept in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """The average and its update: average = decay average + (1 - decay) weights.

    Args:
        model: whose parameters to follow; the average starts as a copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = [name for name, _ in model.named_parameters()]
        self.average = [p.detach().clone().float() for p in model.parameters()]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Follow the weights; decay 0 copies them."""
        torch._foreach_lerp_(self.average, [p.detach() for p in self.model.parameters()], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model has the averaged weights."""
        trained = [p.detach().clone() for p in self.model.parameters()]
        self._write(self.average)
        try:
            yield
        finally:
            self._write(trained)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.model.parameters(), values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name."""
        return dict(zip(self.names, self.average, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of :meth:`state_dict`."""
        for name, average in zip(self.names, self.average, strict=True):
            average.copy_(state[name])
