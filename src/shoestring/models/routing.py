"""Token reduction: the methods, one class each, and their table, one row each in ``METHODS``.

What a method is and what it may do stands in ``token_method.py``.
"""

from __future__ import annotations

import difflib

import torch
from torch import Tensor, nn

from shoestring.config import TokensConfig, TransformerConfig
from shoestring.models.token_method import Layers, Result, TokenMethod, Visible
from shoestring.runtime import UserError
from shoestring.tensors import gather_tokens, replace_tokens


class Dense(TokenMethod):
    """Nothing is dropped."""

    drops = False

    def forward(
        self, layers: Layers, x_BLD: Tensor, visible_BK: Visible, path_dropped_B: Tensor | None
    ) -> Result:
        """All blocks on all patches."""
        return layers.backbone(layers.mixer(x_BLD)), None


class Naive(TokenMethod):
    """Patches are dropped at the input: also the mixer, if there is one, sees the visible ones only."""

    def forward(
        self, layers: Layers, x_BLD: Tensor, visible_BK: Visible, path_dropped_B: Tensor | None
    ) -> Result:
        """All blocks on the visible patches."""
        if visible_BK is not None:
            x_BLD = gather_tokens(x_BLD, visible_BK)
        return layers.backbone(layers.mixer(x_BLD)), visible_BK


class Deferred(TokenMethod):
    """Deferred masking: the mixer sees all patches, the backbone the visible ones.

    Source: MicroDiT, arXiv 2407.15811, section 3.1.
    """

    def forward(
        self, layers: Layers, x_BLD: Tensor, visible_BK: Visible, path_dropped_B: Tensor | None
    ) -> Result:
        """Mixer, drop, backbone."""
        return layers.backbone(layers.mixer(x_BLD, visible_BK)), visible_BK


class MaskDiTMethod(TokenMethod):
    """Naive masking for the encoder; a small decoder sees all places, the dropped ones as a mask token.

    Source: MaskDiT, arXiv 2306.09305, section 3.
    """

    predicts_all = reconstructs = True

    def __init__(self, model: TransformerConfig, tokens: TokensConfig) -> None:
        super().__init__(model, tokens)
        if not model.decoder.depth:
            term = f" and tokens.reconstruction is {tokens.reconstruction}" if tokens.reconstruction else ""
            raise UserError(
                f"model.decoder.depth is 0{term}; tokens.method=maskdit needs a decoder, e.g. "
                "model.decoder.depth=8 (without one, use tokens.method=naive)"
            )

    def forward(
        self, layers: Layers, x_BLD: Tensor, visible_BK: Visible, path_dropped_B: Tensor | None
    ) -> Result:
        """Encoder on the visible patches, decoder on all places."""
        if visible_BK is not None:
            x_BLD = gather_tokens(x_BLD, visible_BK)
        return layers.decoder(layers.backbone(layers.mixer(x_BLD)), visible_BK), None


class _Middle(TokenMethod):
    """Methods in which the blocks from ``first`` to ``last`` see fewer patches and all are predicted."""

    predicts_all = True

    def __init__(self, model: TransformerConfig, tokens: TokensConfig) -> None:
        super().__init__(model, tokens)
        last = tokens.last + model.depth if tokens.last < 0 else tokens.last
        if not 0 <= tokens.first < last <= model.depth:
            raise UserError(
                f"tokens.first is {tokens.first} and tokens.last is {tokens.last}; tokens.method="
                f"{tokens.method} needs 0 <= first < last <= {model.depth} (model.depth; negative values of "
                "last count from the end)"
            )
        self.first, self.last = tokens.first, last


