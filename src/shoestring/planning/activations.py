"""What autograd keeps of a forward pass, layer by layer, in closed form.

A layer keeps the inputs of its products, of its norms and of its nonlinearities, and under autocast also the
low-precision copies of its weights. Which layer sees how many patches is not written down here: the token
method runs on layers that count (as for FLOPs), and the widths are read off a network on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor, nn

from shoestring.config import RunConfig
from shoestring.models.attention import AttentionKind
from shoestring.models.layers import (
    MLP,
    AdaLN,
    ClassEmbedding,
    CrossAttention,
    SelfAttention,
    SwiGLU,
    TransformerBlock,
)
from shoestring.models.moe import ExpertChoice
from shoestring.models.transformer import CaptionEmbedder, DiffusionTransformer
from shoestring.planning.flops import run_method
from shoestring.tensors import gather_tokens

FP32, INDEX = 4, 8
"""Bytes of a float32 value and of an index."""
DeviceType = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Bytes:
    """Bytes of a value in each place, which depend on the precision and on what autocast does on a device."""

    low: int
    """Results of products."""
    norm: int
    """Inputs and results of layer norms: float32 under CUDA's autocast, elsewhere like everything."""
    softmax: int
    """Kept of every attention weight where attention is written out."""
    cast: int
    """Kept of every weight in a product: its low-precision copy."""
    explicit: bool
    """Whether ``attention=auto`` writes attention out in training."""

    @staticmethod
    def of(precision: str, device_type: DeviceType) -> Bytes:
        """Those of ``bf16`` or ``fp32`` on a kind of device."""
        if precision == "fp32":
            return Bytes(FP32, FP32, FP32, 0, explicit=False)
        if device_type == "cuda":
            return Bytes(2, FP32, FP32 + 2, 2, explicit=False)
        return Bytes(2, 2, 2, 2, explicit=True)

    def writes_out(self, kind: AttentionKind) -> bool:
        """Whether attention of this kind keeps its weights."""
        return self.explicit if kind == "auto" else kind == "explicit"

    @property
    def recast(self) -> int:
        """Bytes of a norm's result in low precision: a copy for each product, or the result itself."""
        return self.low if self.norm != self.low else 0


@dataclass(frozen=True)
class Part:
    """A stretch of the network, in bytes of one image unless it says otherwise."""

    kept: float
    """From its forward to its backward pass."""
    moment: float
    """Beside it, at the worst moment of its backward pass."""
    entry: float = 0.0
    """Of ``kept`` where the part is recomputed: its input. 0 = it is never recomputed."""
    parameters: int = 0
    """How many (not bytes)."""
    cast: int = 0
    """How many of them are in products (not bytes)."""
    largest: int = 0
    """How many the largest matrix or stack has."""


