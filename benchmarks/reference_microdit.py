"""MicroDiT written out plainly, the way the released code computes it: slow, and easy to compare with.

It serves twice: as the reference of the parity tests, and as the baseline of ``train_step.py``. It shares no
code with ``shoestring``. Everything is float32; experts gather and return their tokens with one-hot
products; attention is ``scaled_dot_product_attention``; masking gathers tokens in shuffled order, appends
zero rows after the final layer and restores the order; the loss is computed on the full grid and pooled by
patch. Parameters carry the names of the released state dict, so golden weights load with no translation.

Source: MicroDiT, arXiv 2407.15811 (network, masking); EDM, arXiv 2206.00364 (preconditioning, loss, Heun).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from shoestring.config import TransformerConfig


@dataclass(frozen=True)
class ReferenceConfig:
    """Constructor values under their released names (``dit`` in a golden file's metadata)."""

    input_size: int
    caption_channels: int
    dim: int
    depth: int
    head_dim: int
    qkv_multipliers: tuple[float, ...]
    ffn_multipliers: tuple[float, ...]
    in_channels: int = 4
    patch_size: int = 2
    multiple_of: int = 256
    pos_interp_scale: float = 1.0
    norm_eps: float = 1e-6
    use_patch_mixer: bool = True
    patch_mixer_depth: int = 4
    patch_mixer_dim: int = 512
    patch_mixer_qkv_ratio: float = 1.0
    patch_mixer_mlp_ratio: float = 4.0
    use_bias: bool = False
    num_experts: int = 8
    expert_capacity: float = 2.0
    experts_every_n: int = 2

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> ReferenceConfig:
        """Read the metadata of a golden file (``depth_init`` concerns initialisation only)."""
        values = json.loads(metadata["dit"])
        values |= {key: int(metadata[key]) for key in ("input_size", "in_channels", "caption_channels")}
        known = {field.name for field in fields(cls)}
        return cls(**{key: _tupled(value) for key, value in values.items() if key in known})

    @classmethod
    def like(cls, model: TransformerConfig, input_size: int, position_scale: float = 1.0) -> ReferenceConfig:
        """The same network as one of ours, for latents of side ``input_size``."""
        return cls(
            input_size=input_size,
            caption_channels=model.caption_dim,
            in_channels=model.in_channels,
            dim=model.dim,
            depth=model.depth,
            head_dim=model.head_dim,
            patch_size=model.patch_size,
            multiple_of=model.ffn_multiple_of,
            pos_interp_scale=position_scale,
            norm_eps=model.norm_eps,
            qkv_multipliers=model.per_block("qkv_multipliers"),
            ffn_multipliers=model.per_block("ffn_multipliers"),
            use_patch_mixer=model.mixer.depth > 0,
            patch_mixer_depth=model.mixer.depth,
            patch_mixer_dim=model.mixer.dim,
            patch_mixer_qkv_ratio=model.mixer.qkv_multiplier,
            patch_mixer_mlp_ratio=model.mixer.ffn_multiplier,
            use_bias=model.bias,
            num_experts=model.experts.count,
            expert_capacity=model.experts.capacity,
            experts_every_n=model.experts.every,
        )


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _round_up(value: int, multiple: int) -> int:
    return multiple * math.ceil(value / multiple)


def _attention_width(dim: int, ratio: float, head_dim: int) -> int:
    return dim if ratio == 1 else _round_up(int(dim * ratio), 2 * head_dim)


def _attend(q_BLA: Tensor, k_BSA: Tensor, v_BSA: Tensor, head_dim: int) -> Tensor:
    """Multi-head attention; q and k have been normalised over their whole width."""
    q_BNLP, k_BNSP, v_BNSP = (x.unflatten(2, (-1, head_dim)).transpose(1, 2) for x in (q_BLA, k_BSA, v_BSA))
    return F.scaled_dot_product_attention(q_BNLP, k_BNSP, v_BNSP).transpose(1, 2).flatten(2)


class LayerNorm(nn.LayerNorm):
    """Layer norm with a gain and no bias."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps=eps, bias=False)


class SelfAttention(nn.Module):
    """Self-attention with parameter-free layer norm over the whole width of q and of k."""

    def __init__(self, dim: int, width: int, config: ReferenceConfig) -> None:
        super().__init__()
        self.head_dim, self.eps = config.head_dim, config.norm_eps
        self.qkv = nn.Linear(dim, 3 * width, bias=config.use_bias)
        self.proj = nn.Linear(width, dim, bias=config.use_bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Attend among the tokens of each sample."""
        q, k, v = self.qkv(x_BLD).chunk(3, dim=2)
        q, k = (F.layer_norm(z, z.shape[2:], eps=self.eps) for z in (q, k))
        return self.proj(_attend(q, k, v, self.head_dim))


class CrossAttention(nn.Module):
    """Attention from image tokens to all caption tokens."""

    def __init__(self, dim: int, config: ReferenceConfig) -> None:
        super().__init__()
        self.head_dim, self.eps = config.head_dim, config.norm_eps
        self.q_linear = nn.Linear(dim, dim, bias=config.use_bias)
        self.kv_linear = nn.Linear(dim, 2 * dim, bias=config.use_bias)
        self.proj = nn.Linear(dim, dim, bias=config.use_bias)

    def forward(self, x_BLD: Tensor, y_BSD: Tensor) -> Tensor:
        """Attend from ``x_BLD`` to ``y_BSD``."""
        q = self.q_linear(x_BLD)
        k, v = self.kv_linear(y_BSD).chunk(2, dim=2)
        q, k = (F.layer_norm(z, z.shape[2:], eps=self.eps) for z in (q, k))
        return self.proj(_attend(q, k, v, self.head_dim))


class SwiGLU(nn.Module):
    """w3( silu(w1 x) * w2 x )."""

    def __init__(self, dim: int, ratio: float, config: ReferenceConfig) -> None:
        super().__init__()
        hidden = _round_up(int(2 * int(dim * ratio) / 3), config.multiple_of)
        self.w1 = nn.Linear(dim, hidden, bias=config.use_bias)
        self.w2 = nn.Linear(dim, hidden, bias=config.use_bias)
        self.w3 = nn.Linear(hidden, dim, bias=config.use_bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Apply to every token."""
        return self.w3(F.silu(self.w1(x_BLD)) * self.w2(x_BLD))


class Experts(nn.Module):
    """Expert-choice mixture: each expert takes its top tokens of a sample, by one-hot products."""

    def __init__(self, dim: int, ratio: float, config: ReferenceConfig) -> None:
        super().__init__()
        self.capacity = config.expert_capacity
        hidden = _round_up(int(dim * ratio), config.multiple_of)
        self.w1 = nn.Parameter(torch.empty(config.num_experts, dim, hidden))
        self.w2 = nn.Parameter(torch.empty(config.num_experts, hidden, dim))
        self.gate = nn.Linear(dim, config.num_experts, bias=False)
        nn.init.normal_(self.w1, std=0.02)
        nn.init.normal_(self.w2, std=0.02)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Route within each sample. (The released code gives an expert no token below one: here one.)"""
        length, experts = x_BLD.shape[1], self.w1.shape[0]
        taken = min(length, max(1, int(self.capacity * length / experts)))
        score_BLE = self.gate(x_BLD).softmax(dim=2)
        weight_BER, index_BER = score_BLE.transpose(1, 2).topk(taken, dim=2)
        onehot_BERL = F.one_hot(index_BER, length).to(x_BLD.dtype)
        chosen_BERD = torch.einsum("berl,bld->berd", onehot_BERL, x_BLD)
        hidden_BERF = F.gelu(torch.einsum("berd,edf->berf", chosen_BERD, self.w1))
        out_BERD = torch.einsum("berf,efd->berd", hidden_BERF, self.w2)
        return torch.einsum("berl,berd->bld", onehot_BERL, weight_BER[..., None] * out_BERD)


class Block(nn.Module):
    """adaLN block: gated self-attention, plain cross-attention, gated feed-forward."""

    def __init__(
        self, dim: int, qkv: float, ffn: float, cond_dim: int, experts: bool, config: ReferenceConfig
    ) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (LayerNorm(dim, config.norm_eps) for _ in range(3))
        self.attn = SelfAttention(dim, _attention_width(dim, qkv, config.head_dim), config)
        self.cross_attn = CrossAttention(dim, config)
        self.mlp = (Experts if experts else SwiGLU)(dim, ffn, config)
        self.adaLN_modulation = nn.Sequential(nn.GELU("tanh"), nn.Linear(cond_dim, 6 * dim))

    def forward(self, x_BLD: Tensor, y_BSD: Tensor, c_BD: Tensor) -> Tensor:
        """Update the tokens given captions and condition."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c_BD)[:, None].chunk(6, dim=2)
        x_BLD = x_BLD + gate1 * self.attn(self.norm1(x_BLD) * (1 + scale1) + shift1)
        x_BLD = x_BLD + self.cross_attn(self.norm2(x_BLD), y_BSD)
        return x_BLD + gate2 * self.mlp(self.norm3(x_BLD) * (1 + scale2) + shift2)


class CaptionBlock(nn.Module):
    """Pre-norm transformer block over the caption tokens."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = (LayerNorm(config.dim, config.norm_eps) for _ in range(2))
        self.attn = SelfAttention(config.dim, config.dim, config)
        self.mlp = SwiGLU(config.dim, 4.0, config)

    def forward(self, y_BSD: Tensor) -> Tensor:
        """Update the caption tokens."""
        y_BSD = y_BSD + self.attn(self.norm1(y_BSD))
        return y_BSD + self.mlp(self.norm2(y_BSD))


class Projection(nn.Module):
    """fc2( norm( gelu_tanh( fc1 x ) ) )."""

    def __init__(self, in_dim: int, config: ReferenceConfig) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(in_dim, config.dim), nn.Linear(config.dim, config.dim)
        self.norm = LayerNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Project the last dimension."""
        return self.fc2(self.norm(F.gelu(self.fc1(x), approximate="tanh")))


class FinalLayer(nn.Module):
    """Modulated norm and linear map to patch values."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.dim, config.in_channels * config.patch_size**2)
        self.adaLN_modulation = nn.Sequential(nn.GELU("tanh"), nn.Linear(config.dim, 2 * config.dim))
        self.norm_final = LayerNorm(config.dim, config.norm_eps)

    def forward(self, x_BLD: Tensor, c_BD: Tensor) -> Tensor:
        """Values of every patch."""
        shift, scale = self.adaLN_modulation(c_BD)[:, None].chunk(2, dim=2)
        return self.linear(self.norm_final(x_BLD) * (1 + scale) + shift)


def time_features(time_B: Tensor) -> Tensor:
    """512 cosine and sine features (cosine first) of c_noise."""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(256, dtype=torch.float32) / 256)
    angles = time_B[:, None] * frequencies.to(time_B.device)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def position_table(dim: int, side: int, scale: float) -> Tensor:
    """Sine-cosine table (1, side**2, dim): first half the column, second half the row."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] / scale * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    table = torch.cat([axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)], dim=1)
    return table.float()[None]


class ReferenceMicroDiT(nn.Module):
    """The released network. Initialisation is torch's own: load weights, or accept random ones."""

    pos_embed: Tensor
    mask_token: Tensor

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.config = config
        dim, side = config.dim, config.input_size // config.patch_size
        patches = nn.Conv2d(config.in_channels, dim, config.patch_size, stride=config.patch_size)
        self.x_embedder = nn.ModuleDict({"proj": patches})
        time_mlp = nn.Sequential(nn.Linear(512, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.t_embedder = nn.ModuleDict({"mlp": time_mlp})
        self.y_embedder = nn.ModuleDict({"y_proj": Projection(config.caption_channels, config)})
        self.y_emb_preprocess = CaptionBlock(config)
        self.pooled_y_emb_process = Projection(dim, config)
        self.register_buffer("pos_embed", position_table(dim, side, config.pos_interp_scale))
        self.register_buffer("mask_token", torch.zeros(1, 1, config.in_channels * config.patch_size**2))

        mixer_dim, every = config.patch_mixer_dim, config.experts_every_n
        mixer_depth = config.patch_mixer_depth if config.use_patch_mixer else 0
        self.has_maps = mixer_depth > 0 and mixer_dim != dim
        if self.has_maps:
            self.patch_mixer_map_xin = self._map(dim, mixer_dim)
            self.patch_mixer_map_xout = self._map(mixer_dim, dim)
            self.patch_mixer_map_y = self._map(dim, mixer_dim)
        qkv, ffn = config.patch_mixer_qkv_ratio, config.patch_mixer_mlp_ratio
        self.patch_mixer = nn.ModuleList()
        for i in range(mixer_depth):
            experts = config.num_experts > 0 and i > 0 and (i + 1) % every == 0
            self.patch_mixer.append(Block(mixer_dim, qkv, ffn, dim, experts, config))
        self.blocks = nn.ModuleList()
        for i in range(config.depth):
            experts = config.num_experts > 0 and i < config.depth - 1 and (i + 1) % every == 0
            qkv = config.qkv_multipliers[i * len(config.qkv_multipliers) // config.depth]
            ffn = config.ffn_multipliers[i * len(config.ffn_multipliers) // config.depth]
            self.blocks.append(Block(dim, qkv, ffn, dim, experts, config))
        self.final_layer = FinalLayer(config)

    def _map(self, in_dim: int, out_dim: int) -> nn.Sequential:
        norm = LayerNorm(in_dim, self.config.norm_eps)
        return nn.Sequential(norm, nn.Linear(in_dim, out_dim, bias=self.config.use_bias))

    def forward(
        self,
        x: Tensor,
        time_B: Tensor,
        captions_BSD: Tensor,
        mask_noise_BL: Tensor | None = None,
        mask_ratio: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """Raw output as an image, zero at dropped patches, and the mask (1 = dropped)."""
        x_BLD = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        y_BSD = self.y_emb_preprocess(self.y_embedder["y_proj"](captions_BSD))
        c_BD = self.t_embedder["mlp"](time_features(time_B)) + self.pooled_y_emb_process(y_BSD.mean(dim=1))

        x_BLM = self.patch_mixer_map_xin(x_BLD) if self.has_maps else x_BLD
        y_BSM = self.patch_mixer_map_y(y_BSD) if self.has_maps else y_BSD
        for block in self.patch_mixer:
            x_BLM = block(x_BLM, y_BSM, c_BD)

        mask_BL = restore_BL = None
        if mask_ratio > 0:
            assert mask_noise_BL is not None
            shuffle_BL = mask_noise_BL.argsort(dim=1)
            restore_BL = shuffle_BL.argsort(dim=1)
            keep = int(shuffle_BL.shape[1] * (1 - mask_ratio))
            mask_BL = (restore_BL >= keep).to(x.dtype)
            x_BLM = x_BLM.gather(1, shuffle_BL[:, :keep, None].expand(-1, -1, x_BLM.shape[2]))
        x_BKD = self.patch_mixer_map_xout(x_BLM) if self.has_maps else x_BLM
        for block in self.blocks:
            x_BKD = block(x_BKD, y_BSD, c_BD)
        out = self.final_layer(x_BKD, c_BD)

        if restore_BL is not None:
            empty = self.mask_token.expand(len(x), restore_BL.shape[1] - out.shape[1], -1)
            out = torch.cat([out, empty], dim=1)
            out = out.gather(1, restore_BL[:, :, None].expand(-1, -1, out.shape[2]))
        return self._image(out), mask_BL

    def _image(self, tokens_BLG: Tensor) -> Tensor:
        side, p = math.isqrt(tokens_BLG.shape[1]), self.config.patch_size
        grid = tokens_BLG.unflatten(2, (p, p, -1)).unflatten(1, (side, side))
        return torch.einsum("nhwpqc->nchpwq", grid).reshape(len(grid), -1, side * p, side * p)

    def guided(self, x: Tensor, time_B: Tensor, captions_BSD: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance on the raw output; the null caption is all zeros."""
        captions = torch.cat([captions_BSD, torch.zeros_like(captions_BSD)])
        cond, uncond = self(torch.cat([x, x]), torch.cat([time_B, time_B]), captions)[0].chunk(2)
        return uncond + scale * (cond - uncond)

    def loss(
        self,
        clean: Tensor,
        captions_BSD: Tensor,
        normal_B: Tensor,
        unit_noise: Tensor,
        mask_noise_BL: Tensor | None = None,
        *,
        mask_ratio: float = 0.0,
        p_mean: float = -0.6,
        p_std: float = 1.2,
        sigma_data: float = 0.9,
    ) -> Tensor:
        """EDM training loss; where masked, on the full grid, averaged by patch, over the kept patches."""
        sigma = (p_mean + p_std * normal_B).exp()[:, None, None, None]
        weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
        noisy = clean + sigma * unit_noise
        denoised, mask_BL = self.denoise(noisy, sigma, captions_BSD, mask_noise_BL, mask_ratio, sigma_data)
        error = weight * (denoised - clean) ** 2
        if mask_BL is None:
            return error.mean()
        error_BL = F.avg_pool2d(error.mean(dim=1), self.config.patch_size).flatten(1)
        kept_BL = 1 - mask_BL
        return ((error_BL * kept_BL).sum(dim=1) / kept_BL.sum(dim=1)).mean()

    def denoise(
        self,
        noisy: Tensor,
        sigma: Tensor,
        captions_BSD: Tensor,
        mask_noise_BL: Tensor | None = None,
        mask_ratio: float = 0.0,
        sigma_data: float = 0.9,
        guidance: float = 1.0,
    ) -> tuple[Tensor, Tensor | None]:
        """EDM-preconditioned estimate of the clean latents at ``sigma`` (B 1 1 1), and the mask."""
        norm = (sigma**2 + sigma_data**2).sqrt()
        time_B = sigma.flatten().log() / 4
        mask_BL = None
        if guidance > 1:
            out = self.guided(noisy / norm, time_B, captions_BSD, guidance)
        else:
            out, mask_BL = self(noisy / norm, time_B, captions_BSD, mask_noise_BL, mask_ratio)
        return sigma_data**2 / norm**2 * noisy + sigma * sigma_data / norm * out, mask_BL

    @torch.no_grad()
    def sample_heun(
        self,
        unit_noise: Tensor,
        captions_BSD: Tensor,
        steps: int,
        guidance: float,
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        sigma_data: float = 0.9,
    ) -> Tensor:
        """Heun sampler on the EDM grid, state in float64, network input in float32."""
        ramp = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
        top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
        sigmas = [*((top + ramp * (bottom - top)) ** rho).tolist(), 0.0]

        def slope(x: Tensor, sigma: float) -> Tensor:
            sigma_B111 = torch.full((len(x), 1, 1, 1), sigma, dtype=torch.float32, device=x.device)
            denoised, _ = self.denoise(
                x.float(), sigma_B111, captions_BSD, sigma_data=sigma_data, guidance=guidance
            )
            return (x - denoised.double()) / sigma

        x = unit_noise.double() * sigmas[0]
        for now, after in zip(sigmas[:-1], sigmas[1:], strict=True):
            first = slope(x, now)
            euler = x + (after - now) * first
            x = euler if after == 0 else x + (after - now) * (first + slope(euler, after)) / 2
        return x.float()
