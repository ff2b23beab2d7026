"""Reads a picture of shapes back into a scene and says whether it shows what a caption asks for.

No learning: ink is unmixed from white by colour, connected regions are matched with the five shapes. On
clean pictures the reading is exact; blur and noise as a diffusion model leaves them hardly matter.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shoestring.data.shapes import COLOURS, POSITIONS, SHAPES, Requirement, coverage, parse_caption
from shoestring.tensors import UInt8

# The smallest shape of the data covers 3 % of a picture; less than a third of that is a speck.
_MIN_AREA = 0.01
# No shape of the data is wider than half a picture; a picture filled with colour is not a square.
_MAX_SIZE = 0.8
# A region matches no shape below this overlap with the best of them (soft intersection over union).
_MIN_OVERLAP = 0.68
# In RGB, from the nearest colour of the palette; any two of them are at least 130 apart.
_MAX_COLOUR_DISTANCE = 80.0
# Places count when they are off the middle line, or off each other, by this share of the side.
_MARGIN = 0.06


@dataclass(frozen=True)
class Seen:
    """A shape read from a picture; ``None`` = like nothing known. Places are shares of the side."""

    shape: str | None
    colour: str | None
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Verdict:
    """How a picture meets a caption; relation and position are ``None`` where none is asked for.

    ``shape``, ``colour`` and ``count`` are judged apart from each other: the shapes present are the ones
    asked for, the colours present are, the number of things is. ``all`` needs every thing with its own
    colour in the right number, and the relation and position.
    """

    shape: bool
    colour: bool
    count: bool
    relation: bool | None
    position: bool | None
    all: bool


def read(picture: UInt8[Tensor, "3 H W"]) -> tuple[Seen, ...]:
    """Read a picture back.

    Args:
        picture: square, 24 pixels or more.

    Returns:
        The shapes, row by row of their topmost pixels.
    """
    ink = 255.0 - picture.permute(1, 2, 0).numpy().astype(np.float64)
    palette = 255.0 - np.array(list(COLOURS.values()), dtype=np.float64)
    # How much of each colour, and what it leaves unexplained; anti-aliased edges are mixtures with white.
    amount = np.clip(ink @ palette.T / (palette**2).sum(axis=1), 0, 1)
    residual = np.linalg.norm(ink[:, :, None] - amount[..., None] * palette, axis=-1)
    alpha = np.take_along_axis(amount, residual.argmin(axis=-1)[..., None], axis=-1)[..., 0]
    labels = _regions(alpha > 0.5)
    side = alpha.shape[0]
    seen = []
    for label in np.unique(labels[labels >= 0]):
        region = labels == label
        if region.sum() < _MIN_AREA * region.size:
            continue
        core = region & (alpha > 0.85)
        core = core if core.sum() >= 0.2 * region.sum() else region
        distances = np.linalg.norm(palette - ink[core].mean(axis=0), axis=1)
        nearest = int(distances.argmin())
        colour = list(COLOURS)[nearest] if distances[nearest] <= _MAX_COLOUR_DISTANCE else None
        seen.append(_match(np.where(_grown(region), alpha, 0.0), colour, side))
    return tuple(seen)


def _regions(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Label the 4-connected regions by their first pixel; -1 outside."""
    labels = np.where(mask, np.arange(mask.size).reshape(mask.shape), mask.size)
    while True:
        padded = np.pad(labels, 1, constant_values=mask.size)
        neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
        lowest = np.where(mask, np.minimum.reduce([labels, *neighbours]), mask.size)
        if (lowest == labels).all():
            return np.where(mask, labels, -1)
        labels = lowest


def _grown(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The region and its neighbours, where the soft edge lies."""
    padded = np.pad(region, 1)
    return region | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]


def _match(alpha: NDArray[np.float64], colour: str | None, side: int) -> Seen:
    """The shape that overlaps most, each one laid so that its area and centroid are those of the region.

    Area and centroid hardly change under blur, unlike the bounding box.
    """
    area, x, y = _moments(alpha)
    best, found = 0.0, Seen(None, colour, x / side, y / side, float(np.sqrt(area)) / side)
    for shape in SHAPES:
        unit_area, unit_x, unit_y = _UNIT[shape]
        size = float(np.sqrt(area / unit_area))
        centre_x, centre_y = x - unit_x * size, y - unit_y * size
        template = coverage(shape, centre_x, centre_y, size, side)
        overlap = np.minimum(alpha, template).sum() / np.maximum(alpha, template).sum()
        if size <= _MAX_SIZE * side and overlap > max(best, _MIN_OVERLAP):
            best, found = overlap, Seen(shape, colour, centre_x / side, centre_y / side, size / side)
    return found


def _moments(alpha: NDArray[np.float64]) -> tuple[float, float, float]:
    """Area and centroid in pixels."""
    area = float(alpha.sum())
    centres = np.arange(alpha.shape[0]) + 0.5
    return area, float(alpha.sum(axis=0) @ centres) / area, float(alpha.sum(axis=1) @ centres) / area


def _unit_moments(shape: str) -> tuple[float, float, float]:
    """Area, and centroid relative to the centre, of a shape of size 1."""
    area, x, y = _moments(coverage(shape, 64, 64, 128, 128))
    return area / 128**2, x / 128 - 0.5, y / 128 - 0.5


_UNIT = {shape: _unit_moments(shape) for shape in SHAPES}


def satisfies(picture: UInt8[Tensor, "3 H W"], caption: str) -> Verdict:
    """Judge a picture against a caption of the grammar.

    Args:
        picture: square, 24 pixels or more.
        caption: see :func:`shoestring.data.shapes.parse_caption`.

    Returns:
        The verdict.

    Raises:
        UserError: if the caption is not of the grammar.
    """
    return judge(read(picture), parse_caption(caption))


def judge(seen: tuple[Seen, ...], asked: Requirement) -> Verdict:
    """Judge what was read against what was asked for; see :class:`Verdict`."""
    wanted = Counter({(group.shape, group.colour): group.count for group in asked.groups})
    relation = position = None
    if asked.relation is not None:
        first, second = (
            [s for s in seen if (s.shape, s.colour) == (g.shape, g.colour)] for g in asked.groups
        )
        relation = any(_stands(a, asked.relation, b) for a in first for b in second)
    if asked.position is not None:
        group = asked.groups[0]
        position = any(
            _is_at(s, asked.position) for s in seen if (s.shape, s.colour) == (group.shape, group.colour)
        )
    return Verdict(
        shape={s.shape for s in seen} == {shape for shape, _ in wanted},
        colour={s.colour for s in seen} == {colour for _, colour in wanted},
        count=len(seen) == wanted.total(),
        relation=relation,
        position=position,
        all=Counter((s.shape, s.colour) for s in seen) == wanted
        and relation is not False
        and position is not False,
    )


def _stands(a: Seen, relation: str, b: Seen) -> bool:
    ahead = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
    return ahead[relation] > _MARGIN


def _is_at(s: Seen, position: str) -> bool:
    x, y = POSITIONS[position]
    if (x, y) == (0.5, 0.5):
        return max(abs(s.x - 0.5), abs(s.y - 0.5)) <= 2 * _MARGIN
    aside = s.x - 0.5 if x > 0.5 else 0.5 - s.x
    up_or_down = s.y - 0.5 if y > 0.5 else 0.5 - s.y
    return min(aside, up_or_down) > _MARGIN
