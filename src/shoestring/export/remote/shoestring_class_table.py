"""The classes of a U-Net trained by shoestring: it is shown each as a caption of two tokens."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class ShoestringClassTable(ModelMixin, ConfigMixin):
    """A row a class (tensor ``rows`` of the weights file); class -1 is the zero vector."""

    @register_to_config
    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(classes, dim))

    def forward(self, class_labels: Tensor) -> Tensor:
        """Captions of two tokens ``B 2 D``: zero, and the row of the class."""
        rows = torch.where(class_labels[:, None] >= 0, self.rows[class_labels.clamp(min=0)], 0.0)
        return torch.stack([torch.zeros_like(rows), rows], dim=1)
