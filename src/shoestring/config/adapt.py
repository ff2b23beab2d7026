"""Settings of runs that go on from a trained model: super-resolution, distillation, factors, a subject."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from shoestring.config.base import Frozen, Positive, setting


class SuperResConfig(Frozen):
    """A run that learns to enlarge pictures; see ``shoestring adapt superres``."""

    factor: Literal[2, 4, 8] = setting("how many times", 4)
    degradation: Literal["bicubic", "realesrgan"] = setting(
        "how pictures are made small: resized, or as cameras and the web do (Real-ESRGAN's two rounds)",
        "realesrgan",
    )
    noise: float = setting(
        "noise added to the small picture while training, at most (share of the latents' deviation)",
        0.1,
        ge=0,
        le=2,
    )


class DistillConfig(Frozen):
    """A run that learns from a teacher; see ``shoestring adapt distill`` and docs/adapt.md.

    consistency: from any noise to where the teacher's path ends (arXiv 2303.01469). codi: the same in the
    noise, with steps of the model itself and a pull towards the data (arXiv 2310.01407). guided: the
    teacher's guided estimate in one pass (arXiv 2210.03142). progressive: two steps of the teacher in one
    (arXiv 2202.00512).
    """

    method: Literal["consistency", "codi", "guided", "progressive"] = setting(
        "which; see docs/adapt.md", "consistency"
    )
    teacher: str = setting("run folder, checkpoint folder or model file", min_length=1)
    guidance: tuple[float, float] = setting(
        "scales of guidance folded in: one number twice, or a range that model.guidance_input makes an input",
        (2.0, 2.0),
    )
    steps: int = setting(
        "noise levels: of the path (consistency, codi), of the student (progressive); guided has none",
        18,
        ge=1,
        le=1000,
    )
    solver: Literal["euler", "heun"] = setting("consistency: how the teacher makes a step", "heun")
    target: Literal["ema", "student"] = setting(
        "consistency, codi: who estimates at the less noisy end, the weight average or the model itself",
        "ema",
    )
    huber: float = setting(
        "consistency, codi: c of the pseudo-Huber distance of a value; 0 = squared",
        0.001,
        ge=0,
    )
    data_weight: float = setting("codi: weight of the distance to the data", 0.0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        low, high = self.guidance
        if not 0 <= low <= high:
            raise ValueError(
                f"guidance is {list(self.guidance)}; it must be [low, high] with 0 <= low <= high"
            )
        if self.method == "codi" and (low, high) != (1, 1):
            raise ValueError(
                f"guidance is {[low, high]}, but method=codi has no teacher to guide; set it to [1, 1] and "
                "sampling.guidance to what is wanted"
            )
        if self.data_weight and self.method != "codi":
            raise ValueError(f"data_weight is {self.data_weight:g}, but method={self.method} has none; set 0")
        if self.solver != "heun" and self.method != "consistency":
            raise ValueError(f"solver is {self.solver}, but only method=consistency reads it; set it to heun")
        if self.method in ("consistency", "codi") and self.steps < 2:
            raise ValueError(f"steps is {self.steps}; a path needs 2 noise levels or more")
        return self


class LoRAConfig(Frozen):
    """Low-rank factors beside the linear maps of a network whose own weights stay as they are."""

    rank: int = setting("rank of the factors, at most the width of each map", 8, ge=1)
    alpha: Positive | None = setting("their product counts alpha / rank times; null = rank", None)
    targets: tuple[str, ...] = setting(
        "names of linear maps, with * and ?; by default those of every attention", ("*attn*",), min_length=1
    )


class DreamBoothConfig(Frozen):
    """A run that learns a subject; see ``shoestring adapt dreambooth``."""

    token: str = setting("the word that means the subject", min_length=1)
    class_words: str = setting("what kind of thing it is, e.g. cat", min_length=1)
    template: str = setting("caption of a picture; {} is the subject, or its class alone", "a {}")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.template.count("{}") != 1 or self.template.replace("{}", "").count("{"):
            raise ValueError(
                f"template is {self.template!r}; it must hold {{}} once, as in 'a photo of a {{}}'"
            )
        return self

    @property
    def subject_prompt(self) -> str:
        """The caption of the subject's pictures."""
        return self.template.replace("{}", f"{self.token} {self.class_words}")

    @property
    def class_prompt(self) -> str:
        """The caption of pictures of the class."""
        return self.template.replace("{}", self.class_words)
