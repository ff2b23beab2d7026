"""What every network of ours is, beside the seam :class:`shoestring.interfaces.Network`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shoestring.config import ModelConfig, TokensConfig
from shoestring.interfaces import Conditioning, NetworkOutput
from shoestring.models.width import Widths


class BaseNetwork(nn.Module):
    """Base of all networks: what training, checkpoints and sharding need to know of one.

    Args:
        config: its settings.
        tokens: the token method; ``None`` = the default.
    """

    predicts_all = False
    config: ModelConfig
    pos_embed: Tensor | None
    decoder_pos_embed: Tensor | None

    def __init__(self, config: ModelConfig, tokens: TokensConfig | None = None) -> None:
        super().__init__()
        self.config, self.tokens = config, tokens if tokens is not None else TokensConfig()
        self.patch_size, self.in_channels = config.patch_size, config.in_channels
        self.guidance_input = config.guidance_input
        self.position_scale = 1.0
        self.register_buffer("pos_embed", None)
        self.register_buffer("decoder_pos_embed", None)

    def initialize(self, generator: torch.Generator) -> None:
        """Draw every parameter anew.

        Args:
            generator: where the numbers come from.
        """
        raise NotImplementedError

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """See :meth:`shoestring.interfaces.Network.prepare`."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        time_B: Tensor,
        conditioning: Conditioning,
        visible_BK: Tensor | None = None,
        path_dropped_B: Tensor | None = None,
    ) -> NetworkOutput:
        """See :meth:`shoestring.interfaces.Network.__call__`."""
        raise NotImplementedError

    def widths(self) -> Widths:
        """The weights beside those of the same network at another width (muP); empty where there is none."""
        return Widths({}, {})

    def all_blocks(self) -> list[nn.Module]:
        """The blocks that are recomputed, compiled or sharded one by one."""
        raise NotImplementedError
