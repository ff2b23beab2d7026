"""The job behind ``shoestring eval``: draw what a protocol asks for, measure it, and say how."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from shoestring.config import RunConfig, SamplingConfig, SuperResConfig
from shoestring.data.records import Splits
from shoestring.evaluation.crops import Crops
from shoestring.evaluation.digests import digest_of, file_digest
from shoestring.evaluation.drawing import Low, Wish, draw, wishes
from shoestring.evaluation.geneval import Prompt, make_prompts, read_prompts
from shoestring.evaluation.protocol import NOT_RESULTS, Protocol
from shoestring.evaluation.questions import Questioned, read_questions
from shoestring.evaluation.shapeeval import ShapePrompt, make_shape_prompts
from shoestring.models.files import find_model
from shoestring.runtime import UserError, say
from shoestring.sampling.generate import Pipeline, class_prompts, load_pipeline
from shoestring.sampling.samplers import lowered_order
from shoestring.training.display import LiveLine, duration
from shoestring.training.stage_data import real_pictures

SHAPE_PROMPTS = 50
"""Of each task of ShapeEval."""


@dataclass(frozen=True)
class Asked:
    """The pictures of a protocol, and what is known of their prompts."""

    wanted: tuple[Wish, ...]
    geneval: tuple[Prompt, ...] = ()
    shapes: tuple[ShapePrompt, ...] = ()
    questioned: tuple[Questioned, ...] = ()
    crops: Crops | None = None


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
        self.device, self.console, self.share = device, console, share
        self.file = find_model(checkpoint, None if checkpoint.is_file() else protocol.weights)
        # A file is what it is, whatever a protocol would have taken of a checkpoint.
        self.protocol = protocol = protocol.model_copy(update={"weights": self.file.stem})
        self.run = next((f for f in self.file.parents if (f / "config.yaml").exists()), self.file.parent)
        self.pipeline: Pipeline = load_pipeline(self.file, device)
        config = self.pipeline.config
        self.sampling: SamplingConfig = protocol.sampling or config.sampling
        warning = lowered_order(self.sampling)
        if warning is not None:
            say(console, warning)
        self._splits: Splits | None = None
        self.asked = self._ask()
        self.facts: dict[str, Any] = {
            "pictures": len(self.asked.wanted),
            "prompts": digest_of(f"{w.seed} {w.number} {w.prompt}" for w in self.asked.wanted),
            "sampling": self.sampling.model_dump(mode="json"),
            "resolution": self.pipeline.resolution,
        }
        if self.asked.crops is not None:
            self.facts["crops"] = {
                "pictures": self.asked.crops.sources,
                "digest": self.asked.crops.digest(),
                "factor": self.degradation.factor,
                "degradation": self.degradation.degradation,
            }
        self.model: dict[str, Any] = {
            "file": str(self.file),
            "name": config.name,
            "images_seen": self.pipeline.nimg,
            "digest": file_digest(self.file),
        }
        drawn = digest_of([json.dumps(self.facts, sort_keys=True), str(self.model["digest"])])
        self.facts["asked"] = digest_of(
            map(repr, (self.asked.geneval, self.asked.shapes, self.asked.questioned))
        )
        settings = {k: v for k, v in protocol.model_dump(mode="json").items() if k not in NOT_RESULTS}
        own = digest_of([drawn, self.facts["asked"], json.dumps(settings, sort_keys=True)])
        root = out or self.run / "eval"
        self.folder = root / f"{protocol.name}-{own[:8]}"
        self.pictures = root / "pictures" / drawn[:12]

    @property
    def config(self) -> RunConfig:
        """Of the model."""
        return self.pipeline.config

    # -- what is drawn -------------------------------------------------------------------------------------

    def splits(self) -> Splits:
        """Real pictures of the run, read once."""
        if self._splits is None:
            # Of the stage that the model is of, which need not be the last.
            side, stages = self.pipeline.resolution, self.config.stages
            stage = next((stage for stage in reversed(stages) if stage.resolution == side), stages[-1])
            self._splits = real_pictures(self.config, stage, self.pipeline.codec, self.run)
        return self._splits

    def _ask(self) -> Asked:
        protocol = self.protocol
        geneval: tuple[Prompt, ...] = ()
        shapes: tuple[ShapePrompt, ...] = ()
        questioned: tuple[Questioned, ...] = ()
        if (protocol.prompts == "crops") != (self.config.superres is not None):
            what = "enlarges pictures" if self.config.superres is not None else "draws from words"
            raise UserError(
                f"protocol {protocol.name}: prompts={protocol.prompts}, but {self.config.name} {what}; "
                "protocols of crops (superres, div2k-sr) are for models of shoestring adapt superres"
            )
        if protocol.prompts == "crops":
            crops = self._crops()
            return Asked(tuple(wishes([""] * len(crops), protocol.seeds)), crops=crops)
        if protocol.prompts == "geneval":
            file = protocol.prompts_file
            geneval = make_prompts() if file is None else read_prompts(Path(file))
            prompts = [prompt.text for prompt in geneval]
        elif protocol.prompts == "shapes":
            shapes = make_shape_prompts(SHAPE_PROMPTS, self.config.data.held_out)
            prompts = [prompt.text for prompt in shapes]
        elif protocol.prompts == "questions":
            assert protocol.prompts_file is not None
            questioned = read_questions(Path(protocol.prompts_file))
            prompts = [prompt.text for prompt in questioned]
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
        return Asked(tuple(wanted), geneval, shapes, questioned)

    def _crops(self) -> Crops:
        """The pictures that are made small."""
        protocol, side = self.protocol, self.pipeline.resolution
        if protocol.crops_folder is not None:
            return Crops(Path(protocol.crops_folder), side, protocol.count, protocol.seeds[0])
        held = self.splits().held_out.images
        if not len(held):
            raise UserError(
                f"protocol {protocol.name}: the run holds no pictures out of training; set crops_folder=DIR"
            )
        if protocol.count is not None and protocol.count > len(held):
            raise UserError(
                f"protocol {protocol.name}: count is {protocol.count:,}, but {len(held):,} pictures are held "
                "out; lower it, or set crops_folder=FOLDER"
            )
        return Crops(held, side, protocol.count, protocol.seeds[0])

    def low(self, numbers: Sequence[int]) -> Tensor:
        """Crops made small, as the protocol asks for."""
        assert self.asked.crops is not None
        return self.asked.crops.low(numbers, self.degradation)

    @property
    def degradation(self) -> SuperResConfig:
        """The model's factor, the protocol's way of making pictures small."""
        assert self.config.superres is not None
        kind = self.protocol.degradation or self.config.superres.degradation
        return self.config.superres.model_copy(update={"degradation": kind})

    def _captions(self) -> list[str]:
        protocol = self.protocol
        if protocol.prompts == "classes":
            if self.config.model.condition != "class":
                raise UserError(
                    f"protocol {protocol.name}: prompts=classes, but the model's condition is "
                    f"{self.config.model.condition}; choose another protocol"
                )
            names = class_prompts(self.config.model.classes, self.pipeline.classes)
            return [names[i % len(names)] for i in range(protocol.count or len(names))]
        if protocol.prompts == "file":
            assert protocol.prompts_file is not None
            try:
                lines = Path(protocol.prompts_file).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"protocol {protocol.name}: cannot read prompts_file {protocol.prompts_file} ({error}); "
                    "it is a text file with a prompt a line"
                ) from error
            return [line.strip() for line in lines if line.strip()][: protocol.most_prompts]
        real = self.splits().train if protocol.prompts == "training" else self.splits().held_out
        captions = list(dict.fromkeys(real.captions))[: protocol.most_prompts]
        if self.config.model.condition == "none":
            return [""] * (protocol.count or len(captions))
        return captions

    def draw(self) -> None:
        """Draw this process's share."""
        batch = self.protocol.micro_batch
        draw_shown(
            self.pipeline,
            self.pictures,
            self.asked.wanted,
            self.sampling,
            batch,
            self.console,
            self.share,
            None if self.asked.crops is None else self.low,
        )


