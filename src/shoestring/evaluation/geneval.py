"""GenEval without mmdetection: prompts, and the rules by which a picture shows what was asked for.

Six tasks ask for one object, two objects, a number of objects, an object in a colour, two objects side by
side or one above the other, and two objects in two colours. A detector finds objects of the 80 classes of
COCO, a classifier names their colours, and the rules of this file compare both with the request.

Prompt files are JSON lines in the schema of the original, which are read too:
``{"tag": "position", "include": [{"class": "cup", "count": 1}, {"class": "dog", "count": 1, "position":
["left of", 0]}], "exclude": [], "prompt": "a photo of a dog left of a cup"}``.

Source: Ghosh et al., arXiv 2310.11513, section 3 and its released code, whose thresholds these are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shoestring.evaluation.uncertainty import wilson_interval
from shoestring.runtime import UserError, stream_seed, write_text

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
"""Of a detection's score; more sure where objects are counted."""
MOST = 16
"""Detections of a class that are looked at, the surest first."""
POSITION_MARGIN = 0.1
"""Share of both objects' sizes by which their centres must be apart to lie beside or above one another."""
SINE = 0.5
"""Of the angle between the line of the centres and the other axis; beyond it, the relation holds."""
SIZES = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
"""Prompts of each task in the original: 553."""

# The classes of COCO as GenEval calls them, in COCO's order.
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
PLURALS = {"person": "people", "knife": "knives", "sheep": "sheep", "skis": "skis", "scissors": "scissors"}
PLURALS["computer mouse"] = "computer mice"


@dataclass(frozen=True)
class Wanted:
    """Objects of a class that a picture must show."""

    name: str
    count: int
    colour: str | None = None
    relation: str | None = None
    """How they lie to the objects of another request."""
    target: int = 0
    """Number of that request."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what a picture of it must and must not show."""

    task: str
    text: str
    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...] = ()
    """So many objects of the class, or more, make the picture wrong."""


@dataclass(frozen=True)
class Detection:
    """An object that was found."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels."""
    mask: Any = None
    """Which pixels belong to it, for its colour."""


Colours = Callable[[Sequence[Detection]], Sequence[str]]
"""Names the colours of some detections."""


# -- the rules ---------------------------------------------------------------------------------------------


def considered(detections: Sequence[Detection], task: str) -> dict[str, list[Detection]]:
    """The detections that count, by class, the surest first.

    Args:
        detections: of one picture.
        task: of the prompt; counting asks for more certainty.

    Returns:
        At most ``MOST`` of each class.
    """
    least = COUNTING_THRESHOLD if task == "counting" else THRESHOLD
    found: dict[str, list[Detection]] = {}
    for each in sorted(detections, key=lambda detection: -detection.score):
        if each.score > least:
            found.setdefault(each.name, []).append(each)
    return {name: objects[:MOST] for name, objects in found.items()}


def relations(a: Detection, b: Detection) -> set[str]:
    """How one object lies to another.

    The centres' offset is shortened by a share of both objects' sizes in each direction; what is left, over
    the length of the whole offset, must point far enough along an axis.

    Args:
        a: the object.
        b: the other one.

    Returns:
        None, one or two of ``RELATIONS``.
    """
    offset, left = [], []
    for low in (0, 1):
        (a0, a1), (b0, b1) = (sorted((box[low], box[low + 2])) for box in (a.box, b.box))
        along = (a0 + a1) / 2 - (b0 + b1) / 2
        margin = POSITION_MARGIN * (a1 - a0 + b1 - b0)
        offset.append(along)
        left.append(math.copysign(max(abs(along) - margin, 0.0), along))
    if all(abs(each) < 1e-3 for each in left):
        return set()
    dx, dy = (each / math.hypot(*offset) for each in left)
    held = {"left of": dx < -SINE, "right of": dx > SINE, "above": dy < -SINE, "below": dy > SINE}
    return {name for name, holds in held.items() if holds}


