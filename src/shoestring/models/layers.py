"""Layers of the diffusion transformers: norms, attention, feed-forward, embeddings, positions.

Submodules carry the released MicroDiT names (``attn.qkv``, ``mlp.w1``), so that a state dict of one is a
state dict of the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoestring.models.attention import AttentionKind, Choices, attend
from shoestring.tensors import Bool, Float, Int


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return math.ceil(value / multiple) * multiple


def attention_width(dim: int, multiplier: float, head_dim: int) -> int:
    """Self-attention width: dim at multiplier 1, else int(dim m) rounded up to an even number of heads."""
    return dim if multiplier == 1 else round_up(int(dim * multiplier), 2 * head_dim)


def swiglu_width(dim: int, multiplier: float, multiple_of: int) -> int:
    """Hidden width of a SwiGLU: two thirds of int(dim m), rounded up."""
    return round_up(int(2 * int(dim * multiplier) / 3), multiple_of)


def mlp_width(dim: int, multiplier: float, multiple_of: int) -> int:
    """Hidden width of a feed-forward of two matrices: int(dim m), rounded up."""
    return round_up(int(dim * multiplier), multiple_of)


class LayerNorm(nn.Module):
    """Layer norm with a gain, or without one, and no bias."""

    weight: Tensor | None

    def __init__(self, dim: int, eps: float, gain: bool = True) -> None:
        super().__init__()
        self.register_parameter("weight", nn.Parameter(torch.empty(dim)) if gain else None)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; the dtype of ``x`` is kept."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.layer_norm(x, (x.shape[-1],), weight, None, self.eps)


def modulate(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """x (1 + scale) + shift, the same for all tokens. Source: DiT, arXiv 2212.09748, adaLN."""
    return x_BLD * (1 + scale_BD[:, None]) + shift_BD[:, None]


def _heads(x_BLA: Tensor, head_dim: int) -> Tensor:
    b, length, width = x_BLA.shape
    return x_BLA.view(b, length, width // head_dim, head_dim).transpose(1, 2)


def _merge(x_BNLP: Tensor) -> Tensor:
    b, n, length, p = x_BNLP.shape
    return x_BNLP.transpose(1, 2).reshape(b, length, n * p)


class SelfAttention(nn.Module):
    """Self-attention of any width, by choice with whole-width qk-norm (all heads together, no gain).

    Source: released MicroDiT; layer-wise scaling gives each block its own width (arXiv 2407.15811, 3.2).
    Released MaskDiT has no qk-norm.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        head_dim: int,
        bias: bool,
        eps: float,
        kind: AttentionKind,
        qk_norm: bool = True,
    ) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * width, bias=bias)
        self.proj = nn.Linear(width, dim, bias=bias)
        self.head_dim, self.eps, self.kind, self.qk_norm = head_dim, eps, kind, qk_norm
        self.choices: Choices = {}

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Attend over the L tokens where ``mask_BL`` is true (all without a mask)."""
        q, k, v = self.qkv(x_BLD).chunk(3, dim=-1)
        if self.qk_norm:
            q = F.layer_norm(q, (q.shape[-1],), eps=self.eps)
            k = F.layer_norm(k, (k.shape[-1],), eps=self.eps)
        q, k, v = (_heads(t, self.head_dim) for t in (q, k, v))
        return self.proj(_merge(attend(q, k, v, mask_BL, self.kind, self.choices)))


class CrossAttention(nn.Module):
    """Attention from image tokens to caption tokens, whole-width qk-norm."""

    def __init__(self, dim: int, head_dim: int, bias: bool, eps: float, kind: AttentionKind) -> None:
        super().__init__()
        self.q_linear = nn.Linear(dim, dim, bias=bias)
        self.kv_linear = nn.Linear(dim, 2 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=bias)
        self.head_dim, self.eps, self.kind = head_dim, eps, kind
        self.choices: Choices = {}

    def keys_values(self, y_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the caption, shaped ``B N S P``: they do not depend on the noise."""
        k, v = self.kv_linear(y_BSD).chunk(2, dim=-1)
        k = F.layer_norm(k, (k.shape[-1],), eps=self.eps)
        return _heads(k, self.head_dim), _heads(v, self.head_dim)

    def forward(self, x_BLD: Tensor, keys_values: tuple[Tensor, Tensor], mask_BS: Tensor | None) -> Tensor:
        """Attend from ``x_BLD`` to what :meth:`keys_values` gave."""
        q = self.q_linear(x_BLD)
        q = _heads(F.layer_norm(q, (q.shape[-1],), eps=self.eps), self.head_dim)
        return self.proj(_merge(attend(q, *keys_values, mask_BS, self.kind, self.choices)))


