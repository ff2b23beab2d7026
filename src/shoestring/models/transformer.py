"""What all our diffusion transformers share: embedding, condition, mixer, backbone, decoder, output.

A family (``microdit.py``, ``maskdit.py``) brings its blocks and its initialisation, a token method
(``routing.py``) the order in which the layers see the patches. Networks are deterministic: the mask comes in
as the indices of visible patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shoestring.config import TokensConfig, TransformerConfig
from shoestring.interfaces import Conditioning, NetworkOutput
from shoestring.models.attention import Choices
from shoestring.models.guidance import GuidanceEmbedding
from shoestring.models.layers import (
    Activation,
    CaptionBlock,
    CaptionMLP,
    ClassEmbedding,
    CrossAttention,
    LayerNorm,
    ModulatedLinear,
    NormLinear,
    PatchEmbedding,
    SelfAttention,
    TimeEmbedding,
    TransformerBlock,
    sincos_positions,
    swiglu_width,
)
from shoestring.models.moe import ExpertChoice
from shoestring.models.network import BaseNetwork
from shoestring.models.routing import build_method
from shoestring.models.width import Widths
from shoestring.tensors import Bool, Float, Int, complement, gather_tokens, masked_mean, scatter_tokens


@dataclass(frozen=True)
class Prepared:
    """Everything the network computes of a condition that does not depend on the noise."""

    pooled_BD: Tensor | None
    mask_BS: Tensor | None
    mixer: tuple[Any, ...]
    """Caption keys and values of each block of the mixer, or ``None``."""
    blocks: tuple[Any, ...]


@dataclass(frozen=True)
class Pass:
    """The layers of one forward pass, with the condition in them: see :class:`token_method.Layers`."""

    network: DiffusionTransformer
    grid: tuple[int, int]
    c_BD: Tensor
    prepared: Prepared

    @property
    def depth(self) -> int:
        """Blocks of the backbone."""
        return len(self.network.blocks)

    def mixer(self, x_BLD: Tensor, visible_BK: Tensor | None = None) -> Tensor:
        """Into the mixer's width, mixer, drop, back to the backbone's width."""
        network = self.network
        x = network.patch_mixer_map_xin(x_BLD)
        for block, caption in zip(network.patch_mixer, self.prepared.mixer, strict=True):
            x = self._run(block, x, caption)
        if visible_BK is not None:
            x = gather_tokens(x, visible_BK)
        return network.patch_mixer_map_xout(x)

    def backbone(self, x_BKD: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """Some blocks of the backbone."""
        part = slice(first, last)
        for block, caption in zip(self.network.blocks[part], self.prepared.blocks[part], strict=True):
            x_BKD = self._run(block, x_BKD, caption)
        return x_BKD

    def decoder(self, x_BKD: Tensor, visible_BK: Tensor | None) -> Tensor:
        """Into the decoder's width, mask tokens at the other places, positions, blocks."""
        network = self.network
        x = network.decoder_layer(x_BKD, self.c_BD)
        length = self.grid[0] * self.grid[1]
        if visible_BK is not None:
            seen_BL = torch.zeros(len(x), length, device=x.device, dtype=torch.bool)
            seen_BL = seen_BL.scatter(1, visible_BK, True)
            absent = network.mask_token.to(x.dtype)
            x = torch.where(seen_BL[:, :, None], scatter_tokens(x, visible_BK, length), absent)
        x = x + network.positions(self.grid, x, "decoder_pos_embed")
        for block in network.decoder_blocks:
            x = self._run(block, x, None)
        return x

    def _run(self, block: nn.Module, x: Tensor, caption: Any) -> Tensor:
        inputs = (x, self.c_BD, caption, self.prepared.mask_BS)
        if self.network.config.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)


def has_experts(config: TransformerConfig, index: int, mixer: bool = False) -> bool:
    """Whether a block has experts: every n-th, but never the backbone's last nor the mixer's first."""
    allowed = index >= 1 if mixer else index < config.depth - 1
    return config.experts.count > 0 and (index + 1) % config.experts.every == 0 and allowed


