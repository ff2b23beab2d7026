"""Everything that a figure depends on: what is drawn, how, and what it is compared with.

``coco30k``, ``imagenet50k``, ``ablation30k`` and ``div2k-sr`` are the published protocols of the papers that
this project is built on; ``demo``, ``quick``, ``shapes`` and ``superres`` need no download.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from shoestring.config import SamplingConfig, load_yaml
from shoestring.config.base import Frozen, setting
from shoestring.evaluation.features import EXTRACTORS
from shoestring.evaluation.questions import JudgeName
from shoestring.runtime import UserError

Metric = Literal[
    "fid",
    "sfid",
    "is",
    "precision-recall",
    "kid",
    "fid-infinity",
    "clip-fid",
    "fdd",
    "kdd",
    "fdd-vitb14",
    "kdd-vitb14",
    "cmmd",
    "fd-efflite0",
    "kid-efflite0",
    "precision-recall-efflite0",
    "fd-efflite0-infinity",
    "loss",
    "clip-score",
    "retrieval",
    "nearest",
    "diversity",
    "geneval",
    "shapeeval",
    "questions",
    "psnr",
    "ssim",
    "feature-distance",
]
PAIRED = ("psnr", "ssim", "feature-distance")
"""Of super-resolution: picture by picture, with what it should be."""
NOT_RESULTS = ("name", "micro_batch", "weights")
"""Settings that change rounding at most: results with others may be compared."""


class Protocol(Frozen):
    """How a model is evaluated."""

    name: str = setting("of the protocol; of its results too")
    prompts: Literal["training", "held-out", "classes", "file", "geneval", "shapes", "questions", "crops"] = (
        setting(
            "what is asked for: captions of the run's training or held-out pictures, its classes in equal "
            "numbers, a file with a prompt a line, the prompts of GenEval or ShapeEval, a file with "
            "questions, or (super-resolution) crops that are made small"
        )
    )
    crops_folder: str | None = setting(
        "crops: folder of whole pictures; null = the run's held-out pictures, not cropped", None
    )
    degradation: Literal["bicubic", "realesrgan"] | None = setting(
        "crops: how they are made small; null = as the model was trained", None
    )
    prompts_file: str | None = setting(
        "prompts=file, questions or geneval: the file; geneval, null: our own", None
    )
    judge: JudgeName = setting("questions: who answers; extractors.judge is the place of its weights", "vlm")
    most_prompts: int | None = setting("of many captions, the first so many; null = all", None, ge=1)
    count: int | None = setting("pictures; null = one of each prompt and seed", None, ge=1)
    seeds: tuple[int, ...] = setting(
        "a picture of each prompt for each; classes: one seed", (1,), min_length=1
    )
    weights: str = setting("file of the checkpoint: ema, weights or an average as power-0.1", "ema")
    sampling: SamplingConfig | None = setting("how pictures are drawn; null = as in the recipe", None)
    micro_batch: int = setting("pictures at once", 50, ge=1)
    metrics: tuple[Metric, ...] = setting("what is measured", min_length=1)
    reference: Literal["training", "held-out", "file", "crops", "none"] = setting(
        "real pictures that distances compare with: the run's own, statistics in a file, or the crops",
        "held-out",
    )
    reference_files: Mapping[str, str] = Field(
        default_factory=dict,
        description="reference=file: .npz of shoestring eval stats, ADM or clean-fid for each extractor",
    )
    resize: Literal["tensorflow-bilinear", "pillow-bicubic"] = setting(
        "fid, sfid, is, precision-recall: how pictures come to 299 px", "tensorflow-bilinear"
    )
    neighbours: int = setting("precision-recall: neighbours that a ball reaches to", 3, ge=1)
    loss_pictures: int = setting("loss: held-out pictures", 256, ge=1)
    bootstrap: int = setting("rounds of the bootstrap for intervals of distances; 0 = none", 0, ge=0)
    extractors: Mapping[str, str] = Field(
        default_factory=dict, description="places of weights by extractor, where they are not the usual ones"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.prompts == "file" and self.prompts_file is None:
            raise ValueError("prompts is file, but prompts_file is not set")
        if self.prompts == "questions" and self.prompts_file is None:
            raise ValueError("prompts is questions, but prompts_file is not set")
        if self.prompts_file is not None and self.prompts not in {"file", "geneval", "questions"}:
            raise ValueError(f"prompts_file is set, but prompts is {self.prompts}; nothing would read it")
        if (self.reference == "file") != bool(self.reference_files):
            raise ValueError("reference=file and reference_files need one another; set both or neither")
        for metric in ("geneval", "shapeeval", "questions"):
            wanted = {"shapeeval": "shapes"}.get(metric, metric)
            if metric in self.metrics and self.prompts != wanted:
                raise ValueError(f"metric {metric} needs prompts={wanted}, not {self.prompts}")
        for metric in PAIRED:
            if metric in self.metrics and self.prompts != "crops":
                raise ValueError(f"metric {metric} needs prompts=crops, not {self.prompts}")
        if self.prompts == "crops" and "loss" in self.metrics:
            raise ValueError("metric loss is not for prompts=crops; see the validation loss in the run's log")
        if self.reference == "crops" and self.prompts != "crops":
            raise ValueError(f"reference=crops needs prompts=crops, not {self.prompts}")
        if self.prompts == "crops" and len(self.seeds) > 1:
            raise ValueError(f"prompts=crops needs one seed, not {list(self.seeds)}; raise count instead")
        if "retrieval" in self.metrics and self.prompts != "training":
            raise ValueError(f"metric retrieval needs prompts=training, not {self.prompts}")
        for name, problem in self._unread():
            raise ValueError(f"{name} is set, but {problem}; nothing would read it")
        if self.bootstrap == 1:
            raise ValueError("bootstrap is 1; an interval needs two rounds or more, 0 computes none")
        if self.prompts == "classes" and len(self.seeds) > 1:
            raise ValueError(f"prompts=classes needs one seed, not {list(self.seeds)}; raise count instead")
        if "diversity" in self.metrics and len(self.seeds) < 2:
            raise ValueError(f"metric diversity needs two seeds or more, not {list(self.seeds)}")
        if "clip-score" in self.metrics and self.prompts == "classes":
            raise ValueError("metric clip-score needs captions, not prompts=classes")
        return self

    def _unread(self) -> list[tuple[str, str]]:
        """Settings that were changed although no metric or prompt looks at them."""
        looks = {
            "judge": "questions" in self.metrics,
            "neighbours": any(metric.startswith("precision-recall") for metric in self.metrics),
            "loss_pictures": "loss" in self.metrics,
        }
        usual = {name: field.default for name, field in type(self).model_fields.items()}
        found = [
            (name, f"metrics are {', '.join(self.metrics)}")
            for name, read in looks.items()
            if not read and getattr(self, name) != usual[name]
        ]
        found += [
            (name, f"prompts is {self.prompts}")
            for name in ("crops_folder", "degradation")
            if self.prompts != "crops" and getattr(self, name) != usual[name]
        ]
        if self.most_prompts is not None and self.prompts not in {"training", "held-out", "file"}:
            found.append(("most_prompts", f"prompts is {self.prompts}"))
        known = {*EXTRACTORS, "detector", "colours", "judge"}
        found += [
            (f"extractors.{name}", f"the names are {', '.join(sorted(known))}")
            for name in set(self.extractors) - known
        ]
        found += [
            (f"reference_files.{name}", f"the names are {', '.join(EXTRACTORS)}")
            for name in sorted(set(self.reference_files) - set(EXTRACTORS))
        ]
        return found


ADM_SUITE: tuple[Metric, ...] = ("fid", "sfid", "is", "precision-recall")
"""Precision and recall look at the pictures of ADM's reference batch, in the same file."""


