"""Retrieval: is the training picture nearest to a sample one of the sample's own caption?"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from shoestring.evaluation.moments import finite_rows
from shoestring.evaluation.uncertainty import wilson_interval
from shoestring.interfaces import FeatureExtractor
from shoestring.runtime import UserError
from shoestring.sampling.generate import PNG_KEY
from shoestring.tensors import Bool, UInt8

NEAR_COPY_RMS = 0.05


@dataclass(frozen=True)
class RetrievalResult:
    """How often a sample's nearest training pictures have its caption, and how many samples are copies.

    The intervals are Wilson's at 95 % over captions: the samples of one caption are not independent, so a
    caption counts as one trial, however many samples it has. The mean of a caption's samples varies less
    than a trial that is 0 or 1, so the intervals are rather too wide than too narrow.
    """

    n: int
    """Samples measured."""
    captions: int
    """Distinct captions among them."""
    training_pictures: int
    top1: float
    top5: float
    top1_interval95: tuple[float, float]
    top5_interval95: tuple[float, float]
    chance_top1: float
    """Expected top-1 if the training pictures were ranked at random."""
    chance_top5: float
    near_copies: int
    """Samples that are near-copies of a training picture: see :func:`near_copy_mask`."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Pictures of a folder that were not measured, counted by reason."""

    def metrics(self) -> dict[str, float]:
        """The flat entries of ``metrics.json``."""
        return {
            "retrieval_top1": self.top1,
            "retrieval_top1_low95": self.top1_interval95[0],
            "retrieval_top1_high95": self.top1_interval95[1],
            "retrieval_top5": self.top5,
            "retrieval_top5_low95": self.top5_interval95[0],
            "retrieval_top5_high95": self.top5_interval95[1],
            "retrieval_chance_top1": self.chance_top1,
            "retrieval_chance_top5": self.chance_top5,
            "retrieval_n": self.n,
            "retrieval_captions": self.captions,
            "retrieval_training_pictures": self.training_pictures,
            "retrieval_left_out": sum(self.left_out.values()),
            "near_copies": self.near_copies,
        }


def retrieval(
    samples_NF: ArrayLike | Tensor,
    captions_N: Sequence[int],
    training_MF: ArrayLike | Tensor,
    training_captions_M: Sequence[int],
    *,
    near_copies: int,
    left_out: Mapping[str, int] | None = None,
) -> RetrievalResult:
    """Measure retrieval: the share of samples with a picture of their caption among the nearest k.

    Near is the cosine of the features. A training picture of another caption that is exactly as near as
    the nearest of the own caption is put before it, so ties never help.

    Args:
        samples_NF: features of the samples.
        captions_N: index of each sample's caption.
        training_MF: features of the training pictures.
        training_captions_M: index of each training picture's caption; a caption may have several.
        near_copies: samples counted by :func:`near_copy_mask`, carried into the result.
        left_out: pictures that were not measured, by reason, carried into the result.

    Returns:
        The shares with their intervals and chance levels.

    Raises:
        ValueError: for no samples, features that are not finite or all zero, lengths or widths that
            disagree, or a sample whose caption has no training picture (it could never be right).

    Source: our own measure; the demo's figure of merit.
    """
    x_NF = _unit(samples_NF, "features of the samples")
    y_MF = _unit(training_MF, "features of the training pictures")
    if x_NF.shape[1] != y_MF.shape[1]:
        raise ValueError(f"features have {x_NF.shape[1]} and {y_MF.shape[1]} columns; they must agree")
    own_N, trained_M = torch.tensor(captions_N), torch.tensor(training_captions_M)
    if len(own_N) != len(x_NF) or len(trained_M) != len(y_MF):
        raise ValueError(
            f"{len(own_N)} and {len(trained_M)} captions for {len(x_NF)} samples and "
            f"{len(y_MF)} training pictures; each picture needs one"
        )
    same_NM = own_N[:, None] == trained_M[None, :]
    pictures_N = same_NM.sum(dim=1)
    if (pictures_N == 0).any():
        absent = sorted(set(own_N[pictures_N == 0].tolist()))
        raise ValueError(f"captions {absent[:5]} of the samples have no training picture; leave them out")
    cosine_NM = x_NF @ y_MF.T
    best_N = cosine_NM.masked_fill(~same_NM, -torch.inf).amax(dim=1)
    rank_N = ((cosine_NM >= best_N[:, None]) & ~same_NM).sum(dim=1)
    captions = len(own_N.unique())
    top1, top5 = ((rank_N < k).double().mean().item() for k in (1, 5))
    return RetrievalResult(
        n=len(own_N),
        captions=captions,
        training_pictures=len(y_MF),
        top1=top1,
        top5=top5,
        top1_interval95=wilson_interval(top1 * captions, captions),
        top5_interval95=wilson_interval(top5 * captions, captions),
        chance_top1=_chance(pictures_N, len(y_MF), 1),
        chance_top5=_chance(pictures_N, len(y_MF), 5),
        near_copies=near_copies,
        left_out=dict(left_out or {}),
    )


