"""Shapes and the few tensor operations that everybody shares.

The legend of shape letters. A tensor of rank two or more ends in its letters (``tokens_BLD``).

=======  =====================================  =======  ==========================
B        batch                                  N        attention heads
C        channels                               P        width of one head
H W      height and width                       E        experts
L        image tokens (patches)                 R        tokens per expert
K        visible image tokens, K <= L           J        dropped image tokens, K + J = L
S        caption tokens                         F        hidden width of a feed-forward
D        model width                            G        values of one patch, C * patch**2
M        mixer width
=======  =====================================  =======  ==========================
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
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
    "complement",
    "gather_tokens",
    "masked_mean",
    "patchify",
    "replace_tokens",
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


def replace_tokens(
    tokens_BLD: Float[Tensor, "B L D"], index_BK: Int[Tensor, "B K"], new_BKD: Float[Tensor, "B K D"]
) -> Float[Tensor, "B L D"]:
    """The tokens with those at ``index_BK`` replaced by new ones."""
    places_BKD = index_BK[:, :, None].expand(-1, -1, tokens_BLD.shape[2])
    return tokens_BLD.scatter(1, places_BKD, new_BKD.to(tokens_BLD.dtype))


def complement(index_BK: Int[Tensor, "B K"], length: int) -> Int[Tensor, "B J"]:
    """The other J = length - K places of every sample, ascending."""
    seen_BL = torch.zeros(index_BK.shape[0], length, device=index_BK.device)
    seen_BL = seen_BL.scatter(1, index_BK, 1.0)
    return seen_BL.argsort(dim=1, stable=True)[:, : length - index_BK.shape[1]]


def visible_count(length: int, mask_ratio: float) -> int:
    """Patches that stay visible: ``int(L * (1 - ratio))`` in floating point, as released; at least one."""
    return max(1, int(length * (1 - mask_ratio)))


Pattern = Literal["random", "blocks", "stratified"]


def visible_from_noise(
    noise_BL: Float[Tensor, "B L"],
    mask_ratio: float,
    pattern: Pattern = "random",
    grid: tuple[int, int] | None = None,
    block: int = 2,
) -> Int[Tensor, "B K"] | None:
    """Indices of the patches that stay visible.

    ``random``: uniformly at random. ``blocks``: whole squares of patches stay or go together (one of them
    in part, where the number does not work out). ``stratified``: of every square as many stay as of any
    other, give or take one, at random places within it.

    Args:
        noise_BL: uniform noise, one number a patch.
        mask_ratio: share of patches to drop, 0 <= ratio < 1.
        pattern: which patches.
        grid: rows and columns of patches; needed for squares.
        block: side of the squares in patches.

    Returns:
        ``int(L * (1 - ratio))`` indices (at least one), for ``random`` the first of the noise's argsort, or
        ``None`` when the ratio is too small to drop a single patch.

    Raises:
        ValueError: if the ratio is outside [0, 1).

    Source: MicroDiT, arXiv 2407.15811, section 3 (uniform random patches; blocks in an ablation); released
    ``get_mask``. Stratified: SPRINT, arXiv 2510.21986 (structured sampling).
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask ratio is {mask_ratio}; it must be at least 0 and below 1")
    length = noise_BL.shape[1]
    keep = visible_count(length, mask_ratio)
    if keep >= length:
        return None
    if pattern != "random":
        assert grid is not None
        assert grid[0] * grid[1] == length, (grid, length)
        square_L, first_L = (index.to(noise_BL.device) for index in _squares(grid, block))
        if pattern == "blocks":
            noise_BL = noise_BL[:, first_L]  # all patches of a square share the noise of its first one
        else:
            same_LL = square_L[:, None] == square_L[None, :]
            smaller_BLL = noise_BL[:, None, :] < noise_BL[:, :, None]
            rank_BL = (smaller_BLL & same_LL).sum(dim=2)
            noise_BL = rank_BL + noise_BL
    return noise_BL.argsort(dim=1, stable=pattern == "blocks")[:, :keep]


@lru_cache(maxsize=32)
def _squares(grid: tuple[int, int], block: int) -> tuple[Int[Tensor, " L"], Int[Tensor, " L"]]:
    """The square that each patch lies in, and that square's first patch; border squares may be cut."""
    rows, columns = (torch.arange(side) for side in grid)
    wide = -(-grid[1] // block)
    square_LL = (rows // block)[:, None] * wide + (columns // block)[None, :]
    first_LL = (rows // block * block)[:, None] * grid[1] + (columns // block * block)[None, :]
    return square_LL.reshape(-1), first_LL.reshape(-1)


def masked_mean(
    values_BSD: Float[Tensor, "B S D"], mask_BS: Bool[Tensor, "B S"] | None
) -> Float[Tensor, "B D"]:
    """Mean over the positions where the mask is true (over all positions without a mask)."""
    if mask_BS is None:
        return values_BSD.mean(dim=1)
    weight_BS1 = mask_BS[:, :, None].to(values_BSD.dtype)
    return (values_BSD * weight_BS1).sum(dim=1) / weight_BS1.sum(dim=1).clamp(min=1)