def judge(prompt: Prompt, detections: Sequence[Detection], colours: Colours) -> tuple[bool, tuple[str, ...]]:
    """Whether a picture shows what its prompt asks for.

    Args:
        prompt: what was asked for.
        detections: objects of the picture.
        colours: asked for objects whose colour matters.

    Returns:
        Whether it is right, and what is wrong with it.
    """
    objects = considered(detections, prompt.task)
    wrong: list[str] = []
    matched: list[list[Detection] | None] = []
    for wanted in prompt.include:
        there = objects.get(wanted.name, [])[: wanted.count]
        fault = _fault(wanted, there, matched, colours)
        matched.append(there if fault is None else None)
        if fault is not None:
            wrong.append(fault)
    for unwanted in prompt.exclude:
        number = len(objects.get(unwanted.name, []))
        if number >= unwanted.count:
            wrong.append(f"expected {unwanted.name} < {unwanted.count}, found {number}")
    return not wrong, tuple(wrong)


def _fault(
    wanted: Wanted, there: list[Detection], matched: list[list[Detection] | None], colours: Colours
) -> str | None:
    if len(there) < wanted.count:
        return f"expected {wanted.name} >= {wanted.count}, found {len(there)}"
    if wanted.colour is not None:
        named = list(colours(there))
        if named.count(wanted.colour) < wanted.count:
            return f"expected {wanted.colour} {wanted.name} >= {wanted.count}, found {', '.join(named)}"
    if wanted.relation is not None:
        targets = matched[wanted.target]
        if targets is None:
            return f"no target for {wanted.name} to be {wanted.relation}"
        for each in there:
            for target in targets:
                if wanted.relation not in (held := relations(each, target)):
                    found = " and ".join(sorted(held)) or "neither beside nor above it"
                    return f"expected {wanted.name} {wanted.relation} {target.name}, found {found}"
    return None


# -- prompts -----------------------------------------------------------------------------------------------