class CaptionEmbedder(nn.Module):
    """Caption width to model width (its own module for the released name ``y_embedder.y_proj``)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.y_proj = CaptionMLP(config.caption_dim, config.dim, config.norm_eps)

    def forward(self, y_BSD: Tensor) -> Tensor:
        """Map the caption tokens."""
        return self.y_proj(y_BSD)


class DiffusionTransformer(BaseNetwork):
    """Base of the families; see :class:`shoestring.interfaces.Network` for the seam.

    Args:
        config: all widths, depths and switches.
        tokens: the token method.

    Raises:
        UserError: if the two do not fit together.
    """

    config: TransformerConfig

    # What differs between families beside the blocks.
    time_features = 512
    activation: Activation = "gelu"
    output_gain = True
    """Whether the norm before the output has a gain."""

    def __init__(self, config: TransformerConfig, tokens: TokensConfig | None = None) -> None:
        super().__init__(config, tokens)
        dim, eps, activation = config.dim, config.norm_eps, self.activation
        self.x_embedder = PatchEmbedding(config.in_channels, dim, config.patch_size)
        if config.image_channels:
            self.image_embedder = PatchEmbedding(config.image_channels, dim, config.patch_size)
        self.t_embedder = TimeEmbedding(dim, self.time_features, activation)
        if config.guidance_input:
            self.guidance_embedder = GuidanceEmbedding(dim)
        self.y_embedder: CaptionEmbedder | ClassEmbedding | None = None
        if config.condition == "text":
            self.y_embedder = CaptionEmbedder(config)
            hidden = swiglu_width(dim, 4.0, config.ffn_multiple_of)
            self.y_emb_preprocess = CaptionBlock(
                dim, config.head_dim, hidden, config.bias, eps, config.attention
            )
            self.pooled_y_emb_process = CaptionMLP(dim, dim, eps)
        elif config.condition == "class":
            self.y_embedder = ClassEmbedding(config.classes, dim)
        self.blocks = nn.ModuleList(self._backbone())
        self.patch_mixer = nn.ModuleList(self._mixer())
        self.patch_mixer_map_xin: nn.Module = nn.Identity()
        self.patch_mixer_map_xout: nn.Module = nn.Identity()
        self.patch_mixer_map_y: nn.Module = nn.Identity()
        if config.mixer.depth and config.mixer.dim != dim:
            self.patch_mixer_map_xin = NormLinear(dim, config.mixer.dim, config.bias, eps)
            self.patch_mixer_map_xout = NormLinear(config.mixer.dim, dim, config.bias, eps)
            if config.condition == "text":
                self.patch_mixer_map_y = NormLinear(dim, config.mixer.dim, config.bias, eps)
        last_dim = dim
        self.decoder_blocks = nn.ModuleList()
        if config.decoder.depth:
            last_dim = config.decoder.dim
            self.decoder_layer = ModulatedLinear(dim, dim, last_dim, eps, self.output_gain, activation)
            self.mask_token = nn.Parameter(torch.empty(1, 1, last_dim))
            self.decoder_blocks = nn.ModuleList(self._decoder())
        outputs = config.in_channels * config.patch_size**2
        self.final_layer = ModulatedLinear(last_dim, dim, outputs, eps, self.output_gain, activation)
        self.routing = build_method(config, self.tokens)
        self.predicts_all = self.routing.predicts_all
        self._tables: dict[tuple[Any, ...], Tensor] = {}

    def block(
        self, dim: int, head_dim: int, qkv: float, ffn: float, expert: bool, cross: bool
    ) -> TransformerBlock:
        """A block of the family.

        Args:
            dim: its width.
            head_dim: width of one attention head.
            qkv: self-attention width as a share of ``dim``.
            ffn: feed-forward width as a multiple of ``dim``.
            expert: experts in place of the feed-forward.
            cross: whether it attends to a caption.

        Returns:
            The block, its weights not yet drawn.
        """
        raise NotImplementedError

    def _backbone(self) -> Iterator[TransformerBlock]:
        config, cross = self.config, self.config.condition == "text"
        qkv, ffn = config.per_block("qkv_multipliers"), config.per_block("ffn_multipliers")
        for i in range(config.depth):
            yield self.block(config.dim, config.head_dim, qkv[i], ffn[i], has_experts(config, i), cross)

    def _mixer(self) -> Iterator[TransformerBlock]:
        mixer, head_dim, cross = self.config.mixer, self.config.head_dim, self.config.condition == "text"
        for i in range(mixer.depth):
            expert = has_experts(self.config, i, mixer=True)
            yield self.block(mixer.dim, head_dim, mixer.qkv_multiplier, mixer.ffn_multiplier, expert, cross)

    def _decoder(self) -> Iterator[TransformerBlock]:
        decoder = self.config.decoder
        for _ in range(decoder.depth):
            yield self.block(decoder.dim, decoder.head_dim, 1.0, 4.0, expert=False, cross=False)

    def initialize(self, generator: torch.Generator) -> None:
        """Draw every parameter anew.

        Args:
            generator: where the numbers come from.
        """
        raise NotImplementedError

    def widths(self) -> Widths:
        """The weights beside those of the same network at ``mup_base_dim``."""
        base = self.config.mup_base_dim
        if base is None:
            return Widths({}, {})
        with torch.device("meta"):
            other = type(self)(self.config.at_width(base), self.tokens)
        own, there = ({n: p.shape for n, p in network.named_parameters()} for network in (self, other))
        return Widths(own, there)

    def _initialize_linears(self, generator: torch.Generator) -> None:
        """All linear maps and the patch embedding Xavier-uniform, biases zero, gains one."""
        widths = self.widths()
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                gain = widths.xavier_gain(f"{name}.weight")
                nn.init.xavier_uniform_(module.weight, gain, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, LayerNorm) and module.weight is not None:
                nn.init.ones_(module.weight)
        patch = self.x_embedder.proj
        gain = widths.xavier_gain("x_embedder.proj.weight")
        nn.init.xavier_uniform_(patch.weight.view(patch.weight.shape[0], -1), gain, generator=generator)

    def _initialize_rest(self, generator: torch.Generator) -> None:
        """Class table and mask tokens normal with std 0.02; output, its modulation and the way into the
        decoder zero. Then all weights are scaled for the width. Source: released MicroDiT and MaskDiT.
        """
        if isinstance(self.y_embedder, ClassEmbedding):
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02, generator=generator)
        for name, parameter in self.named_parameters():
            if name.endswith("mask_token"):
                nn.init.normal_(parameter, std=0.02, generator=generator)
        if self.config.image_channels:  # the small picture has no say at first
            nn.init.zeros_(self.image_embedder.proj.weight)
            assert self.image_embedder.proj.bias is not None
            nn.init.zeros_(self.image_embedder.proj.bias)
        if self.config.guidance_input:  # likewise
            nn.init.zeros_(self.guidance_embedder.map.weight)
        zeroed = [self.final_layer]
        if self.config.decoder.depth:
            zeroed.append(self.decoder_layer)
        for layer in zeroed:
            nn.init.zeros_(layer.linear.weight)
            nn.init.zeros_(layer.adaLN_modulation.linears[0].weight)
        widths = self.widths()
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(widths.initial_scale(name))

    def all_blocks(self) -> list[nn.Module]:
        """The blocks of mixer, backbone and decoder, e.g. to compile them."""
        return [*self.patch_mixer, *self.blocks, *self.decoder_blocks]

    def use_attention(self, choices: Choices) -> None:
        """Train with these forms of attention by shape, where ``model.attention`` is ``auto``."""
        for module in self.modules():
            if isinstance(module, SelfAttention | CrossAttention):
                module.choices = dict(choices)

    def positions(self, grid: tuple[int, int], like: Tensor, name: str = "pos_embed") -> Tensor:
        """Position table for a grid: that of a loaded file if it fits, else computed and kept.

        Args:
            grid: rows and columns of patches.
            like: tokens that the table is added to: width, device and dtype.
            name: ``pos_embed`` or ``decoder_pos_embed``.

        Returns:
            One row a patch.
        """
        stored = getattr(self, name)
        if stored is not None and stored.shape[1] == grid[0] * grid[1] and grid[0] == grid[1]:
            return stored[0].to(like)
        key = (grid, self.position_scale, like.shape[-1], like.device, like.dtype)
        if key not in self._tables:
            self._tables[key] = sincos_positions(like.shape[-1], grid, self.position_scale).to(like)
        return self._tables[key]

    def _condition(self, conditioning: Conditioning) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What is added to the time, caption tokens and their mask, as far as there are any."""
        if self.y_embedder is None:
            return None, None, None
        if isinstance(self.y_embedder, ClassEmbedding):
            assert conditioning.class_B is not None, "a class-conditional network needs classes"
            return self.y_embedder(conditioning.class_B), None, None
        assert conditioning.text_BSD is not None, "a text-conditional network needs captions"
        mask_BS = conditioning.text_mask_BS if self.config.mask_captions else None
        y_BSD = self.y_emb_preprocess(self.y_embedder(conditioning.text_BSD), mask_BS)
        return self.pooled_y_emb_process(masked_mean(y_BSD, mask_BS)), y_BSD, mask_BS

    def _prepared(self, conditioning: Conditioning, keys_values: bool) -> Prepared:
        """The condition, with each block's keys and values or the caption tokens they come from."""
        pooled_BD, y_BSD, mask_BS = self._condition(conditioning)
        if y_BSD is None:
            mixer: tuple[Any, ...] = (None,) * len(self.patch_mixer)
            return Prepared(pooled_BD, None, mixer, (None,) * len(self.blocks))
        y_mixer = self.patch_mixer_map_y(y_BSD) if len(self.patch_mixer) else y_BSD

        def given(block: nn.Module, y: Tensor) -> Any:
            return block.cross_attn.keys_values(y) if keys_values else y  # type: ignore[union-attr, operator]

        return Prepared(
            pooled_BD,
            mask_BS,
            tuple(given(block, y_mixer) for block in self.patch_mixer),
            tuple(given(block, y_BSD) for block in self.blocks),
        )

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """Compute the condition and every block's keys and values once (for a whole sampling run)."""
        return replace(conditioning, prepared=self._prepared(conditioning, keys_values=True))

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        time_B: Float[Tensor, " B"],
        conditioning: Conditioning,
        visible_BK: Int[Tensor, "B K"] | None = None,
        path_dropped_B: Bool[Tensor, " B"] | None = None,
    ) -> NetworkOutput:
        """Raw output.

        Args:
            x: preconditioned latents; H and W are multiples of the patch size, otherwise free.
            time_B: noise coordinate, ln(sigma) / 4 for EDM.
            conditioning: captions or classes, raw or from :meth:`prepare`.
            visible_BK: indices of the patches that the reduced part sees; ``None`` = all.
            path_dropped_B: samples for which that part is left out (SPRINT).

        Returns:
            Patch values (row, column, channel; channel fastest) with their places.
        """
        grid = (x.shape[2] // self.patch_size, x.shape[3] // self.patch_size)
        x_BLD = self.x_embedder(x)
        if self.config.image_channels:
            assert conditioning.image is not None, "a super-resolution network needs small pictures"
            x_BLD = x_BLD + self.image_embedder(conditioning.image)
        x_BLD = x_BLD + self.positions(grid, x_BLD)
        prepared: Prepared | None = conditioning.prepared
        if prepared is None:
            prepared = self._prepared(conditioning, keys_values=False)
        c_BD = self.t_embedder(time_B)
        if prepared.pooled_BD is not None:
            c_BD = c_BD + prepared.pooled_BD
        if self.config.guidance_input:
            c_BD = c_BD + self.guidance_embedder(conditioning.guidance_B)
        layers = Pass(self, grid, c_BD, prepared)
        tokens, places = self.routing(layers, x_BLD, visible_BK, path_dropped_B)
        output = self.final_layer(tokens, c_BD)
        if visible_BK is None or not self.routing.reconstructs:
            return NetworkOutput(output, places)
        dropped_BJ = complement(visible_BK, grid[0] * grid[1])
        return NetworkOutput(
            gather_tokens(output, visible_BK), visible_BK, gather_tokens(output, dropped_BJ), dropped_BJ
        )


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Parameters in all, and active per token (of expert weights the share capacity / experts)."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0.0
    for module in model.modules():
        if isinstance(module, ExpertChoice):
            weights = module.w1.numel() + module.w2.numel()
            idle += weights * (1 - min(1.0, module.capacity / module.w1.shape[0]))
    return total, total - round(idle)
