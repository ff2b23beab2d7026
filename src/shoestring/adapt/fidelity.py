"""Has the subject been learned, and what was forgotten: figures and a grid, before and after.

Every figure compares pictures of the same prompts and noise. Features are those of EfficientNet-Lite0:
the paper's DINO and CLIP-I (arXiv 2208.12242, section 4.1) are other networks, and its numbers cannot be
compared with these.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from torch import Tensor

from shoestring.adapt.dreambooth import SUBJECT, store_of
from shoestring.config import DreamBoothConfig, RunConfig, StoreConfig
from shoestring.data.records import CaptionedImages
from shoestring.encoders.image import build_codec
from shoestring.evaluation.drawing import draw, pictures_of, wishes
from shoestring.evaluation.features import EfficientNetLite0Features
from shoestring.evaluation.retrieval import near_copy_mask, retrieval
from shoestring.interfaces import FeatureExtractor
from shoestring.models.files import find_model, read_header
from shoestring.runtime import Item, UserError
from shoestring.sampling.generate import Pipeline, picture_grid
from shoestring.tensors import UInt8
from shoestring.training.display import LiveLine
from shoestring.training.stage_data import real_pictures
from shoestring.training.stores import open_stores

SEEDS = 5
PER_SEED = 4
"""Pictures of a prompt and seed."""
CAPTIONS = 48
"""Of the base's data, each drawn once a seed of ``ORDINARY_SEEDS``."""
ORDINARY_SEEDS = 2
KNOWN = 1000
"""Captions of the base's data among which a picture's own is looked for, with a picture each."""
AT_ONCE = 20
SHOWN = 8
"""Columns of the grid."""
LABEL = 150
"""Pixels for the words beside a row of the grid."""


@dataclass(frozen=True)
class Drawn:
    """Pictures of one prompt, or of one of many each, before and after."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    before: UInt8[Tensor, "N 3 H W"]
    after: UInt8[Tensor, "N 3 H W"]


def ordinary_pictures(base: Path) -> CaptionedImages | None:
    """What the base was trained on, to ask for again.

    Args:
        base: run folder, checkpoint folder or model file.

    Returns:
        A picture each of its captions, of many an even choice; ``None`` where the data cannot be read on this
        machine.
    """
    header = read_header(find_model(base))
    config = header.config
    stage = next(
        (s for s in reversed(config.stages) if s.resolution == header.facts.resolution), config.stages[-1]
    )
    try:
        pictures = real_pictures(config, stage, build_codec(config.data), base).train
    except UserError:  # a folder, a store or a package that is elsewhere
        return None
    rows = list({caption: row for row, caption in reversed(list(enumerate(pictures.captions)))}.values())
    return pictures.select(sorted(evenly(rows, KNOWN)))


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """At most so many of some items, evenly over all of them."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def subject_pictures(config: RunConfig, folder: Path, pipeline: Pipeline) -> UInt8[Tensor, "N 3 H W"]:
    """The pictures of the subject as the run saw them: cropped, resized, decoded from their latents."""
    places = [StoreConfig(path=str(store_of(folder, SUBJECT)))]
    alone = config.model_copy(update={"data": config.data.model_copy(update={"stores": ()})})
    stage, quiet = config.stages[0], Console(quiet=True)
    train, _ = open_stores(alone, stage, pipeline.codec, None, folder, quiet, places)
    return train.pictures(len(train)).images


def draw_both(
    folder: Path,
    name: str,
    pipelines: Sequence[Pipeline],
    prompts: Sequence[str],
    seeds: Sequence[int],
    console: Console,
) -> Drawn:
    """Draw prompts with the base and with what became of it, from the same noise.

    Args:
        folder: of the pictures; those that are there are kept.
        name: of this set.
        pipelines: base and result.
        prompts: one picture of each for every seed.
        seeds: of the noise.
        console: where a line says how far it is.

    Returns:
        The pictures, seed by seed.
    """
    wanted, found = wishes(prompts, seeds), []
    for when, pipeline in zip(("before", "after"), pipelines, strict=True):
        place = folder / f"{name}-{when}"
        with LiveLine(console) as line:

            def tell(done: int, line: LiveLine = line, when: str = when) -> None:
                line.show(f"drawing {name} {when}: {done}/{len(wanted)}")

            draw(pipeline, place, wanted, pipeline.config.sampling, AT_ONCE, on_done=tell)
        found.append(pictures_of(place, wanted))
    return Drawn(tuple(prompts), tuple(seeds), *found)