class SwiGLU(nn.Module):
    """w3( silu(w1 x) * w2 x ). Source: arXiv 2002.05202."""

    def __init__(self, dim: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=bias)
        self.w2 = nn.Linear(dim, hidden, bias=bias)
        self.w3 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Feed-forward over the last dimension."""
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class MLP(nn.Module):
    """fc2( GELU-tanh( fc1 x ) ): the feed-forward of DiT and MaskDiT."""

    def __init__(self, dim: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Feed-forward over the last dimension."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


Activation = Literal["gelu", "silu"]


def _activation(name: Activation) -> nn.Module:
    return nn.SiLU() if name == "silu" else nn.GELU(approximate="tanh")


class AdaLN(nn.Sequential):
    """Linear( activation(c) ): shifts, scales and gates from the condition. The released index 1 is kept."""

    def __init__(self, dim: int, outputs: int, activation: Activation = "gelu") -> None:
        linear = nn.Linear(dim, outputs)
        super().__init__(_activation(activation), linear)
        self.linears = (linear,)  # a tuple: not registered a second time


class ModulatedLinear(nn.Module):
    """Modulated norm and a linear map: out of the network, and into MaskDiT's decoder."""

    def __init__(
        self, dim: int, condition_dim: int, outputs: int, eps: float, gain: bool, activation: Activation
    ) -> None:
        super().__init__()
        self.norm_final = LayerNorm(dim, eps, gain)
        self.linear = nn.Linear(dim, outputs)
        self.adaLN_modulation = AdaLN(condition_dim, 2 * dim, activation)

    def forward(self, x_BKD: Tensor, c_BD: Tensor) -> Tensor:
        """Map the last dimension."""
        shift, scale = self.adaLN_modulation(c_BD).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x_BKD), shift, scale))


class NormLinear(nn.Sequential):
    """Layer norm, then a linear map: in and out of the patch mixer where its width differs."""

    def __init__(self, dim: int, outputs: int, bias: bool, eps: float) -> None:
        super().__init__(LayerNorm(dim, eps), nn.Linear(dim, outputs, bias=bias))


class TimeEmbedding(nn.Module):
    """Sinusoidal features of the noise coordinate, then Linear, activation, Linear.

    Cosines first: f_j = exp(-ln(10000) j / (features / 2)). Released MicroDiT: 512 features, GELU-tanh;
    released MaskDiT: 256, SiLU.
    """

    def __init__(self, dim: int, features: int = 512, activation: Activation = "gelu") -> None:
        super().__init__()
        self.features = features
        first, last = nn.Linear(features, dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(first, _activation(activation), last)
        self.linears = (first, last)  # a tuple: not registered a second time

    def forward(self, time_B: Float[Tensor, " B"]) -> Float[Tensor, "B D"]:
        """Embed the noise coordinate (ln(sigma) / 4 for EDM)."""
        return self.mlp(sinusoidal_features(time_B, self.features).to(self.linears[0].weight.dtype))


def sinusoidal_features(value_B: Float[Tensor, " B"], features: int) -> Float[Tensor, "B F"]:
    """Cosines, then sines, of a number times falling frequencies; see :class:`TimeEmbedding`.

    Args:
        value_B: a number a sample.
        features: how many, even.

    Returns:
        Values from -1 to 1.
    """
    half = features // 2
    j = torch.arange(half, dtype=torch.float32, device=value_B.device)
    angles_BF = value_B.float()[:, None] * torch.exp(-math.log(10_000) * j / half)
    return torch.cat([angles_BF.cos(), angles_BF.sin()], dim=-1)


class CaptionMLP(nn.Module):
    """fc2( LayerNorm( GELU-tanh( fc1 ) ) ): caption tokens or their mean to the model width."""

    def __init__(self, dim_in: int, dim: int, eps: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim_in, dim)
        self.norm = LayerNorm(dim, eps)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, y: Tensor) -> Tensor:
        """Map the last dimension."""
        return self.fc2(self.norm(F.gelu(self.fc1(y), approximate="tanh")))


KeysValues = tuple[Tensor, Tensor]


