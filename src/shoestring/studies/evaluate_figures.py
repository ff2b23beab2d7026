"""The figures of an evaluation whose pictures are all there."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from torch import Tensor

from shoestring import __version__
from shoestring.evaluation.alignment import clip_scores
from shoestring.evaluation.drawing import DrawnPictures
from shoestring.evaluation.geneval import Prompt, judge, score
from shoestring.evaluation.measures import (
    MEASURES,
    Compared,
    Figure,
    Measure,
    TooFew,
    check_enough,
    check_not_degenerate,
)
from shoestring.evaluation.moments import Moments
from shoestring.evaluation.neighbours import diversity, nearest_training
from shoestring.evaluation.questions import score_questions
from shoestring.evaluation.result import Result, in_words, markdown
from shoestring.evaluation.retrieval import near_copy_mask, retrieval
from shoestring.evaluation.shapeeval import shows
from shoestring.evaluation.validation import loss_of_pictures
from shoestring.runtime import UserError, say, write_text
from shoestring.studies.evaluate import Evaluation
from shoestring.studies.evaluate_networks import CLIP_SCORE, OWN, Networks
from shoestring.studies.evaluate_paired import Paired
from shoestring.studies.evaluate_reference import Pictures, Reference

PACKAGES = ("torch", "numpy", "Pillow", "transformers")


class Measuring:
    """Computes what the protocol of an evaluation asks for.

    Args:
        evaluation: whose pictures are measured.

    Raises:
        UserError: if no metric of the protocol can be computed, or a network or the reference is missing.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self.protocol, self.device, self.folder = evaluation.protocol, evaluation.device, evaluation.folder
        self.asked, self.splits, self.pipeline = evaluation.asked, evaluation.splits, evaluation.pipeline
        self.facts, self.model, self.pictures = evaluation.facts, evaluation.model, evaluation.pictures
        self.networks = Networks(evaluation.protocol, evaluation.device)
        features = evaluation.folder.parent / "features"
        side, console = evaluation.pipeline.resolution, evaluation.console
        crops = self.asked.crops
        self.degradation = evaluation.degradation if crops is not None else None
        self.reference = Reference(self.protocol, self.splits, side, features, self.facts, console, crops)
        self.networks.load()
        self.facts["extractors"] = self.networks.digests()
        self.left_out = self._too_few()

    def _too_few(self) -> dict[str, str]:
        """Metrics that the pictures do not suffice for, with the reason of each."""
        found: dict[str, str] = {}
        count = len(self.asked.wanted)
        for name in self.protocol.metrics:
            try:
                if name in MEASURES:
                    measure = MEASURES[name]
                    real, moments = None, False
                    if measure.compares:
                        real = self.reference.size(measure, self.networks.extractor(measure.extractor))
                        moments = real is None
                    check_enough(name, count, real, self.protocol.neighbours, only_moments=moments)
                elif name == "loss" and not len(self.splits().held_out):
                    raise TooFew("metric loss needs held-out pictures; data.held_out keeps some")
                elif name == "retrieval" and self._shapes_differ():
                    raise TooFew("metric retrieval needs training pictures of the shape that is drawn")
                elif name == "retrieval" and self.pipeline.config.model.condition == "none":
                    raise TooFew("metric retrieval needs captions, and the model is unconditional")
                elif name == "diversity" and count < 2 * len({w.number for w in self.asked.wanted}):
                    raise TooFew(
                        f"metric diversity needs each prompt with two seeds; {count} pictures of "
                        f"{len({w.number for w in self.asked.wanted})} prompts have not"
                    )
            except TooFew as error:
                found[name] = str(error)
        if len(found) == len(self.protocol.metrics):
            raise UserError(f"protocol {self.protocol.name}: {next(iter(found.values()))}")
        return found

    def _shapes_differ(self) -> bool:
        side = self.pipeline.resolution
        return tuple(self.splits().train.images.shape[-2:]) != (side, side)

    def measure(self) -> Result:
        """All metrics of the protocol, on pictures that are all there.

        Returns:
            The result, written to the folder too.

        Raises:
            UserError: if a picture is missing or damaged.
        """
        began = time.monotonic()
        pictures = DrawnPictures(self.pictures, self.asked.wanted)
        result = Result(self.protocol, self.facts, self.model)
        result.warnings += [f"left out: {reason}" for reason in self.left_out.values()]
        for name in self.protocol.metrics:
            if name in MEASURES and name not in self.left_out:
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
        if self.asked.crops is not None and self.degradation is not None:
            others |= Paired(self.asked.crops, self.degradation, self.reference, self.networks).metrics()
        for kind, measure in others.items():
            if kind in self.protocol.metrics and kind not in self.left_out:
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

    def _distance(self, name: str, pictures: Pictures, result: Result) -> dict[str, Figure]:
        measure = MEASURES[name]
        extractor = self.networks.extractor(measure.extractor)
        made = self.reference.features(extractor, "drawn", pictures)[measure.output]
        warning = check_not_degenerate(made, "pictures drawn")
        if warning is not None and warning not in result.warnings:
            result.warnings.append(warning)
        if not measure.compares:
            return _computed(name, measure, Compared(made, None))
        real = self.reference.of(measure, extractor)
        if measure.moments:
            known = real.count if isinstance(real, Moments) else len(real)
            counts = {"pictures drawn": len(made), "reference pictures": known}
            self._warn_of_few(counts, made.shape[1], result)
        given = Compared(made, real, self.protocol.neighbours, self.protocol.bootstrap, result.curves)
        return _computed(name, measure, given) | self.reference.floor(name, extractor, measure, len(made))

    def _warn_of_few(self, counts: Mapping[str, int | None], width: int, result: Result) -> None:
        """Fewer pictures than features have a covariance without full rank."""
        for name, count in counts.items():
            warning = (
                f"{count} {name} are fewer than the {width} features: a Fréchet distance at such an N is "
                "mostly bias; compare it with its floor, or at equal N only"
            )
            if count is not None and count < width and warning not in result.warnings:
                result.warnings.append(warning)

    def _loss(self, pictures: Pictures, result: Result) -> dict[str, Figure]:
        """On held-out pictures, all patches, noise that is always the same."""
        held = self.splits().held_out
        held = held.select(range(min(self.protocol.loss_pictures, len(held))))
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
        extractor = self.networks.extractor(OWN)
        training = self.reference.features(extractor, "training", self.splits().train.images)[0]
        return self.reference.features(extractor, "drawn", pictures)[0], training

    def _nearest(self, pictures: Pictures, result: Result) -> dict[str, Figure]:
        made, training = self._own_features(pictures)
        found = nearest_training(made, training)
        result.nearest = found.index_N.tolist()
        result.scores["novelty"] = (1 - found.cosine_N).tolist()
        held = self.splits().held_out.images
        figures = {"nearest_cosine": Figure(found.cosine_N.mean().item(), spread=found.cosine_N.std().item())}
        if len(held) > 1:  # how near never-seen pictures are
            extractor = self.networks.extractor(OWN)
            apart = nearest_training(self.reference.features(extractor, "held-out", held)[0], training)
            figures["nearest_cosine_held_out"] = Figure(apart.cosine_N.mean().item())
        return figures

    def _diversity(self, pictures: Pictures, result: Result) -> dict[str, Figure]:
        made = self.reference.features(self.networks.extractor(OWN), "drawn", pictures)[0]
        return {"diversity": Figure(diversity(made, [wish.number for wish in self.asked.wanted]))}

    def _clip_score(self, pictures: Pictures, result: Result) -> dict[str, Figure]:
        extractor = self.networks.extractor(CLIP_SCORE)
        seen = self.reference.features(extractor, "drawn", pictures)[0]
        told = self.networks.clip_texts([wish.prompt for wish in self.asked.wanted])
        scores = clip_scores(seen, told)
        result.scores["clip_score"] = scores.tolist()
        return {f"clip_score_{CLIP_SCORE}": self._mean(scores.tolist())}

    def _geneval(self, pictures: Pictures, result: Result) -> dict[str, Figure]:
        detector, classifier = self.networks.detector, self.networks.colours
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
        answer, judged = self.networks.judge, []
        for wish, picture in zip(self.asked.wanted, pictures, strict=True):
            prompt = self.asked.questioned[wish.number]
            judged.append((prompt, [answer(picture, question.text) for question in prompt.questions]))
        found = score_questions(judged)
        shares = [score_questions([each]).overall for each in judged]
        result.scores["questions"] = shares
        figures = {f"questions_{name}": Figure(share) for name, share in found.categories.items()}
        return {"questions": self._mean(shares)} | figures

    def _mean(self, scores: Sequence[float]) -> Figure:
        """With its interval over prompts: pictures of one prompt are not independent."""
        of_prompt: dict[int, list[float]] = {}
        for wish, score_of_picture in zip(self.asked.wanted, scores, strict=True):
            of_prompt.setdefault(wish.number, []).append(score_of_picture)
        means = [statistics.fmean(values) for values in of_prompt.values()]
        mean = statistics.fmean(scores)
        half = 1.96 * statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None
        return Figure(mean) if half is None else Figure(mean, mean - half, mean + half)

    def _score(self, name: str, judged: Sequence[tuple[Prompt, bool]], result: Result) -> dict[str, Figure]:
        found = score(judged)
        result.scores[name] = [float(right) for _, right in judged]
        tasks = {f"{name}_{task}": Figure(v, *found.intervals95[task]) for task, v in found.tasks.items()}
        return {name: Figure(found.overall)} | tasks


def _computed(name: str, measure: Measure, given: Compared) -> dict[str, Figure]:
    try:
        return measure.compute(given)
    except ValueError as error:
        raise UserError(f"metric {name}: {error}") from error


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def evaluate(evaluation: Evaluation, console: Console, draw: Callable[[], object] | None = None) -> Result:
    """Draw what is not there yet, and measure.

    Args:
        evaluation: what to do.
        console: where a person reads.
        draw: draws first, with other processes; what it leaves is drawn here.

    Returns:
        The result.
    """
    measuring = Measuring(evaluation)  # what is missing is said before hours of drawing
    if draw is not None:
        draw()
    evaluation.draw()
    result = measuring.measure()
    for name, figure in result.figures.items():
        say(console, f"{name}: {in_words(figure)}")
    for warning in result.warnings:
        say(console, f"Note: {warning}")
    say(console, f"Result: {evaluation.folder / 'result.json'}")
    return result
