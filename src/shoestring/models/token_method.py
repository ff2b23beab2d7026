"""What a token method is: which blocks see which patches. The methods themselves are in ``routing.py``.

A method gets the layers of any network of ours (:class:`Layers`), the embedded patches of all places and the
indices of those that stay visible. It says in which order the layers run on which tokens; FLOPs are counted
by running it (``planning/flops.py``), so that formula and network cannot differ.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from shoestring.config import TokensConfig, TransformerConfig
from shoestring.runtime import UserError
from shoestring.tensors import Bool, Float, Int

Visible = Int[Tensor, "B K"] | None
Result = tuple[Tensor, Tensor | None]


@runtime_checkable
class Layers(Protocol):
    """A network's layers, with the condition already in them."""

    @property
    def depth(self) -> int:
        """Blocks of the backbone."""
        ...

    def mixer(self, x_BLD: Tensor, visible_BK: Tensor | None = None) -> Tensor:
        """The patch mixer on the given tokens; then only the visible ones are kept (``None`` = all)."""
        ...

    def backbone(self, x_BKD: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """The backbone's blocks from ``first`` up to and without ``last``."""
        ...

    def decoder(self, x_BKD: Tensor, visible_BK: Tensor | None) -> Tensor:
        """The decoder's blocks, on all places: those that are not visible hold the mask token."""
        ...


class TokenMethod(nn.Module):
    """Base of all methods.

    Args:
        model: the network.
        tokens: the method's settings.

    Raises:
        UserError: if they do not fit together.
    """

    predicts_all = False
    """Whether every patch is predicted also when some are dropped."""
    reconstructs = False
    """Whether predictions of dropped patches are kept apart from those of visible ones."""
    drops = True
    """Whether anything may be dropped at all."""
    drops_paths = False
    """Whether some training samples do without the reduced part (``tokens.path_drop``)."""

    def __init__(self, model: TransformerConfig, tokens: TokensConfig) -> None:
        super().__init__()
        if tokens.reconstruction and not self.reconstructs:
            raise UserError(
                f"tokens.reconstruction is {tokens.reconstruction}, but tokens.method={tokens.method} "
                "reconstructs nothing; set it to 0, or tokens.method=maskdit and model.decoder.depth"
            )
        if model.decoder.depth and not self.reconstructs:
            raise UserError(
                f"model.decoder.depth is {model.decoder.depth}, but tokens.method={tokens.method} has no "
                "decoder; set it to 0, or tokens.method=maskdit"
            )

    def forward(
        self,
        layers: Layers,
        x_BLD: Float[Tensor, "B L D"],
        visible_BK: Visible,
        path_dropped_B: Bool[Tensor, " B"] | None,
    ) -> Result:
        """Run the layers.

        Args:
            layers: of the network.
            x_BLD: embedded patches, all of them.
            visible_BK: the patches that the reduced part sees; ``None`` = all.
            path_dropped_B: samples without the reduced part (SPRINT).

        Returns:
            Tokens before the output layer, and their places (``None`` = all, in order).
        """
        raise NotImplementedError

    def extra_macs(self, length: int) -> int:
        """Multiply-accumulates of the method's own layers for L patches."""
        return 0
