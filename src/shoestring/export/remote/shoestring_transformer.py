"""A diffusion transformer trained by shoestring (MicroDiT or MaskDiT), for inference with diffusers alone.

All patches are seen: what was left out while training is a matter of training. The network is raw: what its
output means is known to the scheduler. Tensor names end in their shape letters: B batch, L patches, S caption
tokens, D width, N heads, P width of a head, E experts, R tokens of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

GUIDANCE_FEATURES = 64
BlockSizes = Sequence[Any]
"""Width of self-attention, hidden width of the feed-forward, and whether it has experts."""


def activation_of(kind: str) -> nn.Module:
    """What stands before the modulations and in the time embedding."""
    return nn.SiLU() if kind == "maskdit" else nn.GELU(approximate="tanh")


class LayerNorm(nn.Module):
    """Layer norm with a gain, or without one, and no bias."""

    weight: Tensor | None

    def __init__(self, dim: int, eps: float, gain: bool = True) -> None:
        super().__init__()
        self.register_parameter("weight", nn.Parameter(torch.ones(dim)) if gain else None)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.layer_norm(x, (x.shape[-1],), weight, None, self.eps)


def modulate(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """x (1 + scale) + shift, the same for all tokens."""
    return x_BLD * (1 + scale_BD[:, None]) + shift_BD[:, None]


def whole_norm(x: Tensor, eps: float) -> Tensor:
    """Normalise queries or keys over all heads together, without a gain."""
    return F.layer_norm(x, (x.shape[-1],), eps=eps)


def attend(q_BLD: Tensor, k_BSD: Tensor, v_BSD: Tensor, head_dim: int, mask_BS: Tensor | None) -> Tensor:
    """Scaled dot-product attention in heads, to keys where the mask is true."""

    def heads(x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (-1, head_dim)).transpose(1, 2)

    mask = None if mask_BS is None else mask_BS[:, None, None, :]
    out_BNLP = F.scaled_dot_product_attention(heads(q_BLD), heads(k_BSD), heads(v_BSD), attn_mask=mask)
    return out_BNLP.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Self-attention of any width."""

    def __init__(self, dim: int, width: int, head_dim: int, bias: bool, eps: float, qk_norm: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * width, bias=bias)
        self.proj = nn.Linear(width, dim, bias=bias)
        self.head_dim, self.eps, self.qk_norm = head_dim, eps, qk_norm

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Attend over the tokens where the mask is true (all without one)."""
        q, k, v = self.qkv(x_BLD).chunk(3, dim=-1)
        if self.qk_norm:
            q, k = whole_norm(q, self.eps), whole_norm(k, self.eps)
        return self.proj(attend(q, k, v, self.head_dim, mask_BL))


class CrossAttention(nn.Module):
    """Attention from image tokens to caption tokens."""

    def __init__(self, dim: int, head_dim: int, bias: bool, eps: float) -> None:
        super().__init__()
        self.q_linear = nn.Linear(dim, dim, bias=bias)
        self.kv_linear = nn.Linear(dim, 2 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=bias)
        self.head_dim, self.eps = head_dim, eps

    def forward(self, x_BLD: Tensor, y_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
        """Attend from the image to the caption."""
        k, v = self.kv_linear(y_BSD).chunk(2, dim=-1)
        q, k = whole_norm(self.q_linear(x_BLD), self.eps), whole_norm(k, self.eps)
        return self.proj(attend(q, k, v, self.head_dim, mask_BS))


class SwiGLU(nn.Module):
    """w3( silu(w1 x) * w2 x )."""

    def __init__(self, dim: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=bias)
        self.w2 = nn.Linear(dim, hidden, bias=bias)
        self.w3 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Feed-forward over the last dimension."""
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class MLP(nn.Module):
    """fc2( GELU-tanh( fc1 x ) )."""

    def __init__(self, dim: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Feed-forward over the last dimension."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class ExpertChoice(nn.Module):
    """Experts that choose tokens within each image (arXiv 2202.09368); the router is never below float32."""

    def __init__(self, dim: int, hidden: int, experts: int, capacity: float) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(experts, dim, hidden))
        self.w2 = nn.Parameter(torch.zeros(experts, hidden, dim))
        self.gate = nn.Linear(dim, experts, bias=False)
        self.capacity = capacity

    def tokens_per_expert(self, tokens: int) -> int:
        """int(capacity * tokens / experts), at least 1 and at most all of them."""
        experts = self.w1.shape[0]
        if isinstance(tokens, int):
            return max(1, min(tokens, int(self.capacity * tokens / experts)))
        # A symbol, while exporting: then pictures are large enough for a token an expert.
        share = min(Fraction(self.capacity).limit_denominator(10_000) / experts, Fraction(1))
        return tokens * share.numerator // share.denominator

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Each expert maps its tokens; a token gets the sum, weighted by the scores."""
        b, length, _ = x_BLD.shape
        with torch.autocast(x_BLD.device.type, enabled=False):
            logits_BLE = F.linear(x_BLD.float(), self.gate.weight.float())
            score_BEL = logits_BLE.softmax(dim=-1).transpose(1, 2)
        weight_BER, choice_BER = score_BEL.topk(self.tokens_per_expert(length), dim=-1, sorted=False)
        e, r = choice_BER.shape[1:]
        # Rows of all images under one another, ordered (expert, image, rank).
        first = torch.arange(b, device=x_BLD.device)[:, None].expand(-1, r).flatten() * length
        rows = (choice_BER.transpose(0, 1).flatten(1) + first).flatten()
        picked = x_BLD.flatten(0, 1).index_select(0, rows).unflatten(0, (e, -1))
        hidden = F.gelu(torch.bmm(picked, self.w1.to(picked.dtype)))
        out = torch.bmm(hidden, self.w2.to(hidden.dtype))
        out = out * weight_BER.transpose(0, 1).flatten(1)[:, :, None].to(out.dtype)
        zeros = torch.zeros_like(x_BLD, dtype=out.dtype).flatten(0, 1)
        return zeros.index_add(0, rows, out.flatten(0, 1)).view_as(x_BLD)


class Block(nn.Module):
    """Self-attention and feed-forward, modulated and gated; between them, with captions, cross-attention."""

    def __init__(
        self, config: Any, dim: int, head_dim: int, sizes: BlockSizes, cross: bool, qk_norm: bool
    ) -> None:
        super().__init__()
        width, hidden, has_experts = sizes
        bias, eps, micro = config.bias, config.norm_eps, config.kind == "microdit"
        self.norm1 = LayerNorm(dim, eps, gain=micro)
        self.attn = SelfAttention(dim, width, head_dim, bias, eps, qk_norm)
        self.before_cross, self.before_mlp = ("norm2", "norm3") if micro else ("norm_cross", "norm2")
        self.add_module(self.before_mlp, LayerNorm(dim, eps, gain=micro))
        self.cross = cross
        if cross:
            self.add_module(self.before_cross, LayerNorm(dim, eps))
            self.cross_attn = CrossAttention(dim, head_dim, bias, eps)
        if has_experts:
            self.mlp: nn.Module = ExpertChoice(dim, hidden, config.experts, config.expert_capacity)
        else:
            self.mlp = (SwiGLU if micro else MLP)(dim, hidden, bias)
        self.adaLN_modulation = nn.Sequential(activation_of(config.kind), nn.Linear(config.dim, 6 * dim))

    def forward(self, x_BLD: Tensor, c_BD: Tensor, y_BSD: Tensor | None, mask_BS: Tensor | None) -> Tensor:
        """One block."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c_BD).chunk(6, dim=-1)
        x_BLD = x_BLD + gate1[:, None] * self.attn(modulate(self.norm1(x_BLD), shift1, scale1))
        if self.cross:
            x_BLD = x_BLD + self.cross_attn(getattr(self, self.before_cross)(x_BLD), y_BSD, mask_BS)
        hidden_BLD = modulate(getattr(self, self.before_mlp)(x_BLD), shift2, scale2)
        return x_BLD + gate2[:, None] * self.mlp(hidden_BLD)


