"""Settings of what comes after pre-training: low-rank factors, a subject."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from shoestring.config.base import Frozen, Positive, setting


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
