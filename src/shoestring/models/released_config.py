"""Our configuration of a released MicroDiT or MaskDiT: from constructor values, or from the weights alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from shoestring.config import DecoderConfig, ExpertsConfig, MixerConfig, TokensConfig, TransformerConfig
from shoestring.runtime import UserError

MASKDIT_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16}
"""Attention heads by width, of the sizes S, B, L, XL and H: weights do not tell them."""
DECODER_HEADS = {512: 16}
MICRODIT_HEAD_DIM = {512: 32, 1024: 64}
MICRODIT_MULTIPLE_OF, MICRODIT_CAPACITY = 256, 2.0


def config_from_released(values: Mapping[str, Any]) -> TransformerConfig:
    """Our configuration from the constructor values of the released MicroDiT.

    Args:
        values: ``dit`` (the constructor's keyword arguments, or their JSON), ``in_channels`` and
            ``caption_channels``; other entries are ignored.

    Returns:
        The configuration of the same network.
    """
    dit = values["dit"]
    dit = json.loads(dit) if isinstance(dit, str) else dit
    mixer_on = dit.get("use_patch_mixer", True)
    return TransformerConfig(
        in_channels=int(dit.get("in_channels", values.get("in_channels", 4))),
        caption_dim=int(dit.get("caption_channels", values.get("caption_channels", 1024))),
        patch_size=dit["patch_size"],
        dim=dit["dim"],
        depth=dit["depth"],
        head_dim=dit["head_dim"],
        qkv_multipliers=tuple(dit["qkv_multipliers"]),
        ffn_multipliers=tuple(dit["ffn_multipliers"]),
        ffn_multiple_of=dit["multiple_of"],
        bias=dit.get("use_bias", False),
        norm_eps=dit.get("norm_eps", 1e-6),
        mixer=MixerConfig(
            depth=dit["patch_mixer_depth"] if mixer_on else 0,
            dim=dit["patch_mixer_dim"],
            qkv_multiplier=dit["patch_mixer_qkv_ratio"],
            ffn_multiplier=dit["patch_mixer_mlp_ratio"],
        ),
        experts=ExpertsConfig(
            count=dit["num_experts"], capacity=dit["expert_capacity"], every=dit["experts_every_n"]
        ),
    )


def maskdit_config(
    dim: int,
    depth: int,
    heads: int,
    patch_size: int,
    in_channels: int = 4,
    classes: int = 1000,
    decoder: DecoderConfig | None = None,
) -> TransformerConfig:
    """Our configuration of a released MaskDiT.

    Args:
        dim: width D.
        depth: encoder blocks.
        heads: attention heads of the encoder.
        patch_size: side of a patch in latents.
        in_channels: channels of the latents.
        classes: how many; 0 = unconditional.
        decoder: its shape; ``None`` = no decoder, which is DiT.

    Returns:
        The configuration of the same network.

    Source: arXiv 2306.09305 and the released code: feed-forward 4 D, biases, no qk-norm.
    """
    return TransformerConfig(
        kind="maskdit",
        in_channels=in_channels,
        condition="class" if classes else "none",
        classes=max(1, classes),
        patch_size=patch_size,
        dim=dim,
        depth=depth,
        head_dim=dim // heads,
        qkv_multipliers=(1.0,),
        ffn_multipliers=(4.0,),
        ffn_multiple_of=1,
        mixer=MixerConfig(depth=0),
        decoder=decoder if decoder is not None else DecoderConfig(depth=0),
        experts=ExpertsConfig(count=0),
        bias=True,
        qk_norm=False,
    )


def tokens_of(model: TransformerConfig) -> TokensConfig:
    """The token method that a released network was made for.

    Args:
        model: the network.

    Returns:
        Deferred masking for MicroDiT, MaskDiT's own with its reconstruction term, dense for DiT.
    """
    if model.kind == "microdit":
        return TokensConfig(method="deferred")
    return (
        TokensConfig(method="maskdit", reconstruction=0.1)
        if model.decoder.depth
        else TokensConfig(method="dense")
    )


def config_from_weights(tensors: Mapping[str, Tensor], where: str) -> TransformerConfig:
    """Our configuration from the shapes of released weights.

    What shapes do not tell is that of the released sizes: heads by width and, for MicroDiT, capacity 2 and
    widths in multiples of 256.

    Args:
        tensors: released state dict, names without prefixes.
        where: name of the file, for messages.

    Returns:
        The configuration; that every tensor fits is checked where it is loaded.

    Raises:
        UserError: if it is no MicroDiT or MaskDiT, lacks a tensor, or has a width that was never released.
    """
    if "blocks.0.mlp.fc1.weight" in tensors:
        derive = _maskdit_from_weights
    elif "y_embedder.y_proj.fc1.weight" in tensors:
        derive = _microdit_from_weights
    else:
        raise UserError(
            f"{where}: neither a released MaskDiT (no 'blocks.0.mlp.fc1.weight') nor a released MicroDiT (no "
            "'y_embedder.y_proj.fc1.weight')"
        )
    try:
        return derive(tensors, where)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{where}: key {error} is missing; it is a checkpoint of another model") from error
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where}: the shapes of the weights make no network; the file is damaged") from error


def _known(table: Mapping[int, int], width: int, what: str, where: str) -> int:
    if width not in table:
        raise UserError(
            f"{where}: {what} is {width} wide, and the released sizes are {', '.join(map(str, table))}; the "
            "weights do not tell its heads, so give the configuration too"
        )
    return table[width]


def _depth(tensors: Mapping[str, Tensor], blocks: str) -> int:
    return len({name.split(".")[1] for name in tensors if name.startswith(f"{blocks}.")})


def _maskdit_from_weights(tensors: Mapping[str, Tensor], where: str) -> TransformerConfig:
    dim, in_channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
    table = tensors.get("y_embedder.embedding_table.weight")
    decoder = None
    if "decoder_layer.linear.weight" in tensors:
        width = tensors["decoder_layer.linear.weight"].shape[0]
        heads = _known(DECODER_HEADS, width, "the decoder", where)
        decoder = DecoderConfig(depth=_depth(tensors, "decoder_blocks"), dim=width, head_dim=width // heads)
    return maskdit_config(
        dim=dim,
        depth=_depth(tensors, "blocks"),
        heads=_known(MASKDIT_HEADS, dim, "the encoder", where),
        patch_size=patch_size,
        in_channels=in_channels,
        classes=0 if table is None else table.shape[1],
        decoder=decoder,
    )


def _microdit_from_weights(tensors: Mapping[str, Tensor], where: str) -> TransformerConfig:
    dim, in_channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
    depth = _depth(tensors, "blocks")

    def multipliers(block: str, width: int) -> tuple[float, float]:
        attention, feed_forward = tensors[f"{block}.attn.proj.weight"], tensors.get(f"{block}.mlp.w1.weight")
        if feed_forward is None:  # experts: two matrices, not the three that share two thirds of the width
            return attention.shape[1] / width, tensors[f"{block}.mlp.w1"].shape[2] / width
        return attention.shape[1] / width, 1.5 * feed_forward.shape[0] / width

    rows = [multipliers(f"blocks.{i}", dim) for i in range(depth)]
    with_experts = [name for name in tensors if name.endswith(".mlp.gate.weight")]
    mixer = MixerConfig(depth=0)
    if "patch_mixer.0.norm1.weight" in tensors:
        width = tensors["patch_mixer.0.norm1.weight"].shape[0]
        # All its blocks have one multiplier; experts tell it, the width of the others is rounded.
        block = next((name for name in with_experts if name.startswith("patch_mixer.")), "patch_mixer.0")
        qkv, ffn = multipliers(block.removesuffix(".mlp.gate.weight"), width)
        mixer = MixerConfig(
            depth=_depth(tensors, "patch_mixer"), dim=width, qkv_multiplier=qkv, ffn_multiplier=ffn
        )
    experts = ExpertsConfig(count=0)
    if with_experts:
        every = 1 + min(int(name.split(".")[1]) for name in with_experts)
        count = tensors[with_experts[0]].shape[0]
        experts = ExpertsConfig(count=count, capacity=MICRODIT_CAPACITY, every=every)
    return TransformerConfig(
        in_channels=in_channels,
        caption_dim=tensors["y_embedder.y_proj.fc1.weight"].shape[1],
        patch_size=patch_size,
        dim=dim,
        depth=depth,
        head_dim=_known(MICRODIT_HEAD_DIM, dim, "the backbone", where),
        qkv_multipliers=tuple(row[0] for row in rows),
        ffn_multipliers=tuple(row[1] for row in rows),
        ffn_multiple_of=MICRODIT_MULTIPLE_OF,
        mixer=mixer,
        experts=experts,
        bias="blocks.0.attn.qkv.bias" in tensors,
    )