class ModulatedLinear(nn.Module):
    """Modulated norm and a linear map: out of the network, and into MaskDiT's decoder."""

    def __init__(self, config: Any, dim: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = LayerNorm(dim, config.norm_eps, gain=config.kind == "microdit")
        self.linear = nn.Linear(dim, outputs)
        self.adaLN_modulation = nn.Sequential(activation_of(config.kind), nn.Linear(config.dim, 2 * dim))

    def forward(self, x_BLD: Tensor, c_BD: Tensor) -> Tensor:
        """Map the last dimension."""
        shift, scale = self.adaLN_modulation(c_BD).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x_BLD), shift, scale))


class TimeEmbedding(nn.Module):
    """Sinusoidal features of the noise coordinate, cosines first, then two linear maps."""

    def __init__(self, kind: str, dim: int) -> None:
        super().__init__()
        self.features = 256 if kind == "maskdit" else 512
        first = nn.Linear(self.features, dim)
        self.mlp = nn.Sequential(first, activation_of(kind), nn.Linear(dim, dim))

    def forward(self, time_B: Tensor) -> Tensor:
        """Embed."""
        return self.mlp(sinusoidal(time_B, self.features).to(next(self.mlp.parameters()).dtype))


def sinusoidal(value_B: Tensor, features: int) -> Tensor:
    """Cosines, then sines, of a number times falling frequencies."""
    half = features // 2
    j = torch.arange(half, dtype=torch.float32, device=value_B.device)
    angles = value_B.float()[:, None] * torch.exp(-math.log(10_000) * j / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def guidance_features(guidance_B: Tensor) -> Tensor:
    """What distilled networks see of the scale of guidance."""
    return sinusoidal(10.0 * guidance_B, GUIDANCE_FEATURES)


class CaptionMLP(nn.Module):
    """fc2( LayerNorm( GELU-tanh( fc1 ) ) )."""

    def __init__(self, dim_in: int, dim: int, eps: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim_in, dim)
        self.norm = LayerNorm(dim, eps)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, y: Tensor) -> Tensor:
        """Map the last dimension."""
        return self.fc2(self.norm(F.gelu(self.fc1(y), approximate="tanh")))


