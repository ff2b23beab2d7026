"""Classifier-free guidance as a denoiser around a denoiser. Source: arXiv 2207.12598."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from shoestring.interfaces import Conditioning, Denoised, Denoiser, NoiseLevel
from shoestring.tensors import Float, Int


class GuidedDenoiser:
    """u + scale (c - u), where c sees the caption and u the empty (or negative) one.

    Scale 1 is the caption alone, 0 the empty caption alone: each costs one network call, every other scale
    a call on a doubled batch. Outside the interval the caption alone is used (arXiv 2404.07724).

    Args:
        denoiser: what to guide.
        scale: any finite number.
        interval: guide only where sigma / alpha lies in [low, high]; ``None`` = everywhere.
        negative: captions to move away from; ``None`` = the empty caption.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scale: float,
        interval: tuple[float, float] | None = None,
        negative: Conditioning | None = None,
    ) -> None:
        self.denoiser, self.scale, self.interval, self.negative = denoiser, scale, interval, negative

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """Prepare the caption, the empty one and both together, once for the whole run."""
        negative = self.negative if self.negative is not None else conditioning.null()
        alone = self.denoiser.prepare(conditioning)
        if self.scale == 1:
            return replace(conditioning, prepared=(alone, None, None))
        pair = None if self.scale == 0 else self.denoiser.prepare(conditioning.cat(negative))
        return replace(conditioning, prepared=(alone, self.denoiser.prepare(negative), pair))

    def __call__(
        self,
        xt: Float[Tensor, "B C H W"],
        level: NoiseLevel,
        conditioning: Conditioning,
        visible_BK: Int[Tensor, "B K"] | None = None,
    ) -> Denoised:
        """Guided estimate of x0; all samples share the noise level."""
        if conditioning.prepared is None:
            conditioning = self.prepare(conditioning)
        alone, empty, pair = conditioning.prepared
        ratio = float(level.sigma_B[0] / level.alpha_B[0].clamp(min=1e-12))
        outside = self.interval is not None and not self.interval[0] <= ratio <= self.interval[1]
        if self.scale == 1 or outside:
            return self.denoiser(xt, level, alone, visible_BK)
        if self.scale == 0:
            return self.denoiser(xt, level, empty, visible_BK)
        double = NoiseLevel(level.alpha_B.repeat(2), level.sigma_B.repeat(2))
        visible_2BK = None if visible_BK is None else visible_BK.repeat(2, 1)
        both = self.denoiser(torch.cat([xt, xt]), double, pair, visible_2BK)
        c_BKG, u_BKG = both.x0_BKG.chunk(2)
        return replace(both, x0_BKG=u_BKG + self.scale * (c_BKG - u_BKG), visible_BK=visible_BK)