class TransformerBlock(nn.Module):
    """Base of the blocks in mixer, backbone and decoder: Muon looks for matrices inside them.

    Self-attention and feed-forward, modulated and gated by the condition; between them, with captions,
    cross-attention, neither modulated nor gated.
    """

    attn: SelfAttention
    cross_attn: CrossAttention
    mlp: nn.Module
    norm1: LayerNorm
    adaLN_modulation: AdaLN
    cross: bool
    compiled: Callable[..., Tensor] | None = None
    """What does the same as :meth:`compute`, given the block; see :mod:`shoestring.training.compiling`."""

    def norms(self) -> tuple[LayerNorm | None, LayerNorm]:
        """The norms before cross-attention (``None`` without captions) and before the feed-forward."""
        raise NotImplementedError

    def forward(
        self, x_BLD: Tensor, c_BD: Tensor, caption: Tensor | KeysValues | None, mask_BS: Tensor | None
    ) -> Tensor:
        """One block; ``caption`` is caption tokens, or keys and values prepared from them.

        Compiled, if it is, where gradients are taken: sampling and validation come with shapes of their own,
        each of which would be compiled anew.
        """
        if self.compiled is not None and torch.is_grad_enabled():
            return self.compiled(self, x_BLD, c_BD, caption, mask_BS)
        return self.compute(x_BLD, c_BD, caption, mask_BS)

    def compute(
        self, x_BLD: Tensor, c_BD: Tensor, caption: Tensor | KeysValues | None, mask_BS: Tensor | None
    ) -> Tensor:
        """What :meth:`forward` gives, never compiled."""
        x_BLD, hidden_BLD, gate_BD = self.before_mlp(x_BLD, c_BD, caption, mask_BS)
        return x_BLD + gate_BD[:, None] * self.mlp(hidden_BLD)

    def before_mlp(
        self, x_BLD: Tensor, c_BD: Tensor, caption: Tensor | KeysValues | None, mask_BS: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens after attention, what the feed-forward gets of them, and its gate."""
        before_cross, before_mlp = self.norms()
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c_BD).chunk(6, dim=-1)
        x_BLD = x_BLD + gate1[:, None] * self.attn(modulate(self.norm1(x_BLD), shift1, scale1))
        if before_cross is not None:
            assert caption is not None
            keys_values = self.cross_attn.keys_values(caption) if isinstance(caption, Tensor) else caption
            x_BLD = x_BLD + self.cross_attn(before_cross(x_BLD), keys_values, mask_BS)
        return x_BLD, modulate(before_mlp(x_BLD), shift2, scale2), gate2


class CaptionBlock(nn.Module):
    """One pre-norm transformer block over the caption tokens, plain residuals."""

    def __init__(self, dim: int, head_dim: int, hidden: int, bias: bool, eps: float, kind: AttentionKind):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps)
        self.attn = SelfAttention(dim, dim, head_dim, bias, eps, kind)
        self.norm2 = LayerNorm(dim, eps)
        self.mlp = SwiGLU(dim, hidden, bias)

    def forward(self, y_BSD: Tensor, mask_BS: Bool[Tensor, "B S"] | None) -> Tensor:
        """Refine the caption tokens."""
        y_BSD = y_BSD + self.attn(self.norm1(y_BSD), mask_BS)
        return y_BSD + self.mlp(self.norm2(y_BSD))


class ClassEmbedding(nn.Module):
    """One vector a class; class -1 is the zero vector.

    Stored as the released MaskDiT does: a linear map without bias of the one-hot class.
    """

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Linear(classes, dim, bias=False)

    def forward(self, class_B: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
        """Look up."""
        weight = self.embedding_table.weight
        rows_BD = weight.t()[class_B.clamp(min=0)]
        return torch.where(class_B[:, None] >= 0, rows_BD, 0.0)


class PatchEmbedding(nn.Module):
    """Linear map of patches, stored as the released convolution."""

    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B L D"]:
        """Patches, row by row, as tokens."""
        # A matrix product over unfolded patches: convolution kernels are slower at such sizes.
        b, c, h, w = x.shape
        p = self.proj.kernel_size[0]
        patches = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        return F.linear(
            patches.reshape(b, (h // p) * (w // p), c * p * p), self.proj.weight.flatten(1), self.proj.bias
        )


def sincos_positions(dim: int, grid: tuple[int, int], scale: float) -> Float[Tensor, "L D"]:
    """Fixed 2-D sine-cosine table for any grid.

    The first half of the channels encodes the column, the second the row; within each half sines come
    first, omega_j = 10000^(-j / (D/4)). Coordinates are divided by ``scale`` (2 at twice the resolution).

    Args:
        dim: width D, a multiple of 4.
        grid: rows and columns of patches.
        scale: interpolation scale.

    Returns:
        One row per patch, row-major; float32, computed in float64.

    Source: released MicroDiT ``get_2d_sincos_pos_embed``; after MAE, arXiv 2111.06377.
    """
    rows, columns = grid
    omega = 10_000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def encode(position_L: Tensor) -> Tensor:
        angles = position_L[:, None] / scale * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row_L = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
    column_L = torch.arange(columns, dtype=torch.float64).repeat(rows)
    return torch.cat([encode(column_L), encode(row_L)], dim=1).float()
