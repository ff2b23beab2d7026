"""The training loss: weighted squared error of x0 over the visible patches."""

from __future__ import annotations

from torch import Tensor

from shoestring.diffusion.process import Process, visible_tokens
from shoestring.interfaces import Conditioning, Denoiser, NoiseLevel
from shoestring.tensors import Float, Int


def denoising_loss(
    process: Process,
    denoiser: Denoiser,
    x0: Float[Tensor, "B C H W"],
    noise: Float[Tensor, "B C H W"],
    level: NoiseLevel,
    conditioning: Conditioning,
    visible_BK: Int[Tensor, "B K"] | None = None,
) -> Float[Tensor, " B"]:
    """Loss of each sample.

    L = weight(level) mean over visible patches and channels of (D(x0 alpha + noise sigma) - x0)^2. The
    released MicroDiT averages over channels, pools by patch and averages over kept patches: the same
    number, computed here on the kept patches only.

    Args:
        process: noise process.
        denoiser: estimates x0.
        x0: clean latents.
        noise: standard normal.
        level: noise level of each sample.
        conditioning: captions.
        visible_BK: patches that are seen and scored; ``None`` = all.

    Returns:
        One number per sample; their mean is the loss of the batch.

    Source: MicroDiT, arXiv 2407.15811, equation 3; EDM, arXiv 2206.00364, equation 8.
    """
    xt = process.add_noise(x0, noise, level)
    denoised = denoiser(xt, level, conditioning, visible_BK)
    target_BKG = visible_tokens(x0, denoised.patch_size, visible_BK)
    error_B = (denoised.x0_BKG - target_BKG).square().mean(dim=(1, 2))
    return process.weight(level) * error_B