def with_article(words: str) -> str:
    """``a`` or ``an`` before words."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(name: str) -> str:
    """Several of a class."""
    if name in PLURALS:
        return PLURALS[name]
    if name.endswith(("s", "x", "ch", "sh")):
        return name + "es"
    return name + "s"


def make_prompts(seed: int = 0) -> tuple[Prompt, ...]:
    """Prompts of our own by the grammar of the six tasks, as many of each as in the original.

    Args:
        seed: of the classes, colours and relations that are drawn.

    Returns:
        553 different prompts, task by task. A person is not asked for in a colour.
    """
    draw = np.random.default_rng(stream_seed(seed, "geneval"))
    things = [name for name in CLASSES if name != "person"]
    found: dict[str, Prompt] = {}

    def of(choices: Sequence[str], count: int) -> list[str]:
        return [choices[i] for i in draw.choice(len(choices), count, replace=False)]

    def single(k: int) -> Prompt:
        name = CLASSES[k]
        return Prompt("single_object", f"a photo of {with_article(name)}", (Wanted(name, 1),))

    def pair(_: int) -> Prompt:
        a, b = of(CLASSES, 2)
        text = f"a photo of {with_article(a)} and {with_article(b)}"
        return Prompt("two_object", text, (Wanted(a, 1), Wanted(b, 1)))

    def several(k: int) -> Prompt:
        (name,), count = of(CLASSES, 1), 2 + k % 3
        text = f"a photo of {NUMBERS[count]} {plural(name)}"
        return Prompt("counting", text, (Wanted(name, count),), (Wanted(name, count + 1),))

    def coloured(k: int) -> Prompt:
        (name,), colour = of(things, 1), COLOURS[k % len(COLOURS)]
        return Prompt("colors", f"a photo of {with_article(f'{colour} {name}')}", (Wanted(name, 1, colour),))

    def placed(k: int) -> Prompt:
        (a, b), relation = of(CLASSES, 2), RELATIONS[k % len(RELATIONS)]
        text = f"a photo of {with_article(a)} {relation} {with_article(b)}"
        return Prompt("position", text, (Wanted(b, 1), Wanted(a, 1, relation=relation)))

    def two_coloured(_: int) -> Prompt:
        a, b = of(things, 2)
        one, other = of(COLOURS, 2)
        text = f"a photo of {with_article(f'{one} {a}')} and {with_article(f'{other} {b}')}"
        return Prompt("color_attr", text, (Wanted(a, 1, one), Wanted(b, 1, other)))

    makers = (single, pair, several, coloured, placed, two_coloured)
    for (task, size), make in zip(SIZES.items(), makers, strict=True):
        before = len(found)
        while len(found) < before + size:
            prompt = make(len(found) - before)
            assert prompt.task == task
            found.setdefault(prompt.text, prompt)
    return tuple(found.values())


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """Read a prompt file, ours or the original.

    Args:
        path: JSON lines, see the top of this file.

    Returns:
        The prompts in order.

    Raises:
        UserError: naming the line that does not fit.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts from {path} ({error})") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompts.append(_prompt(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{path}, line {number}: {reason}") from error
    if not prompts:
        raise UserError(f"{path} holds no prompt")
    return tuple(prompts)


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write a prompt file in the schema of the original.

    Args:
        path: where to.
        prompts: what.

    Raises:
        UserError: if the file cannot be written.
    """
    write_text(path, "".join(json.dumps(_row(prompt)) + "\n" for prompt in prompts))


def _prompt(row: Mapping[str, Any]) -> Prompt:
    if row["tag"] not in TASKS:
        raise ValueError(f"tag is {row['tag']!r}; it must be one of {', '.join(TASKS)}")
    include = tuple(_wanted(each, place) for place, each in enumerate(row["include"]))
    exclude = tuple(_wanted(each, 0) for each in row.get("exclude", ()))
    return Prompt(row["tag"], str(row["prompt"]), include, exclude)


def _wanted(row: Mapping[str, Any], place: int) -> Wanted:
    name, colour = row["class"], row.get("color")
    if name not in CLASSES:
        raise ValueError(f"class is {name!r}, which is none of the 80 classes")
    if colour is not None and colour not in COLOURS:
        raise ValueError(f"color is {colour!r}; it must be one of {', '.join(COLOURS)}")
    relation, target = row.get("position") or (None, 0)
    if relation is not None and (relation not in RELATIONS or target not in range(place)):
        raise ValueError(
            f"position is {row['position']}; it must be one of {', '.join(RELATIONS)} and the number of an "
            "object before"
        )
    return Wanted(name, int(row["count"]), colour, relation, target)


def _row(prompt: Prompt) -> dict[str, Any]:
    def wanted(each: Wanted) -> dict[str, Any]:
        row: dict[str, Any] = {"class": each.name, "count": each.count}
        if each.colour is not None:
            row["color"] = each.colour
        if each.relation is not None:
            row["position"] = [each.relation, each.target]
        return row

    row = {"tag": prompt.task, "include": [wanted(each) for each in prompt.include]}
    if prompt.exclude:
        row["exclude"] = [wanted(each) for each in prompt.exclude]
    return row | {"prompt": prompt.text}


# -- the score ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """GenEval's score."""

    overall: float
    """Mean over the tasks, as published."""
    tasks: Mapping[str, float]
    """Share of right pictures."""
    intervals95: Mapping[str, tuple[float, float]]
    """Wilson's, over the prompts of a task: pictures of one prompt are not independent."""


def score(judged: Sequence[tuple[Prompt, bool]]) -> Score:
    """The score of judged pictures.

    Args:
        judged: prompt and verdict of every picture.

    Returns:
        The score of the tasks that occur.

    Raises:
        ValueError: if there are none.
    """
    if not judged:
        raise ValueError("there are no judged pictures; at least one is needed")
    tasks, intervals = {}, {}
    for task in TASKS:
        mine = [(prompt.text, right) for prompt, right in judged if prompt.task == task]
        if mine:
            tasks[task] = sum(right for _, right in mine) / len(mine)
            prompts = len({text for text, _ in mine})
            intervals[task] = wilson_interval(tasks[task] * prompts, prompts)
    return Score(sum(tasks.values()) / len(tasks), tasks, intervals)
