"""The job behind ``shoestring eval``: draw what a protocol asks for, measure it, and say how."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save
from torch import Tensor

from shoestring import __version__
from shoestring.config import RunConfig, SamplingConfig
from shoestring.data.records import CaptionedImages, Splits
from shoestring.evaluation.digests import digest_of, file_digest, tensor_digest
from shoestring.evaluation.distances import frechet_distance, kernel_distance
from shoestring.evaluation.drawing import Wish, draw, pictures_of, wishes
from shoestring.evaluation.extractor import Extractor
from shoestring.evaluation.features import build_extractor
from shoestring.evaluation.geneval import Prompt, make_prompts, read_prompts, score
from shoestring.evaluation.measures import (
    MEASURES,
    Compared,
    Figure,
    Measure,
    check_enough,
    check_not_degenerate,
)
from shoestring.evaluation.moments import Moments, read_moments
from shoestring.evaluation.protocol import Protocol
from shoestring.evaluation.result import Result, in_words, markdown
from shoestring.evaluation.retrieval import near_copy_mask, retrieval
from shoestring.evaluation.shapeeval import ShapePrompt, make_shape_prompts, shows
from shoestring.runtime import UserError, atomic_write, say, write_text
from shoestring.sampling.generate import Pipeline, find_model, load_pipeline
from shoestring.training.display import LiveLine
from shoestring.training.stage_data import real_pictures

PACKAGES = ("torch", "numpy", "Pillow", "transformers")
FLOORS = ("fid", "fdd", "kdd", "fd-efflite0", "kid-efflite0")
"""Metrics whose value for real pictures is said too."""
SHAPE_PROMPTS = 50
"""Of each task of ShapeEval."""


@dataclass(frozen=True)
class Asked:
    """The pictures of a protocol, and what is known of their prompts."""

    wanted: tuple[Wish, ...]
    geneval: tuple[Prompt, ...] = ()
    shapes: tuple[ShapePrompt, ...] = ()


class Evaluation:
    """An evaluation in its folder; begun again, it goes on.

    Args:
        checkpoint: run folder, checkpoint folder or model file.
        protocol: what to do.
        out: folder for everything; ``None`` = ``eval`` beside the model.
        device: where to run.
        console: where a person reads.
        share: which process of how many this is; the first measures.

    Raises:
        UserError: if model, prompts or reference are missing or do not fit.
    """

    def __init__(
        self,
        checkpoint: Path,
        protocol: Protocol,
        out: Path | None,
        device: torch.device,
        console: Console,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.protocol, self.device, self.console, self.share = protocol, device, console, share
        self.file = find_model(checkpoint, None if checkpoint.is_file() else protocol.weights)
        self.run = next((f for f in self.file.parents if (f / "config.yaml").exists()), self.file.parent)
        self.pipeline: Pipeline = load_pipeline(self.file, device)
        config = self.pipeline.config
        self.sampling: SamplingConfig = protocol.sampling or config.sampling
        self._splits: Splits | None = None
        self.asked = self._ask()
        self.facts: dict[str, Any] = {
            "pictures": len(self.asked.wanted),
            "prompts": digest_of(f"{w.seed} {w.number} {w.prompt}" for w in self.asked.wanted),
            "sampling": self.sampling.model_dump(mode="json"),
            "resolution": self.pipeline.resolution,
        }
        self.model: dict[str, Any] = {
            "file": str(self.file),
            "name": config.name,
            "images_seen": self.pipeline.nimg,
            "digest": file_digest(self.file),
        }
        own = digest_of([json.dumps(self.facts, sort_keys=True), str(self.model["digest"])])
        self.folder = (out or self.run / "eval") / f"{protocol.name}-{own[:8]}"

    @property
    def config(self) -> RunConfig:
        """Of the model."""
        return self.pipeline.config

    # -- what is drawn -------------------------------------------------------------------------------------

    def splits(self) -> Splits:
        """Real pictures of the run, read once."""
        if self._splits is None:
            stage = self.config.stages[-1]
            self._splits = real_pictures(self.config, stage, self.pipeline.codec, self.run)
        return self._splits

    def _ask(self) -> Asked:
        protocol = self.protocol
        geneval: tuple[Prompt, ...] = ()
        shapes: tuple[ShapePrompt, ...] = ()
        if protocol.prompts == "geneval":
            file = protocol.prompts_file
            geneval = make_prompts() if file is None else read_prompts(Path(file))
            prompts = [prompt.text for prompt in geneval]
        elif protocol.prompts == "shapes":
            shapes = make_shape_prompts(SHAPE_PROMPTS, self.config.data.held_out)
            prompts = [prompt.text for prompt in shapes]
        else:
            prompts = self._captions()
        if not prompts:
            raise UserError(f"protocol {protocol.name}: prompts={protocol.prompts} gives none")
        wanted = wishes(prompts, protocol.seeds)
        if protocol.count is not None:
            if protocol.prompts != "classes" and protocol.count > len(wanted):
                raise UserError(
                    f"protocol {protocol.name}: count is {protocol.count:,}, but {len(prompts):,} prompts "
                    f"and {len(protocol.seeds)} seeds give {len(wanted):,} pictures; lower it, or add seeds"
                )
            wanted = wanted[: protocol.count]
        return Asked(tuple(wanted), geneval, shapes)

    def _captions(self) -> list[str]:
        protocol = self.protocol
        if protocol.prompts == "classes":
            if self.config.model.condition != "class":
                raise UserError(
                    f"protocol {protocol.name}: prompts=classes, but the model's condition is "
                    f"{self.config.model.condition}; choose another protocol"
                )
            classes = self.config.model.classes
            return [str(i % classes) for i in range(protocol.count or classes)]
        if protocol.prompts == "file":
            assert protocol.prompts_file is not None
            try:
                lines = Path(protocol.prompts_file).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"protocol {protocol.name}: cannot read prompts_file {protocol.prompts_file} ({error}); "
                    "it is a text file with a prompt a line"
                ) from error
            return [line.strip() for line in lines if line.strip()]
        real = self.splits().train if protocol.prompts == "training" else self.splits().held_out
        captions = list(dict.fromkeys(real.captions))
        if self.config.model.condition == "none":
            return [""] * (protocol.count or len(captions))
        return captions

    def draw(self) -> None:
        """Draw this process's share."""
        total = pictures_of_share(len(self.asked.wanted), self.protocol.micro_batch, self.share)
        began = time.monotonic()
        with LiveLine(self.console) as line:

            def tell(done: int) -> None:
                left = (time.monotonic() - began) / done * (total - done)
                line.show(f"drawing {done:,}/{total:,} pictures, {left:,.0f} s left")

            pictures = self.folder / "pictures"
            batch = self.protocol.micro_batch
            draw(self.pipeline, pictures, self.asked.wanted, self.sampling, batch, self.share, tell)

    # -- what is measured ----------------------------------------------------------------------------------

    def measure(self) -> Result:
        """All metrics of the protocol, on pictures that are all there.

        Returns:
            The result, written to the folder too.

        Raises:
            UserError: if a metric cannot be computed.
        """
        began = time.monotonic()
        pictures = pictures_of(self.folder / "pictures", self.asked.wanted)
        result = Result(self.protocol, self.facts, self.model)
        for name in self.protocol.metrics:
            if name in MEASURES:
                result.figures |= self._distance(name, pictures, result)
        if "retrieval" in self.protocol.metrics:
            result.figures |= self._retrieval(pictures)
        if "shapeeval" in self.protocol.metrics:
            result.figures |= self._shapes(pictures)
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

    def _features(self, extractor: Extractor, what: str, pictures: Tensor) -> tuple[Tensor, ...]:
        """Outputs of an extractor, kept in a file."""
        key = digest_of([extractor.identity.digest, tensor_digest(pictures)])[:12]
        path = self.folder.parent / "features" / f"{extractor.name}-{what}-{key}.safetensors"
        if path.exists():
            kept = load_file(path)
            return tuple(kept[str(i)] for i in range(len(kept)))
        with self.console.status(f"Looking at {len(pictures):,} {what} pictures with {extractor.name}"):
            outputs = extractor.outputs(pictures)
        data = save({str(i): output.contiguous() for i, output in enumerate(outputs)})
        atomic_write(path, lambda file: file.write(data))
        return outputs

    def _distance(self, name: str, pictures: Tensor, result: Result) -> dict[str, Figure]:
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
        given = Compared(made, real, self.protocol.neighbours, self.protocol.bootstrap)
        return measure.compute(given) | self._floor(name, extractor, measure, len(made))

    def _real(self, extractor: Extractor, measure: Measure) -> Tensor | Moments:
        if self.protocol.reference == "file":
            assert self.protocol.reference_file is not None
            moments = read_moments(Path(self.protocol.reference_file), spatial=measure.output == 1)
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
            self.facts["reference"] = {"file": file_digest(Path(self.protocol.reference_file))}
            return moments
        pictures = self._real_pictures().images
        self.facts["reference"] = {"pictures": len(pictures), "digest": tensor_digest(pictures)}
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
        if self.protocol.reference != "held-out" or name not in {
            "fd-efflite0",
            "kid-efflite0",
            "fid",
            "fdd",
            "kdd",
        }:
            return {}
        training = self.splits().train.images
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))[:count]
        real = self._features(extractor, "training", training[order])[measure.output]
        held = self._features(extractor, "held-out", self._real_pictures().images)[measure.output]
        kernel = "kid" in name or "kdd" in name
        value = kernel_distance(real, held).mean if kernel else frechet_distance(real, held)
        return {f"{name.replace('-', '_')}_floor": Figure(value)}

    def _retrieval(self, pictures: Tensor) -> dict[str, Figure]:
        trained = self.splits().train
        numbers = {caption: i for i, caption in enumerate(dict.fromkeys(trained.captions))}
        extractor = build_extractor("efficientnet-lite0", None, self.device)
        found = retrieval(
            self._features(extractor, "drawn", pictures)[0],
            [numbers[wish.prompt] for wish in self.asked.wanted],
            self._features(extractor, "training", trained.images)[0],
            [numbers[caption] for caption in trained.captions],
            near_copies=int(near_copy_mask(pictures, trained.images).sum()),
        )
        return {
            "retrieval_top1": Figure(found.top1, *found.top1_interval95),
            "retrieval_top5": Figure(found.top5, *found.top5_interval95),
            "retrieval_chance_top1": Figure(found.chance_top1),
            "retrieval_chance_top5": Figure(found.chance_top5),
            "near_copies": Figure(found.near_copies),
        }

    def _shapes(self, pictures: Tensor) -> dict[str, Figure]:
        prompts = self.asked.shapes
        judged = [
            (Prompt(prompt.task, prompt.text, ()), shows(picture, prompt))
            for wish, picture in zip(self.asked.wanted, pictures, strict=True)
            for prompt in [prompts[wish.number]]
        ]
        found = score(judged)
        tasks = {f"shapeeval_{t}": Figure(v, *found.intervals95[t]) for t, v in found.tasks.items()}
        return {"shapeeval": Figure(found.overall)} | tasks


def pictures_of_share(count: int, batch: int, share: tuple[int, int]) -> int:
    """Pictures that one process draws of all."""
    mine, of = share
    return sum(min(batch, count - first) for first in range(mine * batch, count, of * batch))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def evaluate(evaluation: Evaluation, console: Console) -> Result | None:
    """Draw, and measure if this is the first process.

    Args:
        evaluation: what to do.
        console: where a person reads.

    Returns:
        The result; ``None`` in other processes.
    """
    evaluation.draw()
    if evaluation.share[0] > 0:
        return None
    result = evaluation.measure()
    for name, figure in result.figures.items():
        say(console, f"{name}: {in_words(figure)}")
    for warning in result.warnings:
        say(console, f"Note: {warning}")
    say(console, f"Result: {evaluation.folder / 'result.json'}")
    return result