class Tread(_Middle):
    """Token routing: the other patches skip the middle blocks and rejoin unchanged; the loss sees all.

    Source: TREAD, arXiv 2501.04765, section 3.
    """

    def forward(
        self, layers: Layers, x_BLD: Tensor, visible_BK: Visible, path_dropped_B: Tensor | None
    ) -> Result:
        """Blocks before, middle blocks on the visible patches, blocks after."""
        x_BLD = layers.backbone(layers.mixer(x_BLD), 0, self.first)
        if visible_BK is None:
            return layers.backbone(x_BLD, self.first), None
        if visible_BK.shape[1]:
            routed = layers.backbone(gather_tokens(x_BLD, visible_BK), self.first, self.last)
            x_BLD = replace_tokens(x_BLD, visible_BK, routed)
        return layers.backbone(x_BLD, self.last), None


class Sprint(_Middle):
    """Sparse-dense residual fusion: what the first blocks made of all patches is fused, by a linear map,
    with what the middle blocks made of some; a mask token stands in for the others.

    In training the sparse path is left out of some samples altogether, so that the model without it can
    guide the whole one (path-drop guidance).

    Source: SPRINT, arXiv 2510.21986, section 3.
    """

    drops_paths = True

    def __init__(self, model: TransformerConfig, tokens: TokensConfig) -> None:
        super().__init__(model, tokens)
        if self.first == 0 or self.last == model.depth:
            raise UserError(
                f"tokens.first is {tokens.first} and tokens.last is {tokens.last}; tokens.method=sprint "
                f"needs dense blocks before and after the sparse ones: first >= 1 and last < {model.depth}"
            )
        self.dim = model.dim
        self.mask_token = nn.Parameter(torch.empty(1, 1, model.dim))
        self.fusion = nn.Linear(2 * model.dim, model.dim)

    def forward(
        self, layers: Layers, x_BLD: Tensor, visible_BK: Visible, path_dropped_B: Tensor | None
    ) -> Result:
        """Dense path, sparse path, fusion, last blocks."""
        dense_BLD = layers.backbone(layers.mixer(x_BLD), 0, self.first)
        absent_BLD = self.mask_token.to(dense_BLD.dtype).expand(*dense_BLD.shape[:2], -1)
        if visible_BK is None:
            deep_BLD = layers.backbone(dense_BLD, self.first, self.last)
        elif visible_BK.shape[1]:
            sparse = layers.backbone(gather_tokens(dense_BLD, visible_BK), self.first, self.last)
            deep_BLD = replace_tokens(absent_BLD, visible_BK, sparse)
        else:
            deep_BLD = absent_BLD
        if path_dropped_B is not None:
            deep_BLD = torch.where(path_dropped_B[:, None, None], absent_BLD, deep_BLD)
        fused_BLD = self.fusion(torch.cat([dense_BLD, deep_BLD.to(dense_BLD.dtype)], dim=-1))
        return layers.backbone(fused_BLD, self.last), None

    def extra_macs(self, length: int) -> int:
        """The fusion."""
        return length * 2 * self.dim * self.dim


METHODS: dict[str, type[TokenMethod]] = {
    "dense": Dense,
    "naive": Naive,
    "deferred": Deferred,
    "maskdit": MaskDiTMethod,
    "tread": Tread,
    "sprint": Sprint,
}


def method_class(tokens: TokensConfig) -> type[TokenMethod]:
    """The class of a method by its name.

    Args:
        tokens: the settings.

    Returns:
        The class, not yet built.

    Raises:
        UserError: if there is no method of that name.
    """
    if tokens.method not in METHODS:
        near = difflib.get_close_matches(tokens.method, METHODS, n=1)
        raise UserError(
            f"tokens.method is {tokens.method!r}; it must be one of {', '.join(METHODS)}"
            + (f" (did you mean {near[0]}?)" if near else "")
        )
    return METHODS[tokens.method]


def build_method(model: TransformerConfig, tokens: TokensConfig) -> TokenMethod:
    """The configured method.

    Args:
        model: the network.
        tokens: the settings.

    Returns:
        The method, its own weights (if any) not yet drawn.

    Raises:
        UserError: if the name is unknown or the settings do not fit the network.
    """
    return method_class(tokens)(model, tokens)