def _unit(pictures: Tensor, extractor: FeatureExtractor) -> Tensor:
    return F.normalize(extractor(pictures).double(), dim=1)


def _per_seed(values_N: Tensor, seeds: Sequence[int]) -> list[float]:
    return [float(part.mean()) for part in values_N.view(len(seeds), -1)]


def _summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds, and their spread (standard deviation of a seed)."""
    return {"mean": statistics.fmean(values), "spread": statistics.stdev(values), "seeds": list(values)}


def similarity(drawn: Drawn, own_MF: Tensor, extractor: FeatureExtractor) -> dict[str, Any]:
    """Mean cosine of drawn pictures with the subject's, seed by seed.

    Args:
        drawn: before and after.
        own_MF: features of the subject's pictures, of length one.
        extractor: makes features of pictures.

    Returns:
        ``before``, ``after`` and their difference ``gain``.
    """
    found = {}
    for when, pictures in (("before", drawn.before), ("after", drawn.after)):
        found[when] = _per_seed((_unit(pictures, extractor) @ own_MF.T).mean(dim=1), drawn.seeds)
    found["gain"] = [b - a for a, b in zip(found["before"], found["after"], strict=True)]
    return {key: _summary(values) for key, values in found.items()}


def kept(drawn: Drawn, extractor: FeatureExtractor) -> dict[str, Any]:
    """Mean cosine of every picture before with the one after, of the same prompt and noise; 1 = unchanged."""
    both = [_unit(pictures, extractor) for pictures in (drawn.before, drawn.after)]
    return _summary(_per_seed((both[0] * both[1]).sum(dim=1), drawn.seeds))


def found_again(drawn: Drawn, known: CaptionedImages, extractor: FeatureExtractor) -> dict[str, Any]:
    """Retrieval of captions of the base's data, before and after; see :mod:`shoestring.evaluation.retrieval`.

    Args:
        drawn: of captions that are among the known.
        known: the base's training pictures, no two of one caption.
        extractor: makes features of pictures.

    Returns:
        Top-1 and top-5 with their intervals, and chance.
    """
    numbers = {caption: i for i, caption in enumerate(known.captions)}
    wanted = [numbers[prompt] for _ in drawn.seeds for prompt in drawn.prompts]
    training, theirs = extractor(known.images), list(range(len(known)))
    results: dict[str, Any] = {}
    for when, pictures in (("before", drawn.before), ("after", drawn.after)):
        copies = int(near_copy_mask(pictures, known.images).sum())
        result = retrieval(extractor(pictures), wanted, training, theirs, near_copies=copies)
        results[when] = {
            "top1": result.top1,
            "top1_interval95": result.top1_interval95,
            "top5": result.top5,
            "top5_interval95": result.top5_interval95,
        }
        results["chance_top5"] = result.chance_top5
    for key in ("top1", "top5"):
        results[f"lost_{key}"] = results["before"][key] - results["after"][key]
    return results


def measure(
    folder: Path, base: Path, pipelines: Sequence[Pipeline], prompts: Sequence[str], console: Console
) -> tuple[dict[str, Any], Image.Image]:
    """All figures of a run that learned a subject, and its grid.

    Args:
        folder: of the run.
        base: what it began with: run folder, checkpoint folder or model file.
        pipelines: of the base and of the run.
        prompts: ordinary ones to look at; empty = captions of the base's data.
        console: where a person reads.

    Returns:
        Plain values, and the picture.

    Raises:
        UserError: if the extractor's package is missing.
    """
    extractor = EfficientNetLite0Features(pipelines[1].device)
    config = pipelines[1].config
    words = config.dreambooth
    assert words is not None
    seeds = [config.seed + 1 + i for i in range(SEEDS)]  # those of the class pictures are others
    subject = subject_pictures(config, folder, pipelines[1])
    own_MF = _unit(subject, extractor)
    place = folder / "fidelity"
    sets = {
        "subject": draw_both(place, "subject", pipelines, [words.subject_prompt] * PER_SEED, seeds, console),
        "class": draw_both(place, "class", pipelines, [words.class_prompt] * PER_SEED, seeds, console),
    }
    known = ordinary_pictures(base)
    chosen = [] if known is None else evenly(known.captions, CAPTIONS)
    ordinary = (
        draw_both(place, "ordinary", pipelines, chosen, seeds[:ORDINARY_SEEDS], console) if chosen else None
    )
    asked = draw_both(place, "asked", pipelines, prompts, seeds[:1], console) if prompts else None
    cosine_MM = own_MF @ own_MF.T
    m = len(own_MF)
    figures: dict[str, Any] = {
        "extractor": extractor.name,
        "note": "cosines of EfficientNet-Lite0 features, not the DINO or CLIP-I of arXiv 2208.12242",
        "subject_prompt": words.subject_prompt,
        "class_prompt": words.class_prompt,
        "pictures_of_the_subject": m,
        "subject_among_itself": float((cosine_MM.sum() - cosine_MM.trace()) / (m * (m - 1))),
        "subject": similarity(sets["subject"], own_MF, extractor),
        "class": similarity(sets["class"], own_MF, extractor),
        "class_kept": kept(sets["class"], extractor),
        "near_copies": int(near_copy_mask(sets["subject"].after, subject).sum()),
        "drawn": len(sets["subject"].after),
    }
    if ordinary is not None and known is not None:
        figures["ordinary_kept"] = kept(ordinary, extractor)
        figures["retrieval"] = found_again(ordinary, known, extractor)
        figures["ordinary_captions"], figures["ordinary_drawn"] = len(chosen), len(ordinary.after)
    shown = asked if asked is not None else ordinary
    return figures, before_and_after(words, subject, sets["subject"], sets["class"], shown)


def before_and_after(
    words: DreamBoothConfig, subject: Tensor, own: Drawn, of_class: Drawn, ordinary: Drawn | None
) -> Image.Image:
    """The grid: the subject's pictures, then pairs of rows, before and after from the same noise.

    Args:
        words: of the subject.
        subject: its pictures.
        own: of the subject's prompt.
        of_class: of the class alone.
        ordinary: of other prompts, if there are some.

    Returns:
        The picture.
    """
    rows: list[tuple[str, Tensor]] = [("the subject", subject[:SHOWN])]
    pairs = [(words.subject_prompt, own), (words.class_prompt, of_class)]
    for name, drawn in pairs + ([("other prompts", ordinary)] if ordinary is not None else []):
        # Of one prompt all seeds, of many the first.
        there = len(drawn.before) if len(set(drawn.prompts)) == 1 else len(drawn.prompts)
        picked = evenly(range(there), SHOWN)
        rows += [(f"{name}: before", drawn.before[picked]), ("after", drawn.after[picked])]
    side = subject.shape[-1]
    zoom = max(1, 96 // side)
    strips = [picture_grid(pictures, len(pictures), zoom) for _, pictures in rows]
    width = max(strip.width for strip in strips)
    sheet = Image.new("RGB", (LABEL + width, sum(strip.height for strip in strips)), "white")
    pen, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(12), 0
    for (label, _), strip in zip(rows, strips, strict=True):
        sheet.paste(strip, (LABEL, top))
        for number, line in enumerate(label.split(": ")):
            pen.text((6, top + 8 + 16 * number), line[:24], "black", font)
        top += strip.height
    return sheet


def table(figures: dict[str, Any]) -> list[str]:
    """The figures as lines for a person."""

    def cell(value: dict[str, Any]) -> str:
        return f"{value['mean']:.3f} +- {value['spread']:.3f}"

    own, of_class = figures["subject"], figures["class"]
    lines = [
        f"similarity to the subject (cosine of {figures['extractor']} features; mean and spread of "
        f"{len(own['gain']['seeds'])} seeds)",
        f"  {figures['subject_prompt']!r}: {cell(own['before'])} before, {cell(own['after'])} after, "
        f"gain {cell(own['gain'])}",
        f"  {figures['class_prompt']!r}: {cell(of_class['before'])} before, {cell(of_class['after'])} after",
        f"  its own pictures among one another: {figures['subject_among_itself']:.3f}",
        f"near-copies of its pictures: {figures['near_copies']} of {figures['drawn']} drawn",
        f"same prompt, same noise, before and after (1 = unchanged): class {cell(figures['class_kept'])}"
        + (f", other prompts {cell(figures['ordinary_kept'])}" if "ordinary_kept" in figures else ""),
    ]
    if "retrieval" in figures:
        found = figures["retrieval"]
        before, after = found["before"], found["after"]
        lines.append(
            f"other prompts found again (retrieval of {figures['ordinary_captions']} captions): top-1 "
            f"{before['top1']:.0%} before, {after['top1']:.0%} after; top-5 {before['top5']:.0%} before, "
            f"{after['top5']:.0%} after (chance {found['chance_top5']:.1%})"
        )
    else:
        lines.append("other prompts: not measured, as the base's data cannot be read here; see --prompt")
    return lines