def draw_shown(
    pipeline: Pipeline,
    folder: Path,
    wanted: Sequence[Wish],
    sampling: SamplingConfig,
    micro_batch: int,
    console: Console,
    share: tuple[int, int] = (0, 1),
    low: Low | None = None,
) -> None:
    """As :func:`shoestring.evaluation.drawing.draw`, with a line that says how far it is.

    Args:
        pipeline: the model.
        folder: where the pictures go.
        wanted: all of them, also those of other processes.
        sampling: how.
        micro_batch: pictures at once.
        console: where the line is shown.
        share: which process of how many this is.
        low: gives the small pictures of some numbers, of super-resolution models.
    """
    total = pictures_of_share(len(wanted), micro_batch, share)
    price, began = pipeline.config.logging.usd_per_hour, time.monotonic()
    with LiveLine(console) as line:

        def tell(done: int) -> None:
            spent = time.monotonic() - began
            line.show(
                f"drawing {done:,}/{total:,} pictures  {done / spent:.1f} a second  "
                f"{duration(spent / done * (total - done))} left  ${spent / 3600 * price:,.2f}"
            )

        draw(pipeline, folder, wanted, sampling, micro_batch, share, tell, low)


def pictures_of_share(count: int, batch: int, share: tuple[int, int]) -> int:
    """Pictures that one process draws of all."""
    mine, of = share
    return sum(min(batch, count - first) for first in range(mine * batch, count, of * batch))