@dataclass
class _Kept:
    """The layers of a network that count what they keep; tokens are on the meta device."""

    network: DiffusionTransformer
    bytes: Bytes
    caption: int
    length: int
    parts: list[Part] = field(default_factory=list)

    @property
    def depth(self) -> int:
        return len(self.network.blocks)

    def mixer(self, x_BLD: Tensor, visible_BK: Tensor | None = None) -> Tensor:
        network, before = self.network, x_BLD.shape[1]
        self._map(network.patch_mixer_map_xin, before)
        for block in network.patch_mixer:
            self._block(block, before)
        if visible_BK is not None:
            x_BLD = gather_tokens(x_BLD, visible_BK)
        self._map(network.patch_mixer_map_xout, x_BLD.shape[1])
        return x_BLD

    def backbone(self, x_BKD: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        for block in self.network.blocks[first:last]:
            self._block(block, x_BKD.shape[1])
        return x_BKD

    def decoder(self, x_BKD: Tensor, visible_BK: Tensor | None) -> Tensor:
        network = self.network
        self.parts.append(modulated_linear(network.decoder_layer, x_BKD.shape[1], self.bytes))
        for block in network.decoder_blocks:
            self._block(block, self.length)
        return x_BKD.new_empty(1, self.length, network.config.decoder.dim)

    def _block(self, block: nn.Module, tokens: int) -> None:
        assert isinstance(block, TransformerBlock)
        self.parts.append(transformer_block(block, tokens, self.caption, self.bytes))

    def _map(self, layer: nn.Module, tokens: int) -> None:
        """Into and out of the mixer's width: a norm, then a product."""
        for linear in layer.modules():
            if isinstance(linear, nn.Linear):
                wide = tokens * linear.in_features
                kept = wide * (self.bytes.norm + self.bytes.low)
                self.parts.append(Part(kept, 2 * wide * self.bytes.norm, **_sizes(layer)))


def _sizes(module: nn.Module) -> dict[str, int]:
    """Parameters of a module, and those in products that autocast makes low."""
    sizes = [p.numel() for p in module.parameters()]
    return {"parameters": sum(sizes), "cast": cast_weights(module), "largest": max(sizes)}


def cast_weights(module: nn.Module) -> int:
    """How many weights autocast copies: those of linear maps and experts, not gates (float32) and tables."""
    others = {id(m.gate) for m in module.modules() if isinstance(m, ExpertChoice)}
    others |= {id(m.embedding_table) for m in module.modules() if isinstance(m, ClassEmbedding)}
    count = 0
    for m in module.modules():
        if isinstance(m, nn.Linear) and id(m) not in others:
            count += m.weight.numel()
        elif isinstance(m, ExpertChoice):
            count += m.w1.numel() + m.w2.numel()
    return count


# -- layers: bytes kept, and bytes beside them at the worst moment -----------------------------------------


def _attention(heads: int, tokens: int, keys: int, written_out: bool, b: Bytes) -> tuple[float, float]:
    """Softmax and result; queries, keys and values are counted where they come from."""
    if not written_out:
        return heads * tokens * FP32, 0.0  # the softmax's normaliser
    weights = heads * tokens * keys
    return weights * b.softmax, 2.0 * weights * b.low


def _self_attention(attn: SelfAttention, tokens: int, b: Bytes) -> tuple[float, float]:
    width = attn.proj.in_features
    written_out = b.writes_out(attn.kind)
    one = tokens * width * b.low
    kept: float = tokens * attn.qkv.in_features * b.low
    if attn.qk_norm or not written_out:
        kept += 3 * one  # views of one tensor: all of it is there as long as one of them is
    if attn.qk_norm:
        kept += 2 * one + 2 * tokens * width * (b.norm if b.recast else 0)
    elif written_out:
        kept += 2 * one
    if written_out:
        kept += one  # the products take copies, head by head
    weights, moment = _attention(width // attn.head_dim, tokens, tokens, written_out, b)
    return kept + weights + one, max(moment, 4.0 * one)


def _cross_attention(attn: CrossAttention, tokens: int, caption: int, b: Bytes) -> tuple[float, float]:
    dim = attn.proj.in_features
    written_out = b.writes_out(attn.kind)
    queries, keys = tokens * dim, caption * dim
    kept = queries * (2 * b.low + b.norm) + keys * 3 * b.low + (keys * b.norm if b.recast else 0)
    if written_out:
        kept += keys * b.low
    weights, moment = _attention(dim // attn.head_dim, tokens, caption, written_out, b)
    return kept + weights + queries * b.low, max(moment, 3.0 * queries * b.low)


def _feed_forward(mlp: nn.Module, tokens: int, b: Bytes) -> tuple[float, float]:
    """Its input is counted with it."""
    if isinstance(mlp, ExpertChoice):
        experts, dim, hidden = mlp.w1.shape
        chosen = experts * mlp.tokens_per_expert(tokens)
        kept = tokens * (dim + experts) * FP32 + chosen * (2 * INDEX + b.low + FP32)  # the router
        kept += chosen * (3 * dim + 2 * hidden) * b.low
        return kept, 2.0 * chosen * hidden * b.low + chosen * dim * b.norm
    if isinstance(mlp, SwiGLU):
        hidden, dim = mlp.w1.out_features, mlp.w1.in_features
        return (4 * hidden + dim * (2 if b.recast else 1)) * tokens * b.low, 2.0 * tokens * hidden * b.low
    assert isinstance(mlp, MLP)
    return (2 * mlp.fc1.out_features + mlp.fc1.in_features) * tokens * b.low, (
        2.0 * tokens * mlp.fc1.out_features * b.low
    )


def _modulation(layer: AdaLN, scales: int, b: Bytes) -> float:
    """Of one image: activation, results, and 1 + scale."""
    linear = layer.linears[0]
    return (linear.in_features + linear.out_features + scales) * b.low


def transformer_block(block: TransformerBlock, tokens: int, caption: int, b: Bytes) -> Part:
    """What a block keeps on so many tokens, with a caption of so many."""
    dim = block.attn.qkv.in_features
    wide = tokens * dim
    # Input and result of the modulated norms, and the branches that are multiplied by a gate.
    kept = _modulation(block.adaLN_modulation, 2 * dim, b) + wide * (4 * b.norm + 2 * b.low)
    attention, moment = _self_attention(block.attn, tokens, b)
    feed_forward, moment_mlp = _feed_forward(block.mlp, tokens, b)
    kept += attention + feed_forward
    moment = max(moment, moment_mlp)
    if block.cross:
        cross, moment_cross = _cross_attention(block.cross_attn, tokens, caption, b)
        kept += cross + wide * b.norm
        moment = max(moment, moment_cross)
    return Part(kept, moment + wide * (b.low + 2 * b.norm), wide * b.low, **_sizes(block))


def modulated_linear(layer: nn.Module, tokens: int, b: Bytes) -> Part:
    """A modulated norm and a product: out of the network, and into a decoder."""
    linear = layer.linear
    assert isinstance(linear, nn.Linear)
    wide = tokens * linear.in_features
    kept = wide * (2 * b.norm + b.low) + _modulation(layer.adaLN_modulation, linear.in_features, b)  # type: ignore[arg-type]
    return Part(kept, 2 * wide * b.norm, **_sizes(layer))


def _condition(network: DiffusionTransformer, caption: int, length: int, b: Bytes) -> Part:
    """Embedded patches, time and caption."""
    config = network.config
    dim, values = config.dim, (config.in_channels + config.image_channels) * config.patch_size**2
    modules: list[nn.Module] = [network.x_embedder, network.t_embedder]
    if config.image_channels:
        modules.append(network.image_embedder)
    inputs = network.x_embedder.proj.weight.numel() + network.t_embedder.linears[0].weight.numel()
    kept: float = length * values * b.low + (network.time_features + 3 * dim) * b.low
    moment: float = length * dim * b.low
    if isinstance(network.y_embedder, CaptionEmbedder):
        first, block = network.y_embedder.y_proj.fc1, network.y_emb_preprocess
        modules += [network.y_embedder, block, network.pooled_y_emb_process]
        inputs += first.weight.numel()
        wide = caption * dim
        if b.cast:
            kept += caption * first.in_features * b.low
        kept += wide * (2 * b.low + b.norm)  # of the two maps
        attention, moment_attention = _self_attention(block.attn, caption, b)
        feed_forward, moment_mlp = _feed_forward(block.mlp, caption, b)
        kept += attention + feed_forward + wide * (2 * b.norm + b.low)
        moment += max(moment_attention, moment_mlp) + wide * 2 * b.norm
        for linear in network.patch_mixer_map_y.modules():
            if isinstance(linear, nn.Linear):
                modules.append(network.patch_mixer_map_y)
                kept += wide * (b.low + (b.norm if b.recast else 0)) + caption * linear.out_features * b.low
    elif network.y_embedder is not None:
        modules.append(network.y_embedder)
    sizes = [_sizes(module) for module in modules]
    # Maps that look at inputs need no gradient of them, so nothing is kept of their weights.
    cast = sum(size["cast"] for size in sizes) - inputs
    parameters, largest = sum(size["parameters"] for size in sizes), max(size["largest"] for size in sizes)
    return Part(kept, moment, parameters=parameters, cast=cast, largest=largest)


def network_parts(
    config: RunConfig,
    network: DiffusionTransformer,
    grid: tuple[int, int],
    caption: int,
    mask_ratio: float,
    b: Bytes,
) -> list[Part]:
    """All parts of a network in the order of the forward pass.

    Args:
        config: the run.
        network: its network, perhaps on the meta device.
        grid: rows and columns of patches.
        caption: caption length, padding included; 0 without captions.
        mask_ratio: share of patches that the reduced part of the network does not see.
        b: bytes of values.

    Returns:
        Their sum is what autograd keeps.
    """
    length = grid[0] * grid[1]
    kept = _Kept(network, b, caption, length)
    kept.parts.append(_condition(network, caption, length, b))
    method, predicted = run_method(network.config, config.tokens, kept, length, mask_ratio)
    for linear in method.modules():
        if isinstance(linear, nn.Linear):  # what a method fuses
            wide = length * linear.in_features * b.low
            kept.parts.append(Part(wide, wide, **_sizes(linear)))
    last = modulated_linear(network.final_layer, predicted, b)
    values = predicted * config.model.in_channels * config.model.patch_size**2 * FP32
    kept.parts.append(replace(last, kept=last.kept + values, moment=last.moment + 3 * values))
    return kept.parts
