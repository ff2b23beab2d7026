"""MicroDiT: a diffusion transformer with a patch mixer, mixture of experts and layer-wise scaling.

Source: Stretching Each Dollar, arXiv 2407.15811. Where paper and released code differ, the released code is
followed.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from shoestring.config import TransformerConfig
from shoestring.models.layers import (
    AdaLN,
    CrossAttention,
    LayerNorm,
    SelfAttention,
    SwiGLU,
    TransformerBlock,
    attention_width,
    mlp_width,
    swiglu_width,
)
from shoestring.models.moe import ExpertChoice
from shoestring.models.transformer import CaptionEmbedder, DiffusionTransformer


class Block(TransformerBlock):
    """Self-attention and feed-forward, modulated and gated by the condition; between them cross-attention.

    Args:
        config: the network.
        dim: width of the block.
        head_dim: of one head.
        qkv_multiplier: self-attention width as a share of ``dim``.
        ffn_multiplier: feed-forward width as a multiple of ``dim``.
        expert: experts in place of the feed-forward.
        cross: whether it attends to a caption.
    """

    def __init__(
        self,
        config: TransformerConfig,
        dim: int,
        head_dim: int,
        qkv_multiplier: float,
        ffn_multiplier: float,
        expert: bool,
        cross: bool,
    ) -> None:
        super().__init__()
        bias, eps, kind = config.bias, config.norm_eps, config.attention
        self.norm1, self.norm3 = LayerNorm(dim, eps), LayerNorm(dim, eps)
        width = attention_width(dim, qkv_multiplier, head_dim)
        self.attn = SelfAttention(dim, width, head_dim, bias, eps, kind, config.qk_norm)
        self.cross = cross
        if cross:
            self.norm2 = LayerNorm(dim, eps)
            self.cross_attn = CrossAttention(dim, head_dim, bias, eps, kind)
        self.mlp: nn.Module
        if expert:
            hidden = mlp_width(dim, ffn_multiplier, config.ffn_multiple_of)
            self.mlp = ExpertChoice(dim, hidden, config.experts.count, config.experts.capacity)
        else:
            self.mlp = SwiGLU(dim, swiglu_width(dim, ffn_multiplier, config.ffn_multiple_of), bias)
        self.adaLN_modulation = AdaLN(config.dim, 6 * dim)

    def norms(self) -> tuple[LayerNorm | None, LayerNorm]:
        """Before cross-attention and before the feed-forward."""
        return (self.norm2 if self.cross else None), self.norm3


class MicroDiT(DiffusionTransformer):
    """The network of MicroDiT, with captions, classes or no condition."""

    def block(
        self, dim: int, head_dim: int, qkv: float, ffn: float, expert: bool, cross: bool
    ) -> TransformerBlock:
        """See :meth:`DiffusionTransformer.block`."""
        return Block(self.config, dim, head_dim, qkv, ffn, expert, cross)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw every parameter anew as the released code does (specification, section 1.6).

        Gates and output start at zero, so the network starts as zero output; cross-attention is not gated.

        Args:
            generator: where the numbers come from.
        """
        self._initialize_linears(generator)
        patch = self.x_embedder.proj
        bound = 1 / math.sqrt(patch.weight[0].numel())
        assert patch.bias is not None
        nn.init.uniform_(patch.bias, -bound, bound, generator=generator)
        small: list[nn.Linear] = list(self.t_embedder.linears)
        if isinstance(self.y_embedder, CaptionEmbedder):
            pooled, projection = self.pooled_y_emb_process, self.y_embedder.y_proj
            small += [pooled.fc1, pooled.fc2, projection.fc1, projection.fc2]
        for linear in small:
            nn.init.normal_(linear.weight, std=0.02, generator=generator)
        for i, block in enumerate(self.blocks):
            _initialize_block(block, 0.02 / math.sqrt(2 * (i + 1)), generator)
        for block in [*self.patch_mixer, *self.decoder_blocks]:
            _initialize_block(block, 0.02 / math.sqrt(2 * self.config.depth), generator)
        if isinstance(self.y_embedder, CaptionEmbedder):
            _initialize_block(self.y_emb_preprocess, 0.02, generator)
            nn.init.zeros_(self.y_emb_preprocess.attn.proj.weight)
            nn.init.zeros_(self.y_emb_preprocess.mlp.w3.weight)
        self._initialize_rest(generator)


def _initialize_block(block: nn.Module, output_std: float, generator: torch.Generator) -> None:
    inputs = {"qkv", "q_linear", "kv_linear", "w1", "gate"}
    for name, module in block.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, ExpertChoice):
            nn.init.trunc_normal_(module.w1, std=0.02, generator=generator)
            nn.init.trunc_normal_(module.w2, std=output_std, generator=generator)
        elif isinstance(module, AdaLN):
            nn.init.zeros_(module.linears[0].weight)
        elif isinstance(module, nn.Linear) and "adaLN" not in name:
            std = 0.02 if leaf in inputs else output_std
            nn.init.trunc_normal_(module.weight, std=std, generator=generator)
