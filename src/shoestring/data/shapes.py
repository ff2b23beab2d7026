"""Synthetic pictures of one to four coloured shapes with captions: data without any download.

A caption says what is in a picture (shape, colour, number, place or relation), and
:mod:`shoestring.data.oracle` reads a picture back and judges it. Some combinations of shape and colour
never appear in training, so that compositional generalisation is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from shoestring.data.records import CaptionedImages, Splits, share_of
from shoestring.runtime import UserError, stream_seed

SHAPES = ("circle", "square", "triangle", "cross", "heart")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 25, 30),
    "green": (25, 165, 50),
    "blue": (30, 70, 230),
    "yellow": (250, 215, 0),
    "purple": (150, 40, 190),
    "black": (20, 20, 20),
}
NUMBERS = ("a", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")
POSITIONS: dict[str, tuple[float, float]] = {
    "at the top left": (0.28, 0.28),
    "at the top right": (0.72, 0.28),
    "at the bottom left": (0.28, 0.72),
    "at the bottom right": (0.72, 0.72),
    "in the center": (0.5, 0.5),
}
LATTICE = (0.25, 0.5, 0.75)
GRID = 16
"""Places and sizes are whole sixteenths of the side, two pixels of 32. At any place and size at all, a model
of minutes learns colours but no outlines (EXPERIMENTS.md)."""
TRAIN_PICTURES = 6000
HELD_OUT_PICTURES = 600
# How often each kind of caption is drawn; single shapes most, as they are what everything builds on.
_KINDS = {"single": 0.35, "position": 0.15, "count": 0.15, "pair": 0.15, "relation": 0.15, "counts": 0.05}

Combination = tuple[str, str]
"""(shape, colour)"""


@dataclass(frozen=True)
class Group:
    """``count`` equal things: "two blue squares"."""

    count: int
    shape: str
    colour: str

    def __str__(self) -> str:
        plural = ("es" if self.shape == "cross" else "s") if self.count > 1 else ""
        return f"{NUMBERS[self.count - 1]} {self.colour} {self.shape}{plural}"


@dataclass(frozen=True)
class Requirement:
    """What a caption asks for; ``str()`` is the caption. A relation holds between the two groups."""

    groups: tuple[Group, ...]
    relation: str | None = None
    position: str | None = None

    def __str__(self) -> str:
        if self.relation is not None:
            return f" {self.relation} ".join(map(str, self.groups))
        caption = " and ".join(map(str, self.groups))
        return caption if self.position is None else f"{caption} {self.position}"


@dataclass(frozen=True)
class Thing:
    """A shape in a picture; centre and side are shares of the picture's side, from the top left."""

    shape: str
    colour: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """A picture before it is rendered, with its caption."""

    caption: str
    things: tuple[Thing, ...]


_GROUPS = {
    str(group): group
    for group in (Group(n, shape, colour) for n in (1, 2, 3, 4) for shape in SHAPES for colour in COLOURS)
}


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def parse_caption(caption: str) -> Requirement:
    """Read a caption of the grammar: the inverse of ``str(requirement)``.

    Args:
        caption: e.g. ``"a red circle left of a green triangle"``.

    Returns:
        What it asks for.

    Raises:
        UserError: if the caption is not of the grammar.
    """
    text, position, relation = " ".join(caption.lower().split()), None, None
    for name in POSITIONS:
        if text.endswith(f" {name}"):
            text, position = text.removesuffix(f" {name}"), name
    parts = text.split(" and ")
    for name in RELATIONS:
        if f" {name} " in text:
            parts, relation = text.split(f" {name} "), name
    groups = tuple(_GROUPS[part] for part in parts if part in _GROUPS)
    counts = tuple(group.count for group in groups)
    known = len({(group.shape, group.colour) for group in groups}) == len(parts)
    if relation is not None:
        valid = known and counts == (1, 1) and position is None
    elif position is not None:
        valid = known and counts == (1,)
    else:
        valid = known and len(groups) <= 2 and sum(counts) <= 4
    if not valid:
        raise UserError(
            f"{_short(caption)} is not a caption of the shapes; it must be like 'a red circle', "
            "'two blue squares', 'a red circle left of a green heart', 'a black cross and two red hearts' or "
            f"'a yellow square in the center', with the shapes {', '.join(SHAPES)} and the colours "
            f"{', '.join(COLOURS)}, at most four things in all"
        )
    return Requirement(groups, relation, position)


