"""Carrying learning rate and initial weights from a narrow network over to a wide one (muP).

Every weight is compared with that of the same network at the base width. For a matrix that has r times as
many inputs as there:

* the initial variance is that of the base divided by r, so that activations keep their size; for a matrix
  into something of fixed size (router, output) it is divided by r^2, so that it does not drown the gradient;
* the learning rate of AdamW is divided by r, as aligned updates sum over all inputs (``training/optim.py``).

All else stays: gains, biases, maps of data of fixed size. Attention logits do too: heads are as wide as at
the base (there are more of them), and queries and keys are normalised over the whole width, so that their
products do not know it. Without ``qk_norm`` the same follows from the size of activations. Each block's own
multipliers, mixer, decoder and experts count by their own inputs.

Source: Yang et al., arXiv 2203.03466, table 3; for diffusion transformers arXiv 2505.15270.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """Inputs and outputs of a weight by its shape.

    Args:
        shape: of a linear map (outputs, inputs), a convolution, or a stack of experts (experts, inputs,
            outputs); mask tokens count as one input.

    Returns:
        Both numbers.
    """
    if len(shape) == 3:
        return shape[1], shape[2]
    return math.prod(shape[1:]), shape[0]


@dataclass(frozen=True)
class Widths:
    """Shapes of the weights by name, here and at the base width; without a base nothing is changed."""

    shapes: Mapping[str, Sequence[int]]
    base: Mapping[str, Sequence[int]]

    def inputs_ratio(self, name: str) -> float:
        """r: how many times as many inputs a weight has as at the base; 1 for gains and biases."""
        if not self.base:
            return 1.0
        return fans(self.shapes[name])[0] / fans(self.base[name])[0]

    def xavier_gain(self, name: str) -> float:
        """Factor that gives a Xavier-uniform weight the standard deviation it has at the base."""
        if not self.base:
            return 1.0
        return math.sqrt(sum(fans(self.shapes[name])) / sum(fans(self.base[name])))

    def initial_scale(self, name: str) -> float:
        """Factor of an initial weight that has been drawn with the standard deviation of the base."""
        if not self.base:
            return 1.0
        ratio = self.inputs_ratio(name)
        into_fixed_size = fans(self.shapes[name])[1] == fans(self.base[name])[1]
        return 1 / ratio if into_fixed_size else 1 / math.sqrt(ratio)
