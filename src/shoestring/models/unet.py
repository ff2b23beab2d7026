"""The U-Net of the LDM scaling study: Stable Diffusion's, of any width, as diffusers builds it.

Eleven members with base channels 64 to 768 have 39 million to 5 billion parameters (text width 1024, linear
projections). Resolutions c, 2c, 4c, 4c, two ResNet blocks each; attention to itself and to the caption at all
but the coarsest.

Source: arXiv 2404.01367, table 1; architecture: arXiv 2112.10752.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from shoestring.config import TokensConfig, UNetConfig
from shoestring.interfaces import Conditioning, NetworkOutput
from shoestring.models.attention import attend
from shoestring.models.guidance import GuidanceEmbedding, guidance_features
from shoestring.models.layers import ClassEmbedding
from shoestring.models.network import BaseNetwork
from shoestring.runtime import UserError
from shoestring.tensors import Bool, Float, Int, patchify, unpatchify

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


class Attend:
    """Our attention inside diffusers' blocks: the form that is fast on the device at hand."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention of the tokens ``B L D`` to themselves, or to a caption ``B S D`` with bias ``B 1 S``."""
        keyed = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def heads(x_BLD: Tensor) -> Tensor:
            return x_BLD.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query, key, value = attn.to_q(hidden_states), attn.to_k(keyed), attn.to_v(keyed)
        mask_BS = None if attention_mask is None else attention_mask[:, 0] > -1
        out = attend(heads(query), heads(key), heads(value), mask_BS, "auto")
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class InputConvolution(nn.Conv2d):
    """The first convolution, and another for a small picture in further channels."""

    def __init__(self, first: nn.Conv2d, image_values: int) -> None:
        super().__init__(first.in_channels, first.out_channels, 3, padding=1)
        self.image = nn.Conv2d(image_values, first.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both."""
        values = self.in_channels
        return super().forward(x[:, :values]) + self.image(x[:, values:])


class UNet(BaseNetwork):
    """See :class:`shoestring.interfaces.Network` for the seam.

    A class is shown as a caption of two tokens, zero and its row of a table: with one alone, attention would
    have nothing to choose from, and its queries and keys nothing to learn. No condition is a single class.

    Args:
        config: channels and switches.
        tokens: the token method, which must be dense: convolutions need all places.

    Raises:
        UserError: if the method drops tokens.
    """

    config: UNetConfig

    def __init__(self, config: UNetConfig, tokens: TokensConfig | None = None) -> None:
        try:
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
        except ImportError as error:
            raise UserError(
                "model.kind=unet needs the package diffusers; run: pip install 'shoestring[latents]'"
            ) from error
        super().__init__(config, tokens if tokens is not None else TokensConfig(method="dense"))
        if self.tokens.method != "dense":
            raise UserError(
                f"tokens.method is {self.tokens.method}, but model.kind=unet needs all places; set dense"
            )
        self.y_embedder: ClassEmbedding | None = None
        if config.condition != "text":
            classes = config.classes if config.condition == "class" else 1
            self.y_embedder = ClassEmbedding(classes, config.caption_dim)
        values = config.in_channels * config.patch_size**2
        with_attention = config.attention
        self.unet = UNet2DConditionModel(
            in_channels=values,
            out_channels=values,
            block_out_channels=config.widths,
            down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in with_attention),
            up_block_types=tuple(
                "CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(with_attention)
            ),
            layers_per_block=config.layers,
            transformer_layers_per_block=config.attention_depth,
            cross_attention_dim=config.caption_dim,
            attention_head_dim=tuple(config.heads_of(width) for width in config.widths),  # heads, in truth
            use_linear_projection=True,
            norm_num_groups=config.norm_groups,
            time_cond_proj_dim=GuidanceEmbedding.FEATURES if config.guidance_input else None,
        )
        if config.image_channels:
            self.unet.conv_in = InputConvolution(
                self.unet.conv_in, config.image_channels * config.patch_size**2
            )
        self.unet.set_attn_processor(Attend())
        if config.checkpoint_activations:
            self.unet.enable_gradient_checkpointing()

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw every parameter anew.

        Maps and convolutions as torch does (uniform, 1/sqrt(inputs)); the last map of every residual branch
        and of the whole zero, as in the latent diffusion models' own code.
        """
        from diffusers.models.resnet import ResnetBlock2D
        from diffusers.models.transformers.transformer_2d import Transformer2DModel

        for module in self.unet.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                bound = 1 / math.sqrt(module.weight[0].numel())
                module.weight.uniform_(-bound, bound, generator=generator)
                if module.bias is not None:
                    module.bias.uniform_(-bound, bound, generator=generator)
            elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        last: list[nn.Module] = [self.unet.conv_out]
        if isinstance(self.unet.conv_in, InputConvolution):  # the small picture has no say at first
            last.append(self.unet.conv_in.image)
        if self.config.guidance_input:  # likewise
            last.append(self.unet.time_embedding.cond_proj)
        last += [m.conv2 for m in self.unet.modules() if isinstance(m, ResnetBlock2D)]
        last += [m.proj_out for m in self.unet.modules() if isinstance(m, Transformer2DModel)]
        for module in last:
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=1.0, generator=generator)

    def all_blocks(self) -> list[nn.Module]:
        """The stacks of every resolution."""
        return [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks]

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """Make the caption's tokens once."""
        return replace(conditioning, prepared=self._caption(conditioning))

    def _caption(self, conditioning: Conditioning) -> tuple[Tensor, Tensor | None]:
        if self.config.condition == "text":
            assert conditioning.text_BSD is not None, "a text-conditional network needs captions"
            return conditioning.text_BSD, conditioning.text_mask_BS if self.config.mask_captions else None
        assert self.y_embedder is not None
        assert conditioning.class_B is not None, "a class-conditional network needs classes"
        only = self.config.condition == "none"
        rows_BD = self.y_embedder(torch.zeros_like(conditioning.class_B) if only else conditioning.class_B)
        return torch.stack([torch.zeros_like(rows_BD), rows_BD], dim=1), None

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
            time_B: noise coordinate of the process.
            conditioning: captions or classes, raw or from :meth:`prepare`.
            visible_BK: must be ``None``.
            path_dropped_B: must be ``None``.

        Returns:
            Values of all places.
        """
        assert visible_BK is None, "a U-Net sees all places"
        assert path_dropped_B is None, "likewise"
        side = self.patch_size
        grid = (x.shape[2] // side, x.shape[3] // side)
        if side > 1:
            x = unpatchify(patchify(x, side), grid, 1)
        if self.config.image_channels:
            assert conditioning.image is not None, "a super-resolution network needs small pictures"
            x = torch.cat([x, unpatchify(patchify(conditioning.image, side), grid, 1)], dim=1)
        y_BSD, mask_BS = (
            conditioning.prepared if conditioning.prepared is not None else self._caption(conditioning)
        )
        scale_BF = None
        if self.config.guidance_input:
            scale_BF = guidance_features(conditioning.guidance_B, x)
        out = self.unet(
            x,
            time_B,
            y_BSD.to(x.dtype),
            timestep_cond=scale_BF,
            encoder_attention_mask=mask_BS,
            return_dict=False,
        )[0]
        return NetworkOutput(patchify(out, 1))
