"""The networks that look at the pictures of an evaluation, each loaded once, and before anything is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch

from shoestring.evaluation.alignment import ClipTexts
from shoestring.evaluation.detection import COLOUR_CLASSIFIER, DETECTOR, ClipColours, Mask2FormerDetector
from shoestring.evaluation.extractor import Extractor
from shoestring.evaluation.features import build_extractor
from shoestring.evaluation.measures import MEASURES
from shoestring.evaluation.protocol import Protocol
from shoestring.evaluation.questions import JUDGES, Judge

OWN = "efficientnet-lite0"
"""The extractor that needs no download."""
CLIP_SCORE = "clip-vitl14"
"""Which CLIP gives the CLIPScore."""


class Networks:
    """Those that a protocol needs.

    Args:
        protocol: its metrics, and the places of weights.
        device: where they run.
    """

    def __init__(self, protocol: Protocol, device: torch.device) -> None:
        self._protocol, self._device, self._places = protocol, device, protocol.extractors
        self._extractors: dict[str, Extractor] = {}

    def load(self) -> None:
        """Load all that the metrics need: hours of drawing must not end in a missing file.

        Raises:
            UserError: if weights are missing or another network's, with what to put where.
        """
        others: Mapping[str, tuple[Callable[[], object], ...]] = {
            "retrieval": (lambda: self.extractor(OWN),),
            "nearest": (lambda: self.extractor(OWN),),
            "diversity": (lambda: self.extractor(OWN),),
            "clip-score": (lambda: self.extractor(CLIP_SCORE), lambda: self.clip_texts),
            "geneval": (lambda: self.detector, lambda: self.colours),
            "questions": (lambda: self.judge,),
        }
        for name in self._protocol.metrics:
            if name in MEASURES:
                self.extractor(MEASURES[name].extractor)
            for build in others.get(name, ()):
                build()

    def digests(self) -> dict[str, str]:
        """What identifies each network that was loaded, by name."""
        found = {name: extractor.identity.digest or "" for name, extractor in self._extractors.items()}
        others = {"clip_texts": "clip-texts", "detector": "detector", "colours": "colours", "judge": "judge"}
        loaded = {name: self.__dict__[field] for field, name in others.items() if field in self.__dict__}
        return found | {name: getattr(each, "digest", self._protocol.judge) for name, each in loaded.items()}

    def extractor(self, name: str) -> Extractor:
        """A feature extractor by name."""
        if name not in self._extractors:
            resize = self._protocol.resize if name == "inception" else None
            self._extractors[name] = build_extractor(name, self._places.get(name), self._device, resize)
        return self._extractors[name]

    @cached_property
    def clip_texts(self) -> ClipTexts:
        """The text tower beside the extractor of the CLIPScore."""
        return ClipTexts(CLIP_SCORE, self._places.get(CLIP_SCORE), self._device)

    @cached_property
    def detector(self) -> Mask2FormerDetector:
        """Finds GenEval's objects."""
        return Mask2FormerDetector(self._places.get("detector", DETECTOR), self._device)

    @cached_property
    def colours(self) -> ClipColours:
        """Names the colours of GenEval's objects."""
        return ClipColours(self._places.get("colours", COLOUR_CLASSIFIER), self._device)

    @cached_property
    def judge(self) -> Judge:
        """Answers questions."""
        return JUDGES[self._protocol.judge](self._places.get("judge"), self._device)
