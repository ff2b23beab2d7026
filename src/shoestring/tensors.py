"""Shapes and the few tensor operations that everybody shares.

The legend of shape letters. A tensor of rank two or more ends in its letters (``tokens_BLD``).

=======  =====================================  =======  ==========================
B        batch                                  N        attention heads
C        channels                               P        width of one head
H W      height and width                       E        experts
L        image tokens (patches)                 R        tokens per expert
K        visible image tokens, K <= L           F        hidden width of a feed-forward
S        caption tokens                         G        values of one patch, C * patch**2
D        model width                            M        mixer width
=======  =====================================  =======  ==========================
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8
else:
    try:  # jaxtyping is a development tool: tests check shapes with it, users need not have it
        from jaxtyping import Bool, Float, Int, UInt8
    except ImportError:

        class _Unchecked:
            def __getitem__(self, item: tuple[Any, str]) -> Any:
                return item[0]

        Bool = Float = Int = UInt8 = _Unchecked()

__all__ = [
    "Bool",
    "Float",
    "Int",
    "UInt8",
    "gather_tokens",
    "masked_mean",
    "patchify",
    "scatter_tokens",
    "unpatchify",
    "visible_count",
    "visible_from_noise",
]


def patchify(x: Float[Tensor, "B C H W"], patch_size: int) -> Float[Tensor, "B L G"]:
    """Cut images into patch tokens, row by row.

    The values of one patch are ordered (row in patch, column in patch, channel), channel fastest:
    the layout of the released MicroDiT and MaskDiT outputs.

    Args:
        x: images or latents; H and W must be multiples of ``patch_size``.
        patch_size: side of a patch in pixels of ``x``.

    Returns:
        One row of G = C * patch_size**2 values for each patch.
    """
    b, c, h, w = x.shape
    p = patch_size
    patches = x.reshape(b, c, h // p, p, w // p, p)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(
    tokens_BLG: Float[Tensor, "B L G"], grid: tuple[int, int], patch_size: int
) -> Float[Tensor, "B C H W"]:
    """Put patch tokens back together: the inverse of :func:`patchify`.

    Args:
        tokens_BLG: patch values.
        grid: rows and columns of patches.
        patch_size: side of a patch.

    Returns:
        Images of ``grid[0] * patch_size`` by ``grid[1] * patch_size``.
    """
    b, _, g = tokens_BLG.shape
    rows, columns = grid
    p = patch_size
    c = g // (p * p)
    patches = tokens_BLG.reshape(b, rows, columns, p, p, c)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(b, c, rows * p, columns * p)


def gather_tokens(tokens_BLD: Float[Tensor, "B L D"], index_BK: Int[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
    """Take the tokens at ``index_BK`` of every sample, in that order."""
    return tokens_BLD.gather(1, index_BK[:, :, None].expand(-1, -1, tokens_BLD.shape[2]))


def scatter_tokens(
    tokens_BKD: Float[Tensor, "B K D"], index_BK: Int[Tensor, "B K"], length: int
) -> Float[Tensor, "B L D"]:
    """Put tokens back to their places among ``length``; the other places are zero."""
    b, _, d = tokens_BKD.shape
    full_BLD = tokens_BKD.new_zeros(b, length, d)
    return full_BLD.scatter(1, index_BK[:, :, None].expand(-1, -1, d), tokens_BKD)


def visible_count(length: int, mask_ratio: float) -> int:
    """Patches that stay visible: ``int(L * (1 - ratio))`` in floating point, as released; at least one."""
    return max(1, int(length * (1 - mask_ratio)))


def visible_from_noise(noise_BL: Float[Tensor, "B L"], mask_ratio: float) -> Int[Tensor, "B K"] | None:
    """Indices of the patches that stay visible under random masking.

    Args:
        noise_BL: uniform noise, one number a patch.
        mask_ratio: share of patches to drop, 0 <= ratio < 1.

    Returns:
        The first ``int(L * (1 - ratio))`` indices (at least one) of the noise's argsort, or ``None``
        when the ratio is too small to drop a single patch.

    Raises:
        ValueError: if the ratio is outside [0, 1).

    Source: MicroDiT, arXiv 2407.15811, section 3 (uniform random patches); released ``get_mask``.
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask ratio is {mask_ratio}; it must be at least 0 and below 1")
    length = noise_BL.shape[1]
    keep = visible_count(length, mask_ratio)
    if keep >= length:
        return None
    return noise_BL.argsort(dim=1)[:, :keep]


def masked_mean(
    values_BSD: Float[Tensor, "B S D"], mask_BS: Bool[Tensor, "B S"] | None
) -> Float[Tensor, "B D"]:
    """Mean over the positions where the mask is true (over all positions without a mask)."""
    if mask_BS is None:
        return values_BSD.mean(dim=1)
    weight_BS1 = mask_BS[:, :, None].to(values_BSD.dtype)
    return (values_BSD * weight_BS1).sum(dim=1) / weight_BS1.sum(dim=1).clamp(min=1)
