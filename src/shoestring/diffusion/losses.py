"""The training loss: weighted squared error of x0 over the visible patches, and MaskDiT's reconstruction."""

from __future__ import annotations

from torch import Tensor

from shoestring.config import TokensConfig
from shoestring.diffusion.process import Process, visible_tokens
from shoestring.interfaces import Conditioning, Denoised, Denoiser, NoiseLevel
from shoestring.tensors import Bool, Float, Int


def denoising_loss(
    process: Process,
    denoiser: Denoiser,
    x0: Float[Tensor, "B C H W"],
    noise: Float[Tensor, "B C H W"],
    level: NoiseLevel,
    conditioning: Conditioning,
    visible_BK: Int[Tensor, "B K"] | None = None,
    path_dropped_B: Bool[Tensor, " B"] | None = None,
    tokens: TokensConfig | None = None,
) -> Float[Tensor, " B"]:
    """Loss of each sample.

    L = weight(level) mean over patches and channels of (D(x0 alpha + noise sigma) - x0)^2. The patches are
    those that the denoiser counts as visible: after masking the kept ones, after token routing all of them.
    The released MicroDiT averages over channels, pools by patch and averages over kept patches: the same
    number, computed here on the kept patches only. MaskDiT adds its reconstruction of the dropped ones.

    Args:
        process: noise process.
        denoiser: estimates x0.
        x0: clean latents.
        noise: standard normal.
        level: noise level of each sample.
        conditioning: captions or classes.
        visible_BK: patches that the reduced part of the network sees; ``None`` = all.
        path_dropped_B: samples for which that part is left out (SPRINT).
        tokens: settings of the reconstruction; ``None`` = none.

    Returns:
        One number per sample; their mean is the loss of the batch.

    Source: MicroDiT, arXiv 2407.15811, equation 3; EDM, arXiv 2206.00364, equation 8; MaskDiT, arXiv
    2306.09305, equations 3 to 5.
    """
    xt = process.add_noise(x0, noise, level)
    denoised = denoiser(xt, level, conditioning, visible_BK, path_dropped_B)
    patch_size = denoised.patch_size
    squared = (denoised.x0_BKG - visible_tokens(x0, patch_size, denoised.visible_BK)).square()
    if tokens is None or denoised.dropped_x0_BJG is None or not denoised.dropped_x0_BJG.shape[1]:
        return process.weight(level) * squared.mean(dim=(1, 2))
    dropped = (denoised.dropped_x0_BJG - visible_tokens(x0, patch_size, denoised.dropped_BJ)).square()
    if tokens.score_dropped:
        count = squared[0].numel() + dropped[0].numel()
        error_B = (squared.sum(dim=(1, 2)) + dropped.sum(dim=(1, 2))) / count
    else:
        error_B = squared.mean(dim=(1, 2))
    loss_B = process.weight(level) * error_B
    if tokens.reconstruction:
        if tokens.reconstruction_target == "noisy":
            mae_B = noisy_reconstruction(denoised, xt)
        else:
            mae_B = dropped.mean(dim=(1, 2))
        loss_B = loss_B + tokens.reconstruction * mae_B
    return loss_B


def noisy_reconstruction(denoised: Denoised, xt: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """MaskDiT's reconstruction term as released, on the dropped patches.

    The target is the noisy input, each patch normalised by its own mean and standard deviation
    (sqrt(unbiased variance + 1e-6)). The prediction D itself contains a share of the noisy input and is not
    normalised; ``tokens.reconstruction_target=clean`` asks for the clean patches instead.

    Args:
        denoised: estimate with a reconstruction of the dropped patches.
        xt: the noisy input.

    Returns:
        Mean squared error over the dropped patches of each sample.

    Source: released MaskDiT, ``mae_loss``; patch normalisation after MAE, arXiv 2111.06377.
    """
    assert denoised.dropped_x0_BJG is not None
    target = visible_tokens(xt, denoised.patch_size, denoised.dropped_BJ)
    mean = target.mean(dim=-1, keepdim=True)
    variance = target.var(dim=-1, keepdim=True)
    normalised = (target - mean) / (variance + 1e-6).sqrt()
    return (denoised.dropped_x0_BJG - normalised).square().mean(dim=(1, 2))
