"""MicroDiT: a diffusion transformer with a patch mixer, mixture of experts and layer-wise scaling.

Source: Stretching Each Dollar, arXiv 2407.15811. Where paper and released code differ, the released code is
followed. The network is deterministic: the mask comes in as the indices of visible patches, and with
``mixer.depth`` 0 the very same code is naive masking.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shoestring.config.schema import ModelConfig
from shoestring.interfaces import Conditioning
from shoestring.models.layers import (
    AdaLN,
    CaptionBlock,
    CaptionMLP,
    CrossAttention,
    LayerNorm,
    NormLinear,
    PatchEmbedding,
    SelfAttention,
    SwiGLU,
    TimeEmbedding,
    modulate,
    sincos_positions,
)
from shoestring.models.moe import ExpertChoice
from shoestring.tensors import Float, Int, gather_tokens, masked_mean

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PreparedCaption:
    """Everything the network computes of a caption that does not depend on the noise."""

    pooled_BD: Tensor
    mask_BS: Tensor | None
    mixer: tuple[KeysValues, ...]
    blocks: tuple[KeysValues, ...]


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


def attention_width(dim: int, multiplier: float, head_dim: int) -> int:
    """Self-attention width: dim at multiplier 1, else int(dim m) rounded up to an even number of heads."""
    return dim if multiplier == 1 else _round_up(int(dim * multiplier), 2 * head_dim)


def swiglu_width(dim: int, multiplier: float, multiple_of: int) -> int:
    """Hidden width of a dense feed-forward: two thirds of int(dim m), rounded up."""
    return _round_up(int(2 * int(dim * multiplier) / 3), multiple_of)


def expert_width(dim: int, multiplier: float, multiple_of: int) -> int:
    """Hidden width of an expert: int(dim m), rounded up (two matrices only, hence no two thirds)."""
    return _round_up(int(dim * multiplier), multiple_of)


def has_experts(config: ModelConfig, index: int, mixer: bool = False) -> bool:
    """Whether a block has experts: every n-th, but never the backbone's last nor the mixer's first."""
    allowed = index >= 1 if mixer else index < config.depth - 1
    return config.experts.count > 0 and (index + 1) % config.experts.every == 0 and allowed


class Block(nn.Module):
    """Self-attention and feed-forward, modulated and gated by the condition; between them cross-attention."""

    def __init__(
        self, config: ModelConfig, dim: int, qkv_multiplier: float, ffn_multiplier: float, expert: bool
    ) -> None:
        super().__init__()
        bias, eps, kind = config.bias, config.norm_eps, config.attention
        self.norm1, self.norm2, self.norm3 = (LayerNorm(dim, eps) for _ in range(3))
        width = attention_width(dim, qkv_multiplier, config.head_dim)
        self.attn = SelfAttention(dim, width, config.head_dim, bias, eps, kind)
        self.cross_attn = CrossAttention(dim, config.head_dim, bias, eps, kind)
        self.mlp: nn.Module
        if expert:
            hidden = expert_width(dim, ffn_multiplier, config.ffn_multiple_of)
            self.mlp = ExpertChoice(dim, hidden, config.experts.count, config.experts.capacity)
        else:
            self.mlp = SwiGLU(dim, swiglu_width(dim, ffn_multiplier, config.ffn_multiple_of), bias)
        self.adaLN_modulation = AdaLN(config.dim, 6 * dim)

    def forward(
        self, x_BLD: Tensor, c_BD: Tensor, caption: Tensor | KeysValues, mask_BS: Tensor | None
    ) -> Tensor:
        """One block; ``caption`` is caption tokens, or keys and values prepared from them."""
        keys_values = self.cross_attn.keys_values(caption) if isinstance(caption, Tensor) else caption
        shift1, scale1, gate1, shift3, scale3, gate3 = self.adaLN_modulation(c_BD).chunk(6, dim=-1)
        x_BLD = x_BLD + gate1[:, None] * self.attn(modulate(self.norm1(x_BLD), shift1, scale1))
        x_BLD = x_BLD + self.cross_attn(self.norm2(x_BLD), keys_values, mask_BS)
        return x_BLD + gate3[:, None] * self.mlp(modulate(self.norm3(x_BLD), shift3, scale3))


class FinalLayer(nn.Module):
    """Modulated norm and the linear map back to patch values."""

    def __init__(self, dim: int, outputs: int, eps: float) -> None:
        super().__init__()
        self.norm_final = LayerNorm(dim, eps)
        self.linear = nn.Linear(dim, outputs)
        self.adaLN_modulation = AdaLN(dim, 2 * dim)

    def forward(self, x_BKD: Tensor, c_BD: Tensor) -> Tensor:
        """Tokens to patch values."""
        shift, scale = self.adaLN_modulation(c_BD).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x_BKD), shift, scale))


class CaptionEmbedder(nn.Module):
    """Caption width to model width (its own module for the released name ``y_embedder.y_proj``)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.y_proj = CaptionMLP(config.caption_dim, config.dim, config.norm_eps)

    def forward(self, y_BSD: Tensor) -> Tensor:
        """Map the caption tokens."""
        return self.y_proj(y_BSD)