def _coco(name: str) -> Protocol:
    """MicroDiT's: captions of COCO 2014 validation at 256 px. No source says which guidance it has."""
    return Protocol(
        name=name,
        prompts="file",
        prompts_file="coco2014-val-30k.txt",
        reference="file",
        reference_files={
            "inception": "coco2014-val-256.npz",
            "clip-vitb32": "coco2014-val-256-clip.npz",
        },
        metrics=("fid", "clip-fid", "clip-score"),
        sampling=SamplingConfig(sampler="heun", steps=18, guidance=1.5),
        resize="pillow-bicubic",
    )


def protocols() -> dict[str, Protocol]:
    """The protocols in the box, by name."""
    return {
        "quick": Protocol(
            name="quick",
            prompts="held-out",
            count=64,
            metrics=("kid-efflite0", "fd-efflite0"),
            micro_batch=32,
        ),
        "demo": Protocol(
            name="demo",
            prompts="training",
            most_prompts=2000,
            seeds=(1, 2),
            micro_batch=100,
            metrics=(
                *("retrieval", "kid-efflite0", "fd-efflite0", "precision-recall-efflite0"),
                *("loss", "nearest", "diversity"),
            ),
            bootstrap=100,
        ),
        "shapes": Protocol(name="shapes", prompts="shapes", metrics=("shapeeval",), reference="none"),
        "geneval": Protocol(
            name="geneval",
            prompts="geneval",
            seeds=(1, 2, 3, 4),
            metrics=("geneval",),
            reference="none",
        ),
        "dpg": Protocol(
            name="dpg",
            prompts="questions",
            prompts_file="dpg_bench.csv",
            seeds=(1, 2, 3, 4),
            metrics=("questions",),
            reference="none",
        ),
        "coco30k": _coco("coco30k"),
        "ablation30k": _coco("ablation30k"),
        "imagenet50k": Protocol(
            name="imagenet50k",
            prompts="classes",
            count=50_000,
            reference="file",
            reference_files={"inception": "VIRTUAL_imagenet256_labeled.npz"},
            metrics=ADM_SUITE,
            sampling=SamplingConfig(sampler="heun", steps=40, guidance=1.0),
        ),
        "div2k-sr": Protocol(
            name="div2k-sr",
            prompts="crops",
            crops_folder="DIV2K_valid_HR",
            degradation="realesrgan",
            count=3_000,
            reference="crops",
            metrics=("fid", "is", "psnr", "ssim", "feature-distance"),
            sampling=SamplingConfig(sampler="ddim", steps=50, guidance=1.0),
        ),
        "superres": Protocol(
            name="superres",
            prompts="crops",
            reference="crops",
            metrics=("fd-efflite0", "kid-efflite0", "psnr", "ssim", "feature-distance"),
        ),
    }


def find_protocol(name: str) -> Protocol:
    """A protocol of the box, or of a YAML file.

    Args:
        name: of one, or path of a file.

    Returns:
        The protocol.

    Raises:
        UserError: if there is none, or a setting is wrong.
    """
    known = protocols()
    if name in known:
        return known[name]
    if Path(name).suffix in {".yaml", ".yml"} or Path(name).exists():
        return load_yaml(name, Protocol)
    raise UserError(f"protocol is {name!r}; choose from {', '.join(known)}, or give a YAML file")


def differences(one: Mapping[str, Any], other: Mapping[str, Any], above: str = "") -> list[str]:
    """What keeps two results from being compared: settings and facts that differ.

    Args:
        one: settings and facts of a result, nested.
        other: those of another.
        above: name of the setting that both are values of.

    Returns:
        A phrase for each, ``sampling.guidance: 1.5 and 2``.
    """
    found = []
    for key in sorted({*one, *other}):
        a, b, name = one.get(key), other.get(key), f"{above}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name}: {a} and {b}")
    return found
