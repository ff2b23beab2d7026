"""Super-resolution's figures: every drawn picture beside the crop that it should be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shoestring.config import SuperResConfig
from shoestring.data.degradation import degrade, enlarged
from shoestring.evaluation.crops import Crops
from shoestring.evaluation.measures import Figure
from shoestring.evaluation.paired import feature_distance, psnr, ssim
from shoestring.evaluation.result import Result
from shoestring.sampling.generate import batches
from shoestring.studies.evaluate_networks import OWN, Networks
from shoestring.studies.evaluate_reference import Pictures, Reference

AT_ONCE = 64
Metric = Callable[[Pictures, Result], dict[str, Figure]]


class Paired:
    """Computes them.

    Args:
        crops: what the pictures should be.
        superres: how crops are made small.
        reference: keeps features.
        networks: of the evaluation.
    """

    def __init__(
        self, crops: Crops, superres: SuperResConfig, reference: Reference, networks: Networks
    ) -> None:
        self.crops, self.superres, self.reference, self.networks = crops, superres, reference, networks

    def metrics(self) -> dict[str, Metric]:
        """By the names that a protocol has for them."""
        return {"psnr": self._psnr, "ssim": self._ssim, "feature-distance": self._feature_distance}

    def _psnr(self, pictures: Pictures, result: Result) -> dict[str, Figure]:
        """With the crops, beside bicubic; and made small again by bicubic, with what was given."""
        again = []
        for part in batches(len(pictures), AT_ONCE):
            shrunk = [degrade(pictures[i], self.superres.factor, "bicubic", 0, i) for i in part]
            again.append(psnr(torch.stack(shrunk), self.crops.low(part, self.superres)))
        return self._beside_bicubic("psnr", pictures, psnr) | {"psnr_made_small": _mean(torch.cat(again))}

    def _ssim(self, pictures: Pictures, result: Result) -> dict[str, Figure]:
        return self._beside_bicubic("ssim", pictures, ssim)

    def _feature_distance(self, pictures: Pictures, result: Result) -> dict[str, Figure]:
        """On EfficientNet-Lite0: not LPIPS."""
        extractor = self.networks.extractor(OWN)
        real = self.reference.features(extractor, "crops", self.crops)[0]
        made = self.reference.features(extractor, "drawn", pictures)[0]
        parts = batches(len(pictures), AT_ONCE)
        baseline = torch.cat([extractor(self._bicubic(part)) for part in parts])
        return {
            "feature_distance": _mean(feature_distance(made, real)),
            "feature_distance_bicubic": _mean(feature_distance(baseline, real)),
        }

    def _beside_bicubic(
        self, name: str, pictures: Pictures, measure: Callable[[Tensor, Tensor], Tensor]
    ) -> dict[str, Figure]:
        made, baseline = [], []
        for part in batches(len(pictures), AT_ONCE):
            real = torch.stack([self.crops[i] for i in part])
            made.append(measure(torch.stack([pictures[i] for i in part]), real))
            baseline.append(measure(self._bicubic(part), real))
        return {name: _mean(torch.cat(made)), f"{name}_bicubic": _mean(torch.cat(baseline))}

    def _bicubic(self, numbers: Sequence[int]) -> Tensor:
        return enlarged(self.crops.low(numbers, self.superres), self.superres.factor)


def _mean(values_B: Tensor) -> Figure:
    """Over pictures, with the interval of the mean; infinite ones (equal pictures) count as the largest."""
    finite_B = values_B[values_B.isfinite()]
    if not len(finite_B):
        return Figure(float("inf"))
    values_B = values_B.clamp(max=finite_B.max().item())
    half = 1.96 * values_B.std().item() / len(values_B) ** 0.5 if len(values_B) > 1 else 0.0
    mean = values_B.mean().item()
    return Figure(mean, mean - half, mean + half, values_B.std().item() if len(values_B) > 1 else None)
