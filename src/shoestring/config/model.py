"""Settings of the network and of its token method."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from shoestring.config.base import Frozen, Positive, Share, setting


class Ramp(Frozen):
    """Width multipliers that grow linearly over the blocks (layer-wise scaling)."""

    first: Positive = setting("multiplier of the first block")
    last: Positive = setting("multiplier of the last block")

    def per_block(self, depth: int) -> tuple[float, ...]:
        """One multiplier a block."""
        if depth == 1:
            return (self.first,)
        step = (self.last - self.first) / (depth - 1)
        return tuple(self.first + i * step for i in range(depth - 1)) + (self.last,)


class MixerConfig(Frozen):
    """The patch mixer: blocks that see all patches before some are dropped (deferred masking)."""

    depth: int = setting("blocks; 0 = no mixer, which makes masking naive", 4, ge=0, le=64)
    dim: int = setting("width; equal to model.dim needs no maps in and out", 512, gt=0)
    qkv_multiplier: Positive = setting("self-attention width as a share of dim", 1.0)
    ffn_multiplier: Positive = setting("feed-forward width as a multiple of dim", 4.0)


class ExpertsConfig(Frozen):
    """Expert-choice mixture of experts in place of some feed-forward layers."""

    count: int = setting("experts per layer; 0 = no experts anywhere", 8, ge=0, le=256)
    capacity: Positive = setting("experts that see an average token", 2.0)
    every: int = setting("every n-th block has experts (never the backbone's last)", 2, ge=1)


class DecoderConfig(Frozen):
    """Blocks at the end that see all patches again, the dropped ones as mask tokens (MaskDiT)."""

    depth: int = setting("blocks; 0 = no decoder", 0, ge=0, le=64)
    dim: int = setting("width", 512, gt=0)
    head_dim: int = setting("width of one attention head", 32, gt=0)


class TransformerConfig(Frozen):
    """A diffusion transformer."""

    kind: Literal["microdit", "maskdit"] = setting(
        "family of blocks: microdit (SwiGLU, experts) or maskdit (plain DiT)", "microdit"
    )
    in_channels: int = setting("channels of the latents (3 for pixels)", 4, gt=0)
    condition: Literal["text", "class", "none"] = setting(
        "text (cross-attention and modulation), class (a table; modulation) or none", "text"
    )
    caption_dim: int = setting("text: width of the caption embeddings", 1024, gt=0)
    classes: int = setting("class: how many", 1000, ge=1)
    patch_size: int = setting("side of a patch in latents", 2, ge=1)
    image_channels: int = setting("super-resolution: channels of the small picture's latents", 0, ge=0)
    guidance_input: bool = setting("distilled models: the scale of guidance is an input", False)
    dim: int = setting("width D", 512, gt=0)
    depth: int = setting("backbone blocks", 16, ge=1, le=256)
    head_dim: int = setting("width of one attention head", 32, gt=0)
    qkv_multipliers: Ramp | tuple[Positive, ...] = setting(
        "self-attention widths: a ramp, or one value a block (fewer: each for depth/len blocks)",
        Ramp(first=0.5, last=1.0),
    )
    ffn_multipliers: Ramp | tuple[Positive, ...] = setting(
        "feed-forward widths, likewise", Ramp(first=0.5, last=4.0)
    )
    ffn_multiple_of: int = setting("feed-forward widths are rounded up to this", 256, gt=0)
    mixer: MixerConfig = setting("patch mixer", MixerConfig())
    decoder: DecoderConfig = setting("decoder", DecoderConfig())
    experts: ExpertsConfig = setting("mixture of experts", ExpertsConfig())
    bias: bool = setting("biases in attention, dense FFN, caption block and mixer maps", False)
    mup_base_dim: int | None = setting(
        "muP: dim at which learning rate and initial weights were tuned; null = off", None, gt=0
    )
    qk_norm: bool = setting("normalise queries and keys of self-attention over the whole width", True)
    norm_eps: Positive = setting("epsilon of every layer norm", 1e-6)
    mask_captions: bool = setting(
        "attend to and pool over real caption tokens only (false: padding too, as released)", False
    )
    attention: Literal["auto", "sdpa", "explicit"] = setting(
        "auto: explicit softmax(QK)V to train in bf16 on a CPU, where sdpa is slow; else sdpa", "auto"
    )
    checkpoint_activations: bool = setting("recompute each block in the backward pass", False)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.dim % self.head_dim or self.dim % 4:
            raise ValueError(
                f"dim is {self.dim}; it must be a multiple of 4 and of head_dim ({self.head_dim})"
            )
        if self.mixer.depth and self.mixer.dim % self.head_dim:
            raise ValueError(
                f"mixer.dim is {self.mixer.dim}; it must be a multiple of head_dim ({self.head_dim})"
            )
        if self.decoder.depth and (self.decoder.dim % self.decoder.head_dim or self.decoder.dim % 4):
            raise ValueError(
                f"decoder.dim is {self.decoder.dim}; it must be a multiple of 4 and of decoder.head_dim "
                f"({self.decoder.head_dim})"
            )
        if self.mup_base_dim is not None:
            widths = {"dim": self.dim} | {
                f"{name}.dim": part.dim
                for name, part in (("mixer", self.mixer), ("decoder", self.decoder))
                if part.depth
            }
            for name, width in widths.items():
                head = self.decoder.head_dim if name == "decoder.dim" else self.head_dim
                unit = math.lcm(head, 4)
                if width * self.mup_base_dim % (self.dim * unit):
                    raise ValueError(
                        f"mup_base_dim is {self.mup_base_dim}, at which {name} would be "
                        f"{width * self.mup_base_dim / self.dim:g}; it must be a multiple of {unit} (of the "
                        "heads' width and of 4)"
                    )
        if self.kind == "maskdit" and self.experts.count:
            raise ValueError(
                f"experts.count is {self.experts.count}; blocks of kind maskdit have no experts, set it to 0"
            )
        for name in ("qkv_multipliers", "ffn_multipliers"):
            values = getattr(self, name)
            if not isinstance(values, Ramp) and (not values or self.depth % len(values)):
                raise ValueError(
                    f"{name} has {len(values)} values; their number must divide depth ({self.depth})"
                )
            smallest = min((values.first, values.last) if isinstance(values, Ramp) else values)
            narrowest = min(self.dim, self.mup_base_dim or self.dim)
            if narrowest * smallest < 2:
                raise ValueError(
                    f"{name} goes down to {smallest}; it must be at least {2 / narrowest:g} (2 / dim)"
                )
        return self

    def at_width(self, dim: int) -> TransformerConfig:
        """The same network at another width: mixer and decoder in proportion, heads as wide as before."""

        def scaled(part: MixerConfig | DecoderConfig) -> dict[str, Any]:
            return part.model_dump() | ({"dim": part.dim * dim // self.dim} if part.depth else {})

        changes = {"dim": dim, "mixer": scaled(self.mixer), "decoder": scaled(self.decoder)}
        return TransformerConfig.model_validate(self.model_dump() | changes | {"mup_base_dim": None})

    def per_block(self, name: Literal["qkv_multipliers", "ffn_multipliers"]) -> tuple[float, ...]:
        """The multipliers of all backbone blocks."""
        values = getattr(self, name)
        if isinstance(values, Ramp):
            return values.per_block(self.depth)
        return tuple(v for v in values for _ in range(self.depth // len(values)))


class UNetConfig(Frozen):
    """A U-Net as Stable Diffusion's, of any width: the family of the LDM scaling study (arXiv 2404.01367).

    Classes are shown to it as captions of two tokens, zero and their row of a table.
    """

    kind: Literal["unet"] = setting("unet: ResNet blocks and cross-attention at several resolutions")
    in_channels: int = setting("channels of the latents (3 for pixels)", 4, gt=0)
    condition: Literal["text", "class", "none"] = setting("text, class (a table, one token) or none", "text")
    caption_dim: int = setting("width of the caption embeddings, or of the table of classes", 1024, gt=0)
    classes: int = setting("class: how many", 1000, ge=1)
    patch_size: int = setting("pixel-unshuffle: so many latents a side become channels", 1, ge=1)
    image_channels: int = setting("super-resolution: channels of the small picture's latents", 0, ge=0)
    guidance_input: bool = setting("distilled models: the scale of guidance is an input", False)
    channels: int = setting("base channels c", 320, ge=8, multiple_of=4)
    multipliers: tuple[Annotated[int, Field(ge=1, le=16)], ...] = setting(
        "channels of each resolution as multiples of c, the finest first", (1, 2, 4, 4), min_length=2
    )
    layers: int = setting(
        "ResNet blocks at each resolution on the way down (one more on the way up)", 2, ge=1
    )
    attention: tuple[bool, ...] = setting(
        "whether each resolution has attention to itself and to the caption", (True, True, True, False)
    )
    attention_depth: int = setting("transformer blocks of each attention", 1, ge=1)
    heads: int = setting("attention heads, where they are at least 8 wide; else fewer", 8, ge=1)
    mask_captions: bool = setting("attend to real caption tokens only", False)
    checkpoint_activations: bool = setting("recompute each block in the backward pass", False)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.attention) != len(self.multipliers):
            raise ValueError(
                f"attention has {len(self.attention)} values and multipliers {len(self.multipliers)}; both "
                "need one for each resolution"
            )
        if not any(self.attention):
            raise ValueError("attention is false everywhere; the caption enters there, make one true")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each resolution."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @property
    def norm_groups(self) -> int:
        """Groups of every group norm.

        gcd(32, c), which is 32 for all members of the paper's family; for narrower ones of at least eight
        channels each: a group of one or two loses what its channels are on average, hence the colour.
        """
        narrow = self.channels < 64
        return math.gcd(32, self.channels // 8 if narrow else self.channels)

    def heads_of(self, width: int) -> int:
        """Attention heads at a width: the most up to ``heads`` that divide it and are at least 8 wide."""
        fitting = [n for n in range(1, self.heads + 1) if width % n == 0 and width // n >= 8]
        return max(fitting, default=1)


def _family(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return "unet" if kind == "unet" else "transformer"


ModelConfig = TransformerConfig | UNetConfig
"""Any network."""
AnyModel = Annotated[
    Annotated[TransformerConfig, Tag("transformer")] | Annotated[UNetConfig, Tag("unet")],
    Discriminator(_family),
]
"""The same as a setting: its ``kind`` decides, and is microdit where it is left out."""


class TokensConfig(Frozen):
    """Which patches the network leaves out while it trains, and what happens to them.

    dense: none. naive: dropped at the input. deferred: dropped after the patch mixer. maskdit: naive, and a
    decoder restores them. tread: they skip blocks and rejoin. sprint: they skip blocks, whose result is
    fused with that of the dense ones. How many is a matter of the stages (``mask_ratio``).
    """

    method: str = setting(
        "dense, naive, deferred, maskdit, tread or sprint (docs/token-reduction.md)",
        "deferred",
    )
    first: int = setting("tread, sprint: first backbone block that sees fewer patches", 2, ge=0)
    last: int = setting(
        "tread, sprint: the block before which all are back; negative counts from the end", -2
    )
    pattern: Literal["random", "blocks", "stratified"] = setting(
        "which patches: random, whole squares (blocks), or evenly over squares (stratified)", "random"
    )
    block: int = setting("blocks, stratified: side of the squares in patches", 2, ge=2, le=64)
    path_drop: Share = setting("sprint: share of samples trained without the sparse path", 0.1)
    reconstruction: float = setting(
        "maskdit: coefficient of the squared error of dropped patches (MAE); 0 = none", 0.0, ge=0
    )
    reconstruction_target: Literal["noisy", "clean"] = setting(
        "maskdit: the noisy input, normalised by patch (as released), or clean patches", "noisy"
    )
    score_dropped: bool = setting("maskdit: the denoising loss looks at dropped patches too", False)