def near_copy_mask(
    samples: UInt8[Tensor, "N 3 H W"], training: UInt8[Tensor, "M 3 H W"], rms: float = NEAR_COPY_RMS
) -> Bool[Tensor, " N"]:
    """Which samples are near-copies of some training picture.

    A near-copy has a root mean square difference below 5 % of the range (13 of 255 levels) to a training
    picture, over all pixels and channels: to the eye the same file, slightly recompressed. For scale
    (measured on OpenMoji at 32 px): moving a picture by one pixel makes 13 to 24 %, and 4 % of the pictures
    that were *never* trained on are this near to a training picture, because some emoji are all but twins
    (flags, clocks, buttons). So give the count for held-out pictures beside the count for samples.

    Args:
        samples: pictures to judge.
        training: pictures that may have been copied.
        rms: the limit, as a share of the range.

    Returns:
        True for near-copies.

    Raises:
        ValueError: if the pictures differ in size.
    """
    if samples.shape[1:] != training.shape[1:]:
        raise ValueError(
            f"samples are {tuple(samples.shape[1:])} and training pictures {tuple(training.shape[1:])}; "
            "near-copies are judged at one size"
        )
    flat = training.flatten(1).float() / 255
    # Without matrix products, whose rounding swamps small distances.
    mode = "donot_use_mm_for_euclid_dist"
    nearest = [
        torch.cdist(chunk.flatten(1).float() / 255, flat, compute_mode=mode).amin(dim=1)
        for chunk in samples.split(256)
    ]
    return torch.cat(nearest) / flat.shape[1] ** 0.5 < rms


def retrieval_of_folder(
    samples_dir: Path,
    training: UInt8[Tensor, "M 3 H W"],
    training_captions: Sequence[str],
    extractor: FeatureExtractor,
) -> RetrievalResult:
    """Recompute the measure from a folder of samples whose PNG metadata holds their captions.

    Left out and counted: pictures without a caption in their metadata (a grid, say), and pictures of a
    caption that was never trained on.

    Args:
        samples_dir: folder with the PNGs that ``shoestring sample`` or ``shoestring eval`` wrote.
        training: the training pictures.
        training_captions: caption of each.
        extractor: what makes features of pictures.

    Returns:
        The measure.

    Raises:
        UserError: if the folder is absent or holds no sample of a trained caption, or if a picture is
            broken or of another size than the training pictures.
    """
    if not samples_dir.is_dir():
        raise UserError(f"{samples_dir} is not a folder; give the folder with the PNGs of the samples")
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(training_captions))}
    height, width = training.shape[2:]
    pictures: list[Tensor] = []
    captions: list[int] = []
    left_out: Counter[str] = Counter()
    for path in sorted(samples_dir.rglob("*.png")):
        caption, pixels = _read_sample(path, (width, height))
        if caption is None:
            left_out["no caption in the metadata"] += 1
        elif caption not in numbers:
            left_out["caption never trained on"] += 1
        else:
            pictures.append(pixels)
            captions.append(numbers[caption])
    if not pictures:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in left_out.items()) or "no PNG at all"
        raise UserError(f"{samples_dir} holds no sample of a trained caption ({reasons})")
    samples = torch.stack(pictures)
    return retrieval(
        extractor(samples),
        captions,
        extractor(training),
        [numbers[caption] for caption in training_captions],
        near_copies=int(near_copy_mask(samples, training).sum()),
        left_out=left_out,
    )


def _read_sample(path: Path, size: tuple[int, int]) -> tuple[str | None, Tensor]:
    """Caption (if the metadata has one) and pixels; only pictures with a caption are decoded."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            found = picture.size
            caption = _caption(picture.info.get(PNG_KEY))
            if caption is not None and found == size:
                return caption, torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a PNG ({error}); draw it again or remove it") from error
    if caption is not None:
        raise UserError(
            f"{path} is {found[0]} x {found[1]} and the training pictures are {size[0]} x {size[1]}; "
            "draw the samples at the size of training"
        )
    return None, torch.empty(0)


def _caption(text: Any) -> str | None:
    try:
        prompt = json.loads(text)["prompt"]
    except (TypeError, KeyError, ValueError):
        return None
    return prompt if isinstance(prompt, str) else None


def _unit(values: ArrayLike | Tensor, name: str) -> Tensor:
    rows_NF = finite_rows(values, name)
    norm_N1 = rows_NF.norm(dim=1, keepdim=True)
    if (norm_N1 == 0).any():
        raise ValueError(f"{name} have a row of zeros, which has no direction")
    return rows_NF / norm_N1


def _chance(pictures_N: Tensor, total: int, k: int) -> float:
    """Mean chance that k of ``total`` pictures, drawn at random, hold one of the caption's own."""
    missed_N = torch.ones(len(pictures_N), dtype=torch.float64)
    for drawn in range(min(k, total)):
        missed_N *= (total - drawn - pictures_N).clamp(min=0) / (total - drawn)
    return 1 - missed_N.mean().item()
