"""MaskDiT: a plain diffusion transformer (adaLN-Zero) trained on some patches, with a small decoder.

Without decoder it is DiT. Source: Fast Training of Diffusion Models with Masked Transformers, arXiv
2306.09305; DiT, arXiv 2212.09748. Written from the formulas; modules carry the released names.
"""

from __future__ import annotations

import torch
from torch import nn

from shoestring.config import TransformerConfig
from shoestring.models.layers import (
    MLP,
    Activation,
    AdaLN,
    CrossAttention,
    LayerNorm,
    SelfAttention,
    TransformerBlock,
    attention_width,
    mlp_width,
)
from shoestring.models.transformer import CaptionEmbedder, DiffusionTransformer


class DiTBlock(TransformerBlock):
    """Self-attention and feed-forward, modulated and gated by the condition.

    With captions there is cross-attention between them, as in MicroDiT: MaskDiT itself knows classes only.

    Args:
        config: the network.
        dim: width of the block.
        head_dim: of one head.
        qkv_multiplier: self-attention width as a share of ``dim`` (1 in the paper).
        ffn_multiplier: feed-forward width as a multiple of ``dim`` (4 in the paper).
        cross: whether it attends to a caption.
    """

    def __init__(
        self,
        config: TransformerConfig,
        dim: int,
        head_dim: int,
        qkv_multiplier: float,
        ffn_multiplier: float,
        cross: bool,
    ) -> None:
        super().__init__()
        bias, eps, kind = config.bias, config.norm_eps, config.attention
        width = attention_width(dim, qkv_multiplier, head_dim)
        self.norm1, self.norm2 = LayerNorm(dim, eps, gain=False), LayerNorm(dim, eps, gain=False)
        self.attn = SelfAttention(dim, width, head_dim, bias, eps, kind, config.qk_norm)
        self.cross = cross
        if cross:
            self.norm_cross = LayerNorm(dim, eps)
            self.cross_attn = CrossAttention(dim, head_dim, bias, eps, kind)
        self.mlp = MLP(dim, mlp_width(dim, ffn_multiplier, config.ffn_multiple_of), bias)
        self.adaLN_modulation = AdaLN(config.dim, 6 * dim, "silu")

    def norms(self) -> tuple[LayerNorm | None, LayerNorm]:
        """Before cross-attention and before the feed-forward."""
        return (self.norm_cross if self.cross else None), self.norm2


class MaskDiT(DiffusionTransformer):
    """The network of MaskDiT; with ``decoder.depth`` 0 that of DiT. Classes, captions or no condition."""

    time_features = 256
    activation: Activation = "silu"
    output_gain = False

    def block(
        self, dim: int, head_dim: int, qkv: float, ffn: float, expert: bool, cross: bool
    ) -> TransformerBlock:
        """See :meth:`DiffusionTransformer.block`."""
        assert not expert, "the configuration has refused experts"
        return DiTBlock(self.config, dim, head_dim, qkv, ffn, cross)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw every parameter anew as the released code does (specification, section 2.1).

        Linear maps Xavier-uniform with zero biases; time, class table and mask token normal with std 0.02;
        all modulations, the output and the way into the decoder zero. Cross-attention ends in zeros, so that
        captions are let in gradually.

        Args:
            generator: where the numbers come from.
        """
        self._initialize_linears(generator)
        patch = self.x_embedder.proj
        assert patch.bias is not None
        nn.init.zeros_(patch.bias)
        small: list[nn.Linear] = list(self.t_embedder.linears)
        if isinstance(self.y_embedder, CaptionEmbedder):
            pooled, projection = self.pooled_y_emb_process, self.y_embedder.y_proj
            small += [pooled.fc1, pooled.fc2, projection.fc1, projection.fc2]
            nn.init.zeros_(self.y_emb_preprocess.attn.proj.weight)
            nn.init.zeros_(self.y_emb_preprocess.mlp.w3.weight)
        for linear in small:
            nn.init.normal_(linear.weight, std=0.02, generator=generator)
        for module in self.modules():
            if isinstance(module, DiTBlock):
                nn.init.zeros_(module.adaLN_modulation.linears[0].weight)
                if module.cross:
                    nn.init.zeros_(module.cross_attn.proj.weight)
        self._initialize_rest(generator)