class CaptionBlock(nn.Module):
    """One pre-norm transformer block over the caption tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, bias, eps = config.dim, config.bias, config.norm_eps
        self.norm1 = LayerNorm(dim, eps)
        self.attn = SelfAttention(dim, dim, config.head_dim, bias, eps, qk_norm=True)
        self.norm2 = LayerNorm(dim, eps)
        self.mlp = SwiGLU(dim, config.caption_hidden, bias)

    def forward(self, y_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
        """Refine the caption tokens."""
        y_BSD = y_BSD + self.attn(self.norm1(y_BSD), mask_BS)
        return y_BSD + self.mlp(self.norm2(y_BSD))


def sincos_positions(dim: int, rows: int, columns: int, scale: float, device: torch.device) -> Tensor:
    """Fixed sine-cosine table of a grid: first the column, then the row; coordinates divided by ``scale``."""
    exact = torch.float32 if torch.compiler.is_exporting() else torch.float64
    quarter = dim // 4
    omega = 10_000 ** -(torch.arange(quarter, dtype=exact, device=device) / quarter)

    def encode(count: int) -> Tensor:
        angles = torch.arange(count, device=device).to(exact)[:, None] / scale * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    of_columns = encode(columns)[None].expand(rows, -1, -1)
    of_rows = encode(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([of_columns, of_rows], dim=2).flatten(0, 1).float()


class ShoestringTransformer(ModelMixin, ConfigMixin):
    """The network: (scaled noisy latents, noise coordinate, condition) to its raw output, as latents.

    Blocks are given by their widths, see ``BlockSizes``. ``fusion`` are the first and last dense blocks of
    SPRINT, whose output a linear map brings together; ``table_side`` is the side of position tables that the
    weights hold, 0 where they are computed.
    """

    @register_to_config
    def __init__(
        self,
        kind: str,
        in_channels: int,
        patch_size: int,
        condition: str,
        dim: int,
        head_dim: int,
        block_sizes: list[BlockSizes],
        caption_dim: int = 1024,
        caption_hidden: int = 0,
        classes: int = 0,
        mixer_dim: int = 0,
        mixer_sizes: list[BlockSizes] = [],  # noqa: B006  (configs of diffusers are JSON; never changed)
        decoder_dim: int = 0,
        decoder_head_dim: int = 0,
        decoder_sizes: list[BlockSizes] = [],  # noqa: B006
        experts: int = 0,
        expert_capacity: float = 0.0,
        bias: bool = False,
        qk_norm: bool = True,
        norm_eps: float = 1e-6,
        mask_captions: bool = False,
        position_scale: float = 1.0,
        table_side: int = 0,
        fusion: list[int] | None = None,
        guidance_input: bool = False,
    ) -> None:
        super().__init__()
        config, cross = self.config, condition == "text"
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(in_channels, dim, patch_size, patch_size)})
        self.t_embedder = TimeEmbedding(kind, dim)
        if guidance_input:
            self.guidance_embedder = nn.ModuleDict({"map": nn.Linear(GUIDANCE_FEATURES, dim, bias=False)})
        if condition == "text":
            self.y_embedder = nn.ModuleDict({"y_proj": CaptionMLP(caption_dim, dim, norm_eps)})
            self.y_emb_preprocess = CaptionBlock(config)
            self.pooled_y_emb_process = CaptionMLP(dim, dim, norm_eps)
        elif condition == "class":
            self.y_embedder = nn.ModuleDict({"embedding_table": nn.Linear(classes, dim, bias=False)})

        def stack(width: int, heads: int, all_sizes: list[BlockSizes], with_text: bool) -> nn.ModuleList:
            return nn.ModuleList(
                Block(config, width, heads, sizes, with_text, qk_norm) for sizes in all_sizes
            )

        def into(width: int, outputs: int) -> nn.Module:
            return nn.Sequential(LayerNorm(width, norm_eps), nn.Linear(width, outputs, bias=bias))

        self.blocks = stack(dim, head_dim, block_sizes, cross)
        self.patch_mixer = stack(mixer_dim, head_dim, mixer_sizes, cross)
        maps = bool(mixer_sizes) and mixer_dim != dim
        self.patch_mixer_map_xin = into(dim, mixer_dim) if maps else nn.Identity()
        self.patch_mixer_map_xout = into(mixer_dim, dim) if maps else nn.Identity()
        self.patch_mixer_map_y = into(dim, mixer_dim) if maps and cross else nn.Identity()
        self.decoder_blocks = stack(decoder_dim, decoder_head_dim, decoder_sizes, False)
        if decoder_sizes:
            self.decoder_layer = ModulatedLinear(config, dim, decoder_dim)
        self.final_layer = ModulatedLinear(config, decoder_dim or dim, in_channels * patch_size**2)
        if fusion is not None:
            self.routing = nn.ModuleDict({"fusion": nn.Linear(2 * dim, dim)})
        if table_side:
            self.register_buffer("pos_embed", torch.zeros(1, table_side**2, dim))
            if decoder_sizes:
                self.register_buffer("decoder_pos_embed", torch.zeros(1, table_side**2, decoder_dim))

    def _positions(self, rows: int, columns: int, like: Tensor, name: str) -> Tensor:
        side = self.config.table_side
        if side and (rows, columns) == (side, side):
            return getattr(self, name)[0].to(like)
        scale = self.config.position_scale
        return sincos_positions(like.shape[-1], rows, columns, scale, like.device).to(like)

    def _caption(self, y_BSD: Any, mask_BS: Tensor | None) -> tuple[Tensor, Tensor]:
        """Caption tokens, and their mean as a part of the modulation."""
        y_BSD = self.y_emb_preprocess(self.y_embedder["y_proj"](y_BSD), mask_BS)
        if mask_BS is None:
            return y_BSD, self.pooled_y_emb_process(y_BSD.mean(dim=1))
        weight = mask_BS[:, :, None].to(y_BSD.dtype)
        mean_BD = (y_BSD * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        return y_BSD, self.pooled_y_emb_process(mean_BD)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        class_labels: Tensor | None = None,
        guidance: Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Raw output for ``B C H W`` latents of any sides that are multiples of the patch.

        ``timestep`` is the scheduler's noise coordinate, one a sample; ``encoder_hidden_states`` are caption
        tokens ``B S D`` with a mask ``B S``, true at real ones; ``class_labels`` are -1 for no class;
        ``guidance`` is the scale that distilled networks take, one a sample.
        """
        p, config = self.config.patch_size, self.config
        b, c, height, width = sample.shape
        rows, columns = height // p, width // p
        patches = sample.reshape(b, c, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        first: Any = self.x_embedder["proj"]
        x_BLD = F.linear(patches, first.weight.flatten(1), first.bias)
        x_BLD = x_BLD + self._positions(rows, columns, x_BLD, "pos_embed")
        c_BD = self.t_embedder(timestep)
        if config.guidance_input:
            assert guidance is not None, "a distilled network needs the scale of guidance"
            features = guidance_features(guidance).to(c_BD.dtype)
            c_BD = c_BD + self.guidance_embedder["map"](features)
        y_BSD, mask_BS = encoder_hidden_states, encoder_attention_mask if config.mask_captions else None
        if config.condition == "text":
            y_BSD, pooled_BD = self._caption(y_BSD, mask_BS)
            c_BD = c_BD + pooled_BD
        elif config.condition == "class":
            assert class_labels is not None, "a class-conditional network needs classes, -1 for none"
            table: Any = self.y_embedder["embedding_table"].weight
            rows_BD = table.t()[class_labels.clamp(min=0)]
            c_BD = c_BD + torch.where(class_labels[:, None] >= 0, rows_BD, 0.0)
        x_BLD = self._layers(x_BLD, c_BD, y_BSD, mask_BS, rows, columns)
        out = self.final_layer(x_BLD, c_BD)
        out = out.unflatten(1, (rows, columns)).unflatten(3, (p, p, c))  # B rows columns p p C
        return (out.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3),)

    def _layers(
        self, x: Tensor, c_BD: Tensor, y_BSD: Tensor | None, mask_BS: Tensor | None, rows: int, columns: int
    ) -> Tensor:
        """Mixer, backbone, decoder."""
        y_mixer = self.patch_mixer_map_y(y_BSD) if y_BSD is not None and len(self.patch_mixer) else y_BSD
        x = self.patch_mixer_map_xin(x)
        for block in self.patch_mixer:
            x = block(x, c_BD, y_mixer, mask_BS)
        x = dense = self.patch_mixer_map_xout(x)
        first, last = self.config.fusion or (-1, -1)
        for i, block in enumerate(self.blocks):
            if i == last:
                x = self.routing["fusion"](torch.cat([dense, x.to(dense.dtype)], dim=-1))
            x = block(x, c_BD, y_BSD, mask_BS)
            dense = x if i == first - 1 else dense
        if len(self.decoder_blocks):
            x = self.decoder_layer(x, c_BD)
            x = x + self._positions(rows, columns, x, "decoder_pos_embed")
            for block in self.decoder_blocks:
                x = block(x, c_BD, None, None)
        return x
