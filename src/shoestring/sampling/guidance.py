"""Guidance as a denoiser around a denoiser: away from a prediction that lacks the condition, or tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shoestring.config import SamplingConfig
from shoestring.interfaces import Conditioning, Denoised, Denoiser, NoiseLevel
from shoestring.runtime import UserError
from shoestring.tensors import Bool, Float, Int, Pattern, visible_from_noise


@dataclass(frozen=True)
class LeftOut:
    """What decides which tokens are left out; see :func:`shoestring.tensors.visible_from_noise`."""

    noise_BL: Float[Tensor, "B L"]
    """Uniform noise of every picture, the same at all steps."""
    pattern: Pattern = "random"
    grid: tuple[int, int] | None = None
    block: int = 2

    def visible(self, ratio: float) -> Tensor | None:
        """Tokens that stay when a share is left out; none at all for 1."""
        if ratio == 1:
            return torch.empty(len(self.noise_BL), 0, dtype=torch.long, device=self.noise_BL.device)
        return visible_from_noise(self.noise_BL, ratio, self.pattern, self.grid, self.block)


def check_guidance(sampling: SamplingConfig, predicts_all: bool) -> bool:
    """Whether tokens are to be left out while sampling.

    Args:
        sampling: what the weak prediction lacks, and the strong one.
        predicts_all: whether the network predicts also what it does not see.

    Returns:
        True if any prediction leaves out tokens.

    Raises:
        UserError: if so, and the network then predicts only part of the picture.
    """
    reduced = sampling.strong_ratio > 0 or sampling.weak != "condition"
    if sampling.weak == "tokens" and sampling.weak_ratio <= sampling.strong_ratio:
        raise UserError(
            f"sampling.weak_ratio is {sampling.weak_ratio} and sampling.strong_ratio is "
            f"{sampling.strong_ratio}; with weak=tokens the weak prediction must leave out more"
        )
    if reduced and not predicts_all:
        raise UserError(
            f"sampling.weak is {sampling.weak} and sampling.strong_ratio {sampling.strong_ratio}, but "
            "this model predicts only the tokens it sees; use weak=condition and strong_ratio=0 (tread, "
            "sprint and maskdit models can leave out tokens)"
        )
    return reduced


def _check_distilled(sampling: SamplingConfig, negative: Conditioning | None) -> None:
    """A model that takes the scale as an input has nothing else to be guided by."""
    for what, given in (
        ("a negative prompt is given", negative is not None),
        (f"sampling.weak is {sampling.weak}", sampling.weak != "condition"),
        ("sampling.guidance_interval is set", sampling.guidance_interval is not None),
    ):
        if given:
            raise UserError(
                f"{what}, but this model was distilled with guidance as an input and makes no second "
                "prediction; leave it out (sampling.guidance alone is heeded)"
            )


class GuidedDenoiser:
    """w + scale (s - w), where s is the strong prediction and w the weak one.

    By default the weak one lacks the condition (classifier-free guidance, arXiv 2207.12598). It may also, or
    instead, lack tokens: with TREAD two shares of routed tokens (sparse guidance, arXiv 2601.01608), with
    SPRINT the whole sparse path (path-drop guidance, arXiv 2510.21986: ``weak=both``, ``weak_ratio=1``).

    Scale 1 is the strong prediction alone, 0 the weak one alone: each costs one network call, and so does
    any scale where there is no condition to leave out. Other scales cost a call on a doubled batch, or,
    where the two see different tokens, two calls. Outside the interval the strong prediction is used (arXiv
    2404.07724).

    Args:
        denoiser: what to guide.
        sampling: scale, interval, what the weak prediction lacks.
        negative: captions to move away from; ``None`` = the empty condition.
        left_out: decides which tokens are left out where ``sampling`` asks for it.

    Raises:
        UserError: if tokens are to be left out and the network then predicts only part of the picture, or
            if there is something to move away from that the weak prediction has nothing to do with.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        sampling: SamplingConfig,
        negative: Conditioning | None = None,
        left_out: LeftOut | None = None,
    ) -> None:
        self.denoiser, self.negative = denoiser, negative
        self.scale, self.interval, self.weak = sampling.guidance, sampling.guidance_interval, sampling.weak
        self.predicts_all, self.patch_size = denoiser.predicts_all, denoiser.patch_size
        self.guidance_input = denoiser.guidance_input
        if denoiser.guidance_input:
            _check_distilled(sampling, negative)
        reduced = check_guidance(sampling, denoiser.predicts_all)
        if negative is not None and self.weak == "tokens":
            raise UserError(
                "a negative prompt is given, but sampling.weak=tokens moves away from fewer tokens and not "
                "from a prompt; leave it out, or set sampling.weak=condition or both"
            )
        self.strong_BK: Tensor | None = None
        self.weak_BK: Tensor | None = None
        if reduced:
            assert left_out is not None
            self.strong_BK = left_out.visible(sampling.strong_ratio)
            weak_ratio = sampling.strong_ratio if self.weak == "condition" else sampling.weak_ratio
            self.weak_BK = left_out.visible(weak_ratio)

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """Prepare the condition, the weak one and both together, once for the whole run."""
        if self.guidance_input:  # one call does it all
            scale_B = torch.full((len(conditioning),), self.scale, device=conditioning.device)
            strong = self.denoiser.prepare(replace(conditioning, guidance_B=scale_B))
            return replace(conditioning, prepared=(strong, None, None))
        strong = self.denoiser.prepare(conditioning)
        unconditional = conditioning.class_B is not None and bool((conditioning.class_B < 0).all())
        same = unconditional and self.weak == "condition" and self.negative is None
        if self.scale == 1 or same:
            return replace(conditioning, prepared=(strong, None, None))
        if self.weak == "tokens":
            return replace(conditioning, prepared=(strong, strong, None))
        negative = self.negative if self.negative is not None else conditioning.null()
        together = self.scale != 0 and self.weak == "condition"
        pair = self.denoiser.prepare(conditioning.cat(negative)) if together else None
        return replace(conditioning, prepared=(strong, self.denoiser.prepare(negative), pair))

    def __call__(
        self,
        xt: Float[Tensor, "B C H W"],
        level: NoiseLevel,
        conditioning: Conditioning,
        visible_BK: Int[Tensor, "B K"] | None = None,
        path_dropped_B: Bool[Tensor, " B"] | None = None,
    ) -> Denoised:
        """Guided estimate of x0; all samples share the noise level. Tokens are the guidance's business."""
        assert visible_BK is None, "which tokens are left out is decided by the sampling settings"
        assert path_dropped_B is None, "likewise"
        if conditioning.prepared is None:
            conditioning = self.prepare(conditioning)
        strong, weak, pair = conditioning.prepared
        ratio = float(level.sigma_B[0] / level.alpha_B[0].clamp(min=1e-12))
        outside = self.interval is not None and not self.interval[0] <= ratio <= self.interval[1]
        if self.scale == 1 or outside or weak is None:
            return self.denoiser(xt, level, strong, self.strong_BK)
        if self.scale == 0:
            return self.denoiser(xt, level, weak, self.weak_BK)
        if pair is not None:
            double = NoiseLevel(level.alpha_B.repeat(2), level.sigma_B.repeat(2))
            visible = None if self.strong_BK is None else self.strong_BK.repeat(2, 1)
            both = self.denoiser(torch.cat([xt, xt]), double, pair, visible)
            s, w = both.image().chunk(2)
        else:
            s = self.denoiser(xt, level, strong, self.strong_BK).image()
            w = self.denoiser(xt, level, weak, self.weak_BK).image()
        return Denoised.whole(w + self.scale * (s - w), self.patch_size)