class MicroDiT(nn.Module):
    """The network of MicroDiT; see :class:`shoestring.interfaces.Network` for the seam.

    Args:
        config: all widths, depths and switches.
    """

    pos_embed: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_size, self.in_channels = config.patch_size, config.in_channels
        self.caption_dim = config.caption_dim
        self.position_scale = 1.0
        dim, eps = config.dim, config.norm_eps
        self.x_embedder = PatchEmbedding(config.in_channels, dim, config.patch_size)
        self.t_embedder = TimeEmbedding(dim)
        self.y_embedder = CaptionEmbedder(config)
        hidden = swiglu_width(dim, 4.0, config.ffn_multiple_of)
        self.y_emb_preprocess = CaptionBlock(dim, config.head_dim, hidden, config.bias, eps, config.attention)
        self.pooled_y_emb_process = CaptionMLP(dim, dim, eps)
        self.blocks = nn.ModuleList(self._backbone())
        self.patch_mixer = nn.ModuleList(self._mixer())
        self.patch_mixer_map_xin: nn.Module = nn.Identity()
        self.patch_mixer_map_xout: nn.Module = nn.Identity()
        self.patch_mixer_map_y: nn.Module = nn.Identity()
        if config.mixer.depth and config.mixer.dim != dim:
            self.patch_mixer_map_xin = NormLinear(dim, config.mixer.dim, config.bias, eps)
            self.patch_mixer_map_xout = NormLinear(config.mixer.dim, dim, config.bias, eps)
            self.patch_mixer_map_y = NormLinear(dim, config.mixer.dim, config.bias, eps)
        self.final_layer = FinalLayer(dim, config.in_channels * config.patch_size**2, eps)
        self.register_buffer("pos_embed", None)
        self._tables: dict[tuple[Any, ...], Tensor] = {}

    def _backbone(self) -> Iterator[Block]:
        config = self.config
        qkv, ffn = config.per_block("qkv_multipliers"), config.per_block("ffn_multipliers")
        for i in range(config.depth):
            yield Block(config, config.dim, qkv[i], ffn[i], has_experts(config, i))

    def _mixer(self) -> Iterator[Block]:
        config, mixer = self.config, self.config.mixer
        for i in range(mixer.depth):
            expert = has_experts(config, i, mixer=True)
            yield Block(config, mixer.dim, mixer.qkv_multiplier, mixer.ffn_multiplier, expert)

    def positions(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        """Position table ``L D`` for a grid: that of a loaded file if it fits, else computed and kept."""
        if self.pos_embed is not None and self.pos_embed.shape[1] == grid[0] * grid[1] and grid[0] == grid[1]:
            return self.pos_embed[0].to(like)
        key = (grid, self.position_scale, like.device, like.dtype)
        if key not in self._tables:
            table_LD = sincos_positions(self.config.dim, grid, self.position_scale)
            self._tables[key] = table_LD.to(like)
        return self._tables[key]

    def _caption(self, conditioning: Conditioning) -> tuple[Tensor, Tensor, Tensor | None]:
        mask_BS = conditioning.text_mask_BS if self.config.mask_captions else None
        y_BSD = self.y_emb_preprocess(self.y_embedder(conditioning.text_BSD), mask_BS)
        return y_BSD, self.pooled_y_emb_process(masked_mean(y_BSD, mask_BS)), mask_BS

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """Compute the caption path and every block's keys and values once (for a whole sampling run)."""
        y_BSD, pooled_BD, mask_BS = self._caption(conditioning)
        y_mixer_BSM = self.patch_mixer_map_y(y_BSD)
        prepared = PreparedCaption(
            pooled_BD,
            mask_BS,
            tuple(_typed(block).cross_attn.keys_values(y_mixer_BSM) for block in self.patch_mixer),
            tuple(_typed(block).cross_attn.keys_values(y_BSD) for block in self.blocks),
        )
        return replace(conditioning, prepared=prepared)

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        time_B: Float[Tensor, " B"],
        conditioning: Conditioning,
        visible_BK: Int[Tensor, "B K"] | None = None,
    ) -> Float[Tensor, "B K G"]:
        """Raw output for the visible patches.

        Args:
            x: preconditioned latents; H and W are multiples of the patch size, otherwise free.
            time_B: noise coordinate, ln(sigma) / 4 for EDM.
            conditioning: captions, raw or from :meth:`prepare`.
            visible_BK: indices of the patches that the backbone sees; ``None`` = all.

        Returns:
            Patch values (row, column, channel; channel fastest) in the order of ``visible_BK``.
        """
        grid = (x.shape[2] // self.patch_size, x.shape[3] // self.patch_size)
        x_BLD = self.x_embedder(x)
        x_BLD = x_BLD + self.positions(grid, x_BLD)
        prepared: PreparedCaption | None = conditioning.prepared
        if prepared is None:
            y_BSD, pooled_BD, mask_BS = self._caption(conditioning)
            captions_mixer: Any = [self.patch_mixer_map_y(y_BSD)] * len(self.patch_mixer)
            captions_blocks: Any = [y_BSD] * len(self.blocks)
        else:
            pooled_BD, mask_BS = prepared.pooled_BD, prepared.mask_BS
            captions_mixer, captions_blocks = prepared.mixer, prepared.blocks
        c_BD = self.t_embedder(time_B) + pooled_BD

        x_BLD = self.patch_mixer_map_xin(x_BLD)
        for block, caption in zip(self.patch_mixer, captions_mixer, strict=True):
            x_BLD = self._run(block, x_BLD, c_BD, caption, mask_BS)
        if visible_BK is not None:
            x_BLD = gather_tokens(x_BLD, visible_BK)
        x_BKD = self.patch_mixer_map_xout(x_BLD)
        for block, caption in zip(self.blocks, captions_blocks, strict=True):
            x_BKD = self._run(block, x_BKD, c_BD, caption, mask_BS)
        return self.final_layer(x_BKD, c_BD)

    def _run(self, block: nn.Module, *inputs: Any) -> Tensor:
        if self.config.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw every parameter anew as the released code does (specification, section 1.6).

        Gates and output start at zero, so the network starts as zero output; cross-attention is not gated.

        Args:
            generator: where the numbers come from.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, LayerNorm):
                nn.init.ones_(module.weight)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.view(patch.weight.shape[0], -1), generator=generator)
        bound = 1 / math.sqrt(patch.weight[0].numel())
        assert patch.bias is not None
        nn.init.uniform_(patch.bias, -bound, bound, generator=generator)
        for linear in (
            *self.t_embedder.linears,
            self.pooled_y_emb_process.fc1,
            self.pooled_y_emb_process.fc2,
            self.y_embedder.y_proj.fc1,
            self.y_embedder.y_proj.fc2,
        ):
            nn.init.normal_(linear.weight, std=0.02, generator=generator)
        for i, block in enumerate(self.blocks):
            _initialize_block(block, 0.02 / math.sqrt(2 * (i + 1)), generator)
        for block in self.patch_mixer:
            _initialize_block(block, 0.02 / math.sqrt(2 * self.config.depth), generator)
        _initialize_block(self.y_emb_preprocess, 0.02, generator)
        nn.init.zeros_(self.y_emb_preprocess.attn.proj.weight)
        nn.init.zeros_(self.y_emb_preprocess.mlp.w3.weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation.linears[0].weight)


def _typed(block: nn.Module) -> Block:
    """ModuleList forgets the type of its members."""
    assert isinstance(block, Block)
    return block


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


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Parameters in all, and active per token (of expert weights the share capacity / experts)."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0.0
    for module in model.modules():
        if isinstance(module, ExpertChoice):
            weights = module.w1.numel() + module.w2.numel()
            idle += weights * (1 - min(1.0, module.capacity / module.w1.shape[0]))
    return total, total - round(idle)
