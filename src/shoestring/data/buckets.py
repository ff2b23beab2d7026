"""Shapes of about one area for pictures of every aspect, so that little is cropped away."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shoestring.runtime import UserError

MAX_ASPECT = 4.0
MAX_SIDE = 8192
# A shape on the grid may differ from the wanted area by this factor.
AREA_TOLERANCE = 1.15

Shape = tuple[int, int]


def bucket_shapes(
    resolution: int, count: int, multiple: int, max_aspect: float = MAX_ASPECT
) -> tuple[Shape, ...]:
    """Shapes of about the area of a square, evenly spaced in the logarithm of their aspect.

    Args:
        resolution: side of that square in pixels.
        count: how many; odd, as every upright shape has a lying twin and one is the square.
        multiple: every side is a multiple of it: pixels a latent times the patch size.
        max_aspect: of the longest shape, at least 1.

    Returns:
        Height and width in pixels, from the widest to the tallest.

    Raises:
        UserError: if there are not so many shapes on the grid, or the resolution is off it.
    """
    if resolution < 1 or resolution % multiple:
        raise UserError(
            f"--resolution is {resolution}; it must be a multiple of {multiple} (pixels a latent x patch)"
        )
    if resolution > MAX_SIDE:
        raise UserError(f"--resolution is {resolution}; it must be at most {MAX_SIDE}")
    if count < 1 or count % 2 == 0:
        raise UserError(
            f"--buckets is {count}; it must be odd: one square, and as many upright shapes as lying ones"
        )
    if max_aspect < 1:
        raise UserError(f"the largest aspect of buckets is {max_aspect:g}; it must be at least 1")
    pairs = count // 2
    lying = _lying_shapes(resolution, multiple, max_aspect)
    if len(lying) < pairs:
        raise UserError(
            f"--buckets is {count}; at {resolution} px in steps of {multiple} there are at most "
            f"{2 * len(lying) + 1} between 1:{max_aspect:g} and {max_aspect:g}:1; ask for fewer, or for "
            "smaller steps"
        )
    chosen: list[Shape] = []
    first = 0
    for i in range(1, pairs + 1):
        wanted = i / pairs * math.log(max_aspect)
        last = len(lying) - (pairs - i)  # enough must be left for those that follow
        best = min(range(first, last), key=lambda at: abs(_log_aspect(lying[at]) - wanted))
        chosen.append(lying[best])
        first = best + 1
    upright = [(width, height) for height, width in chosen]
    return (*reversed(chosen), (resolution, resolution), *upright)


def _log_aspect(shape: Shape) -> float:
    height, width = shape
    return math.log(width / height)


def _lying_shapes(resolution: int, multiple: int, max_aspect: float) -> list[Shape]:
    """All wider than tall: of each width the best height, and of each height the best width."""
    area, found = resolution**2, set()
    for side in range(multiple, int(resolution * math.sqrt(max_aspect)) + multiple, multiple):
        other = max(multiple, round(area / side / multiple) * multiple)
        height, width = min(side, other), max(side, other)
        fits = 1 / AREA_TOLERANCE <= height * width / area <= AREA_TOLERANCE
        if fits and height < width <= max_aspect * height:
            found.add((height, width))
    # Of two shapes with one aspect only the one of the better area.
    best: dict[float, Shape] = {}
    for shape in sorted(found, key=lambda s: abs(math.log(s[0] * s[1] / area))):
        best.setdefault(shape[1] / shape[0], shape)
    return [best[aspect] for aspect in sorted(best)]


def choose_buckets(
    width_N: NDArray[np.integer], height_N: NDArray[np.integer], shapes: Sequence[Shape]
) -> NDArray[np.int16]:
    """The bucket of each picture: the nearest in the logarithm of the aspect.

    Args:
        width_N: of the originals, in pixels.
        height_N: of the originals, in pixels.
        shapes: height and width of the buckets.

    Returns:
        Numbers of buckets; of two equally near the first.
    """
    aspect_N = np.log(width_N.astype(np.float64) / height_N)
    aspect_B = np.array([_log_aspect(shape) for shape in shapes])
    return np.abs(aspect_N[:, None] - aspect_B[None]).argmin(axis=1).astype(np.int16)


def filled_buckets(
    width_N: NDArray[np.integer],
    height_N: NDArray[np.integer],
    count_N: NDArray[np.integer],
    shapes: Sequence[Shape],
    smallest: int,
) -> tuple[tuple[Shape, ...], tuple[int, ...]]:
    """Leave out buckets of too few pictures, which go to the nearest that stay.

    Args:
        width_N: the different sizes of originals.
        height_N: the same.
        count_N: how many pictures have that size.
        shapes: all buckets.
        smallest: pictures that a bucket must have, at least 1.

    Returns:
        The shapes that stay, in their order, and how many pictures each has.

    Raises:
        UserError: if all pictures together are fewer than that.
    """
    total = int(count_N.sum())
    if total < smallest:
        raise UserError(
            f"--min-bucket is {smallest:,}, but the store has {total:,} pictures in all; give a number that "
            "is at most the batch of a training step and at most that"
        )
    kept = list(shapes)
    while True:
        bucket_N = choose_buckets(width_N, height_N, kept)
        counts = np.bincount(bucket_N, weights=count_N, minlength=len(kept)).astype(np.int64)
        # One at a time: what the rarest gives away may fill its neighbour.
        rarest = int(counts.argmin())
        if counts[rarest] >= smallest:
            return tuple(kept), tuple(int(count) for count in counts)
        del kept[rarest]