def combinations(held_out: float) -> tuple[list[Combination], list[Combination]]:
    """All (shape, colour), split into trained and held out.

    They are held out along the diagonals of the table, so that every shape and colour stays in training.

    Args:
        held_out: share to hold out, 0 to 0.5; above 0 it is at least one combination.

    Returns:
        Trained and held-out combinations.

    Raises:
        UserError: if the share is above 0.5.
    """
    if held_out > 0.5:
        raise UserError(
            f"data.held_out is {held_out}; data.source=shapes takes at most 0.5, as every shape and every "
            "colour must be seen in training"
        )
    colours = list(COLOURS)
    total = len(SHAPES) * len(colours)
    diagonals = [
        (shape, colours[(2 * row + column) % len(colours)])
        for column in range(len(colours))
        for row, shape in enumerate(SHAPES)
    ]
    count = min(total, max(round(held_out * total), int(held_out > 0)))
    return diagonals[count:], diagonals[:count]


def single_shape_prompts(held_out: float = 0.1) -> tuple[list[str], list[str]]:
    """The prompts "a COLOUR SHAPE" of all combinations: (trained, held out); see :func:`combinations`."""
    trained, held = combinations(held_out)
    return (
        [str(Group(1, shape, colour)) for shape, colour in trained],
        [str(Group(1, shape, colour)) for shape, colour in held],
    )


def scene(
    seed: int,
    index: int,
    held_out: float = 0.1,
    split: Literal["train", "held_out"] = "train",
) -> Scene:
    """The scene of a picture, a pure function of its arguments.

    Args:
        seed: any integer.
        index: number of the picture.
        held_out: share of held-out combinations.
        split: ``train`` never shows a held-out combination, ``held_out`` always shows one.

    Returns:
        Caption and things; they do not touch and stay inside the picture.
    """
    rng = np.random.default_rng(stream_seed(seed, f"shapes/{split}", index))
    trained, held = combinations(held_out)
    wanted, others = (trained, trained) if split == "train" else (held, trained + held)
    first = wanted[rng.integers(len(wanted))]
    second = others[rng.integers(len(others))]
    while second == first:
        second = others[rng.integers(len(others))]
    pair = (first, second) if rng.random() < 0.5 else (second, first)
    kind = rng.choice(list(_KINDS), p=list(_KINDS.values()))
    if kind == "single":
        requirement = Requirement((Group(1, *first),))
    elif kind == "position":
        position = list(POSITIONS)[rng.integers(len(POSITIONS))]
        requirement = Requirement((Group(1, *first),), position=position)
    elif kind == "count":
        requirement = Requirement((Group(int(rng.integers(2, 5)), *first),))
    elif kind == "relation":
        relation = RELATIONS[rng.integers(len(RELATIONS))]
        requirement = Requirement((Group(1, *pair[0]), Group(1, *pair[1])), relation)
    else:
        counts = (1, 1) if kind == "pair" else ((2, 1), (1, 2), (2, 2), (3, 1), (1, 3))[rng.integers(5)]
        requirement = Requirement((Group(counts[0], *pair[0]), Group(counts[1], *pair[1])))
    return Scene(str(requirement), place(requirement, rng))


def place(requirement: Requirement, rng: np.random.Generator) -> tuple[Thing, ...]:
    """Sizes and places that meet the requirement, on the grid, with gaps of at least two of 32 pixels.

    Args:
        requirement: what is to be shown.
        rng: draws them.

    Returns:
        The things.
    """
    named = [(group.shape, group.colour) for group in requirement.groups for _ in range(group.count)]

    def near(value: float, spread: float) -> float:
        return round(float(value + rng.uniform(-spread, spread)) * GRID) / GRID

    if len(named) == 1:
        if requirement.position is not None:
            x, y = POSITIONS[requirement.position]
            return (Thing(*named[0], near(x, 0.04), near(y, 0.04), near(0.39, 0.05)),)
        x, y = (LATTICE[i] for i in rng.integers(len(LATTICE), size=2))
        return (Thing(*named[0], x, y, near(0.39, 0.05)),)
    if requirement.relation is not None:
        low_first = requirement.relation in ("left of", "above")
        along = [0.25, 0.75] if low_first else [0.75, 0.25]
        middle = near(0.5, 0.22)
        things = []
        for (shape, colour), a in zip(named, along, strict=True):
            b = near(middle, 0.05)
            x, y = (a, b) if requirement.relation in ("left of", "right of") else (b, a)
            things.append(Thing(shape, colour, x, y, near(0.37, 0.03)))
        return tuple(things)
    # One thing a quarter of the picture: a side of at most 0.375 leaves a gap.
    cells = rng.permutation(4)[: len(named)]
    return tuple(
        Thing(
            shape,
            colour,
            0.25 + 0.5 * (c % 2),
            0.25 + 0.5 * (c // 2),
            near(0.345, 0.03),
        )
        for (shape, colour), c in zip(named, cells, strict=True)
    )


def _heart(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    lobes = (np.abs(x) - 0.5) ** 2 + (y + 0.45) ** 2 <= 0.25
    tip = (y >= -0.45) & (np.abs(x) <= (1 - y) / 1.45 * 0.98)
    return lobes | tip


# Inside or not, for x to the right and y down in [-1, 1]; told apart at a side of nine pixels.
_INSIDE: dict[str, Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.bool_]]] = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) <= 0.9,
    "triangle": lambda x, y: (y <= 0.87) & (y >= 2 * 0.87 * np.abs(x) - 0.87),
    "cross": lambda x, y: (np.minimum(np.abs(x), np.abs(y)) <= 0.3) & (np.maximum(np.abs(x), np.abs(y)) <= 1),
    "heart": _heart,
}


