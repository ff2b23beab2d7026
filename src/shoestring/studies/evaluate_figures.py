"""The figures of an evaluation whose pictures are all there."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from shoestring import __version__
from shoestring.data.records import CaptionedImages
from shoestring.evaluation.alignment import ClipTexts, clip_scores
from shoestring.evaluation.detection import COLOUR_CLASSIFIER, DETECTOR, ClipColours, Mask2FormerDetector
from shoestring.evaluation.digests import file_digest, pictures_digest
from shoestring.evaluation.distances import frechet_distance, kernel_distance
from shoestring.evaluation.drawing import DrawnPictures
from shoestring.evaluation.extractor import Extractor, kept_outputs
from shoestring.evaluation.features import build_extractor
from shoestring.evaluation.geneval import Prompt, judge, score
from shoestring.evaluation.measures import (
    MEASURES,
    Compared,
    Figure,
    Measure,
    check_enough,
    check_not_degenerate,
)
from shoestring.evaluation.moments import Moments, has_pictures, read_moments, read_reference_pictures
from shoestring.evaluation.neighbours import diversity, nearest_training
from shoestring.evaluation.questions import JUDGES, score_questions
from shoestring.evaluation.result import Result, in_words, markdown
from shoestring.evaluation.retrieval import near_copy_mask, retrieval
from shoestring.evaluation.shapeeval import shows
from shoestring.evaluation.validation import loss_of_pictures
from shoestring.runtime import UserError, say, write_text
from shoestring.studies.evaluate import Evaluation

Pictures = Sequence[Tensor] | Tensor
"""uint8 ``3 H W`` each; a sequence may read them from files."""
PACKAGES = ("torch", "numpy", "Pillow", "transformers")
FLOORS = ("fid", "fdd", "kdd", "fd-efflite0", "kid-efflite0")
"""Metrics whose value for real pictures is said too."""
CLIP_SCORE = "clip-vitl14"
"""Which CLIP gives the CLIPScore."""


class Measuring:
    """Computes what the protocol of an evaluation asks for.

    Args:
        evaluation: its pictures are drawn.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self.protocol, self.device, self.console = evaluation.protocol, evaluation.device, evaluation.console
        self.folder, self.asked, self.splits = evaluation.folder, evaluation.asked, evaluation.splits
        self.facts, self.model, self.pipeline = evaluation.facts, evaluation.model, evaluation.pipeline

    def measure(self) -> Result:
        """All metrics of the protocol, on pictures that are all there.

        Returns:
            The result, written to the folder too.

        Raises:
            UserError: if a metric cannot be computed.
        """
        began = time.monotonic()
        pictures = DrawnPictures(self.folder / "pictures", self.asked.wanted)
        result = Result(self.protocol, self.facts, self.model)
        for name in self.protocol.metrics:
            if name in MEASURES:
                result.figures |= self._distance(name, pictures, result)
        others: dict[str, Callable[[Pictures, Result], dict[str, Figure]]] = {
            "loss": self._loss,
            "retrieval": self._retrieval,
            "nearest": self._nearest,
            "diversity": self._diversity,
            "clip-score": self._clip_score,
            "geneval": self._geneval,
            "shapeeval": self._shapes,
            "questions": self._questions,
        }
        for kind, measure in others.items():
            if kind in self.protocol.metrics:
                result.figures |= measure(pictures, result)
        result.made = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "shoestring": __version__,
            "python": platform.python_version(),
            "device": str(self.device),
            "seconds_of_measuring": round(time.monotonic() - began, 1),
            **{name: _version(name) for name in PACKAGES},
        }
        write_text(self.folder / "result.json", result.as_json())
        write_text(self.folder / "row.md", markdown(result))
        return result

    def _extractor(self, measure: Measure) -> Extractor:
        name = measure.extractor
        resize = self.protocol.resize if name == "inception" else None
        return build_extractor(name, self.protocol.extractors.get(name), self.device, resize)

    def _features(self, extractor: Extractor, what: str, pictures: Pictures) -> tuple[Tensor, ...]:
        """Outputs of an extractor, kept in a file."""
        with self.console.status(f"Looking at {len(pictures):,} {what} pictures with {extractor.name}"):
            return kept_outputs(extractor, pictures, self.folder.parent / "features", what)

    def _distance(self, name: str, pictures: Pictures, result: Result) -> dict[str, Figure]:
        measure = MEASURES[name]
        extractor = self._extractor(measure)
        self.facts.setdefault("extractors", {})[extractor.name] = extractor.identity.digest
        made = self._features(extractor, "drawn", pictures)[measure.output]
        warning = check_not_degenerate(made, "pictures drawn")
        if warning is not None and warning not in result.warnings:
            result.warnings.append(warning)
        if not measure.compares:
            check_enough(name, len(made), None)
            return measure.compute(Compared(made, None))
        real = self._real(extractor, measure)
        check_enough(name, len(made), real)
        given = Compared(made, real, self.protocol.neighbours, self.protocol.bootstrap, result.curves)
        return measure.compute(given) | self._floor(name, extractor, measure, len(made))

    def _real(self, extractor: Extractor, measure: Measure) -> Tensor | Moments:
        if self.protocol.reference == "file":
            assert self.protocol.reference_file is not None
            file = Path(self.protocol.reference_file)
            self.facts["reference"] = {"file": file_digest(file) if file.exists() else None}
            if measure.rows and has_pictures(file):
                return self._features(extractor, "reference", read_reference_pictures(file))[measure.output]
            moments = read_moments(file, spatial=measure.output == 1)
            widths = (len(moments.mean_F), extractor.width if measure.output == 0 else None)
            if widths[1] is not None and widths[0] != widths[1]:
                raise UserError(
                    f"{self.protocol.reference_file} holds statistics of {widths[0]} features, and "
                    f"{extractor.name} gives {widths[1]}; they are of another extractor"
                )
            made_by = moments.made.get("extractor")
            if made_by is not None and made_by != extractor.identity.digest:
                raise UserError(
                    f"{self.protocol.reference_file} was made with another extractor or resize than "
                    f"{extractor.name}, {extractor.resize}; make it anew with shoestring eval stats"
                )
            return moments
        pictures = self._real_pictures().images
        self.facts["reference"] = {"pictures": len(pictures), "digest": pictures_digest(pictures)}
        return self._features(extractor, self.protocol.reference, pictures)[measure.output]

    def _real_pictures(self) -> CaptionedImages:
        if self.protocol.reference == "none":
            raise UserError(
                f"protocol {self.protocol.name}: its metrics compare with real pictures, reference is none"
            )
        found = self.splits().train if self.protocol.reference == "training" else self.splits().held_out
        if len(found) < 2:
            raise UserError(
                f"protocol {self.protocol.name}: reference={self.protocol.reference} has {len(found)} "
                "pictures; at least 2 are needed (data.held_out keeps some out of training)"
            )
        return found

    def _floor(self, name: str, extractor: Extractor, measure: Measure, count: int) -> dict[str, Figure]:
        """The distance of as many training pictures from held-out ones: what a perfect model would get."""
        if self.protocol.reference != "held-out" or name not in FLOORS:
            return {}
        training = self.splits().train.images
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))[:count]
        self.facts["floor"] = {"pictures": len(order)}
        real = self._features(extractor, "training", training[order])[measure.output]
        held = self._features(extractor, "held-out", self._real_pictures().images)[measure.output]
        kernel = "kid" in name or "kdd" in name
        value = kernel_distance(real, held).mean if kernel else frechet_distance(real, held)
        return {f"{name.replace('-', '_')}_floor": Figure(value)}

    def _loss(self, pictures: Pictures, result: Result) -> dict[str, Figure]:
        """On held-out pictures, all patches, noise that is always the same."""
        held = self.splits().held_out.select(
            range(min(self.protocol.loss_pictures, len(self.splits().held_out)))
        )
        if not len(held):
            raise UserError(
                f"protocol {self.protocol.name}: metric loss needs held-out pictures "
                "(data.held_out keeps some out of training)"
            )
        losses = loss_of_pictures(self.pipeline, held.images, held.captions)
        result.curves["loss"] = sorted(losses.items())
        self.facts["loss"] = {"pictures": len(held)}
        return {"loss": Figure(sum(losses.values()) / len(losses))}

    def _retrieval(self, pictures: Pictures, result: Result) -> dict[str, Figure]:
        trained = self.splits().train
        numbers = {caption: i for i, caption in enumerate(dict.fromkeys(trained.captions))}
        made, training = self._own_features(pictures)
        found = retrieval(
            made,
            [numbers[wish.prompt] for wish in self.asked.wanted],
            training,
            [numbers[caption] for caption in trained.captions],
            near_copies=int(near_copy_mask(torch.stack(list(pictures)), trained.images).sum()),
        )
        self.facts["retrieval"] = {"captions": found.captions, "training_pictures": found.training_pictures}
        figures = {
            "retrieval_top1": Figure(found.top1, *found.top1_interval95),
            "retrieval_top5": Figure(found.top5, *found.top5_interval95),
            "retrieval_chance_top1": Figure(found.chance_top1),
            "retrieval_chance_top5": Figure(found.chance_top5),
            "near_copies": Figure(found.near_copies),
        }
        held = self.splits().held_out.images
        if len(held):  # so many pictures that were never trained on are as near
            self.facts["retrieval"]["held_out_pictures"] = len(held)
            copies = int(near_copy_mask(held, trained.images).sum())
            figures["near_copies_held_out"] = Figure(copies)
        return figures

    def _own_features(self, pictures: Pictures) -> tuple[Tensor, Tensor]:
        """Of the drawn and of the training pictures, by the extractor that needs no download."""
        extractor = build_extractor("efficientnet-lite0", None, self.device)
        training = self._features(extractor, "training", self.splits().train.images)[0]
        return self._features(extractor, "drawn", pictures)[0], training

    def _nearest(self, pictures: Pictures, result: Result) -> dict[str, Figure]:
        made, training = self._own_features(pictures)
        found = nearest_training(made, training)
        result.nearest = found.index_N.tolist()
        result.scores["novelty"] = (1 - found.cosine_N).tolist()
        held = self.splits().held_out.images
        figures = {"nearest_cosine": Figure(found.cosine_N.mean().item(), spread=found.cosine_N.std().item())}
        if len(held) > 1:  # how near never-seen pictures are
            extractor = build_extractor("efficientnet-lite0", None, self.device)
            apart = nearest_training(self._features(extractor, "held-out", held)[0], training)
            figures["nearest_cosine_held_out"] = Figure(apart.cosine_N.mean().item())
        return figures

    def _diversity(self, pictures: Pictures, result: Result) -> dict[str, Figure]:
        extractor = build_extractor("efficientnet-lite0", None, self.device)
        made = self._features(extractor, "drawn", pictures)[0]
        return {"diversity": Figure(diversity(made, [wish.number for wish in self.asked.wanted]))}

    def _clip_score(self, pictures: Pictures, result: Result) -> dict[str, Figure]:
        place = self.protocol.extractors.get(CLIP_SCORE)
        extractor = build_extractor(CLIP_SCORE, place, self.device)
        self.facts.setdefault("extractors", {})[extractor.name] = extractor.identity.digest
        seen = self._features(extractor, "drawn", pictures)[0]
        told = ClipTexts(CLIP_SCORE, place, self.device)([wish.prompt for wish in self.asked.wanted])
        scores = clip_scores(seen, told)
        result.scores["clip_score"] = scores.tolist()
        half = 1.96 * scores.std().item() / len(scores) ** 0.5 if len(scores) > 1 else 0.0
        mean = scores.mean().item()
        return {f"clip_score_{CLIP_SCORE}": Figure(mean, mean - half, mean + half)}

    def _geneval(self, pictures: Pictures, result: Result) -> dict[str, Figure]:
        places = self.protocol.extractors
        detector = Mask2FormerDetector(places.get("detector", DETECTOR), self.device)
        classifier = ClipColours(places.get("colours", COLOUR_CLASSIFIER), self.device)
        judged = []
        for wish, picture in zip(self.asked.wanted, pictures, strict=True):
            prompt = self.asked.geneval[wish.number]
            right, _ = judge(prompt, detector(picture), partial(classifier, picture))
            judged.append((prompt, right))
        return self._score("geneval", judged, result)

    def _shapes(self, pictures: Pictures, result: Result) -> dict[str, Figure]:
        judged = []
        for wish, picture in zip(self.asked.wanted, pictures, strict=True):
            prompt = self.asked.shapes[wish.number]
            judged.append((Prompt(prompt.task, prompt.text, ()), shows(picture, prompt)))
        return self._score("shapeeval", judged, result)

    def _questions(self, pictures: Pictures, result: Result) -> dict[str, Figure]:
        judge = JUDGES[self.protocol.judge](self.protocol.extractors.get("judge"), self.device)
        judged = []
        for wish, picture in zip(self.asked.wanted, pictures, strict=True):
            prompt = self.asked.questioned[wish.number]
            judged.append((prompt, [judge(picture, question.text) for question in prompt.questions]))
        found = score_questions(judged)
        shares = [score_questions([each]).overall for each in judged]
        result.scores["questions"] = shares
        half = 1.96 * statistics.stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else 0.0
        figures = {f"questions_{name}": Figure(share) for name, share in found.categories.items()}
        return {"questions": Figure(found.overall, found.overall - half, found.overall + half)} | figures

    def _score(self, name: str, judged: Sequence[tuple[Prompt, bool]], result: Result) -> dict[str, Figure]:
        found = score(judged)
        result.scores[name] = [float(right) for _, right in judged]
        tasks = {f"{name}_{task}": Figure(v, *found.intervals95[task]) for task, v in found.tasks.items()}
        return {name: Figure(found.overall)} | tasks


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def evaluate(evaluation: Evaluation, console: Console) -> Result:
    """Draw what is not there yet, and measure.

    Args:
        evaluation: what to do.
        console: where a person reads.

    Returns:
        The result.
    """
    evaluation.draw()
    result = Measuring(evaluation).measure()
    for name, figure in result.figures.items():
        say(console, f"{name}: {in_words(figure)}")
    for warning in result.warnings:
        say(console, f"Note: {warning}")
    say(console, f"Result: {evaluation.folder / 'result.json'}")
    return result