def coverage(shape: str, x: float, y: float, size: float, side: int) -> NDArray[np.float64]:
    """Share of each pixel that a shape covers (anti-aliased, 5 x 5 samples a pixel).

    Args:
        shape: one of ``SHAPES``.
        x: centre, in pixels from the left edge.
        y: centre, in pixels from the top edge.
        size: side of the square that the shape is defined in, in pixels.
        side: of the picture, in pixels.

    Returns:
        Values in [0, 1], rows first.
    """
    left, right = max(int(x - size / 2), 0), min(int(x + size / 2) + 1, side)
    top, bottom = max(int(y - size / 2), 0), min(int(y + size / 2) + 1, side)
    across = ((np.arange(left * 5, right * 5) + 0.5) / 5 - x) * 2 / size
    down = ((np.arange(top * 5, bottom * 5) + 0.5) / 5 - y) * 2 / size
    grid_x, grid_y = np.meshgrid(across, down)
    inside = _INSIDE[shape](grid_x, grid_y) & (np.abs(grid_x) <= 1) & (np.abs(grid_y) <= 1)
    covered = np.zeros((side, side))
    covered[top:bottom, left:right] = inside.reshape(bottom - top, 5, right - left, 5).mean(axis=(1, 3))
    return covered


def render(things: tuple[Thing, ...], side: int) -> NDArray[np.uint8]:
    """Draw things on white, ``(3, side, side)``."""
    picture = np.full((side, side, 3), 255.0)
    for thing in things:
        alpha = coverage(thing.shape, thing.x * side, thing.y * side, thing.size * side, side)
        picture += alpha[:, :, None] * (np.array(COLOURS[thing.colour]) - picture)
    return picture.round().astype(np.uint8).transpose(2, 0, 1)


def load(resolution: int, held_out: float, max_captions: int | None, seed: int = 0) -> Splits:
    """Draw the pictures of both splits.

    Args:
        resolution: side in pixels, at least 24, below which shapes cannot be told apart.
        held_out: share of the combinations to hold out; 0 makes the held-out split empty.
        max_captions: train on the pictures of this many captions, chosen by hash; ``None`` takes all.
        seed: another seed draws other pictures.

    Returns:
        6000 training pictures (fewer under ``max_captions``) and 600 held-out ones.

    Raises:
        UserError: if the resolution is too small or the share too large.
    """
    if resolution < 24:
        raise UserError(f"resolution is {resolution}; data.source=shapes needs at least 24 pixels")
    scenes = [scene(seed, index, held_out) for index in range(TRAIN_PICTURES)]
    captions = sorted({s.caption for s in scenes}, key=lambda caption: (share_of(caption, "keep"), caption))
    kept = set(captions[:max_captions])
    pictures = HELD_OUT_PICTURES if held_out > 0 else 0
    held = [scene(seed, index, held_out, "held_out") for index in range(pictures)]
    return Splits(_draw([s for s in scenes if s.caption in kept], resolution), _draw(held, resolution))


def _draw(scenes: list[Scene], resolution: int) -> CaptionedImages:
    images = np.empty((len(scenes), 3, resolution, resolution), dtype=np.uint8)
    for row, s in enumerate(scenes):
        images[row] = render(s.things, resolution)
    return CaptionedImages(torch.from_numpy(images), tuple(s.caption for s in scenes))
